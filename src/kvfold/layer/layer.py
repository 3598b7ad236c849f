"""KVLayer: the segments of one attention layer. It attends, asks the method, and carries its decisions out."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import POSITION, Chunk, Dense, Format, Segment, join
from kvfold.layer.attending import Asking
from kvfold.layer.plan import DEFERRED, Mark, Narrow, Pass, narrowed
from kvfold.layer.stored import Stored, as_stored
from kvfold.methods.base import Decisions, Method, decided
from kvfold.rotation import Compact, Rope
from kvfold.views import ATTENTION, HiddenView, LayerView, Place, Queries, fade_of, faded
from kvfold.views.decisions import Propagate


class KVLayer:
    """One layer: what it has read, what is stored of that, and the method that decides."""

    def __init__(
        self,
        method: Method,
        layer: int,
        paged: tuple[int, ...] = (0,),
        depth: int = 1,
        rope: Rope | None = None,
    ):
        self.method = method
        self.layer, self.paged, self.depth = layer, paged, depth
        self.ordinal = paged.index(layer)
        self.rope = rope
        self._reset()

    def _reset(self) -> None:
        self.stored = Stored()
        self.seen = np.zeros(0, dtype=np.int64)
        self.prompt = np.zeros(0, dtype=np.int64)  # (B,) those of them that came as prompt
        self.width = 0  # columns read, padding counted: what transformers calls the sequence length
        self.shape: tuple[int, int, int] | None = None  # H, D, D_v
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._last: tuple[float, Any] = (1.0, None)  # scale and module of the last pass
        self._waiting: tuple[Queries, Pass] | None = None
        self._clock: Tensor | None = None  # `seen` on the device, (B, 1)

    @property
    def seen(self) -> np.ndarray:
        """Text tokens that each row has read, (B,), padding not counted."""
        return self._seen

    @seen.setter
    def seen(self, tokens: np.ndarray) -> None:
        self._seen, self._on_time = tokens, False

    @property
    def waiting(self) -> Pass | None:
        """The pass whose events wait for `settle`."""
        return self._waiting[1] if self._waiting else None

    @property
    def segments(self) -> list[tuple[Format, Segment]]:
        """The segments with their formats; the first takes what is appended."""
        return self.stored.segments

    @property
    def batch(self) -> int:
        return len(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layer holds, bookkeeping included."""
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        """`nbytes` without the page pools that another layer has `counted`."""
        clock = 0 if self._clock is None else self._clock.nbytes
        return self.stored.bytes_beside(counted) + self.seen.nbytes + self.prompt.nbytes + clock

    def dense_bytes(self, tokens: int | None = None) -> int:
        """Bytes of keys and values that a dense cache would hold for as many tokens; None: as this one has read."""
        heads, d, dv = self.shape or (0, 0, 0)
        return int(self.seen.sum() if tokens is None else tokens) * heads * (d + dv) * self.dtype.itemsize

    def counts(self) -> np.ndarray:
        """Tokens stored for each (row, head), (B, H)."""
        if not self.segments:
            return np.zeros((self.batch, self.shape[0] if self.shape else 0), dtype=np.int64)
        return self.stored.counts()

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
        this: Pass,
        module: Any = None,
        hidden: Float[Tensor, "B Q C"] | None = None,
    ) -> Float[Tensor, "B Hq Q Dv"]:
        """Attend new tokens over what is stored and (causally) over themselves, then store them as the method decides.

        `valid` marks the new tokens that are not padding (None: all are); what a padded query gets has no meaning.
        `hidden`: their states as they enter the layer's attention, for methods that listen to `admit`.
        """
        self.settle(0)
        self._start(k, v)
        self._last = (scale, module)
        if valid is None and q.shape[2] == 1 and self._plain(this):
            return self._step(q, k, v, scale, this)
        ones = valid is None or bool(valid.all())
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if ones else valid
        assert mask is not None
        narrow = this.narrow if this.narrow is not None and self.layer > this.narrow.after else None
        chunk, positions = self._chunk(k, v, mask, ones, narrow)
        counts = np.full(self.batch, q.shape[2]) if ones else mask.sum(1).cpu().numpy()
        first, this.before = self.width == 0, self.seen
        self.seen = self.seen + (counts if narrow is None else narrow.counts)
        self.width += q.shape[2] if narrow is None else narrow.width
        if this.prefill:
            self.prompt = self.seen.copy()
        compact = Compact(self._need_rope()) if self.method.compact else None
        appended, listening = ones and q.shape[2] == 1 and not this.prefill, self._listening(this)
        asked = self.method.asks if listening or this.observe is not None else frozenset()
        asking, admitted = Asking(q, positions, scale, compact), None
        # A kernel counts the queries that came so far; where others ended before, the view counts places in the text.
        fade = fade_of(asked) if narrow is None else None
        if not appended:
            admitted = self._admitted(hidden, mask, positions, this)
            chunk = chunk if admitted is None else chunk.but(admitted)
            past = None if first or self.stored.empty else self.stored
            out, lse, left = asking.prompt(past, k, v, mask, ones, fade, admitted)
        else:
            self.stored.open.append(chunk, even=True)
            out, lse, left = self._attend_token(asking, this, ATTENTION in asked)
        memo = {} if left is None else {ATTENTION if appended or fade is None else faded(fade): left}
        waits = this.defer and this.listen and any(map(self.method.listens, DEFERRED))
        queries, new = Queries(q, mask, lse, positions, read=out), None if appended else chunk
        decides = listening and not waits
        if decides or this.observe is not None:
            view = self._view(queries, self._place(this), new, memo)
            if this.observe is not None:
                tokens = view.tokens  # whoever observes may look at the view when the pages have changed
                view = replace(view, tokens=Chunk(tokens.keys, tokens.values, tokens.valid, tokens.columns))
                this.observe(view)
            if decides:
                self.stored.commit(self._decide(view, this), new, slack=appended)
        if not decides and not appended:
            self.stored.open.append(chunk, even=ones and admitted is None)
        if waits:
            # By then the new tokens are stored without padding, behind those of their row and head.
            here = mask[0].nonzero()[:, 0] if self.batch == 1 else torch.arange(q.shape[2], device=q.device)
            self._waiting = (replace(queries, read=None).pick(here), this)
        return out

    def _plain(self, this: Pass) -> bool:
        """Whether a generated token takes the short way: one segment, nothing read selectively or moved or put off."""
        return (
            not (this.prefill or this.defer or this.observe is not None or self.method.compact)
            and len(self.segments) == 1
            and not (this.listen and self.method.listens("before_attend"))
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, this: Pass) -> Tensor:
        """What `attend` does, for one generated token a row: the same, with less around it."""
        (b, hq, _, d), h, listening = q.shape, k.shape[1], self._listening(this)
        positions = self._clocked()
        asked = listening and ATTENTION in self.method.asks
        segment = self.stored.open
        out, lse, left = segment.step(q.reshape(b, h, hq // h, 1, d), k, v, positions, scale, weights=asked)
        self.count_step()
        if listening:
            everyone = torch.ones(b, 1, dtype=torch.bool, device=q.device)
            queries = Queries(q, everyone, lse.reshape(b, hq, 1), positions.clone())
            view = self._view(queries, self._place(this), memo={} if left is None else {ATTENTION: left})
            self.stored.commit(self._decide(view, this), None, slack=True)
        positions += 1
        return out.reshape(b, hq, 1, -1)

    def next_positions(self) -> Tensor:
        """Where each row's next token stands in its text, (B, 1), int64."""
        return self._clocked().long()

    def _clocked(self) -> Tensor:
        """Where each row's next token stands, (B, 1) on the device, where a step moves it on."""
        if self._clock is None or not self._on_time:
            now = torch.from_numpy(self.seen[:, None].astype(np.int32)).to(self.device)
            same = self._clock is not None and self._clock.shape == now.shape
            # In its place, where it fits: a CUDA graph reads where it was captured.
            self._clock, self._on_time = self._clock.copy_(now) if self._clock is not None and same else now, True
        return self._clock

    def reserve_step(self) -> list[Tensor]:
        """Make room for one more token in each row; all tensors that such a step reads and writes on the device.

        While they stay the same ones, a CUDA graph may replay the step: `count_step(replayed=True)` each time.
        """
        return [self._clocked(), *self.stored.open.reserve()]

    def count_step(self, *, replayed: bool = False) -> None:
        """Count one more generated token in every row, here; the device counts by itself."""
        if replayed:
            self.stored.open.table.step()
        self._seen = self._seen + 1
        self.width += 1

    def settle(self, drop: int, *, turn: bool = False) -> None:
        """Take the last `drop` columns back, then run the events that waited for it (assisted decoding).

        `turn`: no crop came, so what looked like a draft was a further prompt.
        """
        waiting, self._waiting = self._waiting, None
        if drop:
            self._drop(drop)
        if waiting is not None and waiting[0].states.shape[2] > drop:
            queries, this = waiting
            if turn and queries.states.shape[2] > 1:
                this.prefill, self.prompt = True, self.seen.copy()
            if not self._listening(this):
                return
            left = queries.states.shape[2] - drop
            start = torch.from_numpy(self.stored.lengths() - left)
            queries = replace(queries.pick(torch.arange(left, device=self.device)), start=start)
            self.stored.commit(self._decide(self._view(queries, self._place(this)), this), None)

    def decide(self, decisions: Decisions, this: Pass) -> None:
        """Carry out decisions that came after the layer was stored (after_layer, after_forward)."""
        view = self.view(this)
        for decision in decided(decisions):
            view = view.apply(decision)
        self.stored.commit(view, None)

    def alike(self, other: "KVLayer") -> bool:
        """Whether a token's keys and values mean the same kind of vector in both layers."""
        frames = [(x.shape, x.dtype, x.device, x.rope, getattr(x._last[1], "use_rope", None)) for x in (self, other)]
        return frames[0] == frames[1]

    def view(self, this: Pass) -> LayerView:
        """What is stored now; without queries."""
        assert self.shape is not None
        empty = torch.zeros(self.batch, self.shape[0], 0, self.shape[1], dtype=self.dtype, device=self.device)
        no_one = torch.zeros(self.batch, 0, dtype=torch.int32, device=self.device)
        none = Queries(empty, no_one.bool(), empty.new_zeros(empty.shape[:3]).float(), no_one)
        return self._view(none, self._place(this))

    def adopt(self, view: LayerView, this: Pass) -> None:
        """Store what this layer's method decides about another cache's view of its first forward pass.

        One exact prefill then serves many methods and budgets.
        """
        if self.width:
            raise ValueError(
                f"layer {self.layer} has read {self.width} tokens; only an empty cache can adopt a prefill"
            )
        self._start(view.keys, view.values)
        self._last = (view.place.scale, view.place.module)
        self.seen = view.queries.valid.sum(1).cpu().numpy().astype(np.int64)
        self.prompt, self.width = self.seen.copy(), view.new
        view = replace(view, place=self._place(this))
        if self._listening(this):
            view = self._decide(view, this)
        self.stored.commit(view, view.tokens)

    # -- parts of it -----------------------------------------------------------------------------------------

    def _start(self, k: Tensor, v: Tensor) -> None:
        if self.shape is None:
            self.shape, self.dtype, self.device = (k.shape[1], k.shape[3], v.shape[3]), k.dtype, k.device
            self.seen = np.zeros(k.shape[0], dtype=np.int64)
            self.prompt = np.zeros(k.shape[0], dtype=np.int64)
            sample = Chunk(k, v, k.new_zeros(k.shape[:3], dtype=torch.bool))
            self.stored = Stored([(Dense(), Dense().segment(sample))])
        elif k.shape[0] != self.batch:
            raise ValueError(f"the batch has {k.shape[0]} rows, but the cache holds {self.batch}")

    def _chunk(self, k: Tensor, v: Tensor, mask: Tensor, ones: bool, narrow: Narrow | None) -> tuple[Chunk, Tensor]:
        """The new tokens as a chunk, and their text positions (B, Q)."""
        start = torch.from_numpy(self.seen).to(k.device)[:, None]
        step = torch.arange(k.shape[2], device=k.device) if ones else (mask.cumsum(1) - 1).clamp(min=0)
        positions = (start + step if narrow is None else narrow.positions.to(k.device)).to(torch.int32)
        wide = positions[:, None].expand(-1, k.shape[1], -1)
        valid = mask[:, None].expand(-1, k.shape[1], -1)
        return Chunk(k.detach(), v.detach(), valid, {POSITION: wide}), positions

    def _admitted(
        self, hidden: Tensor | None, mask: Tensor, positions: Tensor, this: Pass
    ) -> Bool[Tensor, "B H Q"] | None:
        """Which of a prompt's new tokens the method lets in; None: all."""
        if not (this.prefill and this.listen and self.method.listens("admit")):
            return None
        if this.defer:
            raise ValueError(f"method={self.method} chooses before a prompt is read: no assisted decoding with it")
        if hidden is None:
            raise ValueError(f"method={self.method} needs the states that enter layer {self.layer}; nobody gave them")
        assert self.shape is not None
        everyone = mask[:, None].expand(-1, self.shape[0], -1)
        flags = self.method.admit(HiddenView(hidden, mask, positions, self.shape[0], self._place(this)))
        flags = None if flags is None else flags & everyone
        return None if flags is None or torch.equal(flags, everyone) else flags

    def _attend_token(self, asking: Asking, this: Pass, weights: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        read, (q, positions) = None, (asking.q, asking.positions)
        if this.listen and self.method.listens("before_attend"):
            lse = q.new_zeros(q.shape[:3], dtype=torch.float32)  # not known yet
            queries = Queries(q, torch.ones_like(positions, dtype=torch.bool), lse, positions)
            view = self._view(queries, self._place(this))
            decision = self.method.before_attend(view)
            if decision is not None:
                newest = view.positions == torch.from_numpy(self.seen - 1).to(q.device)[:, None, None]
                read = as_stored(decision.mask | newest, view.order)
        weights = weights and asking.compact is None and read is None and len(self.segments) == 1
        return asking.stored(self.stored, read=read, weights=weights)

    def _listening(self, this: Pass) -> bool:
        return this.listen and self.method.listens("after_prefill" if this.prefill else "after_decode")

    def _decide(self, view: LayerView, this: Pass) -> LayerView:
        event = self.method.after_prefill if this.prefill else self.method.after_decode
        with torch.autocast(view.positions.device.type, enabled=False):
            made = decided(event(view))
        for decision in made:
            view = view.apply(decision)
            if isinstance(decision, Propagate) and not this.defer:
                if this.narrow is not None:
                    raise ValueError(f"method={self.method} narrows one forward pass twice; it can only do so once")
                this.narrow = narrowed(decision, view.queries, self.layer)
        return view

    def _place(self, this: Pass) -> Place:
        scale, module = self._last
        prompt, seen = torch.from_numpy(self.prompt), torch.from_numpy(self.seen)
        return Place(
            self.layer, self.ordinal, self.paged, self.depth, scale, prompt, seen, module, self.rope,
            self.method.compact, this.step, this.token_ids, this.images,
        )  # fmt: skip

    def _need_rope(self) -> Rope:
        if self.rope is None:
            raise ValueError(f"method={self.method} needs the model's RoPE, and layer {self.layer} has none")
        return self.rope

    def _view(
        self, queries: Queries, place: Place, new: Chunk | None = None, memo: dict[str, Tensor] | None = None
    ) -> LayerView:
        """What is stored, and `new` behind it."""
        stored, order = self.stored.tokens()
        if new is not None:
            stored = join([stored, new]) if stored.valid.shape[2] else new
        return LayerView(stored, queries, place, order=order, memo=memo or {})

    def _drop(self, columns: int) -> None:
        """Take back the last `columns` tokens of every row."""
        columns = min(columns, self.width)
        self.seen = np.maximum(self.seen - columns, 0)
        self.prompt = np.minimum(self.prompt, self.seen)
        self.width -= columns
        self.stored.drop_from(torch.from_numpy(self.seen).to(self.device)[:, None, None])

    def mark(self) -> Mark:
        """Where the layer stands, for `rewind`."""
        counts = [segment.counts().copy() for _, segment in self.segments]
        return Mark(self.seen.copy(), self.prompt.copy(), self.width, counts)

    def rewind(self, mark: Mark) -> None:
        """Take back everything that was appended since; nothing may have been decided in between."""
        if not mark.counts:
            self.clear()
            return
        self.seen, self.prompt, self.width = mark.seen, mark.prompt, mark.width
        for (_, segment), counts in zip(self.segments, mark.counts, strict=True):
            segment.truncate(counts)

    # -- the cache operations --------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared until one of the sharers writes."""
        self.stored.select(rows)
        self.seen, self.prompt = self.seen[rows], self.prompt[rows]

    def fork(self) -> "KVLayer":
        """A second layer over the same pages."""
        other = KVLayer(self.method, self.layer, self.paged, self.depth, self.rope)
        other.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "stored"}
        other.seen, other.prompt, other._clock = self.seen.copy(), self.prompt.copy(), None
        other.stored = self.stored.fork(self.batch)
        return other

    def clear(self) -> None:
        """Forget everything."""
        self.stored.clear()
        self._reset()
