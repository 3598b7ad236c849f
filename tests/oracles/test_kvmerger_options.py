"""KVMerger's options of ours: keys before RoPE, links that compete over heads, eviction first, weights by attention."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kvfold.formats import LOG_MASS
from kvfold.methods.kvmerger import KVMerger
from kvfold.scores.reach import reach
from kvfold.views import LayerView
from views import prompt_view, random_view

PLAIN = {"recent": 0.0, "heavy": 0.0, "skip": ()}


def merged(method: KVMerger, view: LayerView) -> LayerView:
    decision = method.after_prefill(view)
    return view if decision is None else view.apply(decision)


class Turn:
    """RoPE of two pairs of dimensions."""

    def shift(self, x, steps):
        angle = steps[..., None] * torch.tensor([1.0, 0.1])
        first, second = x[..., :2], x[..., 2:]
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.cat(turned, -1)


def test_equal_keys_before_rope_fold_without_a_change():
    """Four tokens of one un-rotated key: as rotated they differ, and their mean is nobody's key."""
    rope = Turn()
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(1, 1, 5, 4, generator=generator).repeat_interleave(torch.tensor([1, 1, 4, 1, 1]), 2)
    keys = rope.shift(kinds, torch.arange(8).expand(1, 1, 8))
    view = prompt_view(torch.randn(1, 1, 8, 4, generator=generator), keys, torch.randn(1, 1, 8, 4), rope=rope)
    turned, plain = (merged(KVMerger(budget=5, frame=frame, **PLAIN), view) for frame in ("unrotated", "rotated"))
    here = turned.valid[0, 0]
    assert here.sum() == 5 and turned.columns[LOG_MASS][0, 0][here].exp().max() == pytest.approx(4.0)
    alone = turned.columns[LOG_MASS][0, 0] == 0.0
    assert torch.equal(turned.keys[0, 0][here & alone], keys[0, 0][here & alone])
    assert_close(turned.keys[0, 0][here], keys[0, 0][here], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain.keys[plain.valid], keys[plain.valid], atol=1e-2)
    with pytest.raises(ValueError, match="frame='unrotated'"):
        KVMerger(budget=5, frame="unrotated", **PLAIN).after_prefill(random_view(T=20))


@pytest.mark.parametrize("threshold", [None, 0.99])
def test_links_compete_over_the_heads_of_a_layer(threshold):
    """A head whose keys are all alike gives what another, of keys that stand at right angles, would have to."""
    keys = torch.stack([torch.ones(8, 8) + 0.001 * torch.arange(8)[:, None] * torch.eye(8)[0], torch.eye(8)])[None]
    view = prompt_view(torch.zeros(1, 2, 8, 8), keys, torch.randn(1, 2, 8, 8))
    options = {"threshold": threshold, **PLAIN}
    even, adaptive = (merged(KVMerger(budget=5, heads=heads, **options), view) for heads in ("even", "adaptive"))
    assert even.count.tolist() == [[5 if threshold is None else 1, 5]]
    assert adaptive.count.tolist() == [[2 if threshold is None else 1, 8]]
    assert torch.equal(adaptive.values[0, 1], view.values[0, 1])
    few = merged(KVMerger(budget=2, heads="adaptive", **PLAIN), prompt_view(torch.zeros(1, 2, 8, 8), keys, keys))
    assert few.count.tolist() == [[1, 3]]


@pytest.mark.parametrize(("heads", "budget"), [("even", 13), ("adaptive", 13), ("adaptive", 40)])
def test_the_least_attended_go_before_the_rest_folds(heads, budget):
    view = random_view(B=2, H=2, G=2, T=60, D=8, left_pad=(0, 17), seed=4)
    plain = merged(KVMerger(budget=budget, heads=heads, recent=0.1, heavy=0.05, skip=()), view)
    half, all_ = (
        merged(KVMerger(budget=budget, heads=heads, evict=share, recent=0.1, heavy=0.05, skip=()), view)
        for share in (0.5, 1.0)
    )
    asked = view.budget(budget)
    for after in (plain, half, all_):
        assert torch.equal(after.count.sum(1), asked.sum(1)) and (
            heads == "adaptive" or torch.equal(after.count, asked)
        )
    here = all_.valid
    assert torch.equal(all_.values[here], view.values[here]) and not all_.columns[LOG_MASS][here].any()
    need = view.count - asked
    assert_close((half.columns[LOG_MASS].exp() * half.valid).sum(-1), (view.count - need // 2).float())
    importance = view.column_sums()
    dropped = view.valid & ~here
    for row in range(2):
        for head in range(2):
            kept = importance[row, head][here[row, head]]
            assert (kept < importance[row, head][dropped[row, head]].max()).sum() <= 6  # those that are recent


def test_values_by_the_mean_attention_that_their_tokens_got():
    view = random_view(B=1, H=2, G=2, T=40, D=8, seed=6)
    after = merged(KVMerger(budget=9, mass="attended", recent=0.1, heavy=0.05, skip=()), view)
    sums, weight = view.column_sums(), view.column_sums() / reach(view)
    same = merged(KVMerger(budget=9, recent=0.1, heavy=0.05, skip=()), view)
    assert torch.equal(after.valid, same.valid)
    mixed = 0
    for head in range(2):
        slots = after.valid[0, head].nonzero()[:, 0].tolist()
        counts = same.columns[LOG_MASS][0, head].exp().round().long()
        start = 0
        for slot in slots:
            members = torch.arange(start, start + int(counts[slot]))
            start += int(counts[slot])
            assert slot == members[sums[0, head, members].argmax()]
            share = weight[0, head, members] / weight[0, head, members].sum()
            assert_close(after.values[0, head, slot], share @ view.values[0, head, members], atol=1e-5, rtol=1e-4)
            mass = (weight[0, head, members].sum() / weight[0, head, slot]).log()
            assert_close(after.columns[LOG_MASS][0, head, slot], mass, atol=1e-5, rtol=1e-4)
            distance = (view.keys[0, head, members] - view.keys[0, head, slot]).norm(dim=-1)
            sigma = distance.mean().clamp(min=1e-6) / 2**0.5
            kernel = torch.exp(-(distance**2) / (2 * sigma**2)) * share
            assert_close(after.keys[0, head, slot], F.normalize(kernel, p=1.0, dim=0) @ view.keys[0, head, members],
                         atol=1e-5, rtol=1e-4)  # fmt: skip
            mixed += len(members) > 1
        assert start == 40
    assert mixed


def test_options(unchecked):
    for options, message in (
        ({"frame": "turned"}, "frame='turned'"), ({"heads": "all"}, "heads='all'"), ({"evict": 1.5}, "evict=1.5"),
        ({"mass": "none"}, "mass='none'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            KVMerger(**options)
