"""SpecKV against its card: what a draft of the answer looks at, nothing of which stays."""

import pytest
import torch
from torch.testing import assert_close

import kvfold
from drafters import drafter_folder
from kvfold.methods.snapkv import SnapKV
from kvfold.methods.speckv import SCORE, SpecKV
from models import build, dynamic, feed, follow, greedy, grow, reference, subject, tokens
from views import kept, random_view, spared, top

STEPS = torch.arange(5, 15).view(2, 5)


def probabilities(ids: torch.Tensor) -> list[torch.Tensor]:
    """Attention (H, G, T, T) of each layer over one text, all of it read at once."""
    views = []
    cache = kvfold.Cache(subject("llama"), "full")
    with cache.observed(views.append):
        feed(subject("llama"), cache, ids, torch.ones_like(ids))
    return [view.attention(ids.shape[1])[0] for view in views]


def slow_speckv(
    probs: torch.Tensor, prompt: int, budget: int, window: int, kernel: int, pool: str, reduce: str
) -> list[list[int]]:
    """The card's steps 4 to 9 for one layer of one text, prompt and draft; the last prompt token is counted."""
    found = []
    for head in probs.tolist():
        end = window + 1
        scores = []
        for j in range(prompt - end):
            got = [rows[i][j] for rows in head for i in range(prompt - end, len(rows))]
            scores.append(max(got) if reduce == "max" else sum(got) / len(got))
        pooled = []
        for j in range(len(scores)):
            around = [scores[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < len(scores)]
            pooled.append(max(around) if pool == "max" else sum(around) / kernel)
        found.append(top(pooled, budget - end) + list(range(prompt - end, prompt)))
    return found


def held(cache, row: int = 0) -> list[list[list[int]]]:
    return [core.kept()[row] for core in cache.paged]


def read(prompt, **options) -> kvfold.Cache:
    cache = kvfold.Cache(subject("llama"), SpecKV(**options))
    feed(subject("llama"), cache, *prompt.values())
    return cache


@pytest.mark.parametrize(("reduce", "pool", "kernel"), [("max", "max", 7), ("max", "max", 1), ("mean", "avg", 3)])
def test_oracle_the_draft_of_the_model_is_the_true_continuation(reduce, pool, kernel):
    """T = 100, C = 40 and the token fed next, w = 8, l = 5: 32 of 0..90, and 91..99."""
    prompt, model = tokens(100), reference("llama")
    said = greedy(model, dynamic(model), *prompt.values(), 5)[0]
    probs = probabilities(torch.cat([prompt["input_ids"], said], 1))
    cache = read(prompt, budget=41, window=8, lookahead=5, kernel=kernel, pool=pool, reduce=reduce)
    assert held(cache) == [slow_speckv(layer, 100, 41, 8, kernel, pool, reduce) for layer in probs]
    assert all(head[-9:] == list(range(91, 100)) for layer in held(cache) for head in layer)


def test_oracle_without_a_draft_it_is_snapkv():
    prompt = tokens(60, 41)
    for kernel in (1, 5):
        cache = read(prompt, budget=20, window=8, lookahead=0, kernel=kernel, pool="avg", reduce="mean")
        other = kvfold.Cache(subject("llama"), SnapKV(budget=20, window=9, kernel=kernel))
        feed(subject("llama"), other, *prompt.values())
        assert [core.kept() for core in cache.paged] == [core.kept() for core in other.paged]


@pytest.mark.parametrize("budget", [1.0, 40, 60])
def test_oracle_a_prompt_that_fits_is_the_full_cache(budget, monkeypatch):
    monkeypatch.setattr("kvfold.hf.prompt.Prompt.look_ahead", lambda *_: pytest.fail("nobody needs a draft"))
    prompt, model = tokens(40, 25), subject("llama")
    got = follow(model, kvfold.Cache(model, "speckv", budget=budget), *prompt.values(), STEPS)
    assert torch.equal(got, follow(model, kvfold.Cache(model, "full"), *prompt.values(), STEPS))


def test_oracle_the_draft_only_chooses(tmp_path):
    """Another draft, other tokens kept: each with the keys and values that the full cache has."""
    prompt, folder = tokens(60, 44), drafter_folder(tmp_path)
    own, other = read(prompt, budget=15, window=4), read(prompt, budget=15, window=4, draft=folder)
    full = kvfold.Cache(subject("llama"), "full")
    feed(subject("llama"), full, *prompt.values())
    assert held(own) != held(other)
    for cache in (own, other):
        for core, whole in zip(cache.paged, full.paged, strict=True):
            some, every = core.stored.tokens()[0], whole.stored.tokens()[0]
            for row, length in enumerate((60, 44)):
                assert core.seen[row] == length and core.width == 60
                for head in range(2):
                    at = some.positions[row, head][some.valid[row, head]].long()
                    assert len(at) == 15 and at.max() == length - 1
                    for plane in ("keys", "values"):
                        mine = getattr(some, plane)[row, head][some.valid[row, head]]
                        assert torch.equal(mine, getattr(every, plane)[row, head][at])


def test_another_draft_against_a_loop(tmp_path):
    prompt, folder, model = tokens(50, 37), drafter_folder(tmp_path), build("llama", seed=1)
    said = greedy(model, dynamic(model), *prompt.values(), 6)[0]
    cache = read(prompt, budget=0.4, window=3, lookahead=6, draft=folder)
    for row, length in enumerate((50, 37)):
        text = torch.cat([prompt["input_ids"][row : row + 1, -length:], said[row : row + 1]], 1)
        for found, probs in zip(held(cache, row), probabilities(text), strict=True):
            # A fraction of a token goes to a layer's first heads.
            for head, expected in enumerate(slow_speckv(probs, length, len(found[0]), 3, 7, "max", "max")):
                if len(found[head]) == len(found[0]):
                    assert found[head] == expected


def test_rows_equal_single_rows_where_one_ends_early():
    prompt, model = tokens(50, 31), build("llama")
    said = greedy(model, dynamic(model), *prompt.values(), 8)[0].tolist()
    model.generation_config.eos_token_id = said[0][1]
    both = kvfold.Cache(model, SpecKV(budget=12, window=2, lookahead=8))
    feed(model, both, *prompt.values())
    for row, length in enumerate((50, 31)):
        own = prompt["input_ids"][row : row + 1, -length:]
        alone = kvfold.Cache(model, SpecKV(budget=12, window=2, lookahead=8))
        feed(model, alone, own, torch.ones_like(own))
        assert held(both, row) == held(alone)


def test_a_further_turn_competes_anew():
    prompt = tokens(60, 50)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "speckv", budget=14, window=4)
    feed(model, cache, ids[:, :40], mask[:, :40])
    first = [held(cache, row) for row in range(2)]
    feed(model, cache, ids[:, 40:41], mask[:, :41])
    feed(model, cache, ids[:, 41:], mask)
    for row, (old, length) in enumerate(zip(first, (60, 50), strict=True)):
        for layer, before in zip(held(cache, row), old, strict=True):
            for head, earlier in zip(layer, before, strict=True):
                assert len(head) == 14 and head[-5:] == list(range(length - 5, length))
                assert {p for p in head if p < length - 20} <= set(earlier)


