"""Tokens fed one by one: what is compared, with what, and what rows of a batch have to do with each other."""

import inspect

import pytest
import torch

import kvfold
from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.decoding import prefill, teacher_forced
from kvfold.evaluation.forced import drift, fed, full_states, logits_of, swallowed
from kvfold.testing import VOCAB
from models import build

CONTEXT, FED, LAST = 20, 37, 21


@pytest.fixture(scope="module", params=["llama", "gemma3", "ntk"])
def model(request):
    """Plain, with windows and capped logits, and with angles that depend on the length."""
    return build(request.param, **({"final_logit_softcapping": 2.0} if request.param == "gemma3" else {}))


def tokens(rows, count):
    """Random ids (rows, count)."""
    return torch.randint(3, VOCAB, (rows, count), generator=torch.Generator().manual_seed(count))


def alone(model, method, ids):
    """The drift of one row (1, T)."""
    cache = kvfold.Cache(model, method)
    return drift(model, cache, ids, CONTEXT, full_states(model, ids, LAST)), cache


def test_states_give_the_logits_of_one_pass(model):
    ids = tokens(2, CONTEXT + FED)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits_of(model, full_states(model, ids, LAST)), whole[:, -LAST:], rtol=1e-4, atol=1e-4)


def test_full_does_not_drift(model):
    found, _ = alone(model, "full", tokens(1, CONTEXT + FED))
    assert found.kl[0] < 1e-6 and found.top1 == [1.0] and len(found.seconds) == FED
    assert found.most_tokens == CONTEXT + FED


def test_the_last_tokens_are_those_that_are_compared():
    model, ids = build("llama"), tokens(1, CONTEXT + FED)
    found, cache = alone(model, "streamingllm(budget=8)", ids)
    again = kvfold.Cache(model, "streamingllm(budget=8)")
    first = prefill(model, ids[:, :CONTEXT], again).logits
    said = teacher_forced(model, again, first, [*ids[0, CONTEXT:].tolist(), 1])[1:]
    whole = model(ids, use_cache=False).logits[0].detach()
    expected = agreement(whole[-LAST:], said[-LAST:])
    assert found.kl[0] == pytest.approx(expected.kl, rel=1e-3) and found.top1 == [pytest.approx(expected.top1)]
    assert found.kl[0] > 0.01 and found.kl[0] != pytest.approx(agreement(whole[CONTEXT:], said).kl, rel=1e-2)
    assert found.most_tokens == 8 and found.nbytes == cache.nbytes <= found.most_nbytes


@pytest.mark.parametrize("method", ["h2o(budget=12)", "snapkv(budget=12)"])
def test_rows_of_a_batch_are_as_alone(method):
    model, ids = build("llama"), tokens(3, CONTEXT + FED)
    together = drift(model, kvfold.Cache(model, method), ids, CONTEXT, full_states(model, ids, LAST))
    rows = [alone(model, method, ids[i : i + 1])[0] for i in range(3)]
    assert together.kl == pytest.approx([row.kl[0] for row in rows], rel=1e-3)
    assert together.top1 == pytest.approx([row.top1[0] for row in rows])
    assert len({round(kl, 6) for kl in together.kl}) == 3


def test_bytes_at_most_are_those_of_the_worst_step():
    """What `snapkv` generates stays, so that the end is the most; a step before it holds less."""
    model, ids = build("llama"), tokens(1, CONTEXT + FED)
    found, cache = alone(model, "snapkv(budget=12)", ids)
    assert found.most_nbytes == found.nbytes == cache.nbytes and found.most_tokens == 12 + FED


def test_steps_are_numbered_and_fed_to_every_row():
    model, ids = build("llama"), tokens(2, 6)
    cache = kvfold.Cache(model, "full")
    found = [step.logits for step in fed(model, cache, ids)]
    torch.testing.assert_close(torch.stack(found, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("context", "last", "message"),
    [(0, 4, "context=0 must be between 1 and 9"), (10, 1, "context=10"), (4, 7, "last=7 must be between 1 and 6")],
)
def test_lengths_that_can_not_be(context, last, message):
    model, ids = build("llama"), tokens(1, 10)
    with pytest.raises(ValueError, match=message):
        drift(model, kvfold.Cache(model, "full"), ids, context, torch.zeros(1, last, 64, dtype=torch.float32))


def test_a_model_with_logits_of_another_kind_is_refused(monkeypatch):
    """As Granite's, which are scaled after the output layer."""
    model = build("llama")
    forward = type(model).forward

    def scaled(self, *given, **named):
        out = forward(self, *given, **named)
        out.logits = out.logits / 4
        return out

    scaled.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="makes its logits of more than its output layer"):
        full_states(model, tokens(1, 12), 4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["kvfold(budget=12, interval=4)", "h2o(budget=12)"])
def test_tokens_that_nobody_asks_about_leave_what_others_do(family, method):
    """Without the output layer: the same tokens are kept, and what comes next is the same to the last bit."""
    model, ids = build(family), tokens(2, 50)
    one, two = kvfold.Cache(model, method), kvfold.Cache(model, method)
    for cache in (one, two):
        prefill(model, ids[:, :20], cache)
    *_, last = fed(model, one, ids[:, 20:])
    swallowed(model, two, ids[:, 20:-1])
    (same,) = fed(model, two, ids[:, -1:])
    assert torch.equal(last.logits, same.logits) and [one.kept(i) for i in range(3)] == [two.kept(i) for i in range(3)]
