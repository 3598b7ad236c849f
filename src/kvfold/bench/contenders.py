"""The caches that an end-to-end benchmark compares: kvfold's methods, and transformers' own."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as HFCache
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from kvfold.evaluation.compare import budget_of
from kvfold.evaluation.decoding import sync
from kvfold.hf.argument import with_cache
from kvfold.hf.attention import NAME
from kvfold.hf.cache import Cache
from kvfold.hf.layers import PagedLayer, tensors
from kvfold.methods import Method
from kvfold.methods.full import Full
from kvfold.views import LayerView

DYNAMIC = "DynamicCache"
TRIAL_TOKENS = 16
BACKENDS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "quanto": {"nbits": 4},
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1},
}
"""Of transformers' QuantizedCache, with what each is asked for (hqq quantises along axis 1 alone well)."""


@dataclass(frozen=True)
class BenchContender:
    """A cache to be measured: `make` gives a new, empty one. `budget` is the method's, where it has one."""

    name: str
    library: str
    budget: float | int | None
    make: Callable[[], HFCache]


def kvfold_contenders(
    model: PreTrainedModel, methods: Sequence[tuple[str, Method]], chunk: int | None = None
) -> list[BenchContender]:
    """A contender for each method, under the name that it was asked for by; `chunk`: see `Cache(prefill_chunk=...)`."""

    def one(name: str, method: Method) -> BenchContender:
        return BenchContender(name, "kvfold", budget_of(method), lambda: Cache(model, method, prefill_chunk=chunk))

    return [one(name, method) for name, method in methods]


def fitting(
    model: PreTrainedModel, contenders: Sequence[BenchContender]
) -> tuple[list[BenchContender], list[dict[str, str]]]:
    """Those that can read a short prompt of random tokens and decode, and those that can't, each with its reason."""
    found, skipped = [], []
    for contender in contenders:
        try:
            cache = contender.make()
            token, _ = read_prompt(model, cache, draw_prompts(model, 1, TRIAL_TOKENS))
            decode_steps(model, cache, token, 1)
        except Exception as error:  # of a method, which may be anybody's
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            skipped.append({"contender": contender.name, "reason": reason})
        else:
            found.append(contender)
    return found, skipped


def transformers_contenders(
    model: PreTrainedModel, quantized: bool = True, bits: Sequence[int] = (4,)
) -> tuple[list[BenchContender], list[dict[str, str]]]:
    """transformers' caches for this model, DynamicCache first, and those left out, each with its reason.

    `bits`: of a number, for each backend that can be asked for them.
    """
    found = [BenchContender(DYNAMIC, "transformers", None, lambda: DynamicCache(config=model.config))]
    skipped: list[dict[str, str]] = []

    def one(backend: str, options: dict[str, Any]) -> BenchContender:
        bits = f"{options['nbits']} bits" if options else "8 bits"
        name = f"QuantizedCache ({backend}, {bits})"
        return BenchContender(name, "transformers", None, lambda: QuantizedCache(backend, model.config, **options))

    asked = [
        (backend, {**options, "nbits": each} if options else options)
        for backend, options in (BACKENDS.items() if quantized else ())
        for each in (bits if options else (8,))
    ]
    for backend, options in asked:
        contender = one(backend, options)
        try:
            contender.make()
        except (ImportError, ValueError) as error:  # not installed; not in this transformers; not for this model
            skipped.append({"contender": contender.name, "reason": " ".join(str(error).split())})
        else:
            found.append(contender)
    return found, skipped


def held_bytes(cache: HFCache) -> int:
    """Bytes of a cache: `nbytes` of kvfold's, else the sum of the tensors in its layers, each counted once.

    A slice counts as what it shows, not as the storage that it keeps alive.
    """
    if isinstance(cache, Cache):
        return cache.nbytes
    found = {id(tensor): tensor for layer in cache.layers for tensor in tensors(layer)}
    return sum(_bytes(tensor) for tensor in found.values())


def _bytes(tensor: Tensor) -> int:
    """Packed tensors (quanto's) show the dtype that they stand for: what counts is what they are made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads at least: each parameter once, a tied matrix once.

    An input table of its own is looked up and not read; of experts, one token's share counts.
    """
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = output is None or output.weight is table
    config = model.config.get_text_config(decoder=True)
    experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), 0)  # fmt: skip
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or experts
    total = 0
    for name, parameter in model.named_parameters():  # a shared parameter comes once
        if parameter is table and not tied:
            continue
        share = used / experts if experts and ".experts." in name else 1.0
        total += round(parameter.nbytes * share)
    return total


def draw_prompts(model: PreTrainedModel, batch: int, context: int, seed: int = 0) -> Tensor:
    """Random token ids (B, T), the same as the peers' in benchmarks/peers."""
    size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(10, size - 1), min(10_000, size), (batch, context), generator=generator)
    return ids.to(model.device)


def set_attention(model: PreTrainedModel, cache: HFCache) -> None:
    """kvfold's attention for its caches, SDPA for transformers'."""
    model.set_attn_implementation(NAME if isinstance(cache, Cache) else "sdpa")


@torch.no_grad()
def forward(model: PreTrainedModel, cache: HFCache, ids: Tensor) -> Tensor:
    """Read `ids` (B, Q); the greedy next token (B, 1)."""
    logits = model(input_ids=ids, logits_to_keep=1, **with_cache(model, cache)).logits
    token: Tensor = logits[:, -1:].argmax(-1)
    return token


def read_prompt(model: PreTrainedModel, cache: HFCache, ids: Tensor) -> tuple[Tensor, float]:
    """A real prefill: the next token (B, 1) and the seconds that it took."""
    set_attention(model, cache)
    sync(model.device)
    start = time.perf_counter()
    token = forward(model, cache, ids)
    sync(model.device)
    return token, time.perf_counter() - start


def decode_steps(model: PreTrainedModel, cache: HFCache, token: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """`steps` greedy tokens after `token`, whatever ends an answer: the last (B, 1), and each step's seconds."""
    set_attention(model, cache)
    taken: list[float] = []
    for _ in range(steps):
        sync(model.device)
        start = time.perf_counter()
        token = forward(model, cache, token)
        sync(model.device)
        taken.append(time.perf_counter() - start)
    return token, taken


@torch.no_grad()
def fill_all(model: PreTrainedModel, caches: Sequence[HFCache], ids: Tensor) -> Tensor:
    """One exact prefill of (B, T) fills all `caches`, empty ones; the next token (B, 1). See `prefill_many`.

    transformers' caches get the same keys and values by `update`. A kvfold cache of method `full` that is among
    them reads the prompt itself, so that no second full cache stands beside it.
    """
    own = next((cache for cache in caches if isinstance(cache, Cache) and isinstance(cache.method, Full)), None)
    base = Cache(model, "full") if own is None else own

    def hand_out(view: LayerView) -> None:
        for cache in caches:
            if isinstance(cache, Cache):
                if cache is not base:
                    cache.adopt(view, wait=True)
            else:
                cache.update(view.keys.clone(), view.values.clone(), view.place.layer)

    set_attention(model, base)
    with base.observed(hand_out):
        token = forward(model, base, ids)
    for cache in caches:
        if cache is base:
            continue
        # Sliding windows and recurrent states are no method's: each cache gets its own copy of what the model left.
        cache.layers = [
            mine if isinstance(theirs, PagedLayer) else copy.deepcopy(theirs)
            for mine, theirs in zip(cache.layers, base.layers, strict=True)
        ]
        if isinstance(cache, Cache):
            cache.end_adoption(token)
    return token
