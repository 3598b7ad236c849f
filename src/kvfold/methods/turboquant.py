"""TurboQuant: vectors turned at random, then the nearest of a few levels, number by number (arXiv:2504.19874)."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.formats import Format, Rotated
from kvfold.methods.base import Method, method


@method(
    "turboquant", title="TurboQuant: rotated keys and values in 4 to 2 bits, token by token", paper="2504.19874",
    kind="quantize",
    formula=r"""
        \hat x = \lVert x \rVert \, \Pi^\top c[i], \quad
            i_j = \arg\min_k \, \bigl| c_k - (\Pi x)_j / \lVert x \rVert \bigr|
        q \cdot \hat k = \lVert k \rVert \, (\Pi q) \cdot c[i]
    """,
    options={
        "bits": "of a number: 2, 3 or 4",
        "value_bits": "of a number of a value, if not as many as of a key's: 2, 3 or 4",
        "scale": '"norm", the vector\'s length (the paper); "unit", what gives the coded vector that length; '
        '"aligned", what makes its product with the vector itself exact',
        "seed": "of the rotations",
    },
)  # fmt: skip
@dataclass(frozen=True)
class TurboQuant(Method):
    """Keeps every token: each key and value as levels of a random rotation of it, and one scale.

    Every token stands for itself, so that it goes with any method that drops or merges tokens, as in
    "h2o(budget=0.25) | turboquant".
    A prompt is attended in full precision before it is stored; later tokens read the codes as they lie.
    The rotation is Haar's (QR), one for each layer, and the levels are Lloyd's and Max's for the normal distribution,
    which the paper's density is close to from some 64 numbers on.
    Differs from the paper: keys are coded for the least error too, without its one-bit sketch of what is left (ports
    found that to harm attention: its variance passes through the softmax); `scale="aligned"` takes away the bias that
    the sketch is for. There is no split of outlier channels. No mean is taken off the keys: one that is fixed by the
    first tokens that come would depend on how a prompt is cut. Models with large biases of keys (Qwen2.5) need one,
    and lose much here.
    """

    bits: int = 4
    value_bits: int | None = None
    scale: str = "norm"
    seed: int = 42

    def __post_init__(self) -> None:
        self.format  # noqa: B018  (raises for options that can't be)

    @cached_property
    def format(self) -> Format:  # type: ignore[override]
        """Codes and a scale, token by token."""
        values = self.bits if self.value_bits is None else self.value_bits
        return Rotated(self.bits, values, self.scale, self.seed)
