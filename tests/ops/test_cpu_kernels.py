"""CPU kernels against their definition and plain torch: awkward sizes, NaN wherever no token is, no silent fallback."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.ops import cpu, dispatch, simd
from kvfold.ops.choose import naive as choose_naive
from kvfold.ops.paged import cpu_kernels as paged_kernels
from kvfold.ops.paged import naive as paged_naive
from kvfold.ops.prefill import sdpa
from kvfold.ops.scores import blocked
from kvfold.pages import PagePool, PageTable, Plane

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LANES, STRIP = simd.LANES, simd.STRIP
RAGGED = [0, 1, 16, 37, 64, 70, 128, 5]
FILL = 0.5

OTHERS = [(paged_naive, f"{verb}_pages") for verb in ("attend", "step", "append", "keep")]
OTHERS += [(sdpa, "causal_cpu"), (blocked, "column_sums"), (choose_naive, "top_mask")]


@pytest.fixture(autouse=True)
def fallbacks(monkeypatch) -> list[str]:
    """What a CPU version handed on instead of running its kernel; `dispatch.use("naive")` is not seen here."""
    found = []

    def noted(name, run, *args, **options):
        found.append(name)
        return run(*args, **options)

    for module, name in OTHERS:
        monkeypatch.setattr(module, name, functools.partial(noted, name, getattr(module, name)))
    return found


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, share: float = 0.0) -> None:
    """`want` in float64: within 2e-6 (and `share` of it), and where `dtype` is narrow its own rounding."""
    share += 0.0 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    assert_close(got.double(), want.double(), atol=2e-6, rtol=share, msg=lambda text: f"{name}: {text}")


# -- building blocks ---------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, Tensor]:
    """Random numbers as a kernel reads them, and in float64."""
    x = (torch.randn(*shape) * 0.3).to(dtype)
    return cpu.bits(x), x.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", range(1, 14))
def test_products_touch_nothing_else(dtype, m):
    wide = [(n, k) for n in (LANES, STRIP - LANES, STRIP, 2 * STRIP + 3 * LANES) for k in (0, 1, 7, 64)]
    for n, k in wide + [(n, k * LANES) for n in (4, 12, 64) for k in (1, 3, 8)]:
        (a, left), (c, want) = numbers(m + 1, k + 3), numbers(m + 1, n + 2)
        if (n, k) in wide:
            b, right = numbers(k + 1, n + 5, dtype=dtype)
            want[:m, 2:] += left[:m, 1 : k + 1] @ right[:k, 4 : n + 4]
            simd.multiply(a, 1, k + 3, b, 4, n + 5, c, 2, n + 2, m, n, k)
        else:
            b, right = numbers(n + 1, k + 5, dtype=dtype)
            want[:m, 2:] = left[:m, 1 : k + 1] @ right[:n, 4 : k + 4].T
            simd.multiply_transposed(a, 1, k + 3, b, 4, k + 5, c, 2, n + 2, m, n, k)
        close(f"{n} {k}", torch.from_numpy(c).view(m + 1, n + 2), want)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_a_narrow_type_is_read_right(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got, count = torch.zeros(2**16), 2**16
    simd.multiply(np.ones(1, np.float32), 0, 1, cpu.bits(every), 0, count, got.numpy(), 0, count, 1, count, 1)
    assert_close(got, every.float(), atol=0, rtol=0, equal_nan=True)


def test_exponential():
    @njit(fastmath=simd.FAST)
    def vectorised(x, out):
        for i in range(x.size):
            out[i] = simd.exponential(x[i])

    edge = np.float32(-87)
    special = [
        -np.inf,
        simd.NEVER,
        np.nextafter(edge, np.float32(-88)),
        np.nextafter(edge, np.float32(0)),
        -1e-30,
        -0.0,
    ]
    x = np.concatenate([np.linspace(-100, 0, 300_001), special]).astype(np.float32)
    out = np.empty_like(x)
    vectorised(x, out)
    for got, at in ((out, x), (np.array([simd.exponential(y) for y in x[::10]], np.float32), x[::10])):
        want = np.exp(at.astype(np.float64))
        assert (got[at < edge] == 0).all()
        assert (np.abs(got - want)[at > edge] < 3e-7 * want[at > edge]).all()


# -- pages -------------------------------------------------------------------------------------------------


def tokens(rows: int, t: int, d: int, dv: int, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, values = torch.randn(rows, t, d).to(dtype), torch.randn(rows, t, dv).to(dtype)
    position = torch.arange(rows * t, dtype=torch.int32).view(rows, t)
    return {"keys": keys, "values": values, "position": position, "log_mass": torch.rand(rows, t) * 3}


def paged(
    lengths: list[int], d: int = 16, dv: int = 16, dtype: torch.dtype = torch.float32, *, page: int = 16,
    scattered: bool = True,
) -> PageTable:  # fmt: skip
    """A table of random tokens by the definition; `scattered`: its pages lie in any order."""
    states = {"keys": Plane(d, dtype), "values": Plane(dv, dtype)}
    columns = {"position": Plane(None, torch.int32, 9.0), "log_mass": Plane(None, torch.float32, FILL)}
    table = PageTable(PagePool(states | columns, torch.device("cpu"), page), len(lengths))
    if scattered:
        ids = table.pool.allocate(sum(-(-length // page) for length in lengths) + 3)
        for i in torch.randperm(len(ids)).tolist():
            table.pool.release(ids[i : i + 1])
        table.regular = False
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with dispatch.use("naive"):
        ops.append_pages(table, tokens(len(lengths), max(lengths), d, dv, dtype), valid)
    return table


def poison(table: PageTable, value: float = torch.nan) -> None:
    """`value` wherever no slot of `table` is."""
    pool, slots = table.pool, np.arange(table.longest)
    free = torch.ones(pool.pages, pool.page_size, dtype=torch.bool)
    for pages, length in zip(table.table, table.lengths, strict=True):
        free[pages[slots[:length] // pool.page_size], slots[:length] % pool.page_size] = False
    for name in ("keys", "values", "log_mass"):
        pool.planes[name][free] = value


def held(table: PageTable) -> dict[str, Tensor]:
    """Row by row, the tokens of every plane."""
    return {"counts": torch.from_numpy(table.counts)} | {
        name: table.dense(name)[table.valid()].clone() for name in table.pool.planes
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert_close(got[name], want[name], atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def softmax_attend(
    q: Tensor, table: PageTable, scale: float, mass: str | None = None, read: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, probabilities) with torch.softmax in float64."""
    dense = {name: table.dense(name).view(*q.shape[:2], table.longest, -1).double() for name in table.pool.planes}
    seen = table.valid().view(*q.shape[:2], -1) & (True if read is None else read)
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.double(), dense["keys"]) * scale
    logits += 0 if mass is None else dense[mass][:, :, None, None, :, 0]
    logits = logits.masked_fill(~seen[:, :, None, None], -torch.inf)
    probs = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhgqt,bhtd->bhgqd", probs, dense["values"].nan_to_num()), logits.logsumexp(-1), probs


