"""Attention over tokens in codes with scales of their own, against its definition in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from coded_pages import RAGGED, refused, scattered, softmax_over
from kvfold import ops
from kvfold.ops import _cpu, dispatch
from kvfold.ops.codes.packing import pack, unpack, width
from kvfold.ops.tokens import Coding, naive
from kvfold.pages import PageTable, Plane

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
G = 3
LEVELS = {bits: tuple((torch.arange(1 << bits) - 1.7).pow(3).div(4**bits).tolist()) for bits in (2, 3, 4)}


def levels(size: int, bits: int) -> Coding:
    return Coding(size, bits, LEVELS[bits])


CASES = [
    (levels(64, 2), levels(64, 3)), (levels(128, 3), levels(96, 4)), (levels(80, 4), levels(12, 2)),
    (levels(16, 3), levels(20, 3)), (Coding(64, 2, groups=2), Coding(64, 2, groups=2)),
    (Coding(128, 4, groups=2), Coding(48, 8)), (Coding(12, 8, groups=3), Coding(192, 3, groups=2)),
    (levels(64, 4), Coding(64, 4, groups=1)), (Coding(80, 2, groups=5), levels(256, 4)),
]  # fmt: skip
"""Full and short units, one group and several, levels and steps."""


def named(coding: tuple[Coding, Coding]) -> str:
    return " ".join(f"{x.size}x{x.bits}{'' if x.levels else f'/{x.groups}'}" for x in coding)


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The CPU version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_tokens", refused)


def planes_of(coding: Coding, what: str, kind: torch.dtype) -> dict[str, Plane]:
    name = naive.KINDS[what]
    planes = {what: Plane(width(coding.size, coding.bits), torch.uint8), f"{name}_scale": Plane(coding.groups, kind)}
    return planes if coding.levels else planes | {f"{name}_zero": Plane(coding.groups, kind)}


def table_of(keys: Coding, values: Coding, kind: torch.dtype, page: int, poison: bool = True) -> PageTable:
    """Random codes on scattered pages; what is behind a row's tokens has NaN for scales and zeros, where `poison`."""
    planes = planes_of(keys, "keys", kind) | planes_of(values, "values", kind)
    total = sum(RAGGED)
    states: dict[str, Tensor] = {}
    for what, coding in (("keys", keys), ("values", values)):
        name = naive.KINDS[what]
        codes = torch.randint(0, 1 << coding.bits, (total, coding.size), dtype=torch.uint8)
        step = 1.0 if coding.levels else 2.0**-coding.bits
        states |= {what: pack(codes, coding.bits), f"{name}_scale": (torch.rand(total, coding.groups) + 0.1) * step}
        if coding.levels is None:
            states[f"{name}_zero"] = torch.randn(total, coding.groups)
    return scattered(planes, RAGGED, page, states, poison=poison)  # plain torch multiplies what is there by zero


