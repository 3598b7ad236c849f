"""Events and traits: what a method does and says of itself, a composition or a wrapper does and says, or refuses."""

import re
from dataclasses import dataclass
from inspect import isfunction

import pytest
import torch

import kvfold
from kvfold.formats import Dense
from kvfold.methods import Method, Pipeline, Wrapper, list_methods, parse
from kvfold.methods._merging import Merging
from kvfold.methods.elitekv import EliteFrame
from kvfold.methods.events import EVENTS, TRAITS
from kvfold.methods.h2o import H2O
from kvfold.methods.scored import Over, Scored
from kvfold.methods.snapkv import SnapKV
from kvfold.views.decisions import Drop, Keep, Read
from views import kept, random_view

OVER = [info.slug for info in list_methods() if issubclass(info.cls, Over)]
WRAPPERS = [slug for slug in OVER if slug != "decoding"]
"""Those that pass on all that a method does; `decoding` does without what it does at each generated token."""
TEXTS = [info.slug for info in list_methods()] + [
    'streamingllm(positions="compact")', 'lacache(positions="compact")', "chelsea(online=True)",
    'kvfold(quality="best")',
]  # fmt: skip
"""All methods, and options by which some listen to more, or say more."""
SAID = {
    "compact": True, "asks": frozenset({"images"}), "narrows": True, "shares_layers": True, "stores": True,
    "together": True, "format": Dense(torch.bfloat16), "windows": Dense(torch.bfloat16), "period": 5,
    "firm": (Dense(torch.bfloat16),), "staggered": True, "own_frame": EliteFrame(None, None),
    "needs": (EliteFrame(None, None),),
}  # fmt: skip
"""Of each trait something that not every method says."""
REFUSAL = (
    "must be a method that (ranks|selects)|decides by itself in|decides in .*, too|shares the budget by itself|"
    "has compact positions"
)


def wrapped(wrapper: str, text: str) -> Over | None:
    """The wrapper over the method `text`; None if that is refused, for one of the reasons there are."""
    try:
        made = parse(wrapper, score=text)
    except ValueError as error:
        assert re.search(REFUSAL, str(error)) and text in str(error)
        return None
    assert isinstance(made, Over)
    return made


def lost(outer: Method, inner: Method) -> list[str]:
    """Events that the inner method listens to and the outer does not, and traits of which the outer says less."""
    events = [name for name in EVENTS if inner.listens(name) and not outer.listens(name)]
    less = [
        name
        for name in TRAITS
        if name != "asks" and getattr(inner, name) not in (False, None, (), getattr(outer, name))
    ]
    return events + less + ["asks"] * (not inner.asks <= outer.asks)


def another(**members) -> type[SnapKV]:
    """A method of another package: SnapKV, but for `members`."""
    cls = dataclass(frozen=True)(type("Another", (SnapKV,), {"__doc__": "Another.", **members}))
    return kvfold.method("test-another", title="Another", kind="evict")(cls)


def test_the_tables_hold_all_that_a_method_has():
    asked = {name for name, value in vars(Method).items() if isfunction(value) and not name.startswith("_")}
    assert asked - {"bind", "listens", "of_prompts"} == set(EVENTS)
    # `outside` is asked of each stage by itself (hf/saving/outside.py): nothing is to be handed on.
    assert set(Method.__annotations__) - {"info", "outside"} == set(TRAITS) == set(SAID)
    assert all(event.when for event in EVENTS.values())


@pytest.mark.parametrize("made", [Pipeline, Over, Wrapper, Merging])
def test_nothing_is_handed_on_by_hand(made):
    by_hand = {name for name in vars(made) if name in EVENTS or name in TRAITS}
    assert by_hand == ({"after_prefill", "after_decode"} & set(vars(made)) if made is not Pipeline else set())


def test_whoever_has_a_score_is_a_wrapper():
    assert [info.slug for info in list_methods() if "score" in info.options] == OVER


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_loses_nothing_of_any_method(wrapper):
    taken = {text: outer for text in TEXTS if (outer := wrapped(wrapper, text)) is not None}
    assert {text: lost(outer, outer.inner) for text, outer in taken.items()} == {text: [] for text in taken}
    merges = issubclass(kvfold.methods.get_method(wrapper).cls, Merging)
    compact = [text for text, outer in taken.items() if outer.compact]
    moves = merges and wrapper != "less"  # what has become a sum can't be moved
    assert compact == (['streamingllm(positions="compact")', 'lacache(positions="compact")'] if moves else [])
    assert {"h2o", "tova", "snapkv"} <= set(taken) and not {"mpcache", "kvzip", "cake", "full"} & set(taken)


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_of_another_package_is_handed_on_or_refused(wrapper, name):
    another(**{name: lambda self, *given: None})
    outer = wrapped(wrapper, "test-another")
    merges = issubclass(kvfold.methods.get_method(wrapper).cls, Merging)
    after = name in ("after_prefill", "after_decode")
    assert (outer is not None) == (merges if after else EVENTS[name].wrapped)
    assert outer is None or outer.listens(name)


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("step", [Scored.after_prefill, Scored.at_step])
def test_a_ranking_at_every_step_is_no_choice_of_its_own(wrapper, step):
    another(after_decode=step)
    outer, plain = wrapped(wrapper, "test-another"), wrapped(wrapper, "snapkv")
    assert outer.listens("after_decode") and not plain.listens("after_decode")


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", TRAITS)
def test_a_trait_of_another_package_is_handed_on(wrapper, name):
    another(**{name: SAID[name]})
    outer, plain = wrapped(wrapper, "test-another"), parse(wrapper, score="snapkv")
    if (wrapper, name) == ("less", "compact"):
        assert outer is None  # what has become a sum can't be moved
        return
    own = (wrapper, name) == ("less", "stores")  # as it does anyhow
    assert lost(outer, outer.inner) == [] and lost(plain, outer.inner) == ([] if own else [name])


