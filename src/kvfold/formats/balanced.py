"""Balanced: each token in steps of its own, channels of keys balanced against queries (MiKV, arXiv:2402.18096)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.token_codes import CodedTokens, scale_dtype, token_planes
from kvfold.formats.told import Telling, Told, check_told, settled
from kvfold.ops.codes.packing import BITS, pack, quantise
from kvfold.ops.tokens import Coding
from kvfold.ops.tokens.naive import KINDS
from kvfold.options import check_choice, check_int
from kvfold.pages import PAGE_SIZE, PageTable, Plane

BALANCER = "balancer"
"""What a segment may be told of each (row, head): (B, H, D), what keys are multiplied by and queries divided by."""


@dataclass(frozen=True)
class Balanced(Telling):
    """2^bits steps from the least to the greatest of `groups` runs of a token's channels, with their scale and zero.

    Keys are multiplied by a balancer, channel by channel, before they become codes, and queries divided by it: in exact
    arithmetic no product changes. A (row, head) has the first one that it is told (`Hearing.hear`), for good; tokens
    that come before have none. Addressable token by token, exact to crop; what is amended is rounded.
    Scales and zeros are float16, or float32 in a float32 model; in a narrow model they end at 65504.
    """

    bits: int = 2
    groups: int = 2
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits()
    beside = BALANCER

    def __post_init__(self) -> None:
        check_int("bits", self.bits, min(BITS), high=max(BITS))
        check_choice("bits", self.bits, BITS)
        check_int("groups", self.groups, 1)
        check_int("page_size", self.page_size, 1)

    def codings(self, spec: Spec) -> tuple[Coding, Coding]:
        """Of keys and of values. Raises ValueError where the groups don't come out even."""
        for name, size in (("key", spec.key_size), ("value", spec.value_size)):
            if size % self.groups:
                raise ValueError(f"groups={self.groups} must divide the {name} size {size}")
        keys, values = (Coding(size, self.bits, groups=self.groups) for size in (spec.key_size, spec.value_size))
        return keys, values

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        return token_planes(*self.codings(spec), scale_dtype(spec, torch.float16))

    def open(self, spec: Spec) -> "BalancedSegment":
        table = open_table(self, spec, self.planes(spec), self.page_size)
        return BalancedSegment(table, spec.heads, spec.dtype, *self.codings(spec), balancer=_nobodys(spec))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        check_told(BALANCER, tensors.get(BALANCER), (spec.rows, spec.heads, spec.key_size))
        super().check(spec, said, tensors, seen)


def _nobodys(spec: Spec) -> Tensor:
    return torch.zeros(spec.rows, spec.heads, spec.key_size, dtype=torch.float32, device=spec.device)


class BalancedSegment(Told, CodedTokens):
    """Codes, scales and zeros of tokens, and the balancer of each (row, head)."""

    name = BALANCER

    def __init__(
        self, table: PageTable, heads: int, compute: torch.dtype, keys: Coding, values: Coding, *,
        balancer: Float[Tensor, "B H D"],
    ):  # fmt: skip
        super().__init__(table, heads, compute, keys, values)
        self.told = balancer

    @property
    def settled(self) -> Float[Tensor, "B H D"]:
        return settled(self.told)

    def coded(self, what: str, states: Tensor) -> dict[str, Tensor]:
        coding, kind = self.coding[what], KINDS[what]
        wide = states.float() * self.settled[:, :, None] if what == "keys" else states.float()
        runs = wide.reshape(*wide.shape[:-1], coding.groups, coding.size // coding.groups)
        codes, scale, zero = quantise(runs, -1, self.pool.specs[f"{kind}_scale"].dtype, coding.bits)
        held = {f"{kind}_scale": scale[..., 0], f"{kind}_zero": zero[..., 0]}
        return {what: pack(codes.flatten(-2), coding.bits)} | held

    def asked(self, q: Tensor) -> Tensor:
        return q.float() / self.settled[:, :, None, None]

    def back(self, what: str, states: Tensor) -> Tensor:
        return states / self.settled[:, :, None] if what == "keys" else states

    def like(self, table: PageTable, rows: np.ndarray) -> "BalancedSegment":
        coding, balancer = self.coding, self.told[rows.tolist()]
        return BalancedSegment(table, self.heads, self.compute, coding["keys"], coding["values"], balancer=balancer)

    def join(self, other: Any) -> None:
        if not isinstance(other, BalancedSegment) or other.coding != self.coding:
            raise ValueError(f"other={getattr(other, 'coding', type(other).__name__)} must be {self.coding}")
        super().join(other)
