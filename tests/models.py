"""Tiny random models, seeded: one family for each way in which attention differs."""

import gc
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from calibrated import calibrate
from kvfold.testing import VOCAB, feed, grow
from kvfold.testing import follow as follow
from kvfold.testing import positions as positions
from kvfold.testing import tokens as tokens

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
IMAGE, VIDEO = 96, 95
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "llava",
        {"text_config": {"model_type": "llama"}, "image_token_index": IMAGE, "image_seq_length": 16,
         "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                           "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}},
    ),
    "qwen2-vl": (
        "qwen2_vl",
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                             "mrope_section": [2, 3, 3]}},
         "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93,
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}},
    ),
}  # fmt: skip
"""Models that read images of 8 by 8 pixels (16 tokens each); the second gives them places in a grid (M-RoPE)."""
PAGED = ["llama", "qwen3", "mistral", "phi3", "gemma3"]
"""Families with layers of full attention, the sliding windows of some beside them."""


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changed: Any) -> PreTrainedModel:
    """A new model, its configuration `changed`; the same name and seed give the same weights."""
    kind, options = {**FAMILIES, **VISION}[name]
    common: dict[str, Any] = {} if name in VISION else COMMON
    if name in VISION:
        options = {**options, "text_config": {**COMMON, **options["text_config"]}}
    config = CONFIG_MAPPING[kind](**{**common, **options, **changed})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    attn = "eager" if name == "gemma2" else "sdpa"  # transformers has no SDPA for capped logits
    auto = AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attn, dtype=torch.float32)
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


def pictured(name: str, *rows: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Prompts with images as a left-padded batch: a row is texts of these lengths, with an image between each two."""
    generator = torch.Generator().manual_seed(seed)
    texts = [[torch.randint(3, 90, (n,), generator=generator) for n in row] for row in rows]
    image = torch.full((16,), IMAGE)
    if name == "qwen2-vl":
        image = torch.cat([torch.tensor([94]), image, torch.tensor([93])])
    joined = [torch.cat([x for text in row for x in (image, text)][1:]) for row in texts]
    width, count = max(map(len, joined)), sum(len(row) - 1 for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in joined])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in joined]).long()
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "qwen2-vl":
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    if not count:
        return given
    if name == "qwen2-vl":
        pixels = torch.randn(count * 16 * 4, 3 * 2 * 2 * 2, generator=generator)  # by patches of 2 by 2, 2 frames
        return {**given, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]] * count)}
    return {**given, "pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}


def dynamic(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache for this model."""
    return DynamicCache(config=model.config)


def greedy(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy decoding by hand: the tokens (B, steps) and the logits (B, steps, V) that they came from."""
    logits = [feed(model, cache, ids, mask)[:, -1:]]
    chosen = [logits[-1].argmax(-1)]
    for _ in range(steps - 1):
        mask = grow(mask)
        logits.append(feed(model, cache, chosen[-1], mask))
        chosen.append(logits[-1].argmax(-1))
    return torch.cat(chosen, 1), torch.cat(logits, 1)


@contextmanager
def without_collection():
    """Circles are not looked for within the block: what goes there goes with its last name."""
    gc.collect()  # what others left
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
