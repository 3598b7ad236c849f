"""Shadowed: keys of low rank before RoPE, exact outliers, and a tail; what is done to rows is done to all of it."""

import numpy as np
import pytest
import torch
from format_cases import held, same, softmax
from torch.testing import assert_close

from kvfold.formats import LOG_MASS, POSITION, Chunk, Shadowed, Spec, format_from, format_to
from kvfold.formats.joint_keys import low_rank
from kvfold.formats.sizes import empty_segment
from kvfold.hf.rope import find_ropes
from kvfold.pages import Arena, OutOfPages
from models import subject

H, G, D, DV = 2, 2, 16, 16
FORM = Shadowed(rank=8, chunk=4, local=2, outliers=2)
LENGTHS = [90, 13, 71]


def rope():
    return find_ropes(subject("llama"))[0]


def tokens(lengths: list[int], seed: int = 0, start: int = 0, rank: int = 6, mass: bool = False) -> Chunk:
    """Padded in front; keys before RoPE are of this rank over both heads, but for every ninth token."""
    rng, t = torch.Generator().manual_seed(seed), max(lengths)
    b = len(lengths)
    valid = (torch.arange(t) >= t - torch.tensor(lengths)[:, None])[:, None].expand(b, H, t)
    places = (valid.cumsum(-1) - 1 + start).clamp(min=0).to(torch.int32)
    plain = torch.randn(b, t, rank, generator=rng) @ torch.randn(b, rank, H * D, generator=rng)
    keys = plain.view(b, t, H, D).transpose(1, 2)
    keys = rope().shift(keys, places)
    values = torch.randn(b, H, t, DV, generator=rng)
    columns = {POSITION: places}
    if mass:
        columns[LOG_MASS] = torch.rand(b, 1, t, generator=rng).expand(b, H, t)
    return Chunk(keys, values, valid, columns)


def spec_of(rows: int, **more) -> Spec:
    return Spec(rows, H, D, DV, torch.float32, torch.device("cpu"), rope=rope(), group=G, **more)


def opened(chunk: Chunk, form: Shadowed = FORM, **more):
    segment = form.open(spec_of(len(chunk.valid), **more))
    segment.append(chunk, even=bool(chunk.valid.all()))
    return segment


