"""Every key by itself, as a query would meet it at one distance: no unit is larger than a token (TokenSelect)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int
from kvfold.selectors.held import HELD, HeldUnits, before_rope, check_held, ends, from_behind, narrow, nothing

STEPS = 256
"""Of a score: a step is 0.4 % of a share, and equal words are worth the same though turning them has rounded."""


@dataclass(frozen=True)
class Keys:
    """A copy of each key without its rotation, of which a query is asked that stands `distance` behind all of them.

    Scores of TokenSelect (arXiv:2411.02886): what a token says counts, and not how far away it says it. The cache holds
    keys as they attend, and the rotation of each could be undone at every step instead; a copy, which a step reads as
    it lies, costs half of what keys and values take in a model of 16 bits, and a quarter in a wider one: it is held in
    16 bits, bfloat16 where the model has more, which decides between tokens that are worth nearly the same.
    """

    distance: int = 512
    enough = 0
    turns = True

    def __post_init__(self) -> None:
        check_int("distance", self.distance, 0)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return 1

    def open(self, spec: Spec) -> "KeysOf":
        """Raises ValueError where the layer's rotation is not known."""
        if spec.rope is None:
            raise ValueError(f"index={self} needs the model's RoPE, and layer {spec.layer} has none that is known")
        return KeysOf(self, spec, nothing(spec, spec.key_size, narrow(spec.dtype)))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, tensors, counts, 1, spec.key_size, narrow(spec.dtype))

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "KeysOf":
        return KeysOf(self, spec, tensors[HELD].to(spec.device).clone())


class KeysOf(HeldUnits):
    """`held` (B, H, N, D): keys as the model made them, before RoPE; zeros where no token has come."""

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        valid = tokens.valid
        if not bool(valid.any()):
            return
        plain = before_rope(self.spec, tokens)
        first, number = int(start.flat[0]), valid.shape[-1]
        if bool((start == first).all()) and bool(valid.all()):
            self.reach(first + number)
            self.held[:, :, first : first + number].copy_(plain)
            return
        self.reach(ends(valid, start))
        self.put(valid, start, plain)

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`: as far behind all keys as the recipe says."""
        return from_behind(self.spec, q, seen, self.recipe.distance)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not divided by sqrt(D), in steps of 1 / `STEPS`.

        Before RoPE equal words have equal keys in a first layer, but for what turning them there and back has rounded,
        which others in a batch may change: so they are worth the same, and the earlier is read.
        """
        return ops.key_scores(asked, self.held, units, STEPS)


register("keys", Keys)
