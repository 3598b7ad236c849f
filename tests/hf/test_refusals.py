"""Bad input gets an error that names the argument, its value and what is allowed, and changes nothing."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import kvfold
from kvfold.hf.argument import cache_in, name_of
from models import COMMON, build, feed, follow, grow, subject, tokens

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(model, message: str, *args, **kwargs) -> None:
    """The cache can't be made, the error says `message`, and the model is as it was."""
    before = model.config._attn_implementation
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with pytest.raises(ValueError, match=message):
        kvfold.Cache(model, *args, **kwargs)
    assert model.config._attn_implementation == before
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


# -- methods and options -------------------------------------------------------------------------------------


def test_unknown_method():
    refused(build("llama"), r"method='snapvk' is unknown \(did you mean 'snapkv'\?\); there are .*full.*h2o", "snapvk")
    refused(build("llama"), r"method=7 must be a slug", 7)
    refused(build("llama"), r"method='snapkv\(0.5\)': can't read .*options are given by name", "snapkv(0.5)")
    refused(build("llama"), r"method='' is not of the form", "snapkv | ")


def test_unknown_option():
    message = r"snapkv has no option windows=4; its options are: budget, window, kernel, pool"
    refused(build("llama"), message, "snapkv", windows=4)
    refused(build("llama"), message, "snapkv(windows=4)")
    refused(build("llama"), r"full has no option budget=0.5; its options are: none", "full", budget=0.5)
    refused(build("llama"), r"option 'budget' is given twice for h2o", "h2o(budget=0.5)", budget=0.4)
    refused(build("llama"), r"\['budget'\] belong inside the text", "h2o | tova", budget=0.4)
    refused(build("llama"), r"\['budget'\] must be given to Full", kvfold.parse("full"), budget=0.4)


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -3, -0.5, True, "x", None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("slug", [info.slug for info in kvfold.list_methods() if "budget" in info.options])
def test_bad_budgets(slug, budget):
    message = rf"budget={budget!r} must be a fraction of the prompt \(float in \(0, 1\]\) or tokens"
    refused(build("llama-one-layer"), message, slug, budget=budget)


@pytest.mark.parametrize(
    ("slug", "options", "message"),
    [
        ("snapkv", {"window": 0}, r"window=0 must be an int >= 1"),
        ("snapkv", {"kernel": 4}, r"kernel=4 must be an odd int >= 1"),
        ("snapkv", {"pool": "mean"}, r"pool='mean' must be one of 'avg', 'max'"),
        ("h2o", {"recent": 1.5}, r"recent=1.5 must be a number in \[0.0, 1.0\]"),
        ("streamingllm", {"sinks": -1}, r"sinks=-1 must be an int >= 0"),
        ("streamingllm", {"positions": "new"}, r"positions='new' must be one of 'original', 'compact'"),
        ("kvmerger", {"mass": "none"}, r"mass='none' must be one of"),
        ("kvmerger", {"heavy": float("nan")}, r"heavy=nan must be a number in"),
        ("kvmerger", {"bandwidth": "wide"}, r"bandwidth='wide' must be one of"),
    ],
)
def test_bad_options(slug, options, message):
    refused(build("llama-one-layer"), message, slug, **options)


# -- models --------------------------------------------------------------------------------------------------


def test_not_a_model():
    for value in (None, "llama", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"model=\w+ is not a transformers PreTrainedModel"):
            kvfold.Cache(value)


def test_encoder_decoder():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    refused(model, "T5ForConditionalGeneration is an encoder-decoder; kvfold caches serve decoder-only models")


def test_attention_to_an_encoder():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True)
    refused(GPT2LMHeadModel(config), r"GPT2LMHeadModel attends to an encoder \(add_cross_attention\)")


def test_logit_softcap():
    refused(build("gemma2"), r"Gemma2ForCausalLM caps its logits \(attn_logit_softcapping\)")


def test_shared_layers():
    model = build("llama")
    model.config.num_kv_shared_layers = 1
    refused(model, "LlamaForCausalLM shares keys and values between layers")


@pytest.mark.parametrize("name", ["gpt2", "ntk"])
def test_compact_positions_need_fixed_rope(name):
    model = build(name)
    message = rf"method=streamingllm\(.*positions='compact'\) needs RoPE with fixed angles.* {type(model).__name__}"
    refused(model, message, "streamingllm", positions="compact")
    kvfold.Cache(model, "streamingllm")  # original positions are no problem
    assert model.config._attn_implementation == "kvfold"


def test_compact_twice():
    with pytest.raises(ValueError, match="two stages with compact positions"):
        kvfold.parse("streamingllm(positions='compact') | streamingllm(positions='compact')")


@pytest.mark.parametrize("changed", ["ignored", "copied"])
def test_attention_that_ignores_the_interface(changed):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    real = type(attention).forward

    def ignore(hidden_states, **kwargs):
        keys = hidden_states.new_zeros(*hidden_states.shape[:1], 2, hidden_states.shape[1], 16)
        cache_in(kwargs).update(keys, keys, 1)
        return hidden_states, None

    def copy(hidden_states, **kwargs):
        held = cache_in(kwargs)

        class Copying:
            def update(self, *args, **more):
                keys, values = held.update(*args, **more)
                return keys * 1.0, values

        return real(attention, hidden_states=hidden_states, **{**kwargs, name_of(real): Copying()})

    attention.forward = ignore if changed == "ignored" else copy
    cache = kvfold.Cache(model)
    with pytest.raises(RuntimeError, match=r'layer 1 of LlamaForCausalLM .* "kvfold".*AttentionInterface'):
        feed(model, cache, *tokens(8).values())


