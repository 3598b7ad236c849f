"""What a short look at a model tells: found once for each model, and kept on disk under a sample of its weights.

The files lie in `probes` of the user's folder of artefacts. `KVFOLD_PROBES=off`: none is read or written.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from kvfold.artefacts import Artefact, load, name_of, save, text_config, user_folder
from kvfold.artefacts.weights import sample

Scores = tuple[tuple[float, ...], ...]

PROBES = {"copying": "kvfold.probes.copying:copying_heads"}
"""Measurements that take a short prompt: functions of a model, by where they are, in rooms that run models."""
VERSION = 1
"""Of what they measure: a number that changes has every model measured anew."""
NOT_KEPT = "what the probe {} finds is not kept, the next process looks again; KVFOLD_ARTEFACTS names another folder"
_found: WeakKeyDictionary[Any, dict[str, "Probed"]] = WeakKeyDictionary()
_probing = RLock()


@dataclass(frozen=True)
class Probed:
    """What a measurement found, and the seconds that it took, in this process or before."""

    scores: Scores
    seconds: float


def probe(name: str, model: Any) -> Scores:
    """What the measurement `name` of `PROBES` finds on `model`: made once for each model, or read from disk.

    Weights that change in place are not noticed; a copy of the model is looked at anew.
    """
    with _probing:
        found = _found.setdefault(model, {})
        if name not in found:
            found[name] = _kept(name, model)
        return found[name].scores


def probe_seconds(model: Any) -> dict[str, float]:
    """Seconds that each measurement of this model took when it was made, by name; none where none was asked for."""
    return {name: found.seconds for name, found in _found.get(model, {}).items()}


def probe_note(seconds: Mapping[str, float]) -> str:
    """What is to be said beside timings, which have no probe in them; nothing where there was none."""
    parts = ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
    return f"Once for this model, and in no time here: the probe, {parts}." if parts else ""


def _kept(name: str, model: Any) -> Probed:
    key = None if os.environ.get("KVFOLD_PROBES") == "off" else _key(name, model)
    if key is None:
        return _measured(name, model)
    try:
        path = _file(name, key)
        if path.is_file():
            return _read(path, key)
    except ValueError as error:
        _say(f"what the probe {name} found before is damaged, so it looks again: {error}")
    except (OSError, RuntimeError) as error:
        _say(f"{NOT_KEPT.format(name)}: {error}")
        return _measured(name, model)
    probed = _measured(name, model)
    about = {"fingerprint": key, "name": name_of(model)}
    try:
        save(Artefact(name, about, {"scores": probed.scores}, {"seconds": probed.seconds}), path)
    except OSError as error:
        _say(f"{NOT_KEPT.format(name)}: {error}")
    return probed


def _file(name: str, key: str) -> Path:
    """Where it lies. Raises OSError, or pathlib's RuntimeError, where there is no home folder."""
    folder = user_folder()
    if not folder.is_absolute() and "KVFOLD_ARTEFACTS" not in os.environ:
        raise OSError("there is no home folder")
    return folder / "probes" / f"{name}-{key}.json"


def _measured(name: str, model: Any) -> Probed:
    start = time.perf_counter()
    scores = resolve_name(PROBES[name])(model)
    return Probed(scores, time.perf_counter() - start)


def _key(name: str, model: Any) -> str | None:
    """What tells a model from its fine-tunes: its text's config and a sample of all weights.

    None where that is not known: weights that are elsewhere (offloaded), or under adapters that can be switched.
    """
    if any(weight.is_meta for weight in model.parameters()) or any(hasattr(m, "base_layer") for m in model.modules()):
        return None
    config = text_config(model).to_dict()
    fields = {key: config[key] for key in config.keys() - {"_name_or_path", "transformers_version"}}
    digest = hashlib.sha256(json.dumps([name, VERSION, fields], sort_keys=True, default=str).encode())
    sample(digest, model)
    return digest.hexdigest()[:32]


def _read(path: Path, key: str) -> Probed:
    """What lies in a file. ValueError for one that is damaged."""
    kept = load(path)
    scores, seconds = kept.data.get("scores"), kept.provenance.get("seconds", math.nan)
    rows = scores if isinstance(scores, list) and all(isinstance(row, list) for row in scores) else []
    numbers = [seconds, *(number for row in rows for number in row)]
    whole = all(type(number) is float and math.isfinite(number) and number >= 0 for number in numbers)
    if not whole or kept.model["fingerprint"] != key or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(f"{os.fspath(path)!r} is damaged")
    return Probed(tuple(tuple(row) for row in rows), seconds)


def _say(text: str) -> None:
    logging.getLogger("kvfold").warning("%s", text)
