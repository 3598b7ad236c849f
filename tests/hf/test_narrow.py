"""`Propagate`: behind a layer only some of a prompt's tokens go on."""

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import kvfold
from kvfold import Keep, Method
from kvfold.views import ReadOn
from kvfold.views.decisions import Propagate
from models import PAGED, build, feed, follow, grow, positions, reference, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")
STEPS = torch.arange(5, 17).view(2, 6)


def narrowing(after, keep=None):
    """A method by which, behind layer `after`, every third token of a prompt goes on."""

    @kvfold.method("test-narrowing", title="Narrowing", kind="prefill")
    @dataclass(frozen=True)
    class Narrowing(Method):
        narrows = True

        def after_prefill(self, view):
            kept = Keep(view.valid if keep is None else view.last(keep))
            if view.place.layer != after:
                return kept
            return [kept, Propagate(view.queries.positions % 3 == 0)]

    return Narrowing()


class Slow:
    """What the method says, layer by layer with transformers' own layers and masks, for one row."""

    def __init__(self, model, after):
        self.model, self.after, self.cache = model, after, DynamicCache()
        self.stored = [torch.zeros(0, dtype=torch.long)] * model.config.num_hidden_layers

    @torch.no_grad()
    def feed(self, ids, start):
        body, config = self.model.model, self.model.config
        states, here = body.embed_tokens(ids), torch.arange(start, start + ids.shape[1])
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(self.stored)
        for index, layer in enumerate(body.layers):
            if ids.shape[1] > 1 and index == self.after + 1:
                on = here % 3 == 0
                on[-1] = True
                states, here = states[:, on], here[on]
            self.stored[index] = there = torch.cat([self.stored[index], here])
            gap = here[:, None] - there
            mask = (gap >= 0) & (gap < (8 if kinds[index] == "sliding_attention" else 10**6))
            where = (kinds[index],) if isinstance(getattr(body.rotary_emb, "rope_type", None), dict) else ()
            turn = body.rotary_emb(states, here[None], *where)
            states = layer(
                states, attention_mask=mask[None, None], position_embeddings=turn, position_ids=here[None],
                past_key_values=self.cache,
            )  # fmt: skip
        return self.model.lm_head(body.norm(states))[:, -1]

    def crop(self, end):
        for index, layer in enumerate(self.cache.layers):
            left = self.stored[index] < end
            layer.keys, layer.values = layer.keys[:, :, left], layer.values[:, :, left]
            self.stored[index] = self.stored[index][left]


@pytest.mark.parametrize("name", PAGED)
def test_layers_behind_see_some_tokens(name):
    after = 1
    prompt, further = tokens(30, 21), tokens(8, 8, seed=3)["input_ids"]
    model, cache = subject(name), kvfold.Cache(subject(name), narrowing(after))
    ours = follow(model, cache, *prompt.values(), STEPS)
    mask = grow(prompt["attention_mask"], 14)
    ours = torch.cat([ours, feed(model, cache, further, mask)[:, -1:]], 1)
    ours = torch.cat([ours, feed(model, cache, STEPS[:, :1], grow(mask))], 1)
    for row, length in enumerate((30, 21)):
        slow = Slow(reference(name), after)
        theirs = [slow.feed(prompt["input_ids"][row : row + 1, -length:], 0)]
        theirs += [slow.feed(STEPS[row : row + 1, i : i + 1], length + i) for i in range(6)]
        theirs += [slow.feed(further[row : row + 1], length + 6), slow.feed(STEPS[row : row + 1, :1], length + 14)]
        torch.testing.assert_close(ours[row], torch.cat(theirs), atol=1e-4, rtol=0)
        for core in cache.paged:
            assert cache.kept(core.layer)[row][0] == slow.stored[core.layer].tolist()
    assert cache.get_seq_length() == 45 and {core.width for core in cache.paged} == {45}
    assert [core.seen.tolist() for core in cache.paged] == [[45, 36]] * len(cache.paged)


