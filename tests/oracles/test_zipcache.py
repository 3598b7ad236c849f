"""ZipCache: the card's examples, probes by a loop, and who is coded when."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, WEIGHTS, Chunk, Separable, Spec
from kvfold.formats.separable import SeparableSegment
from kvfold.methods.zipcache import ZipCache, channel_weights
from models import dynamic, feed, follow, greedy, grow, reference, subject, tokens
from views import asked_view, full_probabilities, random_view

STEPS = torch.arange(5, 45).view(2, 20)
ROWS = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.25, 0.25, 0.25, 0.25]])
"""The card's attention of four queries."""


def of_rows(rows: list[int], counts: str) -> torch.Tensor:
    """Saliency where these are the probes."""
    view = asked_view(ROWS.clamp(min=1e-30).log()[None, None, None], queries=4)
    method = ZipCache(counts=counts)
    object.__setattr__(method, "probed", lambda queries, layer: queries.pick(torch.tensor(rows)))
    return method.saliency(view)[0, 0]


def test_the_cards_example():
    assert_close(of_rows([0, 1, 2, 3], "probes"), torch.tensor([0.5375, 0.35, 0.275, 0.25]))
    assert_close(of_rows([0, 1, 2, 3], "code"), torch.tensor([0.5375, 0.35, 0.275, 0.25]))
    assert_close(of_rows([1, 3], "probes"), torch.tensor([0.375, 0.375, 0.25, 0.25]))
    assert_close(of_rows([1, 3], "code"), torch.tensor([0.1875, 0.25, 0.125, 0.25]))
    assert_close(of_rows([1, 3, 3], "probes"), torch.tensor([1.0 / 3, 1.0 / 3, 0.25, 0.25]))  # one that was drawn twice


def test_probes_are_the_last_and_as_many_drawn_from_the_others():
    view = random_view(B=2, T=100, left_pad=(0, 40))
    found = ZipCache(probes=0.05).probed(view.queries, 3)
    assert found.positions[0, :5].tolist() == [95, 96, 97, 98, 99] and found.valid[0].sum() == 10
    assert found.positions[1, :3].tolist() == [57, 58, 59] and found.valid[1].sum() == 6
    assert (found.positions[0, 5:] < 95).all() and (found.positions[1, 3:6] < 57).all()
    assert torch.equal(found.states[0, :, 0], view.queries.states[0, :, 95])
    others = ZipCache(probes=0.05).probed(view.queries, 4)
    assert not torch.equal(others.positions[0, 5:], found.positions[0, 5:])
    many = [ZipCache(probes=0.5, seed=seed).probed(view.queries, 0).positions[0, 50:] for seed in range(40)]
    drawn = torch.stack(many).flatten()
    assert drawn.max() == 49 and drawn.min() == 0 and abs(drawn.double().mean() - 24.5) < 1.5


def test_saliency_against_a_loop():
    view, method = random_view(B=2, H=2, G=3, T=30, D=8, left_pad=(0, 7)), ZipCache(probes=0.2)
    probes, found = method.probed(view.queries, 0), method.saliency(view)
    for row, pad in enumerate((0, 7)):
        attention = full_probabilities(view, row)
        asked = probes.positions[row][probes.valid[row]].tolist()
        for head in range(2):
            heads = attention[3 * head : 3 * head + 3]
            for t in range(30 - pad):
                total, seen = sum(float(heads[:, i, t].sum()) for i in asked), sum(i >= t for i in asked)
                assert float(found[row, head, pad + t]) == pytest.approx(total / max(1, seen), abs=1e-5)
        assert_close(method.saliency(view)[row, :, pad:], found[row, :, pad:])  # the same draws again


def held(cache, layer: int = 0):
    """Text positions by row and head, and how many of each (row, head) are in pages, of what each segment holds."""
    found = {}
    for form, segment in cache.paged[layer].segments:
        chunk, name = segment.dense(), form.bits if isinstance(form, Separable) else 16
        found[name] = [[sorted(chunk.positions[b, h][chunk.valid[b, h]].tolist()) for h in range(2)] for b in range(2)]
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_both_kinds_part_the_tokens_of_every_head(ratio):
    prompt = tokens(60, 41)
    cache = kvfold.Cache(subject("llama"), f"zipcache(ratio={ratio}, group=8)")
    feed(subject("llama"), cache, *prompt.values())
    for layer in range(3):
        found = held(cache, layer)
        for row, length in enumerate((60, 41)):
            low = int((1 - ratio) * length + 1e-9)
            for head in range(2):
                assert len(found[2][row][head]) == low and found[16][row][head] == []
                assert sorted(found[2][row][head] + found[4][row][head]) == list(range(length))
    pages = [s.coded.counts() for form, s in cache.paged[0].segments if isinstance(form, Separable)]
    assert all((count % 8 == 0).all() for count in pages) and sum(x.sum() for x in pages) > 0


