"""An index follows whatever is done to its tokens: at any time it is what it would be of those tokens alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.formats import POSITION, Chunk, Dense, Indexed, Segment, Separable, Spec
from kvfold.selectors import Bounds, Selection

B, H, D = 2, 2, 8
FORM = Indexed(Dense(page_size=4), Selection(Bounds(4), 12))


def some(counts: list[list[int]], seed: int, start: int = 0) -> Chunk:
    """Random tokens, padded in front, from text position `start` on."""
    rng = torch.Generator().manual_seed(seed)
    number = torch.tensor(counts)
    b, t = len(counts), int(number.max())
    valid = torch.arange(t) >= t - number[..., None]
    places = (valid.cumsum(-1) - 1 + start).clamp(min=0).to(torch.int32)
    return Chunk(
        torch.randn(b, H, t, D, generator=rng), torch.randn(b, H, t, D, generator=rng), valid, {POSITION: places}
    )


def fresh(rows: int = B) -> Segment:
    return FORM.open(Spec(rows, H, D, D, torch.float32, torch.device("cpu")))


def anew(segment: Segment) -> torch.Tensor:
    """The index of its tokens as they stand."""
    tokens = segment.dense()
    order = torch.argsort((~tokens.valid).byte(), dim=-1, stable=True)
    packed = tokens.take(order)
    b = len(tokens.valid)
    index = Bounds(4).open(Spec(b, H, D, D, torch.float32, torch.device("cpu")))
    index.extend(packed.keys, packed.valid, np.zeros((b, H), dtype=np.int64))
    return index.held


def agrees(segment: Segment) -> None:
    mine, theirs = segment.index.held, anew(segment)
    units = -(-segment.counts() // 4)
    for row, head in np.ndindex(units.shape):
        number = units[row, head]
        assert torch.equal(mine[row, head, :number], theirs[row, head, :number]), (row, head)
        assert bool(mine[row, head, number:].eq(-torch.inf).all())


COUNTS = st.lists(st.lists(st.integers(0, 9), min_size=H, max_size=H), min_size=B, max_size=B)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), COUNTS),
        st.tuples(st.just("step"), st.none()),
        st.tuples(st.just("keep"), st.floats(0.2, 1.0)),
        st.tuples(st.just("amend"), st.integers(0, 6)),
        st.tuples(st.just("truncate"), st.integers(0, 7)),
        st.tuples(st.just("select"), st.lists(st.integers(0, B - 1), min_size=B, max_size=B)),
        st.tuples(st.just("join"), COUNTS),
        st.tuples(st.just("file"), st.none()),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=8,
)


@given(steps=STEPS, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_index_is_of_the_tokens(steps, seed):
    segment, at = fresh(), 0
    segment.append(some([[7, 12], [0, 5]], seed))
    rng = torch.Generator().manual_seed(seed)
    for number, (what, value) in enumerate(steps):
        at, b = at + 20, len(segment.counts())
        valid, _ = segment.columns()
        if what == "append":
            more = [value[row % B] for row in range(b)]
            segment.append(some(more, seed + number, at))
        elif what == "step":
            one = some([[1] * H] * b, seed + number)
            q = torch.randn(b, H, 2, 1, D, generator=rng)
            segment.step(q, one.keys, one.values, torch.full((b, 1), at), 0.3, weights=False)
        elif what == "keep":
            segment.keep(valid & (torch.rand(valid.shape, generator=rng) < value), {}, slack=bool(seed % 2))
        elif what == "amend" and segment.longest:
            slots = torch.where(valid[..., : value + 1].any(-1, keepdim=True) & valid[..., :1], 0, -1)
            segment.amend(slots, torch.randn(b, H, 1, D, generator=rng), None)
        elif what == "truncate":
            segment.truncate(np.maximum(segment.counts() - value, 0))
        elif what == "select":
            segment = segment.select(np.array(value))
        elif what == "join" and b < 6:
            other = fresh()
            other.append(some(value, seed - number))
            segment.join(other)
        elif what == "file":
            said, tensors = segment.state()
            form = Spec(b, H, D, D, torch.float32, torch.device("cpu"))
            segment = FORM.restore(form, said, {name: x.clone() for name, x in tensors.items()})
        elif what == "clear":
            segment.clear()
        agrees(segment)
        assert segment.index.nbytes == segment.index.held.untyped_storage().nbytes()


def test_a_crop_takes_back_what_was_read_of_the_text():
    """A fraction is of the text: what is taken back of it no longer counts."""
    segment = fresh()
    segment.append(some([[9, 9], [4, 4]], 0))
    assert segment.seen.tolist() == [9, 4]
    segment.cropped(np.array([6, 9]))
    assert segment.seen.tolist() == [6, 4]


def test_a_segment_that_is_told_of_its_rows_is_refused():
    with pytest.raises(ValueError, match=r"form=Separable\(.*can't be read in parts"):
        Indexed(Separable(4), Selection(Bounds(16), 32)).open(Spec(1, 1, 32, 32, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0}, "budget=0"), ({"heads": "all"}, "heads='all'"), ({"sinks": -1}, "sinks=-1"),
        ({"recent": -5}, "recent=-5"), ({"least": 0}, "least=0"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Selection(Bounds(4), **{"budget": 4, **options})


def test_what_is_always_read_counts_in_the_budget():
    segment = fresh(1)
    segment.append(some([[40, 40]], 1))
    chosen = Selection(Bounds(4), 20, sinks=4, recent=8)
    for heads, lists in (("each", 3), ("sum", 1)):
        picked = Selection(Bounds(4), 20, heads=heads, sinks=4, recent=8).choose(
            segment.index, torch.randn(1, H, 3, D), segment.counts(), segment.seen
        )
        assert picked.shape == (1, H, lists, 10) and (picked.sum(-1) == 5).all()
        assert picked[..., [0, 7, 8, 9]].all()
    # Too few for all of them: the newest first, then the first ones.
    few = Selection(Bounds(4), 8, sinks=4, recent=8).choose(
        segment.index, torch.randn(1, H, 3, D), segment.counts(), segment.seen
    )
    assert few[..., [0, 9]].all() and (few.sum(-1) == 2).all() and chosen.unit == 4
