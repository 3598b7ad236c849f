"""Which channels of a layer's keys turn, and how: as each model's own keys say."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto import CONFIG_MAPPING

import kvfold
from kvfold.hf.anatomy import text_decoder
from kvfold.hf.rope import ModelRope, find_ropes
from kvfold.rotation import Still
from kvfold.scores.expected import future_queries
from models import COMMON, build, dynamic, feed, follow, grow, tokens

FULL = ["full_attention"] * 3
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
KINDS = {
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "layer_types": FULL}, {0: (0, 16), 1: None, 2: (0, 16)}),
    "smollm3-none": ("smollm3", {"no_rope_layers": [0, 0, 0], "layer_types": FULL}, dict.fromkeys(range(3))),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": SLIDING, "sliding_window": 8}, {1: None, 3: None}),
    "exaone4": (
        "exaone4", {"num_hidden_layers": 4, "layer_types": SLIDING, "sliding_window": 8}, {1: None, 3: None},
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}, dict.fromkeys(range(3), (0, 8))),
    "persimmon": ("persimmon", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
                  dict.fromkeys(range(3), (0, 8))),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}, dict.fromkeys(range(3), (0, 4))),
    "gpt_neox": ("gpt_neox", {}, dict.fromkeys(range(3), (0, 4))),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}, dict.fromkeys(range(3), (0, 8))),
    "glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}, dict.fromkeys(range(3), (0, 8))),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 512},
             dict.fromkeys(range(3), (0, 8))),
    "cohere": ("cohere", {}, dict.fromkeys(range(3), (0, 16))),  # neighbours turn together
    "qwen3-next": ("qwen3-next", None, {1: (0, 4), 3: (0, 4)}),  # beside recurrent states
    "gemma3": ("gemma3", None, {1: (0, 16), 3: (0, 16)}),  # two bases
    "yarn": ("yarn", None, dict.fromkeys(range(3), (0, 16))),
    "llama": ("llama", None, dict.fromkeys(range(3), (0, 16))),
}  # fmt: skip
"""Family, options (None: one of all tests' families), and the channels that turn in each layer on pages."""
STEPS = torch.arange(5, 25).view(2, 10)


def made(name, dtype=torch.float32, **more):
    kind, options, _ = KINDS[name]
    if options is None:
        return build(kind, dtype=dtype)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**COMMON, **options, **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


def channels(model):
    """What is known of each layer: the channels that turn, or None where none does."""
    return {layer: None if rope == Still() else rope.channels for layer, rope in find_ropes(model).items()}


@torch.no_grad()
def keys_at(model, *places):
    """The keys of one token, alone, at each of these positions: by layer."""
    cache = DynamicCache(config=model.config)
    ids, at = torch.full((len(places), 1), 11), torch.tensor(places)[:, None]
    text_decoder(model)(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    return {i: layer.keys for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_channels_that_turn(name, dtype):
    found = channels(made(name, dtype))
    assert {layer: found[layer] for layer in KINDS[name][2]} == KINDS[name][2]


def test_channels_that_are_zero_say_nothing():
    """As some are in trained models, where a norm's weight is zero."""
    whole, part = build("qwen3"), made("phi")
    with torch.no_grad():
        whole.model.layers[1].self_attn.k_norm.weight[[0, 7, 15]] = 0
        whole.model.layers[2].self_attn.k_norm.weight[:] = 0
        for channel in (0, 7, 8, 15):
            part.model.layers[0].self_attn.k_proj.weight[channel::16] = 0
    assert channels(whole) == {0: (0, 16), 1: (0, 16), 2: None}
    assert channels(part) == dict.fromkeys(range(3), (0, 8))


@pytest.mark.parametrize("name", KINDS)
def test_a_key_that_is_moved_is_the_models_own_there(name):
    model = made(name)
    ropes, held = find_ropes(model), keys_at(model, 0, 2, 17, 40)
    for layer, keys in held.items():
        for start, stop in ((0, 3), (1, 2), (3, 0), (2, 1)):
            steps = torch.full((1, keys.shape[1], 1), [0, 2, 17, 40][stop] - [0, 2, 17, 40][start])
            moved = ropes[layer].shift(keys[start : start + 1], steps)
            torch.testing.assert_close(moved, keys[stop : stop + 1], atol=1e-4, rtol=0)
    assert held.keys() == KINDS[name][2].keys()


def test_layers_whose_rotation_is_not_known():
    """Angles by the text's length; a norm behind the rotation. What does not turn is known all the same."""
    assert channels(made("smollm3", rope_parameters=NTK)) == {1: None}
    config = CONFIG_MAPPING["hunyuan_v1_dense"](**COMMON, head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert channels(model) == dict.fromkeys(range(3), (0, 16))
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.key_layernorm.weight[:4] = 3.0
    assert channels(model) == dict.fromkeys((0, 2), (0, 16))
    with pytest.raises(ValueError, match=r"needs RoPE with fixed angles .* none that it could use in layer 1"):
        kvfold.Cache(model, "streamingllm", budget=8, positions="compact")


# -- what moves keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["streamingllm", "lacache"])
def test_compact_positions_where_nothing_goes(name, method):
    prompt, model, plain = tokens(30, 12), made(name), made(name)
    want = follow(plain, dynamic(plain), *prompt.values(), STEPS)
    cache = kvfold.Cache(model, method, budget=200, positions="compact")
    got = follow(model, cache, *prompt.values(), STEPS)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["smollm3", "smollm3-none", "phi", "stablelm", "persimmon"])
def test_compact_positions_are_those_of_the_text_that_is_left(name):
    """With one layer: as if what was dropped had never been."""
    more = {"num_hidden_layers": 1, "no_rope_layers": [0], "layer_types": FULL[:1]} if "smol" in name else {}
    model, logits = made(name, **{"num_hidden_layers": 1, **more}), []
    for middle in (0, 25):
        ends, between = tokens(7)["input_ids"], tokens(25, seed=1)["input_ids"][:, :middle]
        ids = torch.cat([ends[:, :2], between, ends[:, 2:]], 1)
        cache = kvfold.Cache(model, "streamingllm", budget=7, sinks=2, positions="compact")
        feed(model, cache, ids, torch.ones_like(ids))
        logits.append(follow(model, cache, torch.tensor([[9]]), grow(torch.ones_like(ids)), STEPS[:1]))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["kvmerger", "ems", "chelsea"])
def test_frames_are_one_where_nothing_turns(method):
    model, prompt, found = made("smollm3-none"), tokens(40, 31), []
    for frame in ("rotated", "unrotated"):
        cache = kvfold.Cache(model, method, budget=12, frame=frame)
        found.append(follow(model, cache, *prompt.values(), STEPS))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["kvmerger", "ems", "chelsea", "expected-attention"])
@pytest.mark.parametrize("name", ["smollm3", "phi", "persimmon", "stablelm", "cohere2"])
def test_methods_that_turn_keys_where_not_all_do(name, method):
    model = made(name)
    frame = {} if method == "expected-attention" else {"frame": "unrotated"}
    cache = kvfold.Cache(model, method, budget=12, **frame)
    got = follow(model, cache, *tokens(40, 31).values(), STEPS)
    assert got.isfinite().all() and 0 < cache.kept_tokens <= 24


@pytest.mark.parametrize("name", ["smollm3", "phi", "cohere2"])
def test_queries_expected_are_turned_as_the_layer_turns(name):
    """Of channels that don't turn the mean is that of the prompt's queries, and so is the covariance."""
    model, views = made(name), []
    cache = kvfold.Cache(model)
    with cache.observed(views.append):
        feed(model, cache, *tokens(30).values())
    for view in views:
        turning = KINDS[name][2][view.place.layer]
        still = [c for c in range(16) if turning is None or not turning[0] <= c < turning[1]]
        mean, covariance = future_queries(view, 64, 4)
        states = view.queries.states[:, :, 4:].float()
        plain = states.mean(2).view(mean.shape)
        torch.testing.assert_close(mean[..., still], plain[..., still], atol=1e-4, rtol=0)
        spread = torch.einsum("bhqd,bhqe->bhde", states, states) / states.shape[2]
        spread = spread - torch.einsum("bhd,bhe->bhde", states.mean(2), states.mean(2))
        got, want = covariance.flatten(1, 2)[..., still, :][..., still], spread[..., still, :][..., still]
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
        if turning is not None:
            assert (mean - plain)[..., turning[0] : turning[1]].abs().max() > 0.05


def test_layers_that_turn_share_with_none_that_do_not():
    model = made("smollm3")
    cache = kvfold.Cache(model)
    feed(model, cache, *tokens(20).values())
    one, two, three = cache.paged
    assert one.alike(three) and not one.alike(two) and not two.alike(three)


# -- the look at a model -------------------------------------------------------------------------------------


def test_a_model_is_looked_at_once_and_left_as_it_was():
    model, passes = made("phi"), []
    model.train()
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    state = torch.random.get_rng_state()
    ropes = [find_ropes(model), find_ropes(model.model), find_ropes(model)]
    handle.remove()
    assert len(passes) == 1 and all(found is ropes[0] for found in ropes)
    assert all(module.training for module in model.modules()) and torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())


