"""Who takes turns in the decode rounds of a benchmark: caches of this process, and peers in processes of their own."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache as HFCache
from transformers import PreTrainedModel

from kvfold.bench import contenders as c
from kvfold.bench.machine import Spread, spread
from kvfold.bench.parts import Profile, StepParts
from kvfold.hf.cache import Cache


@runtime_checkable
class Lane(Protocol):
    """One that decodes in turns."""

    @property
    def name(self) -> str:
        """As its row names it."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Right after its prompt."""
        ...

    @property
    def failed(self) -> str | None:
        """Why it takes no more turns."""
        ...

    def decode(self, steps: int) -> list[float]:
        """The seconds of as many further steps of the batch."""
        ...


class CacheLane:
    """A contender's cache, which has read its prompt, and the token (B, 1) that comes next."""

    failed: None = None

    def __init__(
        self,
        model: PreTrainedModel,
        contender: c.BenchContender,
        cache: HFCache,
        token: Tensor,
        name: str | None = None,
    ):
        self.model, self.contender, self.cache, self.token = model, contender, cache, token
        self.name, self.kv_bytes = name or contender.name, c.held_bytes(cache)
        self.kept = cache.kept_tokens if isinstance(cache, Cache) else None
        self.profile = Profile()

    def decode(self, steps: int) -> list[float]:
        self.token, taken = c.decode_steps(self.model, self.cache, self.token, steps)
        return taken

    def profiled(self, steps: int) -> None:
        """Further steps, which say where their time goes."""
        with self.profile.steps(steps):
            self.decode(steps)

    def parts(self) -> StepParts | None:
        """Where the time of a step goes; None where nothing was profiled."""
        return self.profile.parts() if self.profile.count else None


class FloorLane:
    """The same step while the cache holds next to nothing: a new one each time, which has read one token a row."""

    failed: None = None
    kv_bytes = 0

    def __init__(self, model: PreTrainedModel, library: str, make: Callable[[], HFCache], ids: Tensor):
        self.model, self.library, self.make, self.ids = model, library, make, ids[:, :1]
        self.name = f"{library}, an empty cache"

    def decode(self, steps: int) -> list[float]:
        cache = self.make()
        token, _ = c.read_prompt(self.model, cache, self.ids)
        return c.decode_steps(self.model, cache, token, steps)[1]


def floors(model: PreTrainedModel, entrants: Sequence[c.BenchContender], ids: Tensor) -> list[FloorLane]:
    """One for each library that takes part: transformers' DynamicCache, and kvfold's `full`."""
    dynamic, libraries = c.transformers_contenders(model, quantized=False)[0][0], {one.library for one in entrants}
    makers = {"transformers": dynamic.make, "kvfold": lambda: Cache(model, "full")}
    return [FloorLane(model, name, make, ids) for name, make in makers.items() if name in libraries]


class Rounds:
    """What lanes took, round by round: each takes its steps in every round, one lane after the other.

    A lane that fails takes no more turns, and the others go on.
    """

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = list(lanes)
        self.taken: dict[str, list[list[float]]] = {lane.name: [] for lane in lanes}

    def play(self, steps: int, *, keep: bool = True, tick: Callable[[str], None] = lambda _: None) -> None:
        """One round; without `keep` it warms up."""
        for lane in self.lanes:
            if lane.failed is None:
                tick(lane.name)
                taken = lane.decode(steps)
                if keep and lane.failed is None:
                    self.taken[lane.name].append(taken)

    def steps(self, lane: Lane) -> Spread:
        """Over all its steps."""
        return spread([second for taken in self.taken[lane.name] for second in taken])

    def medians(self, lane: Lane) -> list[float]:
        """Each round's."""
        return [spread(taken).median for taken in self.taken[lane.name]]

    def ratio(self, other: Lane, lane: Lane) -> Spread:
        """The other's step over this one's, round by round: what keeps the machine busy in a round slows both."""
        pairs = zip(self.medians(other), self.medians(lane), strict=True)
        return spread([theirs / ours for theirs, ours in pairs])

    def over(self, others: "Rounds", lane: Lane) -> Spread:
        """A lane's step in these rounds over its step in others, which were played in turns with these."""
        pairs = zip(self.medians(lane), others.medians(lane), strict=True)
        return spread([ours / theirs for ours, theirs in pairs])


def can_profile(model: PreTrainedModel) -> bool:
    """Whether the time of a step is spent where Python sees it: not on a device that works behind its back."""
    return torch.device(model.device).type == "cpu"
