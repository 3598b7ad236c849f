"""The Triton kernels that attend over pages, taken down to a GPU's machine code, which needs no GPU.

The interpreter runs what the compiler refuses (a helper that returns two shapes, say). Products must have come to
matrix units. Whether a kernel is right says the interpreter, how fast it is says neither.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from test_sparse import table_of as sparse_table
from test_token_codes import levels
from test_token_codes import table_of as token_table

from coded_pages import RAGGED, scattered, table_of
from compiled import Compiler
from kvfold.formats import Fp8
from kvfold.ops.codes import gpu as codes
from kvfold.ops.codes import triton_kernels as _codes
from kvfold.ops.float8 import gpu as fp8
from kvfold.ops.float8 import triton_kernels as _fp8
from kvfold.ops.paged import gpu as paged
from kvfold.ops.paged import triton_kernels as _paged
from kvfold.ops.sparse import gpu as sparse
from kvfold.ops.sparse import triton_kernels as _sparse
from kvfold.ops.tokens import Coding
from kvfold.ops.tokens import gpu as tokens
from kvfold.ops.tokens import triton_kernels as _tokens
from kvfold.pages import Plane

pytestmark = pytest.mark.slow
KERNELS = (_codes, _fp8, _paged, _sparse, _tokens)  # imported: the compiler looks for what is
SHARED_MEMORY = 99 * 1024
"""Bytes that a program may have on every GPU from Ampere on."""
R, T = len(RAGGED), max(RAGGED)
REST = {"mass": "log_mass", "weights": True}
TURNED = {"compact": None, "position": "position"}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile what a call would launch, for a compute capability, and look at it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def check(capability, name, call) -> None:
        if torch.cuda.is_available():
            pytest.skip("the kernels run here")
        made = Compiler(monkeypatch, capability).made
        call()
        assert {name, "_normalise"} <= made.keys()
        assert made[name].asm["cubin"] and "mma.sync" in made[name].asm["ptx"]
        assert made[name].metadata.shared <= SHARED_MEMORY

    return check


def query(size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(R, 1, 4, 1, size, dtype=dtype)


@pytest.mark.parametrize(
    ("capability", "bits", "sizes"),
    [(80, 4, (64, 64, 32)), (90, 3, (80, 96, 16)), (90, 2, (128, 128, 32)), (90, 8, (64, 64, 64))], ids=str,
)  # fmt: skip
def test_codes(compiled, capability, bits, sizes):
    table, read = table_of(RAGGED, bits, sizes, torch.float16, 32), torch.ones(R, 1, T, dtype=torch.bool)
    more = {"bits": bits, "value_size": sizes[1], "read": read, **REST, **TURNED}
    compiled(capability, "_attend_codes", lambda: codes.attend_codes(query(sizes[0]), table, 0.1, **more))


@pytest.mark.parametrize(
    ("capability", "keys", "values"),
    [(80, levels(64, 3), levels(64, 2)), (90, Coding(64, 2, groups=2), Coding(80, 4, groups=5))],
    ids=["levels", "steps"],
)
def test_tokens(compiled, capability, keys, values):
    table = token_table(keys, values, torch.bfloat16, 16)
    more = {"keys": keys, "values": values, "read": None, **REST}
    asked = query(keys.size, torch.float32)
    compiled(capability, "_attend_tokens", lambda: tokens.attend_tokens(asked, table, 0.1, **more))


@pytest.mark.parametrize(("capability", "sizes"), [(80, (64, 64, 33, 33)), (90, (80, 96, 20, 96))], ids=str)
def test_sparse(compiled, capability, sizes):
    table = sparse_table(RAGGED, sizes, torch.bfloat16, 16)
    more = {"value_size": sizes[1], "read": None, **REST, **TURNED}
    compiled(capability, "_attend_sparse", lambda: sparse.attend_sparse(query(sizes[0]), table, 0.1, **more))


@pytest.mark.parametrize("capability", [80, 90])
def test_fp8(compiled, capability):
    size, more = Plane(64, torch.uint8), {"read": None, **REST, **TURNED}
    scale = Plane(None, torch.float32)
    planes = {"keys": size, "values": size, "key_scale": scale, "value_scale": scale}
    table = scattered(planes, RAGGED, Fp8().page_size, {})
    kind = {"kind": torch.float8_e4m3fn}
    compiled(capability, "_attend_float8", lambda: fp8.attend_float8(query(64), table, 0.1, **kind, **more))


@pytest.mark.parametrize("capability", [80, 90])
def test_narrow_keys(compiled, capability):
    """What is left of keys of 128 numbers, in pages of floats."""
    planes = {"keys": Plane(76, torch.bfloat16), "values": Plane(128, torch.bfloat16)}
    table, more = scattered(planes, RAGGED, 16, {}), {"read": None, **REST, **TURNED}
    compiled(capability, "_attend_split", lambda: paged.attend_pages(query(76), table, 0.1, **more))
