"""A line of `results.jsonl` or `examples.jsonl` as an object, each field checked."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.evaluation.metrics import get_metric

PROTOCOLS = ("aware", "agnostic", "turns")


@dataclass(frozen=True)
class RecordedAnswer:
    """What was generated for one question, and its scores."""

    prediction: str
    scores: Mapping[str, float]
    tokens: int


@dataclass(frozen=True)
class ResultRecord:
    """One example under one method and budget: the key, then an error or what was measured.

    `kept` are shares of the prompt's positions kept, in equal bins (merged tokens may crowd one beyond 1);
    `kept_tokens` are per KV head. Sizes are bytes.
    """

    model: str
    dtype: str
    task: str
    length: int | None
    protocol: str
    example: str
    method: str
    budget: float | int | None
    error: str | None = None
    prompt_tokens: int = 0
    kept_tokens: float = 0.0
    nbytes: int = 0
    full_nbytes: int = 1
    kept: tuple[float, ...] = ()
    answers: tuple[RecordedAnswer, ...] = ()
    prefill_seconds: float | None = None
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """What makes the record the only one of its kind."""
        return (*self.text_key, self.dtype, self.protocol, self.method, self.budget)

    @property
    def text_key(self) -> tuple[str, str, int | None, str]:
        """What the text asked belongs to."""
        return self.model, self.task, self.length, self.example


def ratio_note(records: Iterable[ResultRecord]) -> str:
    """What is to be said beside ratios of bytes, or nothing.

    Sweeps before #16 measured the full cache for the others after it had answered: its own record has what it held.
    """
    good = [record for record in records if record.error is None]
    held = {record.key[:-2]: record.nbytes for record in good if record.method == "full" and record.nbytes}
    most = max((record.full_nbytes / held[key] for record in good if (key := record.key[:-2]) in held), default=1.0)
    if most <= 1:
        return ""
    return (
        f"Ratios of KV bytes are too small here, until they are measured again: the true ones are up to "
        f"{100 * (most - 1):.1f} % larger (the full cache was measured with its own answer in it)."
    )


@dataclass(frozen=True)
class Asked:
    """One question of an example, as written down by the sweep."""

    text: str
    prefix: str
    answers: tuple[str, ...]
    metric: str
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """What an example's prompt was made of."""

    model: str
    task: str
    length: int | None
    example: str
    context: str
    info: Mapping[str, Any]
    queries: tuple[Asked, ...]

    @property
    def depth(self) -> float | None:
        """How deep in the context the answer stands, 0 to 1, where the task says so."""
        for info in (self.info, *(query.info for query in self.queries)):
            depth = info.get("depth")
            if isinstance(depth, int | float) and not isinstance(depth, bool) and 0 <= depth <= 1:
                return float(depth)
        return None


class Fields:
    """The fields of one JSON object; what is missing or of another kind is refused with its place."""

    def __init__(self, place: str, data: object) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{place}: {data!r:.80} must be a JSON object")
        self.place, self.data = place, data

    def fail(self, name: str, allowed: str) -> ValueError:
        """The error for a field."""
        found = f"{name}={self.data[name]!r:.80}" if name in self.data else f"{name} is missing and"
        return ValueError(f"{self.place}: {found} must be {allowed}")

    def text(self, name: str) -> str:
        """A string."""
        value = self.data.get(name)
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def number(self, name: str, *, null: bool = False, whole: bool = False, least: int = 0) -> Any:
        """A number from `least` on, below 2**63 so that sums are finite; `null`: or null; `whole`: an integer."""
        value = self.data.get(name, "")
        if value is None and null:
            return None
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < 2**63:
            kind = "an integer" if whole else "a finite number"
            raise self.fail(name, kind + (" or null" if null else "") + f", at least {least}")
        return value

    def items(self, name: str) -> list[Any]:
        """A list."""
        value = self.data.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "a list")
        return value

    def part(self, name: str, *, optional: bool = False) -> "Fields":
        """An object within."""
        if optional and self.data.get(name) is None:
            return Fields(self.place, {})
        if not isinstance(self.data.get(name), dict):
            raise self.fail(name, "an object")
        return Fields(f"{self.place}: {name}", self.data[name])

    def parts(self, name: str) -> list["Fields"]:
        """A list of objects."""
        return [Fields(f"{self.place}: {name}[{i}]", each) for i, each in enumerate(self.items(name))]


def record_of(fields: Fields) -> ResultRecord:
    """A line of `results.jsonl`. Scores that are not finite make it a failure. Raises ValueError."""
    if (protocol := fields.text("protocol")) not in PROTOCOLS:
        raise fields.fail("protocol", f"one of {', '.join(PROTOCOLS)}")
    key = {
        "model": fields.text("model"), "dtype": fields.text("dtype"), "task": fields.text("task"),
        "length": fields.number("length", null=True, whole=True), "protocol": protocol,
        "example": fields.text("example"), "method": fields.text("method"),
        "budget": fields.number("budget", null=True),
    }  # fmt: skip
    if fields.data.get("error") is not None:
        return ResultRecord(**key, error=fields.text("error"))
    answers = []
    for query in fields.parts("queries"):
        scores = query.part("scores").data
        for name, value in scores.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise query.fail("scores", "numbers by name")
            if not -(2**63) < value < 2**63:  # NaN is neither
                return ResultRecord(**key, error=f"the score {name} is {value}")
        made = {name: float(value) for name, value in scores.items()}
        answers.append(RecordedAnswer(query.text("prediction"), made, query.number("tokens", whole=True)))
    kept = fields.items("kept")
    if not all(isinstance(share, int | float) and 0 <= share < 2**63 for share in kept):
        raise fields.fail("kept", "a list of shares, none negative")
    timing = fields.part("timing")
    return ResultRecord(
        **key, kept=tuple(map(float, kept)), answers=tuple(answers), kept_tokens=fields.number("kept_tokens"),
        prompt_tokens=fields.number("prompt_tokens", whole=True), nbytes=fields.number("nbytes", whole=True),
        full_nbytes=fields.number("full_nbytes", whole=True, least=1),
        prefill_seconds=timing.number("prefill_seconds", null=True),
        decode_seconds=timing.number("decode_seconds"), decode_tokens=timing.number("decode_tokens", whole=True),
    )  # fmt: skip


def _info(fields: Fields) -> dict[str, Any]:
    """What else is said of a text or a question; numbers that are not finite, which no page can hold, as text."""
    found: dict[str, Any] = json.loads(json.dumps(fields.part("info", optional=True).data), parse_constant=str)
    return found


def text_of(fields: Fields) -> Text:
    """A line of `examples.jsonl`. Raises ValueError."""
    queries = []
    for query in fields.parts("queries"):
        answers = query.items("answers")
        if not all(isinstance(answer, str) for answer in answers):
            raise query.fail("answers", "a list of strings")
        info = _info(query)
        try:
            get_metric(query.text("metric"))
        except ValueError as error:
            raise ValueError(f"{query.place}: {error}") from None
        queries.append(Asked(query.text("text"), query.text("prefix"), tuple(answers), query.text("metric"), info))
    return Text(
        fields.text("model"), fields.text("task"), fields.number("length", null=True, whole=True),
        fields.text("example"), fields.text("context"), _info(fields), tuple(queries),
    )  # fmt: skip
