"""What indexes have in common that hold a few numbers of each unit, in one tensor."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.formats import Chunk, Spec

HELD = "held"
"""What the tensor is called in a state."""
I = TypeVar("I", bound="HeldUnits")  # noqa: E741


Landing = tuple[Int[Tensor, " L"], Int[Tensor, " L"], Int[Tensor, " L"]]
"""Row, KV head and place of some tokens."""


class Unfitted:
    """What is the same of all that goes by no column and fits nothing to tokens."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Remembered.columns`."""
        return ()

    def learn(self, tokens: Callable[[], Chunk], which: Bool[np.ndarray, "B H"]) -> None:
        """See `Remembered.learn`: nothing is fitted."""

    def unlearn(self, limit: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.unlearn`."""


class HeldUnits(Unfitted):
    """`held` (B, H, N, E): E numbers of each unit of `unit` tokens, `fill` where no token has come."""

    fill: float = 0.0

    def __init__(self, recipe: Any, spec: Spec, held: Shaped[Tensor, "B H N E"]):
        self.recipe, self.spec, self.held = recipe, replace(spec, artefact={}), held

    @property
    def held(self) -> Shaped[Tensor, "B H N E"]:
        """What is held; written in place in any mode, whichever it was made in."""
        return self._numbers

    @held.setter
    def held(self, held: Shaped[Tensor, "B H N E"]) -> None:
        self._numbers = writable(held)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        unit: int = self.recipe.unit
        return unit

    @property
    def beside_nbytes(self) -> int:
        """Bytes of what rows hold beside that, however many units there are."""
        return 0

    @property
    def nbytes(self) -> int:
        return self.held.nbytes + self.beside_nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        rows, heads, known, width = self.held.shape
        return rows * heads * max(known, units) * width * self.held.itemsize + self.beside_nbytes

    def row_nbytes(self) -> np.ndarray:
        rows = len(self.held)
        return np.full(rows, self.held.nbytes // max(1, rows) + self.beside_nbytes // max(1, rows))

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`."""
        most = int(units.max(initial=0))
        if most < self.held.shape[2]:
            self.held = self.held[:, :, :most].clone()
        gone = torch.arange(self.held.shape[2]) >= torch.from_numpy(np.ascontiguousarray(units))[..., None]
        self.held.masked_fill_(gone.to(self.held.device)[..., None], self.fill)

    def cropped(self, rows: Bool[np.ndarray, " B"]) -> None:
        """See `Remembered.cropped`: there is nothing."""

    def whole(self) -> Bool[np.ndarray, " B"]:
        """See `Remembered.whole`: none."""
        return np.zeros(len(self.held), dtype=bool)

    def begins(self, first: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """See `Remembered.begins`: where a unit does."""
        start: np.ndarray = first // self.unit * self.unit
        return start

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`: as it attends."""
        return q

    def select(self: I, rows: np.ndarray) -> I:
        """See `Remembered.select`."""
        at = torch.from_numpy(np.asarray(rows)).to(self.held.device)
        return type(self)(self.recipe, replace(self.spec, rows=len(at)), self.held[at])

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        most = max(self.held.shape[2], other.held.shape[2])
        wide = [F.pad(x, (0, 0, 0, most - x.shape[2]), value=self.fill) for x in (self.held, other.held)]
        self.held = torch.cat(wide)
        self.spec = replace(self.spec, rows=len(self.held))

    def clear(self) -> None:
        self.held = self.held[:, :, :0].clone()

    def state(self) -> dict[str, Tensor]:
        return {HELD: self.held}

    def put(
        self, valid: Bool[Tensor, "B H T"], start: Int[np.ndarray, "B H"], numbers: Shaped[Tensor, "B H T E"]
    ) -> None:
        """What is held of tokens that are units, of those that are `valid`: from `start[b, h]` on of their row."""
        tokens, places = landing(valid, start)
        self.held[places] = numbers[tokens].to(self.held.dtype)

    def reach(self, units: int) -> None:
        """Room for so many units in each row, and for 1/16 more once there are some: a step adds one now and then."""
        known = self.held.shape[2]
        if units > known:
            more = units - known + (units // 16 if known else 0)
            self.held = F.pad(self.held, (0, 0, 0, more), value=self.fill)


class OfParts(HeldUnits):
    """What holds numbers of parts of units: `recipe.parts` of `recipe.unit` tokens are a unit of its recipe."""

    @property
    def unit(self) -> int:
        """Tokens of what is remembered apart."""
        unit: int = self.recipe.unit // self.recipe.parts
        return unit

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return super().nbytes_with(units * self.recipe.parts)

    def begins(self, first: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """See `Remembered.begins`: where a unit of the recipe does."""
        start: np.ndarray = first // self.recipe.unit * self.recipe.unit
        return start

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`."""
        super().forget(units * self.recipe.parts)

    def reach(self, units: int) -> None:
        """See `HeldUnits.reach`; room is for whole units."""
        super().reach(-(-units // self.recipe.parts) * self.recipe.parts)


class Tensors(dict[str, Tensor]):
    """Tensors by name; written in place in any mode, whichever they were made in."""

    def __init__(self, given: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in given.items():
            self[name] = tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, writable(tensor))


def writable(x: Tensor) -> Tensor:
    """The same, or a copy where it was made in inference mode, outside which it could not be written."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def narrow(dtype: torch.dtype) -> torch.dtype:
    """What copies of keys, and bounds of them, are held in: 16 bits, bfloat16 where the model has more."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def nothing(spec: Spec, width: int, dtype: torch.dtype | None = None) -> Shaped[Tensor, "B H 0 E"]:
    """What is held of no unit: `width` numbers of each, in the model's dtype unless another is given."""
    return torch.empty(spec.rows, spec.heads, 0, width, dtype=dtype or spec.dtype, device=spec.device)


def landing(valid: Bool[Tensor, "B H T"], start: Int[np.ndarray, "B H"]) -> tuple[Landing, Landing]:
    """Where each of the `valid` tokens is, and where it goes: places follow each other from `start[b, h]` on."""
    row, head, slot = valid.nonzero(as_tuple=True)
    begin = torch.from_numpy(np.ascontiguousarray(start)).to(valid.device)
    return (row, head, slot), (row, head, (begin[..., None] + valid.cumsum(-1) - 1)[row, head, slot])


def ends(valid: Bool[Tensor, "B H T"], start: Int[np.ndarray, "B H"]) -> int:
    """How many tokens the longest row has once the `valid` ones have come behind `start[b, h]` others."""
    return int((start + valid.sum(-1).cpu().numpy()).max())


def before_rope(spec: Spec, tokens: Chunk) -> Float[Tensor, "B H T D"]:
    """Keys as the model made them. The layer's rotation must be known."""
    assert spec.rope is not None  # as who opens an index of such keys asks
    return spec.rope.shift(tokens.keys, -tokens.positions)


def from_behind(
    spec: Spec, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"], distance: int
) -> Float[Tensor, "B H G D"]:
    """The query of text position `seen[b]` - 1 as if it stood `distance` behind keys that are not turned."""
    assert spec.rope is not None
    steps = torch.from_numpy(distance - (seen - 1)).to(q.device, torch.int32)
    return spec.rope.shift(q, steps[:, None, None].expand(q.shape[:3]))


def check_held(
    spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"], unit: int, width: int,
    dtype: torch.dtype | None = None, **beside: tuple[tuple[int, ...], torch.dtype],
) -> None:  # fmt: skip
    """Raise ValueError unless `tensors` are what `HeldUnits.state` gives of rows with so many tokens, and `beside` it.

    `dtype`: of the numbers of a unit, None: the model's.
    """
    units = -(-int(counts.max(initial=0)) // unit)
    want = {HELD: ((spec.rows, spec.heads, units, width), spec.dtype if dtype is None else dtype), **beside}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != want:
        raise ValueError(f"index={found} must be {want} (shape, dtype)")
