"""Wrappers around a model: the cache belongs to the model in them, or they say what to pass."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kvfold
from kvfold.hf.shared_prefill import prefill_many
from models import build, tokens

OPTIONS = {"max_new_tokens": 5, "do_sample": False}


class Tuner(nn.Module):
    """As LoraModel: the model as `model`, everything else looked up in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Adapted(Tuner):
    """As PeftModel: a tuner as `base_model`, and a method that gives the model."""

    def __init__(self, model, kind="LORA"):
        nn.Module.__init__(self)
        self.base_model = Tuner(model)
        self.active_peft_config = SimpleNamespace(peft_type=SimpleNamespace(value=kind))

    def __getattr__(self, name):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_model"), name)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Tuner, Adapted, compiled], ids=["model", "adapter", "compiled"])
def test_a_wrapper_is_the_model_in_it(wrap, tmp_path):
    model, prompt = build("llama"), tokens(30)
    wrapper = wrap(model)
    cache = kvfold.Cache(wrapper, "h2o", budget=0.5)
    assert cache.model is model
    said = wrapper.generate(**prompt, past_key_values=cache, **OPTIONS)
    assert torch.equal(
        said, model.generate(**prompt, past_key_values=kvfold.Cache(model, "h2o", budget=0.5), **OPTIONS)
    )
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", wrapper)
    with torch.no_grad():
        outside = model if wrap is compiled else wrapper  # which would take its time
        logits = [x(said[:, -1:], past_key_values=y).logits for x, y in ((model, cache), (outside, loaded))]
    assert torch.equal(*logits)
    many = [kvfold.Cache(wrapper, method) for method in ("full", "snapkv")]
    prefill_many(wrapper, prompt, many)
    assert many[0].kept_tokens == 30


@pytest.mark.parametrize(
    "wrap,message",
    [
        (nn.DataParallel, r"DataParallel spreads a call .* pass model\.module"),
        (lambda model: Adapted(model, "PREFIX_TUNING"), "prefix tuning"),
        (
            lambda model: nn.Sequential(model),
            "Sequential is not a transformers PreTrainedModel.*pass the PreTrainedModel",
        ),
        (lambda model: Tuner(nn.Linear(2, 2)), "pass the PreTrainedModel"),
    ],
    ids=["parallel", "prefix", "unknown", "no model"],
)
def test_wrappers_that_a_cache_can_not_follow(wrap, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        kvfold.Cache(wrap(model), "full")
    assert model.config._attn_implementation == "sdpa"
