"""KVQuant: keys before RoPE by channel, values by token, in levels that were fitted to the model (arXiv:2401.18079)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import artefacts
from kvfold.formats import LEVELS, Levels, Uneven
from kvfold.formats.levels import BITS
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Store


@method(
    "kvquant", title="KVQuant: keys before RoPE and values in fitted levels, outliers apart", paper="2401.18079",
    kind="quantize",
    formula=r"""
        \hat k_c = o_c + \rho_c \, \ell_i, \quad i = \arg\min_j |(k_c - o_c) / \rho_c - \ell_j|,
            \quad k \ \text{before RoPE}
        \hat v = o_t + \rho_t \, \ell'_i, \quad o_t, \rho_t \ \text{of all numbers of}\ v_t\ \text{but the furthest}
        \ell = \arg\min \sum_n F_n \min_j (x_n - \ell_j)^2, \quad F = (\partial \mathcal L / \partial x)^2
    """,
    options={
        "bits": "of a code: 2, 3 or 4",
        "exact": "numbers of each key and of each value of a KV head that are held as they are, the furthest out",
        "sinks": "first tokens of a text that are held as they are",
        "norm": "whether levels are moved to the mean and spread that numbers have (Q-Norm); None: at 2 bits",
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVQuant(Method):
    """Keeps every token: the first `sinks` as they are, all others in codes of `bits` bits and a few exact numbers.

    Each layer has 2^bits levels for keys and as many for values, fitted by k-means that weighs each number by how much
    the loss depends on it, and each key channel a range (of 99 % of its numbers), all from `kvfold calibrate kvquant`.
    There is no other way: ranges of a prompt alone would cut what comes later, so that without a calibration it is
    refused. `calibration` names its file; a cache sets it. Where a layer's rotation is not known, keys are coded as
    they come; a calibration does the same.
    A prompt is attended in full precision before it is stored (the paper's figures see coded keys there, too), and a
    generated token is coded after its own step; later tokens read the codes as they lie, a block at a time (no compiled
    kernel). Every token stands for itself, so that it goes with any method that drops or merges tokens.
    Differs from the paper: a fixed number of outliers for each token and KV head, the furthest out, whether or not they
    leave the range (there whatever leaves it: 1 % in the mean, and the authors' kernels cap it); a value's range is
    that of one KV head, not of all.
    """

    bits: int = 4
    exact: int = 1
    sinks: int = 1
    norm: bool | None = None
    calibration: str | None = None

    stores = True

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, 0)
        check_choice("norm", self.norm, (None, False, True))
        self.form  # noqa: B018  (raises for options that can't be)

    @cached_property
    def form(self) -> Uneven:
        """What tokens are held in."""
        return Uneven(self.bits, self.exact)

    def bind(self, model: Any) -> "KVQuant":
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        self.measured(found.data, 0)
        return replace(self, calibration=where)

    def after_prefill(self, view: LayerView) -> Sequence[Decision]:
        return self._coded(view)

    def after_decode(self, view: LayerView) -> Sequence[Decision]:
        return self._coded(view)

    def _coded(self, view: LayerView) -> Sequence[Decision]:
        coded = torch.zeros_like(view.valid)
        for number, form in enumerate(view.held):
            if form == self.form:
                coded |= view.valid & (view.home == number)
        due = view.valid & ~coded & (view.positions >= self.sinks)
        some = due.any(-1)
        if not bool(some.any()):
            return ()
        first = bool((some & ~coded.any(-1)).any())
        return (Store(self.form, due, {LEVELS: self._levels(view)} if first else {}),)

    def _levels(self, view: LayerView) -> Float[Tensor, "B H W"]:
        """What each (row, head) of a layer is told."""
        found = bound_data(self.info.slug, self.calibration, "levels")
        flat = self.measured(found, view.place.ordinal).flat()
        if len(flat) != view.heads:
            raise ValueError(f"the calibration of kvquant has {len(flat)} KV heads; the layer has {view.heads}")
        return flat.to(view.valid.device).expand(len(view.valid), -1, -1)

    def measured(self, data: dict[str, Any], ordinal: int) -> Levels:
        """The levels of layer `ordinal`'s H heads. Raises ValueError for an artefact that lacks a part, or damaged."""
        names = ("low", "high", f"keys.{self.bits}", f"values.{self.bits}")
        for name, axes in zip(names, (3, 3, 2, 2), strict=True):
            part = data.get(name)
            if not isinstance(part, Tensor) or part.dim() != axes or ordinal >= len(part):
                raise ValueError(f"the calibration of kvquant lacks {name!r} of layer {ordinal} on pages")
        low, high, keys, values = (data[name][ordinal].float() for name in names)
        count = 1 << self.bits
        sizes = low.shape == high.shape and keys.shape == values.shape == (count + 2,)
        finite = all(bool(x.isfinite().all()) for x in (low, high, keys, values))
        ordered = all(bool((x[1:count] >= x[: count - 1]).all()) for x in (keys, values))
        if not (sizes and finite and ordered and bool((high >= low).all())):
            raise ValueError(f"the calibration of kvquant has parts of layer {ordinal} that are no levels")
        if self.exact > low.shape[-1]:
            raise ValueError(f"exact={self.exact} must be at most the key size {low.shape[-1]}")
        norm = self.bits == min(BITS) if self.norm is None else self.norm
        fits = [x[count:] if norm else x.new_tensor([1.0, 0.0]) for x in (keys, values)]
        each = (x.expand(len(low), -1) for x in (keys[:count], fits[0], values[:count], fits[1]))
        return Levels(low, high, *each)
