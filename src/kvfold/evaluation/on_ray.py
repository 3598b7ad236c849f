"""The same sweep on a Ray cluster: an actor for each device, one writer, and a new actor where one has died."""

from pathlib import Path
from typing import Any

import torch

from kvfold.evaluation.records import ResultFolder, key_of
from kvfold.evaluation.runner import Progress, Tick, about, count, describe
from kvfold.evaluation.sweep import Sweep
from kvfold.evaluation.worker import Worker

TRIES = 3
"""How often a unit is given out before its records are failures: an actor that dies takes its unit along."""


class Remote:
    """What an actor does: a `Worker` with as many threads as the driver has, so that sums come out the same."""

    def __init__(self, definition: dict[str, Any], device: str, threads: int):
        torch.set_num_threads(threads)
        self.worker = Worker(Sweep.model_validate(definition), device)

    def plan(self, model: str, strict: bool) -> tuple[list[Any], list[str]]:
        """Units of a model, each with the keys of its records and with its examples; and what can't be made.

        `strict`: that is an error.
        """
        problems: list[str] = []
        units = self.worker.units(model, None if strict else problems)
        return [(unit, self.worker.keys(unit, ids), self.worker.example_records(unit)) for unit, ids in units], problems

    def run(self, unit: Any, done: list[str]) -> list[dict[str, Any]]:
        """A unit's records."""
        return self.worker.run(unit, set(done))


def run_on_ray(
    sweep: Sweep, folder: Path, address: str, *, device: str = "cpu", actors: int | None = None,
    retry_failed: bool = False, tick: Tick = lambda _: None,
) -> Progress:  # fmt: skip
    """Run what `folder` does not have yet on the cluster at `address` ("local": one of this machine's own).

    One actor a GPU for device="cuda", else one for each as many cores as torch uses here; `actors` says how many.
    Results come in as they are done, and stand in the sweep's order at the end. Raises ImportError without Ray.
    """
    try:
        import ray
    except ImportError:
        raise ImportError('--ray needs Ray: pip install "kvfold[ray]"') from None
    threads, mine = torch.get_num_threads(), not ray.is_initialized()
    if mine:
        ray.init(address=None if address == "local" else address, log_to_driver=False, configure_logging=False)
    store = ResultFolder(folder, sweep.definition(), about("cpu"), retry_failed=retry_failed)
    try:
        # No node may have as many cores as this one.
        cores = int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))
        needs = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": min(threads, cores)}
        have = ray.cluster_resources()
        number = actors or max(
            1, int(have.get("GPU" if device.startswith("cuda") else "CPU", 1)) // max(needs.values())
        )
        kind = ray.remote(**needs, max_restarts=0)(Remote)

        def start() -> Any:
            return kind.remote(sweep.definition(), device, threads)

        pool = [start() for _ in range(number)]
        order, waiting, problems = dict[str, int](), [], list[str]()
        for model in sweep.models:
            units, unmade = ray.get(pool[0].plan.remote(model, model == sweep.models[0]))
            problems += unmade
            for unit, keys, examples in units:
                flat = [key for mine_ in keys for key in mine_]
                order |= {key_of(key): len(order) + at for at, key in enumerate(flat)}
                if any(key_of(key) not in store.done for key in flat):
                    store.add_examples(examples)
                    waiting.append((unit, flat, 0))
        progress = Progress(len(order), sum(key in store.done for key in order), problems=problems)
        progress.failures = sum(key in store.failed for key in order)
        waiting.reverse()
        busy: dict[Any, tuple[int, Any]] = {}
        idle = list(range(number))
        while waiting or busy:
            while waiting and idle:
                job, at = waiting.pop(), idle.pop()
                wanted = [key_of(key) for key in job[1]]
                busy[pool[at].run.remote(job[0], [key for key in wanted if key in store.done])] = (at, job)
                progress.now = describe(sweep, job[0])
                tick(progress)
            ready, _ = ray.wait(list(busy), num_returns=1)
            at, (unit, flat, tries) = busy.pop(ready[0])
            idle.append(at)
            try:
                records = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                pool[at] = start()
                if tries + 1 < TRIES:
                    waiting.append((unit, flat, tries + 1))
                    continue
                why = f"{type(error).__name__}: {str(error).splitlines()[0]} ({TRIES} tries)"
                records = [{**key, "error": why} for key in flat if key_of(key) not in store.done]
            store.add(records)
            count(progress, records)
            tick(progress)
        store.finish(order)
        return progress
    finally:
        store.close()
        if mine:
            ray.shutdown()
