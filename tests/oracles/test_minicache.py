"""MiniCache against its card: directions between two layers, lengths of their own, outliers whole, real bytes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import kvfold
from kvfold.bench.held import stored as sized
from kvfold.formats import POSITION, Chunk, DepthSegment
from kvfold.hf.rope import find_ropes
from kvfold.layer.late import Done, carry_out
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.minicache import MiniCache, distance, slerp
from kvfold.views.decisions import Pair
from models import dynamic, feed, follow, grow, reference, subject, tokens

STEPS = torch.arange(5, 45).view(2, 20)


def chunk(keys: torch.Tensor, values: torch.Tensor) -> Chunk:
    b, h, t, _ = keys.shape
    positions = torch.arange(t, dtype=torch.int32).expand(b, h, t).contiguous()
    return Chunk(keys, values, torch.ones(b, h, t, dtype=torch.bool), {POSITION: positions})


def pair_of(lower: Chunk, upper: Chunk, valid: torch.Tensor | None = None, state=None, prompt=None) -> Pair:
    valid = lower.valid if valid is None else valid
    return Pair(lower, upper, valid, valid if prompt is None else prompt & valid, state)


def random_pair(b: int = 1, h: int = 2, t: int = 24, d: int = 8, seed: int = 0) -> Pair:
    rng = torch.Generator().manual_seed(seed)
    states = [torch.randn(b, h, t, d, generator=rng) for _ in range(4)]
    valid = torch.rand(b, h, t, generator=rng) > 0.2
    return pair_of(chunk(*states[:2]), chunk(*states[2:]), valid)


def held(core) -> dict[int, DepthSegment]:
    return {segment.side: segment for _, segment in core.segments if isinstance(segment, DepthSegment)}


def shared(core) -> list[list[list[int]]]:
    """Text positions of the tokens that lie on shared pages, [row][head]."""
    (segment,) = held(core).values()
    stored = segment.dense()
    rows = zip(stored.positions, stored.valid, strict=True)
    return [[head[seen].tolist() for head, seen in zip(*row, strict=True)] for row in rows]


# -- the card ------------------------------------------------------------------------------------------------


def test_oracle_1_between_two_axes():
    x, y = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    assert distance(x, y).item() == pytest.approx(0.5)
    direction = slerp(x, y, 0.6)
    assert direction.flatten().tolist() == pytest.approx([0.587785, 0.809017], abs=1e-6)
    assert (2 * direction).flatten().tolist() == pytest.approx([1.175571, 1.618034], abs=1e-5)
    assert (3 * direction).flatten().tolist() == pytest.approx([1.763356, 2.427051], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_oracle_2_parallel_layers_are_restored(dtype):
    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for factor in (0.25, 1.0, 8.0):
        direction = slerp(x, x * factor, 0.6)
        assert direction.dtype == dtype and direction.isfinite().all()
        restored = direction.float() * x.float().norm(dim=-1, keepdim=True)
        assert_close(restored, x.float(), atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5)
    assert slerp(torch.zeros_like(x), torch.zeros_like(x), 0.6).eq(0).all()


def test_oracle_3_either_end_is_one_layer():
    pair = random_pair()
    for t, one in ((0.0, pair.lower), (1.0, pair.upper)):
        direction = slerp(pair.lower.keys, pair.upper.keys, t)
        assert_close(direction * one.keys.norm(dim=-1, keepdim=True), one.keys, atol=1e-5, rtol=1e-5)


def test_oracle_4_lengths_stay_and_what_is_retained_is_as_it_was():
    model, prompt = subject("llama"), tokens(40, 31)
    cache, full = kvfold.Cache(model, "minicache", gamma=0.4), kvfold.Cache(model, "full")
    for each in (cache, full):
        feed(model, each, *prompt.values())
    for layer in (1, 2):
        got, true = (each.paged[layer].stored.tokens()[0] for each in (cache, full))
        assert torch.equal(got.valid, true.valid)
        merged = torch.zeros_like(got.valid)
        for row, heads in enumerate(shared(cache.paged[layer])):
            for head, places in enumerate(heads):
                merged[row, head, places] = True
        assert 0 < merged.sum() < got.valid.sum()
        whole = got.valid & ~merged
        for mine, theirs in ((got.keys, true.keys), (got.values, true.values)):
            assert torch.equal(mine[whole], theirs[whole])
            assert_close(mine[merged].norm(dim=-1), theirs[merged].norm(dim=-1), atol=1e-4, rtol=1e-5)
            assert not torch.allclose(mine[merged], theirs[merged], atol=1e-2)


def test_oracle_5_the_one_that_differs_is_retained():
    rng = torch.Generator().manual_seed(3)
    states = torch.randn(1, 1, 101, 16, generator=rng)
    near = states + 0.01 * torch.randn(states.shape, generator=rng)
    far = near.clone()
    across = torch.randn(16, generator=rng)
    far[0, 0, 57] = across - states[0, 0, 57] * (across @ states[0, 0, 57]) / states[0, 0, 57].square().sum()
    chosen = MiniCache().choose(pair_of(chunk(states, states), chunk(far, far)))
    assert (~chosen.mask).nonzero()[:, 2].tolist() == [57]
    for upper in (chunk(far, near), chunk(near, far)):  # in keys or in values alone: the others go by their own range
        whole = (~MiniCache().choose(pair_of(chunk(states, states), upper)).mask).nonzero()[:, 2].tolist()
        assert 57 in whole and len(whole) < 6


@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"start": 1.0}, {"start": 3}, {"start": 2}], ids=str)
def test_oracle_6_all_retained_or_no_pair_is_the_full_cache(options):
    model, prompt = subject("llama"), tokens(40, 30)
    cache, full = kvfold.Cache(model, "minicache", **options), kvfold.Cache(model, "full")
    got = follow(model, cache, *prompt.values(), STEPS)
    assert_close(got, follow(model, full, *prompt.values(), STEPS), atol=1e-4, rtol=0)
    assert not any(segment.longest for core in cache.paged for segment in held(core).values())


def test_oracle_7_rotating_and_merging_in_either_order():
    rope = find_ropes(subject("llama"))[0]
    rng = torch.Generator().manual_seed(5)
    x, y = (torch.randn(1, 2, 30, 16, generator=rng) for _ in range(2))
    steps = torch.randint(0, 400, (1, 2, 30), generator=rng)
    then = slerp(rope.shift(x, steps), rope.shift(y, steps), 0.6)
    assert_close(then, rope.shift(slerp(x, y, 0.6), steps), atol=1e-5, rtol=0)
    assert (then - slerp(x, y, 0.6)).abs().max() > 0.1


def two_layers(d: int, length: int, gamma: float = 0.0, dtype: torch.dtype = torch.bfloat16):
    """Two `KVLayer`s with `length` random tokens each of 2 heads, merged as a cache would."""
    rng, method = torch.Generator().manual_seed(0), MiniCache(start=0, gamma=gamma)
    layers = [KVLayer(Rows(method), i, (0, 1), 2) for i in range(2)]
    for layer in layers:
        q, k, v = (torch.randn(1, heads, length, d, generator=rng).to(dtype) for heads in (4, 2, 2))
        layer.attend(q, k, v, None, d**-0.5, Plan(prefill=True))
    (share,) = method.after_forward(Done(layers, Plan(prefill=True))).values()
    carry_out(layers, 1, share, Plan(prefill=True))
    return layers


@pytest.mark.parametrize("d", [64, 128])
def test_oracle_8_bytes_of_a_pair(d):
    length = 800
    counted: set[int] = set()
    lower, upper = two_layers(d, length, gamma=0.05)
    held_now = lower.bytes_beside(counted) + upper.bytes_beside(counted)
    assert held_now <= 0.6 * (lower.dense_bytes() + upper.dense_bytes())
    lower, upper = two_layers(d, length)
    merged = shared(lower)[0]
    each = 2 * 2 * d + 4 + 4 * 4  # key and value, position, four lengths
    (segment,) = held(lower).values()
    assert segment.pool is held(upper)[1].pool
    assert segment.pool.nbytes == math.ceil(max(map(len, merged)) / 16) * 2 * (16 * each + 4)
    assert merged == shared(upper)[0] and all(790 < len(head) < length for head in merged)


# -- a slow loop ---------------------------------------------------------------------------------------------


def slow(pair: Pair, t: float, gamma: float, row: int):
    """(positions merged, directions of keys by (head, position)), one token at a time."""
    heads, size = pair.valid.shape[1:]
    retained, directions = set(), {}
    for name in ("keys", "values"):
        angles: dict[int, list[float]] = {}
        for head in range(heads):
            for i in range(size):
                if not pair.valid[row, head, i]:
                    continue
                x, y = (getattr(one, name)[row, head, i].double() for one in (pair.lower, pair.upper))
                x, y = x / x.norm(), y / y.norm()
                omega = math.acos(float(x @ y))
                angles.setdefault(i, []).append(omega / math.pi)
                e = (math.sin((1 - t) * omega) * x + math.sin(t * omega) * y) / math.sin(omega)
                directions[name, head, i] = e
        d = {i: sum(found) / len(found) for i, found in angles.items()}
        low, high = min(d.values()), max(d.values())
        retained |= {i for i, value in d.items() if value >= high - gamma * (high - low)}
    return retained, directions


@given(seed=st.integers(0, 30), gamma=st.sampled_from([0.0, 0.05, 0.3, 0.9]), t=st.sampled_from([0.1, 0.6]))
def test_a_slow_loop_agrees(seed, gamma, t):
    pair = random_pair(b=2, seed=seed)
    chosen = MiniCache(t=t, gamma=gamma).choose(pair)
    for row in range(2):
        retained, directions = slow(pair, t, gamma, row)
        for head in range(2):
            there = pair.valid[row, head].nonzero()[:, 0].tolist()
            assert chosen.mask[row, head].nonzero()[:, 0].tolist() == [i for i in there if i not in retained]
            for i in there:
                for name in ("keys", "values"):
                    got = getattr(chosen, name)[row, head, i].double()
                    assert_close(got, directions[name, head, i], atol=1e-4, rtol=0)


def test_opposite_directions_are_retained():
    pair = random_pair(h=1, t=12)
    upper = pair.upper.keys.clone()
    upper[0, 0, 4] = -2 * pair.lower.keys[0, 0, 4]
    valid = torch.ones_like(pair.valid)
    chosen = MiniCache(gamma=0.0).choose(pair_of(pair.lower, chunk(upper, pair.upper.values), valid))
    assert not chosen.mask[0, 0, 4] and chosen.mask.sum() == 9  # it, and the one furthest in keys and in values
    assert chosen.state.isfinite().all()


def test_generated_tokens_go_by_the_range_of_the_prompt():
    pair, method = random_pair(h=1, t=40), MiniCache(gamma=0.3)
    valid = torch.ones_like(pair.valid)
    first = method.choose(pair_of(pair.lower, pair.upper, valid))
    later = random_pair(h=1, t=40, seed=8)
    none = torch.zeros_like(valid)
    second = method.choose(pair_of(later.lower, later.upper, valid, first.state, none))
    assert torch.equal(second.state, first.state)
    low, high = first.state[0, :2].tolist()
    far = distance(later.lower.keys, later.upper.keys)[0, 0] >= high - 0.3 * (high - low)
    assert far.any() and not (second.mask[0, 0] & far).any()
    third = method.choose(pair_of(later.lower, later.upper, valid, first.state))  # a further prompt widens it
    assert (third.state[0, [0, 2]] <= first.state[0, [0, 2]]).all()
    assert (third.state[0, [1, 3]] >= first.state[0, [1, 3]]).all() and not torch.equal(third.state, first.state)


def test_options_are_checked():
    wrong = [("start", -1), ("start", 1.5), ("t", 1.1), ("gamma", -0.1), ("residual", 0), ("start", True)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            MiniCache(**{name: value})
    assert [MiniCache(start=s).first(5) for s in (0.5, 0.0, 1.0, 3)] == [2, 0, 5, 3]


# -- in a model ----------------------------------------------------------------------------------------------


def test_the_prompts_own_output_is_exact_and_later_reads_are_of_what_is_restored():
    model, prompt = subject("llama"), tokens(40, 30)
    cache = kvfold.Cache(model, "minicache")
    truth = dynamic(reference("llama"))
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    got, expected = feed(model, cache, ids, mask), feed(reference("llama"), truth, ids, mask)
    for row, length in enumerate((40, 30)):
        assert_close(got[row, -length:], expected[row, -length:], atol=1e-4, rtol=0)
    for layer, core in zip(truth.layers, cache.paged, strict=True):  # what is stored, in a plain cache
        stored = core.stored.tokens()[0]
        for row, length in enumerate((40, 30)):
            layer.keys[row, :, -length:] = stored.keys[row, :, :length]
            layer.values[row, :, -length:] = stored.values[row, :, :length]
    step, mask = STEPS[:, :1], grow(mask)
    approximate = feed(model, cache, step, mask)
    assert_close(approximate, feed(reference("llama"), truth, step, mask), atol=1e-4, rtol=0)


def test_generated_tokens_wait_in_both_layers_and_then_merge():
    model, prompt = subject("llama"), tokens(40, 30)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache = kvfold.Cache(model, "minicache", gamma=0.0, residual=5)
    feed(model, cache, ids, mask)
    before = [sum(map(len, shared(cache.paged[1])[row])) for row in range(2)]
    for step in range(11):
        mask = grow(mask)
        feed(model, cache, STEPS[:, step : step + 1], mask)
        assert shared(cache.paged[1]) == shared(cache.paged[2])
        for row, length in enumerate((40, 30)):
            newest = max(max(head) for head in shared(cache.paged[1])[row])
            assert newest < length + (step + 1) // 5 * 5
            assert cache.kept(1)[row] == [list(range(length + step + 1))] * 2
    after = [sum(map(len, shared(cache.paged[1])[row])) for row in range(2)]
    assert all(x < y <= x + 20 for x, y in zip(before, after, strict=True))


def test_behind_an_eviction_only_what_both_layers_hold_is_shared():
    model, prompt = subject("llama"), tokens(60, 44)
    text = "snapkv(budget=0.5, window=4) | minicache(gamma=0.0)"
    cache, alone = kvfold.Cache(model, text), kvfold.Cache(model, "snapkv", budget=0.5, window=4)
    for each in (cache, alone):
        feed(model, each, *prompt.values())
    for layer in range(3):
        assert cache.kept(layer) == alone.kept(layer)
    for row in range(2):
        for head in range(2):
            one, two = (set(alone.kept(layer)[row][head]) for layer in (1, 2))
            merged = set(shared(cache.paged[1])[row][head])
            assert one != two and merged == set(shared(cache.paged[2])[row][head])
            assert merged <= one & two and len(merged) >= len(one & two) - 4
    logits = follow(model, cache, STEPS[:, :2], grow(prompt["attention_mask"], 2), STEPS[:, 2:])
    assert logits.isfinite().all()


def twins(cache) -> bool:
    return held(cache.paged[1])[0].twin(held(cache.paged[2])[1])


@pytest.mark.parametrize(
    "text", ["h2o(budget=0.6)", "tova(budget=0.6)", "kvmerger(budget=0.6)", "cake(budget=0.6)", "d2o(budget=0.6)"]
)
def test_compositions_share_again_after_each_prompt(text):
    """What was evicted from one layer alone parts the two; the next merge brings them together."""
    model, prompt = subject("llama"), tokens(60, 44)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache = kvfold.Cache(model, f"{text} | minicache(gamma=0.1, residual=3)")
    feed(model, cache, ids[:, :30], mask[:, :30])
    assert twins(cache) and held(cache.paged[1])[0].longest
    feed(model, cache, ids[:, 30:], mask)
    assert twins(cache) and held(cache.paged[1])[0].longest
    again = []
    for step in range(7):
        mask = grow(mask)
        assert feed(model, cache, STEPS[:, step : step + 1], mask).isfinite().all()
        if (held(cache.paged[1])[0].upto == cache.paged[1].seen).any():
            assert twins(cache) and held(cache.paged[1])[0].counts().all()
            again.append(step)
    assert again == [2, 5]
    counted: set[int] = set()
    assert cache.nbytes == sum(core.bytes_beside(counted) for core in cache.paged)


def test_assisted_decoding_merges_what_was_accepted():
    model, prompt = subject("llama"), tokens(30)
    cache, plain = (kvfold.Cache(model, "minicache", residual=4) for _ in range(2))
    options = {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(**prompt, past_key_values=plain, **options)
    got = model.generate(**prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert got.shape == expected.shape
    cache.settle_pending()
    assert held(cache.paged[1])[0].longest > 30 and twins(cache)
    whole = kvfold.Cache(model, "minicache", gamma=1.0, residual=4)  # asked as often, and nothing is merged
    got = model.generate(**prompt, past_key_values=whole, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(got, model.generate(**prompt, **options))


def test_a_crop_beams_and_a_fork():
    model, prompt = subject("llama"), tokens(40, 30)
    mask = prompt["attention_mask"]
    cache = kvfold.Cache(model, "minicache", residual=4)
    follow(model, cache, *prompt.values(), STEPS[:, :9])
    fork = cache.fork()
    cache.crop(-20)
    assert twins(cache) and cache.kept(2) == [[list(range(29))] * 2, [list(range(19))] * 2]
    assert fork.kept(2) == [[list(range(49))] * 2, [list(range(39))] * 2]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert twins(cache) and cache.kept(1) == [[list(range(19))] * 2, [list(range(29))] * 2]
    got = follow(model, cache, STEPS[:, :1], grow(mask, 9)[[1, 0]][:, :30], STEPS[:, 1:11])
    assert got.isfinite().all() and twins(cache) and twins(fork)
    assert ((cache.paged[1].seen - held(cache.paged[1])[0].upto) == 3).all()  # of 11, and 4 at a time


def test_a_plan_of_it_is_refused():
    """It would not know what two layers hold in common."""
    with pytest.raises(ValueError, match="lets layers share tokens"):
        sized(kvfold.parse("snapkv | minicache"), 100, 0, (0,), 1, 2)


def test_gemma_pairs_its_global_layers():
    model = subject("gemma3")
    cache = kvfold.Cache(model, "minicache", start=0)
    feed(model, cache, *tokens(40, 30).values())
    assert len(cache.paged) == 2 and all(held(core) for core in cache.paged)
    assert shared(cache.paged[0]) == shared(cache.paged[1])


def test_layers_that_differ_stay_as_they_are():
    layers = two_layers(16, 40, dtype=torch.float32)
    assert layers[0].alike(layers[1])
    spec = layers[1].stored.spec
    layers[1].stored.spec = replace(spec, value_size=8)
    assert not layers[0].alike(layers[1])
    rope = find_ropes(subject("llama"))[0]
    layers[1].stored.spec, layers[1].site = spec, replace(layers[1].site, rope=rope)
    assert not layers[0].alike(layers[1])


def test_a_later_chunk_of_a_prompt_is_merged_too():
    model, prompt = subject("llama"), tokens(48, 37)
    cache = kvfold.Cache(model, "minicache", prefill_chunk=16)
    feed(model, cache, *prompt.values())
    for row, length in enumerate((48, 37)):
        for head in shared(cache.paged[2])[row]:
            assert len(head) > 0.7 * length and max(head) > length - 8
