"""The events and traits of methods: when each comes, and how those of several methods become one's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import and_
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from kvfold.formats import Chunk, Format
from kvfold.rotation import Frame
from kvfold.views import CacheView, HiddenView, LayerView, Place, PromptView, Requests
from kvfold.views.decisions import Decision, Decisions, Read, Share, decided

Heard = Sequence[Callable[..., Any]]
"""What the methods that listen to an event do there, in their order."""
Found = dict[int, list[Decision]]
"""Decisions for layers, by their place among the paged ones."""


def _first(heard: Heard, given: Any) -> Any:
    return heard[0](given) if heard else None


def _let_in_by_all(heard: Heard, view: HiddenView) -> Bool[Tensor, "B H Q"] | None:
    flags = [found for ask in heard if (found := ask(view)) is not None]
    return reduce(and_, flags) if flags else None


def _in_turn(heard: Heard, view: LayerView) -> list[Decision]:
    """Each sees the view that the one before it left."""
    done: list[Decision] = []
    for ask in heard:
        for decision in decided(ask(view)):
            view = view.apply(decision)
            done.append(decision)
    return done


def _read_for_all(heard: Heard, view: LayerView) -> Read | None:
    masks = [found.mask for ask in heard if (found := ask(view)) is not None]
    return Read(reduce(and_, masks)) if masks else None


def _all_labels(heard: Heard, given: Any) -> Mapping[str, Tensor]:
    return {name: column for ask in heard for name, column in ask(given).items()}


def _all_stamps(heard: Heard, tokens: Chunk, place: Place) -> Mapping[str, Tensor]:
    return {name: column for ask in heard for name, column in ask(tokens, place).items()}


def _gathered(maps: Iterable[Mapping[int, Decisions]]) -> Found:
    done: Found = {}
    for found in maps:
        for ordinal, decisions in found.items():
            made, before = decided(decisions), done.setdefault(ordinal, [])
            # What two layers share is chosen when each has its own tokens: that goes with any decision.
            if all(any(not isinstance(decision, Share) for decision in some) for some in (made, before)):
                raise ValueError(f"two stages decide about layer {ordinal} in the same event; compose one of them")
            before += made
    return done


def _of_one_layer(heard: Heard, cache: CacheView, ordinal: int) -> Found:
    return _gathered(ask(cache, ordinal) for ask in heard)


def _of_all_layers(heard: Heard, cache: CacheView) -> Found:
    return _gathered(ask(cache) for ask in heard)


def _after_questions(heard: Heard, prompt: PromptView) -> Requests[Found]:
    found: list[Mapping[int, Decisions]] = []
    for ask in heard:
        made = ask(prompt)
        found.append(made if isinstance(made, Mapping) else (yield from made))
    return _gathered(found)


@dataclass(frozen=True)
class Event:
    """A moment at which a method is asked, by the method of its class that has the event's name."""

    when: str
    combine: Callable[..., Any]
    """What several say together: from those that listen (`Heard`), and what the event hands out."""
    wrapped: bool = False
    """Whether a method that wraps another one hands it on: what is said there does not depend on who is kept."""
    alone: str = ""
    """What at most one stage of a composition may do here, where it is only one."""
    stored: bool = False
    """Whether what is decided here is about tokens that are stored, also when a layer reads its first prompt."""


EVENTS: dict[str, Event] = {
    "read_order": Event(
        "before a forward pass over a prompt", _first, wrapped=True, alone="that choose what the model reads"
    ),
    "label": Event("before the first layer stores a pass's tokens", _all_labels, wrapped=True),
    "stamp": Event("before a layer stores a pass's tokens", _all_stamps, wrapped=True),
    "admit": Event("before a prompt's new tokens attend, layer by layer", _let_in_by_all, wrapped=True),
    "streams": Event(
        "before a prompt's new tokens attend, layer by layer", _first, wrapped=True, alone="whose heads stream"
    ),
    "after_prefill": Event("after a forward pass over more than one token, layer by layer", _in_turn),
    "after_decode": Event("after a forward pass over one generated token, layer by layer", _in_turn, stored=True),
    "after_interval": Event("after a number of generated tokens, layer by layer", _in_turn, stored=True),
    "before_attend": Event("before a generated token attends, layer by layer", _read_for_all),
    "selection": Event("before a layer holds its first token", _first, alone="that choose what a query reads"),
    "after_layer": Event("after a layer is stored", _of_one_layer, stored=True),
    "after_forward": Event("after the last layer is stored", _of_all_layers, stored=True),
    "after_prompt": Event("after the forward pass over a prompt is over", _after_questions, stored=True),
}
"""All events. A new one is a line here, and a method of `Method`."""
PROMPTS = "that say what a prompt's tokens see of it"
"""What at most one stage of a composition may do, by whichever event."""


def _union(said: Sequence[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*said)


def _only(said: Sequence[Format | Frame | None]) -> Format | Frame | None:
    return next((one for one in said if one is not None), None)


def _chained(said: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(said))


@dataclass(frozen=True)
class Trait:
    """What a method says of itself, whatever it sees."""

    combine: Callable[[Sequence[Any]], Any]
    """What several say together."""
    alone: str = ""
    """What at most one stage of a composition may have, where it is only one."""


TRAITS: dict[str, Trait] = {
    "compact": Trait(any, alone="with compact positions"),
    "asks": Trait(_union),
    "period": Trait(max, alone="that act at intervals"),
    "staggered": Trait(any),
    "narrows": Trait(any),
    "shares_layers": Trait(any),
    "format": Trait(_only, alone="with a format for all tokens"),
    "stores": Trait(any),
    "together": Trait(any),
    "firm": Trait(_chained),
    "own_frame": Trait(_only, alone="with a frame of their own"),
    "needs": Trait(_chained),
    "windows": Trait(_only, alone="with a format for sliding windows"),
}
"""All traits, attributes of `Method`."""
