"""EliteKV: a few rotated channels of each key, all else of keys and values in one latent (arXiv:2503.01586)."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import artefacts
from kvfold.formats import Basis, Elite
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_int
from kvfold.rotation import Measured, Rope

BESIDE = "elitekv.safetensors"
"""What `kvfold uptrain` puts beside the weights that it has trained."""


@method(
    "elitekv", title="EliteKV: elite rotary chunks and a joint latent", paper="2503.01586", kind="low-rank",
    formula=r"""
        E_h \leftarrow E_h \cup \arg\min_{i \notin E_h} \sum_{q, t \le q}
            \big| S_{h,q,t}(E_h \cup \{i\}) - S_{h,q,t} \big|
        z_t = P^\top \big[ k^{\bar E}_{h,t} \, ; \, v_{h,t} \big]_{h}, \quad
            \hat k_{h,t} = \big[ R_t k^{E}_{h,t} \, ; \, P^k_h z_t \big], \; \hat v_{h,t} = P^v_h z_t
        \mathrm{ratio} = (2 r H + C) / \big(H (D + D_v)\big)
    """,
    options={"rank": "numbers of the latent of a token (C); None: as many as the calibration has"},
)  # fmt: skip
@dataclass(frozen=True)
class EliteKV(Method):
    """Keeps every token, in H * 2r + C numbers: r rotated pairs of channels of each key, and one latent of all else.

    RoPE turns the elite pairs of each KV head alone, in queries and keys, from a prompt's first token on: all others
    attend as if at position 0, as do all other channels. What is then linear in the layer's input, the rest of all
    keys and all values, is held by its projection on C directions that all heads share; queries and outputs absorb
    those, and attention reads latents as they lie. A prompt attends in that frame, unprojected, before it is stored.
    `kvfold calibrate elitekv` chooses pairs and directions; `kvfold uptrain` makes weights whose keys and values lie in
    the directions' span, so that nothing is lost when they are stored, and trains them: without that quality falls
    quickly with the ratio. Only what drops nothing (`jrt-prompt`) goes in front of it: heads that keep different tokens
    can't have one latent.
    Differs from the paper: kvfold's model is unmodified and brings rotated keys, which are turned back here; latents
    are a projection of keys and values, not of the layer's input. For W = [W_k | W_v] = U S V' of the rest, P = V_C
    gives z = x W V_C = x U_C S_C and z P' = x U_C S_C V_C': what the paper's A = U_C, B = S_C V_C' give, in another
    basis of the latent. P is measured on texts, as the directions of the keys and values themselves: the same V where
    x is white, better else, and right for biases and norms behind the projection. Of grouped queries the pairs are
    common to a KV head. The layer's own W_k and W_v stay; P is held beside them.
    """

    rank: int | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_int("rank", self.rank, 1)

    def bind(self, model: Any) -> "EliteKV":
        """Raises ValueError for a calibration that is damaged, or of another model."""
        folder, path = str(getattr(model.config, "_name_or_path", "") or ""), self.calibration
        if path is None and folder and (Path(folder) / BESIDE).is_file():
            path = str((Path(folder) / BESIDE).resolve())
        where, found = artefacts.locate(self.info.slug, model, path)
        bases(found.data, self.rank)
        return replace(self, calibration=where)

    @cached_property
    def own_frame(self) -> "EliteFrame":  # type: ignore[override]
        """Where queries and keys attend: rotated in elite pairs alone."""
        return EliteFrame(self.calibration, self.rank)

    @property
    def needs(self) -> tuple[Measured, ...]:  # type: ignore[override]
        """Pairs and directions."""
        return (self.own_frame,)

    @cached_property
    def format(self) -> Elite:  # type: ignore[override]
        """Elite channels and a latent."""
        return Elite(self.own_frame.key)


@dataclass(frozen=True)
class EliteFrame:
    """RoPE in the elite channels of each head alone; `calibration` says which they are."""

    calibration: str | None
    rank: int | None

    @cached_property
    def layers(self) -> list[Basis]:
        """What was measured, of each paged layer."""
        return bases(bound_data("elitekv", self.calibration, "its pairs and directions"), self.rank)

    @cached_property
    def key(self) -> str:
        """A digest of what was measured; empty before a model is known."""
        if self.calibration is None:
            return ""
        digest = hashlib.sha256()
        for basis in self.layers:
            digest.update(basis.elite.numpy().tobytes() + basis.latent.numpy().tobytes())
        return digest.hexdigest()[:16]

    def of_layer(self, ordinal: int, rope: Rope | None) -> Basis:
        """Raises ValueError where no rotation is known, or the elite channels are parts of its pairs."""
        if ordinal >= len(self.layers):
            raise ValueError(f"the calibration of elitekv has {len(self.layers)} layers, not number {ordinal}")
        basis = self.layers[ordinal]
        if rope is None:
            raise ValueError(
                "elitekv needs to know what rotates the keys of each layer, which is not known of this one"
            )
        first, second = turning(rope, basis.elite.shape[1]).unbind(1)
        if bool((basis.elite[:, first] != basis.elite[:, second]).any()):
            raise ValueError("the calibration of elitekv has elite channels that this model does not rotate in pairs")
        return basis

    def enter(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "B T"], ordinal: int, rope: Rope | None
    ) -> Float[Tensor, "B H T D"]:
        """Turned back to position 0, but for the elite channels."""
        assert rope is not None, "of_layer has looked"
        elite = self.layers[ordinal].elite.to(x.device)
        elite = elite.repeat_interleave(x.shape[1] // len(elite), 0)[:, None]
        back = -positions[:, None].expand(x.shape[:3])
        return torch.where(elite, x, rope.shift(x, back))


def turning(rope: Rope, size: int) -> Int[Tensor, "P 2"]:
    """The pairs of channels that a rotation turns into each other, in the order of their first; none where it is still.

    Measured on unit vectors, a step along the text, so that no layout is assumed.
    """
    unit = torch.eye(size, dtype=torch.float32)[None, None]
    turned = rope.shift(unit, torch.ones(1, 1, size, dtype=torch.int32))[0, 0]
    first, second = (turned.abs() > 0).nonzero().unbind(1)
    return torch.stack([first, second], 1)[first < second]


PARTS = {"elite": 3, "basis": 3}
"""The tensors of a calibration, with their axes: elite L H D, basis L N C."""


def bases(data: dict[str, Any], rank: int | None) -> list[Basis]:
    """What a calibration's tensors say of each layer. Raises ValueError for one that is damaged, a rank too high."""
    for name, axes in PARTS.items():
        part = data.get(name)
        if not isinstance(part, Tensor) or part.dim() != axes or not part.numel():
            raise ValueError(f"the calibration of elitekv lacks {name!r}, a tensor of {axes} axes")
    elite, basis = data["elite"].bool(), data["basis"].float()
    counts = elite.sum(-1)
    wide = elite.shape[1] * (elite.shape[2] - int(counts[0, 0]))
    if len(elite) != len(basis) or bool((counts != counts[0, 0]).any()) or not wide < basis.shape[1] >= basis.shape[2]:
        shapes = {name: tuple(data[name].shape) for name in PARTS}
        raise ValueError(f"the calibration of elitekv has parts that do not fit together: {shapes}")
    gram = basis.mT @ basis
    if not bool(((gram - torch.eye(basis.shape[2], dtype=torch.float32)).abs() < 0.02).all()):
        raise ValueError("the calibration of elitekv has a basis that is not orthonormal")
    if rank is not None and rank > basis.shape[2]:
        raise ValueError(f"rank={rank} of elitekv must be at most {basis.shape[2]}, which the calibration has")
    return [Basis(e, b[:, :rank].contiguous()) for e, b in zip(elite, basis, strict=True)]
