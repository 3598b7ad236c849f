"""The registry of tasks: a task is a function from a setting to examples, under a name such as "ruler/vt"."""

import ast
import hashlib
import importlib
import inspect
import pkgutil
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from kvfold.evaluation.examples import Example

Make = Callable[..., Iterable[Example]]
F = TypeVar("F", bound=Make)

_CALL = re.compile(r"\s*([A-Za-z0-9][\w./-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """What a task makes its examples for.

    `length`: tokens of prompt and answer together, without the chat template; None: as long as published. `samples`:
    how many examples (None: as many as published). `texts`: a file or folder of running text for haystacks (None:
    the public-domain texts that ship). `data`: a file or folder with a benchmark's published files (None: its
    repository on the Hugging Face hub).
    """

    tokenizer: Any
    length: int | None = None
    samples: int | None = None
    seed: int = 0
    texts: Path | None = None
    data: Path | None = None

    def count(self, text: str) -> int:
        """Tokens of a text, special ones not counted."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def rng(self, *names: object) -> random.Random:
        """Random numbers that depend on the seed and these names alone."""
        text = "\x00".join(map(str, (self.seed, *names)))
        return random.Random(hashlib.sha256(text.encode()).digest())

    def need(self, name: str, default_samples: int) -> tuple[int, int]:
        """(length, samples) for a task that is made to a length. Raises ValueError where no length is given."""
        if self.length is None:
            raise ValueError(f"task {name} is made to a length: lengths= must name at least one, in tokens")
        return self.length, default_samples if self.samples is None else self.samples


@dataclass(frozen=True)
class TaskInfo:
    """A task of the registry. `sized`: made to any length; otherwise its texts are as long as published."""

    name: str
    title: str
    make: Make = field(repr=False)
    paper: str = ""
    sized: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


registry: dict[str, TaskInfo] = {}


def task(name: str, *, title: str, paper: str = "", sized: bool = True) -> Callable[[F], F]:
    """Register a function `(setting, **options) -> examples`. `paper` is an arXiv id."""

    def register(make: F) -> F:
        if name in registry:
            raise ValueError(f"task {name!r} is registered twice")
        parameters = list(inspect.signature(make).parameters.values())[1:]
        options = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        registry[name] = TaskInfo(name, title, make, paper, sized, options)
        return make

    return register


@cache
def _scan() -> None:
    for folder in ("kvfold.evaluation.tasks", "kvfold.evaluation.benchmarks"):
        for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
            if module.name != "base" and not module.name.startswith("_"):
                importlib.import_module(f"{folder}.{module.name}")


def list_tasks() -> list[TaskInfo]:
    """All tasks, by name."""
    _scan()
    return [registry[name] for name in sorted(registry)]


def get_task(name: str) -> TaskInfo:
    """The entry of one task. Raises ValueError that lists near names."""
    _scan()
    if name not in registry:
        near = get_close_matches(name, registry, n=3) or sorted({known.split("/")[0] for known in registry})
        raise ValueError(f"task={name!r} is unknown; near or there: {', '.join(near)} (`kvfold eval --list` has all)")
    return registry[name]


def parse_task(text: str) -> tuple[TaskInfo, dict[str, Any]]:
    """A task and its options from a text such as `"niah(keys=4, depths=(0.0, 0.5))"`.

    Raises ValueError for a text that is no such call, an unknown task, or an option that the task does not have.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ValueError(f"task={text!r} must be a name, or a name with options: name(option=value)")
    info, options = get_task(match[1]), {}
    if match[2]:
        try:
            call = ast.parse(f"_({match[2]})", mode="eval").body
            assert isinstance(call, ast.Call) and not call.args
            options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        except (SyntaxError, ValueError, AssertionError):
            raise ValueError(f"task={text!r}: options must be name=value, separated by commas") from None
    for name, value in options.items():
        if name not in info.options:
            known = ", ".join(info.options) or "none"
            raise ValueError(f"task {info.name} has no option {name}={value!r}; its options are: {known}")
    return info, options


def make_examples(text: str, setting: Setting) -> list[Example]:
    """The examples of a task. Raises ValueError where two of them have the same id, or there is none."""
    info, options = parse_task(text)
    made = list(info.make(setting, **options))
    if setting.samples is not None:
        made = made[: setting.samples]
    if not made:
        raise ValueError(f"task {text} made no example for length={setting.length}, samples={setting.samples}")
    names = [example.id for example in made]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"task {text} made examples of the same id: {twice}")
    return made
