"""Prompts, protocols, and what a batch of examples does beside one alone."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

import kvfold
from kvfold.evaluation.asking import AskedContender, Asker
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.metrics.base import metrics
from kvfold.evaluation.prompting import Prompter
from kvfold.hf.cache import Cache

pytestmark = pytest.mark.slow
CONTEXT = "The code of the red door is 4711. The code of the blue door is 1138. Nothing else is written here. " * 2
RED = Query("\nWhich code has the red door?", ("4711",), prefix="It is", max_new_tokens=6)
BLUE = Query("\nAnd the blue one, which is further away?", ("1138",), prefix="It is", max_new_tokens=9)
LAST = Query("\nDone?", ("yes",), max_new_tokens=4)
ONE = Example("one", CONTEXT, (RED, BLUE, LAST))
TWO = Example("two", CONTEXT[40:120] + "A shorter one.", (BLUE, RED, LAST))


@pytest.fixture(scope="module")
def loaded(tiny):
    return kvfold.load(str(tiny), progress=False)


@pytest.fixture
def asker(loaded):
    return Asker(*loaded, window=4096)


def contenders(model, *methods):
    made = [("full", None), *methods]
    return [
        AskedContender(m, b, lambda m=m, b=b: Cache(model, m, **({} if b is None else {"budget": b}))) for m, b in made
    ]


# -- prompts -------------------------------------------------------------------------------------------------


def test_a_prompt_is_its_head_and_tails(tokenizer):
    prompt = Prompter(tokenizer, 4096).prompt(ONE, turns=True)
    assert tokenizer.decode(prompt.head) == "<|user|>\n" + CONTEXT
    assert tokenizer.decode(prompt.tails[1]) == BLUE.text + "<|end|>\n<|assistant|>\nIt is"
    assert prompt.whole == [prompt.head + tail for tail in prompt.tails]  # bytes: no token spans the seam
    assert tokenizer.decode(prompt.turns[1]) == (
        f" 4711<|end|>\n<|user|>\n{BLUE.text.strip()}<|end|>\n<|assistant|>\nIt is"
    )


def test_without_a_template_the_text_is_plain(tokenizer):
    for prompter, example in (
        (Prompter(tokenizer, 4096, chat=False), ONE),
        (Prompter(tokenizer, 4096), replace(ONE, chat=False)),
    ):
        prompt = prompter.prompt(example, turns=True)
        assert tokenizer.decode(prompt.whole[0]) == CONTEXT + RED.text + "It is"
        assert tokenizer.decode(prompt.turns[1]) == f" 4711\n\n{BLUE.text.strip()}It is"


def test_a_long_context_is_cut_in_its_middle_or_at_its_end(tokenizer):
    example = Example("long", "".join(f"{i:03d} " for i in range(500)), (RED,), chat=False)
    window = 300
    prompt = Prompter(tokenizer, window).prompt(example)
    text = tokenizer.decode(prompt.whole[0])
    assert prompt.cut == len(example.context) + len(RED.text) + len("It is") - len(prompt.whole[0]) > 0
    assert len(prompt.whole[0]) + RED.max_new_tokens <= window < len(prompt.whole[0]) + RED.max_new_tokens + 20
    # The first and the last half of the prompt, the query with its half.
    first = (window - RED.max_new_tokens - 5 - 8) // 2
    assert text.startswith(example.context[: first - 4]) and text.endswith("498 499 " + RED.text + "It is")
    cut = replace(example, cut="end", info={"separator": "[cut]"})
    text = tokenizer.decode(Prompter(tokenizer, window).prompt(cut).whole[0])
    assert "499" not in text and text.endswith("[cut]" + RED.text + "It is")
    with pytest.raises(ValueError, match=r"example 'long' has a query of 29 tokens .* window of 40"):
        Prompter(tokenizer, 40).prompt(example)


# -- protocols -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["aware", "agnostic", "turns"])
def test_a_batch_answers_what_its_examples_do(asker, loaded, protocol):
    methods = contenders(loaded[0], ("snapkv", 0.4), ("h2o", 0.5), ("streamingllm", 30))
    together = asker.ask([ONE, TWO], protocol, methods)
    alone = [asker.ask([example], protocol, methods) for example in (ONE, TWO)]
    assert [(o.contender, o.example) for o in together] == [(c, e) for c in range(4) for e in range(2)]
    for outcome in together:
        other = alone[outcome.example][outcome.contender]
        assert outcome.error is None and other.error is None
        assert [q["prediction"] for q in outcome.queries] == [q["prediction"] for q in other.queries]
        assert outcome.measured["kept_tokens"] == other.measured["kept_tokens"]
        assert outcome.measured["kept"] == other.measured["kept"]
        assert len(outcome.queries) == 3


@pytest.mark.parametrize("protocol", ["aware", "agnostic", "turns"])
def test_a_ratio_is_of_the_full_cache_before_it_answers(asker, loaded, protocol):
    """So contenders of one method have one ratio, whenever they are asked."""
    queries = tuple(replace(query, max_new_tokens=40) for query in (RED, BLUE, LAST))
    methods = contenders(loaded[0], ("full", None), ("snapkv", 0.4), ("snapkv", 0.4))
    found = asker.ask([replace(ONE, queries=queries), replace(TWO, queries=queries)], protocol, methods)
    full, again, first, second = ([o.measured["nbytes"] / o.measured["full_nbytes"] for o in found[i : i + 2]]
                                  for i in range(0, 8, 2))  # fmt: skip
    assert full == again == [1.0, 1.0] and first == second and max(first) < 1
    prompt = asker.prompter.prompt(ONE)
    length = len(prompt.head if protocol == "agnostic" else prompt.whole[0])
    assert found[0].measured["prompt_tokens"] == length and found[0].measured["kept_tokens"] == length


def generated(model, tokenizer, prompt, count):
    cache = Cache(model, "full")
    out = model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("protocol", ["aware", "agnostic", "turns"])
def test_the_full_cache_answers_what_generate_does(asker, loaded, protocol):
    model, tokenizer = loaded
    (found,) = asker.ask([ONE], protocol, contenders(model))
    prompt = Prompter(tokenizer, 4096).prompt(ONE, turns=True)
    if protocol == "turns":  # the right answer to the first query stands before the second, whatever was said
        prompts = [[*prompt.whole[0], *chain(*prompt.turns[1 : j + 1])] for j in range(3)]
    else:
        prompts = prompt.whole
    expected = [generated(model, tokenizer, p, q.max_new_tokens) for p, q in zip(prompts, ONE.queries, strict=True)]
    assert [q["prediction"] for q in found.queries] == expected


def test_agnostic_queries_do_not_see_each_other(asker, loaded):
    """SCBench's oracle: permuting the queries, or asking one alone, changes nothing."""
    methods = contenders(loaded[0], ("snapkv", 0.4))
    answers = {}
    for queries in ((RED, BLUE, LAST), (LAST, BLUE, RED), (BLUE,)):
        for outcome in asker.ask([replace(ONE, queries=queries)], "agnostic", methods):
            for query, each in zip(queries, outcome.queries, strict=True):
                assert answers.setdefault((outcome.contender, query.text), each["prediction"]) == each["prediction"]


