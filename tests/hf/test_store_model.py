"""A saved cache is read by a model whose keys mean the same: its config, its weights, its adapters."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import kvfold
from models import COMMON, build, feed, subject, tokens

FULL = ["full_attention", "sliding_attention", "full_attention"]
NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def made(kind, **options):
    """A model; the same weights, whatever the options."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**COMMON, **options})).eval()


def saved(model, path):
    cache = kvfold.Cache(model, "snapkv", budget=8)
    feed(model, cache, *tokens(20).values())
    cache.save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "before", "after", "named"),
    [
        ("llama", {"rope_parameters": NTK}, {"max_position_embeddings": 64}, "max_position_embeddings=512"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, {"no_rope_layers": [1, 0, 1]}, r"no_rope_layers=\[1, 1, 0\]"),
        ("granite", {"attention_multiplier": 0.25}, {"attention_multiplier": 0.125}, "attention_multiplier=0.25"),
        ("granite", {}, {"residual_multiplier": 0.5}, "residual_multiplier=1.0"),
        ("granite", {}, {"embedding_multiplier": 2.0}, "embedding_multiplier=1.0"),
        ("llama", {}, {"rms_norm_eps": 1e-2}, "rms_norm_eps=1e-06"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act='silu'"),
        (
            "gemma3_text",
            {"head_dim": 16, "layer_types": FULL},
            {"query_pre_attn_scalar": 16},
            "query_pre_attn_scalar=256",
        ),
        ("phi3", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ],
    ids=lambda given: "" if not isinstance(given, dict) else " ".join(given),
)
def test_a_field_on_which_keys_depend(kind, before, after, named, tmp_path):
    path = saved(made(kind, **before), tmp_path / "c")
    kvfold.Cache.load(path, made(kind, **before))
    with pytest.raises(ValueError, match=f"with .*{named}"):
        kvfold.Cache.load(path, made(kind, **{**before, **after}))


def test_fields_on_which_no_key_depends(tmp_path):
    path = saved(made("llama"), tmp_path / "c")
    other = made("llama", max_position_embeddings=2048, eos_token_id=2, attention_dropout=0.1, use_cache=False)
    other.config.id2label, other.config._name_or_path = {0: "x"}, "elsewhere"
    assert kvfold.Cache.load(path, other).kept_tokens == 8


@pytest.mark.parametrize("name", [name for name, _ in subject("llama-one-layer").named_parameters()])
def test_any_weight(name, tmp_path):
    path = saved(subject("llama-one-layer"), tmp_path / "c")
    other = build("llama-one-layer")
    with torch.no_grad():
        other.get_parameter(name).mul_(1.01)
    with pytest.raises(ValueError, match="with other weights than this one's"):
        kvfold.Cache.load(path, other)


def test_a_weight_in_a_buffer(tmp_path):
    """As packages for quantised layers have them."""
    one, two = build("llama-one-layer"), build("llama-one-layer")
    for value, model in enumerate((one, two)):
        model.model.layers[0].mlp.register_buffer("qweight", torch.full((8, 8), value, dtype=torch.int32))
    path = saved(one, tmp_path / "c")
    kvfold.Cache.load(path, copy.deepcopy(one))
    with pytest.raises(ValueError, match="with other weights"):
        kvfold.Cache.load(path, two)


# -- adapters ------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A linear layer with adapters as PEFT's LoRA layers have them: the parts on which a fingerprint may look."""

    def __init__(self, base_layer, adapters):
        super().__init__()
        size = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.scaling = nn.ModuleDict(), nn.ModuleDict(), {}
        self.active_adapters, self.merged_adapters, self.disable_adapters = [next(iter(adapters))], [], False
        for name, seed in adapters.items():
            torch.manual_seed(seed)
            self.scaling[name] = 2.0
            self.lora_A[name], self.lora_B[name] = nn.Linear(size[0], 4, bias=False), nn.Linear(4, size[1], bias=False)

    def forward(self, x):
        live = [] if self.disable_adapters else self.active_adapters
        return self.base_layer(x) + sum(self.lora_B[a](self.lora_A[a](x)) * self.scaling[a] for a in live)


def adapted(**adapters):
    """A model with adapters by name, each of a seed; the first is on. And its wrapped layers."""
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj = Wrapped(layer.self_attn.v_proj, adapters)
    return model.eval(), [layer.self_attn.v_proj for layer in model.model.layers]


def switch(layers, **state):
    for layer in layers:
        for name, value in state.items():
            setattr(layer, name, value)


def test_an_adapter_is_part_of_the_model(tmp_path):
    model, layers = adapted(a=1, b=2)
    path = saved(model, tmp_path / "c")
    assert kvfold.Cache.load(path, model).kept_tokens == 8
    others = ({"active_adapters": ["b"]}, {"active_adapters": ["a", "b"]}, {"disable_adapters": True})
    for state in (*others, {"scaling": {"a": 1.0, "b": 2.0}}):
        other, layers = adapted(a=1, b=2)
        switch(layers, **state)
        with pytest.raises(ValueError, match="with other weights than this one's, or other adapters"):
            kvfold.Cache.load(path, other)
    with pytest.raises(ValueError, match="or other adapters"):
        kvfold.Cache.load(path, subject("llama"))
    with pytest.raises(ValueError, match="or other adapters"):
        kvfold.Cache.load(path, adapted(a=3)[0])


def test_an_adapter_that_is_off_or_has_another_name_changes_nothing(tmp_path):
    path = saved(adapted(a=1)[0], tmp_path / "c")
    for other in (adapted(a=1, b=2), adapted(default=1)):
        assert kvfold.Cache.load(path, other[0]).kept_tokens == 8
    plain, (model, layers) = saved(build("llama"), tmp_path / "plain"), adapted(a=1)
    with pytest.raises(ValueError, match="or other adapters"):
        kvfold.Cache.load(plain, model)
    switch(layers, disable_adapters=True)
    assert kvfold.Cache.load(plain, model).kept_tokens == 8


def test_an_adapter_that_was_merged(tmp_path):
    """It is in the layers' own weights then, and a model that was unwrapped is the same."""
    model, layers = adapted(a=1)
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.weight += 2.0 * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    path = saved(model, tmp_path / "unmerged")
    switch(layers, merged_adapters=["a"])
    with pytest.raises(ValueError, match="or other adapters"):
        kvfold.Cache.load(path, model)
    for block, layer in zip(model.model.layers, layers, strict=True):
        block.self_attn.v_proj = layer.base_layer
    path = saved(model, tmp_path / "merged")
    for block, layer in zip(model.model.layers, layers, strict=True):
        block.self_attn.v_proj = layer
    assert kvfold.Cache.load(path, model).kept_tokens == 8
