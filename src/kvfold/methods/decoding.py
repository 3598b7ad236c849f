"""Decoding: any method that compresses prompts, at work on what is generated, too (kvpress's DecodingPress)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.methods._intervals import AtIntervals, check_interval
from kvfold.methods.base import Decisions, Method, Pipeline, method
from kvfold.methods.scored import Over
from kvfold.views import LayerView


@method(
    "decoding", title="Decoding: a limit while generating", kind="budget",
    formula=r"""
        t - t_{\mathrm{cut}} = n \Rightarrow C \leftarrow \mathrm{score}\big(C, q_{t-n+1..t};\, b - n + 1\big)
    """,
    options={
        "score": "the method that compresses, which may stand first and unnamed: decoding(snapkv, interval=64)",
        "interval": "generated tokens from one cut to the next (n); None: a sixteenth of a budget of tokens, or 64",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Decoding(AtIntervals, Over[Method]):
    """Every `interval` generated tokens `score` does what it would do if those were a further turn of the prompt.

    Its queries are those of the interval, remembered until then; they count in the cache's bytes; a window that is
    longer than the interval gets so many. A budget in tokens
    holds at every step, the tokens since the last cut included: a cut leaves interval - 1 less. A fraction is one of
    all tokens that were read, and what came since the last cut is on top. All layers are cut after the same token.
    What `score` does by itself at each generated token (h2o, tova) it does not do here.
    Like the wrapper of that name in NVIDIA's kvpress, which scores by hidden states instead of queries, and cuts to a
    target in tokens that what is new since then exceeds. No paper.
    """

    budget: Budget = 0.25
    score: str = "snapkv"
    interval: int | None = None

    lost = "decides in {}, too, which does not come at intervals"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_interval("interval", self.interval, self.budget)
        if self.interval == 0:
            raise ValueError("interval=0 must be at least 1: what is generated would never be cut")
        self.inner  # noqa: B018  (raises for a score that can't be)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """What the other asks of a prompt's kernels; of a generated token nothing is asked."""
        return self.inner.asks - {"attention"}

    def choosing(self, made: Method) -> Method:
        fits = not isinstance(made, Pipeline) and "budget" in made.info.options and made.listens("after_prefill")
        if not fits or "images" in made.asks:
            raise ValueError(
                f"score={self.score!r} must be one method that cuts a prompt to a budget, such as 'snapkv'"
            )
        return made

    def loses(self, made: Method, event: str) -> bool:
        return event not in ("after_prefill", "after_decode") and super().loses(made, event)

    def listens(self, event: str) -> bool:
        return event != "after_decode" and super().listens(event)

    def of_prompts(self) -> Method:
        return self  # it is there for what is generated

    def after_interval(self, view: LayerView) -> Decisions:
        return self.inner.after_prefill(view)
