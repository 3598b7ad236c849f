"""A model's rotary embedding, used through the model's own code so that every convention is its own."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvfold.hf.anatomy import has_grid_positions, text_decoder


@dataclass(frozen=True)
class ModelRope:
    """Rotates vectors further with the rotary module and the `apply_rotary_pos_emb` of the model's own file."""

    rotary: nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None

    def shift(self, x: Tensor, steps: Tensor) -> Tensor:
        """Vectors (B, H, T, D) rotated for position p become those for p + steps (B, H, T); computed in float32."""
        b, h, t, d = x.shape
        flat = x.reshape(b * h, 1, t, d).float()
        where = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.rotary(flat, position_ids=steps.reshape(b * h, t), **where)
        scaling = self._scaling()  # YaRN and longrope multiply cos and sin; the stored vector already has it
        turned, _ = self.apply(flat, flat, cos / scaling, sin / scaling)
        return turned.to(x.dtype).view(b, h, t, d)

    def _scaling(self) -> float:
        name = "attention_scaling" if self.layer_type is None else f"{self.layer_type}_attention_scaling"
        return float(getattr(self.rotary, name, 1.0))


def find_rope(model: nn.Module, attention: nn.Module | None, layer_type: str) -> ModelRope | None:
    """The rotary embedding of a layer, or None where it can't move tokens by their place in the text.

    There is no rotary module, its angles depend on the text's length, or images have positions of their own.
    """
    if has_grid_positions(model):
        return None
    rotary = next((m for m in text_decoder(model).modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    apply: Any = attention and getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None
    kinds: Any = getattr(rotary, "rope_type", "default")
    by_layer = isinstance(kinds, dict)
    kind = kinds.get(layer_type) if by_layer else kinds  # None: no layer of this kind turns
    if kind is None or "dynamic" in kind or kind == "longrope":
        return None
    return ModelRope(rotary, apply, layer_type if by_layer else None)
