"""What a sweep measures: models x methods x budgets x tasks x lengths x protocols, from YAML, TOML or JSON."""

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvfold.evaluation.compare import takes_budget, with_budget
from kvfold.evaluation.tasks import parse_task
from kvfold.methods import list_methods

Protocol = Literal["aware", "agnostic", "turns"]
Budget = int | float
Length = Annotated[int, Field(ge=1, le=2**24)]
"""Tokens; far above any model's window, and low enough that nobody's memory ends before the window is looked at."""
Samples = Annotated[int, Field(ge=1, le=10**6)]


class TaskEntry(BaseModel):
    """A task, and where it differs from the sweep: lengths, samples, protocols, where its texts or files lie."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    lengths: list[Length] | None = None
    samples: Samples | None = None
    protocols: list[Protocol] | None = None
    texts: Path | None = None
    data: Path | None = None

    @field_validator("task")
    @classmethod
    def _known(cls, text: str) -> str:
        parse_task(text)
        return text


class Sweep(BaseModel):
    """Everything that decides a sweep's results. Method `full` is always there: the others are held against it.

    `methods`: texts, or "all" for every registered method that has a budget.
    `lengths` are tokens of prompt and answer, for tasks that are made to a length. `compress`: "both" lets methods
    decide about the prompt and while decoding, as they do; "prefill" about prompts alone. `batch` examples are read
    together. `window`: the longest prompt and answer (None: the model's context). `texts`, `data`: see `Setting`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "sweep"
    models: list[str] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    budgets: list[Budget] = Field(min_length=1)
    tasks: list[TaskEntry] = Field(min_length=1)
    lengths: list[Length] = []
    protocols: list[Protocol] = Field(["aware"], min_length=1)
    samples: Samples | None = None
    seed: int = 0
    batch: int = Field(4, ge=1, le=10**6)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compress: Literal["both", "prefill"] = "both"
    chat: bool = True
    window: int | None = Field(None, ge=16)
    prefill_chunk: int | None = Field(None, ge=2)
    texts: Path | None = None
    data: Path | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, tasks: Any) -> Any:
        return (
            [{"task": each} if isinstance(each, str) else each for each in tasks] if isinstance(tasks, list) else tasks
        )

    @field_validator("methods", mode="before")
    @classmethod
    def _all(cls, methods: Any) -> Any:
        return [info.slug for info in list_methods() if takes_budget(info)] if methods in ("all", ["all"]) else methods

    @field_validator("methods")
    @classmethod
    def _methods(cls, methods: list[str]) -> list[str]:
        for text in methods:
            with_budget(text, 0.5)
        return methods

    def contenders(self) -> list[tuple[str, Budget | None]]:
        """Methods with their budgets, `full` first; a method that takes no budget, or names its own, comes once."""
        found: list[tuple[str, Budget | None]] = [("full", None)]
        for budget in self.budgets:
            for text in self.methods:
                takes = with_budget(text, budget) != with_budget(text, 0.5 if budget != 0.5 else 0.25)
                each = (text, budget if takes else None)
                if each not in found:
                    found.append(each)
        return found

    def definition(self) -> dict[str, Any]:
        """Plain data, for `sweep.json`."""
        found: dict[str, Any] = self.model_dump(mode="json")
        return found


def check_sweep(data: dict[str, Any], where: str = "sweep") -> Sweep:
    """A sweep from plain data. Raises ValueError that names each wrong field, its value and what is allowed."""
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        found = []
        for each in error.errors():
            path = ".".join(str(part) for part in each["loc"])
            why = each["msg"].removeprefix("Value error, ")
            found.append(f"{path}={each['input']!r}: {why}" if each["type"] != "missing" else f"{path} is missing")
        raise ValueError(f"{where}: " + "; ".join(found)) from None


def read_definition(path: Path) -> dict[str, Any]:
    """Plain data from a .yaml, .yml, .toml or .json file. Raises ValueError for what it can't read."""
    if not path.is_file():
        raise ValueError(f"sweep={str(path)!r} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        elif path.suffix == ".toml":
            found = tomllib.loads(text)
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            raise ValueError("its name must end in .yaml, .yml, .toml or .json")
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"sweep={str(path)!r} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"sweep={str(path)!r} must be a mapping of fields, not {type(found).__name__}")
    return found


def list_suites() -> list[str]:
    """Names of the sweeps that ship."""
    folder = files("kvfold.evaluation") / "suites"
    return sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml"))


def suite(name: str) -> dict[str, Any]:
    """The definition of a sweep that ships. Raises ValueError that lists them."""
    if name not in list_suites():
        raise ValueError(f"suite={name!r} is unknown; there are {', '.join(list_suites())}")
    return tomllib.loads((files("kvfold.evaluation") / "suites" / f"{name}.toml").read_text(encoding="utf-8"))
