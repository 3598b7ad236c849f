"""Greedy decoding with a clock: what `kvfold run` and `kvfold compare` measure."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as HFCache
from transformers import PreTrainedModel

from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.greedy import end_tokens
from kvfold.hf.tables import as_long_as


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been read: logits of the next token (V,), and the seconds it took."""

    logits: Tensor
    seconds: float


@dataclass(frozen=True)
class GreedyAnswer:
    """Generated tokens (the end token included), and the seconds that all but the first took."""

    tokens: list[int]
    seconds: float

    @property
    def rate(self) -> float | None:
        """Tokens a second, the first not counted; None for a single token."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None


def sync(device: torch.device) -> None:
    """Wait for what was launched; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: Tensor, cache: HFCache, chunk: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Prefilled:  # fmt: skip
    """Read a prompt (1, T) into `cache`, in chunks of `chunk` tokens where given, after each of which a method decides.

    `progress` gets the share that is read, of prompts that are long enough to be read in parts or chunks.
    """
    sync(model.device)
    start = time.perf_counter()
    out: Any = None
    whole = as_long_as(model, cache.get_seq_length() + ids.shape[1])  # however it is cut
    chunks, done = torch.split(ids, chunk or ids.shape[1], dim=1), 0

    def tell(share: float) -> None:
        progress((done + share) / len(chunks))

    with ExitStack() as stack:
        stack.enter_context(whole)
        if isinstance(cache, Cache):
            stack.enter_context(cache.prefilling())
            stack.enter_context(cache.progressing(tell))
        for part in chunks:
            out = model(input_ids=part.to(model.device), logits_to_keep=1, **with_cache(model, cache))
            done += 1
            if len(chunks) > 1:
                tell(0.0)
    sync(model.device)
    return Prefilled(out.logits[0, -1].float(), time.perf_counter() - start)


@torch.no_grad()
def decode(
    model: PreTrainedModel, cache: HFCache, first: Tensor, count: int, put: Callable[[Tensor], None] | None = None
) -> GreedyAnswer:
    """At most `count` greedy tokens, from the logits of the first on; `put` gets each (1,) as it comes."""
    ends = end_tokens(model)
    tokens = [int(first.argmax())]
    sync(model.device)
    start = time.perf_counter()
    while True:
        step = torch.tensor([[tokens[-1]]], dtype=torch.int64)
        if put is not None:
            put(step[0])
        if len(tokens) == count or tokens[-1] in ends:
            break
        tokens.append(int(model(input_ids=step.to(model.device), **with_cache(model, cache)).logits[0, -1].argmax()))
    sync(model.device)
    return GreedyAnswer(tokens, time.perf_counter() - start)


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, cache: HFCache, first: Tensor, tokens: list[int]) -> Tensor:
    """Logits (len(tokens), V) before each of `tokens`, fed one by one as if the model had said them."""
    logits = [first]
    for token in tokens[:-1]:
        step = torch.tensor([[token]], device=model.device, dtype=torch.int64)
        logits.append(model(input_ids=step, **with_cache(model, cache)).logits[0, -1].float())
    return torch.stack(logits)
