"""What is done to caches, and to segments, whose pages lie elsewhere: on a disk, or on the host."""

from typing import Any

import torch
from torch import Tensor

from kvfold import testing
from kvfold.formats import POSITION, Chunk, Format, Segment, Spec
from models import feed, follow, grow, tokens

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 64


def life(model: Any, cache: Any, length: int) -> list[Tensor]:
    """Logits of a prompt, a further turn, a crop, a fork that goes another way, a reorder, and a join."""
    prompt = tokens(length)
    mask = prompt["attention_mask"]
    logits = [feed(model, cache, prompt["input_ids"], mask)]
    mask = grow(mask, 40)
    logits.append(feed(model, cache, testing.steps(1, 40), mask))  # a second turn
    cache.crop(-25)
    mask = mask[:, :-25]
    copy = cache.fork()
    for each, seed in ((cache, 1), (copy, 2)):
        more = testing.steps(1, 5, seed=seed)
        logits.append(follow(model, each, more[:, :1], grow(mask), more[:, 1:]))
    copy.reorder_cache(torch.zeros(2, dtype=torch.int64))
    logits.append(feed(model, copy, testing.steps(2, 1), grow(mask, 6).expand(2, -1)))
    cache.join(copy.take([1]))
    wide = grow(mask, 7).repeat(2, 1)
    wide[0, 0] = 0
    logits.append(feed(model, cache, testing.steps(2, 1), wide))
    return logits


def chunk(tokens: int, start: int = 0, seed: int = 0) -> Chunk:
    """So many random tokens of one row, from text position `start` on."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(2))
    places = torch.arange(start, start + tokens, dtype=torch.int32).expand(1, HEADS, tokens)
    return Chunk(keys, values, torch.ones(1, HEADS, tokens, dtype=torch.bool), {POSITION: places})


def twins(form: Format, memory: Any, tokens: int) -> tuple[Segment, Segment]:
    """A segment in memory, and one whose pages are `memory`'s, of the same tokens."""
    spec = Spec(1, HEADS, WIDTH, WIDTH, torch.float32, CPU)
    both = form.open(spec), form.open(Spec(1, HEADS, WIDTH, WIDTH, torch.float32, CPU, memory=memory))
    for each in both:
        each.append(chunk(tokens), even=True)
    return both
