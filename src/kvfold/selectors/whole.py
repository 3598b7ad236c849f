"""What indexes have in common that say something of units which are whole, and wait for the others to be."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec
from kvfold.selectors.held import HELD, HeldUnits, check_held, landing, nothing

OPEN, KNOWN = "open", "known"
"""What is said of tokens of units that still grow, and how many tokens of a row have come, in a state."""
I = TypeVar("I", bound="WholeUnits")  # noqa: E741


class WholeUnits(HeldUnits):
    """`held` (B, H, N, E) is `fill` where a unit is not whole yet; such a one is read anyhow (`Always`).

    Its tokens, as they are `told`, wait in `still` (B, H, C, W): what is `made` of them is the same, bit for bit,
    whether they came one by one or together. `known` (B, H): tokens that have come.
    """

    def __init__(
        self, recipe: Any, spec: Spec, held: Float[Tensor, "B H N E"], still: Float[Tensor, "B H C W"],
        known: Int[np.ndarray, "B H"],
    ):  # fmt: skip
        super().__init__(recipe, spec, held)
        self.still, self.known = still, known

    @classmethod
    def empty(cls: type[I], recipe: Any, spec: Spec, width: int, told: int, kind: torch.dtype) -> I:
        """Of no token yet: `width` numbers of a unit, `told` (in dtype `kind`) of a token that waits."""
        still = nothing(replace(spec, dtype=kind), told)
        return cls(recipe, spec, nothing(spec, width), still, np.zeros((spec.rows, spec.heads), dtype=np.int64))

    @classmethod
    def restored(cls: type[I], recipe: Any, spec: Spec, tensors: Mapping[str, Tensor]) -> I:
        """What `state` gave and `check_whole` has looked at."""
        held, still = (tensors[name].to(spec.device).clone() for name in (HELD, OPEN))
        return cls(recipe, spec, held, still, tensors[KNOWN].cpu().numpy().copy())

    @abstractmethod
    def told(self, tokens: Chunk) -> Float[Tensor, "B H T W"]:
        """What must be known of each token."""

    @abstractmethod
    def made(self, told: Float[Tensor, "B H T W"]) -> Float[Tensor, "B H N E"]:
        """What is held of whole units, of the first of these tokens on."""

    @property
    def beside_nbytes(self) -> int:
        """See `HeldUnits.beside_nbytes`: the tokens that wait, as many as do now."""
        return self.still.nbytes + self.known.nbytes

    # -- tokens ------------------------------------------------------------------------------------------------

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        valid, unit = tokens.valid, self.unit
        if not bool(valid.any()):
            return
        more = valid.sum(-1).cpu().numpy()
        first, waiting = start // unit, start % unit
        there = waiting + more
        # What waits and what comes, side by side from where the open unit begins.
        wide = max(int(there.max()), self.still.shape[2])
        told = self.still.new_zeros(*more.shape, wide, self.still.shape[-1])
        told[:, :, : self.still.shape[2]] = self.still
        coming, places = landing(valid, waiting)
        told[places] = self.told(tokens)[coming].to(told.dtype)
        whole = there // unit
        self.reach(int((-(-(start + more) // unit)).max()))
        if whole.any():
            made = self.made(told).to(self.held.dtype)
            closed = torch.arange(made.shape[2], device=valid.device) < self._at(whole)[..., None]
            row, head, number = closed.nonzero(as_tuple=True)
            self.held[row, head, self._at(first)[row, head] + number] = made[row, head, number]
        left = there - whole * unit
        offset = torch.arange(int(left.max()), device=valid.device)
        slots = (offset + self._at(whole)[..., None] * unit).clamp(max=wide - 1)
        rest = told.gather(2, slots[..., None].expand(*slots.shape, told.shape[-1]))
        self.still = rest.masked_fill((offset >= self._at(left)[..., None])[..., None], 0.0)
        self.known = start + more

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`. Tokens of an open unit stay where it is the last of them."""
        super().forget(units)
        self.known = np.minimum(self.known, units * self.unit)
        left = self.known % self.unit
        offset = torch.arange(int(left.max(initial=0)), device=self.still.device)
        waits = offset < self._at(left)[..., None]
        self.still = self.still[:, :, : len(offset)].masked_fill(~waits[..., None], 0.0)

    def _at(self, numbers: Int[np.ndarray, "B H"]) -> Int[Tensor, "B H"]:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.held.device)

    # -- rows --------------------------------------------------------------------------------------------------

    def select(self: I, rows: np.ndarray) -> I:
        """See `Remembered.select`."""
        at = torch.from_numpy(np.asarray(rows)).to(self.held.device)
        spec = replace(self.spec, rows=len(at))
        return type(self)(self.recipe, spec, self.held[at], self.still[at], self.known[np.asarray(rows)])

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        super().join(other)
        most = max(self.still.shape[2], other.still.shape[2])
        self.still = torch.cat([F.pad(x, (0, 0, 0, most - x.shape[2])) for x in (self.still, other.still)])
        self.known = np.concatenate([self.known, other.known])

    def clear(self) -> None:
        super().clear()
        self.still, self.known = self.still[:, :, :0].clone(), np.zeros_like(self.known)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {OPEN: self.still, KNOWN: torch.from_numpy(self.known)}


def check_whole(
    spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"], unit: int, width: int, told: int,
    kind: torch.dtype, within: int = 1,
) -> None:  # fmt: skip
    """Raise ValueError unless `tensors` are what `WholeUnits.state` gives of rows with so many tokens.

    `within`: there is room for so many units at a time.
    """
    numbers, step = {n: x for n, x in tensors.items() if n not in (OPEN, KNOWN)}, unit * within
    check_held(spec, numbers, -(-counts // step) * step, unit, width)
    shape = spec.rows, spec.heads, int((counts % unit).max(initial=0)), told
    want = {OPEN: (shape, kind), KNOWN: (counts.shape, torch.int64)}
    found = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items() if name in want}
    if found != want:
        raise ValueError(f"index={found} must be {want} (shape, dtype)")
    if not np.array_equal(tensors[KNOWN].cpu().numpy(), counts):
        raise ValueError(f"{KNOWN}={tensors[KNOWN].tolist()} must be the tokens that there are, {counts.tolist()}")
