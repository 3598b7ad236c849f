"""Imports go one way: from the commands down to the pages, and never in a circle (docs/architecture.md)."""

import pytest

from source_tree import PACKAGE, Module, Modules, graph, house, imports, made

EVERYTHING = "*"
"""All rooms above in the table."""
ROOMS = {
    "pages": "",
    "ops": "",
    "budgets": "",
    "rotation": "",
    "options": "",
    "waiting": "",
    "files": "options",
    "artefacts": "files options",
    "codecs": "options",
    "formats": "pages ops rotation budgets options",
    "warm": "formats ops",
    "views": "formats ops rotation budgets options",
    "scores": "views formats ops rotation budgets options",
    "merges": "scores views formats ops rotation budgets options",
    "selectors": "scores views formats pages ops rotation budgets options",
    "methods": "selectors merges scores views formats artefacts ops rotation budgets options",
    "layer": "methods.base views formats pages ops rotation budgets options",
    "models": "files options transformers",
    "hf": "models layer methods warm views formats codecs artefacts files pages ops rotation budgets options "
    "transformers",
    "probes": "hf methods merges scores views formats artefacts ops rotation budgets options transformers",
    "testing": "hf methods transformers",
    "conversations": "hf methods views formats artefacts ops options transformers",
    "streaming": "hf methods formats codecs files pages options transformers",
    "diffusion": "hf methods views formats ops options",
    "reuse": "hf layer methods views formats pages ops options",
    "engine": "reuse hf methods views formats ops options",
    PACKAGE: "engine reuse hf models methods views formats pages",
    "calibration": f"{PACKAGE} probes hf methods selectors scores views formats artefacts ops options rotation "
    "transformers",
    "server": f"{PACKAGE} engine reuse hf models methods options",
    "serving": f"{PACKAGE} server engine reuse hf models methods options",
    "evaluation": f"{EVERYTHING} transformers",
    "bench": f"{EVERYTHING} transformers",
    "explorer": EVERYTHING,
    "cli": f"{EVERYTHING} transformers",
    "__main__": "cli",
}
"""From the ground up: each room, and what it may import. `methods.base` is that file alone, `kvfold` the public face.

Those that have the word may import transformers."""


# -- circles -------------------------------------------------------------------------------------------------


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files that all lead to one another by their imports."""

    def reached(start: str) -> set[str]:
        found, todo = set[str](), [start]
        while todo:
            fresh = edges[todo.pop()] - found
            found |= fresh
            todo += fresh
        return found

    reach = {name: reached(name) for name in edges}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def test_circles_are_found():
    files = {
        "a": "from kvfold.b import thing",
        "b": "def f():\n    import kvfold.c.d",
        "c": "",
        "c__d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import a\nfrom kvfold import e",
        "e": "from kvfold.c import Thing",
        "f": "from kvfold import f, g\nimport kvfold.e",
        "g": "import torch",
    }
    assert circles(graph(made(**files))) == [["kvfold.a", "kvfold.b", "kvfold.c.d"]]
    whole = graph(made(**{**files, "c": "from .d import Thing"}))  # a package's __init__ is a file, too
    assert circles(whole) == [["kvfold.a", "kvfold.b", "kvfold.c", "kvfold.c.d", "kvfold.e"]]
    assert circles(graph(made(a="import kvfold.b", b="import kvfold.a", c="import kvfold.d", d="import kvfold.c"))) == [
        ["kvfold.a", "kvfold.b"], ["kvfold.c", "kvfold.d"],
    ]  # fmt: skip


def test_no_files_import_each_other():
    found = circles(graph(house()))
    assert not found, "files that import each other, by whatever detour:\n" + "\n".join(map(", ".join, found))


# -- rooms ---------------------------------------------------------------------------------------------------


def inner(name: str) -> str:
    """A full name within the package: `kvfold.hf.cache` as `hf.cache`, the package itself by its own name."""
    return name.removeprefix(f"{PACKAGE}.")


def room_of(name: str) -> str:
    """The room of a file, by its full name."""
    return inner(name).split(".")[0]


def allowed(room: str) -> list[str]:
    """What a room may import."""
    names = list(ROOMS)
    words = ROOMS[room].split()
    return [room, *words, *(names[: names.index(room)] if EVERYTHING in words else [])]


def upward(module: Module, modules: Modules) -> list[str]:
    """The lines of a file that import what its room may not."""
    room, found = room_of(module.name), []
    for each in imports(module, modules):
        if each.target.split(".")[0] not in (PACKAGE, "transformers"):
            continue
        target = inner(each.target)
        if not any(target == may or target.startswith(f"{may}.") for may in allowed(room)):
            found.append(f"{module.where}:{each.line}: {room} may not import {each.target}")
    return found


def test_the_table_goes_down():
    names = list(ROOMS)
    for place, words in enumerate(ROOMS.values()):
        below = {word.split(".")[0] for word in words.split()} - {EVERYTHING, "transformers"}
        assert below <= set(names[:place]), f"{names[place]} may import {below - set(names[:place])}, which is no lower"


def test_imports_of_other_rooms_are_found():
    files = {
        "layer__a": """
from typing import TYPE_CHECKING
import torch
from . import b
from kvfold import parse
from kvfold.methods import base, registry
from kvfold.methods.base import Method
if TYPE_CHECKING:
    from kvfold.hf.cache import Cache
def f():
    import transformers.models
    from kvfold.pages import PageTable
    from ..formats import Dense
""",
        "layer__b": "",
        "methods__base": "",
        "methods__registry": "from kvfold.pages import PageTable",
        "cli__c": "import kvfold.hf.cache, kvfold.bench, transformers",
        "evaluation__d": "from kvfold.bench import plan",
    }
    modules = made(**files)
    found = {name: upward(module, modules) for name, module in modules.items()}
    wrong = {5: "kvfold", 6: "kvfold.methods.registry", 9: "kvfold.hf.cache", 11: "transformers.models"}
    assert found.pop("kvfold.layer.a") == [
        f"kvfold/layer/a.py:{line}: layer may not import {name}" for line, name in wrong.items()
    ]
    assert found.pop("kvfold.methods.registry") and found.pop("kvfold.evaluation.d")
    assert not any(found.values())


def test_every_file_has_a_room():
    lost = sorted({room_of(name) for name in house()} - set(ROOMS))
    assert not lost, f"{lost} are rooms without a place in ROOMS"


@pytest.mark.parametrize("name", house())
def test_imports_go_one_way(name: str):
    found = upward(house()[name], house())
    assert not found, "imports go down ROOMS:\n" + "\n".join(found)
