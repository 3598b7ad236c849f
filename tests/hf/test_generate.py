"""Everything that `generate` and a hand-written loop do with a cache: sampling, beams, drafts, turns, chunks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from models import build, dynamic, feed, follow, greedy, grow, reference, subject, tokens

BOTH = pytest.mark.parametrize("name", ["llama", "gemma3"])
PADDED = (23, 9)


def make(name="llama", method="full", **options):
    return subject(name), kvfold.Cache(subject(name), method, **options)


def both_generate(name, prompt, **options):
    """What transformers' cache gives, what ours gives, and our cache."""
    torch.manual_seed(7)
    expected = reference(name).generate(**prompt, past_key_values=dynamic(reference(name)), **options)
    torch.manual_seed(7)
    model, cache = make(name)
    return expected, model.generate(**prompt, past_key_values=cache, **options), cache


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# -- decoding strategies -------------------------------------------------------------------------------------


@BOTH
def test_sampling(name):
    options = dict(max_new_tokens=32, do_sample=True, top_k=20, temperature=3.0)
    expected, got, _ = both_generate(name, tokens(*PADDED), **options)
    assert torch.equal(got, expected)


@BOTH
def test_several_sequences_of_one_prompt(name):
    expected, got, cache = both_generate(
        name, tokens(*PADDED), max_new_tokens=16, do_sample=True, temperature=3.0, num_return_sequences=3
    )
    assert torch.equal(got, expected)
    assert cache.batch_size == 6 and len({tuple(row) for row in got.tolist()}) > 2


@BOTH
def test_beams(name):
    options = dict(max_new_tokens=20, num_beams=4, do_sample=False, num_return_sequences=2)
    expected, got, _ = both_generate(name, tokens(*PADDED), **options)
    assert torch.equal(got, expected)


def test_beams_share_pages():
    prompt = tokens(160)
    model, alone = make()
    feed(model, alone, *prompt.values())
    one = alone.paged[0].segments[0][1].pool.used
    _, cache = make()
    model.generate(**prompt, past_key_values=cache, max_new_tokens=12, num_beams=4, do_sample=False)
    for core in cache.paged:
        assert core.segments[0][1].pool.used < 4 * one / 2


@BOTH
def test_prompt_lookup(name):
    prompt = tokens(30)
    prompt["input_ids"] = prompt["input_ids"][:, :10].repeat(1, 3)  # something to look up
    plain = reference(name).generate(**prompt, max_new_tokens=32, do_sample=False)
    model, cache = make(name)
    options = dict(max_new_tokens=32, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, **options), plain)
    held = cache.paged[0].counts().max()
    assert held <= plain.shape[1]


@BOTH
@pytest.mark.parametrize("seed", [0, 1], ids=["good-draft", "bad-draft"])
def test_assistant(name, seed):
    prompt = tokens(30)
    plain = reference(name).generate(**prompt, max_new_tokens=32, do_sample=False)
    model, cache = make(name)
    draft = build(name, seed=seed)
    options = dict(max_new_tokens=32, do_sample=False, assistant_model=draft)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, **options), plain)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova", "streamingllm", "kvmerger"])
def test_assisted_decoding_within_the_budget(method):
    model, cache = make("llama", method, budget=12)
    draft = build("llama", seed=1)
    out = model.generate(**tokens(40), past_key_values=cache, max_new_tokens=24, do_sample=False, assistant_model=draft)
    assert out.shape == (1, 64)
    generated = out.shape[1] - 40
    acts_in_decode = cache.method.listens("after_decode")
    for core in cache.paged:
        # The last forward's tokens beyond the accepted ones are gone, and the budget has been applied.
        assert core.counts().max() <= (12 if acts_in_decode else 12 + generated)
        assert all(position < out.shape[1] for row in core.kept() for head in row for position in head)


def test_prefill_in_chunks_is_one_shot():
    prompt = tokens(45, 30)
    model, cache = make()
    plain = reference("llama").generate(**prompt, max_new_tokens=16, do_sample=False)
    options = dict(max_new_tokens=16, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, **options), plain)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova", "streamingllm", "kvmerger"])
def test_chunks_stay_within_the_budget(method):
    prompt = tokens(45, 30)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make("llama", method, budget=0.5)
    for start in range(0, 45, 9):
        feed(model, cache, ids[:, start : start + 9], mask[:, : start + 9])
        read = mask[:, : start + 9].sum(1)
        for row in range(2):
            held = sum(int(core.counts()[row].sum()) for core in cache.paged)
            assert held <= 0.5 * int(read[row]) * 2 * len(cache.paged)


