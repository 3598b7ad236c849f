"""Means of overlapping windows of keys, of which a block is worth the best that overlaps it (InfLLM-V2, NOSA)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import LOG_MASS, Chunk, Spec, register
from kvfold.ops.attend import blocked
from kvfold.ops.units.naive import behind
from kvfold.options import check_int
from kvfold.selectors.held import OfParts
from kvfold.selectors.whole import WholeUnits, check_whole


@dataclass(frozen=True)
class WindowMeans:
    """Of each `window` tokens, one every `stride`, the mean of their keys after RoPE; such as are whole alone.

    What InfLLM-V2 (arXiv:2509.24663) asks of a block, `unit` tokens, is the most that a group's query heads together
    give a window that overlaps it, each by its softmax over all windows. Held, in the model's dtype, is the mean of
    each `stride` tokens, of which a window's is the mean: D numbers for `stride` keys and values, 1 / (2 stride) of the
    cache. `weighed`: the mean of the logs of their masses, too, by which a block is worth something whoever asks (NOSA,
    arXiv:2510.13602); in a model of 16 bits some that differ by little are the same, and the earlier block is read.
    Raises ValueError where `stride` divides not both of the others.
    """

    unit: int = 64
    window: int = 32
    stride: int = 16
    weighed: bool = False
    enough = 0

    def __post_init__(self) -> None:
        for name in ("unit", "window", "stride"):
            check_int(name, getattr(self, name), 1)
        if self.unit % self.stride or self.window % self.stride:
            raise ValueError(f"stride={self.stride} must divide unit={self.unit} and window={self.window}")

    @property
    def lasting(self) -> bool:
        """Whether it knows what units are worth to nobody in particular (`kvfold.selectors.lasting.Lasts`)."""
        return self.weighed

    @property
    def parts(self) -> int:
        """Strides of a unit."""
        return self.unit // self.stride

    @property
    def wide(self) -> int:
        """Strides of a window."""
        return self.window // self.stride

    def open(self, spec: Spec) -> "WindowMeansOf":
        return WindowMeansOf.empty(self, spec, *self._sizes(spec))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_whole(spec, tensors, counts, self.stride, *self._sizes(spec), within=self.parts)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "WindowMeansOf":
        return WindowMeansOf.restored(self, spec, tensors)

    def _sizes(self, spec: Spec) -> tuple[int, int, torch.dtype]:
        """Numbers of a stride, and of a token that waits for one to be whole; what those are held in."""
        width = spec.key_size + self.weighed
        return width, width, torch.promote_types(spec.dtype, torch.float32) if self.weighed else spec.dtype


class WindowMeansOf(OfParts, WholeUnits):
    """`held` (B, H, N, D) or (B, H, N, D + 1): of N strides the mean key, and the mean log of a mass."""

    recipe: WindowMeans

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Remembered.columns`."""
        return (LOG_MASS,) if self.recipe.weighed else ()

    def told(self, tokens: Chunk) -> Float[Tensor, "B H T W"]:
        """See `WholeUnits.told`: keys as they attend, and the log of each token's mass."""
        if not self.recipe.weighed:
            return tokens.keys
        return torch.cat(
            [tokens.keys.to(self.still.dtype), tokens.columns[LOG_MASS][..., None].to(self.still.dtype)], -1
        )

    def made(self, told: Float[Tensor, "B H T W"]) -> Float[Tensor, "B H N E"]:
        """See `WholeUnits.made`."""
        return stride_means(told, self.recipe.stride)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`: the same for a group's heads, which ask together; 0 where no window is whole."""
        number = int(units.max(initial=0))
        means = over_windows(self._held(number)[..., : self.spec.key_size], self.recipe.wide)  # B H M D
        there = self._whole(means.shape[2])[:, :, None]
        logits = (asked.float() @ means.mT * asked.shape[-1] ** -0.5).masked_fill(~there, -torch.inf)
        given = logits.softmax(-1).nan_to_num(0.0).sum(2)  # B H M: nothing is to be seen of a row without any
        worth = best_over_blocks(given, self.recipe.parts, self.recipe.wide)[..., :number].clamp(min=0.0)
        return behind(worth[:, :, None].expand(-1, -1, asked.shape[2], -1), units)

    def lasting(self, units: int) -> Float[Tensor, "B H N"]:
        """See `Lasts.lasting`: the most that a window which overlaps a unit has, on average over its tokens."""
        e = over_windows(self._held(units)[..., -1:], self.recipe.wide)[..., 0]
        e = e.masked_fill(~self._whole(e.shape[2]), -torch.inf)
        return best_over_blocks(e, self.recipe.parts, self.recipe.wide)[..., :units]

    def _held(self, units: int) -> Float[Tensor, "B H N E"]:
        """What is held of so many units, float32."""
        return self.held[:, :, : units * self.recipe.parts].float()

    def _whole(self, windows: int) -> Tensor:
        """Which of so many windows have all their tokens, (B, H, M)."""
        number = self._at(self.known // self.recipe.stride - self.recipe.wide + 1)
        return torch.arange(windows, device=self.held.device) < number[..., None]


def stride_means(told: Float[Tensor, "*b T W"], stride: int) -> Float[Tensor, "*b N W"]:
    """The mean of each whole `stride` tokens, in their dtype, rounded once from float64."""
    whole = told.shape[-2] // stride
    cut = told[..., : whole * stride, :].reshape(*told.shape[:-2], whole, stride, told.shape[-1])
    step = max(1, blocked.BLOCK_ELEMENTS // max(1, cut[..., :1, :, :].numel()))
    return torch.cat([some.double().mean(-2).to(told.dtype) for some in torch.split(cut, step, -3)], -2)


def over_windows(means: Float[Tensor, "*b N W"], wide: int) -> Float[Tensor, "*b M W"]:
    """The means of `wide` strides side by side, from each stride on that has so many behind it."""
    number = max(0, means.shape[-2] - wide + 1)
    return torch.stack([means[..., i : i + number, :] for i in range(wide)]).mean(0)


def best_over_blocks(x: Float[Tensor, "*b M"], parts: int, wide: int) -> Float[Tensor, "*b N"]:
    """Of windows of `wide` strides the largest number among those that overlap a block of `parts` strides.

    Those of block b are parts b - wide + 1 to parts b + parts - 1, as far as they are there; the last block may be cut.
    """
    number = -(-(x.shape[-1] + wide - 1) // parts)
    padded = F.pad(x, (wide - 1, max(1, number) * parts - x.shape[-1]), value=-torch.inf)
    return padded.unfold(-1, parts + wide - 1, parts).amax(-1)


register("window-means", WindowMeans)
