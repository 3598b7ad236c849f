"""Running a sweep: one process that loads each model once, and goes on where a killed one stopped."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvfold.evaluation.records import ResultFolder, key_of
from kvfold.evaluation.sweep import Sweep
from kvfold.evaluation.worker import Unit, Worker

PACKAGES = ("kvfold", "torch", "transformers", "tokenizers", "numpy")


@dataclass
class Progress:
    """How far a sweep is, in records; `failed` are among the done, `failures` those of earlier runs with them.

    `problems`: what could not be tried at all, and why.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    failures: int = 0
    now: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything was tried, and nothing failed."""
        return not self.failures and not self.problems


Tick = Callable[[Progress], None]


@dataclass
class Workload:
    """What is to be done: units with the keys of their records, and each key's place in the order."""

    units: list[tuple[Unit, list[str]]] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)

    def add(self, worker: Worker, unit: Unit, ids: list[str]) -> None:
        keys = [key_of(key) for mine in worker.keys(unit, ids) for key in mine]
        self.units.append((unit, keys))
        for key in keys:
            self.order.setdefault(key, len(self.order))


def about(device: str) -> dict[str, Any]:
    """Versions and machine, for `sweep.json`."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    machine = {"device": device, "kind": kind, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions, "machine": machine}


def run_sweep(
    sweep: Sweep, folder: Path, *, device: str = "cpu", retry_failed: bool = False, tick: Tick = lambda _: None
) -> Progress:
    """Run what `folder` does not have yet of a sweep; how far it is then.

    Examples of a model are all made before any is asked. What can't be made for the first model stops the sweep before
    anything is written; a later model, or a task of its, is named in the result's `problems`, and the others go on.
    With `retry_failed` what failed before is tried again. Raises ValueError for that task, and for a folder with
    another sweep's results. What fails later is a record with an error. Ctrl-C and SIGKILL lose the batch under way,
    and nothing else.
    """
    worker = Worker(sweep, device)
    first = plan_for(worker, sweep.models[:1])
    store = ResultFolder(folder, sweep.definition(), about(device), retry_failed=retry_failed)
    try:
        order, progress = dict[str, int](), Progress()
        for model in sweep.models:
            mine = first if model == sweep.models[0] else plan_for(worker, [model], progress.problems)
            order |= {key: len(order) + at for key, at in mine.order.items()}
            progress.total = len(order)
            progress.done = sum(key in store.done for key in order)
            progress.failures = sum(key in store.failed for key in order)
            for unit, keys in mine.units:
                if all(key in store.done for key in keys):
                    continue
                progress.now = describe(sweep, unit)
                tick(progress)
                records = worker.run(unit, store.done)
                store.add_examples(worker.example_records(unit))
                store.add(records)
                count(progress, records)
                tick(progress)
        store.finish(order)
        return progress
    finally:
        store.close()


def plan_for(worker: Worker, models: list[str], problems: list[str] | None = None) -> Workload:
    """The units of some models, in order; `problems`: see `Worker.units`."""
    plan = Workload()
    for model in models:
        for unit, ids in worker.units(model, problems):
            plan.add(worker, unit, ids)
    return plan


def describe(sweep: Sweep, unit: Unit) -> str:
    """A unit in words."""
    length = "" if unit.length is None else f", {unit.length:,} tokens"
    return f"{unit.model}: {sweep.tasks[unit.entry].task}{length}, {unit.protocol}"


def count(progress: Progress, records: list[dict[str, Any]]) -> None:
    """Records that came in."""
    failed = sum("error" in record for record in records)
    progress.done += len(records)
    progress.failed += failed
    progress.failures += failed
