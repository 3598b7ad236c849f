"""Many sets, one format: each becomes a task of its own."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from kvfold.evaluation.examples import Example
from kvfold.evaluation.tasks.base import Setting, task

Entry = TypeVar("Entry")
Make = Callable[..., Iterable[Example]]


def register_sets(prefix: str, sets: Mapping[str, Entry], make: Make, *, title: str, paper: str) -> None:
    """Register `make(setting, name, entry, *, options)` as task "prefix/name" for every set of a table.

    The keyword-only parameters of `make` are the options of each task. No more records are read than
    `setting.samples`. `title` holds "{}" for the name.
    """
    for name, entry in sets.items():
        task(f"{prefix}/{name}", title=title.format(name), paper=paper, sized=False)(_one(make, name, entry))


def _one(make: Make, name: str, entry: Any) -> Make:
    def examples(setting: Setting, **options: Any) -> Iterable[Example]:
        return islice(make(setting, name, entry, **options), setting.samples)

    parameters = list(inspect.signature(make).parameters.values())
    own = [parameters[0], *(each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)]
    examples.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return examples
