"""Numba kernel: a tile of vectors against all others, and the highest product of each row."""

from typing import no_type_check

import numpy as np
from numba import njit, prange

from kvfold.ops.prefill.cpu_kernels import copy_rows, products
from kvfold.ops.simd import FAST, STRIP, f32

LOOK = 128
"""Products among which the highest is looked for at once."""


@njit(nogil=True, parallel=True, cache=True, fastmath=FAST)
@no_type_check
def most_alike(asking, also, others, as_well, asks, there, m, tile, best, first):
    """asking (N, n, D) against panels of others, (N, panels, D, STRIP) flat; best and first (N, n).

    `also` and `as_well` are a second kind of both, (N, 0, 0) and (0,) for none. Of N's row i the first `asks[i]` ask,
    the first `there[i]` of the m others answer.
    """
    heads, n, d = asking.shape
    both, tiles, width = also.shape[2], (n + tile - 1) // tile, (m + STRIP - 1) // STRIP * STRIP
    for task in prange(heads * tiles):
        here, start = task // tiles, task % tiles * tile
        stop, count = min(n, start + tile), there[here]
        rows = min(stop, asks[here]) - start if count else 0
        for i in range(max(start, start + rows), stop):
            best[here, i], first[here, i] = f32(-np.inf), 0
        if rows <= 0:
            continue
        found, vectors = np.empty(rows * width, np.float32), np.empty(rows * max(d, both), np.float32)
        copy_rows(asking[here, start : start + rows], f32(1.0), vectors, d)
        products(vectors, others, here * width * d, found, rows, width, count, d)
        if both:
            second = np.empty(rows * width, np.float32)
            copy_rows(also[here, start : start + rows], f32(1.0), vectors, both)
            products(vectors, as_well, here * width * both, second, rows, width, count, both)
            for j in range(rows * width):
                found[j] = max(found[j], f32(0.0)) * max(second[j], f32(0.0))
        for r in range(rows):
            line = found[r * width : (r + 1) * width]
            top, place = f32(-np.inf), 0
            for j in range(0, count, LOOK):
                some, high = line[j : min(count, j + LOOK)], f32(-np.inf)
                for i in range(len(some)):
                    high = max(high, some[i])
                if high > top:
                    top, place = high, j
            for i in range(place, min(count, place + LOOK)):
                if line[i] == top:
                    place = i
                    break
            best[here, start + r], first[here, start + r] = top, place
