"""The results of one or several folders that a sweep wrote."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.evaluation.records import DEFINITION, EXAMPLES, RESULTS, read_lines, read_sweep
from kvfold.evaluation.report.measures import measures_of
from kvfold.evaluation.report.records import Fields, ResultRecord, Text, record_of, text_of

FILES = (DEFINITION, RESULTS, EXAMPLES)


@dataclass(frozen=True)
class Results:
    """Records and the texts that they are about; `sweeps` is what each folder says of itself, by folder name."""

    records: tuple[ResultRecord, ...]
    texts: Mapping[tuple[str, str, int | None, str], Text]
    sweeps: Mapping[str, Any]

    def text(self, record: ResultRecord) -> Text:
        """What was asked."""
        return self.texts[record.text_key]


def _lines(path: Path) -> Iterator[Fields]:
    """The objects of a file of JSON lines, each with its place."""
    for number, data in enumerate(read_lines(path), 1):
        yield Fields(f"{path}, line {number}", data)


def _check_scores(fields: Fields, metric: str, scores: Mapping[str, float]) -> None:
    """Raise ValueError for scores of which a metric can't be made."""
    for measure in measures_of("", metric, ""):
        try:
            measure.total([scores])
        except (ValueError, KeyError, ArithmeticError) as error:
            raise ValueError(
                f"{fields.place}: scores={dict(scores)!r:.80} make no {metric} ({type(error).__name__}: {error})"
            ) from None


def read_results(folders: Sequence[Path]) -> Results:
    """Read result folders together.

    Within a folder the last record of a key counts (a retry). Raises ValueError for a folder without its files, a
    broken line that is not the last, a record about no known example, and a key that two folders have.
    """
    records: dict[tuple[object, ...], ResultRecord] = {}
    texts: dict[tuple[str, str, int | None, str], Text] = {}
    sweeps: dict[str, Any] = {}
    home: dict[tuple[object, ...], Path] = {}
    for folder in folders:
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"folder={str(folder)!r} must hold {', '.join(FILES)}; {name} is not there")
        sweeps[str(folder)] = read_sweep(folder / DEFINITION, constant=str)
        for fields in _lines(folder / EXAMPLES):
            text = text_of(fields)
            key = (text.model, text.task, text.length, text.example)
            if texts.setdefault(key, text) != text:
                raise ValueError(f"{fields.place}: example={text.example!r} of {text.task} has another text elsewhere")
        for fields in _lines(folder / RESULTS):
            record = record_of(fields)
            if record.text_key not in texts:
                raise ValueError(f"{fields.place}: example={record.example!r} of {record.task} must be in {EXAMPLES}")
            asked = texts[record.text_key].queries
            if record.error is None and len(record.answers) != len(asked):
                raise ValueError(f"{fields.place}: queries has {len(record.answers)} items and must have {len(asked)}")
            for answer, query in zip(record.answers, asked, strict=False):
                _check_scores(fields, query.metric, answer.scores)
            if home.setdefault(record.key, folder) != folder:
                raise ValueError(
                    f"{fields.place}: {record.method} at budget={record.budget} on example={record.example!r} of "
                    f"{record.task} is in {str(home[record.key])!r} too; report the folders apart"
                )
            records[record.key] = record
    if not records:
        raise ValueError(f"folders={[str(folder) for folder in folders]} hold no result")
    return Results(tuple(records.values()), texts, sweeps)
