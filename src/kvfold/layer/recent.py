"""What the newest generated tokens asked: kept until a method that acts at intervals has seen it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvfold.layer.plan import Group, Part
from kvfold.methods.base import Method
from kvfold.views import Queries
from kvfold.views.queries import wide

EVENT = "after_interval"


def ahead(method: Method, share: float) -> int:
    """How many tokens earlier than others a layer's intervals end, where a method spreads its work over the steps."""
    return int(share * method.period) if method.staggered else 0


class Recent:
    """The last queries of each row's generated tokens, `size` at most, and from where on no method has seen them.

    A ring: the query of text position p lies at slot p % size. So rows of different lengths fit, and a crop needs
    nothing done: what it takes back is written over before somebody asks for it.
    """

    def __init__(self, states: Tensor, lse: Tensor, at: np.ndarray, since: np.ndarray):
        self.states = states
        """(B, Hq, size, D), in the model's dtype, as it made them."""
        self.lse = lse
        """(B, Hq, size), float32, see `Queries.lse`."""
        self.at = at
        """(B, size): whose text position each slot has; -1: nobody's."""
        self.since = since
        """(B,): up to which text position methods have decided."""

    @classmethod
    def empty(cls, rows: int, size: int, like: Tensor) -> "Recent":
        """A ring for queries such as those of `like` (_, Hq, _, D). It is written to outside of inference mode, too."""
        (_, heads, _, d), device = like.shape, like.device
        with torch.inference_mode(False):
            states = torch.zeros(rows, heads, size, d, dtype=like.dtype, device=device)
            lse = torch.zeros(rows, heads, size, dtype=torch.float32, device=device)
        return cls(states, lse, np.full((rows, size), -1, dtype=np.int64), np.zeros(rows, dtype=np.int64))

    @property
    def size(self) -> int:
        """Slots of each row."""
        return self.states.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held here."""
        return self.states.nbytes + self.lse.nbytes + self.at.nbytes + self.since.nbytes

    def row_nbytes(self) -> np.ndarray:
        """Bytes of each row, (B,)."""
        return np.full(len(self.since), self.nbytes // max(1, len(self.since)), dtype=np.int64)

    # -- passes ----------------------------------------------------------------------------------------------

    def put(self, queries: Queries, seen: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Remember what a pass asked, whose rows have read `seen` tokens now; `valid` (B, Q): which are tokens."""
        states, lse, count = queries.states.detach(), queries.lse.detach(), queries.states.shape[2]
        if count == 1 and valid is None and bool((seen == seen[0]).all()):
            slot = int(seen[0] - 1) % self.size
            self.states[:, :, slot] = states[:, :, 0]
            self.lse[:, :, slot] = lse[:, :, 0]
            self.at[:, slot] = seen - 1
            return
        real = np.ones((len(seen), count), dtype=bool) if valid is None else valid
        places = seen[:, None] - real.sum(1, keepdims=True) + real.cumsum(1) - 1
        rows, columns = np.nonzero(real & (places >= seen[:, None] - self.size))
        slots = places[rows, columns] % self.size
        row, column, place = (torch.from_numpy(x).to(states.device) for x in (rows, columns, slots))
        self.states[row, :, place] = states[row, :, column]
        self.lse[row, :, place] = lse[row, :, column]
        self.at[rows, slots] = places[rows, columns]

    def due(
        self, groups: Sequence[Group], seen: np.ndarray, prompt: np.ndarray, share: float
    ) -> list[tuple[int, Part]]:
        """Whose interval is over: how many tokens it had, and the rows of a group that have read them.

        An interval begins after a prompt. `share`: the layer's place among the layers, in [0, 1), see `ahead`.
        """
        found: list[tuple[int, Part]] = []
        start = np.minimum(np.maximum(self.since, prompt), seen)
        counts = np.minimum(seen - start, self._unbroken(seen))
        for number, group in enumerate(groups):
            period, rows = group.method.period, group.rows
            if not period:
                continue
            early = ahead(group.method, share)
            begun = (start - prompt + early) // period < (seen - prompt + early) // period
            mine = begun if rows is None else begun & np.isin(np.arange(len(seen)), rows)
            for count in np.unique(counts[mine]).tolist():
                chosen = np.flatnonzero(mine & (counts == count))
                found.append((count, Part(number, group.method, chosen if len(chosen) < len(seen) else None, EVENT)))
        return found

    def _unbroken(self, seen: np.ndarray) -> np.ndarray:
        """How many of each row's last queries are here without a gap: in a block without decisions none were put."""
        places = seen[:, None] - 1 - np.arange(self.size)
        here = np.take_along_axis(self.at, places % self.size, 1) == np.maximum(places, 0)
        unbroken: np.ndarray = here.cumprod(1).sum(1)
        return unbroken

    def asked(self, count: int, seen: np.ndarray, slots: np.ndarray) -> Queries:
        """The last `count` queries of each row, of those that are due; `slots` (B, H): of each head in the view.

        What the rows get that have fewer means nothing.
        """
        places = seen[:, None] - count + np.arange(count)
        where = (
            torch.from_numpy(places % self.size).to(self.states.device)[:, None].expand(-1, self.states.shape[1], -1)
        )
        real = torch.ones(places.shape, dtype=torch.bool, device=self.states.device)
        positions = torch.from_numpy(places.astype(np.int32)).to(self.states.device)
        states, lse = self.states.gather(2, wide(where, self.states)), self.lse.gather(2, where)
        return Queries(states, real, lse, positions, start=torch.from_numpy(np.maximum(slots - count, 0)))

    def seen_to(self, part: Part, seen: np.ndarray) -> None:
        """A part's method has decided about all that its rows have read."""
        rows = slice(None) if part.rows is None else part.rows
        self.since[rows] = seen[rows]

    # -- the cache operations --------------------------------------------------------------------------------

    def drop_from(self, limit: np.ndarray) -> None:
        """Tokens from text position `limit` (B,) on are taken back."""
        self.since = np.minimum(self.since, limit)

    def select(self, rows: np.ndarray) -> "Recent":
        """One whose row i is what row `rows[i]` is here."""
        which = torch.from_numpy(rows).to(self.states.device)
        with torch.inference_mode(False):
            return Recent(self.states[which].clone(), self.lse[which].clone(), self.at[rows], self.since[rows])

    def resized(self, size: int) -> "Recent":
        """One of that size with the same queries; of a smaller one the newest."""
        if size == self.size:
            return self
        made = Recent.empty(len(self.at), size, self.states)
        for row, places in enumerate(self.at):
            newest = np.sort(places[places >= 0])[-size:]
            old, new = (torch.from_numpy(newest % n).to(self.states.device) for n in (self.size, size))
            made.states[row, :, new] = self.states[row, :, old]
            made.lse[row, :, new] = self.lse[row, :, old]
            made.at[row, newest % size] = newest
        made.since = self.since.copy()
        return made

    @staticmethod
    def joined(ours: "Recent | None", theirs: "Recent | None", counts: tuple[int, int]) -> "Recent | None":
        """The rows of both, one behind the other; `counts`: how many rows each is of, where one is None."""
        some = theirs if ours is None else ours
        if some is None:
            return None
        size = max(each.size for each in (ours, theirs) if each is not None)
        both = [
            Recent.empty(rows, size, some.states) if each is None else each.resized(size)
            for each, rows in zip((ours, theirs), counts, strict=True)
        ]
        first, second = both
        with torch.inference_mode(False):
            return Recent(
                torch.cat([first.states, second.states]), torch.cat([first.lse, second.lse]),
                np.concatenate([first.at, second.at]), np.concatenate([first.since, second.since]),
            )  # fmt: skip
