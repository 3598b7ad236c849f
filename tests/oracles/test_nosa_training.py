"""NOSA's training: what it takes its losses of is what a cache reads, and it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.calibration import importance as training
from kvfold.formats import LOG_MASS, Chunk
from kvfold.methods.nosa import NOSA, Importance
from kvfold.selectors import Lasting
from models import subject, tokens
from views import random_view

SMALL = NOSA(60, block=8, window=4, stride=2, sinks=8, local=16, calibration="made up.safetensors")
PLACES = torch.tensor([61, 100, 127, 141])


def view_of(name: str = "llama"):
    views = []
    cache = kvfold.Cache(subject(name), "full")
    with cache.observed(views.append), torch.no_grad():
        subject(name)(tokens(150)["input_ids"], past_key_values=cache)
    return views[1]


def random_heads(view) -> Importance:
    h, width = view.heads, view.heads * view.values.shape[-1]
    return Importance(torch.randn(h, width, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize("lasts", [True, False])
def test_it_reads_what_a_cache_reads(lasts):
    """The blocks of each query, by the index and the selection of a cache that holds what stands before it."""
    view, lasting = view_of(), Lasting(0.25) if lasts else None
    heads = random_heads(view)
    asked = training.asked_of(view, PLACES, SMALL, lasting)
    got = training.chosen(asked, training.pooled(asked, heads.slope(view.values)[0])) if lasts else asked.read
    selection = training.choice(SMALL, lasts, lasting)
    for n, place in enumerate(PLACES.tolist()):
        spec = kvfold.formats.Spec.of(view.tokens, group=2)
        index, upto = selection.index.open(spec), slice(0, place + 1)
        tokens_before = Chunk(
            view.keys[:, :, upto], view.values[:, :, upto], view.valid[..., upto],
            {"position": view.positions[..., upto], LOG_MASS: heads(view.values)[..., upto]},
        )  # fmt: skip
        index.extend(tokens_before, np.zeros((1, 2), dtype=np.int64))
        q = view.queries.states[:, :, place].view(1, 2, 2, -1)
        chosen, _ = selection.choose(index, q, np.full((1, 2), place + 1), np.array([place + 1]))
        want = torch.from_numpy(chosen.mask[0, :, 0])
        assert torch.equal(got[:, n, : want.shape[-1]], want) and not got[:, n, want.shape[-1] :].any()
        assert (want.sum(-1) == 7).all()


@torch.no_grad()
def test_the_losses_by_slow_loops():
    view = view_of()
    heads, module = random_heads(view), view.place.module
    asked = training.asked_of(view, PLACES, SMALL, Lasting(0.25))
    ranking, error = training.losses(asked, heads, module)
    e, worth = heads(view.values)[0], training.pooled(asked, heads.slope(view.values)[0])
    read, rows, total, mass = training.chosen(asked, worth), [], 0.0, 0.0
    for n, place in enumerate(PLACES.tolist()):
        outs = []
        for head in range(4):
            kv, q = head // 2, view.queries.states[0, head, place]
            logits = view.keys[0, kv, : place + 1] @ q * view.place.scale
            full = logits.softmax(-1)
            slots = [t for t in range(place + 1) if read[kv, n, t // 8]]
            few = (logits + e[kv, : place + 1])[slots].softmax(-1)
            outs.append((few @ view.values[0, kv, slots], full @ view.values[0, kv, : place + 1]))
            left = asked.left[kv, n].nonzero()[:, 0].tolist()
            ways = worth[kv, n, left].log_softmax(-1)
            for block, way in zip(left, ways.tolist(), strict=True):
                given = float(full[8 * block : 8 * block + 8].sum())
                total, mass = total - given * way, mass + given
        rows.append([torch.cat(side) for side in zip(*outs, strict=True)])
    got, want = (module.o_proj(torch.stack(side)) for side in zip(*rows, strict=True))
    assert_close(float(error), float((got - want).square().mean() / want.square().mean()), atol=1e-5, rtol=1e-4)
    assert_close(float(ranking), total / mass, atol=1e-5, rtol=1e-4)


def test_it_learns_which_blocks_are_looked_at():
    """Tokens of two blocks get nearly all attention, and their values say so: those blocks are read then."""
    view = random_view(B=1, H=2, G=2, T=160, D=8, left_pad=())
    k, v, q = view.keys.clone(), view.values.clone(), view.queries.states.clone()
    k[..., 0], q[..., 0] = 0.0, 6.0
    for block in (5, 9):
        k[:, :, 8 * block : 8 * block + 8, 0] = 4.0
        v[:, :, 8 * block : 8 * block + 8, 0] += 4.0
    tokens_there = Chunk(k, v, view.valid, view.tokens.columns)
    view = replace(view, tokens=tokens_there, queries=replace(view.queries, states=q), memo={})
    trainer, places = training.ImportanceTrainer([view], rate=0.05), torch.arange(130, 160)
    asked = training.asked_of(view, places, SMALL, Lasting(0.25))
    asked = replace(asked, read=asked.read & ~torch.isin(torch.arange(20), torch.tensor([5, 9])))
    asked = replace(asked, left=asked.left | torch.isin(torch.arange(20), torch.tensor([5, 9])))
    found = [trainer.learn(view, asked) for _ in range(60)]
    assert found[-1][0] < 0.75 * found[0][0] and found[-1][1] < 0.1 * found[0][1]
    worth = training.pooled(asked, trainer.heads(0).slope(v)[0])
    assert training.chosen(asked, worth)[:, :, [5, 9]].all()
    data = trainer.data()
    assert data["delta"].shape == (1, 2, 16) and (data["scale"] >= training.FLOOR).all()
