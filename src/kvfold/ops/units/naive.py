"""Units of tokens in plain torch."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32, Shaped
from torch import Tensor

from kvfold.ops.attend import attend
from kvfold.ops.choose import top_lists, top_mask
from kvfold.ops.dispatch import register, select


def _upward(x: Tensor, dtype: torch.dtype) -> Tensor:
    """No less than x, in a narrower dtype."""
    near = x.to(dtype)
    return torch.where(near.to(x.dtype) < x, torch.nextafter(near, near.new_tensor(torch.inf)), near)


@register("raise_bounds", "naive", rank=0)
def raise_bounds(held: Tensor, keys: Tensor, valid: Tensor, start: np.ndarray, unit: int) -> None:
    both = (keys, -keys)
    if keys.dtype != held.dtype:
        both = _upward(keys, held.dtype), _upward(-keys, held.dtype)
    count, first = keys.shape[2], int(start.flat[0]) if start.size else 0
    if bool((start == first).all()) and bool(valid.all()):  # a unit's tokens lie alike in every row
        before, behind = first % unit, -(first + count) % unit
        units = slice(first // unit, -(-(first + count) // unit))
        for some, new in zip(held[:, :, units].chunk(2, -1), both, strict=True):
            padded = F.pad(new, (0, 0, before, behind), value=-torch.inf)
            torch.maximum(some, padded.view(*padded.shape[:2], -1, unit, padded.shape[3]).amax(3), out=some)
        return
    begin = torch.from_numpy(np.ascontiguousarray(start)).to(keys.device)
    number = (begin[..., None] + valid.cumsum(-1) - 1) // unit
    place = number.clamp(min=0)[..., None].expand(*number.shape, held.shape[-1])
    new = torch.cat(both, -1).masked_fill(~valid[..., None], -torch.inf)
    held.scatter_reduce_(2, place, new, "amax")


@register("bound_scores", "naive", rank=0)
def bound_scores(q: Tensor, held: Tensor, units: np.ndarray) -> Tensor:
    number = int(units.max(initial=0))
    asked = torch.cat([q.relu(), (-q).relu()], -1).float()
    return behind(asked @ held[:, :, :number].float().mT, units)


@register("key_scores", "naive", rank=0)
def key_scores(q: Tensor, held: Tensor, units: np.ndarray, steps: int) -> Tensor:
    found = q.float() @ held[:, :, : int(units.max(initial=0))].float().mT
    return behind(torch.round(found * steps) / steps if steps else found, units)


def behind(scores: Float[Tensor, "B H G N"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
    """Scores with -inf behind each row's units."""
    number = scores.shape[-1]
    if (units == number).all():
        return scores
    none = torch.arange(number) >= torch.from_numpy(np.ascontiguousarray(units))[..., None]
    return scores.masked_fill(none.to(scores.device)[:, :, None], -torch.inf)


