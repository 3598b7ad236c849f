"""Column sums in Triton: one program per block of keys reads every query that sees them; no atomics, no T x T matrix.

Triton is optional: nothing imports this module before it is asked for.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


def column_sums(
    q: Float[Tensor, "B Hq Q D"],
    k: Float[Tensor, "B H T D"],
    lse: Float32[Tensor, "B Hq Q"],
    scale: float,
    start: Int64[Tensor, "B H"],
    bias: Float[Tensor, "B H T"] | None = None,
) -> Float32[Tensor, "B H T"]:
    """For each key, the attention that all queries of its group give it, summed; the same bits on every run.

    Query i sees keys 0 to `start + i`. Where `lse` is +inf the query does not count and may hold anything.
    """
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(dtype), k.to(dtype)))
    block_d = max(16, triton.next_power_of_2(d))
    exact = dtype == torch.float32  # no matrix unit: heads in pieces and small tiles, lest registers spill
    sums = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    block_t = 64 if exact or block_d > 128 else 128
    with torch.cuda.device(q.get_device()):
        # Early keys are seen by the most queries: they come first, those of all heads, so that the end is even.
        _column_sums[b * h, triton.cdiv(t, block_t)](
            q, k, lse.contiguous(), start.contiguous(), None if bias is None else bias.contiguous(), sums, scale,
            h, hq // h, n, t, *q.stride()[:3], *k.stride()[:3],
            D=d, BLOCK_D=16 if exact else block_d, BLOCK_T=block_t, BLOCK_Q=32 if exact or block_d > 128 else 64,
            num_warps=4, num_stages=3, enable_fp_fusion=True,  # its default is about to change, with a warning
        )  # fmt: skip
    return sums


# `no_type_check`: see kvfold.ops.paged.triton_kernels.
@triton.jit(do_not_specialize=["heads", "group", "queries", "tokens"])
@no_type_check
def _column_sums(
    q, k, lse, starts, bias, sums, scale, heads, group, queries, tokens,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    first_key = tl.program_id(1) * BLOCK_T
    t, d = first_key + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    keys = k + batch * k_batch + head * k_head + t.to(tl.int64)[:, None] * k_token + d[None, :]
    key = tl.load(keys, mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0)  # all of it, or its first piece
    extra = tl.zeros([BLOCK_T], tl.float32)
    if bias is not None:
        extra += tl.load(bias + row * tokens + t, mask=t < tokens, other=0.0) * LOG2E
    start = tl.load(starts + row)
    from_query = (t - start).to(tl.int32)  # the first query that sees key t
    first_query = tl.maximum(first_key - start, 0).to(tl.int32) // BLOCK_Q * BLOCK_Q
    total = tl.zeros([BLOCK_T], tl.float32)
    for g in range(group):
        q_row = row * group + g  # head-major: the group's query heads lie side by side
        base = q + batch * q_batch + (head * group + g) * q_head
        for at in range(first_query, queries, BLOCK_Q):
            i = at + tl.arange(0, BLOCK_Q)
            here = base + i.to(tl.int64)[:, None] * q_token + d[None, :]
            shift = tl.load(lse + q_row * queries + i, mask=i < queries, other=float("inf")) * LOG2E
            logit = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            if BLOCK_D >= D:
                query = tl.load(here, mask=(i < queries)[:, None] & (d < D)[None, :], other=0.0)
                logit = tl.dot(key, tl.trans(query), logit, input_precision="ieee")
            else:
                for c in range(0, D, BLOCK_D):
                    query = tl.load(here + c, mask=(i < queries)[:, None] & (d < D - c)[None, :], other=0.0)
                    piece = tl.load(keys + c, mask=(t < tokens)[:, None] & (d < D - c)[None, :], other=0.0)
                    logit = tl.dot(piece, tl.trans(query), logit, input_precision="ieee")
            logit = logit * (scale * LOG2E) + (extra[:, None] - shift[None, :])
            # Before the exponential a query that does not count is -inf or NaN; neither may reach the sum.
            seen = (i[None, :] >= from_query[:, None]) & (shift < float("inf"))[None, :]
            total += tl.sum(tl.where(seen, tl.exp2(logit), 0.0), 1)
    tl.store(sums + row * tokens + t, total, mask=t < tokens)
