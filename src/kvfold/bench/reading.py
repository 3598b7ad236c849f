"""What methods that read few of their tokens read, and how much of what matters: choices beside exact attention."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.forced import fed
from kvfold.formats import LOG_MASS, Chosen, IndexedSegment
from kvfold.formats.few import read_slots
from kvfold.formats.indexed import choices_seen
from kvfold.formats.parts import Choosing
from kvfold.hf.cache import Cache
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods import Method


@dataclass(frozen=True)
class ReadRow:
    """A method over one text, of which it fed some tokens one by one.

    `kl` (nats) and `top1` (share of equal greedy tokens) are beside the full cache. `recall`: of the tokens that a
    query head reads, the share that is among as many with the largest exact attention; `attention`: how much of it they
    have; both None where nothing was chosen. `read_bytes` are those of a step, of the units that each list of a KV head
    names and the index, `stored_bytes` of all keys and values of the layers that choose; `index_bytes` of the indexes
    in all layers, `nbytes` of the cache.
    """

    method: str
    kl: float
    top1: float
    recall: float | None
    attention: float | None
    read_bytes: float
    stored_bytes: float
    index_bytes: int
    nbytes: int
    step_seconds: float

    @property
    def read(self) -> float:
        """What a step reads of what is stored in the layers that choose."""
        return self.read_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"read": self.read}


class Watch:
    """What choices were worth, by layer and step."""

    def __init__(self) -> None:
        self.recall, self.attention = list[float](), list[float]()
        self.read = self.stored = 0

    def see(self, segment: IndexedSegment, q: Float[Tensor, "B H G 1 D"], scale: float, chosen: Chosen | None) -> None:
        """A query that is about to attend, and the units that were chosen for it (None: all)."""
        tokens, queries = segment.inner.dense(), q[:, :, :, 0].float()
        logits = (queries @ tokens.keys.float().mT) * scale
        if LOG_MASS in tokens.columns:
            logits = logits + tokens.columns[LOG_MASS][:, :, None]
        true = logits.masked_fill(~tokens.valid[:, :, None], -torch.inf).softmax(-1)
        read = tokens.valid[:, :, None]
        if chosen is not None:
            read = read_slots(tokens.valid, chosen, segment.form.selection.unit)
        each = sum(states.shape[-1] * states.itemsize for states in (tokens.keys, tokens.values))
        self.read += int(read.sum()) * each + segment.index.nbytes
        self.stored += int(tokens.valid.sum()) * each
        mine = read.repeat_interleave(true.shape[2] // read.shape[2], 2)
        count = mine.sum(-1)
        order = torch.argsort(true, dim=-1, descending=True, stable=True)
        first = torch.arange(true.shape[-1], device=true.device) < count[..., None]
        found = (mine.gather(-1, order) & first).sum(-1) / count.clamp(min=1)
        self.recall.append(float(found.mean()))
        self.attention.append(float((true * mine).sum(-1).mean()))


def index_bytes(cache: Cache) -> int:
    """Bytes of the indexes of all layers."""
    segments = [segment for core in cache.paged for _, segment in core.segments]
    return sum(segment.index_nbytes for segment in segments if isinstance(segment, Choosing))


@torch.no_grad()
def measure_reading(
    model: PreTrainedModel, methods: Sequence[tuple[str, Method]], ids: Int[Tensor, " T"], context: int, watched: int,
    tick: Callable[[str], None] = lambda _: None,
) -> list[ReadRow]:  # fmt: skip
    """The first `context` ids are read in one exact pass for all methods and the full cache, the others one by one.

    Choices are looked at during the first `watched` of those, and a step is timed over the others. The first row is the
    full cache's. Raises ValueError where not more than `watched` tokens are left.
    """
    left = len(ids) - context
    if not 0 < watched < left:
        raise ValueError(f"watched={watched} must be from 1 to {left - 1}, fewer than the {left} tokens fed")
    named = [("full", None), *methods]
    caches = [Cache(model, "full" if method is None else method) for _, method in named]
    tick(f"reading {context:,} tokens")
    prefill_many(model, {"input_ids": ids[None, :context].to(model.device)}, caches, logits_to_keep=1)
    rows, rest, truth = list[ReadRow](), ids[None, context:], torch.empty(0, dtype=torch.float32)
    for (name, _), cache in zip(named, caches, strict=True):
        tick(f"{name}: {left} tokens, one by one")
        watch, logits, seconds = Watch(), list[Tensor](), list[float]()
        with choices_seen(watch.see):
            logits += [step.logits[0] for step in fed(model, cache, rest[:, :watched])]
        for step in fed(model, cache, rest[:, watched:]):
            logits.append(step.logits[0])
            seconds.append(step.seconds)
        said = torch.stack(logits).float()
        truth = said if not rows else truth
        found, chose = agreement(truth, said), bool(watch.recall)
        rows.append(ReadRow(
            name, found.kl, found.top1, mean(watch.recall) if chose else None, mean(watch.attention) if chose else None,
            watch.read / watched, watch.stored / watched, index_bytes(cache), cache.nbytes, median(seconds),
        ))  # fmt: skip
        cache.reset()
    return rows
