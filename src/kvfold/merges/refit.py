"""Values are fitted again to what the last queries read before tokens went."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.merges.absorb import few
from kvfold.views import LayerView, Queries
from kvfold.views.decisions import Amend


def refit(
    view: LayerView, after: LayerView, asked: Queries, read: Float[Tensor, "B H N Dv"], free: Bool[Tensor, "B H T"],
    ridge: float = 1.0,
) -> Amend:  # fmt: skip
    """New values for `free` tokens, so that `asked` reads of `after` what it read of `view`, as nearly as may be.

    `read` is that, or what they read of more (`LayerView.read_by`): of each KV head's N = group x queries, a query
    head's side by side. Ridge regression of each head: the smallest change of the values, `ridge` times the mean
    squared length of the queries' attention being the price of it. Attention Matching (arXiv:2602.16284) solves for the
    values by least squares; here they start from what is there, and nothing of a head changes that lost no token.
    """
    slots, here = few(after.valid)
    left = after.tokens.take(slots)
    weights = LayerView(left.but(here), after.queries, after.place).attention_of(asked).flatten(2, 3)
    values = left.values.float().masked_fill(~here[..., None], 0.0)  # padding may hold anything
    missing = read - weights @ values
    able = here & free.gather(-1, slots) & (view.valid & ~after.valid).any(-1, keepdim=True)
    weights = weights.masked_fill(~able[:, :, None], 0.0)
    gram = weights @ weights.mT
    real = asked.valid.sum(1)[:, None] * (weights.shape[2] // asked.valid.shape[1])
    price = ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / real.clamp(min=1)
    gram.diagonal(dim1=-2, dim2=-1).add_(price.clamp(min=torch.finfo(gram.dtype).eps)[..., None])
    factor = torch.linalg.cholesky_ex(gram).L  # MKL's threaded LU failed on a batch with heads that lost nothing
    change = weights.mT @ torch.cholesky_solve(missing, factor)
    return Amend(torch.where(able, slots, -1), None, (values + change).to(left.values.dtype))
