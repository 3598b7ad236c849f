"""Dense: keys and values as they are, in the model's dtype or a narrower one, on pages."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk
from kvfold.options import check_choice, check_int
from kvfold.pages import PAGE_SIZE, Plane
from kvfold.rotation import Compact


@dataclass(frozen=True)
class Dense(ByToken):
    """Keys and values unchanged (`dtype=None`) or rounded to `dtype`; addressable token by token, exact to crop."""

    dtype: torch.dtype | None = None
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits(graphs=True)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, (None, torch.float64, torch.float32, torch.bfloat16, torch.float16))
        check_int("page_size", self.page_size, 1)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        dtype = self.dtype or spec.dtype
        sizes = {"keys": Plane(spec.key_size, dtype), "values": Plane(spec.value_size, dtype)}
        return sizes | {POSITION: Plane(None, torch.int32)}

    def open(self, spec: Spec) -> "DenseSegment":
        return DenseSegment(open_table(self, spec, self.planes(spec), self.page_size), spec.heads, spec.dtype)

    def segment(self, chunk: Chunk) -> "DenseSegment":
        """`open` for tokens like those of `chunk`."""
        return self.open(Spec.of(chunk))


class DenseSegment(TokenSegment):
    """Keys and values as they are."""

    listed = singled = True

    @property
    def mass(self) -> str | None:
        """The plane that is added to logits, if tokens have a mass."""
        return LOG_MASS if LOG_MASS in self.table.pool.planes else None

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        return {what: states}

    def states(self, what: str) -> Tensor:
        return self.plane(what).to(self.compute)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        return ops.attend_pages(
            q, self.table, scale, mass=self.mass, read=read, compact=compact, position=POSITION, weights=weights
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return ops.step_pages(q, self.table, self.token(k, v, positions), scale, mass=self.mass, weights=weights)

    def token(self, k: Tensor, v: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """What planes hold of one token of each row, (B, H, 1, D) at text positions (B, 1)."""
        wide = positions[:, None].expand(-1, self.heads, -1)
        return {"keys": k.flatten(0, 1), "values": v.flatten(0, 1), POSITION: wide.reshape(-1, 1)}

    def reserve(self) -> list[Tensor]:
        self.table.reserve()
        return [*self.pool.planes.values(), *self.table.on_device()]
