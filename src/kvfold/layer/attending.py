"""How the new tokens of a pass attend: over themselves, and over what a layer has stored. Knows no method."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.index import Handed
from kvfold.layer.stored import Stored
from kvfold.rotation import Compact


@dataclass(frozen=True)
class Asking:
    """The queries of a pass, and how they ask."""

    q: Float[Tensor, "B Hq Q D"]
    first: Int[Tensor, "B 1"]
    """Where the pass begins in the text; the queries may be a part of it."""
    scale: float
    compact: Compact | None = None

    def prompt(
        self, past: Stored | None, k: Tensor, v: Tensor, valid: Bool[Tensor, "B T"] | None,
        shares: Float[Tensor, "B Q"] | None, admitted: Bool[Tensor, "B H Q"] | None = None, block: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """New tokens see each other, causally or (`block`) all, and all that is stored; the two answers merge.

        The queries are those of the last tokens of `k` and `v`. Third: column sums, of queries that count so much
        (`shares`; None: nobody asks). `valid`: tokens that are not padding (None: all). `admitted`: those that others
        see; None: all.
        """
        sums = shares is not None and past is None and self.compact is None and not block
        own: tuple[Tensor, Tensor, Tensor | None]
        if block:
            own = *self._among(k, v, valid), None
        elif admitted is not None:
            own = *ops.causal_admitted(self.q, k, v, admitted, self.scale), None
        elif valid is None:
            each = None if shares is None else shares[0]  # without padding all rows are alike
            own = ops.causal(self.q, k, v, self.scale, sums=sums, shares=each)
        else:
            own = ops.causal_rows(self.q, k, v, valid, self.scale, sums=sums, shares=shares)
        if past is None:
            return own
        return *ops.merge([self.stored(past, after=True)[:2], own[:2]]), None

    def _among(self, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every new token sees every other that is not padding."""
        (b, hq, n, d), h = self.q.shape, k.shape[1]
        bias = None
        if valid is not None:
            bias = torch.zeros(valid.shape, device=k.device, dtype=torch.float32).masked_fill(~valid, -torch.inf)[
                :, None, None
            ]
            bias = bias.expand(-1, h, -1, -1)
        out, lse = ops.attend(self.q.reshape(b, h, hq // h * n, d), k, v, self.scale, bias)
        return out.reshape(b, hq, n, -1), lse.reshape(b, hq, n)

    def stored(
        self, stored: Stored, *, read: Tensor | None = None, after: bool = False, weights: bool = False,
        handed: Handed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """(out, lse, weights) of the queries over all segments.

        `after`: the queries' own tokens are not stored yet. `handed`: they are generated tokens, one a row, and read
        what is chosen where anything is, see `Stored.attend`.
        """
        counts = stored.counts()
        (b, hq, n, d), h, compact = self.q.shape, counts.shape[1], self.compact
        grouped = self.q.reshape(b, h, hq // h, n, d)
        if compact is not None:
            slots = torch.from_numpy(counts - (0 if after else n)).to(self.q.device)
            grouped = compact.rotate_queries(grouped, self.first, slots)
            compact = replace(compact, slots=stored.slots())
        out, lse, left = stored.attend(grouped, self.scale, compact, read, weights, handed)
        return out.reshape(b, hq, n, -1), lse.reshape(b, hq, n), left
