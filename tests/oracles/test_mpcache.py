"""MPCache against its card: the cut after the prompt, the two choices of clusters, layers that share one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kvfold.formats import POSITION, Chosen, Chunk, Dense, Handed, Indexed, Segment, Spec
from kvfold.formats.indexed import choices_seen
from kvfold.methods.mpcache import MPCache
from kvfold.scores.peaks import peaks
from kvfold.views import LayerView, Site
from kvfold.views.decisions import Keep
from views import asked_view, full_probabilities, kept, random_view, row_of, run, top


def stored(method: MPCache, keys: torch.Tensor, group: int, layer: int = 0, places: list[int] | None = None) -> Segment:
    """What a layer of three holds of keys (T, D), as its method lets it read them."""
    t, d = keys.shape
    form = Indexed(Dense(page_size=4), method.selection(Site(layer, layer, (0, 1, 2), 3)))
    segment = form.open(Spec(1, 1, d, d, torch.float32, torch.device("cpu"), layer, group=group))
    at = torch.tensor(places or range(t), dtype=torch.int32)[None, None]
    segment.append(
        Chunk(keys[None, None], torch.randn(1, 1, t, d), torch.ones_like(at, dtype=torch.bool), {POSITION: at})
    )
    return segment


def read(
    method: MPCache, keys: torch.Tensor, query: torch.Tensor, handed: Handed | None = None, **where: Any
) -> list[int]:
    """The tokens that a query (Hq, D) of one KV head reads."""
    segment, seen = stored(method, keys, len(query), **where), list[Chosen | None]()
    with choices_seen(lambda segment, q, scale, chosen: seen.append(chosen)):
        segment.attend_few(query[None, None, :, None], 0.3, handed=handed)
    if seen[0] is None:
        return list(range(len(keys)))
    units, size = set(seen[0].numbers[0, 0, 0].tolist()), segment.form.selection.unit
    return [token for token in range(len(keys)) if token // size in units]


def test_oracle_1_the_linear_form_is_no_bound():
    index = stored(MPCache(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1).index
    asked = index.asks(torch.tensor([[[[1.0, -1.0]]]]), np.array([2]))
    assert_close(index.scores(asked, np.array([[1]])), torch.tensor([[[[0.6]]]]))
    # The cluster of (2, 0) and (0, 1) loses against one of 0.7, though its first key alone would give 2.
    keys = torch.tensor([[0.0, 0.0]] * 2 + [[2.0, 0.0], [0.0, 1.0]] + [[0.7, 0.0]] * 2 + [[0.0, 0.0]] * 2)
    chosen = read(MPCache(coarse=2, fine=2, coarse_ratio=1.0, ratio=0.3), keys, torch.tensor([[1.0, -1.0]]))
    assert chosen == [0, 1, 4, 5, 6, 7]


def test_oracle_2_a_cluster_of_one_is_its_key():
    keys, query = narrow(12, 4), torch.randn(1, 4)
    for alpha in (0.0, 0.6, 1.0):
        method = MPCache(coarse=1, fine=1, alpha=alpha, coarse_ratio=1.0, ratio=0.5)
        assert read(method, keys, query) == sorted({0, 11, *top((keys @ query[0]).tolist(), 6)})


def test_oracle_3_a_short_cache_still_sees_its_end():
    """One cluster is always chosen, though int(0.2 * 4) is none, and the last is always read; two large ones whole."""
    keys = torch.randn(80, 4)
    keys[:, 0] = -10.0
    keys[32:48, 0] = 10.0
    query = torch.tensor([[9.0, 0, 0, 0]])
    assert read(MPCache(ratio=0.1), keys, query) == [*range(16), *range(32, 48), *range(64, 80)]
    assert read(MPCache(), keys[:64], query) == list(range(64))


def test_oracle_4_everything_is_the_full_cache():
    view = random_view(H=2, T=50)
    assert kept(MPCache(budget=1.0), view) == kept(MPCache(budget=1.0, threshold=0.0), view) == [[list(range(50))] * 2]
    keys, query = torch.randn(50, 4), torch.randn(2, 4)
    assert read(MPCache(coarse_ratio=1.0, ratio=1.0), keys, query) == list(range(50))
    assert MPCache(budget=1.0).selection(Site(0, 0, (0, 1, 2), 3)) is None


def test_oracle_5_at_most_fourteen_clusters_of_a_thousand_tokens():
    for seed in range(5):
        torch.manual_seed(seed)
        chosen = read(MPCache(), torch.randn(1000, 8), torch.randn(4, 8))
        assert len(chosen) <= 216 and len({i // 16 for i in chosen}) <= 14
        assert set(range(16)) | set(range(992, 1000)) <= set(chosen)


def test_oracle_6_one_query_above_the_threshold_is_enough():
    rows = torch.tensor([[0.5, 0.3, 0.2, 1e-30], [0.1, 0.1, 0.1, 0.7]])
    view = asked_view(rows.log()[None, None, None], 2)
    view = replace(view, queries=replace(view.queries, positions=torch.full((1, 4), 3)))  # the card's rows see all four
    assert kept(MPCache(budget=4, threshold=0.25, asking=0.5), view) == [[[0, 1, 3]]]
    assert kept(MPCache(budget=2, threshold=0.25, asking=0.5), view) == [[[0, 3]]]


def narrow(*shape: int) -> torch.Tensor:
    """Random numbers that bfloat16 has, in which the index holds them."""
    return torch.randn(*shape).bfloat16().float()


def slow_choice(method: MPCache, keys: torch.Tensor, query: torch.Tensor) -> list[int]:
    """The card's part B for one KV head, cluster by cluster."""

    def worth(start: int, size: int) -> float:
        inside = keys[start : start + size]
        return float(query @ (method.alpha * inside.amax(0) + (1 - method.alpha) * inside.amin(0)))

    n = len(keys)
    if n <= 2 * method.coarse:
        return list(range(n))
    large = [worth(i, method.coarse) for i in range(0, n, method.coarse)]
    going = {0, len(large) - 1, *top(large, max(1, int(len(large) * method.coarse_ratio)))}
    small = {i: worth(i * method.fine, method.fine) for i in range(-(-n // method.fine))}
    rivals = sorted((i for i in small if i * method.fine // method.coarse in going), key=lambda i: (-small[i], i))
    chosen = {0, len(small) - 1, *rivals[: max(1, int(len(small) * method.ratio))]}
    return [i for i in range(n) if i // method.fine in chosen]


@pytest.mark.parametrize("n", [3, 31, 32, 33, 100, 257])
@pytest.mark.parametrize(
    "options", [{}, {"coarse": 12, "fine": 4, "ratio": 0.3}, {"coarse": 8, "fine": 8, "alpha": 0.0}]
)
def test_the_choice_against_a_loop(n, options):
    torch.manual_seed(n)
    method, keys, query = MPCache(**options), narrow(n, 8), torch.randn(3, 8)
    assert read(method, keys, query) == slow_choice(method, keys, query.mean(0))


def slow_cut(view: LayerView, row: int, budget: int, asking: float) -> list[int]:
    """The card's part A for one row without its padding."""
    mean = full_probabilities(view, row).mean(0)
    n = len(mean)
    best = mean[n - max(1, int(asking * n)) :].amax(0).tolist()
    best[-1] = 2.0  # ours: the newest stays
    return top(best, min(budget, n))


@pytest.mark.parametrize(("asking", "seed"), [(0.2, 0), (0.5, 1), (1.0, 2)])
def test_the_cut_against_a_loop(asking, seed):
    view = random_view(B=3, H=2, G=3, T=141, D=16, left_pad=(0, 40, 138), seed=seed)
    left = kept(MPCache(budget=20, asking=asking), view)
    for row in range(3):
        assert left[row] == [slow_cut(view, row, 20, asking)] * 2


def test_peaks_take_the_best_query_of_each_group():
    view = random_view(B=2, H=2, G=2, T=100, left_pad=(7, 0))
    for row, pad in ((0, 7), (1, 0)):
        expected = full_probabilities(view, row).unflatten(0, (2, 2)).amax((1, 2))
        assert_close(peaks(view)[row, :, pad:], expected)
    assert (peaks(view)[0, :, :7] == 0).all()


def test_layers_in_a_row_share_a_choice():
    """The second reads what the first chose, the third chooses for itself; a layer that is alone reads everything."""
    keys, query, handed = torch.randn(200, 8), torch.randn(1, 8), Handed()
    layers = [read(MPCache(), k, query, handed, layer=i) for i, k in enumerate((keys, keys.flip(0), keys.flip(0)))]
    assert layers[0] == layers[1] != layers[2] == read(MPCache(share=1), keys.flip(0), query, layer=1)
    assert read(MPCache(), keys, query, layer=1) == list(range(200))


def test_layers_of_other_lengths_share_a_choice():
    keys, query, handed = torch.randn(90, 8), torch.randn(1, 8), Handed()
    method = MPCache(coarse=16, fine=8, ratio=0.4)
    theirs = read(method, keys[:88], query, handed)
    chosen = read(method, keys.flip(0), query, handed, layer=1)
    assert chosen == [*theirs, 88, 89] != list(range(90)) and len(chosen) < 60


def test_layers_that_dropped_other_tokens_share_stretches_of_text():
    """Layer 0 holds 200 tokens and reads some stretches; layer 1 holds half of them, and reads those that are there."""
    keys, query, handed, method = torch.randn(200, 8), torch.randn(1, 8), Handed(), MPCache(coarse=16, fine=8)
    held = [place for place in range(200) if not 8 <= place < 120 or place % 2]
    theirs = read(method, keys, query, handed)
    found = read(method, keys[held], query, handed, layer=1, places=held)
    last = (len(held) - 1) // 8
    assert found == [i for i, place in enumerate(held) if i // 8 in (0, last) or place in theirs]
    assert 16 < len(found) < len(held) / 2 and len(theirs) < 100


def test_layers_that_hold_all_share_what_a_thinned_one_chose():
    """A stretch of a layer that holds every third token reaches to where its next unit begins."""
    keys, query, handed, method = torch.randn(300, 8), torch.randn(1, 8), Handed(), MPCache(coarse=16, fine=8)
    held = list(range(0, 300, 3))
    theirs = read(method, keys[held], query, handed, places=held)
    found = read(method, keys, query, handed, layer=1)
    units = {i // 8 for i in theirs}
    assert found == [i for i in range(300) if i < 8 or i >= 296 or i // 24 in units]


def test_what_was_read_whole_is_read_whole_by_the_next():
    """Two large clusters are; so a layer that holds more of the text reads all of it, too."""
    keys, query, handed = torch.randn(300, 8), torch.randn(1, 8), Handed()
    assert read(MPCache(), keys[:64], query, handed) == list(range(64))
    assert read(MPCache(), keys, query, handed, layer=1) == list(range(300))


def test_heads_that_hold_other_tokens_meet_at_text_positions():
    """As on a further turn: a token's mean is over the heads that hold it, wherever it lies in each of them."""
    view = random_view(H=2, G=2, T=40, seed=7)
    gone = torch.zeros(1, 2, 40, dtype=torch.bool)
    gone[0, 0, 3:9] = gone[0, 1, 12:18] = True
    thin = view.apply(Keep(~gone))
    packed = replace(thin, tokens=thin.tokens.take(thin._packed))
    asking = torch.arange(40)[None] >= 30
    expected = torch.zeros(40)
    rows = [thin.attention(40)[0, :, :, i] for i in range(30, 40)]  # H G T
    for place in range(40):
        holders = [h for h in range(2) if not gone[0, h, place]]
        expected[place] = max(float(sum(row[h, :, place].mean() for h in holders)) / len(holders) for row in rows)
    for one in (thin, packed):
        found = peaks(one, asking, heads="mean")
        for head in range(2):
            here = one.valid[0, head]
            assert_close(found[0, head, here], expected[one.positions[0, head, here].long()])


def test_padding_and_other_rows_change_nothing():
    view = random_view(B=2, H=2, G=2, T=60, left_pad=(25, 0), seed=3)
    for row in range(2):
        assert kept(MPCache(budget=12), row_of(view, row))[0] == kept(MPCache(budget=12), view)[row]


def test_a_step_over_ragged_rows_equals_each_row_alone():
    method = MPCache(budget=0.8, coarse=8, fine=4)
    view = random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 21), seed=5)
    q, k, v, mask = view.queries.states, view.keys, view.values, view.queries.valid
    _, outs = run(method, q, k, v, [57, 1, 1, 1], mask)
    for row, pad in ((0, 0), (1, 21)):
        one = slice(row, row + 1)
        _, alone = run(method, q[one, :, pad:], k[one, :, pad:], v[one, :, pad:], [57 - pad, 1, 1, 1])
        for ours, theirs in zip(outs[1:], alone[1:], strict=True):
            assert_close(ours[one], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 2.0}, "budget=2.0 must be"),
        ({"threshold": -0.1}, r"threshold=-0.1 must be a number in \[0.0, 1.0\]"),
        ({"asking": 1.5}, "asking=1.5 must be a number"),
        ({"alpha": -1.0}, "alpha=-1.0 must be a number"),
        ({"coarse": 24}, "coarse=24 must be a multiple of fine=16"),
        ({"fine": 0}, "fine=0 must be an int >= 1"),
        ({"share": 0}, "share=0 must be an int >= 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MPCache(**options)
