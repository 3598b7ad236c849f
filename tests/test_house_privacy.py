"""What is private stays private: fields and names with an underscore, and the dictionaries behind objects."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import pytest

from source_tree import Module, Modules, house, imports, made

OPEN = {
    "_C": "torch's own state: whether vmap or jvp look at an operation (`torch._C._functorch`) has no other name",
    "_functorch": "the same",
    "_len_torch_dispatch_stack": "torch's number of modes that look at operations, which has no other name",
    "_attn_implementation": "transformers' field of a config, which has no other name",
    "_can_set_attn_implementation": "transformers' question to a model, which has no other name",
    "_name_or_path": "transformers' field of a config, which has no other name",
    "_forward_hooks": "torch's hooks of a module, which have no other name",
    "_forward_pre_hooks": "the same",
    "_hf_hook": "accelerate's mark on a module whose weights it moves",
    "_kvfold_*": "what a cache leaves on the model that it belongs to",
    "_scaled_dot_product_*": "torch's operators that return the log-sum-exp as well",
    "_supports_sdpa": "transformers' mark on a class of models, which has no other name",
    "_version": "torch's count of writes to a tensor",
}
"""Private names that anybody may use, and why."""
ACCESS = {"getattr", "setattr", "hasattr", "delattr"}
CHANGES = {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__", "__ior__"}
SELF = {"self", "cls", "super()"}
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Field(NamedTuple):
    """A field that is looked at: the line, whose it is, as written there, and its name."""

    line: int
    owner: str
    name: str


def private(name: str) -> bool:
    """Whether a name begins with an underscore and is not Python's own (`__init__`)."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def excused(name: str) -> list[str]:
    """The exceptions that a name falls under."""
    return [pattern for pattern in OPEN if fnmatch(name, pattern)]


# -- fields --------------------------------------------------------------------------------------------------


def of_class(annotation: ast.expr | None, cls: str) -> bool:
    """Whether an annotation says: an object of this class (or None)."""
    if annotation is None:
        return False
    parts = {part.strip(" '\"") for part in ast.unparse(annotation).split("|")}
    return bool(parts & {cls, "Self"}) and parts <= {cls, "Self", "None"}


def makers(cls: ast.ClassDef) -> set[str]:
    """What makes another object of a class: the class itself, and its methods that say that they return one."""
    methods = (node for node in cls.body if isinstance(node, ast.FunctionDef))
    return {cls.name, "cls", "type(self)", *(f"self.{m.name}" for m in methods if of_class(m.returns, cls.name))}


def own_names(method: ast.AST, cls: ast.ClassDef) -> set[str]:
    """Names in a method that are of its class: by an annotation, or by what they were made with."""
    found, making = {cls.name}, makers(cls)
    for node in ast.walk(method):
        if isinstance(node, ast.arg) and of_class(node.annotation, cls.name):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and of_class(node.annotation, cls.name):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            found |= {ast.unparse(target) for target in node.targets if ast.unparse(node.value.func) in making}
    return found


def fields(tree: ast.AST, own: frozenset[str] = frozenset(), cls: ast.ClassDef | None = None) -> Iterator[Field]:
    """Each private field that is looked at, but those of `self` and of our own kind."""
    for node in ast.iter_child_nodes(tree):
        mine, inside = own, cls
        if isinstance(node, ast.ClassDef):
            mine, inside = frozenset(), node
        elif isinstance(node, Function) and cls is not None and not own:
            mine = frozenset(own_names(node, cls))
        found: tuple[ast.expr, str] | None = None
        if isinstance(node, ast.Attribute):
            found = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ACCESS and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found = node.args[0], name.value
        if found is not None and private(found[1]) and (text := ast.unparse(found[0])) not in {*SELF, *mine}:
            yield Field(node.lineno, text, found[1])
        yield from fields(node, mine, inside)


def looked_at(module: Module) -> list[str]:
    """The lines of a file that look at a private field of another object."""
    found = (field for field in fields(module.tree) if not excused(field.name))
    return [f"{module.where}:{line}: {owner}.{name}" for line, owner, name in dict.fromkeys(found)]


def test_private_fields_are_found():
    source = """
import torch
class Table:
    _known = {}
    def fork(self) -> "Table": ...
    def rest(self) -> list["Table"]: ...
    def ours(self, other: "Table", last: "Table | None"):
        fresh, copy = Table(), 1
        fresh = Table()
        copy: Table = object.__new__(type(self))
        fork = self.fork()
        def inner():
            return other._a + last._a + fresh._a + copy._a + fork._a + self._a + Table._known
        return super()._a, self.__dict__, torch.ops.aten._scaled_dot_product_thing
    def theirs(self, other, some: list["Table"], view: "View"):
        other._b = 1
        some._c
        view._d
        some[0]._e
        self.pool._f
        getattr(other, "_g", None)
        setattr(self, "_h", 1)
        [x._i for x in (self, other)]
        rest = self.rest()
        rest._j
class View:
    def theirs(self, other: Table):
        return other._k, lambda: self._l
def function(table: Table):
    return table._m, table._version, table.__n
"""
    found = looked_at(Module("kvfold.pages.a", ast.parse(source)))
    assert [text.split(": ")[1] for text in found] == [
        "other._b", "some._c", "view._d", "some[0]._e", "self.pool._f", "other._g", "x._i", "rest._j", "other._k",
        "table._m", "table.__n",
    ]  # fmt: skip
    assert found[0] == "kvfold/pages/a.py:16: other._b"


