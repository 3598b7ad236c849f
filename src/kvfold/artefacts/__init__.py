"""Artefacts: numbers that a method needs of a model, measured once by `kvfold calibrate` and kept as JSON.

    {"format": 1, "method": "headkv", "model": {"fingerprint", "name", "layers", "kv_heads", "query_heads"},
     "data": {...tables, a list for each paged layer...}, "provenance": {"command", "versions", "seed", "date", ...}}

`find` looks at the path it is given, else in the user's folder (`$KVFOLD_ARTEFACTS`, else `artefacts` in the user's
data folder), else among those that ship, for the method and the model's fingerprint.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import platformdirs

FORMAT = 1
FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "layer_types", "sliding_window", "rope_parameters", "rope_theta", "rope_scaling",
    "partial_rotary_factor",
)  # fmt: skip
"""Fields of a text config that decide which heads there are and how they tell positions apart."""


@dataclass(frozen=True)
class Artefact:
    """What was measured for one method and one model; `data` holds tables by name."""

    method: str
    model: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]


def text_config(model: Any) -> Any:
    """The part of a model's config that describes the text decoder."""
    return model.config.get_text_config(decoder=True)


def fingerprint(model: Any) -> str:
    """16 hex digits of the SHA-256 of the config's architecture and RoPE fields; fine-tunes of a model share it."""
    config = text_config(model)
    fields = {name: getattr(config, name, None) for name in FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    """Write an artefact, under a temporary name first; returns where. None: into the user's folder."""
    if path is None:
        stem = re.sub(r"[^\w.-]+", "-", artefact.model["name"])
        path = user_folder() / artefact.method / f"{stem}-{artefact.model['fingerprint']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(artefact)}, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a layer is a line
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def load(path: str | os.PathLike[str]) -> Artefact:
    """Read an artefact. Raises ValueError for a file that is none, and for one of another format."""
    here = f"calibration={os.fspath(path)!r}"
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{here} is not a calibration file: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise ValueError(f"{here} has format {version!r}; this kvfold reads {FORMAT}")
    parts = {part: found.get(part) for part in ("method", "model", "data", "provenance")}
    wrong = [part for part, value in parts.items() if not isinstance(value, str if part == "method" else dict)]
    if wrong or not isinstance(found["model"].get("fingerprint"), str):
        raise ValueError(f"{here} lacks {wrong[0] if wrong else 'model.fingerprint'}")
    return Artefact(found["method"], found["model"], found["data"], found["provenance"])


def find(method: str, model: Any, path: str | os.PathLike[str] | None = None) -> Artefact:
    """What was measured for `method` on `model`. Raises ValueError that names what is missing, and how to make it."""
    name, key = name_of(model), fingerprint(model)
    if path is not None:
        found = load(path)
        if found.method != method:
            raise ValueError(f"calibration={os.fspath(path)!r} is for {found.method}, not for {method}")
        if found.model["fingerprint"] != key:
            raise ValueError(
                f"calibration={os.fspath(path)!r} was made on {found.model.get('name')!r} (fingerprint "
                f"{found.model['fingerprint']}); this model is {name!r} ({key}): {command(method, name)}"
            )
        return found
    for place in _candidates(method):
        found = _read(str(place), place.stat().st_mtime_ns)
        if found.method == method and found.model["fingerprint"] == key:
            return found
    raise ValueError(
        f"{method} has no calibration for {name!r} (fingerprint {key}); make one: {command(method, name)}, "
        "or name a file: calibration='path.json'"
    )


@lru_cache(maxsize=256)
def _read(path: str, written: int) -> Artefact:
    """`load`, once for each state of a file."""
    return load(path)


def _candidates(method: str) -> Iterator[Path]:
    yield from sorted((user_folder() / method).glob("*.json"))
    yield from (path for path in shipped() if path.parent.name == method)


def shipped() -> list[Path]:
    """The artefacts that come with kvfold."""
    return sorted(Path(str(files("kvfold.artefacts"))).glob("*/*.json"))


__all__ = [
    "Artefact",
    "command",
    "find",
    "fingerprint",
    "load",
    "name_of",
    "save",
    "shipped",
    "text_config",
    "user_folder",
]
