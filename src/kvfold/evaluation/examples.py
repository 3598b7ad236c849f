"""What is asked: an example is one context and the questions about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CUTS = ("middle", "end")


@dataclass(frozen=True)
class Query:
    """One question: what stands behind the context, what a right answer is, and how it is scored.

    The prompt is context, `text`, then (behind the assistant's header, where a chat template is used) `prefix`, which
    begins the answer. With `target` nothing is generated: its tokens are forced, and the logits are compared with
    those of the full cache. An answer ends before the first of the texts in `stop`. `info` holds what a metric or a
    report needs besides: class names, depth, kind.
    """

    text: str
    answers: tuple[str, ...] = ()
    metric: str = "contains_all"
    prefix: str = ""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    target: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        answers: object = self.answers
        if not isinstance(answers, tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"answers={answers!r} must be a tuple of strings")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")


def check_texts(example: "Example") -> None:
    """Raise ValueError for a text with a lone surrogate in it, which JSON can hold and no tokenizer can read."""
    texts = [("context", example.context)]
    for i, query in enumerate(example.queries):
        parts = (("text", query.text), ("prefix", query.prefix), ("target", query.target or ""))
        texts += [(f"queries[{i}].{name}", text) for name, text in parts]
        texts += [(f"queries[{i}].answers", text) for text in query.answers]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"example {example.id!r}: {name} has {text[error.start]!r} at character {error.start}, which is half "
                "a character (a lone surrogate)"
            ) from None


@dataclass(frozen=True)
class Example:
    """One context and its questions. `id` is unique within its task and length.

    `chat`: whether the prompt goes into the model's chat template, where it has one. `cut`: where a prompt that is
    too long loses tokens, in its middle (LongBench) or at the context's end (ZeroSCROLLS). `info` goes into reports.
    """

    id: str
    context: str
    queries: tuple[Query, ...]
    chat: bool = True
    cut: str = "middle"
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.queries:
            raise ValueError(f"example {self.id!r} has no query")
        if self.cut not in CUTS:
            raise ValueError(f"cut={self.cut!r} must be one of {', '.join(map(repr, CUTS))}")
        if any(query.target is not None for query in self.queries) and len(self.queries) > 1:
            raise ValueError(f"example {self.id!r} forces a target, so it can have no other query")
