"""Long generation, teacher-forced: tokens of a text fed one by one, and how far a cache drifts from the full one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache as HFCache
from transformers import PreTrainedModel

from kvfold.evaluation.agreement import divergence
from kvfold.evaluation.decoding import prefill, sync
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.tables import as_long_as

READ, JUDGED = 128, 16
"""Tokens that the full cache reads at once, and steps that are compared at once: a vocabulary is wide."""


@dataclass(frozen=True)
class Step:
    """A token fed to every row: its number from 0 on, the logits after it (B, V), and the seconds that it took."""

    number: int
    logits: Tensor
    seconds: float


@dataclass
class Drift:
    """How far a cache went from the full one over the last of the tokens fed, and what it took.

    A row of the batch is a document: `kl` in nats a token and `top1`, the share of equal greedy tokens, are its means.
    `seconds` are those of every step, for the whole batch; `most_nbytes` and `nbytes` the bytes that the batch held at
    most after a step and after the last, `most_tokens` the tokens of that head which held most at any step.
    """

    kl: list[float]
    top1: list[float]
    seconds: list[float] = field(default_factory=list)
    most_nbytes: int = 0
    nbytes: int = 0
    most_tokens: int = 0


def check_lengths(ids: Tensor, context: int, last: int) -> None:
    """Raise ValueError where `context` tokens of prompt leave too few of `ids` to be fed, or `last` is more than is."""
    if not 0 < context < ids.shape[1]:
        raise ValueError(f"context={context} must be between 1 and {ids.shape[1] - 1}, one less than there are tokens")
    if not 0 < last <= ids.shape[1] - context:
        raise ValueError(f"last={last} must be between 1 and {ids.shape[1] - context}, the tokens that are fed")


def held_at_most(cache: Cache) -> int:
    """Tokens of that (layer, row, head) which holds most."""
    return max((int(core.counts().max(initial=0)) for core in cache.paged), default=0)


def held_on_average(cache: Cache) -> int:
    """Tokens of a head on average over a row's layers and heads, of that row which holds most, rounded up."""
    counts = [core.counts() for core in cache.paged if core.counts().size]
    heads = sum(each.shape[1] for each in counts)
    return -(-int(sum(each.sum(1) for each in counts).max()) // heads) if heads else 0


@torch.no_grad()
def fed(model: PreTrainedModel, cache: HFCache, ids: Int[Tensor, "B T"]) -> Iterator[Step]:
    """Feed tokens one by one, the same number to every row, as if the model had said them."""
    with as_long_as(model, cache.get_seq_length() + ids.shape[1]):
        for number in range(ids.shape[1]):
            token = ids[:, number : number + 1].to(model.device)
            sync(model.device)
            start = time.perf_counter()
            logits = model(input_ids=token, **with_cache(model, cache)).logits[:, -1]
            sync(model.device)
            yield Step(number, logits, time.perf_counter() - start)


@torch.no_grad()
def swallowed(model: PreTrainedModel, cache: HFCache, ids: Int[Tensor, "B T"]) -> None:
    """Feed tokens one by one as `fed` does, and ask of none what comes next: a vocabulary is most of a small model."""
    decoder = model.base_model
    with as_long_as(model, cache.get_seq_length() + ids.shape[1]):
        for token in ids.to(model.device).split(1, 1):
            decoder(input_ids=token, **with_cache(model, cache))


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What goes into the model's output layer, (B, Q, E) for each forward."""
    seen: list[Tensor] = []
    handle = _head(model).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _head(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model={type(model).__name__} has no output layer of its own, which logits are made with")
    return head


def logits_of(model: PreTrainedModel, states: Float[Tensor, "*N E"]) -> Float[Tensor, "*N V"]:
    """The logits that the model makes of what goes into its output layer, float32."""
    logits: Tensor = _head(model)(states.to(model.device)).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def full_states(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], last: int, *, progress: Callable[[float], None] = lambda _: None
) -> Float[Tensor, "B N E"]:
    """What goes into the output layer after each of the last N = `last` tokens, under the full cache.

    All distributions of the full cache come of these without loss, in a hundredth of the memory: a vocabulary is
    wide. Tokens that are known need not be fed one by one for it. Raises ValueError for a model whose logits are
    not made of them as `logits_of` does.
    """
    check_lengths(ids, ids.shape[1] - last, last)
    cache, found = Cache(model, "full"), list[Tensor]()
    with as_long_as(model, ids.shape[1]):
        prefill(model, ids[:, :-last], cache)
        for part in torch.split(ids[:, -last:].to(model.device), READ, dim=1):
            with watched(model) as seen:
                logits = model(input_ids=part, **with_cache(model, cache)).logits
            again, near = logits_of(model, seen[0][:, -1:]), 1e-3 + 16 * torch.finfo(logits.dtype).eps
            if not torch.allclose(again, logits[:, -1:].float(), rtol=near, atol=near):
                raise ValueError(
                    f"model={type(model).__name__} makes its logits of more than its output layer and a cap, so that "
                    "what goes into that layer does not say them"
                )
            found.append(seen[0])
            progress(sum(each.shape[1] for each in found) / last)
    return torch.cat(found, 1)


@torch.no_grad()
def drift(
    model: PreTrainedModel, cache: HFCache, ids: Int[Tensor, "B T"], context: int, states: Float[Tensor, "B N E"],
    *, progress: Callable[[float], None] = lambda _: None,
) -> Drift:  # fmt: skip
    """Read `context` tokens, feed the others one by one, and compare the last N of those with the full cache.

    `states` are `full_states`' for these tokens. No padding. Raises ValueError where N is more than is fed.
    """
    check_lengths(ids, context, states.shape[1])
    kl, top1, found = list[Tensor](), list[Tensor](), Drift([], [])
    count, waiting = ids.shape[1] - context, list[Tensor]()
    with as_long_as(model, ids.shape[1]):  # from the prompt on
        prefill(model, ids[:, :context], cache)
        for step in fed(model, cache, ids[:, context:]):
            found.seconds.append(step.seconds)
            if isinstance(cache, Cache):
                found.nbytes = cache.nbytes
                found.most_nbytes = max(found.most_nbytes, found.nbytes)
                found.most_tokens = max(found.most_tokens, held_at_most(cache))
            if step.number >= count - states.shape[1]:
                waiting.append(step.logits)
            if waiting and (len(waiting) == JUDGED or step.number == count - 1):
                done = len(kl) * JUDGED
                full = logits_of(model, states[:, done : done + len(waiting)])
                ours = torch.stack(waiting, 1).float()
                apart, same = divergence(torch.log_softmax(full, -1), torch.log_softmax(ours, -1))  # B N
                kl.append(apart)
                top1.append(same)
                waiting.clear()
            progress((step.number + 1) / count)
    found.kl, found.top1 = (torch.cat(each, 1).double().mean(1).tolist() for each in (kl, top1))
    return found