def check_attend(q: Tensor, table: PageTable, scale: float = 0.2, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel against softmax, and the definition too, so that all three agree."""
    poison(table, 1e4)  # finite: the definition multiplies it by 0
    with dispatch.use("naive"):
        named = ops.attend_pages(q, table, scale, weights=True, **options)
    poison(table)
    want = softmax_attend(q, table, scale, **options)
    with dispatch.use("cpu"):
        got = ops.attend_pages(q, table, scale, weights=True, **options)
        brief = ops.attend_pages(q, table, scale, **options)
    assert got[0].dtype == q.dtype and got[1].dtype == got[2].dtype == torch.float32 and brief[2] is None
    for who, (out, lse, probs) in (("kernel", got), ("naive", named), ("no weights", (*brief[:2], got[2]))):
        close(f"{who}, out", out, want[0], q.dtype)
        close(f"{who}, lse", lse, want[1])
        close(f"{who}, weights", probs, want[2])
    blind = want[1] == -torch.inf
    assert (got[0][blind] == 0).all() and (got[1][blind] == -torch.inf).all()
    assert (got[2][want[2] == 0] == 0).all()
    close("sums of weights", got[2].sum(-1), (~blind).double())
    return got


def queries(rows: int, g: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, rows // 2, g, n, d).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (64, 80), (80, 48)])
def test_attend(dtype, g, n, d, dv, fallbacks):
    check_attend(queries(8, g, n, d, dtype), paged(RAGGED, d, dv, dtype), d**-0.5)
    assert fallbacks == []


def holed(table: PageTable) -> PageTable:
    """A page's worth of tokens leaves each row, the first page of row 3 and all of the shortest rows."""
    page, mask = table.pool.page_size, table.valid()
    for r, length in enumerate(table.lengths.tolist()):
        mask[r, torch.arange(page) if r == 3 else torch.randperm(length)[:page]] = False
    with dispatch.use("cpu"):
        ops.keep_pages(table, mask, {}, slack=True)
    assert table.holed and table.counts.tolist() == mask.sum(1).tolist()
    return table


@pytest.mark.parametrize("mass", [None, "log_mass"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("page", [4, 16, 32, 64])
def test_attend_with_mass_read_masks_and_holes(mass, masked, holes, scattered, page, fallbacks):
    table = paged([*RAGGED[:4], 130, 70, 128, 5], page=page, scattered=scattered)
    table.pool.planes["log_mass"][table.table[4, 0], 1] = -torch.inf
    table = holed(table) if holes else table
    read = torch.rand(2, 4, table.longest) < 0.3 if masked else None
    if masked:
        read[0, 3] = False  # nothing at all
        read[1, 0, :64] = False  # nothing in a whole block
        read[1, 2, 64:] = False
    check_attend(queries(8, 3, 2, 16), table, mass=mass, read=read)
    assert fallbacks == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_results(dtype, threads, fallbacks):
    table, q = paged([1100, 0, 300, 1, 64, 2050], 16, 32, dtype), queries(6, 3, 1, 16, dtype).float()
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(check_attend(q, table, mass="log_mass"))
        assert torch.get_num_threads() == count
    for got in found[1:]:
        for x, y in zip(got, found[0], strict=True):
            assert_close(x, y, atol=1e-6, rtol=1e-6)
    assert fallbacks == []


@pytest.mark.parametrize(("g", "d", "dv", "page"), [(3, 20, 16, 16), (3, 16, 20, 16), (3, 16, 16, 6), (65, 16, 16, 16)])
def test_sizes_that_the_kernel_does_not_take_give_the_same(g, d, dv, page, fallbacks):
    table, q = paged([0, 1, 37, 70], d, dv, page=page), queries(4, g, 1, d)
    new = tokens(4, 1, d, dv, torch.float32)
    with dispatch.use("cpu"):
        out, lse, probs = ops.attend_pages(q, table, 0.2, mass="log_mass", weights=True)
        assert fallbacks == ["attend_pages"]
        want = softmax_attend(q, table, 0.2, "log_mass")
        stepped = ops.step_pages(q, table, new, 0.2, mass="log_mass")
    assert fallbacks[:2] == ["attend_pages", "step_pages"]
    for got, expected in ((out, want[0]), (lse, want[1]), (probs, want[2])):
        close("attend", got, expected)
    close("step", stepped[0], softmax_attend(q, table, 0.2, "log_mass")[0])
    assert table.lengths.tolist() == [1, 2, 38, 71]


@pytest.mark.parametrize("page", [12, 48, 128])
def test_pages_that_do_not_divide_a_block_are_left_to_the_definition(page, monkeypatch, fallbacks):
    """The kernel starts each block of 64 slots at the start of a page, and writes the logits of whole pages."""
    table, q = paged([130, 7], page=page), queries(2, 2, 1, 16)

    def refused(*args):
        pytest.fail("the kernel would write past its block")

    monkeypatch.setattr(paged_kernels, "attend", refused)
    monkeypatch.setattr(paged_kernels, "step", refused)
    with dispatch.use("cpu"):
        close("out", ops.attend_pages(q, table, 0.2)[0], softmax_attend(q, table, 0.2)[0])
        stepped = ops.step_pages(q, table, tokens(2, 1, 16, 16, torch.float32), 0.2)
    close("out", stepped[0], softmax_attend(q, table, 0.2)[0])
    assert fallbacks


def test_no_token_anywhere_and_gradients(fallbacks):
    with dispatch.use("cpu"):
        out, lse, probs = ops.attend_pages(queries(2, 3, 1, 16), paged([0, 0]), 0.2, weights=True)
        assert (out == 0).all() and (lse == -torch.inf).all() and probs.shape == (2, 1, 3, 1, 0)
        assert fallbacks == ["attend_pages"]
        q = queries(2, 3, 1, 16).requires_grad_()
        ops.attend_pages(q, paged([5, 7]), 0.2)[0].sum().backward()
    assert (q.grad != 0).any()


SHAPES = {"even": [33] * 4, "ragged": [0, 31, 64, 5], "scattered": [33] * 4, "forked": [0, 31, 64, 5], "holed": RAGGED}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_appends_and_attends(shape, dtype, fallbacks):
    lengths, scattered = SHAPES[shape], shape == "scattered"
    found = {}
    for version in ("naive", "cpu"):
        torch.manual_seed(1)
        table = paged(lengths, 16, 32, dtype, scattered=scattered)
        table = holed(table) if shape == "holed" else table
        fork, before = (table.fork(), held(table)) if shape == "forked" else (None, {})
        for step in range(20):
            q, new = queries(len(lengths), 3, 1, 16, dtype), tokens(len(lengths), 1, 16, 32, dtype)
            new = {name: x for name, x in new.items() if name != "log_mass"}
            with dispatch.use(version):
                got = ops.step_pages(q, table, new, 0.2, mass="log_mass", weights=step % 2 == 0)
            want = softmax_attend(q, table, 0.2, "log_mass")
            close("out", got[0], want[0], dtype), close("lse", got[1], want[1])
            assert (got[2] is None) == (step % 2 == 1)
            if got[2] is not None:
                close("weights", got[2], want[2])
            last = torch.from_numpy(table.lengths - 1).long()
            assert (table.dense("log_mass")[torch.arange(len(lengths)), last] == FILL).all()
        if fork is not None:
            assert_same(held(fork), before)
        found[version] = held(table)
        assert fork is not None or fallbacks == []  # shared pages are copied by the definition
    assert_same(found["cpu"], found["naive"])


@pytest.mark.parametrize("count", [0, 1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_append(shape, count, dtype, fallbacks):
    found, lengths = {}, SHAPES[shape]
    for version in ("naive", "cpu"):
        torch.manual_seed(1)
        table = paged(lengths, 16, 24, dtype, scattered=shape == "scattered", page=8)
        fork, before = (table.fork(), held(table)) if shape == "forked" else (None, {})
        new = tokens(len(lengths), count, 16, 24, torch.float32)  # narrower pages round it
        del new["log_mass"]
        with dispatch.use(version):
            ops.append_pages(table, new, None)
        found[version] = held(table)
        if fork is not None:
            assert_same(held(fork), before)
    assert_same(found["cpu"], found["naive"])
    assert fallbacks == ([] if shape in ("ragged", "scattered", "holed") else ["append_pages"])


@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.97, 0.5, 0.0])
@pytest.mark.parametrize("shape", ["even", "ragged", "scattered", "forked"])
@pytest.mark.parametrize("with_columns", [False, True])
def test_keep(slack, share, shape, with_columns, fallbacks):
    tables, forks, before = {}, [], []
    for version in ("naive", "cpu"):
        torch.manual_seed(1)
        table = tables[version] = paged(SHAPES[shape], 16, 24, scattered=shape == "scattered")
        if shape == "forked":
            forks.append(table.fork())
            before.append(held(table))
    for _ in range(3):
        count = int(tables["cpu"].counts.sum())
        stays, mass = torch.rand(count) < share, torch.rand(count)
        for version, table in tables.items():
            valid = table.valid()
            mask = torch.zeros_like(valid).masked_scatter(valid, stays)
            columns = {"log_mass": torch.zeros(valid.shape).masked_scatter(valid, mass)} if with_columns else {}
            with dispatch.use(version):
                ops.keep_pages(table, mask, columns, slack=slack)
        assert_same(held(tables["cpu"]), held(tables["naive"]))
        assert slack or not tables["cpu"].holed
    for fork, old in zip(forks, before, strict=True):
        assert_same(held(fork), old)
    assert fallbacks == [] or shape == "forked"


@pytest.mark.parametrize("forked", [False, True])
def test_holes_gather_up_to_a_page_and_memory_comes_back(forked, fallbacks):
    table, seen = paged([200, 131], scattered=False), []
    fork, before = (table.fork(), held(table)) if forked else (None, held(table))
    expected, nbytes = held(table)["position"].split([200, 131]), table.pool.nbytes
    with dispatch.use("cpu"):
        for step in range(120):
            mask = table.valid()
            mask[0, mask[0].nonzero()[step * 7 % 80]] = False
            expected = expected[0][torch.arange(len(expected[0])) != step * 7 % 80], expected[1]
            ops.keep_pages(table, mask, {}, slack=True)
            seen.append(int(table.hole_count[0]))
            assert torch.equal(held(table)["position"], torch.cat(expected))
    assert seen[:20] == [*range(1, 17), 0, 1, 2, 3] and max(seen) == 16 and fallbacks == ["keep_pages"] * forked
    assert table.pool.used <= 8 + 9 and table.pool.nbytes < 0.75 * nbytes
    if fork is not None:
        assert_same(held(fork), before)


# -- a prompt ----------------------------------------------------------------------------------------------


def prompt(t: int, g: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As models lay them out: (B, T, H, D) transposed."""
    return [torch.randn(2, t, h, n).to(dtype).transpose(1, 2) for h, n in ((2 * g, d), (2, d), (2, dv))]


def softmax_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, column sums) with torch.softmax in float64."""
    g, t = q.shape[1] // k.shape[1], q.shape[2]
    logits = q.double() @ k.double().repeat_interleave(g, 1).transpose(2, 3) * scale
    logits = logits.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    probs = logits.softmax(-1)
    out = probs @ v.double().repeat_interleave(g, 1)
    return out, logits.logsumexp(-1), probs.sum(2).unflatten(1, (-1, g)).sum(2)


def check_causal(got: tuple, want: tuple, dtype: torch.dtype = torch.float32) -> None:
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    close("out", got[0], want[0], dtype), close("lse", got[1], want[1])
    close("sums", got[2], want[2], share=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 5, 64, 65, 200])
@pytest.mark.parametrize(("g", "d", "dv"), [(1, 16, 16), (3, 64, 48), (8, 16, 80)])
def test_causal(dtype, t, g, d, dv, fallbacks, threads):
    q, k, v = prompt(t, g, d, dv, dtype)
    want = softmax_causal(q, k, v, d**-0.5)
    with dispatch.use("naive"):
        check_causal(ops.causal(q.contiguous(), k, v, d**-0.5, sums=True), want, dtype)
    found = []
    for count in (1, 2):
        threads(count)
        with dispatch.use("cpu"):
            found.append(ops.causal(q, k, v, d**-0.5, sums=True))
            assert ops.causal(q, k, v, d**-0.5)[2] is None
        check_causal(found[-1], want, dtype)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)) and fallbacks == []


@pytest.mark.parametrize("d", [16, 20])
def test_causal_rows_with_padding(d, fallbacks):
    (q, k, v), valid = prompt(70, 3, d, 16), torch.zeros(2, 70, dtype=torch.bool)
    valid[0, 9:] = True
    valid[0, 30] = False
    q[1], k[1], v[1], q[0, :, :9], k[0, :, :9], v[0, :, :9] = [torch.nan] * 6
    with dispatch.use("cpu"):
        out, lse, sums = ops.causal_rows(q, k, v, valid, 0.2, sums=True)
        assert (sums is None) == (d == 20) == bool(fallbacks)  # sums are not promised
    want = softmax_causal(*[x[:1, :, valid[0]] for x in (q, k, v)], 0.2)
    check_causal([out[:1, :, valid[0]], lse[:1, :, valid[0]], want[2] if d == 20 else sums[:1, :, valid[0]]], want)
    hidden = ~valid[:, None].expand_as(lse)
    assert (out[hidden] == 0).all() and (lse[hidden] == -torch.inf).all()
    assert d == 20 or (sums[~valid[:, None].expand_as(sums)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 70), (5, 64), (65, 200)])
