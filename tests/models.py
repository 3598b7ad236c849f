"""Tiny random models, seeded: one family for each way in which attention differs."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from calibrated import calibrate

VOCAB = 97
COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    tie_word_embeddings=False,
    # Large enough for attention to be peaked: with 0.02 every key weighs the same and no test would tell.
    initializer_range=0.25,
)  # fmt: skip
HYBRID = ["full_attention" if i % 2 else "linear_attention" for i in range(4)]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-one-layer": ("llama", {"num_hidden_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 512}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("gpt2", {}),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                             "original_max_position_embeddings": 128}},
    ),
    "ntk": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen3-next": (
        "qwen3_next",
        {"num_hidden_layers": 4, "layer_types": HYBRID, "head_dim": 16, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 2,
         "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
}  # fmt: skip
PAGED = ["llama", "qwen3", "mistral", "phi3", "gemma3"]
"""Families with layers of full attention, the sliding windows of some beside them."""


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A new model; the same name and seed give the same weights."""
    kind, options = FAMILIES[name]
    config = CONFIG_MAPPING[kind](**{**COMMON, **options})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    attn = "eager" if name == "gemma2" else "sdpa"  # transformers has no SDPA for capped logits
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    torch.random.set_rng_state(state)
    calibrate(model, name)
    return model.to(dtype).eval()


@lru_cache(maxsize=64)
def _shared(name: str, dtype: torch.dtype, role: str) -> PreTrainedModel:
    return build(name, dtype=dtype)


def reference(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers runs it ("sdpa"); never to be given to kvfold."""
    return _shared(name, dtype, "reference")


def subject(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights, for kvfold."""
    return _shared(name, dtype, "subject")


def tokens(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths as one left-padded batch: input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        if length:
            ids[row, -length:] = torch.randint(3, VOCAB, (length,), generator=generator)
            mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: Tensor, new: int) -> Tensor:
    """position_ids of the last `new` columns, as `generate` makes them: padding not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]


def dynamic(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache for this model."""
    return DynamicCache(config=model.config)


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """One forward pass over `ids`, the last columns of the text that `mask` covers: their logits."""
    return model(ids, attention_mask=mask, position_ids=positions(mask, ids.shape[1]), past_key_values=cache).logits


def grow(mask: Tensor, columns: int = 1) -> Tensor:
    """The mask with `columns` more tokens in every row."""
    return torch.cat([mask, mask.new_ones(len(mask), columns)], 1)


def greedy(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy decoding by hand: the tokens (B, steps) and the logits (B, steps, V) that they came from."""
    logits = [feed(model, cache, ids, mask)[:, -1:]]
    chosen = [logits[-1].argmax(-1)]
    for _ in range(steps - 1):
        mask = grow(mask)
        logits.append(feed(model, cache, chosen[-1], mask))
        chosen.append(logits[-1].argmax(-1))
    return torch.cat(chosen, 1), torch.cat(logits, 1)


@torch.no_grad()
def follow(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, forced: Tensor) -> Tensor:
    """The logits of a prompt's last token and of `forced` (B, N) fed one by one after it: (B, N + 1, V)."""
    logits = [feed(model, cache, ids, mask)[:, -1:]]
    for column in range(forced.shape[1]):
        mask = grow(mask)
        logits.append(feed(model, cache, forced[:, column : column + 1], mask))
    return torch.cat(logits, 1)