def test_generated_tokens_are_coded_together_and_codes_are_final():
    prompt, model = tokens(60, 41), subject("llama")
    cache = kvfold.Cache(model, "zipcache(group=8, gap=5, ratio=0.6)")
    feed(model, cache, *prompt.values())
    before = None
    for step in range(12):
        feed(model, cache, STEPS[:, step : step + 1], grow(prompt["attention_mask"], step + 1))
        found = held(cache, 1)
        waiting = (step + 1) % 5
        for row, length in enumerate((60, 41)):
            for head in range(2):
                assert found[16][row][head] == list(range(length + step + 1 - waiting, length + step + 1))
                gone = len(found[2][row][head]) - int(0.4 * length + 1e-9)
                assert (
                    gone == (step + 1) // 5 * 2 and sum(len(x[row][head]) for x in found.values()) == length + step + 1
                )
        pages = {}
        for form, segment in cache.paged[1].segments:
            if isinstance(form, Separable):
                codes, at = segment.coded.plane("keys"), segment.coded.column(POSITION)
                for b, h, t in segment.coded.valid().nonzero().tolist():
                    pages[b, h, int(at[b, h, t])] = codes[b, h, t].tolist()
        assert before is None or pages.items() >= before.items()
        before = pages


def stored(values: torch.Tensor, form: Separable, told: torch.Tensor | None = None) -> SeparableSegment:
    """Values (T, D) of one head, also as keys."""
    at = torch.arange(len(values), dtype=torch.int32).view(1, 1, -1)
    segment = form.open(Spec(1, 1, values.shape[1], values.shape[1], values.dtype, values.device))
    if told is not None:
        segment.hear({WEIGHTS: told[None, None]}, torch.ones(1, 1, dtype=torch.bool))
    wide = values[None, None]
    segment.append(Chunk(wide, wide, torch.ones(1, 1, len(values), dtype=torch.bool), {POSITION: at}))
    return segment


def test_a_channel_that_stands_out_spoils_no_other():
    """The card's figures: errors of the other channels .075 where none stands out, 1.36 with one, .17 with weights."""
    values = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    values[:, 7] *= 100
    others, errors = torch.arange(64) != 7, []
    for told in (None, values.abs().amax(0).sqrt()):
        error = (stored(values, Separable(4), told).dense().values[0, 0] - values).abs()
        errors.append(float(error[:, others].mean()))
    assert errors[0] == pytest.approx(1.36, rel=0.1) and errors[1] == pytest.approx(0.17, rel=0.15)


def test_even_weights_change_no_code():
    values = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    one, two = stored(values, Separable(4)), stored(values, Separable(4), torch.full((16,), 4.0))
    assert torch.equal(one.coded.plane("values"), two.coded.plane("values"))
    assert_close(one.dense().values, two.dense().values)
    q = torch.randn(1, 1, 2, 1, 16)
    assert_close(two.attend(q, 0.25)[0], one.attend(q, 0.25)[0])
    assert two.coded.weights.eq(4).all() and one.coded.weights.eq(1).all()  # which nobody may change any more
    two.hear({WEIGHTS: torch.ones(1, 1, 16)}, torch.ones(1, 1, dtype=torch.bool))
    assert two.coded.weights.eq(4).all()
    joined = two.select(np.array([0, 0]))
    joined.join(one)
    assert joined.coded.weights[:, 0, 0].tolist() == [4, 4, 1]


def test_weights_of_a_view():
    view = random_view(B=2, H=2, T=20, D=8, left_pad=(0, 5))
    view.values[1, :, :5], view.values[0, 0, :, 3] = 9e9, 0.0
    found = channel_weights(view)
    assert_close(found[0, 1], view.values[0, 1].abs().amax(0).sqrt())
    assert_close(found[1, 0], view.values[1, 0, 5:].abs().amax(0).sqrt())
    assert found[0, 0, 3] == 1.0


def test_a_file_goes_on_and_nothing_is_coded_while_everything_waits(tmp_path):
    prompt, model = tokens(20, 13), subject("llama")
    got = follow(model, kvfold.Cache(model, "zipcache"), *prompt.values(), STEPS[:, :3])
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), STEPS[:, :3])
    assert_close(got, truth, atol=1e-4, rtol=0)
    cache = kvfold.Cache(model, "zipcache(group=8, gap=4)")
    greedy(model, cache, *prompt.values(), 7)
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    after = grow(prompt["attention_mask"], 7)
    assert_close(feed(model, loaded, STEPS[:, :1], after), feed(model, cache, STEPS[:, :1], after), atol=0, rtol=0)


def test_bytes():
    """3.2 bits of 16, scales and zeros, a position; pages alone."""
    values = torch.randn(6400, 64).bfloat16()
    parts = [stored(values[:count], Separable(bits)).nbytes for bits, count in ((4, 3840), (2, 2560))]
    assert 0.24 < sum(parts) / (6400 * 64 * 2 * 2) < 0.26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio=1.5"), ({"high": 5}, "high=5"), ({"low": 4}, "high=4 must differ from low=4"),
        ({"probes": 0.6}, "probes=0.6"), ({"counts": "rows"}, "counts='rows'"), ({"gap": 0}, "gap=0"),
        ({"group": 9}, "group=9 must be even"), ({"seed": -1}, "seed=-1"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ZipCache(**options)
