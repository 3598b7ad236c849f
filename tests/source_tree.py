"""kvfold's own files as modules with syntax trees: what the rules of the house look at."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "kvfold"
FOLDER = ROOT / "src" / PACKAGE


@dataclass(frozen=True)
class Module:
    """A file: its full name, its syntax tree, whether it is a package's `__init__` or the stub of what is compiled."""

    name: str
    tree: ast.Module
    package: bool = False
    stub: bool = False

    @property
    def home(self) -> str:
        """The package that relative imports count from."""
        return self.name if self.package else self.name.rpartition(".")[0]

    @property
    def where(self) -> str:
        """Its file, below src."""
        return self.name.replace(".", "/") + ("/__init__.py" if self.package else ".pyi" if self.stub else ".py")


Modules = Mapping[str, Module]


@cache
def house() -> Modules:
    """All files of the package, by full name."""
    found = {}
    for path in sorted([*FOLDER.rglob("*.py"), *FOLDER.rglob("*.pyi")]):
        parts, package = path.relative_to(FOLDER.parent).with_suffix("").parts, path.stem == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        found[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")), package, path.suffix == ".pyi")
    return found


def made(**sources: str) -> Modules:
    """Files from sources, for tests of the rules: `a__b` is kvfold.a.b, and a package where another name goes on."""
    names = {f"{PACKAGE}.{key.replace('__', '.')}": source for key, source in sources.items()}
    return {
        name: Module(name, ast.parse(source), any(other.startswith(f"{name}.") for other in names))
        for name, source in names.items()
    }


@dataclass(frozen=True)
class Import:
    """A line of an import: `target` is the file that is meant, or the full name of what is not ours."""

    target: str
    name: str
    """What is taken from it; "" for the module itself."""
    line: int


def imports(module: Module, modules: Modules) -> Iterator[Import]:
    """All that a file imports: inside functions and under TYPE_CHECKING, too, and not of itself.

    `from kvfold.x import y` means the file kvfold.x.y where there is one, else kvfold.x.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(each.name, "", node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = module.home.split(".")
            above = home[: len(home) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for each in node.names:
                whole = f"{base}.{each.name}"
                yield Import(whole, "", node.lineno) if whole in modules else Import(base, each.name, node.lineno)


def graph(modules: Modules) -> dict[str, set[str]]:
    """Which of our files each file imports, itself left out."""
    return {
        name: {each.target for each in imports(module, modules) if each.target in modules} - {name}
        for name, module in modules.items()
    }
