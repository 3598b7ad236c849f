"""Formats whose segments the Triton kernels answer: decode steps as by the definition, interpreted or on a GPU."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from interpreted import DEVICE, interpreted, triton_fits  # noqa: F401  (fixtures that every test here needs)
from kvfold.formats import LOG_MASS, POSITION, Balanced, Chunk, Fp8, Kivi, Rotated, Separable, Sparse, Spec, Thin
from kvfold.ops import codes, dispatch, float8, paged, sparse, tokens
from kvfold.ops.codes import triton_kernels as _codes
from kvfold.ops.float8 import triton_kernels as _fp8
from kvfold.ops.paged import triton_kernels as _paged
from kvfold.ops.sparse import triton_kernels as _sparse
from kvfold.ops.tokens import triton_kernels as _tokens

KERNELS = (_codes, _fp8, _paged, _sparse, _tokens)  # imported: the fixture finds what is
pytestmark = pytest.mark.usefixtures("interpreted", "triton_fits")
ROOMS = {
    Kivi(bits=2, group=16, residual=16): codes, Separable(bits=4, group=16): codes, Rotated(3, 4): tokens,
    Balanced(bits=2): tokens, Sparse(residual=16): sparse, Thin(): paged, Fp8(): float8,
}  # fmt: skip
"""Formats, and the operation that answers over their pages."""


@pytest.mark.parametrize("form", ROOMS, ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_steps_are_those_of_the_definition(form, dtype, monkeypatch):
    b, h, t, d = 2, 2, 45, 32
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(b, h, t, d, generator=rng).to(DEVICE, dtype) for _ in range(2))
    places = torch.arange(t, dtype=torch.int32, device=DEVICE).expand(b, h, t)
    columns = {POSITION: places, LOG_MASS: torch.rand(b, h, t, generator=rng).to(DEVICE)}
    chunk = Chunk(keys, values, places < torch.tensor([45, 38], device=DEVICE)[:, None, None], columns)
    segment = form.open(Spec.of(chunk))
    segment.append(chunk)
    for _ in range(2):
        q = torch.randn(b, h, 3, 1, d, generator=rng).to(DEVICE, dtype)
        new = torch.randn(2, b, h, 1, d, generator=rng).to(DEVICE, dtype)
        segment.step(q, *new, torch.full((b, 1), 60, dtype=torch.int32, device=DEVICE), 0.2, weights=False)
        with dispatch.use("naive"):
            want = segment.attend(q, 0.2, weights=True)
        with dispatch.use("triton"), monkeypatch.context() as only:
            only.setattr(ROOMS[form].naive, f"attend_{_name(form)}", None)  # the kernel must not hand its work on
            got = segment.attend(q, 0.2, weights=True)
        off = 2e-5 if dtype == torch.float32 else 1e-2
        for name, mine, theirs in zip(("out", "lse", "weights"), got, want, strict=True):
            assert_close(mine, theirs, atol=off, rtol=off, msg=lambda text, name=name: f"{name}: {text}")


def _name(form) -> str:
    return {codes: "codes", tokens: "tokens", sparse: "sparse", paged: "pages", float8: "float8"}[ROOMS[form]]


@pytest.mark.parametrize("op", ["attend_codes", "attend_float8", "attend_pages", "attend_sparse", "attend_tokens"])
def test_triton_comes_first_on_cuda(op):
    assert dispatch.versions(op)[0] == "triton"
