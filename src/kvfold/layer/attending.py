"""How the new tokens of a pass attend: over themselves, and over what a layer has stored. Knows no method."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.index import Handed
from kvfold.layer.stored import Stored
from kvfold.rotation import Compact
from kvfold.views.decisions import Streams

QUERIES = 2048
"""Of a prompt that are asked about its first tokens at once: so many logits are held for each of those."""


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
        shares: Float[Tensor, "B Q"] | None, admitted: Bool[Tensor, "B H Q"] | None = None,
        streams: Streams | None = None, block: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """New tokens see each other, causally or (`block`) all, and all that is stored; the two answers merge.

        The queries are those of the last tokens of `k` and `v`. Third: column sums, of queries that count so much
        (`shares`; None: nobody asks). `valid`: tokens that are not padding (None: all). `admitted`: those that others
        see; None: all. `streams`: heads that see little of it.
        """
        sums = shares is not None and past is None and self.compact is None and not block
        own: tuple[Tensor, Tensor, Tensor | None]
        if block:
            own = *self._among(k, v, valid), None
        elif admitted is not None:
            own = *ops.causal_admitted(self.q, k, v, admitted, self.scale), None
        elif streams is not None:
            own = *self._streaming(k, v, valid, streams), None
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

    def _streaming(self, k: Tensor, v: Tensor, valid: Tensor | None, streams: Streams) -> tuple[Tensor, Tensor]:
        """Heads that see all that stands before a token, and those that see little of it, each row without padding."""
        (b, hq, n, _), (h, t) = self.q.shape, k.shape[1:3]
        out = self.q.new_zeros(b, hq, n, v.shape[3])
        lse = self.q.new_full((b, hq, n), -torch.inf, dtype=torch.float32)
        flags = torch.tensor(streams.heads, dtype=torch.bool, device=k.device)
        queries = flags.repeat_interleave(hq // h)
        sinks = (streams.sinks - self.first[:, 0]).clamp(min=0).tolist()
        for row in range(b):
            here = torch.arange(t, device=k.device) if valid is None else valid[row].nonzero()[:, 0]
            asking = here[here >= t - n] - (t - n)
            if not len(asking):
                continue
            for some, little in ((~flags, False), (flags, True)):
                if not bool(some.any()):
                    continue
                heads = (queries if little else ~queries).nonzero()[:, :1]
                q, keys, values = self.q[row, heads, asking], k[row, some][:, here], v[row, some][:, here]
                window = streams.recent if little else 0
                own = ops.causal(q[None], keys[None], values[None], self.scale, window=window)[:2]
                if little:
                    own = self._with_sinks(q, keys, values, own, sinks[row], streams.recent)
                out[row, heads, asking], lse[row, heads, asking] = own[0][0], own[1][0]
        return out, lse

    def _with_sinks(
        self, q: Float[Tensor, "Hq Q D"], k: Float[Tensor, "H T D"], v: Float[Tensor, "H T Dv"],
        near: tuple[Tensor, Tensor], sinks: int, recent: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the last `recent` tokens said, and those of the first `sinks` that stand before them."""
        (hq, n, d), h, t = q.shape, *k.shape[:2]
        begin = max(0, recent - (t - n))  # the first query that has something before its window
        if not sinks or begin >= n:
            return near
        outs, norms, few = [near[0][:, :, :begin]], [near[1][:, :, :begin]], min(sinks, t)
        for start in range(begin, n, QUERIES):
            stop = min(n, start + QUERIES)
            places = torch.arange(start, stop, device=q.device) + (t - n)
            hidden = torch.arange(few, device=q.device) > (places - recent)[:, None]
            bias = torch.zeros(hidden.shape, dtype=torch.float32, device=q.device).masked_fill(hidden, -torch.inf)
            asked = q[:, start:stop].reshape(1, h, -1, d)
            far = ops.attend(
                asked, k[None, :, :few], v[None, :, :few], self.scale, bias.repeat(hq // h, 1).expand(1, h, -1, -1)
            )
            shaped = far[0].reshape(1, hq, stop - start, -1), far[1].reshape(1, hq, -1)
            out, lse = ops.merge([shaped, (near[0][:, :, start:stop], near[1][:, :, start:stop])])
            outs.append(out)
            norms.append(lse)
        return torch.cat(outs, 2), torch.cat(norms, 2)

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