def test_a_model_that_can_not_be_looked_at(caplog):
    """It works as ever, but for methods that move tokens."""
    model = made("phi")

    def alone(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 and kwargs["input_ids"].shape[0] > 2:
            raise RuntimeError("not a token alone")

    model.model.register_forward_pre_hook(alone, with_kwargs=True)
    with caplog.at_level(logging.WARNING, "kvfold"):
        kvfold.Cache(model)
        assert feed(model, kvfold.Cache(model, "snapkv", budget=8), *tokens(20).values()).isfinite().all()
    said = "which keys of PhiForCausalLM turn is not known: RuntimeError: not a token alone"
    assert [record.message for record in caplog.records] == [said]  # once, however often it is tried
    with pytest.raises(ValueError, match="needs RoPE with fixed angles"):
        kvfold.Cache(model, "streamingllm", budget=8, positions="compact")


def test_models_without_a_rotary_module_and_without_weights():
    assert find_ropes(build("gpt2")) == {}
    assert find_ropes(copy.deepcopy(made("llama")).to("meta")) == {}
    assert isinstance(find_ropes(made("llama"))[0], ModelRope)


@pytest.mark.parametrize("name", KINDS)
def test_pairs_of_channels_turn_as_the_model_turns_them(name):
    """Kernels turn keys of every family here as its own code does, partly, by neighbours or with a scale beside."""
    for rope in find_ropes(made(name)).values():
        if rope == Still():
            continue
        assert rope.pairs.neighbours == (name in ("cohere", "cohere2", "glm"))
        x, steps = torch.randn(2, 2, 9, max(16, rope.channels[1])), torch.randint(-3000, 3000, (2, 2, 9))
        torch.testing.assert_close(rope.shift(x, steps), rope._by_model(x, steps), atol=2e-6, rtol=0)
        assert torch.equal(rope.shift(x, steps)[..., rope.channels[1] :], x[..., rope.channels[1] :])


def test_pairs_follow_the_module_and_gradients_do_not_go_by_them():
    """A module that was changed since, or rounded, turns as it does now; gradients go through its own code."""
    rope, x, steps = find_ropes(build("llama"))[0], torch.randn(2, 2, 3, 16), torch.full((2, 2, 3), 900)
    asked: list[object] = []
    rope.rotary.register_forward_hook(lambda *given: asked.append(given))
    with torch.inference_mode():
        first = rope.shift(x, steps)
    assert torch.equal(rope.shift(x, steps), first) and not asked
    y = x.clone().requires_grad_()
    rope.shift(y, steps).sum().backward()
    assert y.grad.abs().sum() > 0 and len(asked) == 1
    with torch.no_grad():
        rope.rotary.inv_freq.mul_(0.5)
    half = rope.shift(x, steps)
    torch.testing.assert_close(half, rope._by_model(x, steps), atol=2e-6, rtol=0)
    assert not torch.allclose(half, first, atol=1e-2)
    rope.rotary.inv_freq.mul_(2.0)
    torch.testing.assert_close(rope.shift(x, steps), first, atol=0, rtol=0)
    rope.rotary.to(torch.bfloat16)
    torch.testing.assert_close(rope.shift(x, steps), rope._by_model(x, steps), atol=2e-6, rtol=0)
    assert not torch.allclose(rope.shift(x, steps), first, atol=1e-3)


def test_a_rotation_of_another_kind_is_the_models_own(monkeypatch):
    """What does not turn by pairs as its angles say is turned by the model's code alone."""
    rope, x, steps = find_ropes(made("llama"))[0], torch.randn(1, 2, 3, 16), torch.full((1, 2, 3), 7)
    plain = rope.rotary.forward
    rope.rotary.inv_freq.mul_(1.0)  # what was known is looked at anew
    monkeypatch.setattr(rope.rotary, "forward", lambda x, position_ids: plain(x, position_ids.flip(-1) * 2))
    assert rope.pairs is None
    torch.testing.assert_close(rope.shift(x, steps), rope._by_model(x, steps), atol=0, rtol=0)
