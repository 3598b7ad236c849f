"""A prompt that one layer reads in parts: what each part brings and gets, until all of it is there."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Parts:
    """The tokens of one pass in one layer, which come `start` to `stop` of `total` at a time.

    A later part attends over the earlier ones, so that all get what one pass over the prompt would give them; the
    method sees the layer when the last part has attended, as if there had been one.
    """

    def __init__(self, total: int, valid: Bool[Tensor, "B N"] | None = None):
        self.total, self.valid = total, valid
        self.start = self.stop = 0
        self._held: dict[str, Tensor] = {}

    def reach(self, stop: int) -> None:
        """The next part ends at token `stop`."""
        self.start, self.stop = self.stop, stop

    @property
    def last(self) -> bool:
        """Whether no part comes behind this one."""
        return self.stop == self.total

    def put(self, **brought: Float[Tensor, "B _ Q ..."]) -> None:
        """Hold what this part brings or got, by name: its tokens are on the third axis."""
        alone = self.stop - self.start == self.total
        for name, x in brought.items():
            if alone:
                self._held[name] = x
                continue
            if name not in self._held:
                self._held[name] = x.new_empty(*x.shape[:2], self.total, *x.shape[3:])
            self._held[name][:, :, self.start : self.stop] = x

    def add(self, sums: Float[Tensor, "B H T"] | None) -> None:
        """What this part's queries gave each key so far; None: the kernel could not say, and so nobody can."""
        if sums is None:
            self._held.pop("sums", None)
        elif self.start == 0:
            self._held["sums"] = sums if self.last else torch.nn.functional.pad(sums, (0, self.total - self.stop))
        elif "sums" in self._held:
            self._held["sums"][..., : self.stop] += sums

    def of(self, x: Shaped[Tensor, "B N"]) -> Shaped[Tensor, "B Q"]:
        """Of what is said of all tokens, what is said of this part's."""
        return x[:, self.start : self.stop]

    def of_this(self, name: str) -> Tensor:
        """This part's tokens."""
        return self._held[name][:, :, self.start : self.stop]

    def so_far(self, name: str) -> Tensor:
        """The tokens up to the end of this part."""
        return self._held[name][:, :, : self.stop]

    def sums(self) -> Float[Tensor, "B H N"] | None:
        """The column sums of all parts."""
        return self._held.get("sums")


def shares(valid: Bool[Tensor, "B N"], fade: float) -> Float[Tensor, "B N"]:
    """What each query of a pass counts in its column sums: exp(-distance to the row's last / (fade * tokens))."""
    places: Int[Tensor, "B N"] = valid.cumsum(1) - 1
    count = valid.sum(1, keepdim=True)
    return torch.exp((places + 1 - count).float() / (fade * count.float()))
