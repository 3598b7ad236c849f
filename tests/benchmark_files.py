"""Real benchmark files for tests that want them; they are no part of the project."""

import os
from pathlib import Path

import pytest


def benchmark_file(name: str) -> Path:
    """A file of the folder that KVFOLD_DATA names, else of `shared/data` beside the checkout; skips without it."""
    folder = os.environ.get("KVFOLD_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"needs the benchmark file {name} (folder in KVFOLD_DATA)")
    return path
