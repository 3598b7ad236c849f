"""What a method is: a frozen dataclass of options, with events that return decisions."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from inspect import cleandoc
from typing import Any, ClassVar, TypeVar

from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.formats import Chunk, Format, Reader
from kvfold.methods.events import EVENTS, PROMPTS, TRAITS, Event
from kvfold.rotation import Frame, Measured
from kvfold.views import CacheView, HiddenView, LayerView, NewWords, Place, PromptView, RawPrompt, Requests, Site
from kvfold.views.decisions import Decisions, Read, Streams, decided

__all__ = ["Compound", "Decisions", "Method", "MethodInfo", "Pipeline", "decided", "method", "registry"]


class Method:
    """Base of all methods. Options are dataclass fields; whatever lives between steps is in the cache, as columns.

    Every event gets the state after the step's own tokens are in, and may return a decision, several, or None.
    All events and traits stand in `kvfold.methods.events`, too, with what a composition makes of them.
    """

    info: ClassVar["MethodInfo"]
    compact: bool = False
    """Read keys at consecutive slots instead of text positions (needs the model's RoPE)."""
    asks: frozenset[str] = frozenset()
    """What the pass's own attention kernels should leave for the events, where they can at no more than a look:
    "column_sums" of a prompt (`view.column_sums()`), "attention" of a generated token (`view.attention(1)`). "images":
    it must know which tokens stand for images (`view.images`), so that a prompt without ids is refused.
    "sentence_ends": with which tokens sentences end (`words.ends()`), so that one without a tokenizer is refused."""

    period: int = 0
    """Generated tokens of a row from one `after_interval` to the next; 0: it never comes."""
    staggered: bool = False
    """Whether the layers have their `after_interval` at different tokens, so that no step does the work of all."""
    narrows: bool = False
    """Whether `after_prefill` may return `Propagate`."""
    shares_layers: bool = False
    """Whether its late events may return `Share`: two layers then hold memory in common."""
    outside: ClassVar[tuple[str, ...]] = ("calibration", "draft", "file", "folder", "model", "path")
    """Options that name models or files, where the method has them: a saved cache's are loaded with the caller's word
    only."""
    format: Format | None = None
    """The format that all tokens of the layer go to; None: dense, in the model's dtype."""
    own_frame: Frame | None = None
    """What brings queries and keys to where they attend; None: they attend as the model has rotated them."""
    needs: tuple[Measured, ...] = ()
    """What was measured on the model for its formats, which find it in `Spec.artefact`."""
    windows: Format | None = None
    """The format that sliding-window layers hold their tokens in; None: as transformers does."""
    stores: bool = False
    """Whether some of its tokens move to formats of their own (`Store`); new ones go where all do."""
    together: bool = False
    """Whether all heads of a layer read the same tokens (`selection`), so that they must hold the same."""
    firm: tuple[Format, ...] = ()
    """Formats that its `Store` moves tokens to and that can't drop single ones."""

    @property
    def own_prefill(self) -> bool:
        """Whether the prompt's forward pass is not the full cache's, so that no other cache's can stand in for it."""
        own = self.narrows or self.own_frame is not None
        return own or any(map(self.listens, ("read_order", "admit", "streams")))

    @property
    def own_steps(self) -> bool:
        """Whether `after_decode` needs no tokens but those in the format that new ones go to: its view may have no
        others, and says how many those are (`view.elsewhere`)."""
        return not self.listens("after_decode")

    def bind(self, model: Any) -> "Method":
        """This method for a cache of `model`: a copy with the numbers in it that were measured on the model.

        Most need none and return themselves. Raises ValueError where there are none, with the command that measures.
        """
        return self

    def of_prompts(self) -> "Method":
        """This method where what is generated can't be cut at intervals; another one if it would do so unasked."""
        return self

    def read_order(self, prompt: RawPrompt) -> Int[Tensor, "B N"] | None:
        """Before a forward pass over a prompt: which of its tokens the model reads, by column, in this order.

        Padding is -1 and stands first. What is read stands side by side: positions are counted anew. None: all.
        """
        return None

    def label(self, words: NewWords) -> Mapping[str, Tensor]:
        """Before the first layer stores a pass's tokens: columns (B, Q) by what they say. ValueError without ids."""
        return {}

    def stamp(self, tokens: Chunk, place: Place) -> Mapping[str, Tensor]:
        """Before a layer stores a pass's tokens: columns (B, H, Q) by keys and values. Prompts attend without them."""
        return {}

    def admit(self, view: HiddenView) -> Bool[Tensor, "B H Q"] | None:
        """Before a prompt's new tokens attend, layer by layer: which of them a KV head lets in. None: all.

        Later queries see only those, and only those are stored; a token always sees itself.
        """
        return None

    def streams(self, site: Site) -> Streams | None:
        """Before a prompt's new tokens attend, layer by layer: which KV heads see little of it; None: all see all."""
        return None

    def after_prefill(self, view: LayerView) -> Decisions:
        """After a forward pass over more than one token (a prompt, a chunk of it, a further turn), layer by layer."""

    def after_decode(self, view: LayerView) -> Decisions:
        """After a forward pass over one generated token, layer by layer."""

    def after_interval(self, view: LayerView) -> Decisions:
        """After every `period` generated tokens, layer by layer; the view's queries are those of the interval.

        To the view those tokens are what a further turn of a prompt would be: `place.prompt` counts them, too.
        """

    def before_attend(self, view: LayerView) -> Read | None:
        """Before a generated token attends: which of the stored tokens it reads. The view ends with its own token."""

    def selection(self, site: Site) -> Reader | None:
        """What generated tokens read of a layer, by an index that its segments then remember; None: all.

        Asked before the layer holds its first token. What a method stores in further formats is read whole.
        """

    def after_layer(self, cache: CacheView, ordinal: int) -> Mapping[int, Decisions]:
        """After layer `ordinal` is stored: decisions for it and for layers before it."""
        return {}

    def after_forward(self, cache: CacheView) -> Mapping[int, Decisions]:
        """After the last layer is stored: decisions for any layer."""
        return {}

    def after_prompt(self, prompt: PromptView) -> Mapping[int, Decisions] | Requests[Mapping[int, Decisions]]:
        """After the forward pass over a prompt is over: decisions for any layer.

        A generator may have the prompt read on from first: `yield ReadOn(...)`, or `yield LookAhead(...)`, whose
        answer is what comes next.
        """
        return {}

    def listens(self, event: str) -> bool:
        """Whether this method does anything at `event`."""
        return getattr(type(self), event) is not getattr(Method, event)

    def __or__(self, other: "Method") -> "Pipeline":
        if not isinstance(other, Method):
            return NotImplemented
        return Pipeline((*stages_of(self), *stages_of(other)))

    def __str__(self) -> str:
        options = ", ".join(f"{option.name}={getattr(self, option.name)!r}" for option in fields(self))  # type: ignore[arg-type]
        return f"{self.info.slug}({options})"


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method."""

    slug: str
    title: str
    paper: str
    """arXiv id, or "" where there is no paper."""
    kind: str
    cls: type[Method]
    formula: str = ""
    """How it scores or chooses, in LaTeX: a formula a line."""
    explained: Mapping[str, str] = field(default_factory=dict)
    """What its own options mean, less those of `COMMON`."""

    @property
    def meanings(self) -> dict[str, str]:
        """What each option means; "" where nobody says."""
        return {name: {**COMMON, **self.explained}.get(name, "") for name in self.options}

    @property
    def options(self) -> dict[str, Any]:
        """Options and their defaults."""
        return {o.name: None if o.default is MISSING else o.default for o in fields(self.cls)}  # type: ignore[arg-type]

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]

    def to_dict(self) -> dict[str, Any]:
        """For `kvfold methods --json`."""
        return {
            "slug": self.slug,
            "title": self.title,
            "arxiv": self.paper,
            "kind": self.kind,
            "summary": self.summary,
            "options": self.options,
        }


KINDS = (
    "none", "evict", "pattern", "merge", "budget", "prefill", "select", "quantize", "sparse", "low-rank", "offload",
)  # fmt: skip
COMMON = {
    "budget": "what stays: a fraction of the prompt, or a number of tokens per KV head",
    "score": "the method that ranks the tokens, as text",
    "calibration": "a file of what was measured on the model; None: found by method and model",
}
"""What options mean that many methods have."""
registry: dict[str, MethodInfo] = {}
C = TypeVar("C", bound=type[Method])


def method(
    slug: str, *, title: str, kind: str, paper: str = "", formula: str = "", options: Mapping[str, str] | None = None
) -> Callable[[C], C]:
    """Register a method under `slug` (class decorator).

    `formula` is LaTeX, a formula a line; one that is indented further goes on with the line above. `options` says
    what each option means (those of `COMMON` need no word). The pages of docs/methods are made of both. Raises
    ValueError for a slug, a kind or an option that can't be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", slug):
        raise ValueError(f"slug={slug!r} must be letters, digits, - and _, so that it can be written in a composition")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")

    def add(cls: C) -> C:
        taken = registry.get(slug)
        if taken is not None and taken.cls.__module__ != cls.__module__:
            raise ValueError(f"slug={slug!r} is taken by {taken.cls.__module__}.{taken.cls.__name__}")
        lines = re.sub(r"\n\s+", " ", cleandoc(formula))
        info = MethodInfo(slug, title, paper, kind, cls, lines, dict(options or {}))
        if options and (unknown := sorted(set(options) - set(info.options))):
            raise ValueError(f"options={unknown!r} are none of {slug}'s: {', '.join(info.options) or 'it has none'}")
        cls.info = info
        registry[slug] = cls.info
        return cls

    return add


class Compound(Method):
    """A method made of others, its `parts`: what it says at events, and its traits, are theirs (see events.py)."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """The others, in their order."""
        raise NotImplementedError

    @property
    def own_steps(self) -> bool:
        return all(part.own_steps for part in self.parts)

    @cached_property
    def _heard(self) -> dict[str, list[Callable[..., Any]]]:
        return {name: [getattr(part, name) for part in self.parts if part.listens(name)] for name in EVENTS}

    @cached_property
    def _said(self) -> dict[str, Any]:
        return {name: trait.combine([getattr(part, name) for part in self.parts]) for name, trait in TRAITS.items()}

    def listens(self, event: str) -> bool:
        return bool(self._heard[event]) or getattr(type(self), event) is not getattr(Compound, event)


def _asking(name: str, event: Event) -> Callable[..., Any]:
    def ask(self: Compound, *given: Any) -> Any:
        return event.combine(self._heard[name], *given)

    ask.__name__, ask.__doc__ = name, f"What the parts say {event.when}."
    return ask


def _saying(name: str) -> property:
    return property(lambda self: self._said[name])


for _name, _event in EVENTS.items():
    setattr(Compound, _name, _asking(_name, _event))
for _name in TRAITS:
    setattr(Compound, _name, _saying(_name))


@dataclass(frozen=True)
class Pipeline(Compound):
    """Methods one after another: each sees what the one before it left. Made by `A | B`."""

    stages: tuple[Method, ...]

    def __post_init__(self) -> None:
        steps = [stage for stage in keeping(self.stages) if stage.listens("after_decode")]
        if steps or not all(form.traits.drops for form in formats_of(self.stages)):
            object.__setattr__(self, "stages", tuple(stage.of_prompts() for stage in self.stages))
        for name, event in EVENTS.items():
            self._at_most_one(event.alone, [stage for stage in self.stages if stage.listens(name)])
        if streaming := [stage for stage in self.stages if stage.listens("streams")]:
            self._at_most_one(PROMPTS, streaming + [stage for stage in self.stages if stage.listens("admit")])
        for name, trait in TRAITS.items():
            self._at_most_one(trait.alone, [stage for stage in self.stages if getattr(stage, name)])
        self._check_whole()
        self._check_selection()
        if (dropping := self.drops_stored()) is not None:
            raise ValueError(
                f"method={self} would drop single tokens of {self.format}, which it holds by the page: {dropping} "
                "decides about stored tokens; give the format requantise=True"
            )
        if steps and self.period:
            raise ValueError(
                f"method={self} has {steps[0]} drop what is generated at every token, and another stage at intervals: "
                "give one of them alone"
            )
        late = [stage for stage in self.stages if stage.listens("after_prompt")]
        if late and self.shares_layers:
            raise ValueError(
                f"method={self} lets layers share tokens that {late[0]} would drop afterwards: it decides when a "
                "prompt has been read once more"
            )

    def _check_selection(self) -> None:
        """Raise ValueError where a stage chooses what is read, and another moves tokens away from its index."""
        if not self.listens("selection"):
            return
        away = next((stage for stage in self.stages if stage.stores or stage.shares_layers), None)
        if away is not None:
            raise ValueError(
                f"method={self} has {away} hold some tokens in a format of their own, which every query would read "
                "whole; a stage that chooses what is read needs all tokens in one format"
            )
        choosing = next(stage for stage in self.stages if stage.listens("selection"))
        dropping = next((stage for stage in self._deciding() if stage is not choosing), None)
        if choosing.together and dropping is not None:
            raise ValueError(
                f"method={self} has {choosing} let all heads read the same tokens, and {dropping} may leave each head "
                "others; where it has an option with which heads choose for themselves, give it that"
            )
        if self.compact:
            raise ValueError(f"method={self} chooses what is read by keys at text positions; compact ones are others")

    def drops_stored(self) -> Method | None:
        """A stage that may drop, whatever is read, single stored tokens of a format that can't; None: there is none."""
        if self.format is None or self.format.traits.drops:
            return None
        events = [name for name, event in EVENTS.items() if event.stored]
        return next((stage for stage in self.stages if any(map(stage.listens, events))), None)

    def _check_whole(self) -> None:
        """Raise ValueError where a stage may drop tokens of some heads that a format holds for all heads together."""
        if self.format is None or self.format.traits.addressed != "whole":
            return
        decide = self._deciding()
        if decide or self.compact:
            which = decide[0] if decide else next(stage for stage in self.stages if stage.compact)
            raise ValueError(
                f"method={self} would drop or move tokens of single heads of {self.format}, which holds those of all "
                f"heads together: {which} can't stand before it"
            )

    def _deciding(self) -> list[Method]:
        """The stages that may drop tokens."""
        reading = ("read_order", "label", "stamp", "before_attend", "selection")
        return [stage for stage in self.stages if any(stage.listens(e) for e in EVENTS if e not in reading)]

    def _at_most_one(self, what: str, stages: list[Method]) -> None:
        if what and len(stages) > 1:
            both = " and ".join(map(str, stages[:2]))
            raise ValueError(f"method={self} has two stages {what}, {both}; at most one is possible")

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.stages

    def bind(self, model: Any) -> "Pipeline":
        return replace(self, stages=tuple(stage.bind(model) for stage in self.stages))

    def __str__(self) -> str:
        return " | ".join(str(stage) for stage in self.stages)


def formats_of(stages: tuple[Method, ...]) -> Iterator[Format]:
    """What tokens are held in, besides as they are."""
    for stage in stages:
        yield from (() if stage.format is None else (stage.format,))
        yield from stage.firm


def stages_of(method: Method) -> tuple[Method, ...]:
    """Those of a composition; a method alone is one."""
    return method.stages if isinstance(method, Pipeline) else (method,)


def keeping(stages: Iterable[Method]) -> list[Any]:
    """Those whose `budget` is of the tokens that are kept; of others it is of what is read."""
    some = (stage for stage in stages if hasattr(stage, "budget"))
    return [stage for stage in some if stage.info.kind == "evict" or not stage.listens("selection")]
