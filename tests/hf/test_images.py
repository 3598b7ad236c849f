"""Which ids stand for images: what configurations call them, in their parts too, and what happens where none does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto import CONFIG_MAPPING

import kvfold
import models
from kvfold.hf.images import image_ids
from models import COMMON, build, pictured, subject

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llava", {"image_token_index": 5}, [5]),
        ("qwen2_vl", {"image_token_id": 5, "video_token_id": 6}, [5, 6]),
        ("video_llava", {"image_token_index": 5, "video_token_index": 6}, [5, 6]),
        ("instructblipvideo", {"video_token_index": 6}, [6]),
        ("molmo2", {"image_patch_id": 5}, [5]),
        ("chameleon", {"vocabulary_map": {"<image>": 5, "a": 1}}, [5]),
        ("qwen2_5_omni", {"thinker_config": {"image_token_index": 5, "video_token_index": 6},
                          "talker_config": {"image_token_index": 5, "video_token_index": 6}}, [5, 6]),
        ("chameleon", {}, []),
        ("llama", {}, []),
    ],
)  # fmt: skip
def test_published_names(kind, options, expected):
    assert image_ids(SimpleNamespace(config=CONFIG_MAPPING[kind](**options))) == expected


def blip(**options):
    """A vision model that, as its first checkpoints, may name no id for its images."""
    config = CONFIG_MAPPING["blip-2"](
        text_config={**COMMON, "model_type": "llama"}, vision_config={**SMALL, "image_size": 8, "patch_size": 2},
        qformer_config={**SMALL, "vocab_size": 97, "encoder_hidden_size": 32}, num_query_tokens=4, **options,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("method", ["look-m", "h2o | look-m"])
def test_a_vision_model_that_names_no_ids_is_refused(method):
    model = blip()
    with pytest.raises(ValueError, match=r"method=.*look-m\(.*must know which tokens are images.*Blip2ForConditional"):
        kvfold.Cache(model, method)
    assert model.config.get_text_config()._attn_implementation != "kvfold"
    kvfold.Cache(model, "h2o")
    kvfold.Cache(blip(image_token_index=5), method)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # gemma3's class for text says that it reads images
@torch.no_grad()
def test_text_models_pass(name):
    cache = kvfold.Cache(subject(name), "look-m")
    subject(name)(**models.tokens(9), past_key_values=cache)
    assert cache.kept_tokens == 9
    kvfold.Cache(subject("llava").model.language_model, "look-m")


@torch.no_grad()
def test_without_full_attention_nobody_asks_for_ids(monkeypatch):
    kind, options = models.VISION["llava"]
    sliding = {"model_type": "mistral", "sliding_window": 8}
    monkeypatch.setitem(models.VISION, "llava-sliding", (kind, {**options, "text_config": sliding}))
    model, prompt = build("llava-sliding"), pictured("llava", (5, 9))
    expected = model(**prompt).logits
    with pytest.warns(UserWarning, match="has no layer with full attention alone .*: look-m"):
        cache = kvfold.Cache(model, "look-m")
    torch.testing.assert_close(model(**prompt, past_key_values=cache).logits, expected)
