"""Readings of a prompt that a method asks for: by one runner, stage by stage, and in the hands of whoever likes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import kvfold
from kvfold.hf.prompt import Prompt
from kvfold.layer.plan import Plan
from kvfold.methods import Method
from kvfold.views import LookAhead, Reader, ReadOn, answered
from models import feed, subject, tokens

IDS, VALID = torch.tensor([[4, 5]]), torch.tensor([[True, False]])
SAID = torch.tensor([[7]]), torch.tensor([[True]])


def watch(view: Any) -> None:
    """Nothing."""


@dataclass
class Log:
    """Answers, and remembers what it was asked."""

    asked: list[Any] = field(default_factory=list)

    def read(self, ids, valid, observe) -> None:
        self.asked.append(("read", ids.tolist(), valid.tolist(), observe))

    def look_ahead(self, count, draft=None):
        self.asked.append(("look_ahead", count, draft))
        return SAID


READ = ("read", IDS.tolist(), VALID.tolist(), watch)


def working(end):
    """Reads on, then looks ahead; and ends with `end` of both answers."""
    nothing = yield ReadOn(IDS, VALID, watch)
    return end(nothing, (yield LookAhead(3, "small")))


def test_requests_are_answered_one_by_one():
    log = Log()
    nothing, said = answered(working(lambda *found: found), log)
    assert nothing is None and said is SAID and log.asked == [READ, ("look_ahead", 3, "small")]
    assert isinstance(log, Reader)


def test_what_asks_for_nothing_is_its_own_end():
    decisions = {1: kvfold.Keep(torch.ones(1, 1, 2, dtype=torch.bool))}
    assert answered(decisions, Log()) is decisions
    assert answered((x for x in ()), Log()) is None


@pytest.mark.usefixtures("unchecked")
def test_what_nobody_can_answer():
    with pytest.raises(TypeError, match="request='more' is not one of ReadOn, LookAhead"):
        answered((x for x in ["more"]), Log())


@pytest.mark.usefixtures("unchecked")
def test_stages_ask_one_after_another_and_decide_together():
    keep = kvfold.Keep(torch.ones(1, 1, 2, dtype=torch.bool))

    @dataclass(frozen=True)
    class Plain(Method):
        """Decides without asking."""

        def after_prompt(self, prompt):
            return {0: keep}

    @dataclass(frozen=True)
    class Asking(Method):
        """Asks first."""

        layer: int

        def after_prompt(self, prompt):
            return (yield from working(lambda *found: {self.layer: [keep]}))

    log = Log()
    found = answered((Asking(2) | Plain() | Asking(1)).after_prompt(None), log)
    assert found == {2: [keep], 0: [keep], 1: [keep]} and [kind for kind, *_ in log.asked] == ["read", "look_ahead"] * 2
    assert answered((Plain() | kvfold.parse("full")).after_prompt(None), log) == {0: [keep]}
    with pytest.raises(ValueError, match="two stages decide about layer 0 in the same event"):
        answered((Asking(0) | Plain()).after_prompt(None), log)


def by_hand(method: str, prompt: Mapping[str, Any]) -> tuple[list[type], list[list[list[int]]]]:
    """What a method asks for after a prompt of which all is stored, answered by hand; and what each layer keeps."""
    cache = kvfold.Cache(subject("llama"), "full")
    feed(subject("llama"), cache, *prompt.values())
    view = Prompt(cache, Plan(prefill=True, token_ids=prompt["input_ids"]))
    work, kinds, answer, decisions = kvfold.parse(method).after_prompt(view), [], None, None
    while decisions is None:
        try:
            request = work.send(answer)
        except StopIteration as end:
            decisions = end.value
        else:
            kinds.append(type(request))
            read = isinstance(request, ReadOn)
            answer = view.read(*vars(request).values()) if read else view.look_ahead(*vars(request).values())
    left = [view[i].apply(decisions[i]) if decisions else view[i] for i in range(len(view))]
    return kinds, [[x.positions[0, h][x.valid[0, h]].tolist() for h in range(2)] for x in left]


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("kvzip(budget=0.5, chunk=10)", [ReadOn] * 3),
        ("epicache(budget=10)", [ReadOn]),
        ("epicache(budget=40)", []),
        ("kvzip(budget=1.0)", []),
    ],
)
def test_whoever_likes_may_run_the_readings(method, kinds):
    cache, prompt = kvfold.Cache(subject("llama"), method), tokens(30)
    feed(subject("llama"), cache, *prompt.values())
    assert by_hand(method, prompt) == (kinds, [core.kept()[0] for core in cache.paged])


def test_a_draft_is_asked_for_and_then_read():
    prompt = tokens(30)
    assert by_hand("speckv(budget=10)", prompt)[0] == [LookAhead, ReadOn]
    assert by_hand("speckv(budget=10, lookahead=0)", prompt)[0] == by_hand("speckv(budget=30)", prompt)[0] == []


def test_a_method_that_asks_for_nothing_decides():
    @dataclass(frozen=True)
    class Last(Method):
        """The last five tokens of the first layer."""

        def after_prompt(self, prompt):
            return {0: kvfold.Keep(prompt[0].last(5))}

    cache = kvfold.Cache(subject("llama"), Last())
    feed(subject("llama"), cache, *tokens(12).values())
    assert [core.counts().tolist() for core in cache.paged] == [[[5, 5]], [[12, 12]], [[12, 12]]]
