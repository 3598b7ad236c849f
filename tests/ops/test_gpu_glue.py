"""The Triton versions behind the dispatch: the same decode steps as the definition, in the interpreter or on a GPU."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from interpreted import DEVICE, interpreted, triton_fits  # noqa: F401  (fixtures that every test here needs)
from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, Spec
from kvfold.ops import dispatch
from kvfold.ops.paged import triton_kernels

pytestmark = pytest.mark.usefixtures("interpreted", "triton_fits")


def segment(lengths: list[int], dtype: torch.dtype, mass: bool):
    rng = torch.Generator().manual_seed(0)
    t = max(lengths)
    keys, values = (torch.randn(len(lengths), 2, t, 32, generator=rng).to(DEVICE, dtype) for _ in range(2))
    columns = {POSITION: torch.arange(t, dtype=torch.int32, device=DEVICE).expand(len(lengths), 2, t)}
    if mass:
        columns[LOG_MASS] = torch.rand(len(lengths), 2, t, generator=rng).to(DEVICE)
    valid = (torch.arange(t) < torch.tensor(lengths)[:, None, None]).expand(-1, 2, -1).to(DEVICE)
    made = Dense().open(Spec.of(Chunk(keys, values, valid, columns)))
    made.append(Chunk(keys, values, valid, columns))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("lengths", [[20, 20], [33, 0, 7]], ids=["even", "ragged"])
def test_decode_steps_are_those_of_the_definition(dtype, mass, lengths):
    rng, some, other = torch.Generator().manual_seed(1), *(segment(lengths, dtype, mass) for _ in range(2))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for step in range(18):  # over a page's end, and one step on pages that a fork shares
        q = torch.randn(len(lengths), 2, 3, 1, 32, generator=rng).to(DEVICE, dtype)
        k, v = (torch.randn(len(lengths), 2, 1, 32, generator=rng).to(DEVICE, dtype) for _ in range(2))
        at = torch.full((len(lengths), 1), 50 + step, dtype=torch.int32, device=DEVICE)
        forks = [x.select(np.arange(len(lengths))) for x in (some, other)] if step == 5 else []
        with dispatch.use("triton"):
            got = some.step(q, k, v, at, 0.3, weights=True)
        with dispatch.use("naive"):
            want = other.step(q, k, v, at, 0.3, weights=True)
        for name, a, b in zip(("out", "lse", "weights"), got, want, strict=True):
            assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        for fork in forks:
            assert fork.counts().tolist() == [[length + 5] * 2 for length in lengths]
        if step == 8:  # holes, as the CPU leaves them; here the rows close up at once
            for x in (some, other):
                stored = x.dense()
                x.keep(stored.valid & (stored.positions != 3), {}, slack=True)
    assert some.counts().tolist() == other.counts().tolist()
    for name in ("keys", "values", *some.dense().columns):
        ours, theirs = (x.table.dense(name)[x.table.valid()] for x in (some, other))
        assert torch.equal(ours, theirs)
    assert some.table.on_device()[1].tolist() == some.table.lengths.tolist()


def test_what_the_device_reads_stays_where_it_is():
    some = segment([20, 20], torch.float32, False)
    pages, lengths, *_ = some.table.on_device()
    q, k = torch.zeros(2, 2, 1, 1, 32, device=DEVICE), torch.zeros(2, 2, 1, 32, device=DEVICE)
    at = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    with dispatch.use("triton"):
        for step in range(13):  # over the end of a page: the kernel moves the lengths on, the table is sent again
            some.step(q, k, k, at, 1.0, weights=False)
            now = some.table.on_device()
            assert now[0] is pages and now[1] is lengths and lengths.tolist() == [21 + step] * 4
    held = some.table.table.shape[1]
    assert held > 2 and pages[:, :held].tolist() == some.table.table.tolist() and (pages[:, held:] == -1).all()


@pytest.mark.parametrize(
    "lengths", [pytest.param([20, 20], marks=pytest.mark.slow), [33, 0, 7]], ids=["even", "ragged"]
)
def test_a_step_can_be_replayed(monkeypatch, lengths):
    """What a CUDA graph does: the launches of one step again, with the very same tensors, until those have moved."""
    rng, some, other = torch.Generator().manual_seed(2), *(segment(lengths, torch.float32, True) for _ in range(2))
    launches, replayed = [], 0

    def recorded(kernel):
        def record(*args, **kwargs):
            launches.append((kernel, args, kwargs))
            return kernel(*args, **kwargs)

        return record

    for name in ("append", "attend"):
        monkeypatch.setattr(triton_kernels, name, recorded(getattr(triton_kernels, name)))
    inputs = [torch.empty(len(lengths), 2, *shape, 32, device=DEVICE) for shape in ((3, 1), (1,), (1,))]
    at, where = torch.full((len(lengths), 1), 50, dtype=torch.int32, device=DEVICE), []
    for step in range(40):
        for x in inputs:
            x.copy_(torch.randn(x.shape, generator=rng))
        now = some.reserve()
        if len(now) == len(where) and all(a is b for a, b in zip(now, where, strict=True)):
            replayed += 1
            some.table.step()
            got = [kernel(*args, **kwargs) for kernel, args, kwargs in launches][-1][:2]
        else:
            launches.clear()
            with dispatch.use("triton"):
                got = some.step(*inputs, at, 0.3, weights=False)[:2]
            where = now
        with dispatch.use("naive"):
            want = other.step(*inputs, at, 0.3, weights=False)[:2]
        for a, b in zip(got, want, strict=True):
            assert_close(a.view(b.shape), b, atol=2e-5, rtol=2e-5, msg=lambda text, step=step: f"step {step}: {text}")
    assert replayed >= 30
    assert some.counts().tolist() == other.counts().tolist()
    for name in ("keys", "values"):
        ours, theirs = (x.table.dense(name)[x.table.valid()] for x in (some, other))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lengths", [[40, 40], [53, 0, 7]], ids=["even", "ragged"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.02, 0.0])
@pytest.mark.parametrize("shared", [False, True])
def test_what_stays_is_that_of_the_definition(lengths, share, shared):
    rng, some, other = torch.Generator().manual_seed(3), *(segment(lengths, torch.float32, True) for _ in range(2))
    forks = [x.select(np.arange(len(lengths))) for x in (some, other)] if shared else []
    valid = some.dense().valid
    keep = valid & (torch.rand(valid.shape, generator=rng) < share).to(DEVICE)
    columns = {"score": torch.rand(valid.shape, generator=rng).to(DEVICE)}
    before = {name: some.table.dense(name).clone() for name in some.pool.planes}
    for name, x in (("triton", some), ("naive", other)):
        with dispatch.use(name):
            x.keep(keep, columns)
    assert some.counts().tolist() == other.counts().tolist() == keep.sum(-1).tolist()
    assert some.pool.nbytes <= other.pool.nbytes  # the definition may leave room for the next tokens
    for name in ("keys", "values", *some.dense().columns):
        ours, theirs = (x.table.dense(name)[x.table.valid()] for x in (some, other))
        assert torch.equal(ours, theirs), name
    for fork in forks:
        assert all(torch.equal(fork.table.dense(name), before[name]) for name in before)
