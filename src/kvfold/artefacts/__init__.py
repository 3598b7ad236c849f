"""Artefacts: what a method needs of a model, measured or trained once by `kvfold calibrate` and kept in a file.

    {"format": 1, "method": "headkv", "model": {"fingerprint", "name", "layers", "kv_heads", "query_heads"},
     "data": {...tables, a list for each paged layer...}, "provenance": {"command", "versions", "seed", "date", ...}}

Tables are JSON. Weights are tensors: a safetensors file, `data` its tensors and the rest its header "kvfold".

`find` looks at the path it is given, else in the user's folder (`$KVFOLD_ARTEFACTS`, else `artefacts` in the user's
data folder), else among those that ship, for the method and the model's fingerprint. What a short look at the model
tells: `probed.py`.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import platformdirs

from kvfold.artefacts.fields import artefact_fields, text_config
from kvfold.files import check_format, check_regular, parse_json, read_json, write_whole
from kvfold.options import shown

FORMAT = 1
SLUG = r"[A-Za-z0-9][\w-]*"
"""What methods are called."""
TABLES, TENSORS, SHIPPED = ".json", ".safetensors", "shipped:"


@dataclass(frozen=True)
class Artefact:
    """What was measured for one method and one model; `data` holds tables by name, or tensors."""

    method: str
    model: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]


def fingerprint(model: Any) -> str:
    """16 hex digits of the SHA-256 of the config's architecture and RoPE fields; fine-tunes of a model share it."""
    fields = json.dumps(artefact_fields(model), sort_keys=True, default=str)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


def command(method: str, name: str) -> str:
    """The command that measures what `method` needs of the model `name`."""
    return f"kvfold calibrate {method} --model {name}"


def name_of(model: Any) -> str:
    """What the model was loaded as: the last part of its path or id, else its class."""
    return Path(str(getattr(model.config, "_name_or_path", "") or "")).name or type(model).__name__


def user_folder() -> Path:
    """Where `save` puts an artefact unless told: `$KVFOLD_ARTEFACTS`, else in the user's data folder."""
    given = os.environ.get("KVFOLD_ARTEFACTS")
    return Path(given).expanduser() if given else Path(platformdirs.user_data_dir("kvfold")) / "artefacts"


def save(artefact: Artefact, path: Path | None = None) -> Path:
    """Write an artefact, whole or not at all; returns where. None: into the user's folder, by its method's name."""
    if path is None:
        check_method(artefact.method)
        stem = re.sub(r"[^\w.-]+", "-", f"{artefact.model['name']}-{artefact.model['fingerprint']}")
        path = user_folder() / artefact.method / f"{stem}{suffix_of(artefact)}"
    if path.suffix != suffix_of(artefact):
        raise ValueError(f"path={os.fspath(path)!r} must end in {suffix_of(artefact)} for {artefact.method}")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "method": artefact.method, "model": artefact.model}
    content: bytes
    if suffix_of(artefact) == TENSORS:
        from safetensors.torch import save as written

        header = json.dumps({**about, "provenance": artefact.provenance}, ensure_ascii=False)
        content = written(artefact.data, metadata={"kvfold": header})
    else:
        text = json.dumps(
            {**about, "data": artefact.data, "provenance": artefact.provenance}, indent=1, ensure_ascii=False
        )
        text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a layer is a line
        content = f"{text}\n".encode()
    write_whole(path, content)
    return path


def check_method(method: str) -> None:
    """Raise ValueError unless an artefact's method is a slug: it becomes the name of a folder."""
    if not re.fullmatch(SLUG, method):
        raise ValueError(f"method={shown(method)} of an artefact must be letters, digits, - and _")


def suffix_of(artefact: Artefact) -> str:
    """How the name of its file ends."""
    return TABLES if not any(hasattr(value, "dtype") for value in artefact.data.values()) else TENSORS


def load(path: str | os.PathLike[str]) -> Artefact:
    """Read an artefact. Raises ValueError for a file that is none, and for one of another format."""
    here, tensors = f"calibration={os.fspath(path)!r}", None
    try:
        place = Path(path).expanduser()
        if place.suffix == TENSORS:
            found, tensors = _tensors(place)
        else:
            found = read_json(place, "it")
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError("it has no number of a format")
    except (OSError, ValueError, RuntimeError) as error:  # the last: a home folder that is not
        raise ValueError(f"{here} is not a calibration file: {error}") from None
    check_format(found["format"], FORMAT, here)
    found = found if tensors is None else {**found, "data": tensors}
    parts = {part: found.get(part) for part in ("method", "model", "data", "provenance")}
    wrong = [part for part, value in parts.items() if not isinstance(value, str if part == "method" else dict)]
    if wrong or not isinstance(found["model"].get("fingerprint"), str):
        raise ValueError(f"{here} lacks {wrong[0] if wrong else 'model.fingerprint'}")
    if not re.fullmatch(SLUG, found["method"]):
        raise ValueError(f"{here} is for method={shown(found['method'])}, which is no method's name")
    return Artefact(found["method"], found["model"], found["data"], found["provenance"])


