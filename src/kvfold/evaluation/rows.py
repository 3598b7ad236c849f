"""Several prompts side by side: padded on the left, read and decoded together, each row as it would be alone."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache as HFCache
from transformers import PreTrainedModel

from kvfold.evaluation.decoding import sync
from kvfold.hf.argument import with_cache


@dataclass
class ReadRows:
    """What a cache has read: `mask` (B, T) marks the columns that are not padding; `logits` (B, V) come next."""

    mask: Bool[Tensor, "B T"]
    logits: Float[Tensor, "B V"]

    def pick(self, rows: Sequence[int]) -> "ReadRows":
        """Row i becomes what row `rows[i]` was."""
        index = torch.tensor(rows, device=self.mask.device, dtype=torch.int64)
        return ReadRows(self.mask[index], self.logits[index.to(self.logits.device)])


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
    """Token ids padded on the left, and where they are tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], dtype=torch.bool)
    return ids, mask


def inputs(model: PreTrainedModel, ids: Tensor, new: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
    """What the model is called with to read `ids` (B, Q) behind what `before` (B, T) marks as read."""
    mask = new if before is None else torch.cat([before, new.to(before.device)], 1)
    mask = mask.to(model.device)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    found = {"input_ids": ids.to(model.device), "position_ids": positions}
    # A mask of ones says nothing, and costs a look at every step.
    return found if bool(mask.all()) else {**found, "attention_mask": mask.long()}


@torch.no_grad()
def read(model: PreTrainedModel, cache: HFCache, ids: Tensor, new: Tensor, before: Tensor | None = None) -> ReadRows:
    """Read `ids` into `cache`."""
    given = inputs(model, ids, new, before)
    logits = model(**given, logits_to_keep=1, **with_cache(model, cache)).logits[:, -1].float()
    return ReadRows(new.to(model.device) if before is None else torch.cat([before, new.to(before.device)], 1), logits)


def _next(model: PreTrainedModel, cache: HFCache, at: ReadRows, tokens: Tensor) -> ReadRows:
    return read(model, cache, tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool), at.mask)


@dataclass(frozen=True)
class Decoded:
    """Generated tokens of each row, the one that ended it included; seconds of all steps but the first."""

    tokens: list[list[int]]
    seconds: float
    steps: int


def decode_rows(
    model: PreTrainedModel,
    cache: HFCache,
    at: ReadRows,
    limits: Sequence[int],
    ends: Callable[[int, int], bool],
    *,
    minima: Sequence[int] = (),
    end_tokens: Collection[int] = (),
) -> Decoded:
    """Greedy tokens, at most `limits[b]` for row b, up to the first for which `ends(b, token)`.

    The first `minima[b]` are none of `end_tokens`. A row that has ended goes on unread until all have.
    """
    found: list[list[int]] = [[] for _ in limits]
    open_rows = set(range(len(limits)))
    banned = torch.tensor(sorted(end_tokens), dtype=torch.long, device=at.logits.device)
    sync(model.device)
    start, steps = time.perf_counter(), 0
    while True:
        early = [row for row, least in enumerate(minima) if len(found[row]) < least]
        if early and len(banned):
            at.logits[torch.tensor(early, device=banned.device, dtype=torch.int64)[:, None], banned] = float("-inf")
        chosen = at.logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row in open_rows:
                found[row].append(token)
                if len(found[row]) >= limits[row] or ends(row, token):
                    open_rows.discard(row)
        if not open_rows:
            break
        at = _next(model, cache, at, chosen)
        steps += 1
    sync(model.device)
    return Decoded(found, time.perf_counter() - start, steps)


def force_rows(
    model: PreTrainedModel,
    cache: HFCache,
    at: ReadRows,
    targets: Int[Tensor, "B N"],
    look: Callable[[int, Tensor], None],
) -> None:
    """Feed `targets` one by one as if the model had said them; `look(i, logits)` sees (B, V) before each of them."""
    for i in range(targets.shape[1]):
        look(i, at.logits)
        if i + 1 < targets.shape[1]:
            at = _next(model, cache, at, targets[:, i])
