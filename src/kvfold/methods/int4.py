"""INT4: every key and value in 4 bits, keys by channel and values by token (the layout of KIVI, arXiv:2402.02750)."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.formats import Format, Int4
from kvfold.methods.base import Method, method


@method(
    "int4", title="INT4: pages of 4-bit keys and values", paper="2402.02750", kind="quantize",
    formula=r"""
        \hat x = z + s \cdot \mathrm{round}\big((x - z) / s\big), \quad z = \min x, \; s = (\max x - \min x) / 15
    """,
    options={
        "group": "tokens of a page: a key channel has one scale for so many tokens",
        "channels": "channels of a value that share a scale",
        "tail": "newest tokens that stay in full precision, at least",
        "requantise": "whether a page that loses some of its tokens is written anew; else such a method is refused",
    },
)  # fmt: skip
@dataclass(frozen=True)
class PagedInt4(Method):
    """Keeps every token: pages of `group` tokens in 4 bits, and behind them a tail in full precision.

    A page is written once, when `tail` newer tokens stand behind it, whether they came one by one or at once. Behind a
    method that drops tokens at the end of a prompt it says how the rest is held: "snapkv(budget=0.25) | int4". One that
    drops stored tokens, as at every step or after a further prompt, needs `requantise=True`.
    Differs from KIVI: keys and values are flushed together, page by page, and both have 4 bits; the kernel is plain
    torch, in blocks.
    """

    group: int = 32
    channels: int = 32
    tail: int = 32
    requantise: bool = False

    def __post_init__(self) -> None:
        self.format  # noqa: B018  (raises for options that can't be)

    @cached_property
    def format(self) -> Format:  # type: ignore[override]
        """Pages of codes, and the tail."""
        return Int4(self.group, self.channels, self.tail, self.requantise)
