"""Cache files that somebody else has written: header and tensors changed, the digest made anew or left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.hf.saving import sealed


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, whatever its digest."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kvfold"])
    return header, load_file(path)


def write(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A file with the digest of its content."""
    path.unlink(missing_ok=True)
    sealed.write_sealed(path, header, tensors)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object], *, sealed: bool = True) -> None:
    """The same file with what `change` does to its header and tensors."""
    header, tensors = parts(path)
    change(header, tensors)
    if sealed:
        write(path, header, tensors)
    else:
        save_file(tensors, path, metadata={"kvfold": json.dumps(header)})
