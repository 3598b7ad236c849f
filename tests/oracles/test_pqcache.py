"""PQCache against its card: codes and what they say, sizes, and a codebook that belongs to its row."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.methods.pqcache import PQCache
from kvfold.selectors import Products, Proportions, Selection, Vote
from kvfold.selectors.clusters import drawn, kmeans, nearest
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, grow, reference, subject, tokens

D = 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunk(keys: torch.Tensor, start: int = 0) -> Chunk:
    b, h, t, _ = keys.shape
    places = torch.arange(start, start + t, dtype=torch.int32).expand(b, h, t)
    return Chunk(keys, keys, torch.ones(b, h, t, dtype=torch.bool), {POSITION: places})


def spec(b: int, h: int, d: int = D, layer: int = 0) -> Spec:
    return Spec(b, h, d, d, torch.float32, torch.device("cpu"), layer=layer, group=2)


def learned(keys: torch.Tensor, recipe: Products, layer: int = 0):
    """An index that was fitted to all of keys (B, H, T, D) but the newest."""
    b, h, _, d = keys.shape
    index = recipe.open(spec(b, h, d, layer))
    index.extend(chunk(keys), np.zeros((b, h), dtype=np.int64))
    index.learn(lambda: chunk(keys), np.ones((b, h), dtype=bool))
    return index


def full(value: int, b: int = 1, h: int = 1) -> np.ndarray:
    return np.full((b, h), value)


def chosen_of(index, q: torch.Tensor, recipe: Products, budget: int, always=None) -> np.ndarray:
    b, h, n, _ = index.held.shape
    selection = Selection(recipe, budget, Vote("sum", softmax=True), always or Proportions(recipe.sinks))
    return selection.choose(index, q, full(n, b, h), np.full(b, n))[0].mask


def test_oracle_1_enough_centroids_are_exact():
    """As many as there are different sub-vectors: codes say q . k, and what is read is the exact top."""
    recipe, rng = Products(2, 4, sinks=2, iterations=40), torch.Generator().manual_seed(0)
    some = random(2, 16, D // 2, seed=1)
    ids = torch.stack([torch.cat([torch.randperm(16, generator=rng), torch.randint(16, (64,), generator=rng)])] * 2, -1)
    ids[:, 1] = ids[torch.randperm(80, generator=rng), 1]
    keys = torch.cat([some[part, ids[:, part]] for part in range(2)], -1)[None, None]
    index, q = learned(keys, recipe), random(1, 1, 2, D, seed=3)
    exact = q @ keys.mT
    assert_close(index.scores(q, full(80))[..., 2:79], exact[..., 2:79], atol=1e-5, rtol=0)
    read = chosen_of(index, q, recipe, 24)
    first, last = 2, (23 - 2) // 2  # sinks; recent ones beside the newest
    between = slice(first, 79 - last)
    worth = (exact[..., between] / D**0.5).softmax(-1).sum(2)[0, 0]
    best = (worth.topk(23 - first - last).indices + first).tolist()
    assert read[0, 0, 0].nonzero()[0].tolist() == sorted([0, 1, *best, *range(79 - last, 80)])


@pytest.mark.parametrize("length", [1032, 1033, 1500])
def test_oracle_2_sizes(length):
    """32 sinks, 50 recent, the new token, and 50 that are chosen: at every step the same 133."""
    recipe = Products()
    index, q = learned(random(1, 2, length, D), recipe), random(1, 2, 2, D, seed=1)
    selection = PQCache(133).selection(None)
    read = selection.choose(index, q, full(length, 1, 2), np.array([length]))[0].mask
    assert read.sum(-1).tolist() == [[[133], [133]]]
    assert read[..., :32].all() and read[..., -51:].all() and (read[..., 32:-51].sum(-1) == 50).all()
    few = PQCache(0.1).selection(None).choose(index, q, full(length, 1, 2), np.array([length]))[0].mask
    assert (few.sum(-1) == length // 10).all()  # this library's rule: all of it within the budget


def test_oracle_3_one_part_is_plain_quantisation_and_channels_of_a_part_have_no_order():
    keys, q = random(1, 1, 200, D), random(1, 1, 2, D, seed=1)
    plain = Products(1, 3, sinks=0)
    index = learned(keys, plain)
    centres = index.books[0, 0, 0]
    near = torch.cdist(keys[0, 0], centres).argmin(-1)
    assert torch.equal(index.held[0, 0, :200, 0].long(), near)
    assert_close(index.scores(q, full(200))[0, 0], q[0, 0] @ centres[near].T, atol=1e-5, rtol=0)
    within, across = [2, 0, 3, 1, 7, 4, 6, 5], [0, 4, 1, 5, 2, 6, 3, 7]
    recipe = Products(2, 3, sinks=0)
    first = learned(keys, recipe).scores(q, full(200))
    same = learned(keys[..., within], recipe).scores(q[..., within], full(200))
    other = learned(keys[..., across], recipe).scores(q[..., across], full(200))
    assert_close(same, first, atol=1e-4, rtol=0)
    assert not torch.allclose(other, first, atol=1e-2)


@pytest.mark.parametrize("recent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_oracle_4_a_budget_of_all_there_is_is_full_attention(recent, family):
    prompt, said = tokens(120, 83), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), PQCache(1.0, recent=recent)), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


def test_until_there_are_more_keys_than_centroids_everything_is_read():
    """32 sinks, 64 centroids: 97 keys are fitted to when the 98th token asks."""
    model, method = subject("llama"), PQCache(20)
    for length, exact in ((96, True), (97, False)):
        prompt, said = tokens(length), forced(1, 1)
        dense, got = (follow(model, kvfold.Cache(model, m), *prompt.values(), said) for m in ("full", method))
        assert torch.allclose(dense, got, atol=1e-4) == exact


def test_all_heads_of_a_group_are_asked():
    """A sum of softmaxes, not of products: one head with large norms does not decide."""
    recipe = Products(2, 4, sinks=0, iterations=40)
    keys = torch.zeros(1, 1, 40, D)
    keys[..., :30, 0], keys[..., 5, 0], keys[..., 6, 0], keys[..., 7, 4] = -1.0, 3.0, 2.9, 3.0
    q = torch.zeros(1, 1, 2, D)
    q[..., 0, 0], q[..., 1, 4] = 100.0, 4.0
    read = chosen_of(learned(keys, recipe), q, recipe, 3, Proportions(0, 0.0))
    assert read[0, 0, 0].nonzero()[0].tolist() == [5, 7, 39]


def test_a_codebook_is_fitted_once_and_holds():
    """What comes later gets codes of it, and one by one the same as all at once."""
    keys, recipe = random(2, 2, 90, D), Products(2, 3, sinks=4)
    index = learned(keys[:, :, :60], recipe)
    books, one = index.books.clone(), index.select(np.arange(2))
    index.extend(chunk(keys[:, :, 60:], 60), full(60, 2, 2))
    for t in range(60, 90):
        one.extend(chunk(keys[:, :, t : t + 1], t), full(t, 2, 2))
        one.learn(lambda: chunk(keys), np.ones((2, 2), dtype=bool))
    assert torch.equal(index.held[:, :, :90], one.held[:, :, :90]) and torch.equal(one.books, books)
    part, _ = nearest(keys[0, 0, :, :4], books[0, 0, 0])
    assert torch.equal(index.held[0, 0, :90, 0].long(), part)


def test_what_is_fitted_is_of_the_row_alone():
    """Another batch, another order: the same codebook. Another seed, layer or head: another one."""
    keys, recipe = random(3, 2, 80, D), Products(2, 3, sinks=4)
    whole = learned(keys, recipe)
    for row in range(3):
        assert torch.equal(learned(keys[row : row + 1], recipe).books[0], whole.books[row])
    same = keys[:1, :1].expand(1, 2, 80, D).contiguous()
    heads = learned(same, recipe).books[0]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(learned(same, recipe, layer=1).books[0], heads)
    assert not torch.equal(learned(same, Products(2, 3, sinks=4, seed=1)).books[0], heads)
    torch.manual_seed(5)
    assert torch.equal(learned(keys, recipe).books, whole.books)


def segment(keys: torch.Tensor, recipe: Products, budget: int = 12):
    form = Indexed(Dense(page_size=4), Selection(recipe, budget, Vote("sum", softmax=True), Proportions(recipe.sinks)))
    made = form.open(spec(*keys.shape[:2]))
    made.append(chunk(keys), even=True)
    return made


def ask(made, keys: torch.Tensor, at: int):
    b, h, _ = keys.shape
    q, one = random(b, h, 2, 1, D, seed=at), keys[:, :, None]
    made.step(q, one, one, torch.full((b, 1), at), 0.3, weights=False)


def test_a_codebook_goes_with_the_text_that_it_was_fitted_to():
    """A crop within it leaves what would be there had those tokens never come; one behind it leaves it alone."""
    keys, recipe = random(2, 2, 70, D), Products(2, 3, sinks=2)
    made, short = segment(keys[:, :, :60], recipe), segment(keys[:, :, :50], recipe)
    for x, start in ((made, 60), (short, 50)):
        for at in range(start, start + 5):
            ask(x, keys[:, :, at], at)
        assert (x.index.learned == start).all()
    books = made.index.books.clone()
    made.cropped(np.array([60, 60]))
    made.truncate(full(60, 2, 2))
    assert torch.equal(made.index.books, books) and (made.index.learned == 60).all()
    made.cropped(np.array([50, 60]))
    made.truncate(np.array([[50, 50], [60, 60]]))
    assert made.index.learned.tolist() == [[0, 0], [60, 60]] and not made.index.held[0].any()
    for row, at in ((0, 50), (1, 60)):
        alone = made.select(np.array([row]))
        ask(alone, keys[row : row + 1, :, at], at)
        assert torch.equal(alone.index.books[0], short.index.books[0] if row == 0 else books[1])


def test_what_an_eviction_leaves_keeps_its_codebook():
    keys, recipe = random(1, 2, 70, D), Products(2, 3, sinks=2)
    made = segment(keys[:, :, :60], recipe)
    ask(made, keys[:, :, 60], 60)
    books, codes, (valid, _) = made.index.books.clone(), made.index.held.clone(), made.columns()
    stays = valid & (torch.arange(valid.shape[-1]) % 3 != 0)
    made.keep(stays, {})
    assert torch.equal(made.index.books, books) and (made.index.learned == 60).all()
    assert torch.equal(made.index.held[:, :, : int(stays[0, 0].sum())], codes[:, :, :61][:, :, stays[0, 0, :61]])


def test_a_row_that_reads_all_is_not_fitted_yet():
    """Of a batch whose other row chooses."""
    model, prompt = subject("llama"), tokens(150, 60)
    cache = kvfold.Cache(model, PQCache(80, bits=4))
    feed(model, cache, *prompt.values())
    feed(model, cache, forced(2, 1), grow(prompt["attention_mask"]))
    for core in cache.paged:
        index = core.stored.segments[0][1].index
        assert (index.learned[0] == 150).all() and not index.learned[1].any()
        assert index.held[0].any() and not index.held[1].any()


def test_kmeans_is_lloyds_algorithm():
    """Against a loop; and a centre of nothing goes where the error is largest."""
    points = random(1, 50, 3)
    first = drawn(50, 6, 1, 2)[None]
    assert len(set(first[0].tolist())) == 6 and torch.equal(drawn(50, 6, 1, 2), first[0])
    centres = points[0, first[0]].clone()
    for _ in range(7):
        which = torch.tensor([int(((p - centres) ** 2).sum(-1).argmin()) for p in points[0]])
        centres = torch.stack([points[0, which == k].mean(0) for k in range(6)])
    assert_close(kmeans(points, first, 7)[0], centres, atol=1e-5, rtol=0)
    twice = torch.tensor([[0.0], [0.0], [1.0], [5.0], [5.1]])[None]
    found = kmeans(twice, torch.tensor([[0, 1, 2]]), 20)
    assert_close(found[0].flatten().sort().values, torch.tensor([0.0, 1.0, 5.05]))


def test_a_key_of_unequal_parts_is_refused():
    with pytest.raises(ValueError, match="parts=3 of a key must be equal, and layer 0 has 8"):
        Products(3).open(spec(1, 1))


def test_files_of_other_codes_are_refused():
    index = learned(random(1, 1, 80, D), Products(2, 3, sinks=4))
    state, recipe = index.state(), index.recipe
    recipe.check(spec(1, 1), state, full(80))
    bad = {**state, "held": torch.full_like(state["held"], 8)}
    with pytest.raises(ValueError, match="index has code 8 of 8"):
        recipe.check(spec(1, 1), bad, full(80))
    with pytest.raises(ValueError, match="index="):
        recipe.check(spec(1, 1), {**state, "books": state["books"].double()}, full(80))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"budget": 0}, "budget=0"), ({"parts": 0}, "parts=0"), ({"bits": 9}, "bits=9"), ({"recent": 2.0}, "recent=2")],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        PQCache(**options)
