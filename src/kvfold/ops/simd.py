"""Building blocks of the CPU kernels: vector loads of any float type, small matrix products, an exponential.

Numba compiles loops well, but it does not keep a tile of accumulators in registers; these few blocks say so in LLVM's
own terms (`llvmlite`). Arrays come flat, with offsets, so that one compilation serves every shape. bfloat16 comes as
uint16 and float16 as int16: numpy knows the one not at all, and Numba the other hardly.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

WIDE = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8
"""Floats in a vector register."""
STRIP = LANES * (4 if WIDE else 2)
"""Columns of a product that are in registers at once."""
FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Rounding may differ, but infinities and NaNs are what they are."""

FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
f32 = np.float32
NEVER = f32(-1e30)
"""The logit of a token that is not seen: smaller than any, but its exponential needs no special case."""


def _widen(build: Any, array_type: Any, vector: Any, lanes: int) -> Any:
    """A vector as it lies in memory becomes floats."""
    if array_type.dtype == types.float32:
        return vector
    if array_type.dtype == types.uint16:  # bfloat16 is the upper half of a float
        shift = ir.Constant(ir.VectorType(I32, lanes), [16] * lanes)
        return build.bitcast(
            build.shl(build.zext(vector, ir.VectorType(I32, lanes)), shift), ir.VectorType(FLOAT, lanes)
        )
    half = build.bitcast(vector, ir.VectorType(ir.HalfType(), lanes))
    return build.fpext(half, ir.VectorType(FLOAT, lanes))


