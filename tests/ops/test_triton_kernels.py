"""Triton kernels against their definition in plain torch: on a GPU where there is one, else in Triton's interpreter.

Whatever no token owns (slack of pages, pages that no row holds) is NaN here.
"""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from interpreted import DEVICE, ON_GPU, interpreted  # noqa: F401  (a fixture that every test here needs)
from kvfold.ops.scores import naive

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from kvfold.ops import triton_rows
from kvfold.ops.paged import triton_kernels as paged
from kvfold.ops.scores import triton_kernels as scores

pytestmark = pytest.mark.usefixtures("interpreted")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RAGGED = [0, 1, 16, 37, 64, 70]
PAGE = 16


def close(got: Tensor, want: Tensor, dtype: torch.dtype, name: str = "out") -> None:
    tolerance = TOLERANCE[dtype]
    assert_close(
        got.double(), want.double(), atol=tolerance, rtol=tolerance, msg=lambda text: f"{name}, {dtype}: {text}"
    )


def ints(x: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.int32, device=DEVICE)


def pages_of(lengths: list[int], spare: int = 1, seed: int = 0) -> tuple[Tensor, int]:
    """A table (R, M) of shuffled pages, `spare` for each row beyond its need, and how many pages the pool has."""
    needed = [-(-length // PAGE) + spare for length in lengths]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), max(needed)), -1)
    for r, count in enumerate(needed):
        table[r, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
    return ints(table), total


def scatter(dense: Tensor, table: Tensor, lengths: list[int], total: int) -> Tensor:
    """(R, T, ...) to a plane (N, P, ...), NaN (or -9) where no token is."""
    plane = dense.new_full((total, PAGE, *dense.shape[2:]), torch.nan if dense.is_floating_point() else -9)
    for r, length in enumerate(lengths):
        for slot in range(length):
            plane[int(table[r, slot // PAGE]), slot % PAGE] = dense[r, slot]
    return plane.to(DEVICE)


def read(plane: Tensor, table: Tensor, r: int, length: int) -> Tensor:
    slots = torch.arange(length, device=plane.device)
    return plane[table[r, slots // PAGE].long(), slots % PAGE]


def check_attend(
    dtype: torch.dtype, g: int, d: int, dv: int, splits: int | None, lengths: list[int] = RAGGED, *,
    mass: bool = False, holes: bool = False, probabilities: bool = False, stored: torch.dtype | None = None,
) -> None:  # fmt: skip
    rows, t, stored = len(lengths), max(lengths), stored or dtype
    q = torch.randn(rows, g, d).to(dtype)
    keys, values = torch.randn(rows, t, d).to(stored), torch.randn(rows, t, dv).to(stored)
    bias = torch.rand(rows, t) * 3 if mass else torch.zeros(rows, t)
    seen = torch.arange(t) < torch.tensor(lengths)[:, None]
    dropped, count = torch.full((rows, 5), 10**6), torch.zeros(rows, dtype=torch.int64)
    if holes:
        for r, length in enumerate(lengths):
            count[r] = min(4, length)  # the row of one token loses it
            dropped[r, : count[r]] = torch.randperm(length)[: count[r]]
            seen[r, dropped[r, : count[r]]] = False
        keys[~seen], values[~seen] = 100.0, 1000.0  # finite, and seen at once
    logits = torch.einsum("rgd,rtd->rgt", q.double(), keys.double()) * d**-0.5 + bias[:, None]
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    probs = logits.softmax(-1).nan_to_num(0.0)
    want = torch.einsum("rgt,rtd->rgd", probs, values.double())

    table, total = pages_of(lengths)
    planes = [scatter(x, table, lengths, total) for x in (keys, values, bias)]
    out, lse, got = paged.attend(
        q.to(DEVICE), planes[0], planes[1], table, ints(lengths), d**-0.5,
        mass=planes[2] if mass else None, splits=splits, probabilities=probabilities,
        dropped=triton_rows.left_out(table.shape[1] * PAGE, ints(dropped), ints(count)) if holes else None,
    )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out.cpu(), want, dtype)
    close(lse.cpu(), logits.logsumexp(-1), torch.float32, "lse")
    assert (got is None) != probabilities
    if got is not None:
        assert got.shape == (rows, g, table.shape[1] * PAGE) and got.dtype == torch.float32
        close(got[..., :t].cpu(), probs, torch.float32, "probabilities")
        assert (got[..., t:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("g", "d", "dv"), [(1, 16, 16), (3, 64, 64), (8, 80, 48)])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_attend(dtype, g, d, dv, splits):
    check_attend(dtype, g, d, dv, splits)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_attend_with_mass_holes_and_probabilities(splits, mass, holes):
    check_attend(torch.float32, 3, 16, 24, splits, mass=mass, holes=holes, probabilities=True)


def test_attend_takes_more_queries_than_a_tile_and_many_splits():
    check_attend(torch.float32, 70, 16, 16, 2, [5, 40], mass=True, probabilities=True)
    check_attend(torch.float32, 2, 16, 16, 40, [0, 700, 3], holes=True)  # more splits than blocks and than one chunk


def test_attend_reads_narrower_pages_and_chooses_its_splits():
    check_attend(torch.float32, 3, 64, 16, None, stored=torch.bfloat16)
    check_attend(torch.bfloat16, 3, 1, 256, None, [17, 33], mass=True, probabilities=True)


def test_attend_without_any_page():
    none = torch.zeros(0, PAGE, 16, device=DEVICE)
    out, lse, probs = paged.attend(
        torch.randn(2, 3, 16, device=DEVICE), none, none, ints(torch.zeros(2, 0)), ints([0, 0]), 1.0, probabilities=True
    )
    assert (out == 0).all() and (lse == -torch.inf).all() and probs.shape == (2, 3, 0)


def test_attend_skips_places_without_a_page():
    """A page number of -1 below the length: no token there, rather than a read outside the pool."""
    table, total = pages_of([40], spare=0)
    keys, values = torch.randn(2, 1, 40, 16)
    planes = [scatter(x, table, [40], total) for x in (keys, values)]
    table[0, 1] = -1
    out, _, probs = paged.attend(
        torch.zeros(1, 1, 16, device=DEVICE), *planes, table, ints([40]), 1.0, probabilities=True
    )
    rest = torch.cat([values[0, :16], values[0, 32:]]).mean(0)
    close(out[0, 0].cpu(), rest, torch.float32)
    assert (probs[0, 0, 16:32] == 0).all()


@pytest.mark.parametrize(
    ("programs", "capacity", "least", "most"),
    [(64, 32768, 9, 20), (8, 32768, 60, 128), (4096, 32768, 1, 2), (1, 16, 1, 1)],
)
def test_splits_come_from_shapes(programs, capacity, least, most):
    assert least <= triton_rows.choose_splits(programs, capacity, 132) <= most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_writes_all_planes_and_counts(dtype):
    lengths = [0, 15, 16, 47, 5]
    rows = len(lengths)
    table, total = pages_of(lengths)
    table[4] = -1  # no page: the row stays as it is
    wide = {"keys": torch.randn(rows, 48, 80).to(dtype), "values": torch.randn(rows, 48, 12).to(dtype)}
    wide |= {"position": torch.arange(48, dtype=torch.int32).expand(rows, 48), "mass": torch.rand(rows, 48)}
    held = [*lengths[:4], 0]
    planes = {name: scatter(x, table, held, total) for name, x in wide.items()}
    before = {name: x.clone() for name, x in planes.items()}
    new = {
        "values": torch.randn(12, rows, device=DEVICE).to(dtype).float().T,
        "keys": torch.randn(rows, 80, device=DEVICE).to(dtype),
    }
    new["position"] = ints([7, 8, 9, 10, 11])
    count = ints(lengths)
    paged.append(planes, new, table, count, fills={"mass": -1.5})
    assert count.tolist() == [1, 16, 17, 48, 5]
    new["mass"] = torch.full((rows,), -1.5, device=DEVICE)
    for name, plane in planes.items():
        for r, slot in enumerate(lengths[:4]):
            before[name][int(table[r, slot // PAGE]), slot % PAGE] = new[name][r].to(plane.dtype)
        assert_close(plane, before[name], atol=0, rtol=0, equal_nan=True, msg=name)


def test_append_then_attend_as_a_decode_step():
    lengths, d = [0, 16, 31], 16
    table, total = pages_of(lengths, spare=2)
    dense = torch.randn(2, 3, 40, d)
    planes = {name: scatter(x, table, lengths, total) for name, x in zip(("keys", "values"), dense, strict=True)}
    count, q = ints(lengths), torch.randn(3, 2, d)
    for step in range(3):
        for r, length in enumerate(lengths):
            dense[:, r, length + step] = torch.randn(2, d)
        place = torch.tensor(lengths) + step
        new = {name: dense[i, torch.arange(3), place].to(DEVICE) for i, name in enumerate(planes)}
        paged.append(planes, new, table, count)
        out, _, _ = paged.attend(q.to(DEVICE), planes["keys"], planes["values"], table, count, 0.25, splits=2)
        for r, length in enumerate((place + 1).tolist()):
            weights = (q[r].double() @ dense[0, r, :length].double().T * 0.25).softmax(-1)
            close(out[r].cpu(), weights @ dense[1, r, :length].double(), torch.float32)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_steps_of_growing_rows():
    tokens, q = torch.randn(20, 3, 16, device=DEVICE), torch.randn(3, 2, 16, device=DEVICE)
    table, total = pages_of([32, 32, 32], spare=0)
    planes = {name: torch.zeros(total, PAGE, 16, device=DEVICE) for name in ("keys", "values")}
    token, count = tokens[0].clone(), ints([0, 0, 0])

    def step() -> Tensor:
        paged.append(planes, dict.fromkeys(planes, token), table, count)
        return paged.attend(q, planes["keys"], planes["values"], table, count, 0.25, splits=2)[0]

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    count.zero_()
    for i in range(len(tokens)):
        token.copy_(tokens[i])
        graph.replay()
        seen = tokens[: i + 1].transpose(0, 1).double()
        weights = (torch.einsum("rgd,rtd->rgt", q.double(), seen) * 0.25).softmax(-1)
        close(out, weights @ seen, torch.float32)
    assert count.tolist() == [20, 20, 20]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_keeps_tokens_in_another_pool(dtype):
    lengths, counts = [0, 16, 37, 70, 40], [0, 16, 5, 33, 40]
    table, total = pages_of(lengths)
    wide = {"keys": torch.randn(5, 70, 80).to(dtype), "values": torch.randn(5, 70, 12).to(dtype)}
    wide["position"] = torch.arange(5 * 70, dtype=torch.int32).view(5, 70)
    source = {name: scatter(x, table, lengths, total) for name, x in wide.items()}
    slots = torch.full((5, 45), 10**6)
    for r, count in enumerate(counts):
        slots[r, :count] = torch.randperm(lengths[r])[:count].sort().values
    to_table, to_total = pages_of(counts, spare=0, seed=1)
    target = {name: torch.full_like(x[:1], 99).expand(to_total, *x.shape[1:]).clone() for name, x in source.items()}
    paged.gather(source, table, ints(slots), ints(counts), target, to_table)
    for name, plane in target.items():
        written = torch.zeros(plane.shape[:2], dtype=torch.bool, device=DEVICE)
        for r, count in enumerate(counts):
            assert_close(read(plane, to_table, r, count).cpu(), wide[name][r, slots[r, :count]], atol=0, rtol=0)
            at = torch.arange(count, device=DEVICE)
            written[to_table[r, at // PAGE].long(), at % PAGE] = True
        assert (plane[~written] == 99).all(), f"{name}: wrote where no token goes"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "d"), [(1, 16), (3, 80)])
@pytest.mark.parametrize(("n", "t"), [(1, 63), (70, 140)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy multiplies the planted NaN
def test_column_sums(dtype, group, d, n, t, biased):
    b, h = 1, 2
    q = torch.randn(b, n, h * group, d).to(dtype).transpose(1, 2)  # as models lay queries out
    k = torch.randn(b, h, t, d).to(dtype)
    start = torch.tensor([[0, t - n]])
    bias = torch.rand(b, h, t) * 3 if biased else None
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.reshape(b, h, group, n, d).float(), k.float()) * d**-0.5
    logits = logits if bias is None else logits + bias[:, :, None, None]
    future = torch.arange(t) > start[..., None, None] + torch.arange(n)[:, None]
    lse = logits.masked_fill(future[:, :, None], -torch.inf).logsumexp(-1).view(b, h * group, n)
    silent = torch.arange(n) % 5 == 2
    lse[:, :, silent] = torch.inf
    want = naive.column_sums(q.contiguous(), k, lse, d**-0.5, start, bias)
    q[:, :, silent] = torch.nan
    args = (
        q.to(DEVICE),
        k.to(DEVICE),
        lse.to(DEVICE),
        d**-0.5,
        start.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
    )
    got = scores.column_sums(*args)
    assert got.dtype == torch.float32
    assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(got, scores.column_sums(*args)), "two runs differ"
