"""Where dropped tokens go, what they become, and writing over a few slots of what is stored."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kvfold.formats import LOG_MASS, Chunk, Dense
from kvfold.layer.plan import Plan
from kvfold.merges import absorb, counted, log_over_set, nearest, nearest_place, over_set, rope_for, soft_match
from kvfold.methods.base import Method
from kvfold.ops import dispatch
from kvfold.ops.alike import naive
from kvfold.views.decisions import Amend, Keep, Rewrite, Store
from views import prompt_view, random_view, run


def slow_nearest(giving, taking, *states):
    """Home and similarity of each slot, by loops."""
    home = torch.arange(giving.shape[-1]).repeat(*giving.shape[:2], 1)
    alike = torch.full(giving.shape, -torch.inf)
    for b, h, e in giving.nonzero().tolist():
        for c in taking[b, h].nonzero()[:, 0].tolist():
            cosines = [F.cosine_similarity(x[b, h, e], x[b, h, c], dim=0).item() for x in states]
            value = cosines[0] if len(cosines) == 1 else math.prod(max(0.0, x) for x in cosines)
            if value > alike[b, h, e] + 1e-6:
                alike[b, h, e], home[b, h, e] = value, c
    return home, alike


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("version", ["naive", "cpu"])
def test_nearest_against_a_loop(version, block, both, monkeypatch):
    monkeypatch.setattr(naive, "BLOCK_ELEMENTS", block)
    view = random_view(B=2, H=3, T=29, left_pad=(0, 11), seed=4)
    taking = (torch.rand(2, 3, 29, generator=torch.Generator().manual_seed(1)) < 0.4) & view.valid
    taking[0, 1] = False  # a head that keeps nothing
    giving = view.valid & ~taking
    giving[1, 2] = False
    states = (view.keys, view.values) if both else (view.keys,)
    with dispatch.use(version):
        home, alike = nearest(giving, taking, *states)
    expected = slow_nearest(giving, taking, *states)
    assert torch.equal(home[alike > 0], expected[0][alike > 0])
    assert_close(alike, expected[1], atol=1e-5, rtol=1e-5)
    assert (home[0, 1] == torch.arange(29)).all() and alike[0, 1].isneginf().all()


@pytest.mark.parametrize("version", ["naive", "cpu"])
def test_ties_go_to_the_earlier(version):
    keys = torch.tensor([[[[1.0, 0], [0, 1], [2, 0], [3, 0], [1, 0]]]])
    taking = torch.tensor([[[False, True, True, True, False]]])
    with dispatch.use(version):
        assert nearest(~taking, taking, keys)[0].tolist() == [[[2, 1, 2, 3, 2]]]
        many = keys[:, :, [1, 2, 3, 0]].repeat(1, 1, 200, 1)  # ties further apart than the kernel looks at once
        taking = torch.arange(800)[None, None] > 0
        assert nearest(~taking, taking, many)[0][0, 0, 0] == 4


def test_the_nearest_place_against_a_loop():
    """Where the slots of the view are not those of the text: an earlier stage has left gaps."""
    rng = torch.Generator().manual_seed(3)
    positions = torch.rand(2, 3, 50, generator=rng).argsort(-1)[..., :29].sort(-1).values.int()
    valid = torch.rand(2, 3, 29, generator=rng) < 0.9
    taking = valid & (torch.rand(2, 3, 29, generator=rng) < 0.3)
    taking[0, 1] = False
    giving = valid & ~taking & (torch.rand(2, 3, 29, generator=rng) < 0.8)
    home = nearest_place(positions, giving, taking)
    for b, h, t in torch.ones_like(valid).nonzero().tolist():
        takers = taking[b, h].nonzero()[:, 0].tolist() if giving[b, h, t] else []
        near = min(takers, key=lambda c: (abs(int(positions[b, h, t] - positions[b, h, c])), c), default=t)
        assert home[b, h, t] == near


def test_soft_match_within_chunks():
    """Four tokens of a chunk of four, a hole between them, and a fifth that is alone in its chunk."""
    angles = torch.tensor([0.0, 45, 2, 90, 91, 91]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], -1)[None, None]
    among = torch.tensor([[[True, False, True, True, True, True]]])
    pairs = {n: soft_match(keys, among, 4, torch.tensor([[n]]))[0, 0].tolist() for n in (0, 1, 2, 9)}
    assert pairs[0] == [0, 1, 2, 3, 4, 5]
    assert pairs[1] == [0, 1, 2, 4, 4, 5]
    assert pairs[2] == pairs[9] == [2, 1, 2, 4, 4, 5]


def test_sums_over_sets():
    home = torch.tensor([[[1, 1, 2, 1]]])
    x = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    assert over_set(x, home).tolist() == [[[11.0, 11.0, 4.0, 11.0]]]
    assert_close(log_over_set(x.log() + 200, home), over_set(x, home).log() + 200)
    assert log_over_set(torch.full((1, 1, 2), -torch.inf), torch.zeros(1, 1, 2, dtype=torch.int64)).isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorb_against_a_loop(dtype):
    view = random_view(B=2, H=2, T=23, left_pad=(0, 6), seed=2, dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    taking = (torch.rand(2, 2, 23, generator=rng) < 0.3) & view.valid
    taking[..., -1] = True
    home, alike = nearest(view.valid & ~taking, taking, view.keys)
    home = torch.where(alike > 0.2, home, torch.arange(23))
    weight, values = (torch.rand(2, 2, 23, generator=rng) for _ in range(2))
    after = view.apply(absorb(view, home, weight, values))
    for b, h, slot in taking.nonzero().tolist():
        members = (home[b, h] == slot) & view.valid[b, h]
        for old, new, share in ((view.keys, after.keys, weight), (view.values, after.values, values)):
            if members.sum() == 1:
                assert torch.equal(new[b, h, slot], old[b, h, slot])
            else:
                total = (share[b, h, members][:, None] * old[b, h, members].float()).sum(0)
                assert_close(new[b, h, slot].float(), total, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    assert torch.equal(after.keys[~taking], view.keys[~taking])  # a token that leaves is left alone


def test_counts_add_up_and_padding_counts_for_nothing():
    view = random_view(B=2, T=6, left_pad=(0, 2))
    home = torch.tensor([0, 1, 3, 3, 5, 5]).expand(2, 1, 6)
    mass = counted(view, home)[LOG_MASS].exp()
    assert_close(mass[:, 0, [3, 5]], torch.full((2, 2), 2.0))
    assert (mass[:, 0, :2] == 1).all()


class Turning:
    """RoPE of one pair of numbers, a tenth of a radian for each position."""

    def shift(self, x, steps):
        angle = steps.float()[..., None] * 0.1
        return torch.cat(
            [x[..., :1] * angle.cos() - x[..., 1:] * angle.sin(), x[..., :1] * angle.sin() + x[..., 1:] * angle.cos()],
            -1,
        ).to(x.dtype)


def test_rotated_and_unrotated_keys():
    """Two tokens with equal keys before RoPE, ten positions apart: as stored they shrink, turned back they do not."""
    still = torch.zeros(1, 1, 11, 2)
    still[..., 0] = 1.0
    rope, positions = Turning(), torch.arange(11).expand(1, 1, 11)
    keys = rope.shift(still, positions)
    view = prompt_view(torch.zeros_like(keys), keys, keys, rope=rope)
    home = torch.arange(11).repeat(1, 1, 1)
    home[..., 0] = 10
    half = torch.full((1, 1, 11), 0.5)
    shrunk = view.apply(absorb(view, home, half)).keys[0, 0, 10]
    assert shrunk.norm().item() == pytest.approx(math.cos(0.5), abs=1e-6)
    assert_close(shrunk / shrunk.norm(), keys[0, 0, 5], atol=1e-6, rtol=0)  # and points half way
    whole = view.apply(absorb(view, home, half, rope=rope_for(view, "unrotated"))).keys[0, 0, 10]
    assert_close(whole, keys[0, 0, 10], atol=1e-6, rtol=0)
    assert rope_for(view, "rotated") is None
    with pytest.raises(ValueError, match="frame='unrotated' needs the model's RoPE"):
        rope_for(random_view(), "unrotated")


# -- Amend ---------------------------------------------------------------------------------------------------


class Doubling(Method):
    """At a prompt and at every token: the third token from the end has its value doubled, its key negated."""

    def __init__(self, whole: bool):
        self.whole = whole

    def after_prefill(self, view):
        slot = (view.rank == view.count[..., None] - 3) & view.valid
        if self.whole:
            keys = torch.where(slot[..., None], -view.keys, view.keys)
            values = torch.where(slot[..., None], 2 * view.values, view.values)
            return Rewrite(Chunk(keys, values, view.valid, view.columns))
        slots = torch.where(slot.any(-1, keepdim=True), slot.byte().argmax(-1, keepdim=True), -1)
        index = slots.clamp(min=0)[..., None].expand(*slots.shape, view.keys.shape[-1])
        return Amend(slots, -view.keys.gather(2, index), 2 * view.values.gather(2, index))

    after_decode = after_prefill


@pytest.mark.parametrize("chunks", [[9, 1, 1, 1], [2, 1, 5, 1], [1] * 6])
def test_amend_is_rewrite_of_a_few(chunks):
    view = random_view(B=2, H=2, G=2, T=13, seed=3)
    tensors = view.queries.states, view.keys, view.values, chunks
    expected, outs = run(Doubling(True), *tensors)
    got, ours = run(Doubling(False), *tensors)
    for out, one in zip(ours, outs, strict=True):
        assert_close(out, one)
    one, two = (cache.stored.tokens()[0] for cache in (expected, got))
    assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
    assert torch.equal(one.positions, two.positions)


def test_a_fork_keeps_what_it_had():
    view = random_view(B=1, H=2, T=40, seed=3)
    cache, _ = run(Doubling(False), view.queries.states, view.keys, view.values, [38])
    before = cache.stored.tokens()[0].keys.clone()
    fork = cache.fork(cache.rows.fork())
    here = slice(38, 39)
    q, k, v = (x[:, :, here] for x in (view.queries.states, view.keys, view.values))
    fork.attend(q, k, v, None, 0.3, Plan(prefill=False))
    assert torch.equal(cache.stored.tokens()[0].keys, before)
    assert not torch.equal(fork.stored.tokens()[0].keys[:, :, :38], before)


class Split(Doubling):
    """The same, with every other token of the prompt in a segment of its own."""

    def after_prefill(self, view):
        return Store(Dense(torch.float32), view.rank % 2 == 0)


def test_amend_over_several_segments():
    view = random_view(B=1, H=2, T=12, seed=3)
    tensors = view.queries.states, view.keys, view.values
    outs = []
    for whole in (True, False):
        cache, _ = run(Split(whole), *tensors, [8, 1, 1, 1])
        outs.append(cache.stored.tokens()[0])
    assert torch.equal(outs[0].keys, outs[1].keys) and torch.equal(outs[0].values, outs[1].values)


def test_amend_of_nothing_and_what_follows_it():
    view = random_view(T=6)
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    assert view.apply(Amend(none)) is view
    slots = torch.tensor([[[2, -1]]])
    after = view.apply(Amend(slots, values=torch.ones(1, 1, 2, 8))).apply(Keep(view.rank > 0))
    assert (after.values[0, 0, 2] == 1).all() and torch.equal(after.keys, view.keys)
    assert torch.equal(after.values[0, 0, 3:], view.values[0, 0, 3:]) and not after.valid[0, 0, 0]
    assert after.column_sums()[0, 0, 0] == 0  # worked out anew
