"""What a calibration works with: the model, texts, a seed, how much of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Run:
    """`samples`: prompts, or steps of training; `length`: tokens of the longest prompt. None: the calibration's own.

    `pairs` and `rank` are EliteKV's, `codes` is A2ATS's.
    """

    model: "PreTrainedModel"
    tokenizer: Any
    texts: Sequence[tuple[str, str]]
    """(title, running text): the haystacks."""
    seed: int = 0
    samples: int | None = None
    length: int | None = None
    pairs: int | None = None
    rank: int | None = None
    codes: int | None = None
    tick: Callable[[str], None] = field(default=lambda _: None)
    about: dict[str, Any] = field(default_factory=dict)
    """What the calibration did, for the artefact's provenance."""

    @property
    def first(self) -> list[int]:
        """The tokens that every text starts with."""
        return opening(self.tokenizer)

    def sizes(self, samples: int, length: int) -> tuple[int, int]:
        """(samples, length), with defaults for what is not given; no longer than the model's context."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or length
        found = self.samples or samples, min(self.length or length, limit)
        self.about.update({"samples": found[0], "length": found[1]})
        return found


def opening(tokenizer: Any) -> list[int]:
    """The token that begins a text, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
