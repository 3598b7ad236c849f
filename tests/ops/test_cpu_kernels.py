"""CPU kernels against their definition and plain torch: awkward sizes, NaN wherever no token is, no silent fallback."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.ops import _cpu, cpu, dispatch
from kvfold.ops.choose import naive as choose_naive
from kvfold.ops.paged import naive as paged_naive
from kvfold.ops.prefill import sdpa
from kvfold.ops.scores import blocked
from kvfold.pages import PagePool, PageTable, Plane

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDEST = _cpu.names()[0]
SETS = [name for name in _cpu.names() if not name.endswith("vnni")]  # those differ for codes alone
RAGGED = [0, 1, 16, 37, 64, 70, 128, 5]
SHAPES = {"even": [33] * 4, "ragged": [0, 31, 64, 5], "scattered": [33] * 4, "forked": [0, 31, 64, 5], "holed": RAGGED}
# Head sizes, then page sizes: the kernel starts each block of 64 slots at a page, and writes logits of whole pages.
ODD = [(3, 18, 16, 16), (3, 16, 18, 16), (65, 16, 16, 16), *((3, 16, 16, page) for page in (6, 12, 48, 128))]
OTHERS = [(paged_naive, f"{verb}_pages") for verb in ("attend", "step", "append", "keep")]
OTHERS += [(sdpa, "causal_cpu"), (blocked, "column_sums"), (choose_naive, "top_mask")]


@pytest.fixture(autouse=True, params=SETS)
def instructions(request) -> Iterator[None]:
    """Every test on every instruction set that this processor has."""
    _cpu.use(request.param)
    yield
    _cpu.use(WIDEST)


@pytest.fixture(autouse=True)
def fallbacks(monkeypatch) -> Iterator[list[str]]:
    """What a CPU version handed on instead of running its kernel; `dispatch.use("naive")` is not seen here."""
    found = []

    def noted(name, run, *args, **options):
        found.append(name)
        return run(*args, **options)

    for module, name in OTHERS:
        monkeypatch.setattr(module, name, functools.partial(noted, name, getattr(module, name)))
    yield found
    torch.set_num_threads(1)  # a test may have set others


def close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, share: float = 0.0) -> None:
    """`want` in float64: within 2e-6 (and `share` of it), and where `dtype` is narrow its own rounding."""
    assert got.dtype == dtype
    share += 0.0 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    assert_close(got.double(), want.double(), atol=2e-6, rtol=share, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_a_narrow_type_is_read_right(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got = torch.zeros(2**16)
    _cpu.widen(cpu.bits(every), got.numpy())
    assert_close(got, every.float(), atol=0, rtol=0, equal_nan=True)


def test_exponential():
    edge = np.float32(-87)
    edges = np.nextafter(edge, np.float32([-88, 0]))
    x = np.concatenate([np.linspace(-100, 0, 100_001), edges, [-np.inf, -1e30, -1e-30, -0.0]]).astype(np.float32)
    got, want = np.empty_like(x), np.exp(x.astype(np.float64))
    _cpu.exponential(x, got)
    assert (got[x < edge] == 0).all() and (np.abs(got - want)[x > edge] < 3e-7 * want[x > edge]).all()
    _cpu.exponential(np.full(1, np.nan, np.float32), got[:1])
    assert np.isnan(got[0])


def tokens(rows: int, t: int, d: int, dv: int, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, values = torch.randn(rows, t, d).to(dtype), torch.randn(rows, t, dv).to(dtype)
    position = torch.arange(rows * t, dtype=torch.int32).view(rows, t)
    return {"keys": keys, "values": values, "position": position, "log_mass": torch.rand(rows, t) * 3}


def paged(lengths: list[int], d=16, dv=16, dtype=torch.float32, page=16, scattered=True) -> PageTable:
    """A table of random tokens by the definition; `scattered`: its pages lie in any order."""
    states = {"keys": Plane(d, dtype), "values": Plane(dv, dtype)}
    columns = {"position": Plane(None, torch.int32, 9.0), "log_mass": Plane(None, torch.float32, 0.5)}
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
    tokens = {name: table.dense(name)[table.valid()].clone() for name in table.pool.planes}
    return tokens | {"counts": torch.from_numpy(table.counts)}


def softmax_attend(q: Tensor, table: PageTable, scale: float, mass=None, read=None) -> tuple[Tensor, Tensor, Tensor]:
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
    assert brief[2] is None
    for who, parts in (("kernel", got), ("naive", named), ("no weights", (*brief[:2], got[2]))):
        for part, x, y in zip(("out", "lse", "weights"), parts, want, strict=True):
            close(f"{who}, {part}", x, y, q.dtype if part == "out" else torch.float32)
    blind = want[1] == -torch.inf
    assert (got[0][blind] == 0).all() and (got[1][blind] == -torch.inf).all()
    assert (got[2][want[2] == 0] == 0).all()
    close("sums of weights", got[2].sum(-1), (~blind).double())
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (64, 80), (80, 48), (20, 24)])
def test_attend(dtype, g, n, d, dv, fallbacks):
    check_attend(torch.randn(2, 4, g, n, d).to(dtype), paged(RAGGED, d, dv, dtype), d**-0.5)
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
@pytest.mark.parametrize(("masked", "holes"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("page", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("scattered", [False, True])
def test_attend_with_mass_read_masks_and_holes(mass, masked, holes, page, scattered, fallbacks):
    table = paged([*RAGGED[:4], 130, 70, 128, 5], page=page, scattered=scattered)
    table.pool.planes["log_mass"][table.table[4, 1 // page], 1 % page] = -torch.inf
    table = holed(table) if holes else table
    read = torch.rand(2, 4, table.longest) < 0.3
    read[0, 3] = read[1, 0, :64] = read[1, 2, 64:] = False  # nothing at all, or in a whole block
    check_attend(torch.randn(2, 4, 3, 2, 16), table, mass=mass, read=read if masked else None)
    assert fallbacks == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_results(dtype, fallbacks):
    table, q = paged([1100, 0, 300, 1, 64, 2050], 16, 32, dtype), torch.randn(2, 3, 3, 1, 16)
    first = check_attend(q, table, mass="log_mass")
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_close(check_attend(q, table, mass="log_mass"), first, atol=1e-6, rtol=1e-6)
    assert torch.get_num_threads() == 7 and fallbacks == []


@pytest.mark.parametrize(("g", "d", "dv", "page"), ODD)
def test_sizes_that_the_kernel_does_not_take_are_left_to_the_definition(g, d, dv, page, monkeypatch):
    monkeypatch.setattr(_cpu, "attend", lambda *args: pytest.fail("the kernel can't do that"))
    table, q = paged([0, 1, 37, 130], d, dv, page=page), torch.randn(2, 2, g, 1, d)
    with dispatch.use("cpu"):
        got = ops.attend_pages(q, table, 0.2, mass="log_mass", weights=True)
        for name, x, y in zip(("out", "lse", "weights"), got, softmax_attend(q, table, 0.2, "log_mass"), strict=True):
            close(name, x, y)
        out, _, _ = ops.step_pages(q, table, tokens(4, 1, d, dv, torch.float32), 0.2)
    close("step", out, softmax_attend(q, table, 0.2)[0])
    assert table.lengths.tolist() == [1, 2, 38, 131]


@pytest.mark.parametrize(("stored", "given"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("verb", ["append", "step", "attend"])
def test_columns_are_numbers_not_the_bits_of_another_type(stored, given, verb):
    table, q, new = paged([5, 7]), torch.randn(2, 1, 2, 1, 16), tokens(2, 1, 16, 16, torch.float32)
    table.pool.add_plane("extra", Plane(None, stored, 2.0))
    new["extra"] = torch.full((2, 1), 3.0, dtype=given)
    with dispatch.use("naive" if verb == "attend" else "cpu"):
        ops.step_pages(q, table, new, 0.2) if verb == "step" else ops.append_pages(table, new, None)
    assert (held(table)["extra"] == 3.0).sum() == 2
    with dispatch.use("cpu" if verb == "attend" else "naive"):
        close("lse", ops.attend_pages(q, table, 0.2, mass="extra")[1], softmax_attend(q, table, 0.2, "extra")[1])


def twins(shape: str, **options) -> tuple[dict[str, PageTable], Callable[[], None]]:
    """The same table for each version, and a check that they still are the same and their forks undisturbed."""
    tables = {}
    for version in ("naive", "cpu"):
        torch.manual_seed(1)
        table = paged(SHAPES[shape], scattered=shape == "scattered", **options)
        tables[version] = holed(table) if shape == "holed" else table
    forks, before = [table.fork() for table in tables.values() if shape == "forked"], held(table)

    def check() -> None:
        assert_close(held(tables["cpu"]), held(tables["naive"]), atol=0, rtol=0)
        for fork in forks:
            assert_close(held(fork), before, atol=0, rtol=0)

    return tables, check


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_and_step(shape, page, dtype, fallbacks):
    (tables, check), rows = twins(shape, dv=32, page=page, dtype=dtype), len(SHAPES[shape])
    for count in [1] * 9 + [0, 3, 40] + [1] * 9:
        q = torch.randn(2, rows // 2, 3, 1, 16).to(dtype)
        new = tokens(rows, count, 16, 32, dtype if count == 1 else torch.float32)
        del new["log_mass"]
        for version, table in tables.items():
            with dispatch.use(version):
                if count != 1:
                    ops.append_pages(table, new, None)
                    continue
                got = ops.step_pages(q, table, new, 0.2, mass="log_mass", weights=table.longest % 2 == 0)
            out, lse, probs = softmax_attend(q, table, 0.2, "log_mass")
            close("out", got[0], out, dtype), close("lse", got[1], lse)
            assert close("weights", got[2], probs) is None if table.longest % 2 else got[2] is None
    check()
    assert (held(tables["cpu"])["log_mass"] == 0.5).sum() == 61 * rows
    # Room at the end is written in place; what is shared the table has copied before a kernel writes.
    even, scattered = shape == "even", shape == "scattered"
    assert set(fallbacks) <= ({"append_pages"} if even or scattered else set())  # scattered rows are laid side by side
    assert fallbacks or not even


@pytest.mark.parametrize("shape", ["even", "ragged", "scattered", "forked"])
@pytest.mark.parametrize("share", [1.0, 0.97, 0.5, 0.0])
@pytest.mark.parametrize(("slack", "with_columns"), [(False, False), (True, False), (False, True), (True, True)])
def test_keep(shape, share, slack, with_columns, fallbacks):
    tables, check = twins(shape, dv=32)
    for _ in range(3):
        stays, mass = torch.rand(2, int(tables["cpu"].counts.sum()))
        for version, table in tables.items():
            valid = table.valid()
            mask = torch.zeros_like(valid).masked_scatter(valid, stays < share)
            columns = {"log_mass": torch.zeros(valid.shape).masked_scatter(valid, mass)} if with_columns else {}
            with dispatch.use(version):
                ops.keep_pages(table, mask, columns, slack=slack)
        check()
        assert slack or not tables["cpu"].holed
    assert fallbacks == [] or shape == "forked"


@pytest.mark.parametrize("forked", [False, True])
def test_holes_gather_up_to_a_page_and_memory_comes_back(forked, fallbacks):
    table, seen = paged([200, 131], scattered=False), []
    fork, before = table.fork() if forked else None, held(table)
    left, other = before["position"].split([200, 131])
    with dispatch.use("cpu"):
        for step in range(180):
            mask, at = table.valid(), step * 7 % len(left)
            mask[0, mask[0].nonzero()[at]] = False
            left = torch.cat([left[:at], left[at + 1 :]])
            ops.keep_pages(table, mask, {}, slack=True)
            seen.append(int(table.hole_count[0]))
            assert torch.equal(held(table)["position"], torch.cat([left, other]))
    assert seen[:20] == [*range(1, 17), 0, 1, 2, 3] and max(seen) == 16 and fallbacks == ["keep_pages"] * forked
    assert table.pool.pages <= 3 + 9 + 4  # of 22
    if fork is not None:
        assert_close(held(fork), before, atol=0, rtol=0)


def prompt(t: int, g: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As models lay them out: (B, T, H, D) transposed."""
    return [torch.randn(2, t, h, n).to(dtype).transpose(1, 2) for h, n in ((2 * g, d), (2, d), (2, dv))]


