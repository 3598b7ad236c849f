"""Changes of lines that matter, one at a time, and whether a test fails: `make mutants`.

    python tests/mutants.py                        all of tests/mutants.toml; writes docs/mutants.md
    python tests/mutants.py --only pages --only "crop"   those whose file or name has that; writes nothing

Works in a copy of `src`: the checkout stays as it is. Ends with 1 where a change survives, and refuses to begin where
the list does not fit the code any more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST, PAGE = Path(__file__).with_suffix(".toml"), ROOT / "docs/mutants.md"
TIMEOUT = 900
"""Seconds for the tests of one change: one that never ends is found, too."""
HEAD = """# Mutants

Made by `make mutants`: a line of the core is changed, one at a time, in a copy, and the tests that ought to see it run.
`tests/mutants.toml` has the changes in full. A change that no test sees is a test that is missing.

"""


@dataclass(frozen=True)
class Mutant:
    """A change: `old`, which a file has exactly once, becomes `new`; one of `tests` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutants(path: Path = LIST, root: Path = ROOT) -> list[Mutant]:
    """The list. Raises ValueError for a change that does not fit the code, or names a test that is not there."""
    found = [
        Mutant(each["name"], each["file"], each["old"], each["new"], tuple(each["tests"]))
        for each in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    ]
    for each in found:
        count = (root / each.file).read_text(encoding="utf-8").count(each.old)
        if count != 1:
            raise ValueError(f"{each.name!r}: its old text stands {count} times in {each.file}, not once")
        if each.old == each.new:
            raise ValueError(f"{each.name!r} changes nothing")
        missing = [test for test in each.tests if not (root / test).exists()]
        if missing or not each.tests:
            raise ValueError(f"{each.name!r}: tests={list(each.tests)} are not all there")
    if len({each.name for each in found}) != len(found):
        raise ValueError("two changes have one name")
    return found


def run(tests: Sequence[str], source: Path) -> int | None:
    """How pytest ends over these tests, with the package of `source`; None: not in time."""
    # The copy's bytecode would be taken for the next change's.
    env = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0",
        "--hypothesis-profile=mutants", "-o", "addopts=--strict-markers --strict-config", *tests,
    ]  # fmt: skip
    try:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return None


def outcomes(chosen: Sequence[Mutant], source: Path) -> Iterator[tuple[Mutant, bool]]:
    """Each change, and whether a test saw it. Raises RuntimeError where that can't be told."""
    passed = set[str]()
    for each in chosen:
        fresh = [test for test in each.tests if test not in passed]
        if fresh and run(fresh, source) != 0:
            raise RuntimeError(f"without any change {', '.join(fresh)} do not pass")
        passed |= set(fresh)
        path = source / Path(each.file).relative_to("src")
        whole, before = path.read_bytes(), path.stat()
        try:
            path.write_bytes(whole.replace(each.old.encode(), each.new.encode()))
            ended = run(each.tests, source)
        finally:
            path.write_bytes(whole)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the kernels' cache goes by it
        if ended not in (0, 1, None):
            raise RuntimeError(f"{each.name!r}: pytest ended with {ended}, which says nothing about the change")
        yield each, ended != 0


def page(found: Sequence[tuple[Mutant, bool]]) -> str:
    """The score, and every change by file."""
    score = f"**{sum(seen for _, seen in found)} of {len(found)} are seen.**"
    lines = [score, "", "| changed | in | seen |", "| --- | --- | --- |"]
    for each, seen in found:
        lines.append(f"| {each.name} | `{each.file.removeprefix('src/kvfold/')}` | {'yes' if seen else '**no**'} |")
    return HEAD + "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a part of a file or a name; may be repeated")
    args = parser.parse_args(words)
    chosen = [
        each for each in mutants() if not args.only or any(part in each.file or part in each.name for part in args.only)
    ]
    with tempfile.TemporaryDirectory(prefix="kvfold-mutants-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source)  # with the compiled kernels, which know their files by time and size
        found = []
        for each, seen in outcomes(chosen, source):
            found.append((each, seen))
            print(f"{'seen    ' if seen else 'SURVIVES'} {each.file}: {each.name}", flush=True)
    print(f"{sum(seen for _, seen in found)} of {len(found)} are seen")
    if not args.only:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0 if all(seen for _, seen in found) else 1


if __name__ == "__main__":
    sys.exit(main())