# -- forwards by hand ----------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), pad=st.integers(0, 12))
def test_any_chunks_are_one_shot(cuts, pad):
    prompt = tokens(40, 40 - pad)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    expected = feed(reference("llama"), None, ids, mask)
    model, cache = make()
    edges = [0, *sorted(cuts), 40]
    parts = [feed(model, cache, ids[:, i:j], mask[:, :j]) for i, j in itertools.pairwise(edges)]
    assert_same(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])
    assert cache.get_seq_length() == 40 and cache.batch_size == 2
    assert cache.paged[-1].kept() == [[list(range(40))] * 2, [list(range(40 - pad))] * 2]


@BOTH
def test_turns_are_one_long_prompt(name):
    prompt = tokens(60, 50)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(name)
    feed(model, cache, ids[:, :25], mask[:, :25])
    expected = feed(reference(name), None, ids, mask)
    assert_same(feed(model, cache, ids[:, 25:], mask), expected[:, 25:])


@BOTH
def test_generate_in_turns(name):
    prompt, more = tokens(30, 22), tokens(11, 11, seed=3)["input_ids"]
    model, cache = make(name)
    first = model.generate(**prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    ids = torch.cat([first, more], 1)
    mask = grow(prompt["attention_mask"], ids.shape[1] - 30)
    got = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    expected = reference(name).generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, expected)


def test_ragged_second_turns():
    """The second turn is padded in the middle of the text: 9 new tokens in one row, 4 in the other."""
    prompt, more = tokens(20, 13), tokens(9, 4, seed=3)
    ids = torch.cat([prompt["input_ids"], more["input_ids"]], 1)
    mask = torch.cat([prompt["attention_mask"], more["attention_mask"]], 1)
    expected = feed(reference("llama"), None, ids, mask)
    model, cache = make()
    feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
    got = feed(model, cache, more["input_ids"], mask)
    real = more["attention_mask"].bool()
    assert_same(got[real], expected[:, 20:][real])
    assert cache.paged[0].counts().tolist() == [[29, 29], [17, 17]]
    step = torch.tensor([[5], [6]])
    dense = feed(reference("llama"), None, torch.cat([ids, step], 1), grow(mask))[:, -1:]
    assert_same(feed(model, cache, step, grow(mask)), dense)


def test_a_row_that_says_nothing_in_a_step():
    """One column, padding in one of the rows: that row keeps what it had."""
    prompt = tokens(20, 13)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make()
    feed(model, cache, ids, mask)
    mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    feed(model, cache, torch.tensor([[5], [0]]), mask)
    assert cache.paged[0].counts().tolist() == [[21, 21], [13, 13]]
    mask = grow(mask)
    ids = torch.cat([ids, torch.tensor([[5], [0]]), torch.tensor([[7], [8]])], 1)
    expected = feed(reference("llama"), None, ids, mask)[:, -1:]
    assert_same(feed(model, cache, torch.tensor([[7], [8]]), mask), expected)


