"""Where the time of a decode step goes: Python's own profiler, its functions sorted by the room that they lie in.

What a function calls in C (a kernel, an operation of torch) counts for the function. So the parts add up to the step,
whatever model, method or cache it is, and nothing has to be put between them to be measured. A profiled step takes
a little longer than a plain one, and its Python most of that.
"""

import cProfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

PARTS = ("linears", "attention", "methods", "cache", "model")
"""The model's matrices; attention over what is cached, and writing it; what methods decide and carry out; the rest of
kvfold's Python; the rest of the model, transformers' and torch's Python with it."""
ROOMS = (
    ("torch/nn/modules/linear.py", "linears"),
    ("kvfold/hf/linears.py", "linears"),
    ("kvfold/ops/linear/", "linears"),
    ("kvfold/ops/paged/", "attention"),
    ("kvfold/ops/attend/", "attention"),
    ("kvfold/ops/codes/", "attention"),
    ("kvfold/ops/prefill/", "attention"),
    *((f"kvfold/ops/{name}.py", "attention") for name in ("__init__", "cpu", "dispatch")),
    ("kvfold/formats/", "attention"),
    ("transformers/integrations/sdpa_attention.py", "attention"),
    ("transformers/cache_utils.py", "attention"),
    ("optimum/quanto/", "attention"),
    ("hqq/", "attention"),
    *((f"kvfold/{room}/", "methods") for room in ("methods", "scores", "merges", "views", "budgets", "ops")),
    *((f"kvfold/layer/{name}.py", "methods") for name in ("deciding", "carrying", "late", "sharing")),
    ("kvfold/rotation.py", "methods"),
    ("kvfold/", "cache"),
    ("torch/_dynamo/", "cache"),  # what keeps kvfold's functions out of compiled graphs
    ("numpy/", "cache"),
)
"""The beginning of a file's path in its package, and the part that it counts for; the first that fits."""
PACKAGES = {start.split("/")[0] for start, _ in ROOMS}
KEEPING = ("keep", "shorten", "_set_columns")
"""Functions of `ops/paged` that carry out what a method decided begin like this."""


@dataclass(frozen=True)
class StepParts:
    """Seconds of a profiled step by part, and of the whole."""

    linears: float
    attention: float
    methods: float
    cache: float
    model: float
    step_seconds: float

    def share(self, part: str) -> float:
        """Of the step, 0 to 1."""
        seconds: float = getattr(self, part)
        return seconds / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def part_of(path: str, function: str) -> str:
    """The part that a function of a file counts for."""
    folders = PurePath(path).parts
    inner = max((number for number, folder in enumerate(folders) if folder in PACKAGES), default=len(folders))
    place = "/".join(folders[inner:])
    if place.startswith("kvfold/ops/paged/") and function.startswith(KEEPING):
        return "methods"
    return next((part for start, part in ROOMS if place.startswith(start)), "model")


class Profile:
    """Steps under the profiler: `with profile.steps(2): ...` as often as one likes, then `parts()`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.count = 0

    @contextmanager
    def steps(self, count: int) -> Iterator[None]:
        """`count` steps are taken in the block."""
        profiler = cProfile.Profile(builtins=False)
        profiler.enable()
        try:
            yield
        finally:
            profiler.disable()
        for entry in profiler.getstats():
            code: Any = entry.code
            if not isinstance(code, str):
                self.seconds[part_of(code.co_filename, code.co_name)] += entry.inlinetime
        self.count += count

    def parts(self) -> StepParts:
        """Means over all steps, of which there must be one."""
        each = {part: self.seconds[part] / self.count for part in PARTS}
        return StepParts(**each, step_seconds=sum(each.values()))
