"""Fp8: keys and values in eight bits (float8_e4m3fn), a scale for each token's key and one for its value."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE, Plane
from kvfold.rotation import Compact

KEY_SCALE, VALUE_SCALE = "key_scale", "value_scale"
"""Planes (float32): what a token's codes are multiplied by."""
SCALES = {"keys": KEY_SCALE, "values": VALUE_SCALE}
CODE = torch.float8_e4m3fn
LARGEST = torch.finfo(CODE).max


@dataclass(frozen=True)
class Fp8(ByToken):
    """Each key and each value is codes times its largest magnitude / 448: a number is off by at most 1/16 of itself.

    (Or, if it is that small, by the 458,752nd part of the largest.) Addressable token by token, exact to crop; what is
    amended is rounded. A number that is not finite makes its vector NaN.
    """

    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start: codes as bytes, which all operations can move."""
        codes = {"keys": Plane(spec.key_size, torch.uint8), "values": Plane(spec.value_size, torch.uint8)}
        scales = {name: Plane(None, torch.float32) for name in SCALES.values()}
        return codes | scales | {POSITION: Plane(None, torch.int32)}

    def open(self, spec: Spec) -> "Fp8Segment":
        return Fp8Segment(open_table(self, spec, self.planes(spec), self.page_size), spec.heads, spec.dtype)


class Fp8Segment(TokenSegment):
    """Codes of eight bits, and their scales."""

    listed = True

    codes = ("keys", "values", KEY_SCALE, VALUE_SCALE)

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        wide = states.float()
        most = wide.abs().amax(-1)
        # A scale so small that it vanished would be divided by; a vector of zeros has none, and 1 will do.
        scale = (most / LARGEST).clamp(min=torch.finfo(torch.float32).tiny).masked_fill(most == 0, 1.0)
        codes = (wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(CODE)
        return {what: codes.view(torch.uint8), SCALES[what]: scale}

    def states(self, what: str) -> Tensor:
        return (self.plane(what).view(CODE).float() * self.plane(SCALES[what])[..., None]).to(self.compute)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        return ops.attend_float8(
            q, self.table, scale, kind=CODE, mass=LOG_MASS if self.weighed else None, read=read, compact=compact,
            position=POSITION, weights=weights,
        )  # fmt: skip