@pytest.mark.parametrize("drops", [(1,), (2,), (1, 2), (3, 1)])
@pytest.mark.parametrize("generated", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_crop_is_by_place_in_the_text(name, generated, drops):
    """Of what is taken back a window behind the narrowing may hold some tokens, in each row others."""
    prompt, first = tokens(6, 5), torch.full((2, generated), 7)
    model, cache, mask = subject(name), kvfold.Cache(subject(name), narrowing(1)), prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    if generated:
        feed(model, cache, first, grow(mask))
    for drop in drops:
        cache.crop(-drop)
    left = 6 + generated - sum(drops)
    assert cache.get_seq_length() == left
    again, mask = torch.arange(11, 33).view(2, 11), grow(mask)[:, :left]
    ours = [feed(model, cache, again[:, :1], mask := grow(mask))]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    ours += [feed(model, cache, again[:, i : i + 1], mask := grow(mask)) for i in range(1, 11)]
    for row, length in enumerate((6, 5)):
        slow, end = Slow(reference(name), 1), left - 6 + length
        slow.feed(prompt["input_ids"][row : row + 1, -length:], 0)
        if generated:
            slow.feed(first[row : row + 1], length)
        slow.crop(end)
        theirs = [slow.feed(again[row : row + 1, i : i + 1], end + i) for i in range(11)]
        torch.testing.assert_close(torch.cat(ours, 1)[row], torch.cat(theirs), atol=1e-4, rtol=0)
        for core in cache.paged:
            assert cache.kept(core.layer)[row][0] == slow.stored[core.layer].tolist()


@torch.no_grad()
def test_crop_equals_never_having_had_them():
    model, ids, more = subject("gemma3"), tokens(6)["input_ids"], tokens(3, seed=3)["input_ids"]
    for method in ("full", "fastkv(budget=1.0, propagated=1.0)"):
        cropped, without = kvfold.Cache(model, method), kvfold.Cache(model, method)
        model(ids, past_key_values=cropped)
        cropped.crop(-2)
        model(ids[:, :4], past_key_values=without)
        expected = model(more, past_key_values=without).logits
        torch.testing.assert_close(model(more, past_key_values=cropped).logits, expected)
        assert cropped.nbytes == without.nbytes


@torch.no_grad()
def test_a_crop_of_what_the_window_let_go_of_is_refused():
    model, cache = subject("gemma3"), kvfold.Cache(subject("gemma3"), narrowing(1))
    model(**tokens(30), past_key_values=cache)
    with pytest.raises(RuntimeError, match="sliding window size was already reached"):
        cache.layers[2].crop(-1)


@torch.no_grad()
def test_a_window_behind_counts_no_padding_though_the_callers_positions_do():
    model, prompt = subject("gemma3"), tokens(30, 21)
    caches = [kvfold.Cache(model, narrowing(1)) for _ in range(2)]
    mask = prompt["attention_mask"]
    for ids in (prompt["input_ids"], *STEPS.split(1, 1)):
        mask = mask if ids.shape[1] > 1 else grow(mask)
        plain = model(ids, attention_mask=mask, past_key_values=caches[0]).logits[:, -1]
        torch.testing.assert_close(plain, feed(model, caches[1], ids, mask)[:, -1], atol=1e-4, rtol=0)


def test_logits_are_those_of_the_tokens_that_go_on():
    model, ids = subject("llama"), tokens(30)["input_ids"]
    with torch.no_grad():
        out = model(ids, past_key_values=kvfold.Cache(model, narrowing(0))).logits
    assert out.shape[1] == 11  # 0, 3, ... 27, and the last


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_beams_forks_and_files(name, tmp_path):
    model, prompt = subject(name), tokens(30, 21)
    cache = kvfold.Cache(model, "fastkv(budget=9, propagated=12, window=3, layer=1)")
    beams = model.generate(**prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=3)
    for row, length in enumerate((30, 21)):
        alone = model.generate(
            prompt["input_ids"][row : row + 1, -length:],
            past_key_values=kvfold.Cache(model, cache.method), max_new_tokens=8, do_sample=False, num_beams=3,
        )  # fmt: skip
        assert torch.equal(beams[row, 30:], alone[0, length:])
    cache = kvfold.Cache(model, cache.method)
    follow(model, cache, *prompt.values(), STEPS[:, :3])
    cache.save(tmp_path / "x")
    mask, fork = grow(prompt["attention_mask"], 4), cache.fork()
    expected = feed(model, cache, STEPS[:, 3:4], mask)
    assert torch.equal(feed(model, fork, STEPS[:, 3:4], mask), expected)
    loaded = kvfold.Cache.load(tmp_path / "x", model)
    assert torch.equal(feed(model, loaded, STEPS[:, 3:4], mask), expected)


@pytest.mark.parametrize("behind", ["kvmerger(budget=0.5, skip=())", "keepkv(budget=0.5)", "kvfold(budget=0.5)"])
def test_a_stage_behind_sees_each_row_as_if_alone(behind):
    """Rows in which fewer tokens go on are filled up on the left; what fills them is nobody's position."""
    model, prompt = subject("llama"), tokens(48, 17)
    method = kvfold.parse(f"fastkv(budget=0.5, propagated=0.5, window=2, layer=0) | {behind}")
    cache, forced = kvfold.Cache(model, method), torch.arange(5, 11).view(2, 3)
    together = follow(model, cache, *prompt.values(), forced)
    for row, length in enumerate((48, 17)):
        alone, ids = kvfold.Cache(model, method), prompt["input_ids"][row : row + 1, -length:]
        own = follow(model, alone, ids, torch.ones_like(ids), forced[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], own, atol=1e-4, rtol=0)
        assert [cache.kept(layer)[row] for layer in range(3)] == [alone.kept(layer)[0] for layer in range(3)]


def rereading(*counts):
    """A method that reads on, so many tokens in each row; and the queries that it saw, layer by layer."""
    seen, ids = [], torch.arange(20, 20 + max(counts)).expand(len(counts), -1)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]

    @kvfold.method("test-rereading", title="Rereading", kind="evict")
    @dataclass(frozen=True)
    class Rereading(Method):
        def after_prompt(self, prompt):
            yield ReadOn(ids, valid, lambda view: seen.append(view.queries))
            return {}

    return Rereading(), seen