def q(b: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(b, H, G, 1, D, generator=torch.Generator().manual_seed(seed))


def close(one, two) -> None:
    for x, y in zip(held(one), held(two), strict=True):
        for name in y:
            assert_close(x[name], y[name], atol=2e-4, rtol=0)


def test_keys_of_its_rank_come_back_at_their_positions():
    chunk = tokens(LENGTHS)
    segment = opened(chunk)
    assert segment.coded.counts()[:, 0].tolist() == [(90 // 4 - 2) * 4, 0, (71 // 4 - 2) * 4]
    assert segment.counts()[:, 0].tolist() == LENGTHS
    close(segment, chunk)


def test_of_a_higher_rank_it_is_the_nearest_product():
    chunk = tokens([90], rank=20)
    segment = opened(chunk)
    keys = rope().shift(chunk.keys, -chunk.columns[POSITION])[0, :, :80]
    wide = keys.transpose(0, 1).flatten(1)
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    near = ((u[:, :8] * s[:8]) @ v[:8]).view(80, H, D).transpose(0, 1)
    want = rope().shift(near[None], chunk.columns[POSITION][:, :, :80])[0]
    got, exact = segment.dense().keys[0, :, :80], segment.coded.joint.exact_at[0].long()
    for head in range(H):
        apart = torch.zeros(80, dtype=torch.bool).index_fill(0, exact[head], True)
        assert apart.sum() == 8 and not apart.view(20, 4).any(1).ne(apart.view(20, 4).all(1)).any()
        assert torch.equal(got[head, apart], chunk.keys[0, head, :80][apart])
        assert_close(got[head, ~apart], want[head, ~apart], atol=1e-3, rtol=0)  # two ways to the same decomposition
        assert float((got[head, ~apart] - chunk.keys[0, head, :80][~apart]).abs().max()) > 0.1
    assert torch.equal(segment.dense().values, chunk.values)
    assert torch.equal(segment.dense().keys[:, :, 80:], chunk.keys[:, :, 80:])


def test_the_exact_chunks_are_those_least_like_their_mean():
    chunk = tokens([90], rank=20)
    segment = opened(chunk)
    groups = chunk.keys[0, :, :80].view(H, 20, 4, D)
    cosines = torch.cosine_similarity(groups, groups.mean(2, keepdim=True), dim=-1).amin(-1)
    for head in range(H):
        want = sorted(cosines[head].argsort()[:2].tolist())
        assert segment.coded.joint.exact_at[0, head].tolist() == [4 * c + i for c in want for i in range(4)]


def test_what_would_not_get_smaller_stays_as_it_is():
    """32 numbers of a token become 8, and 8 x 32 of a basis and 8 x 32 of outliers are to pay for."""
    least = next(n for n in range(4, 400, 4) if n * (32 - 8) > 32 * (8 + 8))
    for coded, want in ((least, least), (least - 4, 0)):
        assert opened(tokens([coded + 8])).coded.counts()[0, 0] == want
    assert opened(tokens([300]), Shadowed(32, 4, 2, 2)).coded.counts()[0, 0] == 0
    small, large = opened(tokens([300])), opened(tokens([300]), Shadowed(32, 4, 2, 2))
    assert small.nbytes < 0.75 * large.nbytes


@pytest.mark.parametrize("mass", [False, True])
def test_it_answers_as_its_dense_tokens_do(mass):
    chunk = tokens(LENGTHS, rank=20, mass=mass)
    segment = opened(chunk)
    valid, _ = segment.columns()
    read = valid & (torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    for mask in (None, read, read & False):
        out, lse, weights = softmax(segment, q(3), 0.2, mask)
        got = segment.attend(q(3), 0.2, read=mask)
        assert_close(got[0], out, atol=1e-5, rtol=0)
        assert_close(got[1], lse, atol=1e-5, rtol=0)
        found = segment.attend(q(3), 0.2, read=mask, weights=True)
        assert_close(found[0], out, atol=1e-5, rtol=0)
        assert_close(found[2], weights, atol=1e-5, rtol=0)


def test_only_what_is_read_is_rebuilt(monkeypatch):
    segment, seen = opened(tokens(LENGTHS)), []
    plain = type(segment.coded.joint).rebuilt
    monkeypatch.setattr(
        type(segment.coded.joint), "rebuilt", lambda self, *given: seen.append(given[0].shape) or plain(self, *given)
    )
    valid, _ = segment.columns()
    segment.attend(q(3), 0.2, read=valid & (valid.cumsum(-1) <= 12))
    assert seen == [(3, H, 12, 8)]


def test_tokens_one_by_one_stay_as_they_are():
    chunk = tokens([90])
    segment = opened(chunk)
    for i in range(40):
        more = tokens([1], seed=50 + i, start=90 + i)
        segment.step(q(1), more.keys, more.values, torch.tensor([[90 + i]]), 0.2, weights=False)
    assert segment.coded.counts()[0, 0] == 80 and segment.tail.counts()[0, 0] == 50


def test_a_further_turn_is_a_piece_of_its_own():
    first, second = tokens(LENGTHS), tokens([60, 80, 3], seed=7, start=100)
    segment = opened(first)
    segment.append(second)
    assert segment.coded.joint.pieces().tolist() == [2, 1, 1]
    assert segment.coded.counts()[:, 0].tolist() == [(150 // 4 - 2) * 4, (93 // 4 - 2) * 4, 60]
    for row, (one, two) in enumerate(zip(held(first)[::H], held(second)[::H], strict=True)):
        got = held(segment)[row * H]
        whole = torch.cat([one["keys"], two["keys"]])
        # The second row's piece is of both turns' tokens, which are of twice the rank; the others' are of one each,
        # but for the few tokens of the first turn that are in the second's.
        if row != 1:
            assert_close(
                got["keys"][: LENGTHS[row] // 4 * 4 - 8], one["keys"][: LENGTHS[row] // 4 * 4 - 8], atol=2e-4, rtol=0
            )
        assert got["keys"].shape == whole.shape and torch.equal(
            got["values"], torch.cat([one["values"], two["values"]])
        )


@pytest.mark.parametrize("left", [0, 5, 40, 79, 80, 85])
def test_a_crop_leaves_what_is_coded(left):
    chunk = tokens([90, 90], rank=20)
    segment = opened(chunk)
    before = held(segment)
    other = segment.select(np.array([0, 1]))
    segment.truncate(np.full((2, H), left))
    assert segment.counts()[:, 0].tolist() == [left, left]
    assert segment.coded.counts()[0, 0] == (min(left, 80) // 4 * 4)
    for x, y in zip(held(segment), before, strict=True):
        assert_close(x["keys"], y["keys"][:left], atol=1e-5, rtol=0)  # fewer rows of a product are rounded otherwise
        assert torch.equal(x["values"], y["values"][:left])
    assert same(held(other), before)
    assert segment.coded.joint.bases.shape[1] == (left >= 4)
    more = tokens([120, 7], seed=9, start=left)
    segment.append(more)
    assert segment.counts()[:, 0].tolist() == [left + 120, left + 7]
    assert torch.equal(held(segment)[0]["values"][left:], held(more)[0]["values"])


def test_rows_are_chosen_joined_and_saved():
    one, two = opened(tokens(LENGTHS, rank=20)), opened(tokens([7, 200], seed=4, rank=20))
    two.append(tokens([90, 90], seed=5, start=200))
    want = held(one) + held(two)
    one.join(two)
    assert same(held(one), want)
    chosen = one.select(np.array([4, 0, 4]))
    assert same(held(chosen), [*want[8:], *want[:2], *want[8:]])
    said, state = chosen.state()
    state = {name: x.clone() for name, x in state.items()}
    FORM.check(spec_of(3), said, state)
    again = FORM.restore(spec_of(3), said, state)
    assert same(held(again), held(chosen)) and again.state()[0] == said
    for name, x in again.state()[1].items():
        assert torch.equal(x, state[name]), name
    for segment in (again, chosen):
        segment.append(tokens([50, 50, 50], seed=6, start=300))
    assert same(held(again), held(chosen))
    assert format_from(format_to(FORM)) == FORM


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("coded.latent", lambda x: x[:-1], "must be"), ("coded.bases", lambda x: x[..., :-1], "must be"),
        ("coded.exact_at", lambda x: x + 1000, "must be slots below"),
        ("coded.exact_at", lambda x: x.flip(-1), "ascending"),
        ("coded.piece", lambda x: x + 1, "must name 1 bases, and names 2"),
        ("coded.exact", lambda x: x.double(), "must be"),
        ("tail.keys", lambda x: x[1:], "must be"),
    ],
)  # fmt: skip
def test_a_state_that_is_damaged_is_refused(name, change, said):
    what, state = opened(tokens(LENGTHS)).state()
    with pytest.raises(ValueError, match=said):
        FORM.check(spec_of(3), what, {**state, name: change(state[name])})
    with pytest.raises(ValueError, match=said):
        FORM.restore(spec_of(3), what, {**state, name: change(state[name])})


def test_counts_that_heads_can_t_have_are_refused():
    what, state = opened(tokens(LENGTHS)).state()
    counts = [[90, 91], [13, 13], [71, 71]]
    with pytest.raises(ValueError, match="the same for all heads"):
        FORM.check(spec_of(3), {**what, "counts": counts}, state)
    coded = [[79, 79], [0, 0], [60, 60]]
    with pytest.raises(ValueError, match="whole chunks of 4"):
        FORM.check(spec_of(3), {**what, "coded": coded}, state)


@pytest.mark.parametrize("more", [[1, 1], [60, 3], [100, 100]])
def test_what_more_tokens_take_is_known_before(more):
    segment = opened(tokens([40, 200], rank=20))
    said = segment.nbytes_with(np.array([[n] * H for n in more]))
    segment.append(tokens(more, seed=8, start=200))
    for table in segment.tables():
        table.trim()
    assert said == pytest.approx(segment.nbytes, rel=0.02)
    empty = empty_segment(FORM, spec_of(2))
    said = empty.nbytes_with(np.full((2, H), 300))
    empty.append(tokens([300, 300]))
    for table in empty.tables():
        table.trim()
    assert said == pytest.approx(empty.nbytes, rel=0.02)


def test_heads_hold_the_same():
    chunk = tokens(LENGTHS)
    valid = chunk.valid.clone()
    valid[0, 1, -1] = False
    segment = opened(chunk)
    before = held(segment)
    with pytest.raises(ValueError, match="the same for all heads"):
        segment.append(chunk.but(valid))
    with pytest.raises(ValueError, match="written once"):
        segment.amend(torch.zeros(3, H, 1, dtype=torch.long), chunk.keys[:, :, :1], None)
    mask, _ = segment.columns()
    with pytest.raises(ValueError, match="drops single tokens"):
        segment.keep(mask & (torch.arange(mask.shape[-1]) != 3), {})
    with pytest.raises(ValueError, match="the same for all heads"):
        segment.truncate(np.array([[3, 4], [1, 1], [1, 1]]))
    assert same(held(segment), before)
    age = torch.arange(mask.shape[-1]).expand(mask.shape).float()
    segment.keep(mask, {"age": age})
    assert all(torch.equal(x["age"], age[i][mask[i]]) for x, i in zip(held(segment), np.ndindex(3, H), strict=True))


def test_an_arena_that_is_full_changes_nothing():
    arena = Arena(60_000)
    segment = opened(tokens([90]), arena=arena)
    before = held(segment)
    with pytest.raises(OutOfPages):
        segment.append(tokens([4000], seed=2, start=90))
    assert same(held(segment), before) and arena.used_nbytes <= 60_000


def test_signs_and_order_of_directions_have_no_say():
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    codes, basis = low_rank(x, 5)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert_close(codes @ basis.mT, (u[:, :5] * s[:5]) @ v[:5], atol=1e-8, rtol=0)
    few, basis = low_rank(x[:3], 5)  # fewer tokens than directions
    assert_close(few @ basis.mT, x[:3].double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["rank", "chunk", "local", "outliers"])
def test_bad_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name}=-1"):
        Shadowed(**{name: -1})
