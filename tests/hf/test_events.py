"""The seams that a method can use, each with a small method that uses nothing else."""

from dataclasses import dataclass

import pytest
import torch

import kvfold
from kvfold import Dense, Keep, Method, Read, Rewrite, Store
from kvfold.formats import LOG_MASS, Chunk
from models import dynamic, feed, follow, greedy, grow, reference, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")
STEPS = torch.arange(5, 25).view(2, 10)


def registered(cls):
    """A method of this test alone, in the registry until the test ends."""
    return kvfold.method(f"test-{cls.__name__.lower()}", title=cls.__name__, kind="evict")(dataclass(frozen=True)(cls))


def make(method="full", name="llama"):
    return subject(name), kvfold.Cache(subject(name), method)


def assert_same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def column(cache, layer: int, name: str) -> list[list[list[float]]]:
    """A column's values in the order of the text, [row][head]."""
    tokens = cache.paged[layer].stored.tokens()[0]
    return [
        [tokens.columns[name][b, h][tokens.valid[b, h]].tolist() for h in range(2)] for b in range(len(tokens.keys))
    ]


# -- Store ---------------------------------------------------------------------------------------------------


def splitting(dtype, act=lambda view: view.rank % 3 == 0):
    @registered
    class Split(Method):
        def after_prefill(self, view):
            return Store(Dense(dtype), act(view))

    return Split()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_store_merges_both_segments(name):
    """Every third token in a segment of its own, in the same precision: nothing changes."""
    prompt = tokens(40, 30)
    model, cache = make(splitting(torch.float32), name)
    expected, logits = greedy(reference(name), dynamic(reference(name)), *prompt.values(), 10)
    got, ours = greedy(model, cache, *prompt.values(), 10)
    assert torch.equal(got, expected)
    assert_same(ours, logits)
    for core in cache.paged:
        assert [segment.counts().tolist() for _, segment in core.segments] == [
            [[26 + 9] * 2, [20 + 9] * 2], [[14] * 2, [10] * 2]
        ]  # fmt: skip
        assert core.kept() == [[list(range(49))] * 2, [list(range(39))] * 2]