def test_an_attention_that_was_set_anew_meanwhile():
    """Someone looks at weights, say, which "eager" alone gives."""
    model, prompt, steps = build("llama"), tokens(10), torch.tensor([[5, 6]])
    want, cache = follow(model, kvfold.Cache(model, "full"), *prompt.values(), steps), kvfold.Cache(model, "full")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"was set to 'eager' .* set_attn_implementation\('kvfold'\) sets it back"):
        follow(model, cache, *prompt.values(), steps)
    model.set_attn_implementation("kvfold")
    assert torch.equal(follow(model, cache, *prompt.values(), steps), want)


def test_what_is_no_arena(unchecked):
    with pytest.raises(ValueError, match=r"arena=5 must be a kvfold\.Arena"):
        kvfold.Cache(subject("llama"), "full", arena=5)


def test_the_last_layer_ignores_the_interface():
    model = build("llama-one-layer")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **kwargs: (
        cache_in(kwargs).update(hidden_states[:, None], hidden_states[:, None], 0)[1][:, 0], None
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="layer 0 of LlamaForCausalLM updated the cache"):
        feed(model, kvfold.Cache(model), *tokens(8).values())


def test_attention_with_the_keys_of_one_update_twice():
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**COMMON)).eval()
    refused(model, "DiffLlamaAttention of DiffLlamaForCausalLM attends twice with the keys of one update")


def test_attention_with_the_keys_of_one_update_twice_that_no_source_tells():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attend = type(attention).forward

    def twice(hidden_states, **kwargs):
        held, made = cache_in(kwargs), {}

        class Once:
            def update(self, *args, **more):
                if not made:
                    made["states"] = held.update(*args, **more)
                return made["states"]

        kwargs[name_of(attend)] = Once()
        attend(attention, hidden_states=hidden_states, **kwargs)
        return attend(attention, hidden_states=hidden_states, **kwargs)

    attention.forward = twice
    with pytest.raises(ValueError, match="LlamaAttention attends twice with the keys of one update"):
        feed(model, kvfold.Cache(model), *tokens(8).values())


# -- calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_four_dimensional_mask(dtype):
    model, cache = subject("llama"), kvfold.Cache(subject("llama"))
    mask = torch.ones(1, 1, 8, 8).tril().to(dtype)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 8, 8\) in LlamaAttention: .*\(B, T\)"):
        model(tokens(8)["input_ids"], attention_mask=mask, past_key_values=cache)
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


def test_mask_of_the_wrong_length():
    prompt = tokens(8, 5)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\).* \(B, 8\)"):
        model(prompt["input_ids"], attention_mask=prompt["attention_mask"][:, :5], past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_training_dropout():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    cache = kvfold.Cache(model)
    model.train()
    with pytest.raises(ValueError, match=r"dropout=0.1 in LlamaAttention: .*model.eval\(\)"):
        feed(model, cache, *tokens(8).values())
    assert cache.nbytes == 0
    model.eval()
    cache.reset()
    feed(model, cache, *tokens(8).values())


def test_another_batch_size():
    prompt = tokens(8, 5)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"))
    feed(model, cache, *prompt.values())
    kept, nbytes = cache.kept(0), cache.nbytes
    with pytest.raises(ValueError, match="the batch has 3 rows, but the cache holds 2"):
        feed(model, cache, torch.ones(3, 1, dtype=torch.long), torch.ones(3, 9, dtype=torch.long))
    assert cache.kept(0) == kept and cache.nbytes == nbytes and cache.get_seq_length() == 8
    # The error leaves the cache usable.
    mask = grow(prompt["attention_mask"])
    got = feed(model, cache, torch.ones(2, 1, dtype=torch.long), mask)
    fresh = kvfold.Cache(model)
    feed(model, fresh, *prompt.values())
    assert torch.equal(got, feed(model, fresh, torch.ones(2, 1, dtype=torch.long), mask))


def test_keys_of_another_kind():
    assert subject("qwen3-next").config._attn_implementation in ("sdpa", "kvfold")
    with pytest.raises(ValueError, match=r"layer=-1 is not one of the layers with full attention: \[0, 1, 2\]"):
        kvfold.Cache(subject("llama")).kept(-1)


def test_adopting_twice():
    model, views = subject("llama"), []
    cache = kvfold.Cache(model)
    with cache.observed(views.append):
        feed(model, cache, *tokens(8).values())
    with pytest.raises(ValueError, match="layer 0 has read 8 tokens; only an empty cache can adopt"):
        cache.adopt(views[0])


def test_loading_what_does_not_fit(tmp_path):
    model, cache = subject("llama"), kvfold.Cache(subject("llama"))
    feed(model, cache, *tokens(8).values())
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    message = r"holds a cache of a LlamaForCausalLM with 3 layers; model is a Qwen3ForCausalLM with 3"
    with pytest.raises(ValueError, match=message):
        kvfold.Cache.load(path, subject("qwen3"))
    other = AutoModelForCausalLM.from_config(build("llama-one-layer").config)
    with pytest.raises(ValueError, match="with 3 layers; model is a LlamaForCausalLM with 1"):
        kvfold.Cache.load(path, other)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors' is not a kvfold cache"):
        kvfold.Cache.load(tmp_path / "other.safetensors", model)
