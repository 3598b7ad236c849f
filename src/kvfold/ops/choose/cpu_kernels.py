"""Numba kernel: the highest scores of each row, without sorting it."""

from typing import no_type_check

import numpy as np
from numba import njit, prange


@njit(nogil=True, parallel=True, cache=True)
@no_type_check
def top_mask(scores, count, chosen):
    """chosen[r] marks the `count[r]` highest of scores[r]; ties go to the earlier one, -inf is never chosen."""
    rows, t = scores.shape
    for r in prange(rows):
        line, k = scores[r], count[r]
        able = 0
        for i in range(t):
            able += line[i] > -np.inf
        k = min(k, able)
        if k <= 0:
            for i in range(t):
                chosen[r, i] = False
            continue
        bar = np.partition(line, t - k)[t - k]  # the lowest that is chosen
        room = k
        for i in range(t):
            chosen[r, i] = line[i] > bar
            room -= line[i] > bar
        for i in range(t):
            if room > 0 and line[i] == bar:
                chosen[r, i] = True
                room -= 1
