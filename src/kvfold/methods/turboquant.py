"""TurboQuant: vectors turned at random, then the nearest of a few levels, number by number (arXiv:2504.19874)."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvfold import artefacts
from kvfold.formats import Format, Rotated
from kvfold.formats.key_basis import KeyBasis
from kvfold.formats.rotated import CHANNELS
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_choice
from kvfold.rotation import Measured, Rope

BASES = ("random", "channels", "measured")
SKEW = 0.01
"""How far directions in float16 may be from orthogonal."""


@method(
    "turboquant", title="TurboQuant: rotated keys and values in 4 to 2 bits, token by token", paper="2504.19874",
    kind="quantize",
    formula=r"""
        \hat x = \lVert x \rVert \, \Pi^\top c[i], \quad
            i_j = \arg\min_k \, \bigl| c_k - (\Pi x)_j / \lVert x \rVert \bigr|
        q \cdot \hat k = \lVert k \rVert \, (\Pi q) \cdot c[i]
        \text{basis="measured":} \quad k \to A k, \; q \to A^{-\top} q, \quad
            A^\top A = S_k^{-1/2} \big(S_k^{1/2} S_q S_k^{1/2}\big)^{1/2} S_k^{-1/2}, \quad
            S_x = \mathbb E[x x^\top]
    """,
    options={
        "bits": "of a number: 2, 3 or 4",
        "value_bits": "of a number of a value, if not as many as of a key's: 2, 3 or 4",
        "scale": '"norm", the vector\'s length (the paper); "unit", what gives the coded vector that length; '
        '"aligned", what makes its product with the vector itself exact',
        "seed": "of the rotations",
        "basis": 'what of keys is turned: "random", the keys themselves (the paper); "channels", with a weight for '
        'each channel by what queries make of it; "measured", in a basis whose directions are weighed so (both ours)',
    },
)  # fmt: skip
@dataclass(frozen=True)
class TurboQuant(Method):
    """Keeps every token: each key and value as levels of a random rotation of it, and one scale.

    Every token stands for itself, so that it goes with any method that drops or merges tokens, as in
    "h2o(budget=0.25) | turboquant".
    A prompt is attended in full precision before it is stored; later tokens read the codes as they lie.
    The rotation is Haar's (QR), one for each layer, and the levels are Lloyd's and Max's for the normal distribution,
    which the paper's density is close to from some 64 numbers on.
    Differs from the paper: keys are coded for the least error too, without its one-bit sketch of what is left (ports
    found that to harm attention: its variance passes through the softmax); `scale="aligned"` takes away the bias that
    the sketch is for. There is no split of outlier channels. No mean is taken off the keys: one that is fixed by the
    first tokens that come would depend on how a prompt is cut. Models with large biases of keys (Qwen2.5) need one,
    and lose much here.
    `basis="measured"` is ours. Each KV head's keys are coded as A k, and asked by A^{-T} q, so that products stay. A is
    symmetric, of the second moments S_k of keys and S_q of the group's queries, as they attend:
    A'A = S_k^{-1/2} (S_k^{1/2} S_q S_k^{1/2})^{1/2} S_k^{-1/2}. A code's error has no direction and grows with the
    vector, so that a logit's is as tr(A S_k A') tr(A^{-T} S_q A^{-1}), and of that this is the least there is. Values
    stay as they are. With A = V W V' keys are held as R W V' k (R V is as random as R), so that a cache holds V alone,
    in float16, and no inverse. `basis="channels"` is the best diagonal A, (S_q / S_k)^{1/4}: less on some models, and
    no bytes to speak of. `kvfold calibrate turboquant` measures both; sliding windows have none.
    """

    bits: int = 4
    value_bits: int | None = None
    scale: str = "norm"
    seed: int = 42
    basis: str = "random"
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_choice("basis", self.basis, BASES)
        if self.basis == "random" and self.calibration is not None:
            raise ValueError(
                f"calibration={self.calibration!r} is what a basis that was measured is for; a random one has none"
            )
        self.format  # noqa: B018  (raises for options that can't be)

    def bind(self, model: Any) -> "TurboQuant":
        """Raises ValueError for a calibration that is damaged, or of another model."""
        if self.basis == "random":
            return self
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        key_bases(found.data, self.basis == "channels")
        return replace(self, calibration=where)

    @cached_property
    def needs(self) -> tuple[Measured, ...]:  # type: ignore[override]
        """The bases of keys, where there are any."""
        return () if self.basis == "random" else (KeyBases(self.calibration, self.basis == "channels"),)

    @cached_property
    def format(self) -> Format:  # type: ignore[override]
        """Codes and a scale, token by token."""
        values = self.bits if self.value_bits is None else self.value_bits
        return Rotated(self.bits, values, self.scale, self.seed, self.needs[0].key if self.needs else "")


@dataclass(frozen=True)
class KeyBases:
    """What was measured of each layer's keys; nothing is read before a layer asks."""

    calibration: str | None
    channels: bool = False

    @property
    def key(self) -> str:
        """Where it lies, and which; segments tell by its digest whether it is still the same."""
        return (self.calibration or "measured") + (CHANNELS if self.channels else "")

    @cached_property
    def layers(self) -> list[KeyBasis]:
        """Those of each paged layer."""
        return key_bases(bound_data("turboquant", self.calibration, "its basis"), self.channels)

    def of_layer(self, ordinal: int, rope: Rope | None) -> KeyBasis:
        """See `Measured.of_layer`."""
        if ordinal >= len(self.layers):
            raise ValueError(f"the calibration of turboquant has {len(self.layers)} layers, not number {ordinal}")
        return self.layers[ordinal]


def key_bases(data: dict[str, Any], channels: bool = False) -> list[KeyBasis]:
    """What a calibration has, layer by layer. Raises ValueError for one that is damaged."""
    parts: dict[str, Any] = {name: data.get(name) for name in ("turn", "weight", "channels")}
    turn, weight, diagonal = parts.values()
    square = isinstance(turn, Tensor) and turn.dim() == 4 and turn.numel() and turn.shape[2] == turn.shape[3]
    if not square or not all(isinstance(x, Tensor) and x.shape == turn.shape[:3] for x in (weight, diagonal)):
        found = {name: tuple(x.shape) if isinstance(x, Tensor) else None for name, x in parts.items()}
        raise ValueError(f"the calibration of turboquant must have a basis of each head, and weights: it has {found}")
    unit = torch.eye(turn.shape[-1], dtype=torch.float64)
    apart = (turn.double() @ turn.double().mT - unit).abs()
    positive = all(bool((x.isfinite() & (x > 0)).all()) for x in (weight, diagonal))
    if not bool((apart < SKEW).all()) or not positive:
        raise ValueError("the calibration of turboquant has bases of keys that are not orthogonal, or weigh nothing")
    if channels:
        return [KeyBasis(None, each) for each in diagonal.float()]
    return [KeyBasis(*each) for each in zip(turn, weight.float(), strict=True)]
