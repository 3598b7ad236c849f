"""What runs one unit of a sweep: a model, loaded once, its tasks' examples, and a batch of them asked at a time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvfold.evaluation.asking import AskedContender, Asker
from kvfold.evaluation.compare import with_budget
from kvfold.evaluation.examples import Example
from kvfold.evaluation.records import KEY, key_of
from kvfold.evaluation.sweep import Sweep
from kvfold.evaluation.tasks import Setting, make_examples, parse_task
from kvfold.hf.cache import Cache
from kvfold.models.load import load


@dataclass(frozen=True)
class Unit:
    """A batch: the `number`-th of task `entry` (an index) at a length, under a protocol, for a model."""

    model: str
    entry: int
    length: int | None
    protocol: str
    number: int


class Worker:
    """Runs units of one sweep on one device; keeps the model that it ran last."""

    def __init__(self, sweep: Sweep, device: str = "cpu"):
        self.sweep, self.device = sweep, device
        self._loaded: tuple[str, Asker] | None = None
        self._make = cache(self._examples)

    def units(self, model: str, problems: list[str] | None = None) -> list[tuple[Unit, list[str]]]:
        """All units of a model, in order, each with its examples' ids.

        A task that can't be made raises its error; given `problems`, what is wrong with it (or with the model) comes in
        there, and the others are made.
        """
        found: list[tuple[Unit, list[str]]] = []
        try:
            self._asker(model)
        except Exception as error:  # of transformers and the hub
            if problems is None:
                raise
            problems.append(f"{model}: {type(error).__name__}: {error}")
            return found
        for entry, each in enumerate(self.sweep.tasks):
            lengths = each.lengths if each.lengths is not None else self.sweep.lengths
            sized = parse_task(each.task)[0].sized
            for length in (lengths or [None]) if sized else [None]:  # type: ignore[list-item]
                try:
                    ids = [example.id for example in self._make(model, entry, length)]
                except Exception as error:  # of a benchmark's file, a hub or a model
                    if problems is None:
                        raise
                    problems.append(f"{model}: {each.task}: {type(error).__name__}: {error}")
                    continue
                for protocol in each.protocols or self.sweep.protocols:
                    for number, start in enumerate(range(0, len(ids), self.sweep.batch)):
                        unit = Unit(model, entry, length, protocol, number)
                        found.append((unit, ids[start : start + self.sweep.batch]))
        return found

    def keys(self, unit: Unit, ids: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The keys of a unit's records, [contender][example]."""
        sweep = self.sweep
        same = (unit.model, sweep.dtype, sweep.tasks[unit.entry].task, unit.length, unit.protocol)
        return [
            [dict(zip(KEY, (*same, name, method, budget), strict=True)) for name in ids]
            for method, budget in sweep.contenders()
        ]

    def run(self, unit: Unit, done: Collection[str]) -> list[dict[str, Any]]:
        """The unit's records whose keys are not `done`: always from the same batch, so that they are the same."""
        asker, batch = self._asker(unit.model), self.batch(unit)
        keys = self.keys(unit, [example.id for example in batch])
        wanted = [c for c, mine in enumerate(keys) if any(key_of(key) not in done for key in mine)]
        if not wanted:
            return []
        chosen = sorted({0, *wanted})  # `full` is the measure of the others
        contenders = [self._contender(asker.model, *self.sweep.contenders()[c]) for c in chosen]
        outcomes = asker.ask(batch, unit.protocol, contenders)
        records = [{**keys[chosen[o.contender]][o.example], **o.to_dict()} for o in outcomes]
        return [record for record in records if key_of(record) not in done]

    def batch(self, unit: Unit) -> list[Example]:
        """The unit's examples."""
        start = unit.number * self.sweep.batch
        return self._make(unit.model, unit.entry, unit.length)[start : start + self.sweep.batch]

    def example_records(self, unit: Unit) -> list[dict[str, Any]]:
        """The unit's examples as plain data, for `examples.jsonl`."""
        about = {"model": unit.model, "task": self.sweep.tasks[unit.entry].task, "length": unit.length}
        return [{**about, **example_data(example)} for example in self.batch(unit)]

    def _contender(self, model: Any, text: str, budget: float | int | None) -> AskedContender:
        method = with_budget(text, 1.0 if budget is None else budget)
        return AskedContender(text, budget, lambda: Cache(model, method, prefill_chunk=self.sweep.prefill_chunk))

    def _examples(self, model: str, entry: int, length: int | None) -> list[Example]:
        each, sweep = self.sweep.tasks[entry], self.sweep
        window = self._asker(model).prompter.window
        if length is not None and length > window:
            raise ValueError(f"lengths={length} is more than {model} reads at once: {window} tokens, see window=")
        setting = Setting(
            self._asker(model).tokenizer, length, each.samples or sweep.samples, sweep.seed,
            each.texts or sweep.texts, each.data or sweep.data,
        )  # fmt: skip
        return make_examples(each.task, setting)

    def _asker(self, name: str) -> Asker:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            model, tokenizer = load(name, dtype=self.sweep.dtype, device=self.device)
            most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            window = min(x for x in (most, self.sweep.window, 2**31) if x is not None)
            asker = Asker(model, tokenizer, window=window, chat=self.sweep.chat, compress=self.sweep.compress)
            self._loaded = (name, asker)
        return self._loaded[1]


def example_data(example: Example) -> dict[str, Any]:
    """An example as plain data."""
    queries = []
    for query in example.queries:
        found: dict[str, Any] = {
            "text": query.text, "prefix": query.prefix, "answers": list(query.answers), "metric": query.metric,
            "info": dict(query.info),
        }  # fmt: skip
        queries.append(found if query.target is None else {**found, "target": query.target})
    return {"example": example.id, "context": example.context, "info": dict(example.info), "queries": queries}
