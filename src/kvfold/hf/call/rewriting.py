"""Prompts that the model reads otherwise than they were given: fewer tokens, more, in another order.

The caller goes on as if nothing had happened: with attention masks and lengths of the text that it gave. A `Reading`
says what the model got instead, and a pre-hook rewrites the arguments of every later call. Positions are those of the
tokens that are read, side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.views import LayerView

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache


@dataclass(frozen=True)
class Reading:
    """What the model has read so far of the text that it was given."""

    valid: Bool[Tensor, "B W"]
    """Which of the columns read are not padding."""
    places: Int[Tensor, "B W"]
    """Where in the given text each column's token stands."""
    given: Int[Tensor, " B"]
    """Tokens of text given, padding not counted."""
    surplus: int = 0
    """Columns given more than read."""
    fixed: int = 0
    """Columns read in an order of the method's: they can't be taken back one by one."""

    @classmethod
    def plain(cls, valid: Bool[Tensor, "B W"]) -> "Reading":
        """A text that was read as it stands."""
        return cls(valid, (valid.cumsum(1) - 1).int(), valid.sum(1))

    def read(
        self, valid: Bool[Tensor, "B Q"], order: Int[Tensor, "B N"] | None
    ) -> tuple["Reading", Int[Tensor, "B N"]]:
        """After a pass over tokens of which `valid` are not padding; also the columns read, -1 for padding."""
        columns = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        taken = columns.masked_fill(~valid, -1) if order is None else order
        text = self.given[:, None] + valid.cumsum(1) - 1
        after = replace(
            self,
            valid=torch.cat([self.valid, taken >= 0], 1),
            places=torch.cat([self.places, text.gather(1, taken.clamp(min=0)).int()], 1),
            given=self.given + valid.sum(1),
            surplus=self.surplus + valid.shape[1] - taken.shape[1],
        )
        return after if order is None else replace(after, fixed=after.valid.shape[1]), taken

    def drop(self, columns: int) -> "Reading":
        """Without the last columns. Raises ValueError where the method chose their order."""
        left = self.valid.shape[1] - columns
        if left < self.fixed:
            raise ValueError(f"crop takes back {columns} tokens, but {self.fixed} columns are a prompt read as a whole")
        gone = self.valid[:, left:].sum(1)
        return replace(self, valid=self.valid[:, :left], places=self.places[:, :left], given=self.given - gone)

    def select(self, rows: Int[Tensor, " N"]) -> "Reading":
        """Row i becomes what row `rows[i]` was."""
        rows = rows.to(self.valid.device)
        return replace(self, valid=self.valid[rows], places=self.places[rows], given=self.given[rows])

    def in_text(self, row: int, positions: list[int]) -> list[int]:
        """Where tokens at these positions of what was read stand in the given text, ascending."""
        places = self.places[row][self.valid[row]].tolist()
        return sorted(places[position] for position in positions)


@dataclass(frozen=True)
class Raw:
    """A prompt that no layer has seen yet, as `Method.read_order` sees it."""

    ids: Int[Tensor, "B Q"]
    valid: Bool[Tensor, "B Q"]
    model: Any

    def look_ahead(
        self, count: int, observe: Callable[[LayerView], None], draft: str | None = None
    ) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """At most `count` tokens that come next, greedily, and which of them count; said by the model or by `draft`.

        Whoever says them reads the prompt in a cache of its own; `observe` gets every layer's view of every pass, with
        the prompt's padding in front, and not stored.
        """
        from kvfold.hf.draft import drafter, look_ahead  # that needs a cache

        model = self.model if draft is None else drafter(draft, self.model)
        return look_ahead(model, self.ids, self.valid, count, observe)


def reread(cache: "Cache", args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Reading] | None:
    """The arguments of a call of the model with what is really to be read, and the reading after it.

    None: what was given.

    Raises ValueError where a prompt comes without ids, with labels, or under assisted decoding.
    """
    if not cache.paged or not cache.method.listens("read_order"):
        return None
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if len(args) > 1:
        raise ValueError(f"method={cache.method} needs the model's arguments by name, but {len(args)} came without")
    if not isinstance(ids, Tensor):
        raise ValueError(f"method={cache.method} chooses among a prompt's tokens: call the model with input_ids")
    (rows, new), width = ids.shape, cache.paged[0].width
    everyone = torch.ones(rows, new, dtype=torch.bool, device=ids.device)
    given = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    valid = everyone if given is None else given[:, -new:]
    order = None
    if cache.listening and cache.reads_prompt(new):
        for name in ("labels", "output_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"method={cache.method} chooses among a prompt's tokens: it can't give {name}")
        if cache.recording:
            raise ValueError(f"method={cache.method} chooses among a prompt's tokens: no assisted decoding with it")
        order = cache.method.read_order(Raw(ids, valid, cache.model))
    if order is None and cache.reading is None:
        return None
    before = cache.reading
    if before is None:
        past = everyone[:, :1].expand(-1, width) if given is None else given[:, :-new]
        before = Reading.plain(past)
    after, taken = before.read(valid, order)
    there = taken >= 0
    changed = {name: value for name, value in kwargs.items() if name != "cache_position"}
    for name in ("input_ids", "token_type_ids"):
        value = ids if name == "input_ids" else kwargs.get(name)
        if isinstance(value, Tensor) and value.shape == ids.shape:
            changed[name] = value.gather(1, taken.clamp(min=0))
    changed["attention_mask"] = after.valid.long()
    changed["position_ids"] = (before.valid.sum(1, keepdim=True) + there.cumsum(1) - 1).clamp(min=0)
    return changed, after
