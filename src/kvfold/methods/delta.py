"""DELTA: a few layers attend to everything and choose, at every token, what the layers behind them read."""

from bisect import bisect_right
from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.formats import Reader
from kvfold.methods.base import Method, method
from kvfold.options import check_int, shown
from kvfold.selectors import Always, Gives, Selection, Takes, Unremembered
from kvfold.views import Site

SHARE = 0.5
"""Of the pages beside the newest one those that may be recent ones: some are always chosen."""


@method(
    "delta", title="DELTA", paper="2510.09883", kind="select",
    formula=r"""
        s_t = \max_h \operatorname{softmax}_t(q_h \cdot k_t / \sqrt{D}), \quad S_p = \sum_{t \in p} s_t
        I = \operatorname{top}_{K - L}(S) \cup \text{last } L \text{ pages}
    """,
    options={
        "budget": "what a token of a sparse layer reads: a fraction of the text so far, or a number of tokens",
        "layers": "the model's layers that read everything (F); the last of neighbours chooses. None: spread evenly",
        "page": "tokens of a page (P)",
        "recent": "last tokens that are always read, in whole pages (L), fewer where the budget is small",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Delta(Method):
    """Sparse layers read the pages to which the last full layer before them pays most attention, at the same token.

    A layer of `layers` attends to everything. If the next one is none of them it is a delta layer: by its own
    attention, the maximum over all query heads and then the sum over a page, it chooses what all layers until the next
    of `layers` read; ties go to the earlier page. Rows that have no more pages than the budget read all. Layers that
    are not on pages (sliding windows) count in neither kind; those before the first of `layers` read everything.
    Nothing is dropped and nothing remembered. Refused behind or before a stage that drops tokens, since then heads
    and layers hold other ones.
    Differs from the paper: its lists of layers are of some models and found by a calibration that is not public
    (reconstructed: peaks of the change of attention between neighbours); with None `layers` are the first two or, where
    there are few, less of them, and up to three more, evenly spread (ours). The recent tokens, 8 pages of 64 in the
    paper's runs, are at most half of a small budget. A row chooses when it has more pages than its own budget.
    """

    budget: Budget = 0.1
    layers: tuple[int, ...] | None = None
    page: int = 16
    recent: int = 128
    together = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("page", self.page, 1)
        check_int("recent", self.recent, 1)
        given: object = self.layers
        if given is None:
            return
        layers = given if isinstance(given, tuple) else ()
        if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
            raise ValueError(f"layers={shown(given)} must be None, or a tuple of the model's layers, counted from 0")
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"layers={shown(given)} must ascend, each layer once")

    def selection(self, site: Site) -> Reader | None:
        roles = self.roles(site.paged, site.depth)
        source = roles[site.ordinal]
        if source is None:
            return None
        # The newest page is read in any case, so L pages are so many before it and the newest.
        always = Always(recent=max(0, self.recent - self.page), share=SHARE)
        gives = Gives(source, Selection(Unremembered(self.page), self.budget, always=always))
        return gives if source == site.layer else Takes(gives)

    def roles(self, paged: tuple[int, ...], depth: int) -> tuple[int | None, ...]:
        """Of each layer on pages the one whose choice it reads; its own number: it chooses; None: it is plain.

        Raises ValueError where `layers` are none of the model's, or none of those on pages.
        """
        if self.layers is not None and self.layers[-1] >= depth:
            raise ValueError(f"layers={self.layers} must be of the {depth} layers of the model")
        found = spread(len(paged)) if self.layers is None else tuple(paged.index(x) for x in self.layers if x in paged)
        if not found:
            raise ValueError(f"layers={self.layers} has none of those that attend to the whole text: {paged}")
        roles: list[int | None] = []
        for i in range(len(paged)):
            last = bisect_right(found, i) - 1  # of those that read everything the latest, up to here
            chooses = last >= 0 and found[last] + 1 < len(paged) and found[last] + 1 not in found
            roles.append(paged[found[last]] if chooses else None)
        return tuple(roles)


def spread(layers: int) -> tuple[int, ...]:
    """Which of so many layers read everything where nobody says: an eighth of them, up to two, and then one in four.

    Of those up to three, evenly from there on; each is followed by a sparse layer where there is any.
    """
    plain, deltas = min(2, layers // 8), max(1, min(3, layers // 4))
    step = (layers - plain) / deltas
    return (*range(plain), *(plain + int(i * step) for i in range(deltas)))
