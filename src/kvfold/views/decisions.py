"""What a method may decide about one layer's tokens. Decisions may differ for each (row, KV head)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Format


@dataclass(frozen=True)
class Keep:
    """Keep the tokens that `mask` marks, drop the rest; `columns` are set on what stays."""

    mask: Bool[Tensor, "B H T"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def staying(self, valid: Bool[Tensor, "B H T"]) -> Bool[Tensor, "B H T"]:
        """Those of the tokens `valid` that stay."""
        return valid & self.mask


@dataclass(frozen=True)
class Drop:
    """Drop the tokens in `slots`, -1 for none, keep the rest; `columns` are set on what stays.

    What a `Keep` without them says, for a step at which few go.
    """

    slots: Int[Tensor, "B H N"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def staying(self, valid: Bool[Tensor, "B H T"]) -> Bool[Tensor, "B H T"]:
        """Those of the tokens `valid` that stay."""
        slots, places = self.slots, torch.arange(valid.shape[-1], device=valid.device)
        for i in range(slots.shape[-1]):
            valid = valid & (places != slots[..., i : i + 1])
        return valid


@dataclass(frozen=True)
class Streams:
    """KV heads that see little of a prompt: before each token the last `recent`, its own too, and the first `sinks`.

    `heads` marks them; the others see all that stands before a token. Both are counted in text positions; of what a
    layer has stored from earlier passes all is seen.
    """

    heads: tuple[bool, ...]
    sinks: int
    recent: int


@dataclass(frozen=True)
class Rewrite:
    """Store `tokens` in place of what the layer holds: merged keys and values, their positions, their columns.

    The slots stay those of the view (same T): a merged token takes one of its members' slots, the others turn
    invalid. So later stages still know which slots the queries of this pass could see.
    """

    tokens: Chunk


@dataclass(frozen=True)
class Amend:
    """Write `keys` and `values` (None: as they are) over a few slots, -1 for none; all else stays where it lies.

    What `Rewrite` does, for a merge that touches few tokens, as at a decode step. Columns and what is dropped
    are said by a `Keep` after it. The new token itself may be named.
    """

    slots: Int[Tensor, "B H N"]
    keys: Float[Tensor, "B H N D"] | None = None
    values: Float[Tensor, "B H N Dv"] | None = None


@dataclass(frozen=True)
class Store:
    """Move the tokens that `mask` marks to a segment of another format, or into one that holds none (`Traits.holds`).

    `told`: what it must know of each (row, KV head) beside the tokens, tensors (B, H, ...) by the format's own names.
    """

    format: Format
    mask: Bool[Tensor, "B H T"]
    told: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """This step reads only the stored tokens that `mask` marks (the step's own token is always read)."""

    mask: Bool[Tensor, "B H T"]


@dataclass(frozen=True)
class Propagate:
    """From the next layer of the model on, only the new tokens that `mask` marks go forward; the others end here.

    The last column always goes on, so that the logits of the prompt's end stay right. Positions stay those of the text.
    """

    mask: Bool[Tensor, "B Q"]


@dataclass(frozen=True)
class Pair:
    """Tokens that two layers both hold, slot by slot, and do not share yet: what a `Share` chooses from."""

    lower: Chunk
    upper: Chunk
    """The same slots; only where `valid` do they hold the same tokens."""
    valid: Bool[Tensor, "B H T"]
    prompt: Bool[Tensor, "B H T"]
    """Those of them that a prompt has just brought."""
    state: Float[Tensor, "B N"] | None
    """What was given back the last time; None: nothing yet."""


@dataclass(frozen=True)
class Shared:
    """Which tokens of a pair two layers share from now on, by which directions (unit vectors); the rest stay whole."""

    mask: Bool[Tensor, "B H T"]
    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T Dv"]
    state: Float[Tensor, "B N"]
    """What is remembered of each row, and follows it."""


@dataclass(frozen=True)
class Share:
    """Let a layer and the one at place `other`, before it, share what `choose` says of the tokens that both hold.

    Made for the upper layer, after both are stored: after each prompt, and when a row has read `every` tokens more.
    Two layers whose heads, head sizes or rotary embeddings differ stay as they are.
    """

    other: int
    every: int
    choose: Callable[[Pair], Shared]


Decision = Keep | Drop | Rewrite | Amend | Store | Propagate | Share
Decisions = Decision | Sequence[Decision] | None
"""What an event may return."""


def decided(decisions: Decisions) -> Sequence[Decision]:
    """What an event returned, as a sequence."""
    if decisions is None:
        return ()
    return decisions if isinstance(decisions, Sequence) else (decisions,)
