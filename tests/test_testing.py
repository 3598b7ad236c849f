"""`kvfold.testing` finds methods that break their promises, each by the contract that is named for it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import kvfold
from kvfold import testing

pytestmark = pytest.mark.usefixtures("scratch_methods")


def first(view: kvfold.LayerView, count: Any) -> torch.Tensor:
    return view.valid & (view.rank < count[..., None])


@pytest.fixture
def good(scratch_methods):
    """StreamingLLM without sinks, at prompts alone."""

    @kvfold.method("windowed", title="Windowed", kind="pattern")
    @dataclass(frozen=True)
    class Windowed(kvfold.Method):
        budget: float | int = 0.5

        def after_prefill(self, view):
            return kvfold.Keep(view.valid & (view.rank >= view.count[..., None] - view.budget(self.budget)[..., None]))

    return Windowed


def registered(base, slug: str, decide: Any, **options: Any):
    """A method whose `after_prefill` is `decide`."""
    made = type(slug, (base,), {"after_prefill": decide, "__annotations__": dict.fromkeys(options, Any), **options})
    return kvfold.method(slug, title=slug, kind="pattern")(dataclass(frozen=True)(made))()


@pytest.mark.parametrize("contract", testing.CONTRACTS, ids=lambda contract: contract.__name__)
def test_a_method_that_keeps_its_promises(contract, good):
    contract(good())
    contract("windowed(budget=0.3)")
    contract("full")


def broken(good) -> dict[str, tuple[kvfold.Method, set[str]]]:
    """Methods, and the contracts that they break."""

    def newest_dropped(self, view):
        return kvfold.Keep(first(view, view.budget(self.budget)))

    def over_budget(self, view):
        return kvfold.Keep(view.valid & (view.rank >= view.count[..., None] - view.budget(self.budget)[..., None] - 1))

    def never_whole(self, view):
        return kvfold.Keep(view.valid & (view.rank > 0))

    def padding_counted(self, view):
        slots = torch.arange(view.valid.shape[-1])
        return kvfold.Keep(view.valid & (slots >= view.valid.shape[-1] // 2))

    def remembers(self, view):
        self.seen.append(view)
        return kvfold.Keep(view.valid & (view.rank >= min(len(self.seen) // 9, 5)))

    return {
        "newest": (registered(good, "newest", newest_dropped), {"the_newest_token_stays"}),
        "over": (registered(good, "over", over_budget), {"the_budget_holds"}),
        "never": (registered(good, "never", never_whole), {"a_whole_budget_is_the_full_cache"}),
        "padded": (registered(good, "padded", padding_counted), {"a_batch_is_its_rows"}),
        "state": (registered(good, "state", remembers, seen=field(default_factory=list)),
                  {"nothing_lives_outside_the_cache"}),
    }  # fmt: skip


@pytest.mark.parametrize("which", ["newest", "over", "never", "padded", "state"])
def test_a_method_that_does_not(which, good):
    method, names = broken(good)[which]
    for contract in testing.CONTRACTS:
        if contract.__name__ in names:
            with pytest.raises(AssertionError):
                contract(method)
