"""The format that two layers may share: attention without restoring, and every operation that a segment has."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from cache_files import rewrite
from kvfold import ops
from kvfold.formats import LOG_MASS, POSITION, Chunk, Depth, DepthSegment, Format, Segment, Spec, depth
from kvfold.hf.rope import find_ropes
from kvfold.ops.attend import blocked
from kvfold.pages import Arena, PageTable
from kvfold.rotation import Compact
from models import feed, follow, subject, tokens

B, H, G, D, DV = 2, 3, 2, 16, 8


def chunk(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32, start: int = 0) -> Chunk:
    """Random tokens; row b of every head has `lengths[b]`, head 1 one less."""
    rng = torch.Generator().manual_seed(seed)
    t = max(lengths)
    keys, values = (torch.randn(B, H, t, d, generator=rng).to(dtype) for d in (D, DV))
    less = torch.tensor([0, 1, 0])
    valid = torch.arange(t) < torch.tensor(lengths)[:, None, None] - less[:, None]
    positions = torch.arange(start, start + t, dtype=torch.int32).expand(B, H, t).contiguous()
    return Chunk(keys, values, valid, {POSITION: positions, "score": torch.rand(B, H, t, generator=rng)})


def lone(tokens: Chunk, side: int = 0) -> DepthSegment:
    segment = Depth(side, page_size=4).open(Spec.of(tokens))
    segment.append(tokens)
    return segment


def together(lower: Chunk, upper: Chunk) -> tuple[DepthSegment, DepthSegment]:
    """Two segments that share the directions of the lower one."""
    below, above = (Depth(side, page_size=4).open(Spec.of(lower)) for side in (0, 1))
    add(below, above, lower, upper)
    return below, above


def add(below: DepthSegment, above: DepthSegment, lower: Chunk, upper: Chunk) -> None:
    keys, values = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (lower.keys, lower.values))
    below.append_shared(above, lower, upper.but(lower.valid), keys, values)


def same(segment: DepthSegment, tokens: Chunk, keys: torch.Tensor, values: torch.Tensor, atol: float = 1e-5) -> None:
    """The segment holds the valid ones of `tokens`, with these keys and values."""
    stored = segment.dense()
    assert torch.equal(stored.valid.sum(-1), tokens.valid.sum(-1))
    for mine, theirs in ((stored.keys, keys), (stored.values, values)):
        assert_close(mine[stored.valid], theirs[tokens.valid], atol=atol, rtol=1e-5)
    for name, column in tokens.columns.items():
        assert torch.equal(stored.columns[name][stored.valid], column[tokens.valid]), name


def between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The directions of x with the lengths of y."""
    return torch.nn.functional.normalize(x, dim=-1) * y.norm(dim=-1, keepdim=True)


