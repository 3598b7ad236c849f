"""What every format promises (see kvfold/formats/segment.py): what goes in comes out, and attention over it."""

import contextlib

import numpy as np
import pytest
import torch
from format_cases import (
    ALL,
    ARENA,
    FORMATS,
    LENGTHS,
    B,
    H,
    arena_of,
    chunk,
    held,
    opened,
    plain,
    query,
    rows_of,
    same,
    softmax,
)
from torch.testing import assert_close

from kvfold import selectors
from kvfold.formats import (
    POSITION,
    Balanced,
    Chunk,
    Dense,
    Depth,
    Format,
    Fp8,
    Kivi,
    Rotated,
    Segment,
    Sparse,
    Spec,
    Thin,
    Uneven,
)
from kvfold.formats.parts import Choosing
from kvfold.hf.rope import find_ropes
from kvfold.ops import dispatch
from kvfold.ops.attend import blocked
from kvfold.pages import Arena
from kvfold.rotation import Compact
from models import subject


@ALL
def test_it_is_a_format(form):
    segment = opened(form, chunk(LENGTHS))
    assert isinstance(form, Format) and isinstance(segment, Segment) and hash(form) == hash(eval(repr(form), GLOBALS))
    assert form.traits.addressed == ("page" if isinstance(plain(form), Kivi) else "token")
    if not form.traits.graphs:
        with pytest.raises(NotImplementedError, match="graphs=False"):
            segment.reserve()


GLOBALS = {
    "torch": torch,
    **{name: getattr(selectors, name) for name in selectors.__all__},
    **{type(f).__name__: type(f) for f in FORMATS.values()},
}


@ALL
@ARENA
def test_what_goes_in_comes_out_in_order(form, arena):
    given = chunk(LENGTHS)
    segment = opened(form, given, arena=arena_of(arena))
    assert segment.counts().tolist() == LENGTHS and segment.counts().sum() == segment.columns()[0].sum()
    valid, columns = segment.columns()
    tokens = segment.dense()
    assert torch.equal(valid, tokens.valid) and valid.shape == (B, H, segment.longest)
    assert columns.keys() == tokens.columns.keys() == given.columns.keys()
    last = torch.where(valid, torch.arange(1, segment.longest + 1), 0).amax(-1)
    assert segment.lengths().tolist() == last.tolist()
    error = {
        "balanced": 1 / 20,
        "bounds": 0.0,
        "bounds-kivi": 1 / 20,
        "dense": 0.0,
        "hierarchical-heads": 0.0,
        "takes": 0.0,
        "bf16": 1 / 256,
        "depth": 1e-6,
        "fp8": 1 / 14,
        "kivi": 1 / 20,
        "kivi-anew": 1 / 20,
        "products": 0.0,
        "values": 0.0,
        "rotated": 1 / 4,
        "rotated-basis": 1 / 2,  # as a code errs, times how far its basis stretches
        "separable": 1 / 20,
        "sparse": 0.5,  # what is pruned is below others
        "thin": 0.5,
        "uneven": 1 / 10,
    }
    share = next(error[name] for name, known in FORMATS.items() if known is form)
    for mine, theirs in zip(held(segment), held(given), strict=True):
        for name, plane in theirs.items():
            close = share * plane.abs().amax() * 2 if name in ("keys", "values") and plane.numel() else 0
            assert mine[name].dtype == plane.dtype and ((mine[name] - plane).abs() <= close).all(), name
    assert not torch.equal(tokens.keys[valid], torch.cat([x["keys"] for x in held(given)])) or share < 1e-3


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_computes_in_the_models_dtype(form, dtype):
    given = chunk(LENGTHS, dtype=dtype)
    segment = opened(form, given)
    tokens, q = segment.dense(), query(2).to(dtype)
    assert tokens.keys.dtype == tokens.values.dtype == dtype
    out, lse, _ = segment.attend(q, 0.3)
    want, norm, _ = softmax(segment, q, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out.float(), want, atol=3e-2, rtol=3e-2)
    assert_close(lse, norm, atol=3e-2, rtol=1e-2)