def test_rows_that_finish_early():
    prompt = tokens(23, 9, 15)
    plain = reference("llama").generate(**prompt, max_new_tokens=24, do_sample=False)
    stop = int(plain[1, 30])  # the second row ends about here
    expected, got, _ = both_generate(
        "llama", prompt, max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    assert torch.equal(got, expected)
    assert (got[1] == 0).sum() > 14  # padding of the prompt and after its end


# -- cache operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "yarn"])
@given(drop=st.integers(0, 20), pad=st.integers(0, 12))
def test_crop_equals_never_having_had_them(name, drop, pad):
    prompt = tokens(40, 40 - pad)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(name)
    chosen, _ = greedy(model, cache, ids, mask, 13)  # the cache has read 52 columns
    text = torch.cat([ids, chosen[:, :12]], 1)
    cache.crop(-drop)
    left = 52 - drop
    assert cache.get_seq_length() == left
    mask = grow(mask, 12)[:, :left]
    expected = feed(reference(name), None, torch.cat([text[:, :left], chosen[:, :1]], 1), grow(mask))
    assert_same(feed(model, cache, chosen[:, :1], grow(mask)), expected[:, -1:])
    keeps = [[list(range(left + 1))] * 2, [list(range(left + 1 - pad))] * 2]
    assert cache.paged[0].kept() == keeps


def test_a_budget_is_a_share_of_what_a_crop_left_of_the_prompt():
    prompt = tokens(40, 40)
    model, cache = make("llama", "streamingllm", budget=0.5)
    with cache.undecided():
        feed(model, cache, *prompt.values())
    cache.crop(-20)
    feed(model, cache, prompt["input_ids"][:, 20:21], prompt["attention_mask"][:, :21])
    assert cache.kept_tokens == 10


def test_crop_all():
    prompt = tokens(20, 13)
    model, cache = make()
    feed(model, cache, *prompt.values())
    cache.crop(-20)
    assert cache.paged[0].counts().max() == 0 and cache.get_seq_length() == 0
    again = tokens(20, 13, seed=4)
    assert_same(feed(model, cache, *again.values())[:, -1], feed(reference("llama"), None, *again.values())[:, -1])


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "kvmerger"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_reset_and_reuse(name, method):
    model, cache = make(name, method, **({} if method == "full" else {"budget": 0.5}))
    first, second = tokens(40, 30), tokens(21, 33, 8, seed=5)
    greedy(model, cache, *first.values(), 6)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.kept_tokens == 0
    _, used = greedy(model, cache, *second.values(), 6)
    _, fresh_cache = make(name, method, **({} if method == "full" else {"budget": 0.5}))
    _, fresh = greedy(model, fresh_cache, *second.values(), 6)
    assert torch.equal(used, fresh)
    assert cache.nbytes == fresh_cache.nbytes


@pytest.mark.parametrize("method", ["full", "h2o", "kvmerger"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2, 2, 2]], ids=str)
def test_reorder(method, rows):
    options = {} if method == "full" else {"budget": 0.5}
    prompt, forced = tokens(23, 9, 15), torch.arange(30).view(3, 10) + 5
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make("llama", method, **options)
    follow(model, cache, ids, mask, forced[:, :5])
    _, expected_cache = make("llama", method, **options)
    follow(model, expected_cache, ids[rows], mask[rows], forced[rows, :5])
    cache.reorder_cache(torch.tensor(rows))
    mask = grow(mask[rows], 6)
    for column in range(5, 10):
        token = forced[:, column : column + 1]
        got = feed(model, cache, token, mask)
        assert_same(got, feed(model, expected_cache, token, mask))
        mask = grow(mask)
    assert cache.kept(1) == expected_cache.kept(1)


@pytest.mark.parametrize("method", ["full", "h2o"])
def test_repeat_and_select_rows(method):
    options = {} if method == "full" else {"budget": 8}
    prompt = tokens(23, 9)
    model, cache = make("llama", method, **options)
    feed(model, cache, *prompt.values())
    before = cache.kept(0)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    assert cache.kept(0) == [before[0]] * 3 + [before[1]] * 3
    cache.batch_select_indices(torch.tensor([4, 0]))
    assert cache.batch_size == 2 and cache.kept(0) == [before[1], before[0]]
    mask = grow(prompt["attention_mask"][[1, 0]])
    _, plain = make("llama", method, **options)
    feed(model, plain, prompt["input_ids"][[1, 0]], prompt["attention_mask"][[1, 0]])
    token = torch.tensor([[5], [6]])
    assert_same(feed(model, cache, token, mask), feed(model, plain, token, mask))


def test_select_rows_by_mask():
    model, cache = make()
    feed(model, cache, *tokens(23, 9, 4).values())
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.paged[0].counts()[:, 0].tolist() == [23, 4]


@pytest.mark.parametrize("method", ["snapkv", "h2o", "kvmerger"])
def test_a_plain_turn_after_assisted_decoding(method):
    """The cache can't see at once that no draft follows: the next forward tells, and the turn counts as a prompt."""
    model, cache = make("llama", method, budget=12)
    first = model.generate(
        **tokens(40), past_key_values=cache, max_new_tokens=8, do_sample=False, assistant_model=build("llama")
    )
    ids = torch.cat([first, tokens(30, seed=4)["input_ids"]], 1)
    out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    for core in cache.paged:
        assert core.prompt.tolist() == [78] and core.seen.tolist() == [out.shape[1] - 1]
        assert core.counts().max() <= (12 if method == "h2o" else 12 + 5)
