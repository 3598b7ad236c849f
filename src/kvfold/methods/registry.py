"""Finding methods: every file of this folder, the entry points `kvfold.methods`, and the text form of a composition."""

import ast
import importlib
import logging
import pkgutil
import re
import traceback
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from kvfold.methods.base import Method, MethodInfo, Pipeline, registry
from kvfold.options import shown

_STAGE = re.compile(r"\s*([A-Za-z0-9][\w-]*)\s*(\(.*\))?\s*", re.DOTALL)


@cache
def _scan() -> None:
    package = importlib.import_module("kvfold.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in ("base", "events", "registry", "scored") and not module.name.startswith("_"):
            importlib.import_module(f"kvfold.methods.{module.name}")
    _broken.clear()
    for entry in entry_points(group="kvfold.methods"):
        before = dict(registry)
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # whatever another package does when it is imported
            registry.clear()
            registry.update(before)  # half a package is none
            _broken[entry.name] = _blame(entry, error)
            logging.getLogger("kvfold").warning("%s; its methods are left out", _broken[entry.name])


_broken: dict[str, str] = {}


def _blame(entry: EntryPoint, error: BaseException) -> str:
    """Which package it is, what happened, and in which line of which file."""
    ours = str(Path(__file__).parents[1])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((ours, "<"))]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "no file"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    of = f" of {dist.name}" if (dist := getattr(entry, "dist", None)) else ""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"the plugin {entry.name!r} = {entry.value!r}{of} can't be imported: {what} ({place})"


def broken_plugins() -> list[str]:
    """What is wrong with each installed package that offers methods and can't be imported: name, error, file, line."""
    _scan()
    return list(_broken.values())


def list_methods() -> list[MethodInfo]:
    """All methods, by slug: built in, and those that installed packages offer as entry points `kvfold.methods`.

    A package that can't be imported is left out, and named in a warning of the logger "kvfold".
    """
    _scan()
    return [registry[slug] for slug in sorted(registry)]


def get_method(slug: str) -> MethodInfo:
    """The entry of one method. Raises ValueError that lists what there is."""
    _scan()
    if slug not in registry:
        near = get_close_matches(slug, registry, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        left_out = "".join(f"; {each}" for each in _broken.values())
        raise ValueError(f"method={shown(slug)} is unknown{hint}; there are {', '.join(sorted(registry))}{left_out}")
    return registry[slug]


def make(slug: str, options: dict[str, Any]) -> Method:
    """A method from its slug and options. Raises ValueError that names an unknown option and the allowed ones."""
    info = get_method(slug)
    allowed = [option.name for option in fields(info.cls)]  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise ValueError(f"{slug} has no option {name}={value!r}; its options are: {known}")
    return info.cls(**options)


def parse(method: str | Method, **options: Any) -> Method:
    """A method from an object, a slug, or a text such as `"kvmerger(budget=0.35) | kivi(bits=2)"`.

    `options` go to a single stage; in a composition each to the one stage that has an option of its name. Raises
    ValueError where several have it or none has.
    """
    if isinstance(method, Method):
        if options:
            raise ValueError(f"options {sorted(options)} must be given to {type(method).__name__}(...) itself")
        return method
    if not isinstance(method, str):
        raise ValueError(f"method={method!r} must be a slug, a composition as text, or a Method")
    stages = read_stages(method)
    for name, value in options.items():
        slug, given = stages[0] if len(stages) == 1 else _taker(method, stages, name, value)
        if name in given:
            raise ValueError(f"option {name!r} is given twice for {slug}: in the text and as an argument")
        given[name] = value
    made = [make(slug, given) for slug, given in stages]
    return made[0] if len(made) == 1 else Pipeline(tuple(made))


def read_stages(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Slug and options of each stage of a composition, as its text has them. Raises ValueError for other texts."""
    return [_stage(part) for part in _split(text)]


def _taker(text: str, stages: list[tuple[str, dict[str, Any]]], name: str, value: object) -> tuple[str, dict[str, Any]]:
    """The only stage with an option of this name. Raises ValueError that names the stages."""
    taking = [stage for stage in stages if name in get_method(stage[0]).options]
    if not taking:
        raise ValueError(f"{name}={value!r} fits no stage of {text!r}: {_slugs(stages)} have no such option")
    if len(taking) > 1:
        raise ValueError(
            f"options [{name!r}] belong inside the text of {text!r}: {_slugs(taking)} each have one, and {value!r} "
            "could be for any of them"
        )
    return taking[0]


def _slugs(stages: list[tuple[str, dict[str, Any]]]) -> str:
    return " and ".join(slug for slug, _ in stages)


def _split(text: str) -> list[str]:
    """Cut at each | outside parentheses and quotes."""
    parts, depth, quote, start, escaped = [], 0, "", 0, False
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "|" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _stage(text: str) -> tuple[str, dict[str, Any]]:
    found = _STAGE.fullmatch(text)
    if found is None:
        raise ValueError(f"method={shown(text.strip())} is not of the form slug or slug(option=value, ...)")
    slug, arguments = found[1], found[2] or "()"
    _scan()
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("one pair of parentheses, and | between methods")
        words = [word.arg for word in call.keywords]
        given = _over(slug, call.args, f"f{arguments}")
        if len(call.args) > len(given) or None in words:
            raise ValueError("options are given by name")
        words += list(given)
        if twice := [word for word in words if words.count(word) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        given |= {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: nested too deep to be read
        why = str(error) or "nested too deep"
        if "malformed node" in why:
            why = "a value is a number, a text in quotes, a tuple, True, False or None"
        raise ValueError(f"method={shown(text.strip())}: can't read the options {arguments[:200]} ({why})") from None
    return slug, given


def _over(slug: str, arguments: list[ast.expr], source: str) -> dict[str, Any]:
    """The option `score` of a method over another one, which may stand first and without its name.

    As in `decoding(snapkv(window=16), interval=64)`: a text in quotes, or the other method as it is.
    """
    if not arguments or slug not in registry or "score" not in registry[slug].options:
        return {}
    if isinstance(arguments[0], ast.Constant):
        return {"score": arguments[0].value}
    return {"score": ast.get_source_segment(source, arguments[0])}