@ALL
@pytest.mark.parametrize("lengths", [LENGTHS, 1, 24, [[0, 0]] * B], ids=str)
@pytest.mark.parametrize("extra", ["", "read", "no mass", "compact", "slots", "weights"])
@pytest.mark.parametrize("small", [False, True], ids=["one block", "blocks"])
def test_attention_is_one_softmax_over_what_is_held(form, lengths, extra, small, monkeypatch):
    if small:
        monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 1 << 9)
    segment = opened(form, chunk(lengths, start=7, mass=extra != "no mass"))
    valid, columns = segment.columns()
    read, compact, turned = None, None, segment
    if extra == "read":
        read = torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        read[0] = False
    if extra in ("compact", "slots"):
        rope = find_ropes(subject("llama"))[0]
        ranks = valid.cumsum(-1) - 1
        slots = torch.randint(0, 300, valid.shape) if extra == "slots" else None
        compact = Compact(rope, slots)
        tokens = segment.dense()
        keys = rope.shift(tokens.keys, (ranks if slots is None else slots) - columns[POSITION])
        turned = Turned(Chunk(keys, tokens.values, tokens.valid, tokens.columns))
    for n in (1, 5):
        q = query(n)
        with dispatch.use("naive") if small else contextlib.nullcontext():  # kernels know no blocks
            out, lse, weights = segment.attend(q, 0.3, read=read, compact=compact, weights=extra == "weights")
        want, norm, shares = softmax(turned, q, 0.3, read)
        assert_close(out, want, atol=2e-5, rtol=1e-5)
        assert_close(lse, norm, atol=2e-5, rtol=1e-5)
        if weights is not None:
            assert extra == "weights"
            assert_close(weights, shares, atol=1e-5, rtol=1e-4)


class Turned:
    """A segment that gives other tokens."""

    def __init__(self, tokens: Chunk):
        self.dense = lambda: tokens


@ALL
def test_rows_of_a_batch_are_rows_alone(form):
    given, more = chunk(LENGTHS), chunk([[9, 0], [20, 1], [1, 30]], seed=1)
    batch = opened(form, given)
    batch.append(more)
    q = query(2)
    out, lse, _ = batch.attend(q, 0.3)
    for row in range(B):
        alone = opened(form, rows_of(given, [row]))
        alone.append(rows_of(more, [row]))
        assert same(held(alone), held(batch)[row * H : row * H + H])
        mine = alone.attend(q[row : row + 1], 0.3)
        assert_close(mine[0][0], out[row], atol=1e-5, rtol=1e-5)
        assert_close(mine[1][0], lse[row], atol=1e-5, rtol=1e-5)


@ALL
@ARENA
def test_a_step_is_an_append_and_attention(form, arena):
    one, two = (opened(form, chunk(LENGTHS, mass=False), arena=arena_of(arena)) for _ in range(2))
    for step in range(20):
        new, at, q = chunk(1, 50 + step, mass=False), torch.full((B, 1), 50 + step, dtype=torch.int32), query(1, step)
        out, lse, _ = one.step(q, new.keys, new.values, at, 0.3, weights=False)
        wide = at[:, None].expand(-1, H, -1)
        two.append(Chunk(new.keys, new.values, new.valid, {POSITION: wide}), even=True)
        want = (two.attend_few if isinstance(two, Choosing) else two.attend)(q, 0.3)
        assert_close((out, lse), want[:2], atol=1e-6, rtol=1e-6)
    assert same(held(one), held(two)) and one.counts().tolist() == (np.array(LENGTHS) + 20).tolist()


BAD = [
    (Fp8, {"page_size": 0}), (Fp8, {"page_size": 2.0}), (Kivi, {"group": 7}), (Kivi, {"group": 9}),
    (Kivi, {"group": 16.0}), (Kivi, {"channels": 0}), (Kivi, {"residual": -1}), (Kivi, {"residual": True}),
    (Balanced, {"bits": 5}), (Balanced, {"groups": 0}),
    (Rotated, {"key_bits": 5}), (Rotated, {"value_bits": 1}), (Rotated, {"scale": 2}), (Rotated, {"seed": -1}),
    (Rotated, {"key": 3}),
    (Kivi, {"requantise": 2}), (Depth, {"side": 2}), (Dense, {"page_size": -4}),
    (Dense, {"dtype": torch.int8}), (Sparse, {"key_sparsity": 1.0}), (Sparse, {"value_sparsity": -0.1}),
    (Thin, {"ratio": 1.0}), (Sparse, {"group": 0}), (Sparse, {"residual": -1}),
    (Uneven, {"bits": 5}), (Uneven, {"exact": 0}), (Uneven, {"page_size": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), BAD, ids=str)
def test_bad_options_are_named(kind, options, unchecked):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        kind(**options)


def test_channels_must_divide_a_value(unchecked):
    given, room = chunk(4), Arena(1 << 20)
    with pytest.raises(ValueError, match="channels=3 must divide the value size 8"):
        Kivi(channels=3).open(Spec.of(given, arena=room))
    assert not room.pools
    assert opened(Kivi(channels=9), given).coded.pool.specs["value_scale"].width == 1  # all of it
