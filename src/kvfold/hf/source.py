"""What a model's code does with the name of its attention, its keys and its mask: read, not run.

kvfold puts a function under a name of its own in the place of "sdpa". Code that asks for the name does something else
then, and code that changes the keys or the mask on their way gives that function what it can't work with. Both stand in
the source, which is read before anything is set. Code without a source says nothing here: `Cache` notices at its first
call what it can.
"""

import ast
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

NAME = "kvfold"
"""The name under which kvfold's attention is known to transformers."""
LIKE = "sdpa"
"""The implementation that stands in for."""
ASKED = "attn_implementation"
"""What every attribute and variable that holds the name is called, with more in front."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""transformers' table of attention functions."""
TABLES = ("ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS")
"""Tables that know ours."""
EXPAND = "expand_kv"
"""The method that makes heads of a latent (MLA), between cache and attention."""
HARMLESS = {"_maybe_slice_kv_shared_inputs": "runs before layers that share keys and values, which are refused anyhow"}
"""Functions whose answer does not matter, and why."""
OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
    ast.Is: lambda one, other: one == other,
    ast.IsNot: lambda one, other: one != other,
}


@dataclass(frozen=True)
class Question:
    """A place where code asks for the name of the attention."""

    where: str
    """Class and function, `Attention.forward`."""
    text: str
    """The expression."""
    differs: bool | None
    """Whether it has another answer for "kvfold" than for "sdpa"; None: that can't be told."""


def questions(source: str) -> list[Question]:
    """Every place in a file where the name is compared or looked up; not in constructors, which run before kvfold."""
    if ASKED not in source:
        return []
    return [
        Question(where, ast.unparse(node), _differs(node, known))
        for where, function in _functions(ast.parse(source))
        if not where.endswith(".__init__")
        for known in [_aliases(function)]
        for node in ast.walk(function)
        if isinstance(node, ast.expr) and any(_named(part, known) for part in _asked(node))
    ]


def _aliases(function: ast.AST) -> set[str]:
    """Variables that hold the name."""
    return {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and _named(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _named(node: ast.expr, known: set[str]) -> bool:
    """Whether an expression is the name: `self.config._attn_implementation`, or a variable that holds it."""
    said = str(getattr(node, "attr", getattr(node, "id", "")))
    return said.endswith(ASKED) or (isinstance(node, ast.Name) and said in known)


def _asked(node: ast.expr) -> tuple[ast.expr, ...]:
    """What an expression asks something about: compared, looked up in a table, asked how it begins."""
    if isinstance(node, ast.Compare):
        return (node.left, *node.comparators)
    if isinstance(node, ast.Subscript) and not ast.unparse(node.value).startswith(TABLES):
        return (node.slice,)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("startswith", "endswith"):
            return (node.func.value,)
        if node.func.attr == "get" and not ast.unparse(node.func).startswith(TABLES):
            return tuple(node.args[:1])
    return ()


def _differs(node: ast.expr, known: set[str]) -> bool | None:
    """Whether a question comes out otherwise for our name than for the one that ours stands in for."""
    if isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and node.args and _named(node.args[0], known)):
        return True  # a table that does not know ours
    try:
        if isinstance(node, ast.Compare):
            (op,), sides = node.ops, (node.left, *node.comparators)
            compare = OPERATORS[type(op)]
            ours, theirs = (
                [name if _named(side, known) else ast.literal_eval(side) for side in sides] for name in (NAME, LIKE)
            )
            return bool(compare(*ours) != compare(*theirs))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        parts = [ast.literal_eval(part) for part in node.args]
        return bool(getattr(NAME, node.func.attr)(*parts) != getattr(LIKE, node.func.attr)(*parts))
    except (KeyError, ValueError, TypeError):  # another operator, more than literals
        return None


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods of a file, by name; what stands inside another belongs to that."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


@lru_cache(maxsize=64)
def _questions_of(module: str) -> tuple[Question, ...]:
    try:
        return tuple(questions(inspect.getsource(sys.modules[module])))
    except (OSError, TypeError, KeyError):
        return ()


MODELS = "transformers.models."


def _is_a_models(module: str) -> bool:
    """Whether a file is a model's own: what all models share knows of other implementations."""
    return module.startswith(MODELS) or module.split(".")[0] not in (
        "builtins",
        "torch",
        "transformers",
    )


def changed_by_name(classes: Iterable[type]) -> Question | None:
    """The first question in the code of these classes that kvfold would answer anew.

    In a file of transformers' models the functions beside them count, too.

    A class that other code builds on brings its bases.
    """
    lines = [base for cls in classes for base in cls.__mro__]
    names = {(base.__module__, base.__name__) for base in lines}
    for module in dict.fromkeys(base.__module__ for base in lines if _is_a_models(base.__module__)):
        for question in _questions_of(module):
            owner, dot, function = question.where.partition(".")
            beside = not dot and module.startswith(MODELS)  # a script of one's own has functions that no model calls
            if question.differs and (beside or (module, owner) in names) and function not in HARMLESS:
                return question
    return None


# -- on the way from the cache to the attention function -----------------------------------------------------


@lru_cache(maxsize=256)
def unfit(cls: Any) -> str | None:
    """Why kvfold's attention function can't work in an attention module of this class; None: no reason is seen."""
    forward: Any = getattr(cls, "forward", None)
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return None
    return unfit_forward(function)


def unfit_forward(function: ast.FunctionDef) -> str | None:
    """The same for the text of its forward."""
    if not any(isinstance(node, ast.Call) and _stores(node) for node in ast.walk(function)):
        return None  # it leaves the work to others
    assigned = [(node, names) for node in function.body for names in [_assigned(node)] if names]
    interfaces = {name for node, names in assigned if INTERFACE in ast.unparse(node) for name in names}
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) in interfaces]
    if not interfaces:
        return "does not go through transformers' AttentionInterface"
    if sum(_top(function, call) for call in calls) > 1:
        return "attends twice with the keys of one update, as differential attention does"
    stored = max(node.lineno for node in ast.walk(function) if isinstance(node, ast.Call) and _stores(node))
    parameters = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    for call in calls:
        mask, key = _argument(call, 4, "attention_mask"), _argument(call, 2, "key")
        for node, names in assigned:
            text = ast.unparse(node)
            if mask in names and mask not in parameters and ".get(" not in text:
                return f"attends with a mask of its own making ({mask})"
            if key in names and node.lineno > stored and f".{EXPAND}(" not in text:
                return f"changes the keys between cache and attention ({text})"
    return None


def _stores(call: ast.Call) -> bool:
    """Whether a call updates a cache."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "update"


def _assigned(node: ast.stmt) -> set[str]:
    """Names that a statement gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {ast.unparse(x) for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])}


def _top(function: ast.FunctionDef, call: ast.Call) -> bool:
    """Whether a call is always made: it stands in no branch."""
    return any(call in ast.walk(node) for node in function.body if not isinstance(node, ast.If))


def _argument(call: ast.Call, place: int, name: str) -> str | None:
    """What an argument is, as text."""
    given = {word.arg: word.value for word in call.keywords}
    node = call.args[place] if len(call.args) > place else given.get(name)
    return None if node is None else ast.unparse(node)


__all__ = ["EXPAND", "Question", "changed_by_name", "questions", "unfit", "unfit_forward"]
