"""What a layer hands on to later ones of the same pass: nobody reads what another step, row or cache has chosen."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from delta_paper import METHOD, paper, six
from kvfold.formats import Chosen, Indexed
from kvfold.layer.layer import DENSE, KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.delta import Delta
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, grow, subject, tokens


def test_joined_rows_read_what_their_own_layers_chose():
    """Of one method, of two with other budgets and other layers, and of one that chooses nothing."""
    methods = [METHOD, METHOD, Delta(40, (0, 2), page=8), kvfold.parse("full")]
    texts, said = [tokens(n, seed=n) for n in (150, 90, 120, 60)], forced(4, 12)
    caches = [kvfold.Cache(six(), method) for method in methods]
    for cache, text in zip(caches, texts, strict=True):
        feed(six(), cache, *text.values())
    apart = [cache.fork() for cache in caches]
    for other in caches[1:]:
        caches[0].join(other)
    own = [text["attention_mask"] for text in texts]
    mask = torch.stack([torch.arange(150) >= 150 - n for n in (150, 90, 120, 60)]).long()
    for step in said.T:
        mask, own = grow(mask), [grow(each) for each in own]
        both = feed(six(), caches[0], step[:, None], mask)
        for row in range(4):
            alone = feed(six(), apart[row], step[row : row + 1, None], own[row])
            assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "pair",
    [
        ("mpcache(budget=0.6)", "mpcache(budget=0.6) | kivi(bits=4, residual=32)"),
        ("mpcache(budget=0.6)", "mpcache(budget=0.5) | fp8"),
        ("mpcache(budget=0.6)", "mpcache(budget=0.6, share=3)"),
        ("delta(budget=64)", "delta(budget=64) | fp8"),
    ],
)
def test_joined_rows_of_other_formats_read_what_their_own_layers_chose(pair):
    """What chooses is the same in both, and what is chosen is not."""
    model, said, caches, masks = subject("llama"), forced(2, 6), [], []
    for row, method in enumerate(pair):
        text = tokens(300, seed=row)
        caches.append(kvfold.Cache(model, method))
        feed(model, caches[-1], *text.values())
        masks.append(text["attention_mask"])
    apart = [cache.fork() for cache in caches]
    caches[0].join(caches[1])
    mask = torch.cat(masks)
    for step in said.T:
        mask, masks = grow(mask), [grow(each) for each in masks]
        both = feed(model, caches[0], step[:, None], mask)
        for row in range(2):
            alone = feed(model, apart[row], step[row : row + 1, None], masks[row])
            assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


def test_beams_are_the_papers():
    prompt, how = tokens(120, 90), {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    got = six().generate(**prompt, past_key_values=kvfold.Cache(six(), METHOD), **how)
    assert got.tolist() == paper().generate(**prompt, past_key_values=dynamic(paper()), **how).tolist()


def test_a_crop_leaves_nothing_of_what_was_chosen():
    prompt, said, other = tokens(150), forced(1, 8), forced(1, 16)[:, 8:]
    cache, fresh = kvfold.Cache(six(), METHOD), kvfold.Cache(six(), METHOD)
    want = follow(six(), fresh, *prompt.values(), other)
    assert torch.equal(follow(six(), cache, *prompt.values(), said)[:, 0], want[:, 0])
    cache.crop(150)
    mask = prompt["attention_mask"]
    for at, step in enumerate(other.T, 1):
        mask = grow(mask)
        assert_close(feed(six(), cache, step[:, None], mask)[:, -1], want[:, at], atol=1e-5, rtol=0)


def test_two_caches_in_turn_on_one_model():
    texts, said = [tokens(150, seed=1), tokens(140, seed=2)], forced(2, 8)
    want = [
        follow(six(), kvfold.Cache(six(), METHOD), *text.values(), said[i : i + 1]) for i, text in enumerate(texts)
    ]  # fmt: skip
    caches, masks = [kvfold.Cache(six(), METHOD) for _ in texts], [text["attention_mask"] for text in texts]
    for cache, text in zip(caches, texts, strict=True):
        feed(six(), cache, *text.values())
    for at in range(8):
        for i, cache in enumerate(caches):
            masks[i] = grow(masks[i])
            got = feed(six(), cache, said[i : i + 1, at : at + 1], masks[i])
            assert torch.equal(got[:, -1], want[i][:, at + 1])


def layer_alone(number: int) -> tuple[KVLayer, torch.Tensor, torch.Tensor]:
    """One layer of `METHOD` that has read 100 tokens by itself; its keys and values."""
    rng, rows = torch.Generator().manual_seed(number), Rows(METHOD)
    layer = KVLayer(rows, number, tuple(range(6)), 6)
    keys, values = (torch.randn(1, 2, 103, 8, generator=rng) for _ in range(2))
    layer.attend(torch.randn(1, 4, 100, 8, generator=rng), keys[:, :, :100], values[:, :, :100], None, 0.35, Plan(True))
    return layer, keys, values


@pytest.mark.parametrize("number", [2, 5])
def test_a_layer_by_itself_reads_everything(number):
    """Nobody has chosen for it in its pass, whatever was chosen in others."""
    layer, keys, values = layer_alone(number)
    rng, giver = torch.Generator().manual_seed(9), METHOD.selection(layer.site).of
    for at in range(100, 103):
        q, plan = torch.randn(1, 4, 1, 8, generator=rng), Plan(False)
        if at == 101:  # a pass in which somebody has: its first page and its last
            some = np.zeros((1, 1, 1, 13), dtype=bool)
            some[..., [0, 12]] = True
            plan.handed[DENSE] = {giver: (np.full((1, 2), 102), Chosen.of(some))}
        out = layer.attend(q, keys[:, :, at : at + 1], values[:, :, at : at + 1], None, 0.35, plan)
        read = [*range(8), *range(96, 102)] if at == 101 else range(at + 1)
        weights = (q.view(1, 2, 2, 8) @ keys[:, :, read].mT * 0.35).softmax(-1)
        assert_close(out.view(1, 2, 2, 8), weights @ values[:, :, read], atol=1e-5, rtol=0)


def test_a_choice_among_other_tokens_is_refused():
    layer, keys, values = layer_alone(4)
    plan = Plan(False)
    other = np.full((1, 2), 99), Chosen.of(np.ones((1, 1, 1, 13), dtype=bool))
    plan.handed[DENSE] = {METHOD.selection(layer.site).of: other}
    with pytest.raises(ValueError, match=r"layer 3 has chosen among \[\[99, 99.* holds \[\[101, 101\]\]"):
        layer.attend(torch.zeros(1, 4, 1, 8), keys[:, :, 100:101], values[:, :, 100:101], None, 0.35, plan)


def test_nothing_is_kept_beyond_a_pass(tmp_path):
    cache = kvfold.Cache(six(), METHOD)
    prompt = tokens(150, 120)
    full = kvfold.Cache(six(), "full")
    for each in (cache, full):
        follow(six(), each, *prompt.values(), forced(2, 3))
    read = sum(core.segments[0][1].seen.nbytes for core in cache.paged if isinstance(core.segments[0][0], Indexed))
    assert read == 5 * 2 * 8 and cache.nbytes == full.nbytes + read
    assert all(core.segments[0][1].choice is None for core in cache.paged[1:])
    cache.save(tmp_path / "it.safetensors")
    loaded, mask, steps = kvfold.Cache.load(tmp_path / "it.safetensors", six()), prompt["attention_mask"], forced(2, 7)
    for step in steps[:, 3:].T:
        mask = grow(mask) if mask.shape[1] > 150 else torch.nn.functional.pad(mask, (0, 4), value=1)
        assert torch.equal(feed(six(), cache, step[:, None], mask), feed(six(), loaded, step[:, None], mask))
