"""ThinK against a loop: a channel counts by the mean square of the last queries times that of the keys."""

import pytest
import torch

import kvfold
from kvfold.formats import Thin
from kvfold.formats.thin import CHANNELS
from kvfold.methods.think import ThinK
from models import dynamic, feed, follow, reference, subject, tokens
from views import prompt_view, random_view


def scored(view, window: int) -> list[list[list[float]]]:
    """The card's score in plain loops, (B, H, D)."""
    found, group = [], view.queries.states.shape[1] // view.heads
    for row in range(len(view.valid)):
        asked = [i for i in range(view.new) if view.queries.valid[row, i]][-window:]
        found.append([])
        for head in range(view.heads):
            held = [t for t in range(view.valid.shape[-1]) if view.valid[row, head, t]]
            found[row].append([])
            for d in range(view.keys.shape[-1]):
                q = [float(view.queries.states[row, head * group + g, i, d]) for g in range(group) for i in asked]
                k = [float(view.keys[row, head, t, d]) for t in held]
                found[row][head].append(sum(x * x for x in q) / len(q) * sum(x * x for x in k) / len(k))
    return found


def test_scores_against_a_loop():
    view = random_view(B=2, H=2, G=3, T=20, D=6, left_pad=(0, 15))
    for window in (1, 4, 32):
        torch.testing.assert_close(ThinK(window=window).scores(view), torch.tensor(scored(view, window)))


def test_scores_are_squared_norms_of_rank_one_products():
    """Their order is that of |Q_w[:, d] K[:, d]'|_F, and s * 32 * T is its square."""
    view = random_view(T=50, D=8)
    scores = ThinK().scores(view)[0, 0]
    q, k = view.queries.states[0, 0, -32:], view.keys[0, 0]
    norms = torch.stack([torch.linalg.matrix_norm(q[:, d : d + 1] @ k[:, d : d + 1].mT) for d in range(8)])
    torch.testing.assert_close(scores * 32 * 50, norms.square(), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.argsort(), norms.argsort())


def test_the_largest_keys_go_where_no_query_asks():
    q = torch.tensor([[1.0, 0, 2, 1], [1, 0, 0, 1]])[None, None]
    k = torch.tensor([[1.0, 9, 1, 0], [1, 9, 0, 3]])[None, None]
    view = prompt_view(q, k, k)
    assert ThinK().scores(view).tolist() == [[[1, 0, 1, 4.5]]]
    stored = ThinK(0.25, recent=0).after_prefill(view)
    assert stored.format == Thin(0.25) and stored.told[CHANNELS].tolist() == [[[True, False, True, True]]]


@pytest.mark.parametrize(("size", "ratio", "kept", "room"), [
    (128, 0.4, 77, 80), (64, 0.4, 39, 40), (64, 0.5, 32, 32), (18, 0.1, 17, 18), (16, 0.0, 16, 16), (4, 0.25, 3, 4),
])  # fmt: skip
def test_how_many_channels_stay(size, ratio, kept, room):
    from kvfold.formats import Spec

    spec = Spec(1, 1, size, size, torch.bfloat16, torch.device("cpu"))
    assert Thin(ratio).kept(size) == kept and Thin(ratio).planes(spec)["keys"].width == room


def parts(cache, layer: int = 0):
    """Tokens of each segment of a layer, by format."""
    return {type(form).__name__: segment for form, segment in cache.paged[layer].segments}


def test_what_a_prompt_leaves_and_what_comes_later():
    """All but the newest 8 lose the same channels, for each row and head; generated tokens keep theirs, and a further
    prompt prunes them in the channels that the first one chose."""
    model, prompt = subject("llama"), tokens(60, 43)
    cache, plain, views = kvfold.Cache(model, ThinK(0.4, recent=8, window=16)), kvfold.Cache(model, "full"), []
    with cache.observed(lambda view: views.append(view)):
        feed(model, cache, *prompt.values())
    feed(model, plain, *prompt.values())
    found, whole = parts(cache), plain.paged[0].segments[0][1].dense()
    assert found["Thin"].counts().tolist() == [[52, 52], [35, 35]] and (found["Dense"].counts() == 8).all()
    scores = torch.tensor(scored(views[0], 16))
    for row, length in enumerate((60, 43)):
        for head in range(2):
            kept = sorted(range(16), key=lambda d: -scores[row, head, d])[:10]
            mask = torch.zeros(16).index_fill(0, torch.tensor(kept), 1.0)
            thin, true = found["Thin"].dense(), whole.keys[row, head][whole.valid[row, head]]
            here = thin.valid[row, head]
            assert torch.equal(thin.keys[row, head][here], true[: length - 8] * mask)
            assert torch.equal(thin.values[row, head][here], whole.values[row, head][whole.valid[row, head]][:-8])
    chosen = found["Thin"].channels.clone()
    mask = prompt["attention_mask"]
    for step in range(3):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        feed(model, cache, torch.full((2, 1), 7 + step), mask)
    assert (parts(cache)["Dense"].counts() == 11).all()
    mask = torch.cat([mask, mask.new_ones(2, 5)], 1)
    feed(model, cache, torch.full((2, 5), 9), mask)
    found = parts(cache)
    assert torch.equal(found["Thin"].channels, chosen) and (found["Dense"].counts() == 8).all()
    assert found["Thin"].counts().tolist() == [[60, 60], [43, 43]]


