"""Sentences by the mean of their keys, asked by the mean query of the sentence that is being written (SentenceKV)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.selectors.held import Tensors, Unfitted, ends, landing

SENTENCE = "sentence"
"""Column (int32): twice the number of the token's sentence in its row's text, and one more where it ends that."""
SUMS, SIZES, NUMBERS, ASKED, SAID = "sums", "sizes", "numbers", "asked", "said"
"""What the tensors are called in a state."""


@dataclass(frozen=True)
class Sentences:
    """Each token is worth what its sentence is: the product of a query with the mean of the sentence's keys.

    A query is the mean of those since the sentence that is being written began (`floor` of them at least: before, a row
    reads everything), and so are sentences means of keys as they attend (SentenceKV, arXiv:2504.00970). A unit is a
    token, so that the last sentence that is read is cut where the budget ends. What sentence a token is of its column
    `sentence` says.
    """

    floor: int = 2
    enough = 0
    recalls = True
    """Whether queries are remembered, which a crop does not bring back."""

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return 1

    def open(self, spec: Spec) -> "SentencesOf":
        return SentencesOf(
            self,
            spec,
            {
                name: torch.zeros(shape, dtype=dtype, device=spec.device)
                for name, (shape, dtype) in _shapes(spec, 0, 0).items()
            },
        )

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        sentences = tensors[SIZES].shape[-1] if SIZES in tensors and tensors[SIZES].dim() == 3 else 0
        want = _shapes(spec, int(counts.max(initial=0)), sentences)
        if found != want:
            raise ValueError(f"index={found} must be {want} (shape, dtype)")
        numbers = tensors[NUMBERS]
        if numbers.numel() and (bool((numbers < -1).any()) or sentences < 1):
            raise ValueError(f"index={NUMBERS} must be -1 or more, of {sentences} sentences")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "SentencesOf":
        return SentencesOf(self, spec, {name: tensor.to(spec.device).clone() for name, tensor in tensors.items()})


def _shapes(spec: Spec, tokens: int, sentences: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    b, h, d = spec.rows, spec.heads, spec.key_size
    return {
        SUMS: ((b, h, sentences, d), torch.float32), SIZES: ((b, h, sentences), torch.int32),
        NUMBERS: ((b, h, tokens), torch.int32), ASKED: ((b, h, spec.group, d), torch.float32),
        SAID: ((b,), torch.int32),
    }  # fmt: skip


class SentencesOf(Unfitted):
    """Of each head the sums and numbers of a sentence's keys, each token's sentence, and the queries of the open one.

    `sums` (B, H, S, D), `sizes` (B, H, S), `numbers` (B, H, N) as the column has them, -1 where no token is; `asked`
    (B, H, G, D) is the sum of the queries since the sentence began, `said` (B,) how many there were.
    """

    def __init__(self, recipe: Sentences, spec: Spec, held: dict[str, Tensor]):
        self.recipe, self.spec, self.held = recipe, spec, Tensors(held)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return 1

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held.values())

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`: as if every further token were a sentence."""
        known = self.held[NUMBERS].shape[-1]
        more = max(0, units - known) * self.spec.rows * self.spec.heads
        return self.nbytes + more * (4 * self.spec.key_size + 8)

    def row_nbytes(self) -> np.ndarray:
        rows = max(1, self.spec.rows)
        return np.full(self.spec.rows, self.nbytes // rows)

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`. Raises ValueError where tokens do not say of which sentence they are."""
        valid = tokens.valid
        if not bool(valid.any()):
            return
        if SENTENCE not in tokens.columns:
            raise ValueError(f"columns={sorted(tokens.columns)} must have {SENTENCE!r}, by which sentences are known")
        label = tokens.columns[SENTENCE].to(torch.int32)
        coming, places = landing(valid, start)
        self._reach(NUMBERS, ends(valid, start))
        self.held[NUMBERS][places] = label[coming]
        order = self._order()
        self._reach(SIZES, int(order.max()) + 1)
        self._reach(SUMS, int(order.max()) + 1)
        at = (*places[:2], order[places])
        self.held[SUMS].index_put_(at, tokens.keys[coming].float(), accumulate=True)
        self.held[SIZES].index_put_(at, torch.ones_like(at[2], dtype=torch.int32), accumulate=True)

    def begins(self, first: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """See `Remembered.begins`: where the sentence of the last token before `first` does."""
        numbers = self.held[NUMBERS].cpu().numpy() // 2  # -1 // 2 is -1
        if not numbers.shape[-1]:
            return np.zeros_like(first)
        last = np.take_along_axis(numbers, np.maximum(first - 1, 0)[..., None], -1)
        before: np.ndarray = ((numbers < last) & (numbers >= 0)).sum(-1)
        return np.where(first > 0, np.minimum(before, first), 0)

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`; `units` begin a sentence (`begins`), or are all that there are."""
        numbers, most = self.held[NUMBERS], int(units.max(initial=0))
        keep = torch.arange(numbers.shape[-1]) < torch.from_numpy(np.ascontiguousarray(units))[..., None]
        gone = (numbers >= 0) & ~keep.to(numbers.device)
        if bool(gone.any()):
            row, head, slot = gone.nonzero(as_tuple=True)
            at = row, head, self._order()[row, head, slot]
            self.held[SUMS][at], self.held[SIZES][at] = 0.0, 0
        self.held[NUMBERS] = numbers.masked_fill(gone, -1)[..., :most].clone()
        sentences = int(self._order().max()) + 1 if self.held[NUMBERS].numel() else 0
        if sentences < self.held[SIZES].shape[-1]:
            for name in (SUMS, SIZES):
                self.held[name] = self.held[name][:, :, :sentences].clone()

    def cropped(self, rows: Bool[np.ndarray, " B"]) -> None:
        """See `Remembered.cropped`: such a row begins another sentence."""
        at = torch.from_numpy(rows).to(self.held[SAID].device)
        self.held[ASKED][at], self.held[SAID][at] = 0.0, 0

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`: the mean of the queries since the sentence began, this one counted.

        Where the newest token ends a sentence, that is over, and the next query begins another.
        """
        numbers = self.held[NUMBERS]
        newest = numbers.amax((1, 2)) if numbers.numel() else numbers.new_full((len(q),), -1)
        ended = (newest >= 0) & (newest % 2 == 1)
        self.held[ASKED] += q.float()
        self.held[SAID] += 1
        mean = self.held[ASKED] / self.held[SAID].clamp(min=1)[:, None, None, None]
        self.held[ASKED][ended], self.held[SAID][ended] = 0.0, 0
        return mean

    def whole(self) -> Bool[np.ndarray, " B"]:
        """See `Remembered.whole`: where too little of a sentence was said."""
        few: np.ndarray = (self.held[SAID] < self.recipe.floor).cpu().numpy()
        return few

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; neither scaled nor normalised, as in the official code."""
        numbers = self.held[NUMBERS][..., : int(units.max(initial=0))].long()
        means = self.held[SUMS] / self.held[SIZES].clamp(min=1)[..., None]
        alike = asked.float() @ means.mT  # B H G S
        place = self._order()[..., : numbers.shape[-1]][:, :, None].expand(*alike.shape[:3], -1)
        return alike.gather(-1, place).masked_fill((numbers < 0)[:, :, None], -torch.inf)

    def select(self, rows: np.ndarray) -> "SentencesOf":
        """See `Remembered.select`."""
        at = torch.from_numpy(np.asarray(rows)).to(self.held[SUMS].device)
        held = {name: tensor[at] for name, tensor in self.held.items()}
        return SentencesOf(self.recipe, replace(self.spec, rows=len(at)), held)

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        ends = {SUMS: (2, 0.0), SIZES: (2, 0), NUMBERS: (2, -1)}
        for name, mine in self.held.items():
            both = [mine, other.held[name]]
            if name in ends:
                dim, fill = ends[name]
                most = max(each.shape[dim] for each in both)
                after = [0, 0] * (mine.dim() - dim - 1)
                both = [F.pad(each, (*after, 0, most - each.shape[dim]), value=fill) for each in both]
            self.held[name] = torch.cat(both)
        self.spec = replace(self.spec, rows=len(self.held[SAID]))

    def clear(self) -> None:
        self.held = self.recipe.open(self.spec).held

    def state(self) -> dict[str, Tensor]:
        return dict(self.held)

    def _order(self) -> Int[Tensor, "B H N"]:
        """The how-manieth sentence of its head each token is of, from 0 on: sentences without a token do not count."""
        numbers = self.held[NUMBERS].clamp(min=0) // 2
        begins = (numbers[..., 1:] != numbers[..., :-1]) & (self.held[NUMBERS][..., 1:] >= 0)
        return F.pad(begins.long(), (1, 0)).cumsum(-1)[..., : numbers.shape[-1]]

    def _reach(self, name: str, length: int) -> None:
        """Room for so many tokens, or sentences."""
        known = self.held[name]
        if length > known.shape[2]:
            after = (0, 0) * (known.dim() - 3)
            self.held[name] = F.pad(known, (*after, 0, length - known.shape[2]), value=-1 if name == NUMBERS else 0)


register("sentences", Sentences)