def _tensors(path: Path) -> tuple[Any, dict[str, Any]]:
    """Header and tensors of a safetensors file. ValueError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            header, names = (file.metadata() or {}).get("kvfold", "null"), file.keys()
            return parse_json(header, "its header"), {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def find(method: str, model: Any, path: str | os.PathLike[str] | None = None) -> Artefact:
    """What was measured for `method` on `model`. Raises ValueError that names what is missing, and how to make it."""
    return locate(method, model, path)[1]


def has(method: str, model: Any) -> bool:
    """Whether something was measured for `method` on `model`."""
    return next(_measured(method, fingerprint(model)), None) is not None


def locate(method: str, model: Any, path: str | os.PathLike[str] | None = None) -> tuple[str, Artefact]:
    """`find`, and where: a path, or "shipped:NAME", which another kvfold has, too, and which may be given as `path`."""
    name, key = name_of(model), fingerprint(model)
    if path is not None:
        found = read(method, os.fspath(path))
        if found.method != method:
            raise ValueError(f"calibration={os.fspath(path)!r} is for {found.method}, not for {method}")
        if found.model["fingerprint"] != key:
            raise ValueError(
                f"calibration={os.fspath(path)!r} was made on {found.model.get('name')!r} (fingerprint "
                f"{found.model['fingerprint']}); this model is {name!r} ({key}): {command(method, name)}"
            )
        return os.fspath(path), found
    damaged: list[str] = []
    for place, found in _measured(method, key, damaged):
        return f"{SHIPPED}{place.stem}" if place in shipped() else str(place), found
    beside = f"; passed over: {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"{method} has no calibration for {name!r} (fingerprint {key}); make one: {command(method, name)}, "
        f"or name a file: calibration='path.json'{beside}"
    )


def read(method: str, path: str) -> Artefact:
    """What lies where `locate` said; a file is read once for each of its states."""
    place = _place(method, path)
    return _read(str(place), place.stat().st_mtime_ns) if place.is_file() else load(path)


def _place(method: str, path: str | os.PathLike[str]) -> Path:
    """The file that `path` names: a path, or "shipped:NAME"."""
    name = os.fspath(path).removeprefix(SHIPPED)
    if name == os.fspath(path):
        return Path(path).expanduser()
    return next((each for each in shipped() if (each.parent.name, each.stem) == (method, name)), Path(path))


def is_ours(method: str, path: str) -> bool:
    """Whether what `locate` says names what ships, or what lies in the user's folder, and not any other file."""
    if path.startswith(SHIPPED):
        return _place(method, path) in shipped()
    return Path(path).is_absolute() and Path(path).resolve().is_relative_to(user_folder().resolve())


@lru_cache(maxsize=256)
def _read(path: str, written: int) -> Artefact:
    """`load`, once for each state of a file."""
    return load(path)


def _measured(method: str, key: str, damaged: list[str] | None = None) -> Iterator[tuple[Path, Artefact]]:
    """What was measured for a method on models of one fingerprint, and where it lies: the user's, then what ships.

    A file that can't be read, and is not named for these models, is none of theirs: it is passed over, with a warning
    of the logger "kvfold". What is wrong with each comes into `damaged`. Raises ValueError for one that is theirs.
    """
    for place in _candidates(method):
        try:
            found = _read(str(place), place.stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            if key in place.name:
                raise ValueError(f"{error}; remove it, or measure again") from None
            logging.getLogger("kvfold").warning("%s; passed over", error)
            if damaged is not None:
                damaged.append(str(error))
            continue
        if found.method == method and found.model["fingerprint"] == key:
            yield place, found


def _candidates(method: str) -> Iterator[Path]:
    yield from sorted(path for path in (user_folder() / method).glob("*") if path.suffix in (TABLES, TENSORS))
    yield from (path for path in shipped() if path.parent.name == method)


def shipped() -> list[Path]:
    """The artefacts that come with kvfold."""
    found = Path(str(files("kvfold.artefacts"))).glob("*/*")
    return sorted(path for path in found if path.suffix in (TABLES, TENSORS))


__all__ = [
    "Artefact",
    "command",
    "find",
    "fingerprint",
    "has",
    "is_ours",
    "load",
    "locate",
    "name_of",
    "read",
    "save",
    "shipped",
    "suffix_of",
    "text_config",
    "user_folder",
]
