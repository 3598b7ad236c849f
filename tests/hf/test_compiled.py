"""Compiled models: a pass with a kvfold cache is one graph, the same for all steps, and says what it said."""

import shutil
import sys

import pytest
import torch
from transformers import DynamicCache

import kvfold
from models import build, subject, tokens

GREEDY = {"do_sample": False}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts its graphs; `aot_eager` makes them functional, as inductor does."""

    def __init__(self, backend="aot_eager"):
        self.run, self.made = torch._dynamo.lookup_backend(backend), []

    def __call__(self, graph, inputs):
        self.made.append(graph)
        return self.run(graph, inputs)

    def calls(self, operator):
        """How often the last graph calls an operator."""
        return sum(node.target is operator for node in self.made[-1].graph.nodes)


def compiled(name, part="model", backend=None, **options):
    graphs = backend or Graphs()
    model = build(name)
    inner = model if part == "model" else model.model
    inner.forward = torch.compile(inner.forward, backend=graphs, **options)
    return model, graphs


def steps(model, cache, prompt, count):
    """Logits of a prompt's last token and of so many greedy steps, by a loop without a mask."""
    found, ids = [], prompt
    with torch.no_grad():
        for _ in range(count + 1):
            found.append(model(input_ids=ids, past_key_values=cache).logits[:, -1:])
            ids = found[-1].argmax(-1)
    return torch.cat(found, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # the checks of annotations break graphs
@pytest.mark.parametrize("method", ["full", "kvfold(budget=0.5)", "h2o(budget=0.5)", "snapkv(budget=0.5)"])
def test_every_step_is_one_and_the_same_graph(method):
    model, graphs = compiled("llama", fullgraph=True)
    prompt = tokens(40, 30)
    plain, cache = kvfold.Cache(subject("llama"), method), kvfold.Cache(model, method)
    expected = subject("llama").generate(**prompt, past_key_values=plain, max_new_tokens=20, **GREEDY)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, max_new_tokens=20, **GREEDY), expected)
    assert [cache.kept(i) for i in range(3)] == [plain.kept(i) for i in range(3)]
    assert len(graphs.made) == 2  # the prompt's, and that of all steps
    assert graphs.calls(torch.ops.kvfold.attend) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name,length,most", [("llama", 40, 2), ("gemma3", 40, 2), ("gemma3", 4, 6)])
def test_a_loop_gets_the_same_logits(name, length, most):
    model, graphs = compiled(name, fullgraph=True)
    prompt, method = tokens(length)["input_ids"], "h2o(budget=0.9)"
    plain, cache = kvfold.Cache(subject(name), method), kvfold.Cache(model, method)
    expected = steps(subject(name), plain, prompt, 20)
    torch.testing.assert_close(steps(model, cache, prompt, 20), expected, rtol=1e-4, atol=1e-4)
    last = len(cache.layers) - 1
    assert cache.kept(last) == plain.kept(last)
    assert cache.nbytes == plain.nbytes
    assert len(graphs.made) <= most  # the prompt's, that of a step, and those of windows that are not full yet


def test_another_cache_needs_no_other_graph():
    model, graphs = compiled("llama-one-layer", fullgraph=True)
    prompt = tokens(40)["input_ids"]
    for method in ("full", "h2o(budget=0.5)", "full | kivi(residual=32)"):
        plain = steps(subject("llama-one-layer"), kvfold.Cache(subject("llama-one-layer"), method), prompt, 3)
        cache = kvfold.Cache(model, method)
        torch.testing.assert_close(steps(model, cache, prompt, 3), plain, rtol=1e-4, atol=1e-4)
        steps(model, cache.fork(), torch.full((1, 1), 5), 1)
    assert len(graphs.made) == 2


@pytest.mark.parametrize(
    "name,part,method",
    [("llama", "body", "h2o"), ("llama", "model", "kivi(residual=32)"), ("llama", "model", "fastkv(budget=0.5)")],
)
@pytest.mark.slow
def test_a_graph_that_breaks_says_what_it_says(name, part, method):
    model, _ = compiled(name, part, "eager")
    prompt, options = tokens(40, 30), {"max_new_tokens": 5, **GREEDY}
    plain, cache = kvfold.Cache(subject(name), method), kvfold.Cache(model, method)
    expected = subject(name).generate(**prompt, past_key_values=plain, **options)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, **options), expected)
    assert cache.kept(2) == plain.kept(2)


def test_transformers_own_cache_in_a_compiled_model():
    model, _ = compiled("llama-one-layer")
    kvfold.Cache(model, "full")  # its attention is kvfold's from now on
    prompt = tokens(40)["input_ids"]
    plain = steps(subject("llama-one-layer"), DynamicCache(), prompt, 3)
    torch.testing.assert_close(steps(model, DynamicCache(), prompt, 3), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's resuming
def test_no_gradient_comes_through_a_graph_either():
    model, _ = compiled("llama-one-layer")
    logits = model(**tokens(12), past_key_values=kvfold.Cache(model, "full")).logits
    with pytest.raises(RuntimeError, match="no gradient comes through layer 0"):
        logits.sum().backward()


def test_a_mask_that_does_not_fit_is_named():
    model, _ = compiled("llama-one-layer")
    prompt = tokens(12)
    cache = kvfold.Cache(model, "full")
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(prompt["input_ids"][:, :2], attention_mask=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)


def test_the_operator_is_what_it_says():
    model = build("llama-one-layer")
    cache = kvfold.Cache(model, "full")
    q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    given = (q, k, v, None, cache.name, 0, 0.25)
    torch.library.opcheck(torch.ops.kvfold.attend.default, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.ops.kvfold.attend.default._schema.arguments[4].alias_info.is_write
    name = cache.name
    del cache
    with pytest.raises(RuntimeError, match="gone"):
        torch.ops.kvfold.attend(q, k, v, None, name, 0, 0.25)


def test_fast_linears_are_operators_in_a_graph():
    model, graphs = compiled("llama-one-layer", fullgraph=True)
    prompt = tokens(40)["input_ids"]
    plain = steps(subject("llama-one-layer"), kvfold.Cache(subject("llama-one-layer"), "full"), prompt, 4)
    with kvfold.fast_linears(model) as fast:
        found = steps(model, kvfold.Cache(model, "full"), prompt, 4)
        assert graphs.calls(torch.ops.kvfold.linear) == 7  # the head's 97 rows are no whole vectors
        assert sum(len(taken) for ways in fast.choices.seconds.values() for taken in ways.values()) > 0
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    again = steps(model, kvfold.Cache(model, "full"), prompt, 1)  # undone: the graph is another
    assert graphs.calls(torch.ops.kvfold.linear) == 0
    torch.testing.assert_close(again, plain[:, :2], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductors_code_reuses_no_memory_that_is_still_looked_at():
    model, graphs = compiled("llama", backend=Graphs("inductor"), fullgraph=True)
    prompt, seen = tokens(40)["input_ids"], {}
    for kind, each in (("plain", subject("llama")), ("compiled", model)):
        cache = kvfold.Cache(each, "h2o(budget=0.5)")
        with cache.observed(seen.setdefault(kind, []).append):
            seen[kind + " logits"] = steps(each, cache, prompt, 6)
    torch.testing.assert_close(seen["compiled logits"], seen["plain logits"], rtol=1e-3, atol=1e-3)
    for found, expected in zip(seen["compiled"], seen["plain"], strict=True):
        torch.testing.assert_close(found.queries.states, expected.queries.states, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.keys, expected.keys, rtol=1e-3, atol=1e-3)
    assert len(graphs.made) == 2