def test_what_is_read_behind_a_narrowed_window_does_not_see_its_padding():
    model, prompt = subject("gemma3"), tokens(30, 21)
    method, together = rereading(12, 7)
    feed(model, kvfold.Cache(model, narrowing(1) | method), *prompt.values())
    for row, (length, count) in enumerate(((30, 12), (21, 7))):
        method, alone = rereading(count)
        ids = prompt["input_ids"][row : row + 1, -length:]
        feed(model, kvfold.Cache(model, narrowing(1) | method), ids, torch.ones_like(ids))
        assert len(together) == len(alone) == 2
        for ours, own in zip(together, alone, strict=True):
            assert int(ours.valid[row].sum()) == count and own.valid.all()
            torch.testing.assert_close(ours.states[row : row + 1, :, :count], own.states, atol=1e-4, rtol=0)


def test_the_last_token_goes_on_though_padding_stands_behind_it():
    model, prompt = subject("llama"), tokens(30, 21)
    ids, mask = prompt["input_ids"].clone(), prompt["attention_mask"].flip(1)
    ids[1] = ids[1].roll(21 - 30)
    cache = kvfold.Cache(model, narrowing(0))
    logits = feed(model, cache, ids, mask)[:, -1]
    assert cache.kept(1)[1][0] == [0, 3, 6, 9, 12, 15, 18, 20]
    for row, length in enumerate((30, 21)):
        own = Slow(reference("llama"), 0).feed(prompt["input_ids"][row : row + 1, -length:], 0)
        torch.testing.assert_close(logits[row : row + 1], own, atol=1e-4, rtol=0)


def test_what_cannot_be():
    gpt = build("gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of decoder layers"):
        kvfold.Cache(gpt, narrowing(0))
    model, ids = subject("llama"), tokens(30)["input_ids"]
    with pytest.raises(ValueError, match="narrows one forward pass twice"), torch.no_grad():
        model(ids, past_key_values=kvfold.Cache(model, narrowing(0) | narrowing(0)))


def test_chunks_narrow_each_by_itself():
    model, prompt = subject("llama"), tokens(30)
    cache = kvfold.Cache(model, narrowing(0), prefill_chunk=10)
    out = follow(model, cache, *prompt.values(), STEPS[:1])
    slow = Slow(reference("llama"), 0)
    for start in (0, 10, 20):
        expected = slow.feed(prompt["input_ids"][:, start : start + 10], start)
    torch.testing.assert_close(out[:, 0], expected, atol=1e-4, rtol=0)
    assert positions(prompt["attention_mask"], 1).item() == 29 and cache.kept(2)[0][0][:5] == [0, 3, 6, 9, 12]
