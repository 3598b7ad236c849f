"""What a query chose to read, for later queries that may read the same."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNITS, QUERY, MADE = "units", "query", "made"
"""What its tensors are called in a state."""
NEVER = -1


@dataclass(eq=False)
class Picked:
    """What each row chose by its index, at a length of its text; what is read whatever that says is not in it."""

    units: Bool[np.ndarray, "B H S N"]
    query: Float[Tensor, "B E"]
    """What asked; of no number where nobody compares queries."""
    made: Int[np.ndarray, " B"]
    """Tokens that the row's text had; `NEVER`: what stands here is no choice of this row, which must choose anew."""

    @staticmethod
    def nbytes_with(rows: int, heads: int, lists: int, units: int, query: int) -> int:
        """Bytes of one of such sizes; `query` numbers."""
        return rows * (heads * lists * units + 4 * query + np.dtype(np.int64).itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return self.units.nbytes + self.query.nbytes + self.made.nbytes

    def row_nbytes(self) -> Int[np.ndarray, " B"]:
        """Bytes of each row's part."""
        return np.full(len(self.made), self.nbytes // max(1, len(self.made)))

    def wide(self, units: int) -> Bool[np.ndarray, "B H S N"]:
        """The units, of so many: those that came later are not chosen."""
        held = self.units[..., :units]
        return np.pad(held, [(0, 0)] * 3 + [(0, units - held.shape[-1])])

    def forget(self, rows: Bool[np.ndarray, " B"]) -> None:
        """These rows choose anew: their units are no longer what they were."""
        self.made = np.where(rows, NEVER, self.made)

    def select(self, rows: np.ndarray) -> "Picked":
        """Row i becomes what row `rows[i]` was."""
        at = np.asarray(rows)
        return Picked(self.units[at], self.query[torch.from_numpy(at).to(self.query.device)], self.made[at])

    def state(self) -> dict[str, Tensor]:
        """What it holds, for a file."""
        return {UNITS: torch.from_numpy(self.units), QUERY: self.query, MADE: torch.from_numpy(self.made)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Picked":
        """What `state` gave and `check_picked` has looked at."""
        units, made = (tensors[name].cpu().numpy().copy() for name in (UNITS, MADE))
        return cls(units, tensors[QUERY].to(device).clone(), made)


def joined(one: Picked | None, two: Picked | None, rows: tuple[int, int]) -> Picked | None:
    """The choices of two batches as one; a batch of `rows` that has none, or one of other lists, chooses anew."""
    model = two if one is None else one
    if model is None:
        return None
    units = max(x.units.shape[-1] for x in (one, two) if x is not None)
    parts = list[Picked]()
    for each, number in zip((one, two), rows, strict=True):
        fits = each is not None and each.units.shape[1:3] == model.units.shape[1:3]
        if each is not None and fits and each.query.shape[1:] == model.query.shape[1:]:
            parts.append(each)
        else:
            none = np.zeros((number, *model.units.shape[1:]), dtype=bool)
            parts.append(Picked(none, model.query.new_zeros(number, model.query.shape[1]), np.full(number, NEVER)))
    return Picked(
        np.concatenate([each.wide(units) for each in parts]), torch.cat([each.query for each in parts]),
        np.concatenate([each.made for each in parts]),
    )  # fmt: skip


def check_picked(tensors: Mapping[str, Tensor], rows: int, units: Int[np.ndarray, "B H"]) -> None:
    """Raise ValueError unless `tensors` are none, or what `Picked.state` gives of rows with so many `units` (B, H)."""
    if not tensors:
        return
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items())}
    if set(tensors) != {UNITS, QUERY, MADE}:
        raise ValueError(f"choice={found} must be of {UNITS}, {QUERY} and {MADE}")
    held, query, made = tensors[UNITS], tensors[QUERY], tensors[MADE]
    most, dtypes = int(units.max(initial=0)), (held.dtype, query.dtype, made.dtype)
    fits = held.dim() == 4 and tuple(held.shape[:2]) == units.shape and held.shape[2] > 0 and held.shape[3] <= most
    fits = fits and query.dim() == 2 and len(query) == rows and tuple(made.shape) == (rows,)
    if not fits or dtypes != (torch.bool, torch.float32, torch.int64):
        raise ValueError(
            f"choice={found} must be bool ({units.shape[0]}, {units.shape[1]}, lists, at most {most} units), "
            f"float32 ({rows}, numbers) and int64 ({rows},)"
        )