@pytest.mark.usefixtures("scratch_methods", "unchecked")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_handed_on_is_what_the_inner_method_says(wrapper):
    flags, order = torch.tensor([[[True, False]]]), torch.tensor([[1, 0]])
    another(admit=lambda self, view: flags, read_order=lambda self, prompt: order)
    outer = wrapped(wrapper, "test-another")
    assert outer.own_prefill and outer.admit(None) is flags and outer.read_order(None) is order
    nested = parse("adakv", score=str(outer).replace("budget=0.25, ", "")) if wrapper == "pyramidkv" else outer
    assert nested.admit(None) is flags
    plain = parse(wrapper, score="snapkv")
    assert not plain.own_prefill and plain.admit(None) is None and plain.read_order(None) is None


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("name", [*EVENTS, *TRAITS])
def test_a_composition_loses_nothing(name):
    cls = another(**{name: SAID.get(name, lambda self, *given: None)})
    other = SnapKV() if name == "period" else H2O()  # at every token and at intervals go not together
    for composed in (cls() | other, other | cls()):
        assert lost(composed, cls()) == lost(composed, other) == []
    assert parse("full | full").listens(name) is False if name in EVENTS else not getattr(parse("full | full"), name)


@pytest.mark.usefixtures("scratch_methods")
def test_one_stage_names_the_format():
    cls = another(format=SAID["format"])
    assert (H2O() | cls() | SnapKV()).format == SAID["format"] and (H2O() | SnapKV()).format is None
    both = r"two stages with a format for all tokens, test-another\(.*window=3.*\) and test-another\(.*window=5.*\);"
    with pytest.raises(ValueError, match=both):
        cls(window=3) | H2O() | cls(window=5)


@pytest.mark.usefixtures("unchecked")
def test_a_stage_that_does_not_listen_is_not_asked():
    @dataclass(frozen=True)
    class Deaf(Method):
        """It would fail."""

        def after_decode(self, view):
            raise AssertionError

        before_attend = after_layer = after_forward = after_prompt = after_prefill = admit = read_order = streams = (
            after_decode
        )

        def listens(self, event):
            return False

    view, composed = random_view(T=9), Deaf() | H2O(budget=3) | Deaf()
    assert kept(composed, view) == kept(H2O(budget=3), view)
    assert kept(composed, view, "after_decode") == kept(H2O(budget=3), view)
    assert composed.before_attend(view) is composed.admit(view) is composed.read_order(view) is None
    assert composed.after_layer(None, 0) == composed.after_forward(None) == {}
    # Chelsea leaves generated tokens alone unless it is told to cluster them.
    assert parse("chelsea(budget=4) | h2o(budget=8)").after_decode(view)[0].staying(view.valid).sum() == 8


def test_stages_see_what_the_ones_before_them_left():
    view = random_view(H=2, T=12)
    composed = parse("streamingllm(budget=10) | h2o(budget=9) | tova(budget=7)")
    first, second, third = composed.after_decode(view)
    assert isinstance(first, Drop) and isinstance(second, Drop) and isinstance(third, Drop)
    assert [first.slots.shape[-1], second.slots.shape[-1], third.slots.shape[-1]] == [2, 1, 2]
    assert kept(composed, view, "after_decode") == kept(composed, view)
    assert [[len(head) for head in row] for row in kept(composed, view)] == [[7, 7]]


@pytest.mark.usefixtures("unchecked")
def test_what_is_read_and_let_in_is_what_all_stages_agree_on():
    masks = [torch.tensor([[[True, True, False]]]), torch.tensor([[[False, True, True]]])]

    def saying(mask):
        members = {"admit": lambda self, view: mask, "before_attend": lambda self, view: Read(mask)}
        return dataclass(frozen=True)(type("Saying", (Method,), members))()

    composed = saying(masks[0]) | H2O() | saying(masks[1])
    assert composed.admit(None).tolist() == composed.before_attend(None).mask.tolist() == [[[False, True, False]]]


def test_a_merging_method_takes_what_goes_for_what_stays():
    view = random_view(H=2, T=10)
    method = parse("keepkv(budget=8, score='h2o')")
    assert isinstance(method.inner.after_decode(view), Drop)
    by_step, at_once = method.selected(view, "after_decode"), method.selected(view, "after_prefill")
    assert isinstance(by_step, Keep) and torch.equal(by_step.mask, at_once.mask)
    assert by_step.columns.keys() == at_once.columns.keys() and by_step.columns
