"""Peers with an environment of their own, kvpress and vLLM: their scripts wait in processes, and take turns with us.

`python benchmarks/peers/SCRIPT --turns ...` answers each line of JSON on its standard input with one on its output:
`{"do": "read", ...}` a prompt's seconds, "fill" a batch that then decodes, "decode" the seconds of its next steps,
"report" what it is.
"""

import ast
import json
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvfold
from kvfold.waiting import environment_of_others

FOLDER = Path("benchmarks/peers")
SCRIPTS = {"kvpress": "kvpress_peer.py", "vllm": "vllm_cpu.py"}
"""By the package that a peer's Python can import."""
FIND = (
    "import importlib, importlib.util as u\n"
    f"name = next((n for n in {list(SCRIPTS)} if u.find_spec(n)), None)\n"
    "name and importlib.import_module(name)\n"
    "print(name)"
)
PAUSE = 0.25
"""Seconds after a peer's turn: its threads may go on asking for work for a fifth of a second."""
LAST = 40
"""Lines of a peer's standard error that are kept."""


def find_script(peer: str) -> Path:
    """A peer's script in the checkout of the current folder, else in kvfold's own. Raises ValueError."""
    here, script = Path.cwd(), FOLDER / SCRIPTS[peer]
    places = [here, *here.parents, *Path(kvfold.__file__).resolve().parents[2:3]]
    found = next((place / script for place in places if (place / script).is_file()), None)
    if found is None:
        raise ValueError(f"peer-python needs {script}, which is in no checkout at or above {str(here)!r}")
    return found


def known_methods(script: Path) -> list[str]:
    """The methods that the script has a press for: the keys of its PRESSES, read without running it."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "PRESSES"
            and isinstance(node.value, ast.Dict)
        ):
            return [
                key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
    raise ValueError(f"{str(script)!r} has no dictionary PRESSES of methods")


def which_peer(python: str) -> str:
    """The peer (of SCRIPTS) that an interpreter can import. Raises ValueError where it is none, or imports none."""
    path = shutil.which(python)
    if path is None:
        raise ValueError(f"peer-python={python!r} is not a program")
    done = subprocess.run([path, "-c", FIND], capture_output=True, text=True, check=False)
    name = (done.stdout.split() or ["None"])[-1]
    if done.returncode or name not in SCRIPTS:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"peer-python={python!r} can't import one of {', '.join(SCRIPTS)}: {last}")
    return name


class PeerProcess:
    """A peer's script, which has loaded its model and waits for what it is asked; it ends with `close()`."""

    def __init__(self, peer: str, command: Sequence[str], threads: int):
        self.peer = peer
        environment = {**environment_of_others(), "OMP_NUM_THREADS": str(threads)}
        if peer == "vllm":  # it counts its threads itself, and takes other ways where somebody else does
            del environment["OMP_NUM_THREADS"]
        self.run = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.words: deque[str] = deque(maxlen=LAST)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.run.stderr is not None
        self.words.extend(self.run.stderr)

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Its answer. Raises RuntimeError with what it says, or with its last line where it has ended."""
        assert self.run.stdin is not None and self.run.stdout is not None
        try:
            self.run.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.run.stdin.flush()
            line = self.run.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.run.wait()
            self.listener.join()
            last = next((word.strip() for word in reversed(self.words) if word.strip()), "nothing on stderr")
            raise RuntimeError(f"{self.peer}: a process of its own ended with {code}: {last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self.peer}: {found['error']}")
        return found

    def close(self) -> None:
        """End it, whatever it does."""
        self.run.kill()
        self.run.wait()
        self.listener.join()
        for pipe in (self.run.stdin, self.run.stdout, self.run.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of words that it was not there to read
                    pipe.close()


@dataclass
class PeerLane:
    """One method of a peer, which takes turns with this process's caches; `failed` says why it takes no more."""

    process: PeerProcess
    method: str
    budget: float | int | None
    share: float
    batch: int
    context: int
    kv_bytes: int = 0
    failed: str | None = None

    @property
    def library(self) -> str:
        """The peer's name."""
        return self.process.peer

    @property
    def name(self) -> str:
        """The method and whose it is."""
        return f"{self.method} ({self.library}, own process)"

    def ask(self, do: str, **options: Any) -> dict[str, Any] | None:
        """An answer; None where the peer has failed, now or before."""
        if self.failed is None:
            try:
                found = self.process.ask(do, method=self.method, budget=self.share, **options)
                time.sleep(PAUSE)
                return found
            except RuntimeError as error:  # the others' results shall not go with it
                self.failed = str(error)
        return None

    def read(self, rows: int, context: int) -> float | None:
        """The seconds of a prompt of (rows, context) tokens, which is forgotten."""
        found = self.ask("read", rows=rows, context=context)
        return None if found is None else float(found["seconds"])

    def fill(self) -> None:
        """Read the batch that decodes from now on."""
        found = self.ask("fill")
        self.kv_bytes = 0 if found is None else int(found["kv_bytes"])

    def decode(self, steps: int) -> list[float]:
        """The seconds of as many further steps of the batch; none of a peer that has failed."""
        found = self.ask("decode", steps=steps)
        return [] if found is None else [float(second) for second in found["seconds"]]

    def report(self) -> dict[str, Any] | None:
        """What the peer says of itself: versions, peak memory, its command."""
        return self.ask("report")


@contextmanager
def waiting(
    pythons: Sequence[str], folder: Path | None, methods: Sequence[tuple[str, float | int | None]], *, context: int,
    batch: int, dtype: str, new_tokens: int, threads: int, seed: int = 0,
) -> Iterator[tuple[list[PeerLane], list[dict[str, str]]]]:  # fmt: skip
    """Lanes of all peers, whose processes end with the block, and the methods left out, each with its reason.

    kvpress gets each method (slug, budget) that it has a press for, a budget in tokens as a fraction of the context;
    vLLM has a full cache alone. `new_tokens` are the steps that a batch decodes in all rounds together. Raises
    ValueError, before anything is started, for a Python that has none of them.
    """
    peers = [(python, which_peer(python)) for python in pythons]
    if len({peer for _, peer in peers}) < len(peers):
        raise ValueError(f"peer-python={list(pythons)} must name each peer once; they are {[x for _, x in peers]}")
    scripts = {peer: find_script(peer) for _, peer in peers}
    lanes, skipped = [], []
    with ExitStack() as stack:
        for python, peer in peers:
            script = scripts[peer]
            known = known_methods(script) if peer == "kvpress" else []
            wanted = [each for each in methods if each[0] in known] if peer == "kvpress" else [("full", None)]
            skipped += [
                {"contender": f"kvpress {slug}", "reason": f"{script.name} has no press of this name"}
                for slug, _ in methods
                if peer == "kvpress" and slug not in known
            ]
            if not wanted:
                continue
            options: dict[str, Any] = {
                "model": folder, "context": context, "batch": batch, "dtype": dtype, "new-tokens": new_tokens,
                "seed": seed,
            }  # fmt: skip
            if peer == "vllm" and hasattr(os, "sched_getaffinity"):
                options["bind"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
            words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
            process = PeerProcess(peer, [python, str(script), "--turns", *words], threads)
            stack.callback(process.close)
            for slug, budget in wanted:
                share = 1.0 if budget is None else budget if isinstance(budget, float) else min(1.0, budget / context)
                lanes.append(PeerLane(process, slug, budget, share, batch, context))
        yield lanes, skipped
