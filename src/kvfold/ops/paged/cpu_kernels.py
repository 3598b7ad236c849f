"""Numba kernels over pages. Arrays: planes flat, `table` (R, M) int32, `lengths` (R,) int32, `holes` (R, K) int32 slots
below a row's length that hold no token, `hole_count` (R,). A row is one (sequence, KV head).
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, prange

from kvfold.ops.simd import FAST, NEVER, exponential, f32, multiply, multiply_transposed

BLOCK = 64
"""Tokens between two looks at the running maximum: their logits and a page of values stay in the first cache."""


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _logits(
    queries, keys, mass, read, table, holes, hole_count, r, start, count, page_size, g, d, logits
):  # fmt: skip
    """Logits (G, BLOCK) of a block of slots; NEVER where there is no token to see. Returns whether there is any."""
    any_read = read.size == 0
    if not any_read:
        for i in range(count):
            if read[r, start + i]:
                any_read = True
                break
        if not any_read:
            return False
    for first in range(0, count, page_size):
        page = np.int64(table[r, (start + first) // page_size])
        multiply_transposed(
            queries, 0, d, keys, page * page_size * d, d, logits, first, BLOCK, g, page_size, d
        )  # fmt: skip
        if mass.size:
            for h in range(g):
                for i in range(min(page_size, count - first)):
                    logits[h * BLOCK + first + i] += mass[page * page_size + i, 0]
    for k in range(hole_count[r]):
        slot = holes[r, k] - start
        if 0 <= slot < count:
            for h in range(g):
                logits[h * BLOCK + slot] = NEVER
    if read.size:
        for i in range(count):
            if not read[r, start + i]:
                for h in range(g):
                    logits[h * BLOCK + i] = NEVER
    return True


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _attend_row(
    q, keys, values, mass, read, table, holes, hole_count, r, start, stop, page_size, scale, dv, out, lse, probs
):  # fmt: skip
    """One row's slots from `start` to `stop`, by online softmax. `out` (G, Dv) and `lse` (G,); `probs` gets logits."""
    g, d = q.shape[1], q.shape[2]
    queries = np.empty(g * d, np.float32)
    for h in range(g):
        for i in range(d):
            queries[h * d + i] = q[r, h, i] * scale
    top, total = np.full(g, NEVER), np.zeros(g, np.float32)
    logits, sums = np.empty(g * BLOCK, np.float32), np.zeros(g * dv, np.float32)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        some = _logits(
            queries, keys, mass, read, table, holes, hole_count, r, block, count, page_size, g, d, logits
        )  # fmt: skip
        if probs.size:
            for h in range(g):
                for i in range(count):
                    probs[r, h, block + i] = logits[h * BLOCK + i] if some else NEVER
        if not some:
            continue
        for h in range(g):
            best = top[h]
            for i in range(count):
                best = max(best, logits[h * BLOCK + i])
            if best <= NEVER:  # nothing seen so far: an exponential of 0 would count what is not there
                for i in range(count):
                    logits[h * BLOCK + i] = f32(0.0)
                continue
            fade = exponential(top[h] - best)
            here = f32(0.0)
            for i in range(count):
                weight = exponential(logits[h * BLOCK + i] - best)
                logits[h * BLOCK + i] = weight
                here += weight
            total[h] = total[h] * fade + here
            if top[h] != best:
                for i in range(dv):
                    sums[h * dv + i] *= fade
            top[h] = best
        for first in range(0, count, page_size):
            page = np.int64(table[r, (block + first) // page_size])
            held = min(page_size, count - first)
            multiply(logits, first, BLOCK, values, page * page_size * dv, dv, sums, 0, dv, g, dv, held)
    for h in range(g):
        if total[h] > 0:
            lse[h] = top[h] + f32(math.log(total[h]))
            for i in range(dv):
                out[h, i] = sums[h * dv + i] / total[h]
        else:
            lse[h] = -np.inf
            for i in range(dv):
                out[h, i] = f32(0.0)


@njit(nogil=True, parallel=True, cache=True, fastmath=FAST)
@no_type_check
def attend(
    q, keys, values, mass, read, table, lengths, holes, hole_count, page_size, scale, workers, out, lse, probs
):  # fmt: skip
    """q (R, G, D) float32 over each row's tokens: out (R, G, Dv), lse (R, G), and where `probs` (R, G, T) is not empty
    the probabilities. Every worker gets the same number of blocks, so rows of any lengths share the work evenly; a row
    that lies across two workers is merged at the end.
    """
    rows, g, dv = q.shape[0], q.shape[1], out.shape[2]
    first = np.zeros(rows + 1, np.int64)
    for r in range(rows):
        first[r + 1] = first[r] + (lengths[r] + BLOCK - 1) // BLOCK
    blocks = first[rows]
    workers = max(1, min(workers, blocks))
    part_row = np.full((workers, 2), -1)
    part_out = np.empty((workers, 2, g, dv), np.float32)
    part_lse = np.empty((workers, 2, g), np.float32)
    for w in prange(workers):
        low, high = w * blocks // workers, (w + 1) * blocks // workers
        r = np.searchsorted(first, low, side="right") - 1
        used = 0
        while low < high:
            stop = min(high, first[r + 1])
            begin, end = (low - first[r]) * BLOCK, min((stop - first[r]) * BLOCK, lengths[r])
            if low == first[r] and stop == first[r + 1]:
                _attend_row(
                    q, keys, values, mass, read, table, holes, hole_count, r, begin, end, page_size, scale, dv,
                    out[r], lse[r], probs,
                )  # fmt: skip
            elif stop > low:
                part_row[w, used] = r
                _attend_row(
                    q, keys, values, mass, read, table, holes, hole_count, r, begin, end, page_size, scale, dv,
                    part_out[w, used], part_lse[w, used], probs,
                )  # fmt: skip
                used += 1
            low = stop
            r += 1
    for r in range(rows):
        if first[r] == first[r + 1]:
            out[r] = f32(0.0)
            lse[r] = -np.inf
    _merge(part_row, part_out, part_lse, out, lse)
    if probs.size:
        for r in prange(rows):
            for h in range(g):
                for t in range(lengths[r]):
                    # No token seen: lse is -inf, and so every logit NEVER.
                    seen = probs[r, h, t] > NEVER
                    probs[r, h, t] = exponential(probs[r, h, t] - lse[r, h]) if seen else f32(0.0)
                for t in range(lengths[r], probs.shape[2]):
                    probs[r, h, t] = f32(0.0)


@njit(nogil=True, cache=True)
@no_type_check
def _merge(part_row, part_out, part_lse, out, lse):
    """Rows that several workers had a part of."""
    rows, outs = part_row.reshape(-1), part_out.reshape(-1, *part_out.shape[2:])
    lses = part_lse.reshape(-1, part_lse.shape[2])
    for i in range(rows.size):
        r = rows[i]
        if r < 0:
            continue
        for h in range(lses.shape[1]):
            top, total = NEVER, f32(0.0)
            for j in range(i, rows.size):
                if rows[j] == r:
                    top = max(top, lses[j, h])
            acc = np.zeros(outs.shape[2], np.float32)
            for j in range(i, rows.size):
                if rows[j] == r and lses[j, h] > NEVER:
                    weight = f32(math.exp(lses[j, h] - top))
                    total += weight
                    acc += weight * outs[j, h]
            lse[r, h] = top + f32(math.log(total)) if total > 0 else -np.inf
            out[r, h] = acc / total if total > 0 else acc
        for j in range(i, rows.size):
            if rows[j] == r:
                rows[j] = -1


@njit(nogil=True, cache=True)
@no_type_check
def write(plane, new, table, start, stop, page_size):
    """Slots `start[r]` to `stop[r]` of each row become new[r, 0:]; `plane` (N * P, W), `new` (R, T, W)."""
    width = plane.shape[1]
    for r in range(new.shape[0]):
        for slot in range(start[r], stop[r]):
            place = np.int64(table[r, slot // page_size]) * page_size + slot % page_size
            for i in range(width):
                plane[place, i] = new[r, slot - start[r], i]


@njit(nogil=True, cache=True)
@no_type_check
def write_one(plane, new, table, slots, page_size):
    """Slot `slots[r]` of each row becomes new[r]; `plane` (N * P, W), `new` (R, W)."""
    for r in range(new.shape[0]):
        place = np.int64(table[r, slots[r] // page_size]) * page_size + slots[r] % page_size
        for i in range(new.shape[1]):
            plane[place, i] = new[r, i]


@njit(nogil=True, cache=True)
@no_type_check
def step(
    new_keys, new_values, slots, q, keys, values, mass, read, table, lengths, holes, hole_count, page_size, scale,
    workers, out, lse, probs,
):  # fmt: skip
    """One decode step: each row's new token goes to its slot, then `attend`."""
    write_one(keys, new_keys, table, slots, page_size)
    write_one(values, new_values, table, slots, page_size)
    attend(
        q, keys, values, mass, read, table, lengths, holes, hole_count, page_size, scale, workers, out, lse, probs
    )  # fmt: skip


@njit(nogil=True, parallel=True, cache=True)
@no_type_check
def close_gaps(plane, mask, table, lengths, page_size):
    """The slots that `mask` (R, T) marks move to the front of each row, in order; `plane` (N * P, W)."""
    width = plane.shape[1]
    for r in prange(table.shape[0]):
        target = 0
        for slot in range(lengths[r]):
            if not mask[r, slot]:
                continue
            if target != slot:
                source = np.int64(table[r, slot // page_size]) * page_size + slot % page_size
                place = np.int64(table[r, target // page_size]) * page_size + target % page_size
                for i in range(width):
                    plane[place, i] = plane[source, i]
            target += 1


@njit(nogil=True, cache=True)
@no_type_check
def punch_holes(mask, lengths, holes, hole_count, more):
    """Slots that `mask` (R, T) does not mark become holes, where every row has room for its own in `holes`.

    `more` (R,) gets how many tokens each row drops. Returns whether they became holes; if not, nothing changed.
    """
    fits = True
    for r in range(mask.shape[0]):
        gone = 0
        for slot in range(lengths[r]):
            gone += not mask[r, slot]
        more[r] = gone - hole_count[r]
        fits = fits and gone <= holes.shape[1]
    if not fits:
        return False
    for r in range(mask.shape[0]):
        if more[r] == 0:
            continue
        at = 0
        for slot in range(lengths[r]):
            if not mask[r, slot]:
                holes[r, at] = slot
                at += 1
        hole_count[r] = at
    return True
