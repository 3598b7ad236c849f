"""What a model's keys and values mean: the fields of its text config by which a file knows the model again."""

from typing import Any, Literal

Use = Literal["artefact", "cache"]
_BOTH: frozenset[Use] = frozenset({"artefact", "cache"})
_CACHE: frozenset[Use] = frozenset({"cache"})

FIELDS: dict[str, frozenset[Use]] = {
    # which heads there are, and how they tell positions apart
    "model_type": _BOTH, "vocab_size": _BOTH, "hidden_size": _BOTH, "intermediate_size": _BOTH,
    "num_hidden_layers": _BOTH, "num_attention_heads": _BOTH, "num_key_value_heads": _BOTH, "head_dim": _BOTH,
    "layer_types": _BOTH, "sliding_window": _BOTH, "rope_parameters": _BOTH, "rope_theta": _BOTH,
    "rope_scaling": _BOTH, "partial_rotary_factor": _BOTH,
    # what else their numbers depend on
    "hidden_act": _CACHE, "kv_lora_rank": _CACHE, "qk_rope_head_dim": _CACHE, "v_head_dim": _CACHE,
}  # fmt: skip
"""Which files look at a field: a calibrated artefact, a saved cache. What ships was named by the artefacts' fields: a
change of those makes all of it unknown."""


def text_config(model: Any) -> Any:
    """The part of a model's config that describes the text decoder."""
    return model.config.get_text_config(decoder=True)


def fields_for(use: Use, model: Any) -> dict[str, Any]:
    """The fields of a model's text config that files of one kind look at, by name; None where there is none."""
    config = text_config(model)
    return {name: getattr(config, name, None) for name, uses in FIELDS.items() if use in uses}
