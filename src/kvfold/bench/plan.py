"""Plan: the bytes of a KV cache and the roofline of prefill and decode, from a model's shape alone.

Which layers there are, and what each stores for a token, the model itself says: a copy of it on torch's meta device,
which holds no numbers, reads one token. How many tokens a method keeps, and in which formats, the method itself says,
and what those take the formats: see `held`.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvfold.bench.devices import Device
from kvfold.bench.held import StoredTokens, stored, window_tokens
from kvfold.budgets import Budget
from kvfold.evaluation.compare import budget_of
from kvfold.formats import Spec
from kvfold.formats.sizes import segment_bytes
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.latent import is_latent
from kvfold.hf.layers import tensors
from kvfold.hf.support import check_model
from kvfold.methods import Method

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores for a row of the batch: `heads` KV heads with keys and values, or a state of its own.

    `paged`: kvfold holds it on pages and a method sees it. `window`: tokens that it holds at most (None: all).
    `state_bytes`: what does not grow with the text (recurrent states). `latent`: values are a part of the keys (MLA),
    which a dense cache holds once.
    """

    paged: bool
    heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None
    state_bytes: int = 0
    latent: bool = False

    def dense_bytes(self, context: int, itemsize: int) -> int:
        """Bytes that a dense cache holds of a row's tokens, with so many for a number."""
        size = self.key_size if self.latent else self.size
        return self.tokens(context) * self.heads * size * itemsize

    @property
    def size(self) -> int:
        """Numbers that a head stores for a token: its key and its value."""
        return self.key_size + self.value_size

    def tokens(self, context: int) -> int:
        """Tokens stored of `context` without a method; transformers keeps one less than the window, the next is new."""
        return context if self.window is None else min(context, self.window - 1)

    def pairs(self, context: int) -> int:
        """Query-key pairs of a causal prompt of `context` tokens."""
        reach = context if self.window is None else min(context, self.window)
        return reach * context - reach * (reach - 1) // 2


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights: sizes, counts of parameters, and what each layer stores. `itemsize` in bytes.

    `embedding` is the input table, which is looked up and not multiplied; `tied`: it is the output matrix, too.
    `expert_parameters` are those of all experts of all layers, of which a token uses `experts_used` of `experts`.
    `weight_bits`: of a stored weight that is in no table, scales included; None: as `itemsize`.
    """

    layers: tuple[LayerShape, ...]
    query_heads: int
    hidden: int
    intermediate: int
    vocab: int
    embedding: int
    tied: bool
    parameters: int
    itemsize: int
    expert_parameters: int = 0
    experts: int = 0
    experts_used: int = 0
    weight_bits: float | None = None

    def kind(self, dtype: str) -> torch.dtype:
        """What the cache holds numbers in: `dtype`, where that is as wide as the model's."""
        found: torch.dtype = getattr(torch, dtype)
        return found if found.itemsize == self.itemsize else {2: torch.bfloat16, 8: torch.float64}[self.itemsize]

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses; an estimate where there are experts, else all."""
        return self.parameters - round(self.expert_parameters * (1 - self._share(1)))

    def _share(self, tokens: int) -> float:
        """The share of the experts that so many tokens use together, if each picks at random."""
        return 1 - (1 - self.experts_used / self.experts) ** tokens if self.experts else 1.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        tables = self.embedding * (1 if self.tied else 2)
        return self._weighed(self.parameters - tables) + tables * self.itemsize

    def _weighed(self, parameters: int) -> int:
        """Bytes of weights that are in no table."""
        return round(parameters * (8 * self.itemsize if self.weight_bits is None else self.weight_bits) / 8)

    def read_bytes(self, batch: int) -> int:
        """Bytes of weights that a decode step reads: not an input table of its own, and of the experts those used."""
        unread = self._weighed(round(self.expert_parameters * (1 - self._share(batch))))
        return self.weight_bytes - unread - (0 if self.tied else self.embedding) * self.itemsize

    @property
    def body(self) -> int:
        """Parameters that every token of a prompt is multiplied with: active ones, input and output table left out."""
        return self.active_parameters - self.embedding * (1 if self.tied else 2)

    def prefill_flops(self, context: int) -> float:
        """FLOPs of one row's prompt: its matrices, causal attention, the output matrix for the last token alone."""
        return 2.0 * (self.body * context + self.embedding) + sum(
            2.0 * layer.pairs(context) * self._attended(layer) for layer in self.layers
        )

    def decode_flops(self, tokens: tuple[float, ...]) -> float:
        """FLOPs of one row's decode step over so many stored tokens in each layer."""
        attention = sum(n * self._attended(layer) for n, layer in zip(tokens, self.layers, strict=True))
        return 2.0 * (self.body + self.embedding + attention)

    def _attended(self, layer: LayerShape) -> int:
        return self.query_heads * layer.size

    def dense_bytes(self, context: int) -> int:
        """Bytes that a dense cache holds for one row: keys and values, windows at their size, states."""
        return sum(layer.state_bytes + layer.dense_bytes(context, self.itemsize) for layer in self.layers)

    def held(self, method: Method, context: int, dtype: str) -> Iterator[tuple[LayerShape, Spec, StoredTokens | None]]:
        """Each layer, its spec of one row, and what a method keeps there of a prompt of `context` tokens.

        None for layers that are not on pages. Specs of layers of one shape are equal: their sizes are asked once.
        """
        paged = tuple(i for i, layer in enumerate(self.layers) if layer.paged)
        for index, layer in enumerate(self.layers):
            group = max(1, self.query_heads // max(1, layer.heads))
            spec = Spec(1, layer.heads, layer.key_size, layer.value_size, self.kind(dtype), CPU, group=group)
            found = None
            if layer.paged:
                found = stored(method, context, paged.index(index), paged, len(self.layers), layer.heads, group)
            yield layer, spec, found

    def activation_bytes(self, context: int) -> int:
        """Estimate of what one row's prompt, or chunk of it, takes while it is read, the cache not counted.

        Three tensors as wide as the feed-forward layer, three as wide as the model, one layer's keys and values.
        """
        widest = max((layer.heads * layer.size for layer in self.layers), default=0)
        return context * (3 * (self.intermediate + self.hidden) + widest) * self.itemsize


def shape_of(model: Any) -> ModelShape:
    """The shape of a transformers model, on the meta device or any other; it stays as it is.

    Raises ValueError if kvfold can't serve it.
    """
    check_model(model)
    config = model.config.get_text_config(decoder=True)
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), 0)  # fmt: skip
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 0
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    sparse = bool(experts and used and routed)
    width = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    if sparse:
        width = max(width, int(used) * int(getattr(config, "moe_intermediate_size", None) or width))
    return ModelShape(
        layers=_layers(model, config),
        query_heads=config.num_attention_heads,
        hidden=config.hidden_size,
        intermediate=width,
        vocab=table.shape[0],
        embedding=table.numel(),
        tied=output is None or output.weight is table,
        parameters=sum(p.numel() for p in model.parameters()),  # counts a tied matrix once
        itemsize=table.element_size(),
        expert_parameters=routed if sparse else 0,
        experts=int(experts) if sparse else 0,
        experts_used=int(used) if sparse else 0,
    )


