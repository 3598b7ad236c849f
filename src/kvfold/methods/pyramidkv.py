"""PyramidKV: early layers keep many tokens, late layers few, along a line (arXiv:2406.02069)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.budgets.layers import line, tokens_each
from kvfold.methods.base import method
from kvfold.methods.scored import Wrapper
from kvfold.options import check_number
from kvfold.views import LayerView


@method(
    "pyramidkv", title="PyramidKV", paper="2406.02069", kind="budget",
    formula=r"""
        b_{L-1} = \frac{b}{\beta}, \quad b_0 = 2b - \frac{b}{\beta},
            \quad b_l = b_0 - \frac{l}{L - 1}(b_0 - b_{L-1})
    """,
    options={
        "beta": "the last layer gets 1 / beta of the mean: the higher, the steeper",
    },
)  # fmt: skip
@dataclass(frozen=True)
class PyramidKV(Wrapper):
    """A budget that falls linearly from the first layer to the last, over any score that ranks tokens.

    What `score` always keeps (SnapKV's window) is the same in all layers; of the rest b the last layer gets b / `beta`
    and the first 2 b - b / `beta`. No layer gets more than the prompt has; where that is less than 2 b, layers share
    evenly. The window of `score` is the paper's, its pooling that of the code's LongBench runs (reconstructed).
    Differs from the paper: the line is not rounded down layer by layer, which there exceeds the budget by up to
    (L - 1) / 2 tokens a layer; integers sum to it exactly. Layers that are not on pages are not counted.
    """

    score: str = "snapkv(window=8, kernel=7, pool='max')"
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 1.0)
        self.must_share_evenly()

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        shared = view.place.step.setdefault(str(self), [])
        if not shared:  # one line for all layers, whatever each of them holds
            shared += self._lines(view, self.inner.counts(view, scores))
        return view.budget(self.budget, shared)

    def _lines(self, view: LayerView, even: Int[Tensor, "B H"]) -> list[tuple[float, ...]]:
        """What each layer should get, for each row."""
        always = self.inner.always(view, even)
        window = [0] * len(even) if always is None else always.sum(-1).amin(1).tolist()
        lengths = view.place.prompt if isinstance(self.budget, float) else view.place.seen
        rows = zip(tokens_each(self.budget, lengths, lengths), lengths.tolist(), window, strict=True)
        return [pyramid(mean, w, length, view.place.layers, self.beta) for mean, length, w in rows]


def pyramid(mean: float, window: int, length: int, layers: int, beta: float) -> tuple[float, ...]:
    """Tokens of each layer, `mean` of them on average, `window` of those in every layer; the weights of a budget."""
    rest = mean - window
    if rest <= 0 or length < 2 * rest or length <= mean:
        return (1.0,) * layers
    first = min((2 - 1 / beta) * rest, float(length - window))
    return tuple(float(window + share) for share in line(first, 2 * rest - first, layers))
