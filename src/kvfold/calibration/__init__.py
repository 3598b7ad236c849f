"""Calibrations: what methods need to know of a model, measured by running it. `calibrate` makes an artefact."""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from kvfold import __version__
from kvfold.artefacts import Artefact, fingerprint, name_of, text_config
from kvfold.calibration.codebooks import a2ats_codebooks
from kvfold.calibration.duo import train_gates
from kvfold.calibration.elite import elitekv_tensors
from kvfold.calibration.errors import compresskv_tables
from kvfold.calibration.gate import train_attention_gates
from kvfold.calibration.heads import headkv_tables
from kvfold.calibration.importance import train_importance
from kvfold.calibration.less import train_feature_maps
from kvfold.calibration.levels import kvquant_levels
from kvfold.calibration.memory import memory_table
from kvfold.calibration.moments import turboquant_basis
from kvfold.calibration.razor import razor_tables
from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import epicache_tables
from kvfold.hf.cache import Cache

CALIBRATIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "a2ats": a2ats_codebooks,
    "attention-gate": train_attention_gates,
    "compresskv": compresskv_tables,
    "duoattention": train_gates,
    "elitekv": elitekv_tensors,
    "epicache": epicache_tables,
    "headkv": headkv_tables,
    "kvquant": kvquant_levels,
    "less": train_feature_maps,
    "memory": memory_table,
    "nosa": train_importance,
    "razorattention": razor_tables,
    "turboquant": turboquant_basis,
}
"""What measures, by the slug of the method that needs it; "memory" is what `Cache(memory=)` chooses formats by."""
TRAINED = {"a2ats", "attention-gate", "elitekv", "kvquant", "less", "nosa", "turboquant"}
"""Those that give tensors, which lie in safetensors files."""


def calibrate(method: str, run: Run, name: str | None = None) -> Artefact:
    """Measure what `method` needs of `run.model`, called `name` in the artefact. ValueError for other methods."""
    if method not in CALIBRATIONS:
        raise ValueError(f"method={method!r} needs no calibration; those that do: {', '.join(CALIBRATIONS)}")
    run = replace(run, about={})  # each calibration says there what it did
    paged = [core.layer for core in Cache(run.model, "full").paged]
    if not paged:
        raise ValueError(f"model={type(run.model).__name__} has no layer with full attention: nothing to measure")
    torch.manual_seed(run.seed)
    data = {table: _rounded(numbers) for table, numbers in CALIBRATIONS[method](run).items()}
    config = text_config(run.model)
    about = {
        "fingerprint": fingerprint(run.model),
        "name": name or name_of(run.model),
        "layers": len(paged),
        "layer_indices": paged,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "query_heads": config.num_attention_heads,
    }
    provenance = {
        "command": " ".join(["kvfold", *sys.argv[1:]]),
        "versions": {"kvfold": __version__, "transformers": version("transformers"), "torch": version("torch")},
        "texts": [title for title, _ in run.texts],
        "seed": run.seed,
        "date": datetime.now(UTC).date().isoformat(),
        **run.about,
    }
    return Artefact(method, about, data, provenance)


def _rounded(numbers: Any) -> Any:
    """Lists of numbers with five digits: more would be noise. Tensors and names as they are."""
    if isinstance(numbers, torch.Tensor | str):
        return numbers
    return [_rounded(n) for n in numbers] if isinstance(numbers, list) else float(f"{numbers:.5g}")


__all__ = ["CALIBRATIONS", "TRAINED", "Run", "calibrate"]
