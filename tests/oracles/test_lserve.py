"""LServe against its card: two levels, which heads stream, what is read, and when a list of pages is made anew."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold import artefacts
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.methods.lserve import LServe
from kvfold.methods.tokenselect import TokenSelect
from kvfold.selectors import Bounds, Every, Hierarchical, Selection, SomeHeads
from kvfold.testing import steps as forced
from kvfold.views import Site
from models import dynamic, feed, follow, grow, reference, subject, tokens

GATES = ((0.9, 0.1), (0.2, 0.8), (0.3, 0.4))


def remembered(index: Bounds | Hierarchical, keys: torch.Tensor):
    """An index of keys (B, H, T, D), from scratch."""
    b, h, _, d = keys.shape
    held = index.open(Spec(b, h, d, d, keys.dtype, keys.device))
    held.extend(Chunk(keys, keys, torch.ones(keys.shape[:3], dtype=torch.bool)), np.zeros((b, h), dtype=np.int64))
    return held


def test_oracle_1_two_levels_matter():
    page_a, page_b = [[4.0, -4], [4, -4], [-4, 4], [-4, 4]], [[3.0, 3]] * 4
    keys, q = torch.tensor(page_a + page_b)[None, None], torch.ones(1, 1, 1, 2)
    units = np.array([[2]])
    assert remembered(Bounds(4), keys).scores(q, units).flatten().tolist() == [8, 6]
    assert remembered(Hierarchical(4, 2), keys).scores(q, units).flatten().tolist() == [0, 6]


@pytest.mark.parametrize("t", [256, 300, 305])
def test_oracle_2_a_page_promises_no_less_than_it_holds_and_no_more_than_one_bound(t):
    rng = torch.Generator().manual_seed(t)
    keys, q = torch.randn(2, 3, t, 8, generator=rng), torch.randn(2, 3, 4, 8, generator=rng)
    units = np.full((2, 3), -(-t // 64))
    two, one = (remembered(index, keys).scores(q, units) for index in (Hierarchical(64, 16), Bounds(64)))
    products = torch.einsum("bhgd,bhtd->bhgt", q, keys)
    logical = remembered(Bounds(16), keys).scores(q, np.full((2, 3), -(-t // 16)))
    for n, page in enumerate(products.split(64, -1)):
        assert (two[..., n] >= page.amax(-1) - 1e-5).all()
        assert torch.equal(two[..., n], logical[..., 4 * n : 4 * n + 4].amax(-1))
    assert (two <= one + 1e-5).all() and bool((two < one - 1e-3).any())


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_oracle_3_roles_are_shared_out_over_all_layers_and_heads(sparsity):
    method = LServe(static_sparsity=sparsity, gates=GATES)
    whole = [method.retrieval(layer, 3) or (True, True) for layer in range(3)]
    streaming = [(layer, head) for layer in range(3) for head in range(2) if not whole[layer][head]]
    lowest = sorted(((gate, layer, head) for layer, row in enumerate(GATES) for head, gate in enumerate(row)))
    want = {0.0: 0, 0.25: 2, 0.5: 3, 1.0: 6}[sparsity]  # of six; the quantile lies between the first and the second
    assert streaming == sorted(place[1:] for place in lowest[:want])
    if sparsity == 0.5:
        assert whole == [(True, False), (False, True), (False, True)]


@pytest.mark.parametrize("method", [LServe(256), LServe(1.0), LServe(0.01, page=24, logical=8)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_oracle_4_a_budget_of_all_there_is_is_full_attention(family, method):
    """The last by its least of three pages."""
    prompt, said = tokens(40, 23), forced(2, 12)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), method), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


def test_oracle_4_an_interval_of_one_is_a_choice_at_each_step(monkeypatch):
    prompt, said, options = tokens(150, 110), forced(2, 9), {"budget": 24, "page": 8, "logical": 4}

    def run(interval: int) -> torch.Tensor:
        cache = kvfold.Cache(subject("llama"), LServe(**options, interval=interval))
        return follow(subject("llama"), cache, *prompt.values(), said)

    plain = Selection.choose
    one, four = run(1), run(4)
    monkeypatch.setattr(Selection, "choose", lambda self, *given: plain(self, *given[:4]))  # nothing is handed in
    assert torch.equal(run(4), one) and not torch.allclose(four, one, atol=1e-3)


# -- lists that live for some steps --------------------------------------------------------------------------


def lists(interval: int, page: int, lengths: list[int], more: int, budget: int = 0):
    """A segment of rows of so many tokens that reads by LServe's rule, and its choices over `more` steps."""
    rng = torch.Generator().manual_seed(7)
    index = Hierarchical(page, page // 2)
    form = Indexed(Dense(page_size=page // 2), Selection(index, budget or 3 * page, least=3, reuse=Every(interval)))
    b, t = len(lengths), max(lengths)
    segment = form.open(Spec(b, 1, 8, 8, torch.float32, torch.device("cpu")))
    valid = torch.arange(t)[None, None] >= t - torch.tensor(lengths)[:, None, None]
    keys, values = (torch.randn(b, 1, t, 8, generator=rng) for _ in range(2))
    segment.append(Chunk(keys, values, valid, {POSITION: (valid.cumsum(-1) - 1).clamp(min=0).int()}))
    read, places = [], torch.tensor(lengths, dtype=torch.int32)[:, None]
    plain = Selection.choose

    def noted(self, *given):
        chosen, choice = plain(self, *given)
        read.append(chosen.mask)
        return chosen, choice

    def step() -> np.ndarray:
        nonlocal places
        k, v = (torch.randn(b, 1, 1, 8, generator=rng) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Selection, "choose", noted)
            segment.step(torch.randn(b, 1, 1, 1, 8, generator=rng), k, v, places, 0.35, weights=False)
        places = places + 1
        return segment.choice.made.copy()

    return segment, [step() for _ in range(more)], read, step


def test_oracle_5_four_steps_share_one_list():
    """As steps 4096 ... 4099 do, where pages are smaller: at 64 tokens and so on."""
    _, made, read, _ = lists(4, 8, [64], 9)
    assert [int(each[0]) for each in made] == [65, 65, 65, 65, 69, 69, 69, 69, 73]
    of_list = [each[0, 0, 0] for each in read]
    for first in (0, 4):
        for later in of_list[first + 1 : first + 4]:
            assert (later[: len(of_list[first])] == of_list[first]).all()
    assert (of_list[0][:8] != of_list[4][:8]).any()  # another query, another list
    # A page is opened at a step that chooses, and is read from its first token on.
    assert all(each[-1] and each.sum() == 3 for each in of_list)


def test_an_interval_that_does_not_divide_a_page_never_misses_the_open_one():
    _, made, read, _ = lists(6, 8, [60], 14)
    assert [int(each[0]) for each in made] == [61] * 6 + [67] * 6 + [73] * 2  # at 60, 66 and 72 tokens
    lengths = [each.shape[-1] for each in read]
    assert lengths == [8] * 4 + [9] * 8 + [10] * 2  # a page opens at 64, in the middle of a list's life
    assert all(each[0, 0, 0, -1] for each in read)


def test_rows_of_different_lengths_choose_at_their_own_times():
    _, made, *_ = lists(4, 8, [64, 62, 65], 6)
    assert np.stack(made, 1).tolist() == [
        [65, 65, 65, 65, 69, 69], [63, 63, 65, 65, 65, 65], [66, 66, 66, 69, 69, 69]
    ]  # fmt: skip


def test_a_list_is_stale_when_its_tokens_are_others():
    segment, _, _, step = lists(4, 8, [64, 64], 2)
    assert segment.choice.made.tolist() == [65, 65]
    # A crop of one row.
    segment.truncate(np.array([[65], [66]]))
    segment.cropped(np.array([65, 99]))
    assert segment.choice.made.tolist() == [-1, 65] and step().tolist() == [67, 65]
    # A dropped token, and one that is another now.
    valid, _ = segment.columns()
    gone = torch.zeros_like(valid)
    gone[1, 0, 3] = True
    segment.keep(valid & ~gone, {})
    assert segment.choice.made.tolist() == [67, -1]
    segment.choice.made[1] = 67
    segment.amend(torch.tensor([[[5]], [[-1]]]), torch.zeros(2, 1, 1, 8), None)
    assert segment.choice.made.tolist() == [-1, 67]
    # Rows that stand elsewhere take theirs along, and those of a batch that has none choose.
    turned = segment.select(np.array([1, 0]))
    assert turned.choice.made.tolist() == [67, -1]
    other, *_ = lists(4, 8, [64], 0)
    turned.join(other)
    assert turned.choice.made.tolist() == [67, -1, -1]
    # A further turn, of one row.
    valid = torch.tensor([[[True, True]], [[False, True]], [[False, True]]])
    more = torch.zeros(3, 1, 2, 8)
    turned.choice.made[:] = 67
    turned.append(Chunk(more, more, valid, {POSITION: torch.full((3, 1, 2), 70, dtype=torch.int32)}))
    assert turned.choice.made.tolist() == [-1, 67, 67]


def test_a_choice_made_before_a_multiple_is_stale_behind_it():
    """Also where the step at the multiple itself was one of a pass that reads everything."""
    rule, query = Every(4), torch.zeros(1, 0)
    for made, seen, stale in ((65, 68, False), (65, 69, True), (67, 69, True), (67, 70, True), (69, 72, False)):
        choice = kvfold.formats.Picked(np.zeros((1, 1, 1, 3), dtype=bool), query, np.array([made]))
        assert rule.stale(choice, query, np.array([seen])).tolist() == [stale]


def test_lists_follow_a_cache_that_is_cropped_joined_and_kept():
    """In a model: what was taken back, or joined, gives what a cache gives that never had it."""
    model, options = subject("llama"), {"budget": 24, "page": 8, "logical": 4}
    prompt, said = tokens(120), forced(1, 12)
    cache = kvfold.Cache(model, LServe(**options))
    mask = prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    for step in said.T[:6]:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
    cache.crop(122)  # two are left
    mask, rest = mask[:, :122], forced(1, 9)[:, 3:]
    again = kvfold.Cache(model, LServe(**options))
    feed(model, again, *prompt.values())
    for at in range(2):
        feed(model, again, said[:, at : at + 1], mask[:, : 121 + at])
    for each in again.paged:
        each.segments[0][1].choice.made[:] = -1  # a crop lets a row choose anew, also between two multiples
    for step in rest.T:
        mask = grow(mask)
        assert_close(*(feed(model, each, step[:, None], mask) for each in (cache, again)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [LServe(24, page=8, logical=4), TokenSelect(24, sinks=2, recent=4, reuse=-1.0)])
def test_a_tentative_pass_leaves_the_list_as_it_was(method):
    """Of a row that would not choose yet, also where the pass has made another."""
    model, prompt, said = subject("llama"), tokens(120, 90), forced(2, 3)
    cache, untouched = (kvfold.Cache(model, method) for _ in range(2))
    for each in (cache, untouched):
        follow(model, each, *prompt.values(), said)
    mask = grow(prompt["attention_mask"], 3)
    with cache.tentative(lambda view: None):
        for more in range(6):
            feed(model, cache, forced(2, 1), grow(mask, 1 + more))
    for step in forced(2, 4).T:
        mask = grow(mask)
        assert torch.equal(*(feed(model, each, step[:, None], mask) for each in (cache, untouched)))


def test_joined_rows_give_what_each_gives_alone():
    model, options = subject("llama"), {"budget": 24, "page": 8, "logical": 4, "static_sparsity": 0.5, "sinks": 8}
    texts, said = [tokens(121, seed=3), tokens(70, seed=4)], forced(2, 14)
    caches = [kvfold.Cache(model, LServe(**options, recent=16)) for _ in texts]
    masks = [text["attention_mask"] for text in texts]
    for row, (cache, text) in enumerate(zip(caches, texts, strict=True)):
        feed(model, cache, *text.values())
        masks[row] = grow(masks[row])
        feed(model, cache, said[row : row + 1, :1], masks[row])
    apart = [cache.fork() for cache in caches]
    caches[0].join(caches[1])
    both = torch.zeros(2, 122, dtype=torch.long)
    both[0], both[1, 51:] = 1, 1
    for at in range(1, 14):
        both, masks = grow(both), [grow(mask) for mask in masks]
        got = feed(model, caches[0], said[:, at : at + 1], both)
        for row in range(2):
            alone = feed(model, apart[row], said[row : row + 1, at : at + 1], masks[row])
            assert_close(got[row : row + 1], alone, atol=1e-4, rtol=0)


# -- streaming heads -----------------------------------------------------------------------------------------

STREAMING = {"static_sparsity": 0.5, "gates": GATES, "page": 8, "logical": 4, "sinks": 8, "recent": 16}


def test_streaming_heads_hold_sinks_and_recent_pages():
    """A page goes when the next is opened; the others hold everything."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), LServe(24, **STREAMING))
    prompt = tokens(100)
    feed(model, cache, *prompt.values())
    assert all(len(head) == 100 for layer in range(3) for head in cache.kept(layer)[0])  # the prompt's window is wide
    mask = prompt["attention_mask"]
    for at, step in enumerate(forced(1, 30).T):
        mask, seen = grow(mask), 101 + at
        feed(model, cache, step[:, None], mask)
        begin = (seen - 1) // 8 * 8 - 16
        for layer, whole in enumerate(((True, False), (False, True), (False, True))):
            for head, kept in zip(whole, cache.kept(layer)[0], strict=True):
                assert kept == (list(range(seen)) if head else [*range(8), *range(begin, seen)])


def test_chunks_of_a_prompt_see_what_the_mask_would_show():
    model, prompt = subject("llama"), tokens(100)
    cache = kvfold.Cache(model, LServe(24, **STREAMING, prompt_recent=32))
    ids, mask = prompt.values()
    with cache.prefilling():
        for stop in (40, 80, 100):
            start = {40: 0, 80: 40, 100: 80}[stop]
            feed(model, cache, ids[:, start:stop], mask[:, :stop])
            begin = max(8, (stop - 1) // 8 * 8 - 32)
            assert cache.kept(0)[0] == [list(range(stop)), [*range(8), *range(begin, stop)]]


def test_a_streaming_head_reads_its_pages_and_they_alone():
    """By definition, also while it still holds what the prompt left."""
    rng = torch.Generator().manual_seed(5)
    method = LServe(32, **STREAMING)
    form = Indexed(Dense(), method.selection(Site(0, 0, (0, 1, 2), 3)))
    assert isinstance(form.selection, SomeHeads) and form.selection.heads == (True, False)
    keys, values = (torch.randn(1, 2, 91, 8, generator=rng) for _ in range(2))
    segment, places = form.open(Spec(1, 2, 8, 8, torch.float32, torch.device("cpu"), group=2)), torch.arange(91)
    some = Chunk(keys, values, torch.ones(1, 2, 91, dtype=torch.bool), {POSITION: places.int().expand(1, 2, 91)})
    segment.append(some.take(torch.arange(90).expand(1, 2, 90)))
    q = torch.randn(1, 2, 2, 1, 8, generator=rng)
    out, *_ = segment.step(q, keys[:, :, 90:], values[:, :, 90:], torch.tensor([[90]]), 0.4, weights=False)
    for head, group in np.ndindex(2, 2):
        asked = q[0, head, group, 0]
        if head == 1:
            read = [*range(8), *range(72, 91)]
        else:
            small = [torch.maximum(asked * x.amin(0), asked * x.amax(0)).sum() for x in keys[0, head].split(4)]
            pages = [max(small[2 * n : 2 * n + 2]) for n in range(11)]
            best = sorted(sorted(range(11), key=lambda n: -pages[n])[:3])
            read = [t for n in [*best, 11] for t in range(8 * n, min(8 * n + 8, 91))]
        weights = (keys[0, head, read] @ asked * 0.4).softmax(-1)
        assert_close(out[0, head, group, 0], weights @ values[0, head, read], atol=1e-5, rtol=0)


def test_a_page_that_goes_of_a_streaming_head_leaves_the_others_list():
    """What these hold has no say: no list is made anew, and nothing is remembered of them."""
    model = subject("llama")
    cache = kvfold.Cache(model, LServe(24, **STREAMING))
    prompt = tokens(98)
    feed(model, cache, *prompt.values())
    mask, made = prompt["attention_mask"], []
    for step in forced(1, 12).T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
        made.append(int(cache.paged[0].segments[0][1].choice.made[0]))
    assert made == [99, 99, 101, 101, 101, 101, 105, 105, 105, 105, 109, 109]
    segment = cache.paged[0].segments[0][1]
    assert segment.index.inner.held.shape[:2] == (1, 1) and segment.choice.units.shape[:2] == (1, 1)


def test_streaming_heads_are_saved_and_forked(tmp_path):
    model, prompt = subject("llama"), tokens(90, 64)
    cache = kvfold.Cache(model, LServe(24, **STREAMING))
    feed(model, cache, *prompt.values())
    mask = grow(prompt["attention_mask"])
    feed(model, cache, forced(2, 1), mask)
    cache.save(tmp_path / "it.safetensors")
    loaded, other = kvfold.Cache.load(tmp_path / "it.safetensors", model), cache.fork()
    for step in forced(2, 6)[:, 1:].T:
        mask = grow(mask)
        want, *got = (feed(model, each, step[:, None], mask) for each in (cache, loaded, other))
        assert all(torch.equal(want, each) for each in got)


def test_gates_come_from_duoattention():
    model = subject("llama")
    bound = kvfold.Cache(model, "lserve(static_sparsity=0.5)").method
    assert [list(row) for row in bound.gates] == artefacts.find("duoattention", model).data["gates"]
    assert kvfold.Cache(model, "lserve").method.gates is None
    with pytest.raises(ValueError, match=r"lserve needs gates.*kvfold calibrate duoattention --model"):
        LServe(static_sparsity=0.5).selection(Site(0, 0, (0,), 1))
    with pytest.raises(ValueError, match="has 3 layers; the model has 2 layers on pages"):
        LServe(static_sparsity=0.5, gates=GATES).selection(Site(0, 0, (0, 1), 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logical": 24}, "page=64 must be a multiple of logical=24"), ({"logical": 0}, "logical=0"),
        ({"page": 0}, "page=0"), ({"interval": 0}, "interval=0"),
        ({"sinks": -1}, "sinks=-1"), ({"recent": 0}, "recent=0"), ({"prompt_recent": 0}, "prompt_recent=0"),
        ({"static_sparsity": 1.5}, "static_sparsity=1.5"), ({"budget": 0}, "budget=0"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        LServe(**options)