def test_the_prompt_is_exact_and_pruning_nothing_is_the_full_cache():
    prompt, steps = tokens(60, 43), torch.arange(5, 11).view(2, 3)
    model = subject("llama")
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps)
    full = follow(model, kvfold.Cache(model, "full"), *prompt.values(), steps)
    for method in (ThinK(0.0), ThinK(0.06), ThinK(0.4, recent=60)):
        assert torch.equal(follow(model, kvfold.Cache(model, method), *prompt.values(), steps), full)
    some = follow(model, kvfold.Cache(model, ThinK(0.25, recent=8)), *prompt.values(), steps)
    torch.testing.assert_close(some[:, 0], truth[:, 0], atol=1e-4, rtol=0)
    assert 0 < (some[:, 1:] - truth[:, 1:]).norm() < truth[:, 1:].norm()


def test_channels_that_no_query_has_cost_nothing_and_the_scale_is_the_whole_heads():
    """Where the pruned channels of the queries are 0, the answer is full attention's; thin is zero-filled."""
    from kvfold.formats import POSITION, Chunk, Spec

    generator = torch.Generator().manual_seed(0)
    keys, values, q = (torch.randn(1, 2, n, 16, generator=generator) for n in (30, 30, 6))
    q = q.view(1, 2, 3, 2, 16)
    channels = torch.zeros(1, 2, 16, dtype=torch.bool)
    channels[:, 0, :10], channels[:, 1, 6:] = True, True
    places = torch.arange(30, dtype=torch.int32).expand(1, 2, 30)
    chunk = Chunk(keys, values, torch.ones(1, 2, 30, dtype=torch.bool), {POSITION: places})
    segment = Thin(0.4).open(Spec.of(chunk))
    segment.hear({CHANNELS: channels}, torch.ones(1, 2, dtype=torch.bool))
    segment.append(chunk)
    for asked, held in ((q * channels[:, :, None, None], keys), (q, keys * channels[:, :, None])):
        logits = torch.einsum("bhgqd,bhtd->bhgqt", asked, held) * 16**-0.5
        wanted = torch.einsum("bhgqt,bhtd->bhgqd", logits.softmax(-1), values)
        out, lse, _ = segment.attend(asked, 16**-0.5)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="must mark 10 channels"):
        segment.hear({CHANNELS: ~channels}, torch.ones(1, 2, dtype=torch.bool))


def test_behind_an_evicting_method_the_survivors_are_thinned():
    """SnapKV keeps the tokens that it keeps alone; means are over what is left."""
    model, prompt = subject("llama"), tokens(80, 61)
    caches = [kvfold.Cache(model, text) for text in (
        "snapkv(budget=0.5, window=8) | think(recent=8)", "snapkv(budget=0.5, window=8)")]  # fmt: skip
    for cache in caches:
        feed(model, cache, *prompt.values())
    assert [caches[0].kept(i) for i in range(3)] == [caches[1].kept(i) for i in range(3)]
    found = parts(caches[0])
    alone = caches[1].paged[0].segments[0][1].counts()
    assert (found["Thin"].counts() == alone - 8).all() and (found["Dense"].counts() == 8).all()


def test_rows_have_channels_of_their_own_and_files_know_them(tmp_path):
    model, prompt = subject("llama"), tokens(60, 43)
    cache = kvfold.Cache(model, ThinK(recent=8))
    feed(model, cache, *prompt.values())
    chosen = parts(cache)["Thin"].channels.clone()
    assert (chosen.sum(-1) == 10).all() and not torch.equal(chosen[0], chosen[1])
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    loaded.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(parts(loaded)["Thin"].channels, chosen[[1, 0]])


def test_bytes():
    """The issue's bound at D = 64: (40 + 64) / 128 of the numbers, the positions, and 32 tokens whole."""
    from kvfold.formats import POSITION, Chunk, Spec

    chunk = Chunk(*torch.randn(2, 1, 3, 6000, 64).bfloat16(), torch.ones(1, 3, 6000, dtype=torch.bool),
                  {POSITION: torch.arange(6000, dtype=torch.int32).expand(1, 3, 6000)})  # fmt: skip
    segment = Thin(0.4).open(Spec.of(chunk))
    segment.append(chunk, even=True)
    assert (104 * 2 + 4) / 256 < segment.nbytes / (6000 * 3 * 256) < 0.84


@pytest.mark.parametrize(("name", "value"), [("ratio", 1.0), ("ratio", "0.4"), ("recent", -1), ("window", 0)])
def test_bad_options_are_named(name, value, unchecked):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        ThinK(**{name: value})
