"""Operations on tokens that lie on pages. A kernel sees the page table: `table.table` (R, M) page numbers,
`table.lengths` (R,), and the planes `table.pool.planes[name]` (N, P, ...). A row is one (sequence, KV head).
`table` is a `kvfold.pages.PageTable`, `compact` a `kvfold.rotation.Compact` or None, which operations don't import.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.paged import cpu, gpu, naive  # noqa: F401  (each registers itself)

__all__ = ["append_pages", "attend_pages", "keep_pages", "step_pages"]


def attend_pages(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """(out, lse, None) over the planes "keys" and "values", or over the tokens that `read` marks; not causal.

    `mass` names a plane that is added to the logits. `compact` turns each key from the place that the plane
    `position` gives to its slot. With `weights` the third is what each slot got of each query, float32, 0 where no
    token is.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_pages", q)(
        q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
    )
    return out


def step_pages(
    q: Float[Tensor, "B H G 1 D"],
    table: Any,
    planes: Mapping[str, Tensor],
    scale: float,
    *,
    mass: str | None = None,
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G 1 Dv"], Float[Tensor, "B H G 1"], Float[Tensor, "B H G 1 T"] | None]:
    """`append_pages` of one token to every row (`planes` (R, 1, ...)), then `attend_pages`: a decode step at once."""
    out: tuple[Tensor, Tensor, Tensor | None] = select("step_pages", q)(
        q, table, planes, scale, mass=mass, weights=weights
    )
    return out


def append_pages(table: Any, planes: Mapping[str, Tensor], valid: Bool[Tensor, "R T"] | None) -> None:
    """Add tokens to the end of each row: `planes` by name, (R, T, ...), the pool's fill where one is missing.

    `valid`: which of them (None: all, in every row).
    """
    select("append_pages", planes["keys"])(table, planes, valid)


def keep_pages(table: Any, mask: Bool[Tensor, "R T"], columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
    """Drop the tokens that `mask` does not mark, write `columns` (R, T) over those that stay, give memory back.

    `slack`: few tokens may leave holes; the rest of a row moves up when a page's worth of them has gathered.
    """
    assert not table.pool.per_page, "what a page has once holds for its tokens"
    select("keep_pages", table.pool.planes["keys"])(table, mask, columns, slack=slack)