def test_it_is_a_format():
    assert isinstance(Depth(0), Format)
    assert isinstance(lone(chunk([5, 3])), Segment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_alone_it_gives_back_what_it_got(dtype):
    given = chunk([21, 13], dtype=dtype)
    segment = lone(given)
    assert segment.dense().keys.dtype == dtype
    same(segment, given, given.keys, given.values, atol=1e-5 if dtype == torch.float32 else 2e-2)
    later = chunk([3, 7], seed=1, dtype=dtype)
    segment.append(later)
    assert segment.counts().tolist() == [[24, 22, 24], [20, 18, 20]]


@pytest.mark.parametrize("lengths", [[1, 1], [63, 40], [100, 100]], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("extra", ["", "read", "mass", "compact"])
@pytest.mark.parametrize("block", [1 << 22, 1 << 10], ids=["one block", "blocks"])
def test_attention_is_that_of_what_is_restored(lengths, queries, extra, block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    given = chunk(lengths)
    rng, compact, read = torch.Generator().manual_seed(9), None, None
    if extra == "mass":
        given = given.but(given.valid, {**given.columns, LOG_MASS: torch.rand(given.valid.shape, generator=rng)})
    segment = lone(given, side=1)
    stored = segment.dense()
    keys, seen = stored.keys, stored.valid
    if extra == "read":
        read = torch.rand(seen.shape, generator=rng) > 0.4
        seen = seen & read
    if extra == "compact":
        rope = find_ropes(subject("llama"))[0]
        slots = torch.randint(0, 300, seen.shape, generator=rng)
        compact = Compact(rope, slots)
        keys = rope.shift(keys, slots - stored.positions)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    bias = bias + stored.columns[LOG_MASS] if extra == "mass" else bias
    q = torch.randn(B, H, G, queries, D, generator=rng)
    out, lse, weights = segment.attend(q, 0.3, read=read, compact=compact, weights=False)
    flat = q.reshape(B, H, G * queries, D)
    truth, norm = ops.attend(flat, keys, torch.nn.functional.pad(stored.values, (0, D - DV)), 0.3, bias[:, :, None])
    assert weights is None and out.shape == (B, H, G, queries, DV)
    assert_close(out.reshape(B, H, -1, DV), truth[..., :DV], atol=1e-5, rtol=1e-5)
    assert_close(lse.reshape(B, H, -1), norm, atol=1e-5, rtol=1e-5)


def test_attention_reads_every_plane_once_and_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 20 * B * H * D)
    given = chunk([63, 40])
    segment = lone(given.but(given.valid, {**given.columns, LOG_MASS: torch.rand(given.valid.shape)}))
    assert not segment.table.regular
    found: dict[str, list[int]] = {}
    dense = PageTable.dense

    def watched(table, name, *slots):
        plane = dense(table, name, *slots)
        found.setdefault(name, []).append(plane.shape[1])
        return plane

    monkeypatch.setattr(PageTable, "dense", watched)
    rope = find_ropes(subject("llama"))[0]
    segment.attend(torch.randn(B, H, G, 1, D), 1.0, compact=Compact(rope))
    names = {"keys", "values", POSITION, *map(segment.own, (depth.KEY_NORM, depth.VALUE_NORM, LOG_MASS))}
    assert found == {name: [20, 20, 20, 3] for name in names}


def test_nothing_is_read_of_nothing():
    segment = Depth(0).open(Spec.of(chunk([4, 4])))
    out, lse, _ = segment.attend(torch.randn(B, H, G, 1, D), 1.0)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_two_layers_hold_one_direction():
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    below, above = together(lower, upper)
    assert below.pool is above.pool and below.twin(above)
    same(below, lower, lower.keys, lower.values)
    same(above, upper, between(lower.keys, upper.keys), between(lower.values, upper.values))
    more = chunk([2, 9], seed=2), chunk([2, 9], seed=3)
    add(below, above, *more)
    assert below.twin(above) and above.counts().tolist() == [[23, 21, 23], [22, 20, 22]]
    assert below.pool.used == (below.table.table >= 0).sum() >= (-(-below.counts() // 4)).sum()  # each page once


def test_what_one_drops_or_notes_the_other_keeps():
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    below, above = together(lower, upper)
    truth = between(lower.keys, upper.keys), between(lower.values, upper.values)
    noted = {"score": torch.full(lower.valid.shape, 7.0)}
    below.keep(below.dense().valid, noted)
    same(above, upper, *truth)
    assert below.dense().columns["score"][lower.valid].eq(7).all() and not below.twin(above)
    below, above = together(lower, upper)
    stays = lower.valid & (lower.positions % 3 > 0)
    above.keep(stays, {})
    same(below, lower, lower.keys, lower.values)
    same(above, upper.but(stays), *truth)
    with pytest.raises(AssertionError, match="the same tokens"):
        add(below, above, lower, upper)


def test_rows_forks_and_crops_stay_shared():
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    below, above = together(lower, upper)
    below.remembered, below.upto = torch.tensor([[1.0], [2.0]]), np.array([5, 6])
    rows = np.array([1, 1, 0])
    one, two = below.select(rows), above.select(rows)
    assert one.twin(two) and not one.twin(above)
    assert one.upto.tolist() == [6, 6, 5] and one.remembered.tolist() == [[2], [2], [1]]
    counts = np.minimum(one.counts(), 9)
    for segment in (one, two):
        segment.truncate(counts)
    assert one.twin(two)
    assert_close(one.dense().keys[2][:, :9], lower.keys[0][:, :9], atol=1e-5, rtol=0)
    more = [Chunk(*(x[rows] for x in (c.keys, c.values, c.valid)), {n: x[rows] for n, x in c.columns.items()})
            for c in (chunk([3, 3], seed=5), chunk([3, 3], seed=6))]  # fmt: skip
    add(one, two, *more)
    assert one.twin(two)
    same(below, lower, lower.keys, lower.values)  # nothing of it has moved
    same(above, upper, between(lower.keys, upper.keys), between(lower.values, upper.values))
    for segment in (below, above):
        segment.clear()
    assert below.longest == 0 and below.remembered is None and not below.upto.any()
    assert one.counts().tolist() == (counts + np.array([3, 2, 3])).tolist()


def test_pages_come_back_with_the_next_merge():
    lower, upper = chunk([200, 200]), chunk([200, 200], seed=1)
    below, above = together(lower, upper)
    for segment in (below, above):
        segment.truncate(np.full((B, H), 8))
    add(below, above, chunk([4, 4], seed=2), chunk([4, 4], seed=3))
    assert below.pool.pages <= 4 * B * H  # of 50 each; one to grow


def test_what_one_amends_the_other_keeps():
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    below, above = together(lower, upper)
    slots = torch.full((B, H, 1), 4)
    new = torch.randn(B, H, 1, D)
    above.amend(slots, new, None)
    assert_close(above.dense().keys[:, :, 4:5], new, atol=1e-5, rtol=0)
    assert_close(above.dense().values[:, :, 4], between(lower.values, upper.values)[:, :, 4], atol=1e-5, rtol=1e-5)
    same(below, lower, lower.keys, lower.values)
    assert not below.twin(above)


@pytest.mark.parametrize("arena", [False, True])
def test_layers_that_are_joined_to_empty_ones_share_as_before(arena):
    room = Arena(1 << 20) if arena else None
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    specs = [Spec.of(lower, layer=layer, arena=room) for layer in (1, 2)]
    pairs = [[Depth(side, page_size=4).open(spec) for side, spec in enumerate(specs)] for _ in range(2)]
    add(*pairs[1], lower, upper)
    for side, (mine, theirs) in enumerate(zip(*pairs, strict=True)):
        theirs.upto, theirs.remembered = np.array([21, 13]), torch.full((B, 4), float(side))
        with pytest.raises(ValueError, match="both have been gone through, or neither"):
            mine.join(theirs)
        mine.remembered = torch.zeros(B, 4)
        mine.join(theirs)
        assert mine.upto.tolist() == [0, 0, 21, 13] and mine.remembered[:, 0].tolist() == [0, 0, side, side]
        assert mine.batch == 2 * B and not theirs.longest
    below, above = pairs[0]
    assert below.twin(above) and below.longest == 21
    assert_close(above.dense().keys[B][:, :20], between(lower.keys, upper.keys)[0, :, :20], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="DepthSegment of side 0"):
        below.join(pairs[1][1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_state_has_what_is_remembered_and_shared_pages_once(shared):
    lower, upper = chunk([21, 13]), chunk([21, 13], seed=1)
    below, above = together(lower, upper)
    below.upto, below.remembered = np.array([21, 13]), torch.rand(B, 4)
    if not shared:
        above.keep(above.valid() & (above.column(POSITION) > 0), {})
    assert below.same_pages(above) == shared
    first, second = below.state(), above.state(of="1.1" if shared else None)
    assert first[0]["upto"] == [21, 13] and (not second[1]) == shared
    spec = Spec.of(lower)
    one = Depth(0, page_size=4).restore(spec, *first)
    two = Depth(1, page_size=4).restore(spec, *second, twin=one if shared else None)
    assert one.same_pages(two) == shared and torch.equal(one.remembered, below.remembered) and two.remembered is None
    for mine, theirs in ((one, below), (two, above)):
        assert mine.upto.tolist() == theirs.upto.tolist()
        assert torch.equal(mine.dense().keys, theirs.dense().keys)
        assert mine.dense().columns.keys() == theirs.dense().columns.keys()
    with pytest.raises(ValueError, match=r"key_norm.1 is not among"):
        Depth(1, page_size=4).restore(spec, above.state(of="1.1")[0], {}, twin=lone(lower))
    with pytest.raises(ValueError, match=r"state=\(3, 4\) must be \(2, N\)"):
        Depth(0, page_size=4).restore(spec, first[0], {**first[1], "state": torch.ones(3, 4)})


def test_a_crop_forgets_what_was_gone_through():
    segment = lone(chunk([21, 13]))
    segment.upto = np.array([21, 13])
    segment.cropped(np.array([15, 15]))
    assert segment.upto.tolist() == [15, 13]
    segment.drop_tokens()
    assert segment.longest == 0 and segment.upto.tolist() == [15, 13]


def test_a_file_holds_what_is_shared_once(tmp_path):
    model = subject("llama")
    cache, full = kvfold.Cache(model, "minicache"), kvfold.Cache(model, "full")
    for each in (cache, full):
        feed(model, each, *tokens(160, 160).values())
        each.save(tmp_path / each.method.info.slug)
    sizes = [(tmp_path / slug).stat().st_size for slug in ("minicache", "full")]
    assert sizes[0] < 0.8 * sizes[1]
    loaded = kvfold.Cache.load(tmp_path / "minicache", model)
    one, two = (core.segments[1][1] for core in loaded.paged[1:])
    assert one.twin(two) and one.longest and loaded.nbytes <= cache.nbytes
    mask, steps = torch.ones(2, 180, dtype=torch.long), torch.arange(5, 45).view(2, 20)
    got = follow(model, loaded, steps[:, :1], mask[:, :161], steps[:, 1:])
    assert torch.equal(got, follow(model, cache, steps[:, :1], mask[:, :161], steps[:, 1:]))
    assert one.twin(two) and loaded.nbytes == cache.nbytes


@pytest.mark.parametrize("missing", ["keys", "position", "key_norm.0", "value_norm.1"])
def test_a_file_without_a_plane_is_refused(missing, tmp_path):
    model = subject("llama")
    cache = kvfold.Cache(model, "minicache")
    feed(model, cache, *tokens(20, 20).values())
    cache.save(tmp_path / "c")
    rewrite(tmp_path / "c", lambda _, planes: planes.pop(f"1.1.{missing}"))
    with pytest.raises(ValueError, match=f"damaged: layer [12] has {missing}"):
        kvfold.Cache.load(tmp_path / "c", model)


def test_a_report_counts_what_is_shared_for_the_lower_layer():
    model = subject("llama")
    cache = kvfold.Cache(model, "minicache")
    feed(model, cache, *tokens(160, 160).values())
    report = cache.report()
    alone, lower, upper = (layer.nbytes for layer in report.layers)
    assert report.nbytes == alone + lower + upper == cache.nbytes
    assert lower + upper < 0.7 * 2 * alone and upper < 0.3 * alone