def numbers(coding: Coding, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """What codes stand for, number by number, float64."""
    wide, run = unpack(codes, coding.size, coding.bits).double(), coding.size // coding.groups
    scale = scale.double().repeat_interleave(run, -1)
    if coding.levels is not None:
        return torch.tensor(coding.levels, dtype=torch.float32).double()[wide.long()] * scale
    return wide * scale + zero.double().repeat_interleave(run, -1)


def softmax(
    q: Tensor, table: PageTable, scale: float, keys: Coding, values: Coding, mass: bool, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_over` the numbers that codes stand for."""

    def both(row: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
        planes = table.read(table.pool.specs, np.full(len(at), row), at)
        found = [
            numbers(coding, *(planes[n] for n in (what, f"{what[:-1]}_scale", f"{what[:-1]}_zero") if n in planes))
            for what, coding in (("keys", keys), ("values", values))
        ]
        return found[0], found[1]

    return softmax_over(q, table, scale, both, mass, read)


@pytest.mark.parametrize("coding", CASES, ids=named)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_the_kernel_against_the_definition(coding, kind):
    keys, values = coding
    for extra, page in (("", 32), ("mass", 8), ("read", 64), ("holes", 16)):
        torch.manual_seed(0)
        table = table_of(keys, values, kind, page)
        q = torch.randn(len(RAGGED), 1, G, 1, keys.size)
        read = None
        if extra == "read":
            read = torch.rand(len(RAGGED), 1, table.longest) < 0.4
            read[4], read[6, :, 64:128] = False, False
        if extra == "holes":
            mask = torch.rand(len(RAGGED), table.longest) < 0.98
            ops.keep_pages(table, mask, {}, slack=True)
            assert table.holed
        name = "log_mass" if extra == "mass" else None
        out, lse, weights = ops.attend_tokens(
            q, table, 0.3, keys=keys, values=values, mass=name, read=read, weights=True
        )
        want, norm, shares = softmax(q, table, 0.3, keys, values, extra == "mass", read)
        assert_close(out[:, 0, :, 0].double(), want.nan_to_num(0.0), atol=1e-4, rtol=1e-4)
        assert_close(lse[:, 0, :, 0].double(), norm, atol=1e-4, rtol=1e-5)
        assert_close(weights[:, 0, :, 0].double(), shares.nan_to_num(0.0), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("coding", CASES[::4], ids=named)
def test_the_definition_itself(coding):
    torch.manual_seed(0)
    keys, values = coding
    table, q = table_of(keys, values, torch.float32, 12, poison=False), torch.randn(len(RAGGED), 1, G, 1, keys.size)
    read = torch.rand(len(RAGGED), 1, table.longest) < 0.4
    want, norm, _ = softmax(q, table, 0.3, keys, values, True, read)
    for version in ("naive", "cpu"):  # whose kernel takes no pages of 12
        with dispatch.use(version):
            out, lse, _ = ops.attend_tokens(q, table, 0.3, keys=keys, values=values, mass="log_mass", read=read)
        assert_close(out[:, 0, :, 0].double(), want.nan_to_num(0.0), atol=1e-5, rtol=1e-4)
        assert_close(lse[:, 0, :, 0].double(), norm, atol=1e-5, rtol=1e-5)


def test_many_queries_and_a_narrow_dtype():
    torch.manual_seed(0)
    keys, values = CASES[0]
    table = table_of(keys, values, torch.bfloat16, 16, poison=False)
    q = torch.randn(len(RAGGED), 1, 5, 7, keys.size).bfloat16()
    out, lse, _ = ops.attend_tokens(q, table, 0.3, keys=keys, values=values)
    with dispatch.use("naive"):
        want, norm, _ = ops.attend_tokens(q, table, 0.3, keys=keys, values=values)
    assert out.dtype == torch.bfloat16
    assert_close(out, want)
    assert_close(lse, norm)


WRONG = {
    "bits": ({"key_bits": 5}, "bits must be"),
    "levels of another width": ({"key_levels": np.zeros(4, dtype=np.float32)}, "levels must be"),
    "levels and zeros": ({"value_zero": np.zeros((64, 1), dtype=np.float32)}, "either levels or zeros"),
    "neither": ({"key_levels": None}, "either levels or zeros"),
    "too few scales": ({"key_scale": np.zeros((60, 1), dtype=np.float32)}, "a scale for each group"),
    "two dtypes of scales": ({"value_scale": np.zeros((64, 1), dtype=np.uint16)}, "one dtype"),
    "too few codes": ({"keys": np.zeros((64, 5), dtype=np.uint8)}, "a vector of codes for each slot"),
    "a page that is not there": ({"table": np.full((1, 4), 4, dtype=np.int32)}, "a page that the pool does not have"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    change, message = WRONG[name]
    float32, int32 = np.float32, np.int32
    given = {
        "q": np.zeros((1, 2, 16), float32), "key_bits": 3, "keys": np.zeros((64, width(16, 3)), np.uint8),
        "key_levels": np.zeros(8, float32), "key_scale": np.zeros((64, 1), float32), "key_zero": None,
        "value_bits": 4, "values": np.zeros((64, 8), np.uint8), "value_levels": np.zeros(16, float32),
        "value_scale": np.zeros((64, 1), float32), "value_zero": None, "mass": None, "read": None,
        "table": np.zeros((1, 4), int32), "lengths": np.full(1, 20, int32), "holes": np.zeros((1, 0), int32),
        "hole_count": np.zeros(1, int32), "page_size": 16, "scale": 1.0, "threads": 1,
        "out": np.zeros((1, 2, 16), float32), "lse": np.zeros((1, 2), float32), "weights": None,
    }  # fmt: skip
    _cpu.attend_tokens(**given)
    with pytest.raises(ValueError, match=message):
        _cpu.attend_tokens(**(given | change))


def test_a_coding_has_as_many_levels_as_codes():
    with pytest.raises(AssertionError):
        dataclasses.replace(CASES[0][0], bits=4)
