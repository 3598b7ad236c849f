"""LESS against its card: evicted tokens in one sum, one denominator; a state that is for good, and how it is learnt."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import kvfold
from calibrated import feature_maps
from folding import DV, B, D, G, H, maps_by_name, random_chunk, segment_of, slow_psi, slow_read
from kvfold import artefacts, ops
from kvfold.artefacts import Artefact
from kvfold.formats import POSITION, Chunk, Dense, Summed
from kvfold.formats import feature_maps as known
from kvfold.formats.feature_maps import bring, maps_of
from kvfold.methods.h2o import H2O
from kvfold.methods.less import LESS
from kvfold.views.decisions import Keep, Rewrite, Store
from models import dynamic, feed, follow, greedy, grow, reference, subject, tokens
from views import random_view, run

STEPS = torch.arange(5, 17).view(2, 6)


@pytest.fixture
def make(tmp_path):
    """A model and a cache whose maps are random, and whose states weigh so much."""

    def made(name: str = "llama", weight: float = 0.3, composed: str = "", cut: int | None = None, **options):
        model = subject(name)
        layers, config = len(kvfold.Cache(model, "full").paged), model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // 4
        path = tmp_path / f"{name}{weight}.safetensors"
        if not path.exists():
            data = feature_maps(layers, 4, 2, size, weight=weight)
            artefacts.save(
                Artefact("less", {"fingerprint": artefacts.fingerprint(model), "name": name}, data, {}), path
            )
        method = LESS(**{"budget": 0.3, "calibration": str(path), **options})
        return model, kvfold.Cache(model, f"{method}{composed}", prefill_chunk=cut)

    return made


# -- the card's oracle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_oracle_1_with_nothing_gone_it_is_the_full_cache(make, name):
    prompt = tokens(40, 30)
    model, cache = make(name, budget=1.0, weight=9.0)
    got = follow(model, cache, *prompt.values(), STEPS)
    assert_close(got, follow(reference(name), dynamic(reference(name)), *prompt.values(), STEPS), atol=1e-4, rtol=0)
    assert all(len(core.segments) == 1 for core in cache.paged)
    empty = segment_of(maps_by_name())
    out, lse, _ = empty.attend(torch.randn(B, H, G, 3, D), 0.25)
    assert not empty.filled and not out.any() and bool((lse == -math.inf).all())


@pytest.mark.parametrize("score", ["h2o", "streamingllm(sinks=2)"])
def test_oracle_2_a_step_is_one_sum_over_gone_and_kept(score):
    """The whole layer against a loop from the paper: a prompt that is cut, then steps that each drop a token."""
    name = maps_by_name()
    maps, method = maps_of(name, 0, torch.device("cpu")), LESS(budget=8, score=score)
    method.__dict__["maps"] = name
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 27, D, generator=rng) for heads in (H * G, H, H))
    for steps in range(1, 6):
        core, outs = run(method, q, k, v, [20, *[1] * steps])
        before, _ = run(method, q, k, v, [20, *[1] * (steps - 1)])
        new = 19 + steps
        assert core.counts().tolist() == [[8, 8]]
        for head in range(H * G):
            kept = [*before.kept()[0][head // G], new]  # what it reads was there before the step dropped one
            gone = [t for t in range(new) if t not in kept]
            assert len(gone) == 11 + steps
            expected = slow_read(maps, head, q[0, head, new], k[0], v[0], gone, kept)
            assert_close(outs[-1][0, head, 0], expected, atol=1e-5, rtol=1e-5)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_oracle_3_tokens_fold_in_any_order_and_in_blocks(sizes, seed):
    name, given = maps_by_name(), random_chunk(sum(sizes), seed, share=0.7)
    whole, parts, turned = segment_of(name), segment_of(name), segment_of(name)
    whole.append(given)
    start = 0
    for size in sizes:
        slots = torch.arange(start, start + size).expand(B, H, size)
        parts.append(given.take(slots))
        start += size
    turned.append(given.take(torch.randperm(start).expand(B, H, start)))
    maps = maps_of(name, 0, torch.device("cpu"))
    for b, h in np.ndindex(B, H):
        psi = [torch.tensor(slow_psi(maps, h, given.keys[b, h, t])) for t in range(start) if given.valid[b, h, t]]
        assert_close(whole.mass[b, h], sum(psi, torch.zeros(4)), atol=1e-5, rtol=1e-5)
    for other in (parts, turned):
        assert_close(other.sums, whole.sums, atol=1e-5, rtol=1e-5)
        assert_close(other.mass, whole.mass, atol=1e-5, rtol=1e-5)
        assert other.upto.tolist() == whole.upto.tolist()


def test_oracle_4_equal_values_come_out_as_they_are(make):
    name = maps_by_name(weight=2.0)
    gone, kept, u = random_chunk(30), random_chunk(9, seed=1), torch.randn(DV)
    segment = segment_of(name)
    segment.append(Chunk(gone.keys, u.expand_as(gone.values), gone.valid, gone.columns))
    dense = Dense().segment(kept)
    dense.append(Chunk(kept.keys, u.expand_as(kept.values), kept.valid, kept.columns))
    q = torch.randn(B, H, G, 5, D)
    parts = [each.attend(q, 0.25)[:2] for each in (segment, dense)]
    assert min(float(lse.min()) for _, lse in parts) > -50  # both have a say
    assert_close(ops.merge(parts)[0], u.expand(B, H, G, 5, DV), atol=1e-5, rtol=1e-5)


def test_oracle_5_two_gone_and_one_kept():
    """R = 1, phi = 1 and psi = 1: three equal weights."""
    one = torch.zeros(1, H * G, D, 1)
    data = {
        "q1": one.clone(), "q2": torch.ones(1, H * G, 1, 1), "k1": torch.zeros(1, H, D, 1),
        "k2": torch.ones(1, H, 1, 1),
        "k3": torch.zeros(1, H, 1, 1), "s1": torch.ones(1, H, 1), "s2": torch.zeros(1, H, 1),
    }  # fmt: skip
    # gelu(gelu(x) y) = 1 for q and k with x = 8 in their first channel, as gelu(8) = 8 and 8 y = gelu's inverse of 1.
    inverse = 1.1446
    for name, weight in (("q1", "q2"), ("k1", "k2")):
        data[name][..., 0, :] = 1.0
        data[weight] *= inverse / 8.0
    segment = segment_of(bring(data))
    keys, values = torch.zeros(B, H, 2, D), torch.zeros(B, H, 2, DV)
    keys[..., 0] = 8.0
    values[:, :, 0], values[:, :, 1] = 1.0, 3.0
    places = torch.arange(2, dtype=torch.int32).expand(B, H, 2)
    segment.append(Chunk(keys, values, torch.ones(B, H, 2, dtype=torch.bool), {POSITION: places}))
    q = torch.zeros(B, H, G, 1, D)
    q[..., 0] = 8.0
    out, lse, _ = segment.attend(q, 0.25)
    assert_close(out, torch.full_like(out, 2.0), atol=1e-5, rtol=0)
    assert_close(lse.exp(), torch.full_like(lse, 2.0), atol=1e-2, rtol=0)
    kept = (torch.full_like(out, 5.0), torch.zeros_like(lse))  # its logit is 0
    assert_close(ops.merge([(out, lse), kept])[0], torch.full_like(out, 3.0), atol=5e-3, rtol=0)


@pytest.mark.parametrize("score", ["h2o", "snapkv(window=4)", "streamingllm"])
def test_oracle_6_without_weight_it_is_the_eviction_alone(make, score):
    prompt = tokens(40, 30)
    model, cache = make(weight=0.0, score=score)
    alone = kvfold.Cache(model, score, budget=0.3)
    got, expected = (follow(model, each, *prompt.values(), STEPS) for each in (cache, alone))
    assert_close(got, expected, atol=1e-5, rtol=0)
    assert [core.kept() for core in cache.paged] == [core.kept() for core in alone.paged]
    weighty = make(weight=0.3, score=score)[1]
    assert not torch.allclose(follow(model, weighty, *prompt.values(), STEPS), expected, atol=1e-3)
    # The tokens that stay are those that the eviction alone keeps, after the prompt and in the first layer's steps.
    assert weighty.paged[0].counts().tolist() == alone.paged[0].counts().tolist()


# -- what the state is, and is not -----------------------------------------------------------------------------


def test_attention_among_tokens_ranks_them():
    """What a step drops is what h2o drops that has seen the same queries, whatever the state weighs."""
    name = maps_by_name(weight=5.0)
    method = LESS(budget=8)
    method.__dict__["maps"] = name
    rng = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, heads, 60, D, generator=rng) for heads in (H * G, H, H))
    sizes = [20, *[1] * 40]
    core, alone = run(method, q, k, v, sizes)[0], run(H2O(budget=8), q, k, v, sizes)[0]
    assert core.kept() == alone.kept()
    one, other = (each.stored.tokens()[0] for each in (core, alone))
    assert_close(one.columns["h2o_score"][one.valid], other.columns["h2o_score"][other.valid])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_rows_padding_and_beams(make, name):
    prompt = tokens(41, 24, 9)
    model, cache = make(name)
    got = follow(model, cache, *prompt.values(), STEPS[:1].expand(3, -1))
    for row, length in enumerate((41, 24, 9)):
        own = prompt["input_ids"][row : row + 1, -length:]
        _, alone = make(name)
        expected = follow(model, alone, own, torch.ones_like(own), STEPS[:1])
        assert [core.kept()[0] for core in alone.paged] == [core.kept()[row] for core in cache.paged]
        assert_close(got[row], expected[0], atol=1e-4, rtol=0)
    beams = make(name)[1]
    ids = model.generate(**tokens(30), past_key_values=beams, num_beams=3, max_new_tokens=8, do_sample=False)
    assert ids.shape == (1, 38) and beams.paged[0].segments[1][1].batch == 3


def test_reordered_rows_take_their_states_along(make):
    prompt = tokens(41, 24)
    model, cache = make()
    feed(model, cache, *prompt.values())
    mask = grow(prompt["attention_mask"])
    straight = feed(model, cache.fork(), STEPS[:, :1], mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    turned = feed(model, cache, STEPS[[1, 0], :1], mask[[1, 0]])
    assert_close(turned[[1, 0]], straight, atol=1e-4, rtol=0)


def test_a_fork_a_file_and_rows_that_join(make, tmp_path):
    prompt = tokens(41)
    model, cache = make()
    feed(model, cache, *prompt.values())
    mask = grow(prompt["attention_mask"])
    cache.save(tmp_path / "c")
    where = cache.method.calibration
    with pytest.raises(ValueError, match=r"less has calibration='.*' loaded, which a file can't ask for"):
        kvfold.Cache.load(tmp_path / "c", model)
    loaded, fork = kvfold.Cache.load(tmp_path / "c", model, allow=[where]), cache.fork()
    batch = kvfold.Cache(model, "full")
    batch.join(cache.fork())
    truth = feed(model, cache, STEPS[:1, :1], mask)
    assert torch.equal(feed(model, loaded, STEPS[:1, :1], mask), truth)
    assert torch.equal(feed(model, fork, STEPS[:1, :1], mask), truth)
    assert_close(feed(model, batch, STEPS[:1, :1], mask), truth, atol=1e-5, rtol=0)
    plain = kvfold.Cache(model, "full")
    feed(model, plain, *tokens(17, seed=4).values())
    batch.join(plain)  # whose row has no state
    assert batch.paged[0].segments[1][1].upto[1].tolist() == [0, 0]
    wide = torch.cat([grow(mask), torch.nn.functional.pad(torch.ones(1, 18).long(), (25, 0))])
    both = feed(model, batch, torch.tensor([[9], [9]]), wide)
    assert_close(both[:1], feed(model, cache, torch.tensor([[9]]), grow(mask)), atol=1e-4, rtol=0)
    alone = kvfold.Cache(model, "full")
    feed(model, alone, *tokens(17, seed=4).values())
    assert_close(both[1:], feed(model, alone, torch.tensor([[9]]), torch.ones(1, 18).long()), atol=1e-4, rtol=0)


def test_a_file_of_other_maps_is_refused(make, tmp_path, monkeypatch):
    model, cache = make()
    feed(model, cache, *tokens(40).values())
    cache.save(tmp_path / "c")
    where = cache.method.calibration
    found = artefacts.load(where)
    artefacts.save(Artefact("less", found.model, feature_maps(3, 4, 2, 16, seed=8), {}), tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(where)
    monkeypatch.setattr(known, "_brought", {})  # as another process would find it
    known.maps_of.cache_clear()
    with pytest.raises(ValueError, match=r"maps='[0-9a-f]{16}' are not those of a calibration that was loaded"):
        kvfold.Cache.load(tmp_path / "c", model, allow=[where])


def test_further_turns_and_chunks_read_the_state(make):
    ids, mask = tokens(60).values()
    model, cache = make(budget=9)
    feed(model, cache, ids[:, :30], mask[:, :30])
    assert cache.paged[0].segments[1][1].upto.max() <= 30
    before = cache.paged[0].segments[1][1].mass.clone()
    second = feed(model, cache, ids[:, 30:], mask)
    assert bool((cache.paged[0].segments[1][1].mass > before).all())
    inside = make(budget=9, cut=30)[1]
    assert_close(feed(model, inside, ids, mask)[:, -1], second[:, -1], atol=1e-5, rtol=0)
    alone = kvfold.Cache(model, "h2o", budget=9)
    feed(model, alone, ids[:, :30], mask[:, :30])
    assert not torch.allclose(feed(model, alone, ids[:, 30:], mask)[:, 0], second[:, 0], atol=1e-3)


def test_a_crop_takes_back_what_came_later_or_all_and_is_else_refused(make):
    prompt = tokens(40, 30)
    mask = grow(prompt["attention_mask"])
    model, cache = make(score="snapkv(window=4)", budget=10)
    feed(model, cache, *prompt.values())
    first = feed(model, cache, STEPS[:, :1], mask)
    feed(model, cache, STEPS[:, 1:2], grow(mask))
    cache.crop(-2)
    assert_close(feed(model, cache, STEPS[:, :1], mask), first, atol=1e-5, rtol=0)
    before = [(core.kept(), core.segments[1][1].mass.clone()) for core in cache.paged], cache.get_seq_length()
    with pytest.raises(
        ValueError, match=r"crop\(-20\): Summed\(.*\) can't take tokens back: row 0 has tokens up to 3\d"
    ):
        cache.crop(-20)
    after = [(core.kept(), core.segments[1][1].mass) for core in cache.paged], cache.get_seq_length()
    assert after[1] == before[1]
    for (kept, mass), (old, was) in zip(after[0], before[0], strict=True):
        assert kept == old and torch.equal(mass, was)
    cache.crop(-41)
    assert not any(core.segments[1][1].filled for core in cache.paged)
    fresh = make(score="snapkv(window=4)", budget=10)[1]
    one, two = (greedy(model, each, *tokens(33, 21, seed=3).values(), 4) for each in (cache, fresh))
    assert_close(one[1], two[1], atol=1e-4, rtol=1e-4)


def test_assisted_decoding_drops_what_was_refused_first(make):
    model, cache = make(budget=12)
    ids = tokens(30)["input_ids"].repeat(1, 2)
    options = {"max_new_tokens": 12, "do_sample": False}
    drafted = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert drafted.shape[1] == 72
    for core in cache.paged:
        assert core.segments[1][1].filled and (core.segments[1][1].upto <= core.seen[:, None]).all()


def test_bytes_are_constant_and_counted(make):
    model, cache = make(score="streamingllm", budget=8)
    feed(model, cache, *tokens(40, 30).values())
    segment = cache.paged[0].segments[1][1]
    assert segment.nbytes == 2 * 2 * (4 * (16 + 1) * 4 + 8)
    mask, before = tokens(40, 30)["attention_mask"], segment.mass
    for _ in range(3):
        mask = grow(mask)
        feed(model, cache, STEPS[:, :1], mask)
    assert segment.nbytes == 2 * 2 * (4 * (16 + 1) * 4 + 8) and bool((segment.mass > before).all())
    assert segment.row_nbytes().tolist() == [2 * 4 * 17 * 4] * 2


@pytest.mark.parametrize("form", ["fp8", "kivi(group=8, channels=8, residual=8, requantise=True)"])
def test_kept_tokens_may_lie_in_any_format(make, form):
    prompt = tokens(60, 41)
    model, cache = make(composed=f" | {form}")
    got = follow(model, cache, *prompt.values(), STEPS)
    truth = follow(model, make()[1], *prompt.values(), STEPS)
    assert_close(got[:, 0], truth[:, 0], atol=1e-4, rtol=0)
    assert (got - truth).norm() < 0.7 * truth.norm()
    assert all(core.segments[1][1].filled for core in cache.paged)


def test_a_later_stage_changes_nothing_of_what_was_folded_in():
    """Stages that drop, move or rewrite come behind it: what was said of tokens that are gone still holds."""
    name = maps_by_name()
    view = random_view(B=1, H=2, G=2, T=20, D=16)
    gone = view.valid & (view.rank < 6)
    left = view.apply(Store(Summed(name, 0), gone))
    assert torch.equal(left.valid, view.valid & ~gone) and left.count.tolist() == [[14, 14]]
    for decision in (
        Keep(left.rank >= 3),
        Store(Dense(torch.bfloat16), left.valid),
        Rewrite(Chunk(torch.full_like(view.keys, 7.0), view.values, left.valid, dict(view.columns))),
    ):
        after = left.apply(decision)
        assert [bool(torch.equal(mask, gone)) for form, mask, _ in after.formats if isinstance(form, Summed)] == [True]
        assert torch.equal(after.keys[gone], view.keys[gone])


# -- refusals --------------------------------------------------------------------------------------------------


def test_refused(make, tmp_path, monkeypatch):
    model, _ = make()
    with pytest.raises(ValueError, match=r"needs trained feature maps: .* kvfold calibrate less --model MODEL"):
        run(LESS(budget=4), *(torch.randn(1, h, 9, D) for h in (4, 2, 2)), [9])
    with pytest.raises(ValueError, match=r"score='kvzip' decides in after_prompt"):
        LESS(score="kvzip")
    with pytest.raises(ValueError, match=r"has compact positions, and what less folds in can't move"):
        LESS(score="streamingllm(positions='compact')")
    with pytest.raises(ValueError, match=r"must be a method that selects tokens"):
        LESS(score="kvmerger")
    with pytest.raises(ValueError, match=r"calibration='' must be a file of feature maps"):
        LESS(calibration="")
    beside = make(composed=" | streamingllm(budget=6, positions='compact')")[1]
    with pytest.raises(ValueError, match="beside compact positions"):
        feed(model, beside, *tokens(30).values())
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"less has no calibration for .*kvfold calibrate less"):
        kvfold.Cache(model, "less")


@pytest.mark.parametrize("part", ["q1", "q2", "k1", "k2", "k3", "s1", "s2"])
@pytest.mark.parametrize("damage", ["gone", "axes", "shape", "nan"])
def test_maps_that_do_not_fit_together_are_named(part, damage):
    data = feature_maps(3, 4, 2, 16)
    if damage == "gone":
        del data[part]
    else:
        old = data[part]
        data[part] = {"axes": old[0], "shape": old[..., :-1], "nan": old.clone().fill_(torch.nan)}[damage]
    with pytest.raises(ValueError, match="the calibration of less"):
        bring(data)
