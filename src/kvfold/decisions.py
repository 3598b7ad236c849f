"""What a method may decide about one layer's tokens. Decisions may differ for each (row, KV head)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from kvfold.formats import Chunk, Format


@dataclass(frozen=True)
class Keep:
    """Keep the tokens that `mask` marks, drop the rest; `columns` are set on what stays."""

    mask: Bool[Tensor, "B H T"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrite:
    """Store `tokens` in place of what the layer holds: merged keys and values, their positions, their columns.

    The slots stay those of the view (same T): a merged token takes one of its members' slots, the others turn
    invalid. So later stages still know which slots the queries of this pass could see.
    """

    tokens: Chunk


@dataclass(frozen=True)
class Store:
    """Move the tokens that `mask` marks to a segment of another format."""

    format: Format
    mask: Bool[Tensor, "B H T"]


@dataclass(frozen=True)
class Read:
    """This step reads only the stored tokens that `mask` marks (the step's own token is always read)."""

    mask: Bool[Tensor, "B H T"]


Decision = Keep | Rewrite | Store