def test_full_budgets_answer_as_full(asker, loaded):
    for protocol in ("aware", "agnostic", "turns"):
        first, *others = asker.ask([ONE], protocol, contenders(loaded[0], ("snapkv", 1.0), ("h2o", 1.0)))
        assert all(other.queries == first.queries for other in others)


def test_agreement_of_the_full_cache_is_exact(asker, loaded):
    example = Example("forced", CONTEXT, (Query("", metric="agreement", target=" It is 1138 and 4711."),), chat=False)
    full, same, other = asker.ask(
        [example, replace(example, context=CONTEXT[:90])][:1], "aware",
        contenders(loaded[0], ("snapkv", 1.0), ("streamingllm", 0.2)),
    )  # fmt: skip
    for outcome in (full, same):
        scores = outcome.queries[0]["scores"]
        assert scores["kl"] == pytest.approx(0, abs=1e-6) and scores["top1"] == 1.0 and scores["tokens"] == 20
    assert other.queries[0]["scores"]["kl"] > 1e-3
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(CONTEXT + " It is 1138 and 4711.").input_ids])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    expected = -logs[-21:-1].gather(1, ids[0, -20:, None]).mean()
    assert full.queries[0]["scores"]["nll"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("event", ["after_prefill", "after_decode"])
def test_what_fails_is_an_outcome(asker, loaded, monkeypatch, event):
    """Alone: neither `full` nor the other methods of the batch pay for it."""
    methods = contenders(loaded[0], ("h2o", 0.5), ("snapkv", 0.5))
    whole = asker.ask([ONE], "aware", methods)
    monkeypatch.setattr(type(kvfold.parse("h2o")), event, lambda *_: 1 / 0)
    outcomes = asker.ask([ONE], "aware", methods)
    assert [o.error for o in outcomes] == [None, "ZeroDivisionError: division by zero", None]
    assert outcomes[1].to_dict() == {"error": "ZeroDivisionError: division by zero"}
    assert [o.queries for o in outcomes[::2]] == [o.queries for o in whole[::2]]


def test_a_method_that_does_not_fit_the_model_fails_alone(asker, loaded):
    model, _ = loaded
    broken = AskedContender("broken", None, lambda: Cache(model, "h2o", budget=2.0))
    outcomes = asker.ask([ONE], "aware", [*contenders(model), broken])
    assert outcomes[0].error is None and outcomes[1].error.startswith("ValueError: budget=2.0 must be")


def test_without_the_full_cache_there_is_no_measure(asker, loaded, monkeypatch):
    methods = contenders(loaded[0], ("snapkv", 0.5))
    monkeypatch.setattr(asker, "_measure", lambda *_: 1 / 0)
    outcomes = asker.ask([ONE], "aware", methods)
    assert outcomes[0].error.startswith("ZeroDivisionError")
    assert outcomes[1].error == f"RuntimeError: the full cache failed: {outcomes[0].error}"


def test_what_cannot_be_fitted_is_an_outcome(loaded):
    short = Asker(*loaded, window=40).ask([ONE], "aware", contenders(loaded[0]))
    assert all("leaves no room for a context in a window of 40" in o.error for o in short)


def test_a_score_that_is_no_number_is_a_failure(asker, loaded, monkeypatch):
    metric = get_metric("contains_all")
    monkeypatch.setitem(metrics, "contains_all", replace(metric, score=lambda *_: float("nan")))
    (found,) = asker.ask([ONE], "aware", contenders(loaded[0]))
    assert found.to_dict() == {"error": "a score is not finite: [nan, nan, nan]"}


def test_agreement_of_a_batch_and_of_a_context_alone(asker, loaded):
    query = Query("", metric="agreement", target=" It is 1138 and 4711.")
    both = [Example("a", CONTEXT, (query,), chat=False), Example("b", CONTEXT[:90], (query,), chat=False)]
    methods = contenders(loaded[0], ("streamingllm", 0.2))
    for protocol in ("aware", "agnostic"):
        together = asker.ask(both, protocol, methods)
        alone = [asker.ask([each], protocol, methods) for each in both]
        for outcome in together:
            expected = alone[outcome.example][outcome.contender].queries[0]["scores"]
            assert outcome.queries[0]["scores"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_agnostic_methods_do_not_see_the_question(asker, loaded, monkeypatch):
    """What is held of the context is the same whatever is asked, and all of the question is held."""
    branches, fork, held = [], Cache.fork, []
    monkeypatch.setattr(Cache, "fork", lambda self: branches.append(fork(self)) or branches[-1])
    monkeypatch.setattr(Cache, "reset", lambda self: None)
    for query in (RED, BLUE):
        asker.ask([replace(ONE, queries=(query,))], "agnostic", contenders(loaded[0], ("snapkv", 0.3)))
        prompt = asker.prompter.prompt(replace(ONE, queries=(query,)))
        length, stop = len(prompt.head), len(prompt.whole[0])
        kept = branches[-1].kept(0)[0]
        assert all(set(range(length, stop)) <= set(head) for head in kept)
        held.append([[position for position in head if position < length] for head in kept])
    assert held[0] == held[1] and all(len(head) < length // 2 for head in held[0])


def test_compressing_prompts_alone_leaves_what_is_generated(loaded, monkeypatch):
    kind, calls = type(kvfold.parse("streamingllm")), []
    monkeypatch.setattr(
        kind, "after_decode", lambda self, view, real=kind.after_decode: calls.append(1) or real(self, view)
    )
    for compress, expected in (("prefill", 0), ("both", 5 * 2)):  # five steps after the first token, two layers
        calls.clear()
        asker = Asker(*loaded, window=4096, compress=compress)
        found = asker.ask([replace(ONE, queries=(RED,))], "aware", contenders(loaded[0], ("streamingllm", 40)))
        assert found[1].queries[0]["tokens"] == 6 and len(calls) == expected


def test_an_answer_ends_before_a_stop(asker, loaded):
    """Whatever the model says: cut at a piece of its own answer, it is that answer's beginning."""
    long = replace(RED, max_new_tokens=40)
    (plain,) = asker.ask([replace(ONE, queries=(long,))], "aware", contenders(loaded[0]))
    text = plain.queries[0]["prediction"]
    for stop in (text[7:9], text[12]):
        (cut,) = asker.ask([replace(ONE, queries=(replace(long, stop=(stop,)),))], "aware", contenders(loaded[0]))
        assert cut.queries[0]["prediction"] == text.split(stop)[0]
        assert cut.queries[0]["tokens"] < plain.queries[0]["tokens"]


def test_the_first_tokens_may_not_end_an_answer(asker, loaded):
    queries = [replace(RED, prefix=prefix) for prefix in ("It is", "It was", "So", "No", "The red one has")]
    (said,) = asker.ask([replace(ONE, queries=tuple(queries))], "agnostic", contenders(loaded[0]))
    # A random model may begin in the middle of a character, which is no text to stop at.
    query, first = next(
        (query, each["prediction"][0])
        for query, each in zip(queries, said.queries, strict=True)
        if each["prediction"][:1].isascii() and each["prediction"]
    )
    for least in (0, 2):
        asked = replace(query, stop=(first,), min_new_tokens=least)
        (found,) = asker.ask([replace(ONE, queries=(asked,))], "aware", contenders(loaded[0]))
        assert found.queries[0]["tokens"] > least and (found.queries[0]["prediction"] == "") == (least == 0)


def test_caches_that_read_in_chunks_read_by_themselves(asker, loaded):
    model, _ = loaded
    made = [
        AskedContender("full", None, lambda: Cache(model, "full", prefill_chunk=50)),
        AskedContender("streamingllm", 40, lambda: Cache(model, "streamingllm", budget=40, prefill_chunk=50)),
    ]
    whole = asker.ask([ONE, TWO], "agnostic", contenders(model, ("streamingllm", 40)))
    chunked = asker.ask([ONE, TWO], "agnostic", made)
    assert all(o.error is None and o.timing["prefill_seconds"] > 0 for o in chunked)
    for a, b in zip(whole[:2], chunked[:2], strict=True):  # nothing is dropped: the same
        assert a.queries == b.queries and a.measured["kept"] == b.measured["kept"]
    for outcome in chunked[2:]:
        assert outcome.measured["kept_tokens"] == 40