def test_scores_are_of_the_prompts_end_alone_until_the_draft():
    view = random_view(B=2, H=2, G=2, T=40, left_pad=(0, 33), seed=3)
    found = SpecKV(budget=5, window=4).after_prefill(view)
    assert found.mask.equal(view.valid)
    assert_close(found.columns[SCORE], view.attention(5).amax((2, 3)))
    mean = SpecKV(budget=5, window=4, reduce="mean").after_prefill(view)
    assert_close(mean.columns[SCORE], view.attention(5).sum((2, 3)), atol=1e-6, rtol=1e-5)
    assert SpecKV(budget=40).after_prefill(view) is None


def test_a_long_draft_is_closer_to_the_full_cache():
    """A draft of what is said next: the error over it must not grow, a mean over prompts."""
    prompt, errors = tokens(80, 80, 80, 80, seed=4), []
    said = greedy(reference("llama"), dynamic(reference("llama")), *prompt.values(), 12)[0]
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), said).log_softmax(-1)
    for lookahead in (0, 12):
        cache = kvfold.Cache(subject("llama"), SpecKV(budget=20, window=4, lookahead=lookahead))
        got = follow(subject("llama"), cache, *prompt.values(), said).log_softmax(-1)
        errors.append(float((truth.exp() * (truth - got)).sum(-1).mean()))
    assert errors[1] <= errors[0]


def test_a_window_model():
    prompt = tokens(40, 25)
    model, cache = subject("gemma3"), kvfold.Cache(subject("gemma3"), "speckv", budget=12)
    feed(model, cache, *prompt.values())
    assert all((core.counts() == 12).all() for core in cache.paged)
    assert feed(model, cache, STEPS[:, :1], grow(prompt["attention_mask"])).isfinite().all()


def test_choosing_among_votes():
    view = random_view(T=10)
    votes = torch.tensor([0.1, 0.9, 0.2, 0.0, 0.5, 0.0, 0.3, 9.0, 9.0, 9.0])[None, None]
    method = SpecKV(budget=6, window=2, kernel=1)
    assert method.choose(view, votes).mask[0, 0].nonzero()[:, 0].tolist() == [1, 4, 6, 7, 8, 9]
    method = SpecKV(budget=2, window=2, kernel=3)
    assert method.choose(view, votes).mask[0, 0].nonzero()[:, 0].tolist() == spared(10, 2, 3) == [0, 9]
    assert kept(SpecKV(budget=6), view)[0][0] == list(range(10))  # not before the draft


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"draft": ""}, "draft='' must be a model's name or folder, or None"),
        ({"lookahead": -1}, "lookahead=-1 must be an int >= 0"),
        ({"window": -1}, "window=-1 must be an int >= 0"),
        ({"kernel": 4}, "kernel=4 must be an odd int >= 1"),
        ({"pool": "sum"}, "pool='sum' must be one of 'max', 'avg'"),
        ({"reduce": "sum"}, "reduce='sum' must be one of 'max', 'mean'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SpecKV(**options)
