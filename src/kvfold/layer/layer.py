"""KVLayer: what one attention layer has stored. It attends; `Moment` asks the methods and carries out what they say."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import Chunk, Dense, Format, Segment, Spec
from kvfold.layer.attending import Asking
from kvfold.layer.carrying import commit
from kvfold.layer.deciding import Moment
from kvfold.layer.plan import DEFERRED, Plan
from kvfold.layer.rows import Rows
from kvfold.layer.stored import Stored, new_tokens
from kvfold.rotation import Compact, Rope
from kvfold.views import ATTENTION, LayerView, Queries, Site, fade_of, faded

DENSE = Dense()
NOTHING = Spec(0, 0, 0, 0, torch.float32, torch.device("cpu"))


class KVLayer:
    """One layer of a cache; `rows` is what the rows of the batch have read, the same for all layers."""

    def __init__(
        self, rows: Rows, layer: int, paged: tuple[int, ...] = (0,), depth: int = 1, rope: Rope | None = None,
        arena: Any = None,
    ):  # fmt: skip
        self.rows, self.arena = rows, arena
        self.site = Site(layer, paged.index(layer), paged, depth, rope)
        self._reset()

    def _reset(self) -> None:
        self.stored = Stored(NOTHING)
        self.number = 0  # the pass that it has read last, see `Rows`
        self.scale: float = 1.0
        self.module: Any = None

    @property
    def layer(self) -> int:
        """Index among the model's layers."""
        return self.site.layer

    @property
    def ordinal(self) -> int:
        """Index among the layers on pages."""
        return self.site.ordinal

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """KV heads, and the sizes of keys and values; None: nobody has attended yet."""
        spec = self.stored.spec
        return (spec.heads, spec.key_size, spec.value_size) if self.segments else None

    @property
    def seen(self) -> np.ndarray:
        """Text tokens that each row has read, (B,), padding not counted."""
        return self.rows.seen

    @property
    def prompt(self) -> np.ndarray:
        """How many it had read by the end of its last prompt, (B,)."""
        return self.rows.prompt

    @property
    def width(self) -> int:
        """Columns that the layer has read, padding counted; in a pass that has not come here yet, those before it."""
        return self.rows.width if self.number == self.rows.number else self.rows.width_before

    @property
    def batch(self) -> int:
        return self.rows.batch

    @property
    def segments(self) -> list[tuple[Format, Segment]]:
        """The segments with their formats."""
        return self.stored.segments

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layer holds, what the rows have read included."""
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        """`nbytes` without the page pools and the rows that another layer has `counted`."""
        rows = 0 if id(self.rows) in counted else self.rows.nbytes
        counted.add(id(self.rows))
        return rows + self.stored.bytes_beside(counted)

    def dense_bytes(self, tokens: int | None = None) -> int:
        """Bytes of keys and values that a dense cache would hold for as many tokens; None: as this one has read."""
        heads, d, dv = self.shape or (0, 0, 0)
        return int(self.seen.sum() if tokens is None else tokens) * heads * (d + dv) * self.stored.spec.dtype.itemsize

    def counts(self) -> np.ndarray:
        """Tokens stored for each (row, head), (B, H)."""
        return self.stored.counts() if self.segments else np.zeros((self.batch, 0), dtype=np.int64)

    def kept(self) -> list[list[list[int]]]:
        """Text positions stored, kept[row][head], ascending."""
        return self.stored.positions() if self.segments else [[] for _ in range(self.batch)]

    # -- one forward pass ------------------------------------------------------------------------------------

    def attend(
        self,
        q: Float[Tensor, "B Hq Q D"],
        k: Float[Tensor, "B H Q D"],
        v: Float[Tensor, "B H Q Dv"],
        valid: Bool[Tensor, "B Q"] | None,
        scale: float,
        plan: Plan,
        module: Any = None,
        hidden: Float[Tensor, "B Q C"] | None = None,
    ) -> Float[Tensor, "B Hq Q Dv"]:
        """Attend new tokens over what is stored and over themselves, then store them as the methods decide.

        `valid` marks the new tokens that are not padding (None: all are); what a padded query gets has no meaning.
        `hidden`: their states as they enter the layer's attention, for methods that listen to `admit`.
        """
        if not self.segments or k.shape[0] != self.rows.batch:
            self._open(k, v)
        self.rows.begin(plan, k.shape[0], k.shape[2], valid, k.device)
        self.number, self.scale, self.module = plan.number, scale, module
        if plan.step:
            return self._step(q, k, v, plan)
        narrow = plan.narrow if plan.narrow is not None and self.layer > plan.narrow.after else None
        if narrow is None:
            valid, places = plan.valid, plan.positions
        else:
            valid, places = (None if valid is None or bool(valid.all()) else valid), narrow.positions
        assert places is not None
        places = places.to(k.device)
        moment, asking = self.moment(plan), Asking(q, places, scale, self._compact(k.device))
        everyone = torch.ones(places.shape, dtype=torch.bool, device=q.device) if valid is None else valid
        chunk: Chunk | None = new_tokens(k, v, valid, places)
        assert chunk is not None
        if valid is None and q.shape[2] == 1 and not plan.prefill:
            self.stored.append(chunk, even=True)
            read, chunk, name = moment.read(q, places), None, ATTENTION
            weights = ATTENTION in plan.asks and asking.compact is None and read is None
            out, lse, left = asking.stored(self.stored, read=read, weights=weights)
        else:
            admitted = moment.admitted(hidden, everyone, places)
            chunk = chunk if admitted is None else chunk.but(admitted)
            past = None if self.stored.empty else self.stored
            # A kernel counts the queries that came so far; where others ended before, the view counts in the text.
            fade = fade_of(plan.asks) if narrow is None else None
            name = ATTENTION if fade is None else faded(fade)
            out, lse, left = asking.prompt(past, k, v, valid, fade, admitted, plan.block)
        queries, memo = Queries(q, everyone, lse, places, read=out), {} if left is None else {name: left}
        self._store(moment, queries, chunk, memo, even=valid is None)
        return out

    def _store(
        self, moment: Moment, queries: Queries, chunk: Chunk | None, memo: dict[str, Tensor], *, even: bool
    ) -> None:
        """Hold the new tokens (None: they are stored) as the methods decide, now or when a crop has come."""
        plan = moment.plan
        waits = plan.defer and plan.listen and any(map(self.rows.listens, DEFERRED))
        decides = bool(plan.parts) and not waits
        if decides or plan.observe is not None:
            view = moment.view(queries, chunk, memo)
            if plan.observe is not None:
                tokens = view.tokens  # whoever observes may look at the view when the pages have changed
                view = replace(view, tokens=Chunk(tokens.keys, tokens.values, tokens.valid, tokens.columns))
                plan.observe(view)
            if decides:
                commit(self.stored, moment.decide(view), chunk, slack=chunk is None)
        if not decides and chunk is not None:
            self.stored.append(chunk, even=even and bool(chunk.valid.all()))
        if waits:
            # By then the new tokens are stored without padding, behind those of their row and head.
            mask = queries.valid
            here = mask[0].nonzero()[:, 0] if len(mask) == 1 else torch.arange(mask.shape[1], device=mask.device)
            plan.waiting[self.ordinal] = replace(queries, read=None).pick(here)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """What `attend` does, for one generated token a row: the same, with less around it."""
        b, hq, _, d = q.shape
        h, positions = k.shape[1], plan.positions
        assert positions is not None
        if positions.device != k.device:
            positions = positions.to(k.device)
        asked = ATTENTION in plan.asks
        out, lse, left = self.stored.step(q.reshape(b, h, hq // h, 1, d), k, v, positions, self.scale, asked)
        if plan.parts:
            everyone = torch.ones(b, 1, dtype=torch.bool, device=q.device)
            queries, moment = Queries(q, everyone, lse.reshape(b, hq, 1), positions), self.moment(plan)
            view = moment.view(queries, memo={} if left is None else {ATTENTION: left})
            commit(self.stored, moment.decide(view), None, slack=True)
        return out.reshape(b, hq, 1, -1)

    def moment(self, plan: Plan) -> Moment:
        """The layer in a pass."""
        return Moment(self.site, self.stored, self.rows, plan, self.scale, self.module)

    def view(self, plan: Plan) -> LayerView:
        """What is stored now; without queries."""
        return self.moment(plan).without_queries()

    def adopt(self, view: LayerView, plan: Plan) -> None:
        """Store what this layer's method decides about another cache's view of its first forward pass.

        One exact prefill then serves many methods and budgets.
        """
        if self.number:
            raise ValueError(
                f"layer {self.layer} has read {self.width} tokens; only an empty cache can adopt a prefill"
            )
        self._open(view.keys, view.values)
        self.rows.begin(plan, len(view.valid), view.new, view.queries.valid, view.valid.device)
        self.number, self.scale, self.module = plan.number, view.place.scale, view.place.module
        moment = self.moment(plan)
        view = replace(view, place=moment.place(), bounds=(0,), held=(self.segments[0][0],))
        if plan.parts:
            view = moment.decide(view)
        commit(self.stored, view, view.tokens)

    def _open(self, k: Tensor, v: Tensor) -> None:
        rows = self.rows
        if rows.batch and k.shape[0] != rows.batch:
            raise ValueError(f"the batch has {k.shape[0]} rows, but the cache holds {rows.batch}")
        if self.segments:
            return
        (b, h, _, d), site = k.shape, self.site
        self.stored = Stored(
            Spec(b, h, d, v.shape[3], k.dtype, k.device, layer=site.layer, rope=site.rope, arena=self.arena)
        )
        for group in rows.groups:
            self.stored.opened[... if group.rows is None else group.rows] = self.stored.number(format_of(group.method))

    def _compact(self, device: torch.device) -> Compact | None:
        """How keys are read where a method has compact positions."""
        moved = [group for group in self.rows.groups if group.method.compact]
        if not moved:
            return None
        if self.site.rope is None:
            raise ValueError(f"method={moved[0].method} needs the model's RoPE, and layer {self.layer} has none")
        rows = None
        if len(self.rows.groups) > 1:
            rows = torch.zeros(self.batch, dtype=torch.bool, device=device)
            for group in moved:
                rows[group.rows] = True
        return Compact(self.site.rope, rows=rows)

    def alike(self, other: "KVLayer") -> bool:
        """Whether a token's keys and values mean the same kind of vector in both layers."""
        frames = [
            (x.shape, x.stored.spec.dtype, x.stored.spec.device, x.site.rope, getattr(x.module, "use_rope", None))
            for x in (self, other)
        ]
        return frames[0] == frames[1]

    # -- a captured step -------------------------------------------------------------------------------------

    def reserve_step(self) -> list[Tensor]:
        """Make room for one more token in each row; all tensors that such a step reads and writes on the device.

        While they stay the same ones, a CUDA graph may replay the step: `Rows.replayed` and ours count it each time.
        """
        return [self.rows.clock(self.stored.spec.device), *self.stored.open.reserve()]

    def replayed(self) -> None:
        """A captured step ran: count its token in each row, the device has."""
        self.stored.open.replayed()
        self.number = self.rows.number

    # -- the cache operations: of this layer alone, its cache does the same to the rows ---------------------

    def mark(self) -> list[np.ndarray]:
        """What each segment holds, for `rewind`."""
        return [segment.counts().copy() for _, segment in self.segments]

    def rewind(self, mark: list[np.ndarray]) -> None:
        """Take back everything that was appended since; nothing may have been decided in between."""
        if not mark:
            self.clear()
            return
        for (_, segment), counts in zip(self.segments, mark, strict=True):
            segment.truncate(counts)
        self.number = self.rows.number

    def drop_from(self, limit: np.ndarray) -> None:
        """Drop the tokens whose text position is `limit` (B,) or later."""
        self.stored.drop_from(limit)

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared until one of the sharers writes."""
        self.stored.select(rows)

    def join(self, other: "KVLayer") -> None:
        """Take the rows of another cache's layer behind ours; `other` is used up."""
        if not self.segments:
            self.stored, self.scale, self.module = other.stored, other.scale, other.module
        else:
            self.stored.join(other.stored)

    def fork(self, rows: Rows) -> "KVLayer":
        """A second layer over the same pages; `rows`: its cache's."""
        site = self.site
        other = KVLayer(rows, site.layer, site.paged, site.depth, site.rope, self.arena)
        other.stored, other.number, other.scale, other.module = self.stored.fork(), self.number, self.scale, self.module
        return other

    def clear(self) -> None:
        """Forget everything."""
        self.stored.clear()
        self._reset()


def format_of(method: Any) -> Format:
    """The format that a method's tokens go to."""
    return DENSE if method.format is None else method.format
