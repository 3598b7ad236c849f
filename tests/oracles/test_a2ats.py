"""A2ATS against its card: which vector stands for a key, what a query makes of it, and whose best are read."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.calibration.codebooks import factor
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.hf.rope import find_ropes
from kvfold.methods.a2ats import A2ATS, codebooks
from kvfold.selectors import Always, Codebook, Selection, Vectors, Vote
from kvfold.selectors.clusters import spread
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, grow, reference, subject, tokens

H, G, D = 2, 2, 16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(seed: int = 0) -> torch.Tensor:
    x = random(H, 50, D, seed=seed, dtype=torch.float64)
    return x.mT @ x


def spec(book: Codebook, rows: int = 1) -> Spec:
    rope = find_ropes(subject("llama"))[0]
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), rope=rope, group=G, artefact={"book": book})


def chunk(keys: torch.Tensor, start: int = 0) -> Chunk:
    """Keys (B, H, T, D) before RoPE, as the model would rotate them."""
    b, h, t, _ = keys.shape
    places = torch.arange(start, start + t, dtype=torch.int32).expand(b, h, t)
    turned = find_ropes(subject("llama"))[0].shift(keys, places)
    return Chunk(turned, turned, torch.ones(b, h, t, dtype=torch.bool), {POSITION: places})


def coded(keys: torch.Tensor, book: Codebook):
    index = Vectors("book").open(spec(book, len(keys)))
    index.extend(chunk(keys), np.zeros(keys.shape[:2], dtype=np.int64))
    return index


def full(value: int, b: int = 1) -> np.ndarray:
    return np.full((b, H), value)


def test_oracle_1_the_identity():
    """(k - c) H (k - c)' = |k L - c L|^2, and the nearest is another one than by Euclid."""
    h = moment()
    turn = torch.linalg.cholesky(h)
    k, c = random(H, 20, D, seed=1, dtype=torch.float64), random(H, 20, D, seed=2, dtype=torch.float64)
    by_moment = torch.einsum("htd,hde,hte->ht", k - c, h, k - c)
    assert_close(by_moment, ((k - c) @ turn).square().sum(-1), atol=0, rtol=1e-10)
    h = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
    turn, vectors = torch.linalg.cholesky(h), torch.tensor([[[0.0, 0.0], [1.0, 1.5]]])
    key = torch.tensor([[[[1.0, 0.0]]]])
    assert (key[0, 0] - vectors[0]).square().sum(-1).tolist() == [1.0, 2.25]
    assert ((key[0, 0] - vectors[0]) @ turn[0]).square().sum(-1).tolist() == [4.0, 2.25]
    plain = Codebook(torch.eye(2)[None], vectors, 2048)
    assert plain.codes(key).item() == 0 and Codebook(turn, vectors @ turn, 2048).codes(key).item() == 1


def test_oracle_2_a_codebook_of_the_keys_is_exact():
    """What is guessed is R_b q . k; of a token that stands b behind the query, that is its logit."""
    keys, distance = random(1, H, 40, D), 25
    turn = factor(moment())
    book = Codebook(turn, keys[0] @ turn, distance)
    index, q = coded(keys, book), random(1, H, G, D, seed=3)
    rope, seen = spec(book).rope, np.array([40])
    scores = index.scores(index.asks(q, seen), full(40))
    asked = rope.shift(q, torch.full((1, H, G), distance - 39, dtype=torch.int32))
    assert_close(scores, asked @ keys.mT, atol=1e-3, rtol=0)
    attends = chunk(keys).keys
    assert_close(scores[..., 39 - distance], (q @ attends.mT)[..., 39 - distance], atol=1e-3, rtol=0)
    assert not torch.allclose(scores[..., 30], (q @ attends.mT)[..., 30], atol=1e-2)


