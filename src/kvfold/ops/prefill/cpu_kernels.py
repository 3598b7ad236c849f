"""Numba kernels of dense causal attention: a tile of queries against all its keys at once, in a core's own cache.

A fused kernel with an online softmax knows a query's sum only at its end, and so can't say what each key got. A tile of
a few queries keeps its whole rows instead: the same products and exponentials, and the column sums cost one more look.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, prange

from kvfold.ops.simd import FAST, NEVER, STRIP, exponential, f32, multiply

PARTS = 16
"""Shares of a (row, KV head)'s queries, each with its own column sums: fixed, so that threads don't change results."""
CHUNK = 256
"""Keys whose values are multiplied at once."""


@njit(nogil=True, cache=True)
@no_type_check
def copy_rows(source, scale, target, d):
    for r in range(source.shape[0]):
        for i in range(d):
            target[r * d + i] = source[r, i] * scale


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def products(queries, keys, panel, logits, rows, width, stop, d):
    """logits (rows, width) of a tile over keys 0 to `stop`; `keys` in panels of STRIP, (panels, D, STRIP)."""
    far = (stop + STRIP - 1) // STRIP * STRIP
    for r in range(rows):
        logits[r * width : r * width + far] = f32(0.0)
    for j in range(0, stop, STRIP):
        multiply(queries, 0, d, keys, panel + j * d, STRIP, logits, j, width, rows, STRIP, d)


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _add_columns(logits, weights, rows, width, stop, sums):
    """sums[j] += sum over rows of weights[r] * logits[r, j], four rows at a time."""
    # Slices from 0: Numba wraps an index that could be negative, and a loop with that in it is not vectorised.
    for start in range(0, stop, 512):
        count = min(512, stop - start)
        into = sums[start : start + count]
        r = 0
        while r + 4 <= rows:
            w0, w1, w2, w3 = weights[r], weights[r + 1], weights[r + 2], weights[r + 3]
            at = r * width + start
            a, b = logits[at : at + count], logits[at + width : at + width + count]
            c, d = logits[at + 2 * width : at + 2 * width + count], logits[at + 3 * width : at + 3 * width + count]
            for j in range(count):
                into[j] += w0 * a[j] + w1 * b[j] + w2 * c[j] + w3 * d[j]
            r += 4
        while r < rows:
            w, a = weights[r], logits[r * width + start : r * width + start + count]
            for j in range(count):
                into[j] += w * a[j]
            r += 1


@njit(nogil=True, parallel=True, cache=True, fastmath=FAST)
@no_type_check
def causal(q, keys, values, scale, tile, shares, out, lse, sums):
    """q (N, G, T, D), N = (row, KV head); keys (N, panels, D, STRIP), values (N, T, Dv) flat; sums (N, PARTS, T or 0).

    Query i sees keys 0 to i, and counts shares[i] in the sums.
    """
    n, g, t, d = q.shape
    dv = out.shape[3]
    panels = (t + STRIP - 1) // STRIP
    width, tiles = panels * STRIP, (t + tile - 1) // tile
    for task in prange(n * PARTS):
        here, part = task // PARTS, task % PARTS
        logits, queries = np.empty(tile * width, np.float32), np.empty(tile * d, np.float32)
        weights, acc = np.empty(tile, np.float32), np.empty(tile * dv, np.float32)
        counted = np.empty(tile, np.float32)
        for index in range(part, tiles * g, PARTS):
            h, start = index % g, (index // g) * tile
            stop = min(t, start + tile)
            rows = stop - start
            copy_rows(q[here, h, start:stop], scale, queries, d)
            products(queries, keys, here * width * d, logits, rows, width, stop, d)
            for r in range(rows):
                line = logits[r * width : (r + 1) * width]
                seen = start + r + 1
                top = NEVER
                for j in range(seen):
                    top = max(top, line[j])
                total = f32(0.0)
                for j in range(seen):
                    weight = exponential(line[j] - top)
                    line[j] = weight
                    total += weight
                line[seen:stop] = f32(0.0)
                weights[r] = f32(1.0) / total
                counted[r] = weights[r] * shares[start + r]
                lse[here, h, start + r] = top + f32(math.log(total))
            if sums.shape[2]:
                _add_columns(logits, counted, rows, width, stop, sums[here, part])
            acc[:] = f32(0.0)
            for j in range(0, stop, CHUNK):
                multiply(
                    logits, j, width, values, (here * t + j) * dv, dv, acc, 0, dv, rows, dv, min(CHUNK, stop - j)
                )  # fmt: skip
            for r in range(rows):
                for i in range(dv):
                    out[here, h, start + r, i] = acc[r * dv + i] * weights[r]


@njit(nogil=True, parallel=True, cache=True, fastmath=FAST)
@no_type_check
def column_sums(q, keys, lse, bias, first, scale, tile, sums):
    """sums (N, PARTS, T): exp(logit - lse) of each query and key; query i sees keys 0 to first[n] + i.

    An infinite `lse` leaves its query out. `bias` (N, T), or (N, 0) for none.
    """
    n, g, count, d = q.shape
    t = sums.shape[2]
    panels = (t + STRIP - 1) // STRIP
    width, tiles = panels * STRIP, (count + tile - 1) // tile
    for task in prange(n * PARTS):
        here, part = task // PARTS, task % PARTS
        logits, queries = np.empty(tile * width, np.float32), np.empty(tile * d, np.float32)
        ones = np.ones(tile, np.float32)
        for index in range(part, tiles * g, PARTS):
            h, start = index % g, (index // g) * tile
            stop = min(count, start + tile)
            rows, far = stop - start, min(t, first[here] + stop)
            copy_rows(q[here, h, start:stop], scale, queries, d)
            products(queries, keys, here * width * d, logits, rows, width, far, d)
            for r in range(rows):
                line = logits[r * width : (r + 1) * width]
                seen = min(t, first[here] + start + r + 1)
                shift = lse[here, h, start + r]
                if np.isinf(shift):  # it may hold anything, NaN too
                    seen = 0
                if bias.shape[1]:
                    for j in range(seen):
                        line[j] += bias[here, j]
                for j in range(seen):
                    line[j] = exponential(line[j] - shift)
                line[seen:far] = f32(0.0)
            _add_columns(logits, ones, rows, width, far, sums[here, part])