def test_store_in_half_precision():
    prompt = tokens(160, 150)
    everything = splitting(torch.bfloat16, lambda view: view.valid)
    half = splitting(torch.bfloat16, lambda view: view.rank < view.count[..., None] // 2)
    sizes = {}
    truth = follow(reference("llama"), None or dynamic(reference("llama")), *prompt.values(), STEPS)
    for label, method in (("none", "full"), ("half", half), ("all", everything)):
        model, cache = make(method)
        got = follow(model, cache, *prompt.values(), STEPS)
        assert (got - truth).abs().max() < (1e-4 if label == "none" else 0.5)
        sizes[label] = cache.nbytes
    assert sizes["half"] < 0.82 * sizes["none"] and sizes["all"] < 0.62 * sizes["none"]


def test_store_then_second_turn_crop_and_reorder():
    prompt = tokens(40, 30)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(splitting(torch.float32))
    feed(model, cache, ids[:, :25], mask[:, :25])
    feed(model, cache, ids[:, 25:], mask)  # moves again: the other segment is no longer in the order of the text
    cache.crop(-7)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.paged[1].kept() == [[list(range(23))] * 2, [list(range(33))] * 2]
    got = feed(model, cache, ids[[1, 0], 33:34], mask[[1, 0], :34])
    assert_same(got, feed(reference("llama"), None, ids[[1, 0], :34], mask[[1, 0], :34])[:, -1:])


def test_a_view_is_in_the_order_of_the_text():
    """Whatever segments hold the tokens: rank, last and recent windows mean the text."""
    orders = []

    @registered
    class Watch(Method):
        def after_prefill(self, view):
            return Store(Dense(torch.float32), view.rank % 2 == 1)

        def after_decode(self, view):
            orders.append(all(
                row[seen].tolist() == sorted(row[seen].tolist())
                for head, valid in zip(view.positions, view.valid, strict=True)
                for row, seen in zip(head, valid, strict=True)
            ))  # fmt: skip
            return Keep(view.last(5))

    model, cache = make(Watch())
    follow(model, cache, *tokens(20, 9).values(), STEPS[:, :3])
    assert orders == [True] * 9
    assert cache.kept(2) == [[[18, 19, 20, 21, 22]] * 2, [[7, 8, 9, 10, 11]] * 2]


def test_store_and_compact_positions():
    text = "streamingllm(budget=12, positions='compact')"
    prompt = tokens(40, 30)
    model, plain = make(text)
    expected = follow(model, plain, *prompt.values(), STEPS)
    model, cache = make(kvfold.parse(text) | splitting(torch.float32))
    assert_same(follow(model, cache, *prompt.values(), STEPS), expected)
    assert len(cache.paged[0].segments) == 2 and cache.kept(1) == plain.kept(1)


# -- Read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2])
def test_read_is_what_dropping_would_be(segments):
    @registered
    class Newest(Method):
        def before_attend(self, view):
            return Read(view.last(9))

    prompt = tokens(30, 12)
    method = Newest() if segments == 1 else splitting(torch.float32) | Newest()
    model, cache = make(method, "llama-one-layer")
    got = follow(model, cache, *prompt.values(), STEPS)
    # 8 stored and the step's own make 9: what streamingllm without sinks attends to.
    _, dropping = make("streamingllm(budget=8, sinks=0)", "llama-one-layer")
    assert_same(got, follow(model, dropping, *prompt.values(), STEPS))
    assert cache.paged[0].counts().tolist() == [[40, 40], [22, 22]]  # nothing was dropped
    _, full = make("full", "llama-one-layer")
    assert (got - follow(model, full, *prompt.values(), STEPS))[:, 1:].abs().max() > 0.1


# -- late events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["after_layer", "after_forward"])
def test_shrinking_layers_that_are_done(event):
    """Each pass leaves 10 tokens in every layer but the last, which keeps 20."""
    calls = []

    def shrink(cache, layers):
        calls.append((len(cache), cache.prefill))
        return {i: Keep(cache[i].last(10)) for i in layers}

    if event == "after_layer":

        @registered
        class Shrink(Method):
            def after_layer(self, cache, ordinal):
                made = shrink(cache, range(ordinal))
                return {**made, 2: Keep(cache[2].last(20))} if ordinal == 2 else made
    else:

        @registered
        class Shrink(Method):
            def after_forward(self, cache):
                return {**shrink(cache, range(2)), 2: Keep(cache[2].last(20))}

    model, cache = make(Shrink())
    follow(model, cache, *tokens(40, 30).values(), STEPS[:, :1])
    once = [(1, True), (2, True), (3, True), (1, False), (2, False), (3, False)]
    assert calls == (once if event == "after_layer" else [(3, True), (3, False)])
    assert [core.counts().tolist() for core in cache.paged] == [[[10, 10]] * 2] * 2 + [[[20, 20]] * 2]
    assert cache.kept(0)[1][0] == list(range(21, 31)) and cache.kept(2)[0][0] == list(range(21, 41))


def test_step_context_and_token_ids():
    seen = []

    @registered
    class Context(Method):
        def _note(self, view):
            view.place.step.setdefault("layers", []).append(view.place.layer)
            seen.append((list(view.place.step["layers"]), view.place.token_ids.tolist()))

        after_prefill = after_decode = _note

        def after_forward(self, cache):
            seen.append(cache.step["layers"])
            return {}

    prompt = tokens(4)
    model, cache = make(Context())
    follow(model, cache, *prompt.values(), torch.tensor([[7]]))
    ids = prompt["input_ids"].tolist()
    for start, read in ((0, ids), (4, [[7]])):
        assert seen[start : start + 4] == [([0], read), ([0, 1], read), ([0, 1, 2], read), [0, 1, 2]]
    assert len(seen) == 8


# -- columns and rewriting -----------------------------------------------------------------------------------


def test_columns_follow_the_tokens(tmp_path):
    """A column that says each token's position again stays with its token."""

    @registered
    class Tagged(Method):
        def after_prefill(self, view):
            keep = (view.positions % 7 != 3) | (view.positions >= 20)
            return Keep(keep, {"tag": view.positions.float() * 2})

        after_decode = after_prefill

    prompt = tokens(30, 17)
    model, cache = make(Tagged())
    forced = STEPS[:, :5]
    follow(model, cache, *prompt.values(), forced)
    mask = grow(prompt["attention_mask"], 5)

    def check(which):
        for layer in range(3):
            kept = which.kept(layer)
            assert column(which, layer, "tag") == [[[2.0 * p for p in head] for head in row] for row in kept]
        return kept

    assert 3 not in check(cache)[0][0] and 24 in check(cache)[0][0]
    cache.save(tmp_path / "tagged")
    loaded = kvfold.Cache.load(tmp_path / "tagged", model)
    assert check(loaded) == check(cache) and loaded.method == Tagged()
    cache.crop(-4)
    check(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    check(cache)
    feed(model, cache, torch.tensor([[5], [6]]), mask[[1, 1], :32])
    assert check(cache)[0] == check(cache)[1]


def test_rewrite_moves_mass_and_columns():
    """Pairs of equal tokens become one of mass two: with a log-mass the answer is the same."""

    @registered
    class Fold(Method):
        def after_prefill(self, view):
            second = view.valid & (view.rank % 2 == 1)
            mass = torch.full(view.valid.shape, 2.0).log()
            columns = {**view.columns, LOG_MASS: mass, "tag": view.positions + 1.0}
            return Rewrite(Chunk(view.keys, view.values, second, columns))

    @registered
    class Double(Method):
        def after_prefill(self, view):
            source = (torch.arange(view.keys.shape[2]) // 2) * 2 + 1
            tokens = Chunk(view.keys[:, :, source], view.values[:, :, source], view.valid, view.columns)
            return Rewrite(tokens)

    prompt = tokens(30)
    model, folded = make(Fold())
    got = follow(model, folded, *prompt.values(), STEPS[:1])
    _, doubled = make(Double())
    assert_same(got, follow(model, doubled, *prompt.values(), STEPS[:1]))
    assert folded.paged[0].counts().tolist() == [[15 + 10] * 2]
    assert column(folded, 0, "tag")[0][0][:15] == [p + 1.0 for p in range(1, 30, 2)]
    assert column(folded, 0, LOG_MASS)[0][0][15:] == [0.0] * 10


def test_rewrite_must_keep_the_slots():
    @registered
    class Shorter(Method):
        def after_prefill(self, view):
            return Rewrite(view.tokens.since(1))

    model, cache = make(Shorter())
    with pytest.raises(ValueError, match=r"Rewrite.tokens has slots \(1, 2, 7\).*\(1, 2, 8\)"):
        feed(model, cache, *tokens(8).values())


# -- observing and adopting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["snapkv(budget=0.5)", "h2o(budget=0.5)", "kvmerger(budget=0.5)"])
def test_observing_a_tentative_pass(slug):
    prompt, ahead = tokens(30, 21), STEPS[:, :4]
    model, cache = make(slug)
    feed(model, cache, *prompt.values())
    before, nbytes, views = cache.kept(1), cache.nbytes, []
    mask = grow(prompt["attention_mask"], 4)
    with cache.tentative(views.append):
        feed(model, cache, ahead, mask)
    assert cache.kept(1) == before and cache.nbytes == nbytes
    assert [view.place.layer for view in views] == [0, 1, 2]
    for view in views:
        assert view.new == 4 and view.place.token_ids.tolist() == ahead.tolist()
        assert (view.count == 15 + 4).tolist()[0] == [True, True]
        # Four queries for each of the two heads of a group, every one's attention summing to one.
        assert_same(view.column_sums().sum(-1), torch.full((2, 2), 8.0))
        assert_same(view.attention(4).sum((2, 3)), view.column_sums())


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one", "padded"])
def test_one_prefill_for_many_methods(lengths):
    prompt, views = tokens(*lengths), []
    model, full = make()
    with full.observed(views.append):
        feed(model, full, *prompt.values())
    steps = STEPS[: len(lengths)]
    for info in kvfold.list_methods():
        options = {"budget": 0.4} if "budget" in info.options else {}
        own, adopted = kvfold.Cache(model, info.slug, **options), kvfold.Cache(model, info.slug, **options)
        if not own.shares_prefill:
            continue
        for view in views:
            adopted.adopt(view)
        feed(model, own, *prompt.values())
        assert adopted.nbytes == own.nbytes and adopted.dense_nbytes == own.dense_nbytes
        mask = prompt["attention_mask"]
        for step in steps.T:
            mask = grow(mask)
            # What a kernel leaves, and what is worked out again, may differ in the last bit of a weight.
            expected = feed(model, own, step[:, None], mask)
            torch.testing.assert_close(feed(model, adopted, step[:, None], mask), expected, atol=1e-4, rtol=0)
        assert [core.kept() for core in adopted.paged] == [core.kept() for core in own.paged]
