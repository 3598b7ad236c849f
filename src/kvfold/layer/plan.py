"""One forward pass: what its rows read, where that stands in the text, and who decides about which rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.formats.index import Handed
from kvfold.methods.base import Method
from kvfold.views import Images, Queries
from kvfold.views.decisions import Propagate

DEFERRED = ("after_prefill", "after_decode", "after_interval", "after_layer", "after_forward")
"""Events that wait while assisted decoding may still take tokens back."""


@dataclass(frozen=True)
class Narrow:
    """From layer `after` on, a pass goes on with some of its tokens only (`Propagate`)."""

    after: int
    """The last layer of the model that sees all of them."""
    columns: Int[Tensor, "B N"]
    """Which of the pass's columns go on, ascending in each row; what stands where `valid` is not does not matter."""
    valid: Bool[Tensor, "B N"]
    positions: Int[Tensor, "B N"]
    """Where they stand in the text."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a batch about which one method decides; `rows` None: all of them."""

    method: Method
    rows: np.ndarray | None = None
    names: frozenset[str] = frozenset()
    """Columns that its method has set: the others on its pages are other groups'."""


@dataclass(frozen=True, eq=False)
class Part:
    """A group's rows in one pass, and the event that comes for them when a layer has attended."""

    group: int
    """Its place among the groups."""
    method: Method
    rows: np.ndarray | None
    event: str


@dataclass
class Plan:
    """One forward pass. What stands behind `number` is known when the first layer attends (`Rows.begin`)."""

    prefill: bool
    """Whether it reads a prompt (some row does, where `prompts` says which)."""
    prompts: Bool[np.ndarray, " B"] | None = None
    """Which rows read a part of a prompt, where they differ; the others read generated tokens."""
    listen: bool = True
    """Whether the method's events run (not during a tentative pass)."""
    defer: bool = False
    """Whether they wait (assisted decoding: a crop is still to come)."""
    turn: bool = False
    """Whether what looks like a draft is a further prompt, if no crop comes."""
    block: bool = False
    """Whether the new tokens see each other all, later ones too; else causally."""
    token_ids: Int[Tensor, "B Q"] | None = None
    images: Images | None = None
    mask: Tensor | None = None
    """The padding mask (B, W) over all columns read so far; None: no padding."""
    observe: Any = None
    """Called with each layer's view, before any decision."""
    greedy: Int[Tensor, "B K"] | None = None
    """What the model would say after each of the pass's last K columns; set when a prompt's pass is over."""
    narrow: Narrow | None = None
    steps: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    """What the layers share for the length of the pass, by group (and event, where a group's rows differ in that)."""
    handed: Handed = field(default_factory=dict)
    """What layers have chosen that later ones of the pass read, too."""
    waiting: dict[int, Queries] = field(default_factory=dict)
    """Queries of the layers (by ordinal) whose events wait for a crop."""

    labels: Mapping[str, Tensor] | None = None
    """Columns (B, Q) that methods give the new tokens, once the first layer that stores them has asked."""

    number: int = 0
    """The how-manieth pass of its rows it is, from 1; 0: no layer has attended yet."""
    before: np.ndarray | int = 0
    """Tokens that each row (B,) had read before it."""
    ones: bool = True
    """Whether no new token is padding."""
    valid: Bool[Tensor, "B N"] | None = None
    """Which of the new tokens are not padding; those that a crop takes back are still there."""
    positions: Int[Tensor, "B N"] | None = None
    """Where in the text each of them stands."""
    step: bool = False
    """Whether each row reads one generated token, nothing is moved, read selectively, observed or put off."""
    parts: tuple[Part, ...] = ()
    """Whose events come when a layer has attended."""
    asks: frozenset[str] = frozenset()
    """What the attention kernels should leave for them."""
    own: bool = False
    """Whether a step's events need no tokens but those in the format that new ones go to (`Method.own_steps`)."""
    late: bool = False
    """Whether events come when layers are stored (`after_layer`, `after_forward`)."""
    framed: bool = False
    """Whether some row's queries and keys attend in a frame of their own (`Method.own_frame`)."""
    recalls: int = 0
    """How many generated tokens' queries each row remembers, for methods that act at intervals."""
    generated: int | None = None
    """How many each row has read since its last prompt, where one method acts at intervals; None: rows differ."""

    def shared(self, group: int) -> dict[str, Any]:
        """The context that the layers of the pass share, of one group's method."""
        return self.steps.setdefault((group, ""), {})

    def copied(self) -> "Plan":
        """The same pass of a copy of the cache: what is decided there is not known here."""
        steps = {part: dict(context) for part, context in self.steps.items()}
        return replace(self, steps=steps, handed=dict(self.handed), waiting=dict(self.waiting))

    def cropped(self, columns: int) -> "Plan":
        """The same pass without its last columns."""
        if not columns:
            return self
        taken = (self.token_ids, self.mask, self.greedy)
        ids, mask, greedy = (None if x is None else x[:, : x.shape[1] - columns] for x in taken)
        return replace(self, token_ids=ids, mask=mask, greedy=greedy)


def narrowed(wanted: Propagate, queries: Queries, layer: int) -> Narrow:
    """What `Propagate` at model layer `layer` says about a pass with these queries."""
    mask = wanted.mask & queries.valid
    mask |= queries.valid & (queries.valid.flip(1).cumsum(1).flip(1) == 1)  # each row's last
    number = max(1, int(mask.sum(1).max()))
    columns = torch.argsort(mask.byte(), dim=1, stable=True)[:, -number:]  # shorter rows are padded on the left
    return Narrow(layer, columns, mask.gather(1, columns), queries.positions.gather(1, columns))
