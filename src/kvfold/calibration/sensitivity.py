"""EpiCache's calibration: how far each layer's keys turn when blocks see little of each other (arXiv:2509.17396)."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.calibration.duo import mixing
from kvfold.calibration.run import Run
from kvfold.hf.cache import Cache

BLOCKS, SINK_SHARE = 4, 32
"""Blocks of a sample, and how many times the sinks go into a block: as in the paper's 16384, 4096 and 128 tokens."""


class Blocks:
    """The attention of both passes: causal, then sinks, the second half of the block before and the block itself.

    `cosines` holds the mean cosine of the keys of both passes, by layer. Other layers attend as ever.
    """

    def __init__(self, paged: list[int], block: int, sinks: int):
        self.paged, self.block, self.sinks = frozenset(paged), block, sinks
        self.keys: dict[int, Tensor] = {}
        self.cosines: dict[int, float] = {}
        self.apart = False

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in self.paged and self.apart:
            whole = self.keys.pop(layer).float()
            self.cosines[layer] = float(F.cosine_similarity(whole, key.float(), dim=-1).mean())
            return self.in_blocks(query, key, value, kwargs.get("scaling")).transpose(1, 2), None
        if layer in self.paged:
            self.keys[layer] = key.detach()
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return out, None

    def in_blocks(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention (B, Hq, T, D), a block of queries at a time."""
        parts = []
        for start in range(0, query.shape[2], self.block):
            stop = min(start + self.block, query.shape[2])
            near = max(0, start - self.block // 2)
            sinks = torch.arange(min(self.sinks, near), device=query.device)
            seen = torch.cat([sinks, torch.arange(near, stop, device=query.device)])
            mask = seen <= torch.arange(start, stop, device=query.device)[:, None]
            part = F.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, seen], value[:, :, seen], mask, scale=scale, enable_gqa=True
            )
            parts.append(part)
        return torch.cat(parts, 2)


@torch.no_grad()
def epicache_tables(run: Run) -> dict[str, Any]:
    """`sensitivity`: 1 - the mean cosine over heads and tokens of each layer's keys, with and without earlier blocks.

    Smaller than the paper's one sample of 16K tokens, to run without a GPU; more `samples` and `length` go there.
    Differs from the official code: the cosine is taken token by token, as the paper has it, not of 100 tokens at once.
    """
    samples, length = run.sizes(1, 4096)
    rng, block = random.Random(run.seed), max(2, length // BLOCKS)
    paged = [core.layer for core in Cache(run.model, "full").paged]
    blocks = Blocks(paged, block, block // SINK_SHARE)
    run.about.update(block=block, sinks=blocks.sinks)
    total = [0.0] * len(paged)
    body = run.model.get_decoder()
    with mixing(run.model, blocks):
        for number in range(samples):
            run.tick(f"sample {number + 1} of {samples}")
            ids = sample(run, rng, length).to(run.model.device)
            blocks.apart = False
            body(ids, use_cache=False)
            blocks.apart = True
            body(ids, use_cache=False)
            total = [so_far + blocks.cosines[layer] for so_far, layer in zip(total, paged, strict=True)]
    return {"sensitivity": [max(0.0, 1.0 - cosine / samples) for cosine in total]}


def sample(run: Run, rng: random.Random, length: int) -> Tensor:
    """Running text of `length` tokens, from a random place on; where the texts are shorter, all of them."""
    texts = list(run.texts)
    first = rng.randrange(len(texts))
    text = "\n\n".join(text for _, text in texts[first:] + texts[:first])
    words = list(run.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    room = length - len(run.first)
    begin = rng.randrange(max(1, len(words) - room + 1))
    return torch.tensor([[*run.first, *words[begin : begin + room]]], dtype=torch.int64)