@pytest.mark.parametrize("name", house())
def test_nobody_looks_at_anothers_private_fields(name: str):
    found = looked_at(house()[name])
    assert not found, "a field with an underscore is its own object's alone:\n" + "\n".join(found)


def test_every_exception_is_needed():
    used = {pattern for module in house().values() for field in fields(module.tree) for pattern in excused(field.name)}
    assert used == set(OPEN), f"nobody uses {set(OPEN) - used} any more: leave them out"


# -- names ---------------------------------------------------------------------------------------------------


def taken(module: Module, modules: Modules) -> list[str]:
    """The lines of a file that import a private name, or a private file of a folder that it does not lie in."""
    found = []
    for each in imports(module, modules):
        parts = each.target.split(".")
        at = next((i for i, part in enumerate(parts) if private(part)), len(parts))
        folder = ".".join(parts[:at])
        at_home = module.name == folder or module.name.startswith(f"{folder}.")
        if private(each.name) or (at < len(parts) and not at_home):
            found.append(f"{module.where}:{each.line}: {'.'.join(filter(None, (each.target, each.name)))}")
    return found


def test_private_names_are_found():
    files = {
        "a": "from kvfold.b import _helper, helper\nfrom torch._C import thing\nimport kvfold.b._c",
        "b": "from . import _c\nfrom kvfold.b._c import name",
        "b___c": "",
        "b__d": "from kvfold.b import _c\nfrom ._c import name, _name\nfrom __future__ import annotations",
    }
    modules = made(**files)
    assert [line for module in modules.values() for line in taken(module, modules)] == [
        "kvfold/a.py:1: kvfold.b._helper", "kvfold/a.py:2: torch._C.thing", "kvfold/a.py:3: kvfold.b._c",
        "kvfold/b/d.py:2: kvfold.b._c._name",
    ]  # fmt: skip


@pytest.mark.parametrize("name", house())
def test_nobody_imports_a_private_name(name: str):
    found = taken(house()[name], house())
    assert not found, "a name with an underscore is its file's, a file with one its folder's:\n" + "\n".join(found)


# -- dictionaries behind objects -----------------------------------------------------------------------------


def behind(node: ast.AST) -> bool:
    """Whether an expression is an object's dictionary: `x.__dict__` or `vars(x)`."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__dict__"
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "vars"


def frozen(node: ast.ClassDef) -> bool:
    """Whether a class is a frozen dataclass, which can set its own fields in no other way."""
    return any("dataclass(" in (text := ast.unparse(each)) and "frozen=True" in text for each in node.decorator_list)


def written(tree: ast.AST, in_frozen: bool = False) -> Iterator[int]:
    """The lines that write to the dictionary behind an object, or past its `__setattr__`."""
    for node in ast.iter_child_nodes(tree):
        inside = frozen(node) if isinstance(node, ast.ClassDef) else in_frozen
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if behind(node) or (isinstance(node, ast.Subscript) and behind(node.value)):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            past = ast.unparse(node.func) in ("object.__setattr__", "object.__delattr__")
            own = in_frozen and bool(node.args) and ast.unparse(node.args[0]) == "self"
            if (past and not own) or (node.func.attr in CHANGES and behind(node.func.value)):
                yield node.lineno
        yield from written(node, inside)


def test_writes_behind_objects_are_found():
    source = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Frozen:
    def __post_init__(self):
        object.__setattr__(self, "a", 1)
        object.__setattr__(self.b, "a", 1)
class Open:
    def f(self):
        object.__setattr__(self, "a", 1)
        self.__dict__ |= {}
        self.__dict__ = {}
        self.__dict__["a"] = 1
        del self.__dict__["a"]
        vars(self)["a"] = 1
        self.__dict__.update(a=1)
        vars(self).pop("a")
        copy = dict(self.__dict__, **vars(self))
        copy["a"] = self.__dict__["a"], self.__dict__.get("a")
        copy.update(a=1)
"""
    assert list(written(ast.parse(source))) == [7, 10, 11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("name", house())
def test_nobody_writes_behind_an_object(name: str):
    module = house()[name]
    found = [f"{module.where}:{line}" for line in written(module.tree)]
    assert not found, "set fields by their names, not in `__dict__`:\n" + "\n".join(found)
