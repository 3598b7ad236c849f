"""KVLayer: what one attention layer has stored. It attends; `Moment` asks the methods and carries out what they say."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import Chunk, Dense, Format, Indexed, Spec
from kvfold.layer.attending import Asking
from kvfold.layer.carrying import commit
from kvfold.layer.deciding import Moment
from kvfold.layer.framing import entered, measured
from kvfold.layer.held import Held
from kvfold.layer.parts import Parts, shares
from kvfold.layer.plan import DEFERRED, Plan
from kvfold.layer.rows import Rows
from kvfold.layer.segments import new_tokens
from kvfold.layer.stamping import labelled, stamped
from kvfold.layer.stored import Stored
from kvfold.rotation import Compact
from kvfold.views import ATTENTION, LayerView, Queries, Site, fade_of, faded
from kvfold.views.decisions import Streams

DENSE = Dense()


class KVLayer(Held):
    """One layer of a cache that attends, and whose tokens are kept as the methods of its rows decide."""

    def attend(
        self,
        q: Float[Tensor, "B Hq Q D"],
        k: Float[Tensor, "B H Q D"],
        v: Float[Tensor, "B H Q Dv"],
        valid: Bool[Tensor, "B N"] | None,
        scale: float,
        plan: Plan,
        module: Any = None,
        hidden: Float[Tensor, "B Q C"] | None = None,
        parts: Parts | None = None,
    ) -> Float[Tensor, "B Hq Q Dv"]:
        """Attend new tokens over what is stored and over themselves, then store them as the methods decide.

        `valid` marks the new tokens that are not padding (None: all are); what a padded query gets has no meaning.
        `hidden`: their states as they enter the layer's attention, for methods that listen to `admit`.
        `parts`: these are some of the pass's tokens, and `valid` is of all; they are stored when the last are there.
        """
        if k.shape[0] != self.stored.spec.rows:
            self._open(k, v, q.shape[1])
        if not plan.number or plan.number != self.rows.number:
            self.rows.begin(plan, k.shape[0], k.shape[2] if parts is None else parts.total, valid, k.device)
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
        if plan.framed:
            q, k = entered((q, k), places if parts is None else parts.of(places), self.rows.groups, self.site)
        moment, everyone = self.moment(plan), valid
        if everyone is None:
            everyone = torch.ones(places.shape, dtype=torch.bool, device=q.device)
        if valid is None and places.shape[1] == 1 and not plan.prefill:
            asking = Asking(q, places[:, :1], scale, self._compact(k.device))
            self.stored.append(stamped(moment, new_tokens(k, v, None, places, moment.labels())), even=True)
            read = moment.read(q, places)
            weights = ATTENTION in plan.asks and asking.compact is None and read is None
            handed = plan.handed if read is None else None
            out, lse, left = asking.stored(self.stored, read=read, weights=weights, handed=handed)
            queries, memo = Queries(q, everyone, lse, places, read=out), {} if left is None else {ATTENTION: left}
            self._store(moment, queries, None, memo, even=True)
            return out
        if parts is None:
            parts = Parts(places.shape[1])
            parts.reach(parts.total)
        admitted = moment.admitted(hidden, everyone, places)
        parts.put(q=q, k=k, v=v)
        # A kernel counts the queries that came so far; where others ended before, the view counts in the text.
        fade = fade_of(plan.asks) if narrow is None else None
        asking = Asking(q, places[:, :1], scale, self._compact(k.device))
        counted = None if fade is None else parts.of(shares(everyone, fade))
        streams = moment.streams()
        self._read(asking, parts, valid, counted, admitted, streams, plan.block)
        if parts.last:
            new = new_tokens(parts.so_far("k"), parts.so_far("v"), valid, places, moment.labels())
            new = new if admitted is None else new.but(admitted)
            chunk, asked = stamped(moment, new), (parts.so_far("q"), everyone, parts.so_far("lse"), places)
            queries = Queries(*asked, read=parts.so_far("out"), plain=streams is None and chunk is new)
            left = parts.sums()
            memo = {} if left is None or fade is None else {faded(fade): left}
            self._store(moment, queries, chunk, memo, even=valid is None)
        return parts.of_this("out")

    def _read(
        self, asking: Asking, parts: Parts, valid: Tensor | None, counted: Tensor | None, admitted: Tensor | None,
        streams: Streams | None, block: bool,
    ) -> None:  # fmt: skip
        """A part of a prompt attends over itself, the parts before it, and what is stored."""
        known = None if valid is None else valid[:, : parts.stop]
        past = None if self.stored.empty else self.stored
        k, v = parts.so_far("k"), parts.so_far("v")
        out, lse, sums = asking.prompt(past, k, v, known, counted, admitted, streams, block)
        parts.put(out=out, lse=lse)
        parts.add(sums)

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
        if plan.recalls and not waits and (not plan.prefill or plan.prompts is not None):
            moment.remember(queries)
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
        if plan.framed:
            q, k = entered((q, k), positions, self.rows.groups, self.site)
        asked = ATTENTION in plan.asks
        own = plan.own and len(self.segments) > 1 and self.stored.shows_own
        grouped = q.reshape(b, h, hq // h, 1, d)
        out, lse, left = self.stored.step(grouped, k, v, positions, self.scale, asked, plan.handed, own)
        if not (plan.parts or plan.recalls):
            return out.reshape(b, hq, 1, -1)
        everyone = torch.ones(b, 1, dtype=torch.bool, device=q.device)
        queries, moment = Queries(q, everyone, lse.reshape(b, hq, 1), positions), self.moment(plan)
        if plan.parts:
            memo = {} if left is None else {ATTENTION: left}
            view = moment.own_view(queries, memo) if own else moment.view(queries, memo=memo)
            decided = moment.decide(view)
            if decided is not view:
                commit(self.stored, decided, None, slack=True)
        if plan.recalls:
            moment.remember(queries)
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
        self._open(view.keys, view.values, view.queries.states.shape[1])
        if not plan.number or plan.number != self.rows.number:
            self.rows.begin(plan, len(view.valid), view.new, view.queries.valid, view.valid.device)
        self.number, self.scale, self.module = plan.number, view.place.scale, view.place.module
        moment = self.moment(plan)
        view = replace(view, place=moment.place(), bounds=(0,), held=(self.segments[0][0],))
        view = labelled(moment, view)
        if plan.parts:
            view = moment.decide(view)
        commit(self.stored, view, view.tokens)

    def _open(self, k: Tensor, v: Tensor, queries: int) -> None:
        rows = self.rows
        if rows.batch and k.shape[0] != rows.batch:
            raise ValueError(f"the batch has {k.shape[0]} rows, but the cache holds {rows.batch}")
        if self.segments:
            return
        (b, h, _, d), site = k.shape, self.site
        found = measured((group.method for group in rows.groups), site)
        spec = Spec(b, h, d, v.shape[3], k.dtype, k.device, site.layer, site.rope, found, queries // h, self.arena)
        self.stored = Stored(replace(spec, memory=self.memory))
        for group in rows.groups:
            self.stored.opened[... if group.rows is None else group.rows] = self.stored.number(
                format_of(group.method, site)
            )

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

    def fork(self, rows: Rows) -> "KVLayer":
        """A second layer over the same pages; `rows`: its cache's."""
        site = self.site
        other = KVLayer(rows, site.layer, site.paged, site.depth, site.rope, self.arena, self.memory)
        other.stored, other.number, other.scale, other.module = self.stored.fork(), self.number, self.scale, self.module
        return other


def format_of(method: Any, site: Site) -> Format:
    """The format that a method's tokens go to in a layer, with an index where its generated tokens read a part."""
    form: Format = DENSE if method.format is None else method.format
    chosen = method.selection(site) if method.listens("selection") else None
    return form if chosen is None else Indexed(form, chosen)