def _layers(model: Any, config: Any) -> tuple[LayerShape, ...]:
    """What each layer stores, read off the cache that a copy of the model fills with one token."""
    empty = DynamicCache(config=config).layers
    paged = [type(layer) is DynamicLayer for layer in empty]  # those that `kvfold.Cache` holds on pages
    windows = [getattr(layer, "sliding_window", None) for layer in empty]
    twin = _without_numbers(model)
    twin.set_attn_implementation("sdpa")
    if any(".experts." in name for name, _ in twin.named_parameters()):
        twin.set_experts_implementation("batched_mm")  # the others look at numbers, or refuse float32
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device="meta")
            filled = twin(input_ids=token, use_cache=True).past_key_values.layers
    except RuntimeError as error:  # a model that looks at numbers on its way, which a meta tensor has not
        if not all(p or w for p, w in zip(paged, windows, strict=True)):
            raise ValueError(f"{type(model).__name__} does not run without its weights: {error}") from None
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return tuple(LayerShape(p, heads, size, size, w) for p, w in zip(paged, windows, strict=True))
    found, modules = list[LayerShape](), attention_modules(model)
    for layer, on_pages, window in zip(filled, paged, windows, strict=True):
        keys: Any = getattr(layer, "keys", None)
        values: Any = getattr(layer, "values", None)
        some = isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4
        heads, dk, dv = (keys.shape[1], keys.shape[3], values.shape[3]) if some else (0, 0, 0)
        latent = on_pages and is_latent(modules.get(len(found)))
        if latent:
            dk, dv = dk + dv, dk  # hf/latent.py: the key is all of it, the value the latent
        # Windows also count their tokens, in an integer.
        state = sum(t.nbytes for t in tensors(layer) if t.is_floating_point() and t is not keys and t is not values)
        found.append(LayerShape(on_pages, heads, dk, dv, window, state, latent))
    return tuple(found)


