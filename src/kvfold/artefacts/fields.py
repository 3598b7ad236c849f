"""What a model's keys and values mean, as its text config says it: by which files know a model again."""

import json
import re
from typing import Any

ARTEFACT = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "layer_types", "sliding_window", "rope_parameters", "rope_theta",
    "rope_scaling", "partial_rotary_factor",
)  # fmt: skip
"""Which heads there are, and how they tell positions apart. What ships was named by these: a change of them makes all
of it unknown."""
WHERE_SET = ("no_rope_layers", "no_rope_layer_interval", "attention_multiplier", "original_max_position_embeddings")
"""What belongs to those where a config has it."""
LENGTH = "max_position_embeddings"
"""Says something about keys only where a rotation depends on the text's length."""
BLIND = re.compile(
    r"_name_or_path|transformers_version|architectures|auto_map|(torch_)?dtype|quantization_config|use_cache|return_dict"
    r"|output_(attentions|hidden_states|router_logits)|_?(attn|experts)_implementation.*|chunk_size_feed_forward|id2label|label2id|problem_type|tie_word_embeddings|pretraining_tp|.*_token_id"
    r"|.*initializer_(range|factor)|init_std|.*drop(out)?(_prob|_p)?|.*layerdrop|.*_coef|max_position_embeddings"
)
"""Fields on which no key depends, or which `dtype` and the weights tell better. All others count, new ones too."""


def text_config(model: Any) -> Any:
    """The part of a model's config that describes the text decoder."""
    return model.config.get_text_config(decoder=True)


def rotates_by_length(config: Any) -> bool:
    """Whether a text config has a RoPE whose angles depend on how long the text is: dynamic NTK, longrope."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [part.get("rope_type", part.get("type")) for part in (said, *said.values()) if isinstance(part, dict)]
    return any(kind is not None and turns_by_length(kind) for kind in kinds)


def turns_by_length(kind: str) -> bool:
    """Whether a kind of RoPE (`rope_type`) is one of those."""
    return "dynamic" in kind or kind == "longrope"


def artefact_fields(model: Any) -> dict[str, Any]:
    """What an artefact's model must have in common with the one that uses it; fine-tunes of a model do."""
    config = text_config(model)
    fields = {name: getattr(config, name, None) for name in ARTEFACT}
    more = (*WHERE_SET, LENGTH) if rotates_by_length(config) else WHERE_SET
    return fields | {name: found for name in more if (found := getattr(config, name, None)) is not None}


def cache_fields(model: Any) -> dict[str, Any]:
    """What a cache's model must have in common with the one that reads it, as JSON has it: all but `BLIND` fields."""
    config = text_config(model)
    fields = {name: value for name, value in config.to_dict().items() if not BLIND.fullmatch(name)}
    if rotates_by_length(config):
        fields[LENGTH] = getattr(config, LENGTH, None)
    plain: dict[str, Any] = json.loads(json.dumps(fields | {"dtype": str(model.dtype)}, sort_keys=True, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
