"""Budgets that hold while a text is generated: tokens gather, and at intervals others are cut to make room."""

from dataclasses import replace

from kvfold.budgets import Budget, is_all
from kvfold.methods.base import Method
from kvfold.options import check_int

LONGEST = 64
"""The longest interval that is chosen unasked."""


def interval_of(budget: Budget) -> int:
    """The interval of a budget: a sixteenth of it if it is a number of tokens, `LONGEST` at most."""
    return max(1, min(LONGEST, budget // 16)) if isinstance(budget, int) else LONGEST


def left_for(budget: Budget, interval: int) -> Budget:
    """What a cut may leave of a budget. In tokens: so few that the tokens until the next cut still fit.

    A fraction is one of all tokens that were read; those since the last cut come on top.
    """
    return max(1, budget - max(0, interval - 1)) if isinstance(budget, int) else budget


def check_interval(name: str, interval: object, budget: Budget) -> None:
    """Raise ValueError unless `interval` is None, or an int from 0 on that leaves half of a budget in tokens."""
    if interval is None:
        return
    check_int(name, interval, 0)
    assert isinstance(interval, int)
    if isinstance(budget, int) and interval > 1 and interval > (budget + 1) // 2:
        raise ValueError(
            f"{name}={interval!r} must be at most half of budget={budget!r}: the tokens of an interval count, too"
        )


class AtIntervals(Method):
    """A method with a `budget` that acts on what is generated every `interval` tokens; None: as `usual` has it."""

    budget: Budget
    interval: int | None

    @property
    def usual(self) -> int:
        """The interval that is taken unasked."""
        return interval_of(self.budget)

    @property
    def period(self) -> int:  # type: ignore[override]
        """`interval` as a number; 0 where nothing ever goes."""
        if is_all(self.budget):
            return 0
        return self.usual if self.interval is None else self.interval

    @property
    def room(self) -> Budget:
        """What a cut leaves."""
        return left_for(self.budget, self.period)

    def of_prompts(self) -> Method:
        """Only prompts are cut, unless an interval was asked for."""
        return replace(self, interval=0) if self.interval is None else self  # type: ignore[type-var]

    def listens(self, event: str) -> bool:
        return self.period > 0 if event == "after_interval" else super().listens(event)
