"""CPU kernels at their edges: what is no number, windows, and nothing at all."""

import numpy as np
import pytest
import torch
from test_cpu_kernels import close, instructions, paged, prompt  # noqa: F401  (a fixture)

from kvfold import ops
from kvfold.ops import _cpu, dispatch


@pytest.mark.parametrize("where", [slice(0, 64), slice(56, 64), slice(70, 71), slice(0, 128)])
def test_what_is_not_a_number_is_seen(where):
    """As torch shows it: an answer that looks clean would hide an overflow."""
    table, q = paged([128, 64], 16, 16), torch.randn(1, 2, 2, 1, 16)
    keys = table.dense("keys")[0].clone()
    keys[where] = torch.nan
    pages = torch.from_numpy(table.table[0, :8].astype(np.int64))
    table.pool.planes["keys"][pages] = keys.view(8, 16, 16)
    for weights in (False, True):
        with dispatch.use("cpu"):
            out, lse, _ = ops.attend_pages(q, table, 0.2, weights=weights)
        assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
        assert out[0, 1].isfinite().all() and lse[0, 1].isfinite().all()


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_causal_within_a_window(window):
    (q, k, v), t = prompt(150, 3, 16, 32), 150
    shares, out = np.ones(t, np.float32), torch.empty(4, 3, t, 32)
    lse, sums = torch.empty(4, 3, t), torch.zeros(4, _cpu.SHARES, t)
    _cpu.causal(
        q.reshape(4, 3, t, 16).numpy(), k.reshape(4, t, 16).numpy(), v.reshape(4, t, 32).numpy(), 0.2, window, shares,
        2, out.numpy(), lse.numpy(), sums.numpy(),
    )  # fmt: skip
    at = torch.arange(t)
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    logits = torch.einsum("bgqd,bkd->bgqk", q.reshape(4, 3, t, 16).double(), k.reshape(4, t, 16).double()) * 0.2
    logits = logits.masked_fill(~seen, -torch.inf)
    close("out", out, torch.einsum("bgqk,bkd->bgqd", logits.softmax(-1), v.reshape(4, t, 32).double()))
    close("lse", lse, logits.logsumexp(-1))
    close("sums", sums.sum(1), logits.softmax(-1).sum((1, 2)), share=1e-5)


def test_no_queries_get_no_answers():
    table = paged([5, 7])
    for n in (0,):
        with dispatch.use("cpu"):
            out, lse, _ = ops.attend_pages(torch.zeros(1, 2, 3, n, 16), table, 0.2)
        assert out.shape == (1, 2, 3, 0, 16) and lse.shape == (1, 2, 3, 0)
