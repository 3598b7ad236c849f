"""KIVI: keys in a few bits by channel, values by token, the newest tokens as they are (arXiv:2402.02750)."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.formats import Format, Kivi
from kvfold.methods.base import Method, method


@method(
    "kivi", title="KIVI: keys by channel, values by token, in 8 to 2 bits", paper="2402.02750", kind="quantize",
    formula=r"""
        \hat x = z + s \cdot \mathrm{round}\big((x - z) / s\big), \quad z = \min x, \; s = (\max x - \min x) / (2^b - 1)
    """,
    options={
        "bits": "of a code: 2, 3, 4 or 8 (b)",
        "group": "tokens of a page: a key channel has one scale for so many tokens",
        "channels": "channels of a value that share a scale; must divide the value size",
        "residual": "newest tokens that stay in full precision, at least",
        "requantise": "whether a page that loses some of its tokens is written anew; else such a method is refused",
    },
)  # fmt: skip
@dataclass(frozen=True)
class KIVI(Method):
    """Keeps every token: pages of `group` tokens in `bits` bits, and behind them a residual in full precision.

    A page is written once, when `residual` newer tokens stand behind it, whether they came one by one or at once. A
    prompt is attended in full precision before it is stored; later tokens read the codes as they lie. Behind a method
    that drops tokens at the end of a prompt it says how the rest is held: "snapkv(budget=0.25) | kivi". One that drops
    stored tokens, as at every step or after a further prompt, needs `requantise=True`.
    Scales and zeros are float16, or float32 in a float32 model; in a narrow model they end at 65504.
    Differs from the paper: keys and values are flushed together, page by page, so that each token has one softmax; the
    paper flushes keys by `residual` tokens at once and values one by one, and its keys' residual runs empty. 4 bits are
    the default, which the authors advise for grouped-query models (theirs: 2).
    """

    bits: int = 4
    group: int = 32
    channels: int = 32
    residual: int = 128
    requantise: bool = False

    def __post_init__(self) -> None:
        self.format  # noqa: B018  (raises for options that can't be)

    @cached_property
    def format(self) -> Format:  # type: ignore[override]
        """Pages of codes, and the residual."""
        return Kivi(self.bits, self.group, self.channels, self.residual, self.requantise)
