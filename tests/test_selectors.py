"""An index follows whatever is done to its tokens: at any time it is what it would be of those tokens alone."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, Indexed, Remembered, Segment, Separable, Spec
from kvfold.hf.rope import find_ropes
from kvfold.methods import parse
from kvfold.selectors import (
    SENTENCE,
    Alike,
    Always,
    Bounds,
    Codebook,
    Corners,
    Every,
    Heaviest,
    Hierarchical,
    Keys,
    Lasting,
    Means,
    Odd,
    OfStretches,
    Products,
    Proportions,
    Representatives,
    Selection,
    Sentences,
    SomeHeads,
    Stretches,
    Unremembered,
    Vectors,
    Vote,
    WindowMeans,
    looked,
)
from kvfold.selectors.held import HeldUnits
from kvfold.testing import feed, follow, grow, steps, tokens
from models import build, subject

B, H, D, G = 2, 2, 16, 2
BOOK = Codebook(torch.eye(D).expand(H, D, D), torch.randn(H, 9, D, generator=torch.Generator().manual_seed(1)), 30)
FORM = Indexed(Dense(page_size=4), Selection(Bounds(4), 12))
FORMS = {
    "bounds": FORM,
    "bounds-every": Indexed(Dense(page_size=4), Selection(Bounds(4), 12, reuse=Every(3))),
    "keys": Indexed(Dense(page_size=4), Selection(Keys(5), 6, Vote("sum", layer=True, softmax=True), slots=True)),
    "sentences": Indexed(Dense(page_size=4), Selection(Sentences(), 6, always=Always(1, 2))),
    "keys-alike": Indexed(Dense(page_size=4), Selection(Keys(5), 6, Vote("max"), Always(1, 2), reuse=Alike(-1.0))),
    "means": Indexed(Dense(page_size=4), Selection(Means(4), 12, Vote("max", softmax=True), odd=Odd(1))),
    "representatives": Indexed(
        Dense(page_size=4), Selection(Representatives(4, 2, 5), 12, Vote("sum", layer=True), Always(1, 2), far=6)
    ),
    "hierarchical": Indexed(Dense(page_size=4), Selection(Hierarchical(4, 2), 12)),
    "hierarchical-every": Indexed(Dense(page_size=4), Selection(Hierarchical(6, 3), 12, reuse=Every(3))),
    "some-heads": Indexed(
        Dense(page_size=4), SomeHeads(Selection(Hierarchical(4, 2), 12, reuse=Every(3)), (True, False), Always(4, 4))
    ),
    "no-heads": Indexed(Dense(page_size=4), SomeHeads(Selection(Bounds(4), 12), (False, False), Always(4, 4))),
    "vectors": Indexed(Dense(page_size=4), Selection(Vectors("book"), 6, Vote("union"), Always(1, 1))),
    "values": Indexed(Dense(page_size=4), Heaviest(Unremembered(1), 6, Vote("sum"))),
    "windows": Indexed(Dense(page_size=4), Selection(WindowMeans(4, 4, 2), 12, Vote("max"))),
    "windows-weighed": Indexed(
        Dense(page_size=4),
        Selection(WindowMeans(6, 6, 2, True), 24, Vote("max"), Always(4, 4, 0.5), lasting=Lasting(0.5)),
    ),
    "windows-every": Indexed(
        Dense(page_size=4), Selection(WindowMeans(6, 2, 2, True), 24, Vote("max"), reuse=Every(3), lasting=Lasting(0.5))
    ),
    "stretches": Indexed(Dense(page_size=4), Stretches(1, Corners(4, 2), 0.5, 0.3)),
    "of-stretches": Indexed(Dense(page_size=4), OfStretches(Stretches(1, Corners(3, 2)))),
    "products": Indexed(Dense(page_size=4), Selection(Products(2, 2, 1), 6, Vote("sum", softmax=True), Proportions(2))),
}


def some(counts: list[list[int]], seed: int, start: int = 0) -> Chunk:
    """Random tokens, padded in front, from text position `start` on."""
    rng = torch.Generator().manual_seed(seed)
    number = torch.tensor(counts)
    b, t = len(counts), int(number.max())
    valid = torch.arange(t) >= t - number[..., None]
    places = (valid.cumsum(-1) - 1 + start).clamp(min=0).to(torch.int32)
    sentence = 2 * (places // 3) + (places % 3 == 2).to(torch.int32)
    keys, values = (torch.randn(b, H, t, D, generator=rng) for _ in range(2))
    given = {looked(head): torch.rand(b, H, t, generator=rng) for head in range(G)}
    mass = torch.randn(b, H, t, generator=rng)
    return Chunk(keys, values, valid, {POSITION: places, SENTENCE: sentence, LOG_MASS: mass, **given})


def spec(rows: int = B) -> Spec:
    rope = find_ropes(subject("llama"))[0]
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), rope=rope, group=G, artefact={"book": BOOK})


def fresh(rows: int = B, form: Indexed = FORM) -> Segment:
    return form.open(spec(rows))


def anew(segment: Segment) -> Remembered:
    """The index of its tokens as they stand."""
    tokens = segment.dense()
    order = torch.argsort((~tokens.valid).byte(), dim=-1, stable=True)
    b = len(tokens.valid)
    index = segment.form.selection.index.open(spec(b))
    if isinstance(segment.form.selection.index, Products):  # what a row's codebook is depends on when it was fitted
        index.books, index.learned = segment.index.books.clone(), segment.index.learned.copy()
    index.extend(tokens.take(order), np.zeros((b, H), dtype=np.int64))
    return index


def inside(index: Remembered) -> HeldUnits:
    """What holds the numbers."""
    return index.inner if hasattr(index, "inner") else index


def agrees(segment: Segment) -> None:
    selection, index, fresh = segment.form.selection, inside(segment.index), anew(segment)
    mine, theirs, counts = index.held, inside(fresh).held, segment.counts()
    if isinstance(mine, dict):
        same_sentences(mine, theirs, segment)
        return
    if selection.heads is not None:
        counts = counts[:, np.array(selection.heads)]
    for row, head in np.ndindex(counts.shape):
        number = -(-counts[row, head] // index.unit)
        torch.testing.assert_close(mine[row, head, :number], theirs[row, head, :number], atol=1e-6, rtol=0)
        assert bool(mine[row, head, number:].eq(index.fill).all())
    book = getattr(index, "book", None)  # all segments have one, and files its name
    own = {name: x for name, x in segment.index.state().items() if name != "book"}
    size = sum(x.untyped_storage().nbytes() for x in own.values())
    assert segment.index.nbytes == size + (0 if book is None else book.nbytes)
    for name, x in fresh.state().items():
        if name == "open":  # tokens of units that are not whole; there may be room for more
            assert torch.equal(own[name][:, :, : x.shape[2]], x) and not own[name][:, :, x.shape[2] :].any()
        elif name == "places":  # the same
            assert torch.equal(own[name][:, :, : x.shape[2]], x) and own[name][:, :, x.shape[2] :].eq(2**31 - 1).all()
        elif name not in ("held", "book"):
            assert torch.equal(own[name], x)
    if segment.choice is not None:
        units, choosing = -(-counts // selection.unit), getattr(selection, "selection", selection)
        assert segment.choice.units.shape[:3] == (*units.shape, choosing.vote.lists(G))
        # What stands there is of units that are still there.
        chosen, known = segment.choice.units, segment.choice.made >= 0
        there = np.arange(chosen.shape[-1]) < units[..., None]
        assert not (chosen & ~there[:, :, None])[known].any()


def same_sentences(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], segment: Segment) -> None:
    for name in ("sums", "sizes", "numbers"):
        most = min(mine[name].shape[2], theirs[name].shape[2])
        torch.testing.assert_close(mine[name][:, :, :most], theirs[name][:, :, :most], atol=1e-5, rtol=0)
        more = mine[name][:, :, most:]
        assert bool(more.eq(-1 if name == "numbers" else 0).all()) and theirs[name].shape[2] == most
    assert segment.index.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in mine.values())


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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(steps=STEPS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_the_index_is_of_the_tokens(form, steps, seed):
    segment, at = fresh(form=form), 0
    segment.append(some([[7, 12], [0, 5]], seed))
    rng = torch.Generator().manual_seed(seed)
    for number, (what, value) in enumerate(steps):
        at, b = at + 20, len(segment.counts())
        valid, _ = segment.columns()
        if what == "append":
            more = [value[row % B] for row in range(b)]
            segment.append(some(more, seed + number, at))
        elif what == "step":
            one = some([[1] * H] * b, seed + number, at)
            q = torch.randn(b, H, G, 1, D, generator=rng)
            segment.append(one, even=True)  # as `step` does it, with the columns of a layer
            segment.attend_few(q, 0.3)
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
            other = fresh(form=form)
            other.append(some(value, seed - number))
            segment.join(other)
        elif what == "file":
            said, tensors = segment.state()
            tensors = {name: x.clone() for name, x in tensors.items()}
            form.check(spec(b), said, tensors, None)
            segment = form.restore(spec(b), said, tensors)
        elif what == "clear":
            segment.clear()
        agrees(segment)


def test_a_crop_takes_back_what_was_read_of_the_text():
    """A fraction is of the text: what is taken back of it no longer counts."""
    segment = fresh()
    segment.append(some([[9, 9], [4, 4]], 0))
    assert segment.seen.tolist() == [9, 4]
    segment.cropped(np.array([6, 9]))
    assert segment.seen.tolist() == [6, 4]


def test_what_is_rewound_was_never_read_of_the_text():
    """Tokens that a tentative pass brought are taken back by number, not by position."""
    segment = fresh()
    segment.append(some([[9, 9], [4, 4]], 0))
    before = segment.counts()
    segment.append(some([[3, 3], [3, 3]], 1, 9))
    assert segment.seen.tolist() == [12, 12]
    segment.truncate(before)
    assert segment.seen.tolist() == [9, 9]  # the second row's place 4 to 8 nobody stood at


def test_a_segment_that_is_told_of_its_rows_is_refused():
    with pytest.raises(ValueError, match=r"form=Separable\(.*can't be read in parts"):
        Indexed(Separable(4), Selection(Bounds(16), 32)).open(Spec(1, 1, 32, 32, torch.float32, torch.device("cpu")))


def test_what_is_always_read_counts_in_the_budget():
    segment = fresh(1)
    segment.append(some([[40, 40]], 1))
    always = Always(sinks=4, recent=8)
    for heads, lists in (("each", 3), ("sum", 1)):
        picked, _ = Selection(Bounds(4), 20, Vote(heads), always).choose(
            segment.index, torch.randn(1, H, 3, D), segment.counts(), segment.seen
        )
        assert picked.mask.shape == (1, H, lists, 10) and (picked.counts == 5).all()
        assert picked.mask[..., [0, 7, 8, 9]].all()
    # Too few for all of them: the newest first, then the first ones.
    few, _ = Selection(Bounds(4), 8, always=always).choose(
        segment.index, torch.randn(1, H, 3, D), segment.counts(), segment.seen
    )
    assert few.mask[..., [0, 9]].all() and (few.counts == 2).all()


STORING = {"kvquant", "less", "mikv", "think", "zipcache"}


@pytest.mark.parametrize(
    "text", ["tokenselect", "tokenselect(positions='text')", "infllm", "infllm(vote='group') | kivi"]
)
def test_methods_that_turn_keys_need_a_rotation_that_is_known(text):
    """Said before anything is read; what chooses by keys as they are has no such need."""
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = build("llama", rope_parameters=scaled)
    with pytest.raises(ValueError, match=r"needs RoPE with fixed angles to choose what it reads; LlamaForCausalLM has"):
        kvfold.Cache(model, text)
    kvfold.Cache(model, "quest | kivi")


def test_methods_that_move_tokens_away_say_so():
    """A stage that chooses what is read refuses them: of what lies elsewhere every query would read all."""
    for info in kvfold.list_methods():
        source = Path(inspect.getsourcefile(info.cls)).read_text(encoding="utf-8")
        assert parse(info.slug).stores == ("Store(" in source) == (info.slug in STORING), info.slug


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quest | mikv", "has mikv.* hold some tokens in a format of their own"),
        ("think | quest", "has think.* hold some tokens"),
        ("minicache | quest", "has minicache.* hold some tokens"),
        ("quest | streamingllm(positions='compact')", "compact ones are others"),
        ("quest | quest(page=32)", "two stages that choose what a query reads"),
    ],
)
def test_what_would_not_be_chosen_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


THREE = "kvfold(budget=0.5) | quest(budget=40, page=32, dense=0) | kivi(bits=4, residual=32)"


@pytest.mark.parametrize(
    "text", [THREE, "h2o(budget=0.5) | quest(budget=40, dense=0)", "quest(budget=40, dense=0) | fp8"]
)
def test_evicts_then_stores_then_reads_few(text):
    """Each stage does its part: as many tokens as without the choice, and few of them read; all read is no choice."""
    model, prompt, said = subject("llama"), tokens(200, 150), steps(2, 40)
    plain = " | ".join(stage for stage in text.split(" | ") if "quest" not in stage)
    got, want = (kvfold.Cache(model, each) for each in (text, plain))
    few, all_read = (follow(model, cache, *prompt.values(), said) for cache in (got, want))
    assert got.kept_tokens == want.kept_tokens or "h2o" in text  # which drops by what was read
    assert (got.nbytes > want.nbytes or "h2o" in text) and not torch.allclose(few[:, 1:], all_read[:, 1:], atol=1e-3)
    torch.testing.assert_close(few[:, 0], all_read[:, 0])
    whole = kvfold.Cache(model, text.replace("budget=40", "budget=1.0"))
    torch.testing.assert_close(follow(model, whole, *prompt.values(), said), all_read, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text", [THREE, "h2o(budget=0.5) | quest(budget=40, dense=0)", "h2o(budget=0.5) | quest(budget=40, dense=0) | fp8",
             "tokenselect(budget=40, sinks=2, recent=4, reuse=0.5)", "infllm(budget=40, block=4, local=20)"],
)  # fmt: skip
def test_a_file_holds_the_columns_of_other_stages_too(text, tmp_path):
    """What a method has set lies among the tokens beside which an index is."""
    model, prompt, said = subject("llama"), tokens(120, 77), steps(2, 8)
    cache, mask = kvfold.Cache(model, text), prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    for step in said[:, :4].T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
    cache.save(tmp_path / "c.kvfold")
    other = kvfold.Cache.load(tmp_path / "c.kvfold", model)
    assert other.nbytes <= cache.nbytes and other.kept_tokens == cache.kept_tokens
    for step in said[:, 4:].T:
        mask = grow(mask)
        one, two = (feed(model, each, step[:, None], mask) for each in (cache, other))
        assert torch.equal(one, two)


def test_rows_of_other_methods_read_what_is_theirs():
    """A batch that was joined of two caches gives what each gives alone."""
    model, said = subject("llama"), steps(2, 30)
    caches = [kvfold.Cache(model, method) for method in ("quest(budget=32, dense=0)", "full")]
    texts = [tokens(120, seed=3), tokens(70, seed=4)]
    for cache, text in zip(caches, texts, strict=True):
        feed(model, cache, *text.values())
    apart = [cache.fork() for cache in caches]
    caches[0].join(caches[1])
    mask = torch.zeros(2, 120, dtype=torch.long)
    mask[0], mask[1, 50:] = 1, 1
    own = [text["attention_mask"] for text in texts]
    for step in said.T:
        mask, own = grow(mask), [grow(each) for each in own]
        both = feed(model, caches[0], step[:, None], mask)
        for row in range(2):
            alone = feed(model, apart[row], step[row : row + 1, None], own[row])
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)
