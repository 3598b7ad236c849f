"""From what a view says to what the segments hold: only what a decision touches is written."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.formats import Chunk
from kvfold.formats.segment import Hearing
from kvfold.layer.segments import as_stored
from kvfold.layer.stored import Stored
from kvfold.views import LayerView
from kvfold.views.decisions import Amend


def commit(stored: Stored, view: LayerView, new: Chunk | None, *, slack: bool = False) -> None:
    """Hold what the view says. `new`: its last slots are not stored yet. `slack`: see `Segment.keep`.

    A token stays in its segment. One that is written over is written where it lies, if it lies in the segment that is
    open for its row and that is addressed token by token; else it is dropped there and goes to the open segment.
    """
    held = view.valid.shape[-1] - (0 if new is None else new.valid.shape[-1])
    if not (view.formats or view.rewritten or view.amended or view.order is not None or len(stored.segments) > 1):
        _stay(stored, view, new, held, slack)
        return
    moves = [(stored.number(form), mask, told) for form, mask, told in view.formats]
    holds = [form.traits.holds for form, _ in stored.segments]
    moves = [
        (number, (mask & view.valid if holds[number] else mask) & (view.home != number), told)
        for number, mask, told in moves
    ]
    staying = view.valid
    for _, mask, _ in moves:
        staying = staying & ~mask
    promoted = _write_over(stored, view, staying, held)
    # What goes elsewhere is fetched before its slots are overwritten.
    fetched = [(number, _fetch(stored, view, mask), told) for number, mask, told in moves]
    fresh = _fresh(stored, view, new, staying, promoted, held)
    _keep(stored, view, staying if promoted is None else staying & ~promoted, held, slack)
    if fresh is not None:
        stored.append(fresh)
    if promoted is not None or any(number == 0 and tokens is not None for number, tokens, _ in fetched):
        stored.first_ordered = None
    for number, tokens, told in fetched:
        segment = stored.segments[number][1]
        if tokens is None:
            continue
        if isinstance(segment, Hearing):
            segment.hear(told, tokens.valid.any(-1))
        segment.append(tokens)
    moved_here = held and any(tokens is not None and holds[number] for number, tokens, _ in fetched)
    stored.ordered = stored.ordered and promoted is None and not moved_here


def _stay(stored: Stored, view: LayerView, new: Chunk | None, held: int, slack: bool) -> None:
    """The short way of `commit`: one segment, in the order of the text, and nothing changes but what stays."""
    valid, columns = view.valid, view.columns
    if held:
        changed = {name: columns[name][..., :held] for name in view.changed}
        stored.segments[0][1].keep(valid[..., :held], changed, slack=slack)
    if new is not None:
        stored.segments[0][1].append(new.but(valid[..., held:], {name: x[..., held:] for name, x in columns.items()}))


def _fresh(
    stored: Stored,
    view: LayerView,
    new: Chunk | None,
    staying: Bool[Tensor, "B H T"],
    promoted: Bool[Tensor, "B H T"] | None,
    held: int,
) -> Chunk | None:
    """The tokens that the open segments get: new ones, and before them those that were written over elsewhere."""
    if promoted is not None:
        behind = torch.arange(staying.shape[-1], device=staying.device) >= held
        return _fetch(stored, view, staying & (promoted | behind))
    if new is None:
        return None
    columns = {name: column[..., held:] for name, column in view.columns.items()}
    if not view.rewritten and not view.amended:
        return new.but(staying[..., held:], columns)
    keys, values = view.keys[:, :, held:], view.values[:, :, held:]
    if held:
        keys, values = keys.clone(), values.clone()  # they may lie beside slots that are about to be overwritten
    return Chunk(keys, values, staying[..., held:], columns)


def _write_over(stored: Stored, view: LayerView, staying: Tensor, held: int) -> Bool[Tensor, "B H T"] | None:
    """Write over stored tokens where they lie; those for which that can't be, None if there are none."""
    if not held or not (view.rewritten or view.amended):
        return None
    home = view.home
    here = staying & (home == torch.from_numpy(stored.opened).to(home.device)[:, None, None])
    for number, (form, _) in enumerate(stored.segments):
        if form.traits.addressed != "token":
            here &= home != number
    elsewhere = F.pad(torch.zeros_like(staying), (0, 1))  # one slot more, for what is not marked
    for amend in [_rewriting(stored, view, held)] if view.rewritten else view.amended:
        slots = amend.slots.clamp(min=0)
        stays = (amend.slots >= 0) & (amend.slots < held) & staying.gather(-1, slots)
        inside, homes = stays & here.gather(-1, slots), home.gather(-1, slots)
        places = slots if view.order is None else view.order.gather(-1, slots.clamp(max=held - 1))
        for number in set(stored.opened.tolist()):
            start = 0 if number == 0 else view.bounds[number - 1]
            ours = torch.where(inside & (homes == number), places - start, -1)
            stored.segments[number][1].amend(ours, amend.keys, amend.values)
        elsewhere.scatter_(-1, slots.masked_fill(~stays | inside, staying.shape[-1]), True)
    promoted = elsewhere[..., :-1]
    return promoted if bool(promoted.any()) else None