@register("attend_units", "naive", rank=0)
def attend_units(
    q: Tensor, held: Tensor, table: Any, room: np.ndarray, scale: float, *,
    unit: int, heads: str, sinks: int, recent: int, mass: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, h), size, planes = q.shape[:2], table.pool.page_size, table.pool.planes
    units = (-(-table.lengths.astype(np.int64) // unit)).reshape(b, h)
    scores = select("bound_scores", held)(q, held, units)
    numbers, _ = select("choose_units", scores)(scores, units, room, heads=heads, sinks=sinks, recent=recent)
    listed, lengths = select("list_pages", planes["keys"])(
        table, numbers.reshape(b * h, *numbers.shape[2:]), unit // size, np.zeros(b * h, dtype=np.int64)
    )
    return _attend_listed(q, planes, listed, lengths, scale, mass)


def _attend_listed(
    q: Float[Tensor, "B H G D"], planes: Mapping[str, Shaped[Tensor, "N P *W"]], listed: np.ndarray,
    lengths: np.ndarray, scale: float, mass: str | None = None,
    turn: Callable[[Tensor, Tensor], Tensor] = lambda keys, at: keys,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Over the pages of lists, of so many slots each; `turn`: keys of the pages that are named, where they stand."""
    (b, h, g, d), size = q.shape, next(iter(planes.values())).shape[1]
    lists = len(listed) // (b * h)
    at = torch.from_numpy(listed).clamp(min=0).long().to(q.device)
    none = (torch.arange(at.shape[1] * size) >= torch.from_numpy(lengths)[:, None]).to(q.device)
    keys, values = (
        planes[name][at].flatten(1, 2).masked_fill(none[..., None], 0.0).to(q.dtype) for name in ("keys", "values")
    )
    bias = (
        torch.zeros(none.shape, dtype=torch.float32, device=q.device)
        if mass is None
        else planes[mass][at].flatten(1, 2)
    )
    bias = bias.masked_fill(none, -torch.inf)
    rows = b, h * lists
    keys, values, bias = (
        turn(keys.view(*rows, -1, d), at),
        values.view(*rows, *values.shape[1:]),
        bias.view(*rows, 1, -1),
    )
    out, lse = attend(q.reshape(*rows, g // lists, d), keys, values, scale, bias)
    return out.reshape(b, h, g, -1), lse.reshape(b, h, g)


@register("step_keys", "naive", rank=0)
def step_keys(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], by: Any, seen: np.ndarray, scale: float
) -> tuple[Tensor, Tensor]:
    (b, h, _, d), places = q.shape, planes["position"].view(*q.shape[:2], 1)
    select("append_pages", planes["keys"])(table, planes, None)
    units = table.lengths.astype(np.int64).reshape(b, h)
    newest = torch.from_numpy(units - 1).to(q.device)[..., None, None].expand(b, h, 1, d)
    by.held.scatter_(2, newest, by.rope.shift(planes["keys"].view(b, h, 1, d), -places).to(by.held.dtype))
    asked = by.rope.shift(q, _steps(by.distance - (seen - 1), q))
    scores = select("key_scores", by.held)(asked, by.held, units, by.steps)
    lists = 1 if by.layer else h
    room, first, before = (each.repeat(lists) for each in (by.room, by.first, by.before))
    numbers, _ = select("vote_units", scores)(
        scores.reshape(b * lists, -1, scores.shape[-1]), units[:, :lists].reshape(-1), room, first, before,
        heads=by.heads, scale=by.scale,
    )  # fmt: skip
    wide = np.ascontiguousarray(numbers.repeat(h // lists, 0))[:, None]
    listed, lengths = select("list_slots", planes["keys"])(table, wide, 1, np.zeros(b * h, dtype=np.int64))
    singles = {name: plane.flatten(0, 1)[:, None] for name, plane in table.pool.planes.items()}
    if not by.slots:
        return _attend_listed(q, singles, listed, lengths, scale)

    def turn(keys: Tensor, at: Tensor) -> Tensor:
        stand = torch.arange(at.shape[1], device=at.device)
        steps = (stand - singles["position"][at, 0]).view(keys.shape[:3])
        still = torch.from_numpy(~by.chooses).to(at.device)[:, None, None]
        turned: Tensor = by.rope.shift(keys, steps.masked_fill(still, 0))
        return turned

    back = np.where(by.chooses[:, None], lengths.reshape(b, h) - seen[:, None], 0)
    return _attend_listed(by.rope.shift(q, _steps(back, q)), singles, listed, lengths, scale, turn=turn)


def _steps(by: np.ndarray, q: Float[Tensor, "B H G D"]) -> Int[Tensor, "B H G"]:
    """Steps of each row, (B,), or of each of its heads, (B, H), for a query's heads."""
    found = torch.from_numpy(by.astype(np.int32)).to(q.device).view(len(q), -1, 1)
    return found.expand(q.shape[:3])


@register("step_units", "naive", rank=0)
def step_units(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], held: Tensor, room: np.ndarray, scale: float, *,
    unit: int, heads: str, sinks: int, recent: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    keys, start = planes["keys"].view(*q.shape[:2], 1, -1), table.lengths.astype(np.int64).reshape(q.shape[:2])
    select("append_pages", keys)(table, planes, None)
    every = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    select("raise_bounds", held)(held, keys, every, start, unit)
    found: tuple[Tensor, Tensor] = select("attend_units", q)(
        q, held, table, room, scale, unit=unit, heads=heads, sinks=sinks, recent=recent, mass=None
    )
    return found


@register("choose_units", "naive", rank=0)
def choose_units(
    scores: Tensor, units: np.ndarray, room: np.ndarray, *, heads: str, sinks: int, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    if heads != "each":
        scores = scores.sum(2, keepdim=True) if heads == "sum" else scores.amax(2, keepdim=True)
    high = torch.finfo(scores.dtype).max
    worth = scores.clamp(max=high / 8)  # NaN stays, which is never chosen before a number
    place = torch.arange(scores.shape[-1], device=scores.device)
    behind = (torch.from_numpy(np.ascontiguousarray(units)).to(scores.device)[..., None] - 1 - place)[:, :, None]
    most = np.maximum(np.minimum(room[:, None], units), 1) - 1
    ends = np.minimum(sinks, most), np.minimum(recent, most - np.minimum(sinks, most))
    first, near = (torch.from_numpy(x)[:, :, None, None].to(scores.device) for x in ends)
    worth = worth.masked_fill((behind >= 0) & (behind <= near), high / 4)
    worth = worth.masked_fill((behind >= 0) & (place < first), high / 2).masked_fill(behind == 0, high)
    return listed(top_lists(worth, np.broadcast_to(room[:, None], units.shape)))


@register("vote_units", "naive", rank=0)
def vote_units(
    scores: Tensor, units: np.ndarray, room: np.ndarray, first: np.ndarray, before: np.ndarray, *,
    heads: str, scale: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    place = np.arange(scores.shape[-1])
    behind = units[:, None] - 1 - place
    read = torch.from_numpy((place < first[:, None]) | (behind <= before[:, None])).to(scores.device)
    there = torch.from_numpy(behind >= 0).to(scores.device)
    votes = (scores.masked_fill(read[:, None], -torch.inf) * scale).softmax(-1)
    worth = (votes.sum(1) if heads == "sum" else votes.amax(1)).masked_fill(read, torch.inf)
    wide = torch.from_numpy(np.minimum(room, units)).to(worth.device)
    return listed(top_mask(worth.masked_fill(~there, -torch.inf)[None], wide[None])[0].cpu().numpy())


@register("list_pages", "naive", rank=0)
def list_pages(table: Any, numbers: np.ndarray, pages: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size, needed = table.pool.page_size, table.needed
    places, held = _places(numbers, pages, before, needed)
    counts, last = held.sum(-1), (held & (places == needed[:, None, None] - 1)).any(-1)
    lengths = counts * size - np.where(last, (-table.lengths % size)[:, None], 0)
    return _packed(table.table[held.nonzero()[0], places[held]], counts, held.shape[2]), _flat(lengths)


@register("list_slots", "naive", rank=0)
def list_slots(table: Any, numbers: np.ndarray, unit: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = table.pool.page_size
    places, held = _places(numbers, unit, before, table.lengths)
    slots, counts = places[held], held.sum(-1)
    found = table.table[held.nonzero()[0], slots // size] * size + slots % size
    return _packed(found, counts, held.shape[2]), _flat(counts)


def _places(
    numbers: np.ndarray, each: int, before: np.ndarray, there: np.ndarray
) -> tuple[Int[np.ndarray, "R S M"], Bool[np.ndarray, "R S M"]]:
    """The places in a row of what units are made of, and which of them it has."""
    first = numbers.astype(np.int64) * each - before[:, None, None]
    places = (first[..., None] + np.arange(each)).reshape(*numbers.shape[:2], -1)
    return places, (places >= 0) & (places < there[:, None, None]) & (numbers >= 0).repeat(each, -1)


def _packed(found: np.ndarray, counts: np.ndarray, most: int) -> Int32[np.ndarray, "L M"]:
    """What was found, list by list, each from its front on and then -1."""
    packed = np.full((counts.size, most), -1, dtype=np.int32)
    packed[np.arange(most) < counts.reshape(-1, 1)] = found
    return packed


def _flat(lengths: np.ndarray) -> Int32[np.ndarray, " L"]:
    flat: np.ndarray = lengths.astype(np.int32).reshape(-1)
    return flat


def listed(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (..., K) of what a mask (..., N) marks, ascending and then -1, and how many (...)."""
    counts = mask.sum(-1, dtype=np.int32)
    numbers = np.full((*counts.shape, int(counts.max(initial=0))), -1, dtype=np.int32)
    numbers[np.arange(numbers.shape[-1]) < counts[..., None]] = mask.nonzero()[-1]
    return numbers, counts
