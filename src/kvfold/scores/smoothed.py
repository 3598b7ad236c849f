"""Votes of an observation window, smoothed along the tokens that compete."""

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.scores.choose import smooth
from kvfold.views import LayerView


def smoothed(
    view: LayerView, votes: Float[Tensor, "B H T"], window: Bool[Tensor, "B H T"], kernel: int, pool: str = "avg"
) -> Float[Tensor, "B H T"]:
    """The votes of all tokens but those of `window`, each the mean (or maximum) of the `kernel` around it.

    Empty slots are nobody's neighbours; what the window itself got counts as 0.
    """
    votes = view.pack(votes.masked_fill(window | ~view.valid, 0.0))
    return view.unpack(smooth(votes, kernel, pool)).masked_fill(window, 0.0)
