"""Tokens as dense tensors: keys, values, and named numbers of each token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

POSITION = "position"
"""Column (int32): a token's place in its row's text, counted without padding. Every segment has it."""
LOG_MASS = "log_mass"
"""Column (float32): log of how many tokens a slot stands for; added to its logits."""


@dataclass(eq=False)
class Chunk:
    """Tokens as dense tensors: keys and values as the model made them, columns by name, and which slots are tokens."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T Dv"]
    valid: Bool[Tensor, "B H T"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Int[Tensor, "B H T"]:
        return self.columns[POSITION]

    def since(self, start: int) -> "Chunk":
        """The slots from `start` on."""
        columns = {name: column[..., start:] for name, column in self.columns.items()}
        return self._each(lambda states: states[:, :, start:], self.valid[..., start:], columns)

    def take(self, slots: Int[Tensor, "B H T"]) -> "Chunk":
        """Slot i of each (row, head) becomes what slot `slots[..., i]` was."""

        def taken(states: Tensor) -> Tensor:
            return states.gather(2, slots[..., None].expand(*slots.shape, states.shape[-1]))

        columns = {name: column.gather(-1, slots) for name, column in self.columns.items()}
        return self._each(taken, self.valid.gather(-1, slots), columns)

    def of_rows(self, rows: Int[Tensor, " N"]) -> "Chunk":
        """The tokens of some rows of the batch."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return self._each(lambda states: states[rows], self.valid[rows], columns)

    def but(self, valid: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor] | None = None) -> "Chunk":
        """The same keys and values with other slots valid, and other columns."""
        return self._each(lambda states: states, valid, self.columns if columns is None else columns)

    def _each(
        self, change: Callable[[Tensor], Tensor], valid: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor]
    ) -> "Chunk":
        return LateChunk(lambda: change(self.keys), lambda: change(self.values), valid, columns)


class LateChunk(Chunk):
    """Tokens whose keys and values are worked out when somebody looks at them: most decisions need only columns."""

    def __init__(
        self,
        keys: Callable[[], Tensor] | Tensor,
        values: Callable[[], Tensor] | Tensor,
        valid: Bool[Tensor, "B H T"],
        columns: Mapping[str, Tensor],
    ):
        self._late = {"keys": keys, "values": values}
        self.valid, self.columns = valid, columns

    def __getattr__(self, name: str) -> Tensor:
        # Called for what is not there yet: keys and values before somebody has looked.
        if name not in ("keys", "values"):
            raise AttributeError(name)
        late = self._late[name]
        found = late if isinstance(late, Tensor) else late()
        setattr(self, name, found)
        return found


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks one after another; a column that one of them lacks is zero there."""
    if len(chunks) == 1:
        return chunks[0]
    samples = {name: column for chunk in chunks for name, column in chunk.columns.items()}

    def column(chunk: Chunk, name: str) -> Tensor:
        if name in chunk.columns:
            return chunk.columns[name]
        return torch.zeros(chunk.valid.shape, dtype=samples[name].dtype, device=chunk.valid.device)

    return LateChunk(
        lambda: torch.cat([chunk.keys for chunk in chunks], 2),
        lambda: torch.cat([chunk.values for chunk in chunks], 2),
        torch.cat([chunk.valid for chunk in chunks], 2),
        {name: torch.cat([column(chunk, name) for chunk in chunks], 2) for name in samples},
    )