def softmax_scores(q: Tensor, k: Tensor, scale: float, start: Tensor, bias=None) -> tuple[Tensor, Tensor]:
    """(probabilities (B, H, G, Q, T), lse (B, Hq, Q)) in float64; query i sees keys 0 to start + i."""
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.double().unflatten(1, (k.shape[1], -1)), k.double()) * scale
    logits += 0 if bias is None else bias[:, :, None, None]
    last = start[..., None, None, None] + torch.arange(q.shape[2])[:, None]
    logits = logits.masked_fill(torch.arange(k.shape[2]) > last, -torch.inf)
    return logits.softmax(-1), logits.logsumexp(-1).flatten(1, 2)


def check_causal(got: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    probs, lse = softmax_scores(q, k, scale, torch.zeros(1, 1))
    close("out", got[0], torch.einsum("bhgqt,bhtd->bhgqd", probs, v.double()).flatten(1, 2), q.dtype)
    close("lse", got[1], lse)
    if got[2] is not None:
        close("sums", got[2], probs.sum((2, 3)), share=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 5, 64, 65, 200])
@pytest.mark.parametrize(("g", "d", "dv"), [(1, 16, 16), (3, 64, 48), (8, 16, 80)])
def test_causal(dtype, t, g, d, dv, fallbacks):
    (q, k, v), scale = prompt(t, g, d, dv, dtype), d**-0.5
    with dispatch.use("naive"):
        check_causal(ops.causal(q.contiguous(), k, v, scale, sums=True), q, k, v, scale)
    with dispatch.use("cpu"):
        one, none = ops.causal(q, k, v, scale, sums=True), ops.causal(q, k, v, scale)
        torch.set_num_threads(2)
        two = ops.causal(q, k, v, scale, sums=True)
    check_causal(one, q, k, v, scale)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert none[2] is None and torch.equal(none[0], one[0]) and fallbacks == []