def test_oracle_3_without_a_moment_it_is_plain_quantisation():
    keys, vectors = random(1, H, 60, D), random(H, 12, D, seed=1)
    index = coded(keys, Codebook(torch.eye(D).expand(H, D, D), vectors, 2048))
    assert torch.equal(index.held[0, :, :60, 0].long(), torch.cdist(keys[0], vectors).argmin(-1))
    assert_close(Codebook(torch.eye(D).expand(H, D, D), vectors, 2048).vectors, vectors)


@pytest.mark.parametrize("method", ["a2ats(budget=64)", "a2ats(budget=1.0)"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_oracle_4_a_budget_of_all_there_is_is_full_attention(family, method):
    prompt, said = tokens(40, 23), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), method), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_oracle_4_and_5_the_union_of_what_each_head_reads(group):
    """30 a head are 30 to 30 G together: of that many units the worth of any head's best 30 is highest."""
    scores, m = random(1, 1, group, 1000), int(0.03 * 1000)
    worth = Vote("union").worth(scores, torch.ones(1, 1, 1000, dtype=torch.bool), D)
    assert worth.shape == (1, 1, 1, 1000)
    union = set(scores[0, 0].topk(m).indices.flatten().tolist())
    assert m <= len(union) <= group * m
    assert set(worth.flatten().topk(len(union)).indices.tolist()) == union
    same = Vote("union").worth(scores[:, :, :1].expand(1, 1, 4, 1000), torch.ones(1, 1, 1000, dtype=torch.bool), D)
    assert same.flatten().topk(m).indices.tolist() == scores[0, 0, 0].topk(m).indices.tolist()


def test_the_union_of_units_that_are_asked_about_alone():
    scores, asked = torch.tensor([[[[9.0, 1, 5, 4], [0, 8, 2, 3]]]]), torch.tensor([[[False, True, True, True]]])
    worth = Vote("union").worth(scores, asked, D)
    assert worth[..., 0].item() == -torch.inf and worth.flatten()[1:].tolist() == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(("budget", "sinks", "window"), [(200, 8, 64), (40, 3, 17), (10, 1, 4)])
def test_sinks_and_window_are_in_the_budget(budget, sinks, window):
    """Half of it at most, in their proportion; the newest token is one of the window."""
    selection = kvfold.Cache(subject("llama"), A2ATS(budget)).method.selection(kvfold.views.Site(0, 0, (0,), 1))
    book = Codebook(torch.eye(D).expand(H, D, D), random(H, 12, D), 2048)
    index = coded(random(1, H, 500, D), book)
    read = selection.choose(index, random(1, H, G, D, seed=1), full(500), np.array([500]))[0].mask
    assert read.shape == (1, H, 1, 500) and (read.sum(-1) == budget).all()
    always = selection.always.units(1, full(500), np.array([budget]))
    assert always[0, 0, :250].sum() == sinks and always[0, 0, 250:].sum() == window and read[0, :, 0][always[0]].all()


def test_one_by_one_is_all_at_once():
    keys, turn = random(2, H, 45, D), factor(moment())
    book = Codebook(turn, random(H, 30, D, seed=1) @ turn, 2048)
    whole, grown = coded(keys, book), coded(keys[:, :, :0], book)
    for t in range(45):
        grown.extend(chunk(keys[:, :, t : t + 1], t), full(t, 2))
    assert torch.equal(grown.held[:, :, :45], whole.held[:, :, :45])