@pytest.mark.parametrize(("g", "d"), [(1, 16), (3, 80), (3, 20)])
def test_column_sums(dtype, n, t, g, d, fallbacks):
    q, k = torch.randn(2, 2 * g, n, d).to(dtype), torch.randn(2, 2, t, d).to(dtype)
    start = torch.tensor([[0, t - n], [(t - n) // 2, t - n]])
    future = torch.arange(t) > start[..., None, None] + torch.arange(n)[:, None]
    for bias in (None, torch.rand(2, 2, t) * 3):
        logits = torch.einsum("bhgqd,bhtd->bhgqt", q.double().view(2, 2, g, n, d), k.double()) * 0.2
        logits += 0 if bias is None else bias[:, :, None, None]
        lse = logits.masked_fill(future[:, :, None], -torch.inf).logsumexp(-1).float()
        lse[..., 2::3] = torch.inf
        asked = q.clone()
        asked[:, :, 2::3] = torch.nan
        probs = (logits - lse[..., None]).exp().masked_fill(future[:, :, None], 0.0)
        for version in ("naive", "cpu"):
            with dispatch.use(version):
                got = ops.column_sums(asked, k, lse.flatten(1, 2), 0.2, start, bias)
            close(version, got, probs.sum((2, 3)), share=2e-6)
    assert fallbacks == ["column_sums"] * 2 * (d == 20)


SCORES = st.sampled_from([-torch.inf, torch.inf, -1.0, -0.0, 0.0, 0.5, 3.0]) | st.floats(-2, 2, width=32)


@settings(max_examples=100)
@given(
    rows=st.integers(0, 12).flatmap(lambda t: st.lists(st.lists(SCORES, min_size=t, max_size=t), min_size=1)),
    data=st.data(),
)
def test_top_mask(rows, data):
    scores = torch.tensor(rows, dtype=torch.float32)[None]
    count = torch.tensor(
        [data.draw(st.lists(st.integers(0, len(rows[0]) + 3), min_size=len(rows), max_size=len(rows)))]
    )
    with dispatch.use("naive"):
        want = ops.top_mask(scores, count)
    with dispatch.use("cpu"):
        assert torch.equal(ops.top_mask(scores, count), want)
    for line, chosen, k in zip(rows, want[0].tolist(), count[0].tolist(), strict=True):
        best = sorted((i for i, x in enumerate(line) if x > -torch.inf), key=lambda i: -line[i])[:k]
        assert [i for i, yes in enumerate(chosen) if yes] == sorted(best)


def test_top_mask_of_long_rows_with_ties(fallbacks):
    scores = torch.randint(-4, 4, (2, 3, 1000)).float().masked_fill(torch.rand(2, 3, 1000) < 0.1, -torch.inf)
    for count in (torch.tensor([[0, 1, 999], [1003, 100, 500]]), torch.tensor([[7]]).expand(2, 3)):
        with dispatch.use("naive"):
            want = ops.top_mask(scores, count)
        with dispatch.use("cpu"):
            assert torch.equal(ops.top_mask(scores, count), want)
    assert fallbacks == []