@pytest.mark.parametrize("d", [16, 18])
def test_causal_rows_with_padding(d, fallbacks):
    (q, k, v), valid = prompt(70, 3, d, d), (torch.arange(70) % 30 > 8) & torch.tensor([[True], [False]])
    for x in (q, k, v):
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    with dispatch.use("cpu"):
        found = ops.causal_rows(q, k, v, valid, 0.2, sums=True)
    assert (found[2] is None) == (d == 18) == bool(fallbacks)  # sums are not promised
    check_causal([x if x is None else x[:1, :, valid[0]] for x in found], *(x[:1, :, valid[0]] for x in (q, k, v)), 0.2)
    for x, hidden in zip(found, (0.0, -torch.inf, 0.0), strict=True):
        assert x is None or (x.transpose(1, 2)[~valid] == hidden).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 70), (5, 64), (65, 200)])
@pytest.mark.parametrize(("g", "d"), [(1, 16), (3, 80), (3, 20), (3, 18)])
@pytest.mark.parametrize("biased", [False, True])
def test_column_sums(dtype, n, t, g, d, biased, fallbacks):
    q, k, _ = prompt(t, g, d, d, dtype)
    q, bias = q[:, :, :n].contiguous(), torch.rand(2, 2, t) * 3 if biased else None
    start = torch.tensor([[0, t - n], [(t - n) // 2, t - n]])
    probs, lse = softmax_scores(q, k, 0.2, start, bias)
    q[:, :, 2::3], lse[:, :, 2::3], probs[..., 2::3, :] = torch.nan, torch.inf, 0.0  # they do not count
    for version in ("naive", "cpu"):
        with dispatch.use(version):
            got = ops.column_sums(q, k, lse.float(), 0.2, start, bias)
        close(version, got, probs.sum((2, 3)), share=2e-6)
    assert fallbacks == ["column_sums"] * (d == 18)


@settings(max_examples=60)
@given(t=st.sampled_from([0, 1, 7, 40, 1000]), levels=st.integers(1, 20), seed=st.integers(0, 99), one=st.booleans())
def test_top_mask(t, levels, seed, one):
    rng = torch.Generator().manual_seed(seed)
    steps = torch.cat([torch.tensor([-torch.inf, torch.inf, -0.0, 0.0]), torch.randn(levels, generator=rng)])
    scores = steps[torch.randint(0, len(steps), (2, 3, t), generator=rng)]
    count = torch.randint(0, t + 4, (2, 3), generator=rng)
    count = count[:1, :1].expand(2, 3) if one else count
    with dispatch.use("cpu"):
        got = ops.top_mask(scores, count)
    with dispatch.use("naive"):
        assert torch.equal(got, ops.top_mask(scores, count))
