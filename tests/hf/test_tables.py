"""Rotations whose angles depend on the length of what is read: in chunks as at once, and untouched by side passes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvfold
from kvfold.conversations.topics import OwnStates
from kvfold.evaluation.decoding import prefill
from kvfold.hf.tables import by_length, kept_tables
from kvfold.methods.registry import parse
from models import COMMON, FAMILIES, build, dynamic, feed, follow, grow, tokens

NTK = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0,
        "original_max_position_embeddings": 64}  # fmt: skip
KINDS = {
    "ntk": ("llama", {"max_position_embeddings": 64, "rope_parameters": NTK}),
    "internlm3": ("internlm3", {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": NTK}),
    "longrope": ("phi3", {"original_max_position_embeddings": 64, "sliding_window": None, "rope_parameters": LONG}),
    "by-layer": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "max_position_embeddings": 64,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": NTK, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    ),
}  # fmt: skip
STEPS = torch.randint(5, 90, (2, 5), generator=torch.Generator().manual_seed(3))


def made(name):
    """A new one each time: its angles are those of nothing read."""
    kind, options = KINDS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **options})).eval()


def state(model):
    """All that the rotations of a model hold."""
    found = {}
    for number, rotary in enumerate(by_length(model)):
        held = {**vars(rotary), **dict(rotary.named_buffers())}
        names = [name for name in held if name.endswith(("inv_freq", "max_seq_len_cached", "attention_scaling"))]
        found |= {(number, name): torch.as_tensor(held[name]).clone() for name in names}
    return found


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one.keys() & two.keys())


@pytest.mark.parametrize("lengths", [(150, 97), (60, 33)], ids=["long", "short"])
@pytest.mark.parametrize("name", KINDS)
def test_chunks_turn_as_one_pass_does(name, lengths):
    prompt = tokens(*lengths)
    plain = made(name)
    want = follow(plain, dynamic(plain), *prompt.values(), STEPS)
    for chunk in (16, 50, 149):
        model = made(name)
        got = follow(model, kvfold.Cache(model, "full", prefill_chunk=chunk), *prompt.values(), STEPS)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
        assert same(state(model), state(plain))


@pytest.mark.parametrize("name", KINDS)
def test_a_further_turn_in_chunks_that_goes_beyond(name):
    first, second = tokens(40)["input_ids"], tokens(70, seed=1)["input_ids"]
    want, got, plain, model = [], [], made(name), made(name)
    theirs, ours = dynamic(plain), kvfold.Cache(model, "full", prefill_chunk=16)
    for turn, mask in ((first, torch.ones_like(first)), (second, torch.ones(1, 110, dtype=torch.long))):
        want.append(feed(plain, theirs, turn, mask))
        got.append(feed(model, ours, turn, mask))
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_without_positions_and_by_generate(name):
    ids = tokens(100)["input_ids"]
    plain, model, other = made(name), made(name), made(name)
    with torch.no_grad():
        want = plain(ids).logits
        got = model(ids, past_key_values=kvfold.Cache(model, prefill_chunk=30)).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    said = other.generate(ids, past_key_values=kvfold.Cache(other, prefill_chunk=30), **options)
    assert torch.equal(said, made(name).generate(ids, **options))


@pytest.mark.parametrize("name", KINDS)
def test_the_commands_chunks_too(name):
    """`kvfold run --prefill-chunk` cuts by itself; a cache that cuts, too, does no harm."""
    ids, plain = tokens(100)["input_ids"], made(name)
    with torch.no_grad():
        want = plain(ids).logits[0, -1]
    for own in (None, 12):
        model = made(name)
        read = prefill(model, ids, kvfold.Cache(model, prefill_chunk=own), 30)
        torch.testing.assert_close(read.logits, want, atol=2e-4, rtol=0)
        assert same(state(model), state(plain))


def test_a_chunk_that_fails_leaves_no_hook():
    model = made("ntk")
    cache = kvfold.Cache(model, prefill_chunk=16)
    hooks = [(len(r._forward_hooks), len(r._forward_pre_hooks)) for r in by_length(model)]

    def fail(module, args):
        raise RuntimeError("broken")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        feed(model, cache, *tokens(80).values())
    handle.remove()
    assert hooks == [(len(r._forward_hooks), len(r._forward_pre_hooks)) for r in by_length(model)] == [(0, 0)]
    cache.reset()
    want = feed(made("ntk"), None, *tokens(80).values())
    torch.testing.assert_close(feed(model, cache, *tokens(80).values()), want, atol=2e-4, rtol=0)


def test_a_last_chunk_that_ends_before_the_text_does_is_refused():
    """By the positions that were given: its table would be that of a shorter text."""
    model, ids = made("longrope"), tokens(80)["input_ids"]
    cache = kvfold.Cache(model, prefill_chunk=30)
    places = torch.arange(80)[None].clone()
    places[:, 60:] = 0
    message = "turns by the text's length, and the last chunk ends at position 0, before 59"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(ids, position_ids=places, past_key_values=cache)
    assert cache.get_seq_length() == 0


# -- side passes ---------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """A family whose angles grow from 64 positions on, by name, with what methods want measured."""
    monkeypatch.setitem(FAMILIES, "ntk-short", KINDS["ntk"])
    return "ntk-short"


READS_AT_ONCE = [
    info.slug for info in kvfold.list_methods()
    if "budget" in info.options and not parse(f"{info.slug}(budget=24)").listens("read_order")
    and info.slug not in ("a2ats", "infllm", "tokenselect")  # which turn keys, and refuse angles that change
]  # fmt: skip


@pytest.mark.parametrize("method", [*READS_AT_ONCE, "kvfold(quality='best')", "kvfold(heads='probed')"])
def test_a_method_leaves_the_angles_of_the_prompt(method, short):
    prompt, plain, model = tokens(90, 71), build(short), build(short)
    feed(plain, dynamic(plain), *prompt.values())
    text = f"{method}(budget=24)" if "(" not in method else method.replace("(", "(budget=24, ")
    feed(model, kvfold.Cache(model, text), *prompt.values())
    assert same(state(model), state(plain))


@pytest.mark.parametrize("method", ["kvzip", "speckv", "kvfold(quality='best')"])
@pytest.mark.parametrize("name", KINDS)
def test_what_drops_nothing_is_full(name, method):
    prompt, plain, model = tokens(90), made(name), made(name)
    text = f"{method}(budget=1000)" if "(" not in method else method.replace("(", "(budget=1000, ")
    want = follow(plain, dynamic(plain), *prompt.values(), STEPS[:1])
    got = follow(model, kvfold.Cache(model, text), *prompt.values(), STEPS[:1])
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_draft_or_a_probe_between_two_steps(name):
    """A second cache of the same model is made, whose method looks at it, while the first is in use."""
    prompt, plain, model = tokens(90), made(name), made(name)
    cache, theirs = kvfold.Cache(model), dynamic(plain)
    for owner, held in ((model, cache), (plain, theirs)):
        feed(owner, held, *prompt.values())
    before = state(model)
    kvfold.Cache(model, "kvfold(heads='probed')")
    assert same(state(model), before)
    with cache.tentative():
        feed(model, cache, tokens(70, seed=2)["input_ids"], grow(prompt["attention_mask"], 70))
    assert same(state(model), before)
    step, mask = torch.tensor([[7]]), grow(prompt["attention_mask"])
    want = feed(plain, theirs, step, mask)
    torch.testing.assert_close(feed(model, cache, step, mask), want, atol=2e-4, rtol=0)


def test_what_a_draft_reads_before_the_prompt(short):
    """SpecPC's: the angles are those of what the model then reads, 70 tokens of 120."""
    model, plain = build(short), build(short)
    feed(model, kvfold.Cache(model, "specpc", budget=70), *tokens(120).values())
    feed(plain, dynamic(plain), *tokens(70).values())
    assert same(state(model), state(plain))


def test_texts_that_are_sorted_by_topic():
    model = made("ntk")
    feed(model, None, *tokens(90).values())
    before = state(model)
    OwnStates(model, lambda text, add_special_tokens: SimpleNamespace(input_ids=[5] * len(text)))(["a" * 120, "b"])
    assert same(state(model), before)


def test_angles_are_put_back_where_they_were():
    """In the same tensors, which captured graphs read; also where the pass fails."""
    for name in KINDS:
        model = made(name)
        feed(model, None, *tokens(70).values())
        before, held = state(model), [dict(r.named_buffers()) for r in by_length(model)]
        with pytest.raises(RuntimeError, match="broken"), kept_tables(model):
            feed(model, None, *tokens(20 if name == "longrope" else 120).values())
            assert not same(state(model), before)
            raise RuntimeError("broken")
        assert same(state(model), before)
        after = [dict(r.named_buffers()) for r in by_length(model)]
        assert all(old[n] is new[n] for old, new in zip(held, after, strict=True) for n in old)
