"""bf16 and fp16 models: what is kept is what a float32 loop over the same narrow keys and queries keeps."""

import pytest
import torch

import kvfold
from models import feed, subject, tokens
from views import top

BUDGET, WINDOW = 11, 6
LENGTHS = (47, 36)
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def probabilities(view, row: int, head: int) -> torch.Tensor:
    """Attention (G, Q, T) of a row's tokens within one KV head, padding left out: one float32 softmax at a time."""
    valid = view.queries.valid[row]
    group = view.queries.states.shape[1] // view.heads
    queries = view.queries.states[row, head * group : (head + 1) * group, valid].float()
    keys = view.keys[row, head, valid].float()
    found = torch.zeros(group, len(keys), len(keys))
    for member in range(group):
        for asked in range(len(keys)):
            logits = torch.stack([(queries[member, asked] * key).sum() for key in keys[: asked + 1]])
            found[member, asked, : asked + 1] = (logits * view.place.scale).softmax(0)
    return found


def slow_h2o(views, row, head):
    mass = probabilities(views, row, head).sum((0, 1))
    recent = BUDGET // 2
    heavy = top(mass[:-recent].tolist(), BUDGET - recent)
    return sorted([*heavy, *range(len(mass) - recent, len(mass))])


def slow_snapkv(views, row, head):
    votes = probabilities(views, row, head)[:, -WINDOW:].sum(1).mean(0)
    votes[-WINDOW:] = 0.0
    around = [float(votes[max(0, i - 2) : i + 3].sum() / 5) for i in range(len(votes) - WINDOW)]
    return sorted([*top(around, BUDGET - WINDOW), *range(len(votes) - WINDOW, len(votes))])


def slow_tova(views, row, head):
    asked = torch.stack([probabilities(views, row, h)[:, -1] for h in range(views.heads)])
    return sorted(top(asked.mean((0, 1)).tolist(), BUDGET))


SLOW = {"h2o": (slow_h2o, {}), "snapkv": (slow_snapkv, {"window": WINDOW}), "tova": (slow_tova, {})}


@NARROW
@pytest.mark.parametrize("slug", SLOW)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_kept_sets_of_narrow_models(slug, name, dtype):
    loop, options = SLOW[slug]
    model, views = subject(name, dtype), []
    cache = kvfold.Cache(model, slug, budget=BUDGET, **options)
    with cache.observed(views.append):
        feed(model, cache, *tokens(*LENGTHS, seed=3).values())
    assert [view.keys.dtype for view in views] == [dtype] * 3
    for layer, view in enumerate(views):
        for row in range(2):
            for head in range(view.heads):
                assert cache.kept(layer)[row][head] == loop(view, row, head), (layer, row, head)
