"""The rules of the house that no linter knows: lengths, marks, files of methods, names.

Imports have tests/test_house_imports.py, what is private tests/test_house_privacy.py.
"""

import ast
import re
from pathlib import Path

import pytest

from source_tree import FOLDER, ROOT, Modules, house, made

SOURCES = sorted(path for room in ("src", "tests") for path in (ROOT / room).rglob("*.py"))
LINE_CAP, CLASS_CAP = 400, 200
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


METHODS = [(slug, path) for path in sorted((FOLDER / "methods").glob("*.py")) for slug in method_slugs(path)]


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert lengths, "found no source file"
    too_long = {name: length for name, length in lengths.items() if length > LINE_CAP}
    assert not too_long, f"a file over {LINE_CAP} lines is two files: {too_long}"


def long_classes(source: str) -> list[tuple[str, int]]:
    """Classes over the cap, and their lines."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    sizes = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in nodes]
    return [(name, lines) for name, lines in sizes if lines > CLASS_CAP]


def test_classes_stay_short():
    assert long_classes("class Long:\n" + "    x = 1\n" * CLASS_CAP) == [("Long", CLASS_CAP + 1)]
    found = {
        str(path.relative_to(ROOT)): long
        for path in SOURCES
        if "src" in path.parts and (long := long_classes(path.read_text(encoding="utf-8")))
    }
    assert not found, f"a class over {CLASS_CAP} lines is two classes: {found}"


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


# -- one word has one meaning ---------------------------------------------------------------------------------


def twice(modules: Modules) -> dict[str, list[str]]:
    """Names that more than one class has, with the places of all of them."""
    places: dict[str, list[str]] = {}
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{module.where}:{node.lineno}")
    return {name: where for name, where in places.items() if len(where) > 1}


def test_names_of_two_classes_are_found():
    files = {
        "a": "class Row: ...\nclass Plan:\n    class _Step: ...",
        "b": "def f():\n    class Row: ...",
        "c": "_Step = 1",
    }
    assert twice(made(**files)) == {"Row": ["kvfold/a.py:1", "kvfold/b.py:2"]}


def test_no_two_classes_have_one_name():
    found = twice(house())
    assert not found, "one word has one meaning:\n" + "\n".join(
        f"{name}: {', '.join(at)}" for name, at in found.items()
    )


def segment_questions(source: str) -> list[int]:
    """Lines that ask whether something is of a segment's class."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and any("Segment" in ast.unparse(each) for each in node.args[1:])
    ]


def test_nobody_outside_formats_asks_for_a_segments_class():
    assert segment_questions("x = isinstance(y, list)\nif isinstance(s, a.DenseSegment | None):\n    pass") == [2]
    found = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if "src" in path.parts and "formats" not in path.parts
        if (lines := segment_questions(path.read_text(encoding="utf-8")))
    }
    assert not found, f"what differs between formats is in the protocol or the traits: {found}"
