"""The elite format: what every format promises, for one whose heads hold the same tokens, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from format_cases import ARENA, DV, B, D, H, arena_of, held, query, reachable, same, softmax
from torch.testing import assert_close

from kvfold.formats import (
    KINDS,
    LOG_MASS,
    POSITION,
    Basis,
    Chunk,
    Dense,
    Elite,
    EliteSegment,
    Format,
    Segment,
    Spec,
    format_from,
    format_to,
)  # fmt: skip
from kvfold.ops.attend import blocked
from kvfold.pages import Arena, OutOfPages
from kvfold.rotation import Compact, Still

PAIRS, RANK = 3, 20
N = H * (D - 2 * PAIRS + DV)
LENGTHS = [41, 0, 9]
FORM = Elite("known", page_size=4)


def basis(rank: int = RANK, seed: int = 0, pairs: int = PAIRS) -> Basis:
    rng = torch.Generator().manual_seed(seed)
    wide = H * (D - 2 * pairs + DV)
    latent = torch.linalg.qr(torch.randn(wide, wide, generator=rng, dtype=torch.float64))[0][:, :rank]
    elite = torch.zeros(H, D, dtype=torch.bool)
    for head in range(H):
        first = torch.randperm(D // 2, generator=rng)[:pairs]
        elite[head, first] = elite[head, first + D // 2] = True
    return Basis(elite, latent.float().contiguous())


KNOWN = basis()


def chunk(lengths, seed=0, dtype=torch.float32, start=0, mass=True) -> Chunk:
    """Random tokens, the same of all heads of a row, padded on the left."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.full((B,), lengths) if isinstance(lengths, int) else torch.tensor(lengths)
    b, t = len(counts), int(counts.max())
    keys, values = (torch.randn(b, H, t, d, generator=rng).to(dtype) for d in (D, DV))
    valid = (torch.arange(t) >= t - counts[:, None])[:, None].expand(b, H, t)
    columns = {POSITION: (valid.cumsum(-1) - 1 + start).clamp(min=0).to(torch.int32)}
    if mass:
        columns[LOG_MASS] = torch.rand(b, 1, t, generator=rng).expand(b, H, t)
    return Chunk(keys, values, valid, columns)


def spec_of(tokens: Chunk, known: Basis = KNOWN, **more) -> Spec:
    return Spec.of(tokens, artefact={"known": known}, **more)


def opened(tokens: Chunk, known: Basis = KNOWN, **more) -> Segment:
    segment = FORM.open(spec_of(tokens, known, **more))
    segment.append(tokens, even=bool(tokens.valid.all()))
    return segment


