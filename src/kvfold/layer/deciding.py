"""One layer in one pass: what methods see of it and what they decide, each about its own rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import POSITION, Chunk, join
from kvfold.layer.carrying import commit
from kvfold.layer.plan import Group, Part, Plan, narrowed
from kvfold.layer.recent import EVENT, Recent, ahead
from kvfold.layer.rows import Rows
from kvfold.layer.segments import as_stored
from kvfold.layer.stored import Stored
from kvfold.methods.base import decided
from kvfold.views import ATTENTION, HiddenView, LayerView, NewWords, Place, Queries, Site
from kvfold.views.decisions import Amend, Decision, Propagate


@dataclass(frozen=True, eq=False)
class Moment:
    """A layer while a pass goes through it."""

    site: Site
    stored: Stored
    rows: Rows
    plan: Plan
    scale: float
    module: Any
    turn: bool = False
    """Whether generated tokens are what is decided about now, as if they were a further turn of the prompt."""

    def place(self, group: int = 0, rows: np.ndarray | None = None, event: str = "") -> Place:
        """Where a group's view stands; `rows`: None for all. `event`: which, where its rows differ in that."""
        prompt, seen, images, ids = self.rows.prompt, self.rows.seen, self.plan.images, self.plan.token_ids
        if self.turn:
            prompt, images, ids = seen, None, None  # the pass brought but the last of them
        if rows is not None:
            chosen = torch.from_numpy(rows)
            prompt, seen = prompt[rows], seen[rows]
            images, ids = images and images.of_rows(chosen), None if ids is None else ids[chosen.to(ids.device)]
        return Place(
            **vars(self.site), scale=self.scale, module=self.module, prompt=torch.from_numpy(prompt),
            seen=torch.from_numpy(seen), compact=self.rows.groups[group].method.compact,
            step=self.plan.steps.setdefault((group, event), {}), token_ids=ids, images=images,
        )  # fmt: skip

    def view(self, queries: Queries, new: Chunk | None = None, memo: dict[str, Tensor] | None = None) -> LayerView:
        """What is stored, and `new` behind it, of all rows; `memo` is what the kernels left, as segments have it."""
        stored, order = self.stored.tokens()
        segments, memo = self.stored.segments, memo or {}
        if order is not None and ATTENTION in memo:
            left = memo[ATTENTION]
            memo = {**memo, ATTENTION: left.gather(-1, order[:, :, None, None].expand_as(left))}
        bounds, held = ((stored.valid.shape[2],), (segments[0][0],)) if len(segments) == 1 else self.stored.laid()
        if new is not None:
            stored = join([stored, new]) if stored.valid.shape[2] else new
        return LayerView(stored, queries, self.place(), order=order, bounds=bounds, held=held, memo=memo)

    def own_view(self, queries: Queries, memo: dict[str, Tensor]) -> LayerView:
        """What `view` gives, without the tokens that are held in other formats than the one that is open."""
        tokens, elsewhere = self.stored.own()
        bounds, held = (tokens.valid.shape[2],), (self.stored.segments[0][0],)
        return LayerView(tokens, queries, self.place(), bounds=bounds, held=held, memo=memo, elsewhere=elsewhere)

    def without_queries(self) -> LayerView:
        """What is stored now."""
        spec, batch = self.stored.spec, self.rows.batch
        empty = torch.zeros(batch, spec.heads, 0, spec.key_size, dtype=spec.dtype, device=spec.device)
        no_one = torch.zeros(batch, 0, dtype=torch.int32, device=spec.device)
        return self.view(Queries(empty, no_one.bool(), empty.new_zeros(empty.shape[:3]).float(), no_one))

    def labels(self) -> Mapping[str, Tensor]:
        """What methods call the pass's tokens, asked once for all layers: columns (B, Q), zeros in rows of others."""
        plan, groups = self.plan, [group for group in self.rows.groups if group.method.listens("label")]
        if not groups:
            return {}
        if plan.labels is None:
            plan.labels = self._labelled(groups)
        if plan.narrow is None or self.site.layer <= plan.narrow.after:
            return plan.labels
        return {name: label.gather(1, plan.narrow.columns.clamp(min=0)) for name, label in plan.labels.items()}

    def _labelled(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        plan, device = self.plan, self.stored.spec.device
        assert plan.positions is not None
        valid = torch.ones(plan.positions.shape, dtype=torch.bool) if plan.valid is None else plan.valid.cpu()
        ids = None if plan.token_ids is None else plan.token_ids.cpu()
        found = dict[str, Tensor]()
        for group in groups:
            rows = torch.arange(len(valid)) if group.rows is None else torch.from_numpy(group.rows)
            newest = partial(self.stored.newest, rows)
            said = NewWords(None if ids is None else ids[rows], valid[rows], newest, self.rows.ends)
            for name, label in group.method.label(said).items():
                whole = found.setdefault(name, torch.zeros(valid.shape, dtype=label.dtype))
                whole[rows] = label
        return {name: label.to(device) for name, label in found.items()}

    # -- the events of a layer -------------------------------------------------------------------------------

    def decide(self, view: LayerView) -> LayerView:
        """The view after what the methods of this pass's parts decide."""
        parts = self.plan.parts
        if len(parts) == 1 and parts[0].rows is None:
            return self._run(parts[0], view)
        groups = [part.group for part in parts]
        found = []
        for part in parts:
            event = part.event if groups.count(part.group) > 1 else ""
            found.append((part.rows, self._run(part, self.of_group(view, part.group, part.rows, event))))
        return combined(view, found)

    def of_group(self, view: LayerView, group: int, rows: np.ndarray | None, event: str = "") -> LayerView:
        """A view of the rows that a group's method decides about."""
        if rows is None:
            return view
        names = self.rows.groups[group].names | {POSITION}
        return view.of_rows(torch.from_numpy(rows).to(view.valid.device), self.place(group, rows, event), names)

    def _run(self, part: Part, view: LayerView) -> LayerView:
        with torch.autocast(view.positions.device.type, enabled=False):
            made = decided(getattr(part.method, part.event)(view))
        for decision in made:
            view = view.apply(decision)
            if isinstance(decision, Propagate) and not self.plan.defer:
                if self.plan.narrow is not None:
                    raise ValueError(f"method={part.method} narrows one forward pass twice; it can only do so once")
                self.plan.narrow = narrowed(decision, view.queries, self.site.layer)
        if part.rows is not None:
            self.rows.remember(part.group, frozenset(view.columns) - {POSITION})
        return view

    def read(self, q: Float[Tensor, "B Hq 1 D"], positions: Int[Tensor, "B 1"]) -> Bool[Tensor, "B H T"] | None:
        """Which stored tokens a generated one reads, as they are stored; None: all."""
        if not (self.plan.listen and self.rows.listens("before_attend")):
            return None
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)  # not known yet
        view = self.view(Queries(q, torch.ones_like(positions, dtype=torch.bool), lse, positions))
        mask = None
        for i, group in enumerate(self.rows.groups):
            some = self.of_group(view, i, group.rows)
            decision = group.method.before_attend(some) if group.method.listens("before_attend") else None
            if decision is None:
                continue
            newest = some.positions == some.place.seen.to(q.device)[:, None, None] - 1
            mask = view.valid.clone() if mask is None else mask
            mask[slice(None) if group.rows is None else group.rows] = decision.mask | newest
        return None if mask is None else as_stored(mask, view.order)

    def admitted(
        self, hidden: Tensor | None, valid: Bool[Tensor, "B Q"], positions: Int[Tensor, "B Q"]
    ) -> Bool[Tensor, "B H Q"] | None:
        """Which of a prompt's new tokens the method lets in; None: all."""
        if not (self.plan.prefill and self.plan.listen and self.rows.listens("admit")):
            return None
        method, heads = self.rows.method, self.stored.spec.heads
        if self.plan.defer:
            raise ValueError(f"method={method} chooses before a prompt is read: no assisted decoding with it")
        if hidden is None:
            raise ValueError(f"method={method} needs the states that enter layer {self.site.layer}; nobody gave them")
        everyone = valid[:, None].expand(-1, heads, -1)
        flags = method.admit(HiddenView(hidden, valid, positions, heads, self.place()))
        flags = None if flags is None else flags & everyone
        return None if flags is None or torch.equal(flags, everyone) else flags

    def remember(self, queries: Queries) -> None:
        """Keep what generated tokens asked, all of them stored; methods whose interval is over decide."""
        if not self.plan.recalls:
            return
        stored, seen, plan = self.stored, self.rows.seen, self.plan
        if stored.recent is None:
            stored.recent = Recent.empty(self.rows.batch, plan.recalls, queries.states)
        recent = stored.recent = stored.recent.resized(max(stored.recent.size, plan.recalls))
        valid = None if plan.ones else queries.valid.cpu().numpy()
        recent.put(queries, seen, valid)
        share = self.site.ordinal / len(self.site.paged)
        if (
            plan.step
            and plan.generated is not None
            and (plan.generated + ahead(self.rows.method, share)) % plan.recalls
        ):
            return  # as at most steps
        for count, part in recent.due(self.rows.groups, seen, self.rows.prompt, share):
            # Layers that act after the same token share a context; rows with other intervals have one of their own.
            shared = {} if part.method.staggered else plan.steps.setdefault((part.group, f"{EVENT} {count}"), {})
            moment = replace(self, turn=True, plan=replace(plan, parts=(part,), steps={(part.group, ""): shared}))
            view = moment.view(recent.asked(count, seen, stored.lengths()))
            commit(stored, moment.decide(view), None, slack=False)
            recent.seen_to(part, seen)

    # -- what comes late -------------------------------------------------------------------------------------

    def settle(self, queries: Queries, drop: int) -> None:
        """Run the events that waited for a crop, which took `drop` of the pass's last queries back."""
        left = queries.states.shape[2] - drop
        if left < 1 or not (self.plan.parts or self.plan.recalls):
            return
        start = torch.from_numpy(self.stored.lengths() - left)
        kept = replace(queries.pick(torch.arange(left, device=queries.states.device)), start=start)
        if self.plan.parts:
            commit(self.stored, self.decide(self.view(kept)), None)
        if not self.plan.prefill:
            self.remember(kept)

    def carry_out(self, decisions: Sequence[Decision], group: int) -> None:
        """Carry out what came when the layer was stored (after_layer, after_forward, after_prompt)."""
        view, rows = self.without_queries(), self.rows.groups[group].rows
        some = self.of_group(view, group, rows)
        for decision in decisions:
            some = some.apply(decision)
        if rows is not None:
            self.rows.remember(group, frozenset(some.columns) - {POSITION})
        commit(self.stored, some if rows is None else combined(view, [(rows, some)]), None)


