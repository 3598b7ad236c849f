"""What a method is: a frozen dataclass of options, with events that return decisions."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import reduce
from inspect import cleandoc
from operator import and_
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.views import CacheView, PromptView, RawPrompt
from kvfold.views.decisions import Decision, Read, Share

if TYPE_CHECKING:
    from kvfold.views import HiddenView, LayerView

Decisions = Decision | Sequence[Decision] | None


class Method:
    """Base of all methods. Options are dataclass fields; whatever lives between steps is in the cache, as columns.

    Every event gets the state after the step's own tokens are in, and may return a decision, several, or None.
    """

    info: ClassVar["MethodInfo"]
    compact: bool = False
    """Read keys at consecutive slots instead of text positions (needs the model's RoPE)."""
    asks: frozenset[str] = frozenset()
    """What the pass's own attention kernels should leave for the events, where they can at no more than a look:
    "column_sums" of a prompt (`view.column_sums()`), "attention" of a generated token (`view.attention(1)`). "images":
    it must know which tokens stand for images (`view.images`), so that a prompt without ids is refused."""

    format: Any = None
    """The format that all tokens of the layer go to; None: dense, in the model's dtype."""
    narrows: bool = False
    """Whether `after_prefill` may return `Propagate`."""
    shares_layers: bool = False
    """Whether its late events may return `Share`: two layers then hold memory in common."""

    @property
    def own_prefill(self) -> bool:
        """Whether the prompt's forward pass is not the full cache's, so that no other cache's can stand in for it."""
        return self.narrows or self.listens("read_order") or self.listens("admit")

    def bind(self, model: Any) -> "Method":
        """This method for a cache of `model`: a copy with the numbers in it that were measured on the model.

        Most need none and return themselves. Raises ValueError where there are none, with the command that measures.
        """
        return self

    def read_order(self, prompt: RawPrompt) -> Int[Tensor, "B N"] | None:
        """Before a forward pass over a prompt: which of its tokens the model reads, by column, in this order.

        Padding is -1 and stands first. What is read stands side by side: positions are counted anew. None: all.
        """
        return None

    def admit(self, view: "HiddenView") -> Bool[Tensor, "B H Q"] | None:
        """Before a prompt's new tokens attend, layer by layer: which of them a KV head lets in. None: all.

        Later queries see only those, and only those are stored; a token always sees itself.
        """
        return None

    def after_prefill(self, view: "LayerView") -> Decisions:
        """After a forward pass over more than one token (a prompt, a chunk of it, a further turn), layer by layer."""

    def after_decode(self, view: "LayerView") -> Decisions:
        """After a forward pass over one generated token, layer by layer."""

    def before_attend(self, view: "LayerView") -> Read | None:
        """Before a generated token attends: which of the stored tokens it reads. The view ends with its own token."""

    def after_layer(self, cache: CacheView, ordinal: int) -> Mapping[int, Decisions]:
        """After layer `ordinal` is stored: decisions for it and for layers before it."""
        return {}

    def after_forward(self, cache: CacheView) -> Mapping[int, Decisions]:
        """After the last layer is stored: decisions for any layer."""
        return {}

    def after_prompt(self, prompt: PromptView) -> Mapping[int, Decisions]:
        """After the forward pass over a prompt is over, which may be read on from: decisions for any layer."""
        return {}

    def listens(self, event: str) -> bool:
        """Whether this method does anything at `event`."""
        return getattr(type(self), event) is not getattr(Method, event)

    def __or__(self, other: "Method") -> "Pipeline":
        if not isinstance(other, Method):
            return NotImplemented
        return Pipeline((*_stages(self), *_stages(other)))

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


@dataclass(frozen=True)
class Pipeline(Method):
    """Methods one after another: each sees what the one before it left. Made by `A | B`."""

    stages: tuple[Method, ...]

    def __post_init__(self) -> None:
        if sum(stage.compact for stage in self.stages) > 1:
            raise ValueError(f"method={self} has two stages with compact positions; at most one is possible")
        if sum(stage.listens("read_order") for stage in self.stages) > 1:
            raise ValueError(f"method={self} has two stages that choose what the model reads; at most one is possible")
        late = [str(stage) for stage in self.stages if stage.listens("after_prompt")]
        if late and self.shares_layers:
            raise ValueError(
                f"method={self} lets layers share tokens that {late[0]} would drop afterwards: it decides when a "
                "prompt has been read once more"
            )

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether a stage reads at compact positions."""
        return any(stage.compact for stage in self.stages)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """What any stage asks for."""
        return frozenset().union(*(stage.asks for stage in self.stages))

    def bind(self, model: Any) -> "Pipeline":
        return replace(self, stages=tuple(stage.bind(model) for stage in self.stages))

    @property
    def narrows(self) -> bool:  # type: ignore[override]
        """Whether a stage lets only some tokens go on."""
        return any(stage.narrows for stage in self.stages)

    @property
    def shares_layers(self) -> bool:  # type: ignore[override]
        """Whether a stage lets layers hold memory in common."""
        return any(stage.shares_layers for stage in self.stages)

    def listens(self, event: str) -> bool:
        return any(stage.listens(event) for stage in self.stages)

    def read_order(self, prompt: RawPrompt) -> Int[Tensor, "B N"] | None:
        return next((stage.read_order(prompt) for stage in self.stages if stage.listens("read_order")), None)

    def admit(self, view: "HiddenView") -> Bool[Tensor, "B H Q"] | None:
        flags = [found for stage in self.stages if (found := stage.admit(view)) is not None]
        return reduce(and_, flags) if flags else None

    def _run(self, event: str, view: "LayerView") -> list[Decision]:
        done: list[Decision] = []
        for stage in self.stages:
            for decision in decided(getattr(stage, event)(view)):
                view = view.apply(decision)
                done.append(decision)
        return done

    def after_prefill(self, view: "LayerView") -> list[Decision]:
        return self._run("after_prefill", view)

    def after_decode(self, view: "LayerView") -> list[Decision]:
        return self._run("after_decode", view)

    def before_attend(self, view: "LayerView") -> Read | None:
        reads = [read for stage in self.stages if (read := stage.before_attend(view)) is not None]
        if not reads:
            return None
        mask = reads[0].mask
        for read in reads[1:]:
            mask = mask & read.mask
        return Read(mask)

    def after_layer(self, cache: CacheView, ordinal: int) -> Mapping[int, list[Decision]]:
        return self._gather(stage.after_layer(cache, ordinal) for stage in self.stages)

    def after_forward(self, cache: CacheView) -> Mapping[int, list[Decision]]:
        return self._gather(stage.after_forward(cache) for stage in self.stages)

    def after_prompt(self, prompt: PromptView) -> Mapping[int, list[Decision]]:
        return self._gather(stage.after_prompt(prompt) for stage in self.stages)

    @staticmethod
    def _gather(maps: Iterator[Mapping[int, Decisions]]) -> dict[int, list[Decision]]:
        done: dict[int, list[Decision]] = {}
        for found in maps:
            for ordinal, decisions in found.items():
                made, before = decided(decisions), done.setdefault(ordinal, [])
                # What two layers share is chosen when each has its own tokens: that goes with any decision.
                if all(any(not isinstance(decision, Share) for decision in some) for some in (made, before)):
                    raise ValueError(f"two stages decide about layer {ordinal} in the same event; compose one of them")
                before += made
        return done

    def __str__(self) -> str:
        return " | ".join(str(stage) for stage in self.stages)


def _stages(method: Method) -> tuple[Method, ...]:
    return method.stages if isinstance(method, Pipeline) else (method,)


def decided(decisions: Decisions) -> Sequence[Decision]:
    """What an event returned, as a sequence."""
    if decisions is None:
        return ()
    return decisions if isinstance(decisions, Sequence) else (decisions,)