def projected(tokens: Chunk, known: Basis = KNOWN) -> list[dict[str, torch.Tensor]]:
    """What a segment holds of tokens, token by token and number by number."""
    keys, values = tokens.keys.double().clone(), tokens.values.double().clone()
    onto = known.latent.double() @ known.latent.double().mT
    for b in range(keys.shape[0]):
        for t in range(keys.shape[2]):
            y = [x for h in range(H) for x in (*keys[b, h, t, ~known.elite[h]], *values[b, h, t])]
            y = onto @ torch.stack(y)
            for h in range(H):
                own = y[h * len(y) // H : (h + 1) * len(y) // H]
                keys[b, h, t, ~known.elite[h]], values[b, h, t] = own[:-DV], own[-DV:]
    return held(Chunk(keys.float(), values.float(), tokens.valid, tokens.columns))


def test_it_is_a_format():
    segment = opened(chunk(LENGTHS))
    assert isinstance(FORM, Format) and isinstance(segment, Segment) and KINDS["elite"] is Elite
    assert format_from(format_to(FORM)) == FORM == eval(repr(FORM)) and hash(FORM) == hash(eval(repr(FORM)))
    assert FORM.traits.addressed == "whole" and FORM.traits.frame == "unrotated" and FORM.traits.crops == "exact"
    with pytest.raises(NotImplementedError, match="graphs=False"):
        segment.reserve()


@ARENA
def test_what_comes_out_is_the_projection_of_what_went_in(arena):
    given = chunk(LENGTHS)
    segment = opened(given, arena=arena_of(arena))
    assert segment.counts().tolist() == segment.lengths().tolist() == [[n] * H for n in LENGTHS]
    for mine, theirs, raw in zip(held(segment), projected(given), held(given), strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        assert len(raw["keys"]) == 0 or (mine["values"] - raw["values"]).abs().max() > 0.1


def test_a_whole_basis_loses_nothing():
    given = chunk(LENGTHS)
    segment = opened(given, basis(N))
    for mine, theirs in zip(held(segment), held(given), strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_computes_in_the_models_dtype(dtype):
    segment, q = opened(chunk(LENGTHS, dtype=dtype)), query(2).to(dtype)
    tokens = segment.dense()
    assert tokens.keys.dtype == tokens.values.dtype == dtype
    (out, lse, _), (want, norm, _) = segment.attend(q, 0.3), softmax(segment, q, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out.float(), want, atol=3e-2, rtol=3e-2)
    assert_close(lse, norm, atol=3e-2, rtol=1e-2)


@pytest.mark.parametrize("lengths", [LENGTHS, 1, 24, [0, 0, 0]], ids=str)
@pytest.mark.parametrize("extra", ["", "read", "no mass", "weights"])
@pytest.mark.parametrize("small", [False, True], ids=["one block", "blocks"])
def test_attention_is_one_softmax_over_what_is_held(lengths, extra, small, monkeypatch):
    if small:
        monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 1 << 9)
    segment = opened(chunk(lengths, mass=extra != "no mass"))
    valid, _ = segment.columns()
    read = torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if extra == "read" else None
    for n in (1, 5):
        out, lse, weights = segment.attend(query(n), 0.3, read=read, weights=extra in ("weights", "read"))
        want, norm, shares = softmax(segment, query(n), 0.3, read)
        assert_close(out, want, atol=2e-5, rtol=1e-5)
        assert_close(lse, norm, atol=2e-5, rtol=1e-5)
        if weights is not None:
            assert_close(weights, shares, atol=1e-5, rtol=1e-4)
        assert (weights is None) == (extra not in ("weights", "read"))


def test_no_key_and_no_value_is_restored_to_attend(monkeypatch):
    segment = opened(chunk(LENGTHS))
    want = segment.attend(query(1), 0.3)
    monkeypatch.setattr(EliteSegment, "states", lambda *_: 1 / 0)
    assert torch.equal(segment.attend(query(1), 0.3)[0], want[0])


def test_streaming_gives_the_bits_of_one_shot():
    given = chunk(37, seed=3)
    whole = opened(given)
    parts = FORM.open(spec_of(given))
    for start, stop in ((0, 1), (1, 9), (9, 10), (10, 37)):
        columns = {name: column[..., start:stop] for name, column in given.columns.items()}
        parts.append(Chunk(*(x[:, :, start:stop] for x in (given.keys, given.values, given.valid)), columns), even=True)
    assert same(held(parts), held(whole))


def test_rows_of_a_batch_are_rows_alone():
    given, more = chunk(LENGTHS), chunk([9, 20, 1], seed=1)
    batch, q = opened(given), query(2)
    batch.append(more)
    out, lse, _ = batch.attend(q, 0.3)
    for row in range(B):
        alone = opened(_row(given, row))
        alone.append(_row(more, row))
        assert same(held(alone), held(batch)[row * H : row * H + H])
        mine = alone.attend(q[row : row + 1], 0.3)
        assert_close(mine[0][0], out[row], atol=1e-5, rtol=1e-5)
        assert_close(mine[1][0], lse[row], atol=1e-5, rtol=1e-5)


def _row(tokens: Chunk, row: int) -> Chunk:
    columns = {name: column[row : row + 1] for name, column in tokens.columns.items()}
    return Chunk(*(x[row : row + 1] for x in (tokens.keys, tokens.values, tokens.valid)), columns)


@ARENA
def test_a_step_is_an_append_and_attention(arena):
    one, two = (opened(chunk(LENGTHS, mass=False), arena=arena_of(arena)) for _ in range(2))
    for step in range(9):
        new, at, q = chunk(1, 50 + step, mass=False), torch.full((B, 1), 50 + step, dtype=torch.int32), query(1, step)
        out, lse, _ = one.step(q, new.keys, new.values, at, 0.3, weights=False)
        two.append(Chunk(new.keys, new.values, new.valid, {POSITION: at[:, None].expand(-1, H, -1)}), even=True)
        assert_close((out, lse), two.attend(q, 0.3)[:2], atol=1e-6, rtol=1e-6)
    assert same(held(one), held(two)) and one.counts().tolist() == [[n + 9] * H for n in LENGTHS]


def test_whole_tokens_go_and_a_crop_is_exact():
    segment, before = opened(chunk(LENGTHS)), held(opened(chunk(LENGTHS)))
    fork = segment.select(np.arange(B))
    valid, columns = segment.columns()
    segment.keep(valid & (columns[POSITION] % 3 != 1), {"age": torch.full(valid.shape, 7.0)})
    for mine, old in zip(held(segment), before, strict=True):
        stays = old[POSITION] % 3 != 1
        assert torch.equal(mine["keys"], old["keys"][stays]) and (mine["age"] == 7).all()
    fork.truncate(np.array([[5, 5], [0, 0], [9, 9]]))
    assert [len(row["keys"]) for row in held(fork)] == [5, 5, 0, 0, 9, 9]
    for mine, old in zip(held(fork), before, strict=True):
        assert torch.equal(mine["keys"], old["keys"][: len(mine["keys"])])
    segment.clear()
    assert segment.longest == 0 and not segment.counts().any() and not segment.row_nbytes().any()


def test_rows_are_chosen_forked_and_joined():
    segment, other = opened(chunk(LENGTHS)), opened(chunk([3, 4, 5], seed=2))
    rows = held(segment)
    twice = segment.select(np.array([2, 0, 0]))
    assert segment.shared and same(held(twice), [rows[i] for i in (4, 5, 0, 1, 0, 1)])
    twice.append(chunk(2, seed=8), even=True)
    assert same(held(segment), rows)  # who was forked is as before
    both = [*held(segment), *held(other)]
    segment.join(other)
    assert same(held(segment), both) and segment.counts().tolist() == [[n] * H for n in (*LENGTHS, 3, 4, 5)]
    with pytest.raises(ValueError, match=r"other=Elite\(key='other'"):
        segment.join(replace(FORM, key="other").open(Spec.of(chunk(1), artefact={"other": KNOWN})))
    with pytest.raises(ValueError, match="other=DenseSegment"):
        segment.join(Dense().open(Spec.of(chunk(1))))


@ARENA
def test_a_restored_segment_goes_on_bit_for_bit(arena):
    given = chunk(LENGTHS)
    segment = opened(given, arena=arena_of(arena))
    valid, columns = segment.columns()
    segment.keep(valid & (columns[POSITION] != 2), {}, slack=True)
    said, tensors = segment.state()
    assert said["counts"] == segment.counts().tolist() and tensors.keys() == {"keys", "latent", POSITION, LOG_MASS}
    again = FORM.restore(spec_of(given, arena=arena_of(arena)), said, {n: x.clone() for n, x in tensors.items()})
    for step in range(3):
        assert same(held(again), held(segment))
        assert all(map(torch.equal, again.attend(query(2, step), 0.3)[:2], segment.attend(query(2, step), 0.3)[:2]))
        for x in (segment, again):
            x.append(chunk([5, 1, 20], seed=10 + step))
    twin = segment.select(np.arange(B))
    short, few = twin.state(of="0.1")
    said, tensors = segment.state()
    one = FORM.restore(spec_of(given), said, tensors)
    two = FORM.restore(spec_of(given), short, few, twin=one)
    assert not few and one.same_pages(two) and same(held(two), held(segment))
    with pytest.raises(ValueError, match=r"counts=.* must be those of the segment that holds the same pages"):
        FORM.restore(spec_of(given), {**short, "counts": [[1, 1]] * B}, few, twin=one)


def test_a_damaged_state_is_refused_before_anything_is_allocated():
    given = chunk(LENGTHS)
    said, tensors = opened(given).state()
    room = Arena(1 << 20)
    spec = spec_of(given, arena=room)
    wrong = [
        ("latent", {**tensors, "latent": tensors["latent"][1:]}),
        ("keys", {**tensors, "keys": tensors["keys"].double()}),
        (POSITION, {n: x for n, x in tensors.items() if n != POSITION}), ("extra", {**tensors, "extra": torch.ones(3)}),
        (POSITION, {**tensors, POSITION: tensors[POSITION] + 1000}),
    ]  # fmt: skip
    for name, damaged in wrong:
        with pytest.raises(ValueError, match=name):
            FORM.check(spec, said, damaged, np.array([50, 50, 50]))
    for counts in ([[41, 41], [0, 0]], [[41, 40], [0, 0], [9, 10]], "many", None):
        with pytest.raises(ValueError, match="counts="):
            FORM.restore(spec, {**said, "counts": counts}, tensors)
    assert not room.pools
    with pytest.raises(ValueError, match=r"key='known' of an elite format is not what was measured: \['other'\]"):
        FORM.restore(replace(spec, artefact={"other": KNOWN}), said, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bytes_are_the_cards_sum(dtype):
    """H * 2r + C numbers a token and its position, beside the basis: nothing is there once a head."""
    segment, tokens = opened(chunk(1600, dtype=dtype, mass=False)), 1600 * B
    wanted = (H * 2 * PAIRS + RANK) * dtype.itemsize + 4
    assert tokens * wanted < segment.nbytes - KNOWN.nbytes < 1.03 * tokens * wanted
    assert segment.row_nbytes().sum() == 1600 * B * wanted + 4 * segment.table.pool.pages  # and reference counts


def test_bytes_are_those_of_all_tensors_that_can_be_reached():
    segment = opened(chunk(LENGTHS))
    segment.append(chunk(9), even=True)
    assert segment.nbytes == reachable(segment)
    fork, counted = segment.select(np.arange(B)), set()
    assert segment.bytes_beside(counted) + fork.bytes_beside(counted) == reachable([segment, fork])


def test_a_full_arena_refuses_whole_steps():
    room = Arena(1 << 22)
    segment = opened(chunk(LENGTHS), arena=room)
    room.capacity, refused = room.nbytes, 0
    for step in range(60):
        new, before = chunk([1, 1, 3], 100 + step), held(segment)
        pages = segment.pages_for(new.valid.sum(-1).numpy())
        try:
            segment.append(new)
        except OutOfPages:
            refused += 1
            assert same(held(segment), before) and any(count > pool.free for pool, count in pages.items())
            room.capacity += 4096
    assert refused > 2


def _differing(tokens: Chunk, name: str) -> Chunk:
    if name == "valid":
        valid = tokens.valid.clone()
        valid[0, 1, -1] = False
        return tokens.but(valid)
    column = tokens.columns[name].clone()
    column[0, 1, -1] += 1
    return tokens.but(tokens.valid, {**tokens.columns, name: column})


def test_what_differs_between_heads_is_refused_and_nothing_changes(unchecked):
    segment = opened(chunk(LENGTHS))
    before, (valid, _) = held(segment), segment.columns()
    for name in ("valid", POSITION, LOG_MASS):
        with pytest.raises(ValueError, match=f"{name} must be the same for all heads of a row"):
            segment.append(_differing(chunk(3), name))
    mask = valid.clone()
    mask[0, 0, 3] = False
    with pytest.raises(ValueError, match="mask must be the same for all heads"):
        segment.keep(mask, {})
    with pytest.raises(ValueError, match="age must be the same for all heads"):
        segment.keep(valid, {"age": torch.rand(valid.shape)})
    with pytest.raises(ValueError, match=r"counts=.* must be the same for all heads"):
        segment.truncate(np.array([[3, 4], [0, 0], [1, 1]]))
    with pytest.raises(ValueError, match="holds tokens of all heads together, written once"):
        segment.amend(torch.zeros(B, H, 1, dtype=torch.int64), torch.ones(B, H, 1, D), None)
    assert same(held(segment), before)


def test_compact_positions_are_refused_but_for_rows_of_others():
    segment = opened(chunk(LENGTHS))
    want = segment.attend(query(1), 0.3)[0]
    for rows in (None, torch.tensor([True, False, False])):
        with pytest.raises(ValueError, match="compact positions"):
            segment.attend(query(1), 0.3, compact=Compact(Still(), rows=rows))
    others = Compact(Still(), rows=torch.tensor([False, True, False]))  # that row has no token here
    assert torch.equal(segment.attend(query(1), 0.3, compact=others)[0], want)


def test_a_basis_of_another_layer_is_refused():
    uneven = KNOWN.elite.clone()
    uneven[0, uneven[0].nonzero()[0]] = False
    for wrong in (
        Basis(KNOWN.elite[:1], KNOWN.latent), Basis(KNOWN.elite, KNOWN.latent[1:]), Basis(uneven, KNOWN.latent),
        Basis(basis(pairs=2).elite, KNOWN.latent),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"basis=.* \(elite, latent\) does not fit layer 0 of 2 heads"):
            FORM.open(spec_of(chunk(3), wrong))
    for changed in ({"key_size": D + 2}, {"value_size": DV + 1}, {"heads": H + 1}):
        with pytest.raises(ValueError, match="does not fit layer 0"):
            FORM.open(replace(spec_of(chunk(3)), **changed))
    with pytest.raises(ValueError, match="page_size=0"):
        Elite("known", page_size=0)
