"""MiKV: what an eviction policy would drop is kept in a few bits, the rest as it is (arXiv:2402.18096)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import BALANCER, Balanced
from kvfold.methods.base import Compound, Method, method
from kvfold.methods.events import EVENTS
from kvfold.methods.registry import parse
from kvfold.methods.scored import Scored
from kvfold.options import check_choice, check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Keep, Store

LEAST, MOST = 2.0**-8, 2.0**8
"""What a channel may be balanced by."""


@method(
    "mikv", title="MiKV: mixed precision by importance", paper="2402.18096", kind="quantize",
    formula=r"""
        I_h = \mathrm{policy}_{\lfloor \rho n \rfloor}(s_h), \quad
            \hat k_t = \mathrm{Q}_b(k_t \odot w) \oslash w, \; \hat v_t = \mathrm{Q}_b(v_t) \;\; (t \notin I_h)
        w_c = \sqrt{\max_i |q_{i,c}| \, / \, \max_t |k_{t,c}|}
    """,
    options={
        "ratio": "share of the tokens of a KV head that stay as they are (rho)",
        "bits": "of a number of the others: 2, 3, 4 or 8 (b)",
        "policy": "the method that ranks the tokens, as text; its budget is not asked",
        "balance": "whether keys are balanced channel by channel (w)",
    },
)  # fmt: skip
@dataclass(frozen=True)
class MiKV(Compound):
    """Keeps every token: those that `policy` would keep in full precision, all others once and for all in a few bits.

    At the end of a prompt and, where the policy decides at steps too, after every generated token: the lowest ranked go
    to codes with a scale and a zero for each half of a head, and never come back. The policy sees the tokens in full
    precision alone, with the attention that all tokens share.
    The balancer is that of a row's first prompt (its first chunk, if it is read in chunks), one for each channel of a
    KV head, from queries and keys after RoPE; it is held within 1/256 and 256, and is 1 where one of both is zero.
    A prompt is attended in full precision before it is stored. Behind it a format says how important tokens are held:
    "mikv | fp8"; such a token is rounded twice when it goes.
    (Reconstructed, for the paper leaves it open and there is no code: the share is one of all tokens, so that it grows
    with the text; query heads of a group add up their scores, and the balancer takes the largest of them; the policy is
    H2O with half of its share for the newest tokens.)
    """

    ratio: float = 0.2
    bits: int = 2
    policy: str = "h2o"
    balance: bool = True

    stores = True

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0.0, 1.0)
        check_choice("balance", self.balance, (False, True))
        self.low, self.inner  # noqa: B018  (raise for options that can't be)

    @cached_property
    def low(self) -> Balanced:
        """What the others are held in."""
        return Balanced(self.bits)

    @cached_property
    def inner(self) -> Scored:
        """The policy. Raises ValueError for one that does more than rank tokens."""
        made = parse(self.policy)
        if not isinstance(made, Scored):
            raise ValueError(f"policy={self.policy!r} must be a method that ranks tokens, such as 'h2o' or 'tova'")
        own = [name for name, event in EVENTS.items() if made.listens(name) and not event.wrapped]
        if strange := [name for name in own if name not in ("after_prefill", "after_decode")]:
            raise ValueError(f"policy={self.policy!r} decides in {', '.join(strange)}, which would be lost")
        return made

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.inner,)

    @property
    def own_steps(self) -> bool:
        return self.inner.lone

    def listens(self, event: str) -> bool:
        return self.inner.listens(event) if event == "after_decode" else super().listens(event)

    def after_prefill(self, view: LayerView) -> Sequence[Decision]:
        return self._demoted(view, {BALANCER: balancer(view)} if self.balance else {})

    def after_decode(self, view: LayerView) -> Sequence[Decision]:
        return self._demoted(view, {})

    def _demoted(self, view: LayerView, told: dict[str, Tensor]) -> Sequence[Decision]:
        scores, whole = self.inner.scores(view), self.whole(view)
        noted = Keep(view.valid, self.inner.carried(view, scores))
        counts = (view.total.double() * self.ratio + 1e-9).floor().long()
        kept = keep_top(whole, scores, counts, self.inner.always(whole, counts)).mask
        goes = whole.valid & ~kept
        return (noted, Store(self.low, goes, told)) if bool(goes.any()) else (noted,)

    def whole(self, view: LayerView) -> LayerView:
        """The tokens in full precision."""
        coded = torch.zeros_like(view.valid)
        for number, form in enumerate(view.held):
            if form == self.low:
                coded |= view.home == number
        return view.apply(Keep(view.valid & ~coded))


def balancer(view: LayerView) -> Float[Tensor, "B H D"]:
    """What shares a channel's largest numbers evenly between queries and keys."""
    (b, hq, n, d), h = view.queries.states.shape, view.heads
    asked = view.queries.states.float().abs().masked_fill(~view.queries.valid[:, None, :, None], 0.0)
    asked = asked.reshape(b, h, hq // h * n, d).amax(2)
    held = _largest(view.keys, view.valid)
    share = (asked / held).sqrt().clamp(LEAST, MOST)
    return share.masked_fill((asked == 0) | (held == 0) | ~share.isfinite(), 1.0)


def _largest(keys: Float[Tensor, "B H T D"], valid: Bool[Tensor, "B H T"]) -> Float[Tensor, "B H D"]:
    return keys.float().abs().masked_fill(~valid[..., None], 0.0).amax(2)