def _without_numbers(model: Any) -> Any:
    """A copy of the model on the meta device: whatever is set there, the model does not know of it."""
    memo: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class MemoryPlan:
    """One method on one device: bytes, batches, and bounds on speed. `dense_*` is a full cache without kvfold.

    KV bytes are those after the prompt, for the whole batch. `step_seconds` is the least time of a decode step,
    `prefill_seconds` that to the first token; rates are tokens/s of the whole batch. `gain` is that of the rate at
    equal batch, `gain_bound` what the kept share of the bytes allows. `largest_*` rates are at the largest batch.
    """

    method: str
    budget: Budget | None
    context: int
    batch: int
    kept_tokens: float
    weight_bytes: int
    reserve_bytes: int
    kv_bytes: int
    dense_kv_bytes: int
    fits: bool
    largest_batch: int
    dense_largest_batch: int
    step_seconds: float
    tokens_per_second: float
    dense_tokens_per_second: float
    gain: float
    gain_bound: float
    largest_tokens_per_second: float
    dense_largest_tokens_per_second: float
    prefill_seconds: float

    @property
    def total_bytes(self) -> int:
        """Weights, KV cache and reserve."""
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def make_plan(
    shape: ModelShape, device: Device, method: Method, *, dtype: str, context: int, batch: int = 1,
    reserve: float = 0.05, name: str | None = None, chunk: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """What `method` comes to for prompts of `context` tokens in a batch of `batch` rows.

    `reserve` is a share of the device's memory that is left alone, beside the activations of one row's prompt; with
    `chunk` beside those of so many tokens, which every layer may hold over its budget. Raises ValueError for a
    context, batch or chunk below 1, a reserve outside [0, 1), and a dtype the device lacks.
    """
    for what, value in (("context", context), ("batch", batch), ("chunk", 1 if chunk is None else chunk)):
        if value < 1:
            raise ValueError(f"{what}={value} must be at least 1")
    if not 0.0 <= reserve < 1.0:
        raise ValueError(f"reserve={reserve} must be a share of the device's memory, in [0, 1)")
    peak = device.peak(dtype)
    kv, nominal, kept = 0, 0.0, []
    for layer, spec, held_here in shape.held(method, context, dtype):
        if held_here is not None:
            tokens, most, least = held_here.tokens, held_here.nbytes(spec), held_here.least(spec)
        elif layer.window is not None and method.windows is not None:
            tokens = (window_tokens(method.windows, layer.window, context),) * layer.heads
            most = segment_bytes(method.windows, spec, tokens)
            least = min(most, sum(tokens) * layer.size * shape.itemsize)
        else:
            tokens = (layer.tokens(context),) * layer.heads
            most = least = sum(tokens) * layer.size * shape.itemsize
        kv += layer.state_bytes + most
        nominal += layer.state_bytes + least
        kept.append(sum(tokens) / max(1, len(tokens)))
    dense = shape.dense_bytes(context)
    whole = tuple(float(layer.tokens(context)) for layer in shape.layers)
    held = round(reserve * device.memory) + shape.activation_bytes(min(context, chunk or context))
    if chunk is not None:
        held += shape.dense_bytes(min(context, chunk))
    room = max(0, device.memory - shape.weight_bytes - held)

    def step(rows: int, row_bytes: int, tokens: tuple[float, ...]) -> float:
        read = (shape.read_bytes(rows) + rows * row_bytes) / device.bandwidth
        return max(read, rows * shape.decode_flops(tokens) / peak)

    def rate(rows: int, row_bytes: int, tokens: tuple[float, ...]) -> float:
        return rows / step(rows, row_bytes, tokens) if rows else 0.0

    weights, most, dense_most = shape.read_bytes(batch), room // max(1, kv), room // max(1, dense)
    read_prompt = max(batch * shape.prefill_flops(context) / peak, (weights + batch * kv) / device.bandwidth)
    own, full = step(batch, kv, tuple(kept)), step(batch, dense, whole)
    total = shape.weight_bytes + batch * kv + held
    on_pages = [tokens for tokens, layer in zip(kept, shape.layers, strict=True) if layer.paged]
    return MemoryPlan(
        method=str(method) if name is None else name, budget=budget_of(method), context=context,
        batch=batch, kept_tokens=mean(on_pages) if on_pages else 0.0, weight_bytes=shape.weight_bytes,
        reserve_bytes=held, kv_bytes=batch * kv, dense_kv_bytes=batch * dense, fits=total <= device.memory,
        largest_batch=most, dense_largest_batch=dense_most, step_seconds=own, tokens_per_second=batch / own,
        dense_tokens_per_second=batch / full, gain=full / own,
        gain_bound=(weights + batch * dense) / (weights + batch * nominal),
        largest_tokens_per_second=rate(most, kv, tuple(kept)),
        dense_largest_tokens_per_second=rate(dense_most, dense, whole), prefill_seconds=read_prompt,
    )  # fmt: skip