def combined(view: LayerView, found: Sequence[tuple[np.ndarray | None, LayerView]]) -> LayerView:
    """A batch's view after its groups have decided, each about its rows."""
    device, columns, valid = view.valid.device, dict(view.columns), view.valid.clone()
    rewritten, changed = [(chosen, some) for chosen, some in found if some.rewritten], view.changed
    amended: list[Amend] = []
    formats: list[tuple[Any, Tensor, Mapping[str, Tensor]]] = []
    for chosen, some in found:
        assert chosen is not None
        rows = torch.from_numpy(chosen).to(device)
        valid[rows] = some.valid
        changed = changed | some.changed
        for name in set(columns) - set(some.columns) if some.rewritten else ():  # it has those that it was given alone
            columns[name] = columns[name].index_fill(0, rows, 0)
        for name, column in some.columns.items():
            if some.rewritten or name in some.changed:
                old = columns.get(name)
                whole = torch.zeros(valid.shape, dtype=column.dtype, device=device) if old is None else old.clone()
                whole[rows] = column
                columns[name] = whole
                changed = changed | {name}
        for form, mask, told in some.formats:
            whole_batch = {name: _of_batch(each, rows, len(valid)) for name, each in told.items()}
            formats.append((form, _of_batch(mask, rows, len(valid)), whole_batch))
        amended += [_of_all(amend, rows, len(valid)) for amend in some.amended]
    tokens = view.tokens.but(valid, columns)
    if rewritten:
        keys, values = view.keys.clone(), view.values.clone()
        for chosen, some in rewritten:
            keys[chosen], values[chosen] = some.keys, some.values
        tokens = Chunk(keys, values, valid, columns)
    made = replace(view, tokens=tokens, rewritten=bool(rewritten), changed=changed, memo={})
    for amend in amended:
        made = made.apply(amend)
    return replace(made, formats=tuple(formats))


def _of_all(amend: Amend, rows: Tensor, batch: int) -> Amend:
    """An `Amend` of some rows as one of the batch."""
    slots = amend.slots.new_full((batch, *amend.slots.shape[1:]), -1).index_copy(0, rows, amend.slots)
    keys, values = (None if x is None else _of_batch(x, rows, batch) for x in (amend.keys, amend.values))
    return Amend(slots, keys, values)


def _of_batch(x: Tensor, rows: Tensor, batch: int) -> Tensor:
    """What some rows have, and zeros for the others."""
    return x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows, x)
