"""Operations on units of tokens: what is remembered of them, what they are worth to a query, and which are the best.

A unit is some tokens of a (row, KV head) that follow each other, N of them in the longest row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.units import cpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.units.cpu import steps_keys

__all__ = [
    "attend_units",
    "bound_scores",
    "choose_units",
    "key_scores",
    "list_pages",
    "list_slots",
    "raise_bounds",
    "step_keys",
    "step_units",
    "steps_keys",
    "vote_units",
]


def raise_bounds(
    held: Float[Tensor, "B H N E"],
    keys: Float[Tensor, "B H T D"],
    valid: Bool[Tensor, "B H T"],
    start: Int[np.ndarray, "B H"],
    unit: int,
) -> None:
    """In place: `held` (E = 2 D: the largest of k, then the largest of -k) rises to hold new keys, too.

    Keys are of its dtype, or of a wider one: then what it holds is no less than they are.
    The tokens that are `valid` follow `start` others of their row; token n belongs to unit n // `unit`, for which there
    is room. A NaN stays.
    """
    select("raise_bounds", held)(held, keys, valid, start, unit)


def bound_scores(
    q: Float[Tensor, "B H G D"], held: Float[Tensor, "B H N E"], units: Int[np.ndarray, "B H"]
) -> Float[Tensor, "B H G M"]:
    """What no product of a query with a key of a unit exceeds, by `raise_bounds`; float32.

    Of the M units of the longest row, -inf behind a row's own.
    """
    found: Tensor = select("bound_scores", held)(q, held, units)
    return found


def key_scores(
    q: Float[Tensor, "B H G D"], held: Float[Tensor, "B H N D"], units: Int[np.ndarray, "B H"], steps: int
) -> Float[Tensor, "B H G M"]:
    """The products of a query with one vector of each unit, in whole steps of 1 / `steps` (0: as they are); float32.

    Of the M units of the longest row, -inf behind a row's own.
    """
    found: Tensor = select("key_scores", held)(q, held, units, steps)
    return found


def attend_units(
    q: Float[Tensor, "B H G D"],
    held: Float[Tensor, "B H N E"],
    table: Any,
    room: Int[np.ndarray, " B"],
    scale: float,
    *,
    unit: int,
    heads: str,
    sinks: int,
    recent: int,
    mass: str | None = None,
) -> tuple[Float[Tensor, "B H G Dv"], Float[Tensor, "B H G"]]:
    """(out, lse) of a query over the best `room[b]` units of each row of a page table, as `choose_units` chooses them.

    What they are worth are their `bound_scores`. A unit is whole pages, of a table without holes, from each row's first
    one on, and some row has tokens; `mass` names a plane that is added to the logits.
    """
    found: tuple[Tensor, Tensor] = select("attend_units", q)(
        q, held, table, room, scale, unit=unit, heads=heads, sinks=sinks, recent=recent, mass=mass
    )
    return found


def step_units(
    q: Float[Tensor, "B H G D"],
    table: Any,
    planes: Mapping[str, Tensor],
    held: Float[Tensor, "B H N E"],
    room: Int[np.ndarray, " B"],
    scale: float,
    *,
    unit: int,
    heads: str,
    sinks: int,
    recent: int,
) -> tuple[Float[Tensor, "B H G Dv"], Float[Tensor, "B H G"]]:
    """`append_pages` of one token to every row, `raise_bounds` of its unit, then `attend_units`: a decode step at once.

    `planes` (R, 1, ...) are "keys", "values" and "position", all that the table's pages hold; `held` has room for it.
    """
    found: tuple[Tensor, Tensor] = select("step_units", q)(
        q, table, planes, held, room, scale, unit=unit, heads=heads, sinks=sinks, recent=recent
    )
    return found


def step_keys(
    q: Float[Tensor, "B H G D"],
    table: Any,
    planes: Mapping[str, Tensor],
    by: Any,
    seen: Int[np.ndarray, " B"],
    scale: float,
) -> tuple[Float[Tensor, "B H G Dv"], Float[Tensor, "B H G"]]:
    """One token to every row as in `step_units`, then (out, lse) over the tokens that heads vote for by all keys.

    `by` is a `kvfold.formats.ByKeys`: its `held` gets the new key as it is before it turns, is asked by a query that
    stands `distance` behind all keys, where the text's last token is `seen[b]` - 1, and those `key_scores` count in
    `vote_units`, for each KV head, or for all of a row together (`layer`; these then have as many tokens each). With
    `slots` what is read attends at positions 0, 1, 2, ..., the query at the last of them, in rows that choose.
    `steps_keys` says whether that is one kernel.
    """
    found: tuple[Tensor, Tensor] = select("step_keys", q)(q, table, planes, by, seen, scale)
    return found


def choose_units(
    scores: Float[Tensor, "B H G N"],
    units: Int[np.ndarray, "B H"],
    room: Int[np.ndarray, " B"],
    *,
    heads: str,
    sinks: int,
    recent: int,
) -> tuple[Int32[np.ndarray, "B H S K"], Int32[np.ndarray, "B H S"]]:
    """The best `room[b]` of `units[b, h]` units of each list: their numbers, ascending and then -1, and how many.

    `heads`: "each" query head has a list (S = G), or all share that of the "sum" or the "max" of their scores (S = 1).
    The last unit comes first, then the first `sinks` units, then the `recent` nearest before it, then the best scores:
    ties go to the earlier unit, -inf is never chosen, and what is not a number counts as the lowest number.
    """
    found: tuple[np.ndarray, np.ndarray] = select("choose_units", scores)(
        scores, units, room, heads=heads, sinks=sinks, recent=recent
    )
    return found


def vote_units(
    scores: Float[Tensor, "L G N"],
    units: Int[np.ndarray, " L"],
    room: Int[np.ndarray, " L"],
    first: Int[np.ndarray, " L"],
    before: Int[np.ndarray, " L"],
    *,
    heads: str,
    scale: float,
) -> tuple[Int32[np.ndarray, "L K"], Int32[np.ndarray, " L"]]:
    """As `choose_units`, of L lists, by the "sum" or "max" over heads of each one's softmax of `scale` times scores.

    That is over the units that are not read anyhow, which are `first[l]` of them, the newest, and `before[l]` before
    it: those count in `room[l]`, and are never more.
    """
    found: tuple[np.ndarray, np.ndarray] = select("vote_units", scores)(
        scores, units, room, first, before, heads=heads, scale=scale
    )
    return found


def list_pages(
    table: Any, numbers: Int32[np.ndarray, "R S K"], pages: int, before: Int[np.ndarray, " R"]
) -> tuple[Int32[np.ndarray, "L M"], Int32[np.ndarray, " L"]]:
    """The pages of some units of each row of a page table, and the slots on them; list s of row r is r * S + s of L.

    A unit is `pages` pages, whose numbers are counted from `before[r]` pages before the row's first one. Units, or
    pages of them, that the row has not are left out. `numbers` ascend, and then are -1, as the pages are.
    """
    found: tuple[np.ndarray, np.ndarray] = select("list_pages", next(iter(table.pool.planes.values())))(
        table, numbers, pages, before
    )
    return found


def list_slots(
    table: Any, numbers: Int32[np.ndarray, "R S K"], unit: int, before: Int[np.ndarray, " R"]
) -> tuple[Int32[np.ndarray, "L M"], Int32[np.ndarray, " L"]]:
    """As `list_pages`, but for units of `unit` slots: where each lies among all slots of the pool."""
    found: tuple[np.ndarray, np.ndarray] = select("list_slots", next(iter(table.pool.planes.values())))(
        table, numbers, unit, before
    )
    return found