def test_a_step_reads_by_definition():
    keys, values, turn = random(1, H, 81, D), random(1, H, 81, D, seed=4), factor(moment())
    book = Codebook(turn, random(H, 30, D, seed=1) @ turn, 300)
    form = Indexed(Dense(), Selection(Vectors("book"), 20, Vote("union"), Always(2, 3)))
    held, given = form.open(spec(book)), chunk(keys)
    past = Chunk(given.keys[:, :, :80], values[:, :, :80], given.valid[..., :80], {POSITION: given.positions[..., :80]})
    held.append(past, even=True)
    q = random(1, H, G, 1, D, seed=5)
    out, *_ = held.step(q, given.keys[:, :, 80:], values[:, :, 80:], torch.tensor([[80]]), 0.25, weights=False)
    asked = held.spec.rope.shift(q[:, :, :, 0], torch.full((1, H, G), 300 - 80, dtype=torch.int32))
    for head in range(H):
        code = ((keys[0, head] @ turn[head])[:, None] - book.centres[head]).square().sum(-1).argmin(-1)
        stands = torch.linalg.solve(turn[head].T.double(), book.centres[head].T.double()).T.float()[code]
        guess = (asked[0, head] @ stands.T)[:, 2:77]
        best, number = set[int](), 0
        while len(best) < 14:  # 20 less 2 sinks, 3 recent ones and the newest
            number += 1
            order = torch.argsort(guess, dim=-1, descending=True, stable=True)  # of equal codes the earlier
            best = set((order[:, :number] + 2).flatten().tolist())
        if len(best) == 14:
            read = sorted({0, 1, *best, 77, 78, 79, 80})
            weights = (q[0, head, :, 0] @ given.keys[0, head, read].T * 0.25).softmax(-1)
            assert_close(out[0, head, :, 0], weights @ values[0, head, read], atol=1e-5, rtol=0)


def test_what_is_rewritten_gets_its_code_anew():
    """Files and crops: tests/test_selectors.py; of other codebooks: refused."""
    keys, book = random(1, H, 20, D), Codebook(torch.eye(D).expand(H, D, D).contiguous(), random(H, 12, D), 2048)
    index, recipe = coded(keys, book), Vectors("book")
    index.forget(full(20))
    state = index.state()
    recipe.check(spec(book), state, full(20))
    other = Codebook(book.turn, book.centres + 1, 2048)
    with pytest.raises(ValueError, match="codes of another codebook than 'book'"):
        recipe.check(spec(other), state, full(20))
    with pytest.raises(ValueError, match=r"index has codes \d+ to 12 of 12"):
        bad = state["held"].clone()
        bad[0, 0, 0] = 12
        recipe.check(spec(book), {**state, "held": bad}, full(20))


def test_centres_far_apart_are_drawn_first():
    """k-means++: of three clumps each gives one; the same key gives the same ones."""
    clumps = torch.cat([random(50, 3, seed=i) * 0.01 + 10 * torch.eye(3)[i] for i in range(3)])
    for key in range(5):
        assert sorted((spread(clumps, 3, key, 7) // 50).tolist()) == [0, 1, 2]
    assert torch.equal(spread(clumps, 9, 1), spread(clumps, 9, 1)) and len(set(spread(clumps, 9, 1).tolist())) == 9
    assert spread(torch.zeros(4, 2), 3, 0).numel() == 3


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="calibration of a2ats must have turn, centres and distance"):
        codebooks({"turn": torch.zeros(1, 2, 3, 4)})
    turn, centres = torch.eye(D).expand(1, H, D, D), torch.zeros(1, H, 4, D)
    with pytest.raises(ValueError, match="not finite, or of no moment"):
        codebooks({"turn": -turn, "centres": centres, "distance": torch.tensor([1])})
    with pytest.raises(ValueError, match="needs codebooks"):
        A2ATS().needs[0].of_layer(0, None)
    with pytest.raises(ValueError, match="is not what was measured"):
        Vectors("other").open(spec(Codebook(turn[0], centres[0], 2048)))


def test_a_row_goes_on_from_a_file(tmp_path):
    model, prompt, said = subject("llama"), tokens(90), forced(1, 6)
    cache = kvfold.Cache(model, "a2ats(budget=20)")
    mask = prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    cache.save(tmp_path / "cache.safetensors")
    again = kvfold.Cache.load(tmp_path / "cache.safetensors", model)
    for step in said.T:
        mask = grow(mask)
        one, two = (feed(model, each, step[:, None], mask) for each in (cache, again))
        assert torch.equal(one, two)


@pytest.mark.parametrize(("options", "said"), [({"budget": 0}, "budget=0"), ({"window": 0}, "window=0")])
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        A2ATS(**options)
