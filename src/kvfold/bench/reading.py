"""A plain read by kvfold's own threads and vectors: the most that a kernel of theirs could reach on this machine."""

from typing import no_type_check

import numpy as np
from numba import njit, prange

from kvfold.ops.simd import STRIP, multiply

ROWS = 512
"""Rows of STRIP numbers that one product reads: their factors stay in the first cache."""
UNIT = ROWS * STRIP
"""Numbers that the array's size is a multiple of; 2**15 or, with narrow vectors, less."""


@njit(nogil=True, parallel=True, cache=True)
@no_type_check
def total(data, workers):
    """The sum of a flat float32 array whose size is a multiple of UNIT, each worker's share from end to end."""
    ones, sums = np.ones(ROWS, np.float32), np.zeros((workers, STRIP), np.float32)
    units = data.size // UNIT
    for w in prange(workers):
        mine = np.zeros(STRIP, np.float32)
        for unit in range(w * units // workers, (w + 1) * units // workers):
            multiply(ones, 0, ROWS, data, unit * UNIT, STRIP, mine, 0, STRIP, 1, STRIP, ROWS)
        sums[w] = mine
    return sums.sum()
