"""Rotated: keys and values turned at random, their numbers as one of a few levels (TurboQuant, arXiv:2504.19874)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.formats.by_token import ByToken
from kvfold.formats.gaussian import Rotation, lloyd_max, middles
from kvfold.formats.key_basis import KeyBasis
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.token_codes import CodedTokens, scale_dtype, token_planes
from kvfold.formats.tokens import Chunk
from kvfold.ops.codes.packing import pack
from kvfold.ops.tokens import Coding
from kvfold.ops.tokens.naive import KINDS
from kvfold.options import check_choice, check_int, shown
from kvfold.pages import PAGE_SIZE, PageTable, Plane

BITS = (2, 3, 4)
SCALES = ("norm", "unit", "aligned")
CHANNELS = "#channels"
"""How the key of a basis ends that is weights of channels alone."""
BOTH = ("keys", "values"), ("key_scale", "value_scale")
"""Planes of keys, and the same of values."""


@dataclass(frozen=True)
class Rotated(ByToken):
    """Each key and each value is a rotation's transpose times levels times one scale of its own.

    A random rotation, one for each layer, makes the numbers of any vector look normally distributed; each becomes the
    nearest of 2^bits levels that suit a normal distribution. Queries are turned once, outputs turned back: no key or
    value is. Addressable token by token, exact to crop; what is amended is rounded.
    Scales are bfloat16 (float32 in a float32 model): as far as a key's length may reach, and 0.4 % are nothing beside
    the codes' error. A number that is not finite makes its vector NaN.
    `scale` says what a vector's levels are multiplied by: "norm", its length, as in the paper; "unit", what gives the
    coded vector that length; "aligned", what makes its product with the vector itself exact, so that a rotation's
    mean of any product is.
    `key` names what was measured for it in `Spec.artefact`, a `KeyBasis`. Keys are then brought there first, and that
    is what is turned, and what `scale` speaks of; queries ask by the inverse. The basis is counted once and not saved,
    but for its digest: who loads a cache must have it.
    """

    key_bits: int = 4
    value_bits: int = 4
    scale: str = "norm"
    seed: int = 42
    key: str = ""
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            check_int(name, getattr(self, name), min(BITS), high=max(BITS))
        check_choice("scale", self.scale, SCALES)
        check_int("seed", self.seed, 0, high=2**32 - 1)
        if not isinstance(self.key, str):
            raise ValueError(f"key={shown(self.key)} must be a text")
        check_int("page_size", self.page_size, 1)

    def codings(self, spec: Spec) -> tuple[Coding, Coding]:
        """Of keys and of values."""
        sizes = (spec.key_size, self.key_bits), (spec.value_size, self.value_bits)
        keys, values = (Coding(size, bits, lloyd_max(bits)) for size, bits in sizes)
        return keys, values

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        return token_planes(*self.codings(spec), scale_dtype(spec, torch.bfloat16))

    def basis(self, spec: Spec) -> KeyBasis | None:
        """What keys of the layer are brought to before they are turned; None: nowhere.

        Raises ValueError where nobody has given what was measured, or it is of another layer.
        """
        if not self.key:
            return None
        found = spec.artefact.get(self.key)
        if not isinstance(found, KeyBasis):
            raise ValueError(f"key={shown(self.key)} of a rotated format is not what was measured: {[*spec.artefact]}")
        shape, wanted = tuple(found.weight.shape), (spec.heads, spec.key_size)
        if shape != wanted:
            raise ValueError(f"basis={shape} of keys does not fit layer {spec.layer}: it must be {wanted}")
        return found.to(spec.device)

    def supposed(self, spec: Spec) -> dict[str, KeyBasis]:
        """One that changes nothing, as large as those that `kvfold calibrate` makes."""
        if not self.key:
            return {}
        weight = torch.ones(spec.heads, spec.key_size, dtype=torch.float32)
        unit = torch.eye(spec.key_size, dtype=torch.float16).expand(spec.heads, -1, -1).contiguous()
        return {self.key: KeyBasis(None if self.key.endswith(CHANNELS) else unit, weight)}

    def open(self, spec: Spec) -> "RotatedSegment":
        basis = self.basis(spec)
        table = open_table(self, spec, self.planes(spec), self.page_size)
        return RotatedSegment(self, table, spec.heads, spec.dtype, spec.layer, self.codings(spec), basis)

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        basis = self.basis(spec)
        if said.get("basis") != (own := None if basis is None else basis.digest):
            raise ValueError(f"basis={shown(said.get('basis'))} of keys, where what was measured is {own}")
        super().check(spec, said, tensors, seen)

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "RotatedSegment":
        segment: RotatedSegment = super().restore(spec, said, tensors, twin)
        if isinstance(twin, RotatedSegment) and (twin.form, twin.layer) == (self, spec.layer):
            segment.basis = twin.basis
        return segment


class RotatedSegment(CodedTokens):
    """Codes of turned keys and values, and a scale for each."""

    def __init__(
        self, form: Rotated, table: PageTable, heads: int, compute: torch.dtype, layer: int,
        codings: tuple[Coding, Coding], basis: KeyBasis | None = None,
    ):  # fmt: skip
        super().__init__(table, heads, compute, *codings)
        self.form, self.layer, self.basis = form, layer, basis

    @property
    def listed(self) -> bool:  # type: ignore[override]
        """A basis belongs to a head."""
        return self.basis is None

    def like(self, table: PageTable, rows: np.ndarray) -> "RotatedSegment":
        codings = self.coding["keys"], self.coding["values"]
        return RotatedSegment(self.form, table, self.heads, self.compute, self.layer, codings, self.basis)

    def bytes_beside(self, counted: set[int]) -> int:
        beside = 0
        if self.basis is not None and id(self.basis) not in counted:
            counted.add(id(self.basis))
            beside = self.basis.nbytes
        return super().bytes_beside(counted) + beside

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        return said if self.basis is None else {**said, "basis": self.basis.digest}, tensors

    def join(self, other: Any) -> None:
        theirs = getattr(other, "form", type(other).__name__), getattr(other, "layer", None)
        if theirs != (self.form, self.layer):
            raise ValueError(f"other={theirs} (format, layer) must be {(self.form, self.layer)}")
        if self.basis is not None and self.basis.digest != other.basis.digest:
            raise ValueError(f"other={theirs} has keys in another basis: {self.form.key!r} was measured anew")
        super().join(other)

    def turn(self, what: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "D D"]:
        """The rotation of keys or values."""
        return self.rotation(what).matrix(self.pool.device, dtype)

    def rotation(self, what: str) -> Rotation:
        """The layer's, of keys or values."""
        return Rotation(self.form.seed, self.layer, self.coding[what].size)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        if self.coding["keys"] != self.coding["values"]:
            super().append(chunk, even=even)
            return
        # Both at once: of a single token it is the number of operations that takes the time.
        made = self.encode("both", torch.stack([chunk.keys, chunk.values]))
        planes = {names[which]: made[names[0]][which] for names in BOTH for which in (0, 1)}
        self.add(planes | self.add_columns(chunk.columns), None if even else chunk.valid)

    def coded(self, what: str, states: Tensor) -> dict[str, Tensor]:
        """ "both": keys and values, one above the other, whose codings are equal; planes go by the names of keys."""
        # In float64: the order in which float32 is summed depends on how many tokens come at once, and codes must not.
        wide, both = states.double(), what == "both"
        what = "keys" if both else what
        if self.basis is not None and what == "keys":
            wide = torch.stack([self.basis.entered(wide[0]), wide[1]]) if both else self.basis.entered(wide)
        coding = self.coding[what]
        most = wide.abs().amax(-1, keepdim=True)
        small = wide / most.masked_fill(most == 0, 1.0)
        length = small.square().mean(-1, keepdim=True).sqrt()  # over the root of D, so that no length is out of range
        turned = (small / length.masked_fill(length == 0, 1.0)) @ self.turn(what, torch.float64).mT
        levels = torch.tensor(coding.levels, dtype=torch.float64, device=states.device)
        cuts = torch.tensor(middles(lloyd_max(coding.bits)), dtype=torch.float64, device=states.device)
        codes = torch.bucketize(turned, cuts)
        scale = most * length * self._share(turned, levels[codes])
        kind = self.pool.specs[f"{KINDS[what]}_scale"].dtype
        held = scale.clamp(max=torch.finfo(kind).max).to(kind)
        return {what: pack(codes.to(torch.uint8), coding.bits), f"{KINDS[what]}_scale": held}

    def _share(self, turned: Float[Tensor, "*N D"], levels: Float[Tensor, "*N D"]) -> Float[Tensor, "*N 1"] | float:
        """What a vector's length is multiplied by."""
        if self.form.scale == "norm":
            return 1.0
        if self.form.scale == "unit":
            return levels.square().mean(-1, keepdim=True).rsqrt()
        # A vector of zeros has levels around zero, of no meaning: its length is zero whatever the share.
        found = (turned * levels).mean(-1, keepdim=True)
        return 1 / found.masked_fill(found == 0, 1.0)

    def asked(self, q: Tensor) -> Tensor:
        if self.basis is not None:
            return self.basis.asked(q, self.rotation("keys"))
        return q.float() @ self.turn("keys").mT

    def back(self, what: str, states: Tensor) -> Tensor:
        if self.basis is not None and what == "keys":
            return self.basis.back(states, self.rotation("keys"))
        return states @ self.turn(what)
