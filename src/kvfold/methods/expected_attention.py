"""Expected Attention: keep the keys that future queries can be expected to look at (arXiv:2510.00636)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored, exempt
from kvfold.options import check_int, check_number
from kvfold.scores.expected import expected_attention, future_queries
from kvfold.views import LayerView


@method(
    "expected-attention", title="Expected Attention", paper="2510.00636", kind="evict",
    formula=r"""
        z_t = \frac{\bar q^\top k_t}{\sqrt D} + \frac{k_t^\top \Sigma k_t}{2D}
        s_t = \Big(\frac{e^{z_t}}{\sum_j e^{z_j}} + \epsilon\Big) \lVert v_t \rVert
    """,
    options={
        "future": "positions after the prompt over which the queries' rotation is averaged",
        "sinks": "first tokens that always stay; their queries do not count",
        "epsilon": "added to the expected attention: the higher, the more the value's length says",
    },
)  # fmt: skip
@dataclass(frozen=True)
class ExpectedAttention(Scored):
    """Softmax of log E exp(q k / sqrt(D)) = mean k / sqrt(D) + k covariance k / 2D, times the length of the value.

    Mean and covariance are those of the prompt's queries before RoPE, turned on average over the `future` next
    positions. The first `sinks` tokens stay, and their queries do not count. `epsilon` is added to the softmax: 0 in
    the authors' class, 0.01 in their benchmarks. No recent window: the newest token competes like the others.
    Acts at the end of a prompt; in chunks and on further turns the queries of the last one speak for the future.
    Generated tokens are appended (the authors' periodic cut while decoding is a wrapper around this method, with a
    buffer of hidden states).
    Differs from the paper: the length of a value stands for that of its output projection, as in the authors' code.
    Their benchmarks pool the budget over the heads of a layer: a wrapper's task. Without the model's RoPE (learned
    positions, or angles that depend on the text's length) queries count as they stand.
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("future", self.future, 1, high=2**20)  # an angle of each is held
        check_int("sinks", self.sinks, 0)
        check_number("epsilon", self.epsilon, 0.0, 1e9)

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        among = view.valid & (view.rank >= self.sinks)
        attention = expected_attention(view, *future_queries(view, self.future, self.sinks), among).mean(2)  # B H T
        length: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
        return (attention + self.epsilon) * length

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, 0, self.sinks)
