"""The rules of the house that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("src", "tests") for path in (ROOT / room).rglob("*.py"))
LINE_CAP = 400
MARK = re.compile(r"\b([T]ODO|[F]IXME|[X]XX)\b")  # the brackets keep this line from finding itself
ISSUE = re.compile(r"#\d+")


def method_slugs(path: Path) -> list[str]:
    """The slugs that a file registers with `@method("slug", ...)`."""
    return [
        decorator.args[0].value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and ast.unparse(decorator.func).split(".")[-1] == "method"
        and decorator.args
        and isinstance(decorator.args[0], ast.Constant)
        and isinstance(decorator.args[0].value, str)
    ]


METHODS = [(slug, path) for path in sorted((ROOT / "src/kvfold/methods").glob("*.py")) for slug in method_slugs(path)]


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert lengths, "found no source file"
    too_long = {name: length for name, length in lengths.items() if length > LINE_CAP}
    assert not too_long, f"a file over {LINE_CAP} lines is two files: {too_long}"


def test_marks_name_an_issue():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MARK.search(line) and not ISSUE.search(line)
    ]
    assert not found, "name the issue on the line, as in '#12':\n" + "\n".join(found)


def test_there_are_methods():
    assert METHODS, "src/kvfold/methods registers no method"


@pytest.mark.parametrize(("slug", "path"), METHODS, ids=[slug for slug, _ in METHODS])
def test_a_method_is_its_file_and_its_oracle(slug: str, path: Path):
    name = slug.replace("-", "_")
    assert path.stem == name, f"{slug} belongs in src/kvfold/methods/{name}.py"
    oracle = ROOT / f"tests/oracles/test_{name}.py"
    assert oracle.is_file(), f"{slug} has no oracle test: {oracle.relative_to(ROOT)}"


# -- rooms: imports go one way (docs/architecture.md) --------------------------------------------------------

ROOMS = sorted(path for path in (ROOT / "src/kvfold").rglob("*.py"))
ONLY = {"ops": {"ops"}, "budgets": {"budgets"}, "options": {"options"}, "pages": {"pages"}}
"""Rooms that know nothing of kvfold but what stands here."""
LATER = {"hf", "models", "probes", "calibration", "cli", "evaluation", "layer", "pages", "Cache", "load"}
NEVER = {room: LATER for room in ("methods", "scores", "merges")}
"""Rooms that may not know those; `kvfold.Cache` and `kvfold.load` are parts of hf."""
WITH_TRANSFORMERS = {"hf", "models", "conversations", "calibration", "cli", "evaluation", "bench"}


def imported(source: str, package: str = "kvfold") -> set[str]:
    """Full names of all that a module of `package` imports when it runs, inside functions too."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{name.name}" for name in node.names}
        todo += ast.iter_child_nodes(node)
    return names


def room_of(name: str) -> str:
    """The part of kvfold that a full name lies in ("" for others)."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == "kvfold" else ""


def test_imports_are_found():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from kvfold.hf.cache import Cache
else:
    from kvfold import layer
def f():
    import kvfold.pages
    from . import naive
    from ..dispatch import select
"""
    found = {name for name in imported(source, "kvfold.ops.attend") if room_of(name)}
    assert found == {"kvfold.layer", "kvfold.pages", "kvfold.ops.attend.naive", "kvfold.ops.dispatch.select"}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(ROOT / "src/kvfold")))
def test_imports_go_one_way(path: Path):
    module = path.relative_to(ROOT / "src").with_suffix("")
    room = room_of(".".join(module.parts))
    names = imported(path.read_text(encoding="utf-8"), ".".join(module.parts[:-1]))
    rooms = {room_of(name) for name in names} - {""}
    if room in ONLY:
        assert rooms <= ONLY[room], f"{room} imports from kvfold nothing but {sorted(ONLY[room])}"
    assert not rooms & NEVER.get(room, set()), f"{room} must not know what comes after it"
    if room not in ("cli", "__main__"):
        assert "cli" not in rooms, "nothing imports cli"
    if room not in WITH_TRANSFORMERS:
        assert not {name for name in names if name.split(".")[0] == "transformers"}, "transformers belongs in hf"