def _rewriting(stored: Stored, view: LayerView, held: int) -> Amend:
    """A view's rewriting as the stored slots whose keys or values are now others."""
    old, _ = stored.tokens()
    differs = (view.keys[:, :, :held] != old.keys).any(-1) | (view.values[:, :, :held] != old.values).any(-1)
    touched = differs & view.valid[..., :held]
    slots = _slots(touched)
    new = view.tokens.take(slots)
    return Amend(slots.masked_fill(~touched.gather(-1, slots), -1), new.keys, new.values)


def _keep(stored: Stored, view: LayerView, staying: Tensor, held: int, slack: bool) -> None:
    """Drop from each segment what does not stay there, and set the columns that a decision set."""
    keep = as_stored(staying, view.order)
    names = view.changed
    if view.rewritten:
        names = names | set(view.columns)
    columns = {name: as_stored(view.columns[name], view.order) for name in names}
    lone = len(stored.segments) == 1
    # Formats that may refuse come first, when nothing is changed yet.
    known = range(len(view.bounds))  # without those that were opened for this view
    for number in sorted(known, key=lambda n: stored.segments[n][0].traits.addressed == "token"):
        start = 0 if number == 0 else view.bounds[number - 1]
        stop, segment = view.bounds[number], stored.segments[number][1]
        if stop == start:
            continue
        here, mask = {name: column[..., start:stop] for name, column in columns.items()}, keep[..., start:stop]
        valid = None
        if view.rewritten:  # a rewritten token has the columns that it was given, and no others
            valid, old = segment.columns()
            here |= {name: torch.zeros_like(column) for name, column in old.items() if name not in view.columns}
        if lone or here or not torch.equal(mask, segment.columns()[0] if valid is None else valid):
            segment.keep(mask, here, slack=slack)


def _slots(mask: Bool[Tensor, "B H T"]) -> Int[Tensor, "B H N"]:
    """The marked slots of each (row, head), in order, as many as the most has."""
    most = int(mask.sum(-1).max()) if mask.numel() else 0
    return torch.argsort((~mask).byte(), dim=-1, stable=True)[..., :most]


def _fetch(stored: Stored, view: LayerView, mask: Bool[Tensor, "B H T"]) -> Chunk | None:
    """The marked tokens as a chunk of their own; None where there are none.

    Where nothing is written over, and all lie in one segment, no other segment is asked for keys and values.
    """
    slots = _slots(mask)
    if not slots.shape[-1]:
        return None
    valid, tokens = mask.gather(-1, slots), view.tokens.take(slots)
    if not (view.rewritten or view.amended):
        homes = torch.unique(view.home.gather(-1, slots)[valid]).tolist()
        if len(homes) == 1 and homes[0] >= 0:
            start = 0 if homes[0] == 0 else view.bounds[homes[0] - 1]
            places = (_at(view, mask) - start).clamp(min=0, max=view.bounds[homes[0]] - start - 1)
            own = stored.segments[homes[0]][1].dense().take(places)
            return Chunk(own.keys, own.values, valid, tokens.columns)
    return Chunk(tokens.keys, tokens.values, valid, tokens.columns)


def _at(view: LayerView, mask: Bool[Tensor, "B H T"]) -> Int[Tensor, "B H N"]:
    """Where the marked tokens lie, counted through all segments."""
    slots = _slots(mask)
    return slots if view.order is None else view.order.gather(-1, slots.clamp(max=view.order.shape[-1] - 1))
