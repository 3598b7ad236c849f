"""Prompts that are read in chunks from inside one call of the model."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import kvfold
from kvfold.hf.call.chunks import chunk_ends
from models import COMMON, dynamic, feed, follow, reference, subject, tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "qwen3-next"])
@pytest.mark.parametrize("lengths", [(70,), (70, 33)], ids=["one", "padded"])
def test_full_in_chunks_is_full_at_once(name, lengths):
    prompt = tokens(*lengths)
    steps = torch.randint(5, 90, (len(lengths), 6), generator=torch.Generator().manual_seed(3))
    want = follow(reference(name), dynamic(reference(name)), *prompt.values(), steps)
    model = subject(name)
    for chunk in (16, 23, 70):
        got = follow(model, kvfold.Cache(model, "full", prefill_chunk=chunk), *prompt.values(), steps)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "method", ["snapkv(budget=24)", "h2o(budget=24)", "streamingllm(budget=24)", "kvmerger(budget=24)"]
)
def test_no_layer_ever_holds_more_than_its_budget_and_a_chunk(method):
    model = subject("llama")
    cache, held = kvfold.Cache(model, method, prefill_chunk=20), []
    with cache.observed(lambda view: held.append(int(view.count.max()))):
        feed(model, cache, *tokens(201).values())
    assert len(held) == 3 * 11 and 24 < max(held) <= 24 + 20
    assert all((core.counts() <= 24).all() and core.width == 201 for core in cache.paged)


def test_chunks_are_those_of_a_loop_over_the_model():
    model, ids = subject("llama"), tokens(75)["input_ids"]
    cache, other = kvfold.Cache(model, "h2o", budget=16, prefill_chunk=30), kvfold.Cache(model, "h2o", budget=16)
    with torch.no_grad():
        got = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        for part in ids.split(30, dim=1):
            want = model(input_ids=part, past_key_values=other, logits_to_keep=1).logits
    assert torch.equal(got, want) and [c.kept() for c in cache.paged] == [c.kept() for c in other.paged]


def test_all_logits_come_back_in_order():
    model, ids = subject("llama"), tokens(50)["input_ids"]
    with torch.no_grad():
        want = reference("llama")(input_ids=ids).logits
        got = model(input_ids=ids, past_key_values=kvfold.Cache(model, "full", prefill_chunk=7)).logits
        body = model.model(input_ids=ids, past_key_values=kvfold.Cache(model.model, "full", prefill_chunk=7))
        hidden = reference("llama").model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    torch.testing.assert_close(body.last_hidden_state, hidden, atol=2e-4, rtol=0)


def test_generate_and_further_turns():
    model, ids = subject("llama"), tokens(61)["input_ids"]
    want = reference("llama").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    cache = kvfold.Cache(model, "full", prefill_chunk=12)
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    assert torch.equal(got, want)
    more = torch.cat([got, tokens(40, seed=1)["input_ids"]], 1)
    again = model.generate(
        more, attention_mask=torch.ones_like(more), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    want = reference("llama").generate(more, attention_mask=torch.ones_like(more), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, want)


def test_embeddings_and_positions_are_cut_too():
    model, prompt = subject("llama"), tokens(45, 30)
    mask = prompt["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    embedded = model.get_input_embeddings()(prompt["input_ids"])
    with torch.no_grad():
        want = reference("llama")(input_ids=prompt["input_ids"], attention_mask=mask, position_ids=places).logits
        cache = kvfold.Cache(model, "full", prefill_chunk=11)
        got = model(inputs_embeds=embedded, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_further_turn_with_padding(name):
    """Before it, and between the turns of a row that says less."""
    first, second = tokens(40, 27), tokens(35, 22, seed=1)
    masks = [first["attention_mask"], torch.cat([first["attention_mask"], second["attention_mask"]], 1)]
    model, plain = subject(name), dynamic(reference(name))
    cache = kvfold.Cache(model, "full", prefill_chunk=11)
    for turn, mask in zip((first, second), masks, strict=True):
        want = feed(reference(name), plain, turn["input_ids"], mask)
        got = feed(model, cache, turn["input_ids"], mask)
        real = turn["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=0)


def test_the_last_chunk_is_never_a_lone_token():
    assert chunk_ends(61, 20) == [20, 40, 59, 61] and chunk_ends(60, 20) == [20, 40, 60] and chunk_ends(5, 20) == [5]


def test_refusals_come_before_anything_is_read(unchecked):
    model, ids = subject("llama"), tokens(50)["input_ids"]
    for bad in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match=r"prefill_chunk=.* must be an int >= 2"):
            kvfold.Cache(model, "full", prefill_chunk=bad)
    cache = kvfold.Cache(model, "full", prefill_chunk=10)
    for options, message in (
        ({"labels": ids}, "labels"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"logits_to_keep": 30}, "logits_to_keep=30"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, past_key_values=cache, **options)
        assert cache.get_seq_length() == 0
    feed(model, cache, ids, torch.ones_like(ids))
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForQuestionAnswering])
def test_heads_that_answer_for_the_text_as_a_whole_are_refused(kind):
    """Their chunks' answers, side by side, would be nobody's."""
    model, prompt = kind(LlamaConfig(**COMMON)).eval(), tokens(30, 20)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{kind.__name__} does not answer token by token"):
        model(**prompt, past_key_values=kvfold.Cache(model, "full", prefill_chunk=10))
    with torch.no_grad():
        want, got = model(**prompt)[0], model(**prompt, past_key_values=kvfold.Cache(model, "full"))[0]
    real = prompt["attention_mask"].bool() if got.shape == prompt["input_ids"].shape else slice(None)
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=0)


def test_a_head_that_labels_tokens_is_read_in_chunks():
    model, prompt = LlamaForTokenClassification(LlamaConfig(**COMMON)).eval(), tokens(30)
    with torch.no_grad():
        got = model(**prompt, past_key_values=kvfold.Cache(model, "full", prefill_chunk=10)).logits
        torch.testing.assert_close(got, model(**prompt).logits, atol=2e-4, rtol=0)


def test_transformers_own_chunks_are_ours():
    model, ids = subject("llama"), tokens(61)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    ours, theirs = kvfold.Cache(model, "snapkv", budget=20, prefill_chunk=16), kvfold.Cache(model, "snapkv", budget=20)
    got = model.generate(ids, past_key_values=ours, **options)
    assert torch.equal(got, model.generate(ids, past_key_values=theirs, prefill_chunk_size=16, **options))
    assert [core.kept() for core in ours.paged] == [core.kept() for core in theirs.paged]


def test_a_call_that_fails_midway_leaves_nothing_for_the_next():
    model, ids = subject("llama"), tokens(50)["input_ids"]
    with torch.no_grad():
        want = reference("llama")(input_ids=ids).logits
        for failing in (1, 3):  # a chunk read ahead, and the last one
            cache, seen = kvfold.Cache(model, "full", prefill_chunk=15), []

            def fail(module, args, seen=seen, failing=failing):
                seen.append(1)
                if len(seen) == failing + 1:
                    raise RuntimeError("broken")

            hook = model.model.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="broken"):
                model(input_ids=ids, past_key_values=cache)
            hook.remove()
            cache.reset()
            got = model(input_ids=ids, past_key_values=cache).logits
            torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_chunks_of_two_are_all_prompt():
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "snapkv", budget=8, prefill_chunk=2)
    feed(model, cache, *tokens(41).values())
    assert all((core.counts() <= 8).all() and core.prompt.tolist() == [41] for core in cache.paged)


def test_assisted_decoding_is_refused():
    model, ids = subject("llama"), tokens(50)["input_ids"]
    cache = kvfold.Cache(model, "full", prefill_chunk=10)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="assisted decoding"), torch.no_grad():
        model(input_ids=ids, past_key_values=cache)


def test_a_saved_cache_goes_on_in_chunks(tmp_path):
    model = subject("llama")
    cache = kvfold.Cache(model, "full", prefill_chunk=10)
    feed(model, cache, *tokens(25).values())
    cache.save(tmp_path / "cache.safetensors")
    assert kvfold.Cache.load(tmp_path / "cache.safetensors", model).prefill_chunk == 10
