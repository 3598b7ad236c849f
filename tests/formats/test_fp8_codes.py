"""Eight bits a number: what rounding may do, and what it may not."""

import pytest
import torch
from format_cases import LENGTHS, B, D, H, chunk, held, opened
from hypothesis import given
from hypothesis import strategies as st

from kvfold.formats import Chunk, Fp8, Spec

LARGEST = 65504.0


def of_values(values: torch.Tensor) -> Chunk:
    """(T, D) as keys and values of one row."""
    given = chunk([[len(values)]], dtype=values.dtype)
    return Chunk(values[None, None], values[None, None], given.valid, given.columns)


@given(
    st.lists(st.lists(st.floats(-LARGEST, LARGEST, width=16), min_size=8, max_size=8), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_finite_number_stays_finite_and_close(numbers, dtype):
    values = torch.tensor(numbers).to(dtype)
    values = values.clamp(-LARGEST, LARGEST)  # bfloat16 has rounded some up
    segment = opened(Fp8(page_size=4), of_values(values))
    wide, most = values.float(), values.float().abs().amax(-1, keepdim=True)
    for plane in (held(segment)[0]["keys"], held(segment)[0]["values"]):
        assert plane.dtype == dtype and plane.isfinite().all()
        assert ((plane.float() - wide).abs() <= wide.abs() / 15 + most / 2**17 + 1e-30).all()
    assert segment.attend(torch.zeros(1, 1, 1, 1, 8, dtype=dtype), 1.0)[0].isfinite().all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 6e-8, LARGEST, 3e38])
def test_the_largest_of_a_vector_is_exact_whatever_its_size(size):
    values = torch.full((3, 8), size) * torch.tensor([1.0, -1.0, 0.0] * 2 + [1.0, 0.0])
    segment = opened(Fp8(), of_values(values))
    assert segment.dense().keys.isfinite().all()
    torch.testing.assert_close(held(segment)[0]["keys"], values, rtol=1e-6, atol=1e-38)


def test_a_vector_of_zeros_has_a_scale_of_one():
    segment = opened(Fp8(), of_values(torch.zeros(2, 8)))
    assert segment.plane("key_scale").flatten().tolist() == [1.0, 1.0] and segment.dense().values.eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_token(bad):
    values = torch.randn(5, 8)
    values[2, 3] = bad
    keys = held(opened(Fp8(), of_values(values)))[0]["keys"]
    assert keys[2].isnan().all() and keys[[0, 1, 3, 4]].isfinite().all()


def test_codes_and_scales_lie_on_the_pages():
    given = chunk(LENGTHS)
    segment = opened(Fp8(page_size=4), given)
    kinds = {name: (spec.dtype, spec.width) for name, spec in segment.pool.specs.items()}
    assert kinds["keys"] == (torch.uint8, D) and kinds["key_scale"] == kinds["value_scale"] == (torch.float32, None)
    row = segment.plane("keys")[0, 0, : LENGTHS[0][0]].view(torch.float8_e4m3fn).float()
    keys = given.keys[0, 0][given.valid[0, 0]]
    assert (row.abs().amax(-1) == 448).all()
    assert torch.allclose(segment.plane("key_scale")[0, 0, : len(row)], keys.abs().amax(-1) / 448)


def test_amending_rounds_and_touches_nothing_else():
    segment = opened(Fp8(page_size=4), chunk(9))
    before = {name: plane.clone() for name, plane in segment.pool.planes.items()}
    slots = torch.full((B, H, 2), -1)
    slots[1, 0] = torch.tensor([8, 2])
    segment.amend(slots, torch.full((B, H, 2, D), 3.0), None)
    assert segment.dense().keys[1, 0, [2, 8]].eq(3.0).all()
    changed = {n: int((p != before[n]).flatten(2 if p.dim() > 2 else 1).sum()) for n, p in segment.pool.planes.items()}
    assert changed["values"] == changed["value_scale"] == changed["position"] == 0 and changed["key_scale"] == 2


def test_it_opens_in_the_models_dtype():
    spec = Spec(1, 1, 4, 6, torch.bfloat16, torch.device("cpu"))
    segment = Fp8().open(spec)
    assert segment.longest == 0 and segment.dense().values.shape == (1, 1, 0, 6)
    assert segment.dense().keys.dtype == torch.bfloat16
