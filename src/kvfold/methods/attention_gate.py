"""Attention-Gate: a small attention in front of each layer's own says which tokens it may see (arXiv:2410.12876)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold import artefacts, ops
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_number
from kvfold.views import HiddenView


@method(
    "attention-gate", title="Attention-Gate", paper="2410.12876", kind="evict",
    formula=r"""
        G = \sigma(\mathrm{MHA}'(X) W_g + b_g)
        K_{l,h} = \lbrace t : G_{t,l,h} \gt \tau \rbrace
    """,
    options={"threshold": "gates above it let a token in (tau)"},
)  # fmt: skip
@dataclass(frozen=True)
class AttentionGate(Method):
    """One flag for each token and KV head, by trained gates that read a prompt before each layer attends.

    Queries see the tokens whose flag is set and themselves; only those are stored, at their own positions. Generated
    tokens are kept (reconstructed). The gates read the states that enter the attention module, after its norm, causally
    and without positions, so that later tokens change no flag (reconstructed). Of a prompt in chunks, and on a further
    turn, they read the new tokens alone: they have no cache. No budget: how much stays is what
    `kvfold calibrate attention-gate` trained for, 0.4. `calibration` names the gates' file; a cache sets it.
    Differs from the paper, of which no code is public and of which the module's exact shape is reconstructed: a flag
    for each KV head, not query head; the states are brought to unit mean square first; float32.
    """

    threshold: float = 0.5
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0.0, 1.0)

    def bind(self, model: Any) -> "AttentionGate":
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        Gate.of(found.data, 0)
        return replace(self, calibration=where)

    def admit(self, view: HiddenView) -> Bool[Tensor, "B H Q"]:
        data = bound_data(self.info.slug, self.calibration, "trained gates")
        gate = Gate.of(data, view.place.ordinal, view.states.device)
        scale = gate.wq.shape[1] ** -0.5
        return gate(view.states, lambda q, k, v: ops.causal_rows(q, k, v, view.valid, scale)[0]) > self.threshold


PARTS = {"wq": 4, "wk": 4, "wv": 4, "wg": 4, "bg": 2}
"""The tensors of all layers' gates, with their axes: a layer, then those of `Gate`."""


@dataclass(frozen=True)
class Gate:
    """The gate of one layer: N heads of size E that read states of size C, and a linear map to H flags."""

    wq: Float[Tensor, "N E C"]
    wk: Float[Tensor, "N E C"]
    wv: Float[Tensor, "N E C"]
    wg: Float[Tensor, "H N E"]
    bg: Float[Tensor, " H"]

    @classmethod
    def of(cls, data: dict[str, Any], ordinal: int, device: torch.device | None = None) -> "Gate":
        """Layer `ordinal`'s, in float32. Raises ValueError for an artefact that lacks a part."""
        for name, axes in PARTS.items():
            part = data.get(name)
            if not isinstance(part, Tensor) or part.dim() != axes or ordinal >= len(part):
                raise ValueError(f"the calibration of attention-gate lacks {name!r} of layer {ordinal} on pages")
        shapes = {name: tuple(data[name].shape[1:]) for name in PARTS}
        heads, size = shapes["wq"][:2]
        if len({shapes[name] for name in ("wq", "wk", "wv")}) != 1 or shapes["wg"] != (*shapes["bg"], heads, size):
            raise ValueError(f"the calibration of attention-gate has parts that do not fit together: {shapes}")
        return cls(*(data[name][ordinal].to(device, torch.float32) for name in cls.__dataclass_fields__))

    def __call__(
        self, states: Float[Tensor, "B Q C"], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Float[Tensor, "B H Q"]:
        """How far each token's gate is open, 0 to 1; `attend` is causal attention of (B, N, Q, E)."""
        x = F.rms_norm(states.float(), states.shape[-1:])
        q, k, v = (torch.einsum("bqc,nec->bnqe", x, w) for w in (self.wq, self.wk, self.wv))
        return torch.sigmoid(torch.einsum("bnqe,hne->bhq", attend(q, k, v), self.wg) + self.bg[:, None])
