"""Which units of its tokens a query reads: the best by an index, and some whatever that says."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.formats import ByBounds, ByKeys, Chosen, Index, Picked, Remembered, Spec, register
from kvfold.formats.picked import NEVER
from kvfold.ops import choose_units, top_lists, vote_units
from kvfold.options import check_choice, check_int
from kvfold.selectors.always import Always, Exempt
from kvfold.selectors.bounds import BoundsOf
from kvfold.selectors.keys import STEPS, KeysOf
from kvfold.selectors.lasting import Lasting
from kvfold.selectors.odd import Odd
from kvfold.selectors.reuse import Reuse
from kvfold.selectors.votes import Vote


@dataclass(frozen=True)
class Selection:
    """`budget` tokens of each KV head (a fraction: of the row's text so far) in whole units, never fewer than `least`.

    What is `always` read counts in the budget; of the other units those are read that `index` says are worth most to
    the query, by the `vote` of its heads. With `reuse` what is worth most stays what it was until that rule says
    otherwise; what is always read is found anew at each step. `slots`: what is read attends at positions 0, 1, 2, ...
    in its order, as if nothing lay between, the query at the last of them; where all is read positions are the text's.
    `far`: what is further than so many tokens behind a query stands all at the distance of the last of them, far - 1,
    and what is nearer at its own. `odd`: units that the index can't speak for (`Unlike`), which are read, too.
    `lasting`: the query has a share of the choice, the rest goes by what units are worth whoever asks (`Lasts`).
    """

    index: Index
    budget: Budget
    vote: Vote = field(default_factory=Vote)
    always: Exempt = field(default_factory=Always)
    least: int = 1
    reuse: Reuse | None = None
    slots: bool = False
    odd: Odd | None = None
    far: int = 0
    lasting: Lasting | None = None
    heads = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("least", self.least, 1)
        check_choice("slots", self.slots, (True, False))
        check_int("far", self.far, 0)
        if self.slots and self.far:
            raise ValueError(f"far={self.far} says where keys stand, and slots=True does, too; at most one is possible")
        if self.odd is not None and not getattr(self.index, "unlike", False):
            raise ValueError(f"odd={self.odd} needs an index that knows which units it stands for badly: {self.index}")
        if self.lasting is not None and not getattr(self.index, "lasting", False):
            raise ValueError(f"lasting={self.lasting} needs an index that knows what lasts: {self.index}")

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.index.unit

    @property
    def reuses(self) -> bool:
        """Whether what was chosen may be read again."""
        return self.reuse is not None

    def nbytes_with(self, spec: Spec, units: int) -> int:
        """Bytes of a choice that is kept for later, once the longest row has so many units."""
        if self.reuse is None:
            return 0
        query = spec.heads * spec.group * spec.key_size if self.reuse.compares else 0
        return Picked.nbytes_with(spec.rows, spec.heads, self.vote.lists(spec.group), units, query)

    def room(self, seen: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """Units that a query reads at most in rows whose texts are so long."""
        if not isinstance(self.budget, float):
            return np.full(len(seen), max(self.budget // self.unit, self.least))
        tokens = np.floor(seen * self.budget + 1e-9).astype(np.int64)
        room: np.ndarray = np.maximum(tokens // self.unit, self.least)
        return room

    def chooses(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H"]:
        """See `Chooser.chooses`."""
        units = -(-counts // self.unit)
        some: np.ndarray = (units > self.room(seen)[:, None]) & (units >= self.index.enough)
        return some & (not is_all(self.budget))

    def choose(
        self, remembered: Remembered, q: Float[Tensor, "B H G D"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], last: Picked | None = None,
    ) -> tuple[Chosen | None, Picked | None]:  # fmt: skip
        """See `Chooser.choose`."""
        if is_all(self.budget):
            return None, None
        units, room, asked = -(-counts // self.unit), self.room(seen), remembered.asks(q, seen)
        chooses = self.chooses(counts, seen) & ~remembered.whole()[:, None]
        if not chooses.any():
            return None, None
        short = ~chooses.any(1)
        if (self.plain or self.soft) and (chooses | (units <= room[:, None])).all():
            if self.plain:
                return self._lists(remembered.scores(asked, units), units, room), None
            if not self.vote.layer or _alike(units):
                return self._voted(remembered.scores(asked, units), units, room, asked.shape[-1]), None
        number, always = int(units.max()), self.always.units(self.unit, units, room)
        there = np.arange(number) < units[..., None]
        if self.odd is not None:
            always = always | self.odd.among(remembered, there & ~always, room, room[:, None] - always.sum(-1))
        asks, query = self._stale(asked, seen, last)
        asks &= ~short  # a row that reads all chooses nothing
        picked = np.zeros((0,), dtype=bool) if last is None else last.wide(number)
        if asks.any():
            fresh = self._best(remembered, asked, units, there & ~always, room, room[:, None] - always.sum(-1))
            picked = fresh if last is None else np.where(asks[:, None, None, None], fresh, picked)
        read = picked | (always | (there & ~chooses[..., None]))[:, :, None]
        if self.reuse is None:
            return Chosen.of(read), None
        made = np.where(asks, seen, NEVER if last is None else last.made)
        if last is not None and self.reuse.compares:
            stale = torch.from_numpy(asks).to(query.device)[:, None]
            query = torch.where(stale, query, last.query)
        return Chosen.of(read), Picked(picked, query, np.where(short, NEVER, made))

    def by_bounds(
        self, remembered: Remembered, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]
    ) -> ByBounds | None:
        """See `Compiled.by_bounds`."""
        if not self.plain or self.slots or self.far or is_all(self.budget):
            return None
        if not (isinstance(remembered, BoundsOf) and remembered.unit == self.unit):  # some are of parts of units
            return None
        room = self.room(seen)
        if (counts <= room[:, None] * self.unit).all():
            return None
        remembered.reach(-(-int(counts.max()) // self.unit))
        assert isinstance(self.always, Always)  # `plain`
        return ByBounds(remembered.held, room, self.vote.heads, *self.always.most(self.unit))

    def by_keys(
        self, remembered: Remembered, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]
    ) -> ByKeys | None:
        """See `Compiled.by_keys`."""
        if not self.soft or self.far or is_all(self.budget) or not isinstance(remembered, KeysOf):
            return None
        room = self.room(seen)
        if (counts <= room[:, None]).all() or (self.vote.layer and not _alike(counts)):
            return None
        assert isinstance(self.always, Always)  # `soft`
        remembered.reach(int(counts.max()))
        first, before = self.always.spans(1, room)
        held, rope, vote = remembered.held, remembered.spec.rope, self.vote
        assert rope is not None  # as `Keys.open` asks
        scale, distance = vote.scale(held.shape[-1]), remembered.recipe.distance
        chooses: np.ndarray = np.logical_or.reduce(counts > room[:, None], axis=1)
        return ByKeys(
            held, room, first, before, chooses, vote.heads, vote.layer, scale, STEPS, distance, rope, self.slots
        )

    @cached_property
    def plain(self) -> bool:
        """Whether lists of the best are all that there is to it: nothing is shared out, voted on or used again."""
        simple = isinstance(self.always, Always) and self.always.share == 1.0
        return self.reuse is None and self.odd is None and self.lasting is None and self.vote.plain and simple

    @cached_property
    def soft(self) -> bool:
        """Whether softmaxes are all that there is to it."""
        alone = self.reuse is None and self.odd is None and self.lasting is None
        return alone and self.vote.soft and isinstance(self.always, Always)

    def _voted(
        self, scores: Float[Tensor, "B H G N"], units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"], size: int
    ) -> Chosen:
        """`_lists` of soft votes, those of a layer's heads or of each group's."""
        assert isinstance(self.always, Always)  # `soft`
        b, h, _, n = scores.shape
        lists = 1 if self.vote.layer else h
        first, before = (each.repeat(lists) for each in self.always.spans(self.unit, room))
        found = vote_units(
            scores.reshape(b * lists, -1, n), units[:, :lists].reshape(-1), room.repeat(lists), first, before,
            heads=self.vote.heads, scale=self.vote.scale(size),
        )  # fmt: skip
        numbers, counts = (x.reshape(b, lists, 1, *x.shape[1:]).repeat(h // lists, 1) for x in found)
        return Chosen(numbers, counts, n)

    def _lists(
        self, scores: Float[Tensor, "B H G N"], units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"]
    ) -> Chosen:
        """What `_best` and what is always read come to, by a kernel that makes no mask."""
        assert isinstance(self.always, Always)  # `plain`
        sinks, recent = self.always.most(self.unit)
        best = choose_units(scores, units, room, heads=self.vote.heads, sinks=sinks, recent=recent)
        return Chosen(*best, scores.shape[-1])

    def _stale(
        self, asked: Tensor, seen: np.ndarray, last: Picked | None
    ) -> tuple[Bool[np.ndarray, " B"], Float[Tensor, "B E"]]:
        """Which rows choose anew, and what they ask as a rule of reuse compares it."""
        compares = self.reuse is not None and self.reuse.compares
        query = asked.flatten(1).float() if compares else asked.new_zeros(len(asked), 0, dtype=torch.float32)
        if self.reuse is None or last is None:
            return np.ones(len(seen), dtype=bool), query
        return (last.made == NEVER) | self.reuse.stale(last, query, seen), query

    def _best(
        self, remembered: Remembered, asked: Tensor, units: np.ndarray, about: np.ndarray, room: Int[np.ndarray, " B"],
        free: Int[np.ndarray, "B H"],
    ) -> Bool[np.ndarray, "B H S N"]:  # fmt: skip
        """Of the units that are asked `about` those that the heads say are worth most, `free[b, h]` of them.

        With `lasting` those are fewer, and of the others come those that last.
        """
        scores = remembered.scores(asked, units)
        worth = self.vote.worth(scores, torch.from_numpy(about).to(scores.device), asked.shape[-1])
        asks = free if self.lasting is None else self.lasting.asked(room, free)
        best = top_lists(worth, asks)
        if self.lasting is not None:
            best = best | self.lasting.among(remembered, about[:, :, None] & ~best, free - asks)
        return best


def _alike(units: Int[np.ndarray, "B H"]) -> bool:
    """Whether all heads of a row have as many units."""
    return bool((units == units[:, :1]).all())


register("selection", Selection)