def _pointer(context: Any, build: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return build.gep(context.make_array(array_type)(context, build, array).data, [offset])


def _load(build: Any, array_type: Any, pointer: Any, at: int, lanes: int) -> Any:
    element = FLOAT if array_type.dtype == types.float32 else I16
    place = build.bitcast(build.gep(pointer, [ir.Constant(I64, at)]), ir.VectorType(element, lanes).as_pointer())
    vector = build.load(place)
    vector.align = 4 if element is FLOAT else 2
    return _widen(build, array_type, vector, lanes)


def _fma(build: Any, lanes: int) -> Any:
    vector = ir.VectorType(FLOAT, lanes)
    name = f"llvm.fma.v{lanes}f32"
    return cgutils.get_or_insert_function(build.module, ir.FunctionType(vector, [vector] * 3), name)


def _everywhere(build: Any, scalar: Any, lanes: int) -> Any:
    """One float in all lanes."""
    nothing = ir.Constant(ir.VectorType(FLOAT, lanes), ir.Undefined)
    one = build.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return build.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _product(rows: int, vectors: int, lanes: int) -> Any:
    """C[rows, vectors * lanes] += A[rows, K] B[K, vectors * lanes], with C in registers meanwhile."""

    @intrinsic
    def product(typing, a, a0, lda, b, b0, ldb, c, c0, ldc, k):  # type: ignore[no-untyped-def]
        signature = types.void(a, a0, lda, b, b0, ldb, c, c0, ldc, k)

        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            left = _pointer(context, build, sig.args[0], args[0], args[1])
            right = _pointer(context, build, sig.args[3], args[3], args[4])
            target = _pointer(context, build, sig.args[6], args[6], args[7])
            lda, ldb, ldc, length = args[2], args[5], args[8], args[9]
            fma = _fma(build, lanes)
            lefts = [build.gep(left, [build.mul(lda, ir.Constant(I64, r))]) for r in range(rows)]
            targets = [build.gep(target, [build.mul(ldc, ir.Constant(I64, r))]) for r in range(rows)]
            sums = [
                [
                    cgutils.alloca_once_value(build, _load(build, sig.args[6], t, n * lanes, lanes))
                    for n in range(vectors)
                ]
                for t in targets
            ]
            with cgutils.for_range(build, length) as loop:
                row = build.gep(right, [build.mul(loop.index, ldb)])
                across = [_load(build, sig.args[3], row, n * lanes, lanes) for n in range(vectors)]
                for r in range(rows):
                    down = _everywhere(build, build.load(build.gep(lefts[r], [loop.index])), lanes)
                    for n in range(vectors):
                        build.store(build.call(fma, [down, across[n], build.load(sums[r][n])]), sums[r][n])
            for r in range(rows):
                for n in range(vectors):
                    place = build.gep(targets[r], [ir.Constant(I64, n * lanes)])
                    place = build.bitcast(place, ir.VectorType(FLOAT, lanes).as_pointer())
                    build.store(build.load(sums[r][n]), place).align = 4
            return context.get_dummy_value()

        return signature, emit

    return product


def _dots(rows: int, columns: int, lanes: int) -> Any:
    """C[rows, columns] = A[rows, K] B[columns, K]': both run along memory, K is a multiple of `lanes`."""

    @intrinsic
    def dots(typing, a, a0, lda, b, b0, ldb, c, c0, ldc, k):  # type: ignore[no-untyped-def]
        signature = types.void(a, a0, lda, b, b0, ldb, c, c0, ldc, k)

        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            left = _pointer(context, build, sig.args[0], args[0], args[1])
            right = _pointer(context, build, sig.args[3], args[3], args[4])
            target = _pointer(context, build, sig.args[6], args[6], args[7])
            lda, ldb, ldc, length = args[2], args[5], args[8], args[9]
            vector, fma = ir.VectorType(FLOAT, lanes), _fma(build, lanes)
            add = cgutils.get_or_insert_function(
                build.module, ir.FunctionType(FLOAT, [FLOAT, vector]), f"llvm.vector.reduce.fadd.v{lanes}f32"
            )
            lefts = [build.gep(left, [build.mul(lda, ir.Constant(I64, r))]) for r in range(rows)]
            rights = [build.gep(right, [build.mul(ldb, ir.Constant(I64, n))]) for n in range(columns)]
            zero = ir.Constant(vector, [0.0] * lanes)
            sums = [[cgutils.alloca_once_value(build, zero) for _ in range(columns)] for _ in range(rows)]
            step = ir.Constant(I64, lanes)
            with cgutils.for_range_slice(build, ir.Constant(I64, 0), length, step) as (index, _):
                ours = [_load(build, sig.args[0], build.gep(x, [index]), 0, lanes) for x in lefts]
                for n in range(columns):
                    other = _load(build, sig.args[3], build.gep(rights[n], [index]), 0, lanes)
                    for r in range(rows):
                        build.store(build.call(fma, [ours[r], other, build.load(sums[r][n])]), sums[r][n])
            for r in range(rows):
                for n in range(columns):
                    total = build.call(add, [ir.Constant(FLOAT, 0.0), build.load(sums[r][n])], fastmath=("reassoc",))
                    at = build.add(build.mul(ldc, ir.Constant(I64, r)), ir.Constant(I64, n))
                    build.store(total, build.gep(target, [at]))
            return context.get_dummy_value()

        return signature, emit

    return dots


_WIDTH = STRIP // LANES
_product6, _product4, _product3, _product2, _product1 = (_product(rows, _WIDTH, LANES) for rows in (6, 4, 3, 2, 1))
_narrow4, _narrow1 = _product(4, 1, LANES), _product(1, 1, LANES)
_dots4, _dots3, _dots2, _dots1 = (_dots(rows, 4, LANES) for rows in (4, 3, 2, 1))


@njit(nogil=True, cache=True)
@no_type_check
def multiply(a, a0, lda, b, b0, ldb, c, c0, ldc, m, n, k):
    """C[m, n] += A[m, k] B[k, n]; n is a multiple of LANES. Each sum runs along k, whatever the tile."""
    column = 0
    while column + STRIP <= n:
        row = 0
        while row + 6 <= m:
            _product6(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
            row += 6
        while row + 4 <= m:
            _product4(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
            row += 4
        if row + 3 == m:
            _product3(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
        elif row + 2 == m:
            _product2(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
        elif row + 1 == m:
            _product1(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
        column += STRIP
    while column < n:
        row = 0
        while row + 4 <= m:
            _narrow4(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
            row += 4
        while row < m:
            _narrow1(a, a0 + row * lda, lda, b, b0 + column, ldb, c, c0 + row * ldc + column, ldc, k)
            row += 1
        column += LANES


@njit(nogil=True, cache=True)
@no_type_check
def multiply_transposed(a, a0, lda, b, b0, ldb, c, c0, ldc, m, n, k):
    """C[m, n] = A[m, k] B[n, k]'; n is a multiple of 4, k of LANES."""
    for column in range(0, n, 4):
        row = 0
        while row + 4 <= m:
            _dots4(a, a0 + row * lda, lda, b, b0 + column * ldb, ldb, c, c0 + row * ldc + column, ldc, k)
            row += 4
        if row + 3 == m:
            _dots3(a, a0 + row * lda, lda, b, b0 + column * ldb, ldb, c, c0 + row * ldc + column, ldc, k)
        elif row + 2 == m:
            _dots2(a, a0 + row * lda, lda, b, b0 + column * ldb, ldb, c, c0 + row * ldc + column, ldc, k)
        elif row + 1 == m:
            _dots1(a, a0 + row * lda, lda, b, b0 + column * ldb, ldb, c, c0 + row * ldc + column, ldc, k)


@intrinsic
def _as_float(typing, bits):  # type: ignore[no-untyped-def]
    """A float by its bits (int32)."""
    return types.float32(types.int32), lambda context, build, sig, args: build.bitcast(args[0], FLOAT)


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def exponential(x):
    """exp(x) for x <= 0 in float32, within 2 units in the last place; 0 below -87. Vectorises, as math.exp does not.

    Range reduction by a two-part ln 2 and the minimax polynomial of the Cephes library (expf).
    """
    y = max(x, f32(-87.0))
    n = np.floor(y * f32(1.44269504088896341) + f32(0.5))
    r = y - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    power = p * _as_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return power if x > f32(-87.0) else f32(0.0)
