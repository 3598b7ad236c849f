"""`kvfold.bench.reading`: what was read is counted, and set beside exact attention, as by hand."""

import pytest
import torch

import kvfold
from kvfold.bench.reading import Watch, measure_reading
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.formats.indexed import SEEN, choices_seen
from kvfold.methods import parse
from kvfold.selectors import Bounds, Selection
from kvfold.testing import feed, steps, tokens
from models import subject

H, G, D, T, PAGE = 2, 3, 8, 40, 4


def filled(t: int = T):
    rng = torch.Generator().manual_seed(0)
    form = Indexed(Dense(page_size=PAGE), Selection(Bounds(PAGE), 3 * PAGE))
    segment = form.open(Spec(1, H, D, D, torch.float32, torch.device("cpu"), group=G))
    keys, values = (torch.randn(1, H, t, D, generator=rng) for _ in range(2))
    places = torch.arange(t, dtype=torch.int32).expand(1, H, t)
    segment.append(Chunk(keys, values, torch.ones(1, H, t, dtype=torch.bool), {POSITION: places}), even=True)
    return segment, keys


def test_a_choice_is_set_beside_exact_attention():
    """One head after the other, in sets."""
    segment, keys = filled()
    q, seen = torch.randn(1, H, G, 1, D, generator=torch.Generator().manual_seed(1)), []
    watch = Watch()
    with choices_seen(watch.see), choices_seen(lambda *given: seen.append(given[3])):
        segment.attend_few(q, 0.5)
    recall, attention, read = [], [], 0
    for head in range(H):
        for group in range(G):
            mine = {PAGE * u + i for u in seen[0].mask[0, head, group].nonzero()[0] for i in range(PAGE)}
            weights = (q[0, head, group, 0] @ keys[0, head].T * 0.5).softmax(-1)
            best = set(weights.topk(len(mine)).indices.tolist())
            recall.append(len(mine & best) / len(mine))
            attention.append(sum(float(weights[t]) for t in mine))
            read += len(mine) * 2 * D * 4
    assert watch.recall == pytest.approx([sum(recall) / (H * G)])
    assert watch.attention == pytest.approx([sum(attention) / (H * G)])
    assert watch.read == read + segment.index.nbytes and watch.stored == H * T * 2 * D * 4
    assert 0 < watch.recall[0] < 1 and not SEEN


def test_what_is_read_whole_has_all_of_it():
    segment, _ = filled(2 * PAGE)
    watch = Watch()
    with choices_seen(watch.see):
        segment.attend_few(torch.randn(1, H, G, 1, D), 0.5)
    assert watch.recall == [1.0] and watch.attention == pytest.approx([1.0])
    assert watch.read == watch.stored + segment.index.nbytes


def test_nobody_is_told_after_an_error():
    with pytest.raises(RuntimeError, match="mine"), choices_seen(lambda *given: None):
        raise RuntimeError("mine")
    assert not SEEN


def test_methods_beside_the_full_cache():
    model, ids = subject("llama"), tokens(90)["input_ids"][0]
    methods = [(text, parse(text)) for text in ("quest(budget=1.0)", "quest(budget=16, dense=1)", "snapkv(budget=0.5)")]
    full, same, few, less = measure_reading(model, methods, ids, 80, 4)
    assert (full.method, full.kl, full.top1, full.recall, full.index_bytes) == ("full", 0.0, 1.0, None, 0)
    assert same.kl < 1e-6 and same.recall == 1.0 and same.read > 1  # all, and an index for nothing
    assert few.kl > 0 and 0 < few.recall < 1 and 0 < few.read < 1 and few.index_bytes > 0
    assert less.recall is None and less.read == 1.0 and less.nbytes < full.nbytes < few.nbytes
    # As `model(...)` itself gives it, one by one.
    caches = [kvfold.Cache(model, text) for text in ("full", "quest(budget=16, dense=1)")]
    for cache in caches:
        feed(model, cache, ids[None, :80], torch.ones(1, 80, dtype=torch.long))
    kl = []
    for t in range(80, 90):
        mask = torch.ones(1, t + 1, dtype=torch.long)
        p, q = (feed(model, cache, ids[None, t : t + 1], mask)[0, -1].log_softmax(-1) for cache in caches)
        kl.append(float((p.exp() * (p - q)).sum()))
    assert few.kl == pytest.approx(sum(kl) / 10, rel=1e-3)


def test_tokens_that_are_too_few_are_named():
    with pytest.raises(ValueError, match="watched=9 must be from 1 to 8, fewer than the 9 tokens fed"):
        measure_reading(subject("llama"), [], steps(1, 29)[0], 20, 9)
