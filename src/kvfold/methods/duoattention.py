"""DuoAttention: retrieval heads keep all tokens, streaming heads sinks and a recent window (arXiv:2410.10819)."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvfold.methods._calibrated import Table, check_table, filled, table_of
from kvfold.methods.base import Method, method
from kvfold.options import check_int, check_number
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

ROLES = "duoattention_roles"


@method(
    "duoattention", title="DuoAttention", paper="2410.10819", kind="pattern",
    formula=r"""
        \mathrm{whole}_{l,h} \iff \alpha_{l,h} \ge Q_\sigma(\alpha)
        K_{l,h} = \lbrace t : t \lt s \rbrace \cup \lbrace t : t \ge n - r \rbrace \quad \text{otherwise}
    """,
    options={
        "sparsity": "share of the heads that stream (sigma)",
        "sinks": "first tokens that a streaming head keeps (s)",
        "recent": "last tokens that a streaming head keeps (r)",
        "gates": "the gate of each KV head, a row a layer (alpha); None: from the calibration",
    },
)  # fmt: skip
@dataclass(frozen=True)
class DuoAttention(Method):
    """A learned gate for each KV head says which read the whole text; the `sparsity` share with the lowest stream.

    Streaming heads hold the first `sinks` and the last `recent` tokens, after every chunk of a prompt and after
    every generated token, at their own positions; a first chunk is attended in full. `gates` come from
    `kvfold calibrate duoattention`, or from the paper's `full_attention_heads.tsv` given as `calibration`. No budget:
    memory follows from sparsity, and retrieval heads grow.
    Differs from the paper: gates that tie go to the earlier head, where the paper draws lots; heads stay in
    their order, since pages hold rows of any length.
    """

    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256
    gates: Table | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, 0.0, 1.0)
        check_int("sinks", self.sinks, 0)
        check_int("recent", self.recent, 1)
        check_table("gates", self.gates)

    def bind(self, model: Any) -> "DuoAttention":
        if self.gates is None and self.calibration is not None and self.calibration.endswith(".tsv"):
            return replace(self, gates=published(self.calibration), calibration=None)
        return filled(self, model, {"gates": "gates"})

    def after_prefill(self, view: LayerView) -> Keep:
        roles, key = view.place.step.setdefault(ROLES, {}), (self, view.valid.device)
        if key not in roles:  # once for the layers of a pass
            found = retrieval_heads(table_of(self, view, "gates", view.heads), float(self.sparsity))
            roles[key] = torch.tensor(found, device=view.valid.device, dtype=torch.bool)  # L H
        whole = roles[key][view.place.ordinal]
        near = (view.rank < self.sinks) | view.last(self.recent)
        return Keep(view.valid & (whole[:, None] | near))

    after_decode = after_prefill


@lru_cache(maxsize=64)
def retrieval_heads(gates: Table, sparsity: float) -> tuple[tuple[bool, ...], ...]:
    """Heads whose gate is at or above the `sparsity` quantile (linear interpolation) of all gates; 1.0 leaves none."""
    if sparsity == 1.0:
        return tuple((False,) * len(row) for row in gates)
    clipped = np.clip(np.asarray(gates, dtype=np.float64), 0.0, 1.0)
    untied = clipped + 1e-6 * (1.0 - np.arange(clipped.size).reshape(clipped.shape) / clipped.size)
    chosen = untied >= np.quantile(untied, sparsity)
    return tuple(tuple(bool(head) for head in row) for row in chosen)


def published(path: str) -> Table:
    """The gates of a `full_attention_heads.tsv`: a line for each layer, a number for each KV head."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
        gates = tuple(tuple(float(gate) for gate in line.split("\t")) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise ValueError(f"calibration={path!r} is not a table of gates: {error}") from None
    check_table("gates", gates)
    return gates
