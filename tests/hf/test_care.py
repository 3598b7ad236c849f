"""Copies, pending events, views without queries: where a cache could quietly be wrong."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvfold
from kvfold.hf.shared_prefill import prefill_many
from kvfold.views import LayerView
from models import build, follow, tokens


def read(method: str = "full", length: int = 40, **options: object) -> tuple[torch.nn.Module, kvfold.Cache]:
    model = build("llama")
    cache = kvfold.Cache(model, method, **options)
    with torch.no_grad():
        model(**tokens(length), past_key_values=cache)
    return model, cache


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_a_copy_lives_on_its_own(clone) -> None:
    """transformers' idiom for reusing a prompt: copy the cache, answer, copy it again."""
    model, cache = read("snapkv", budget=0.5)
    other = clone(cache)
    assert other.model is model
    expected = [core.kept() for core in cache.paged]
    step = torch.tensor([[5]])
    with torch.no_grad():
        want = model(input_ids=step, past_key_values=cache.fork()).logits
        del cache
        got = model(input_ids=step, past_key_values=other).logits
    assert torch.equal(got, want)
    assert [[row[0][:-1]] for row in (core.kept()[0] for core in other.paged)] == [[rows[0][0]] for rows in expected]


def test_a_cache_is_not_pickled() -> None:
    _, cache = read()
    with pytest.raises(TypeError, match=r"cache\.save"):
        pickle.dumps(cache)


class Narrower(TorchDispatchMode):
    """Nothing is float64: there are devices that do not know it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = {each.dtype for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
        assert torch.float64 not in found, func
        return out


@pytest.mark.parametrize("method", ["kvfold", "kvfold(fade=None)", "d2o", "keepkv", "keepkv(alpha=0.0)"])
def test_a_device_without_float64(method) -> None:
    model, prompt = build("llama"), tokens(40, 31)
    cache = kvfold.Cache(model, replace(kvfold.parse(method), budget=9))
    with Narrower():
        follow(model, cache, *prompt.values(), torch.arange(5, 9).view(2, 2))
    assert 4 < cache.kept_tokens <= 11


def test_dropping_a_cache_frees_it_at_once() -> None:
    import weakref

    _, cache = read()
    pages = weakref.ref(cache.paged[0].segments[0][1].table.pool)
    del cache
    assert pages() is None  # without waiting for the garbage collector


def assisted(budget: int = 12) -> tuple[torch.nn.Module, kvfold.Cache]:
    """A cache after assisted decoding and then a plain turn."""
    model = build("llama")
    cache = kvfold.Cache(model, "snapkv", budget=budget, window=4)
    ids = tokens(20)["input_ids"]
    out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    more = torch.cat([out[:, -1:], tokens(30, seed=3)["input_ids"]], 1)
    with torch.no_grad():
        model(input_ids=more, past_key_values=cache)
    return model, cache


def test_a_turn_after_assisted_decoding_is_decided_at_once() -> None:
    _, cache = assisted()
    assert (cache.paged[0].counts() == 12).all() and not cache.pending.waits


def test_a_tentative_pass_after_assisted_decoding_leaves_no_trace() -> None:
    model, cache = assisted()
    _, same = assisted()
    expected = same.kept(0)
    with torch.no_grad(), cache.tentative():
        model(input_ids=tokens(5, seed=4)["input_ids"], past_key_values=cache)
    assert cache.kept(0) == expected


@pytest.mark.parametrize("ask", [lambda view: view.attention(1), lambda view: view.column_sums()])
def test_a_view_without_queries_says_so(scratch_methods, ask) -> None:
    class Late(kvfold.Method):
        def after_forward(self, cache):
            view = cache[0]
            assert torch.equal(view.earlier, view.valid)
            assert view.place.module is not None and view.place.scale == 0.25  # heads of 16
            ask(view)
            return {}

    from dataclasses import dataclass

    late = kvfold.method("late", title="late", kind="evict")(dataclass(frozen=True)(Late))()
    model = build("llama")
    with pytest.raises(ValueError, match="no queries"), torch.no_grad():
        model(**tokens(10), past_key_values=kvfold.Cache(model, late))


def test_column_sums_count_queries_whatever_came_before() -> None:
    """Each query gives away exactly 1: also over merged keys, and where keys are read at compact positions."""
    seen: list[LayerView] = []
    model = build("llama")
    cache = kvfold.Cache(model, "streamingllm", budget=20, positions="compact")
    with torch.no_grad(), cache.observed(seen.append):
        model(**tokens(40), past_key_values=cache)
        model(input_ids=tokens(6, seed=1)["input_ids"], past_key_values=cache)
    for view in seen:
        groups = view.queries.states.shape[1] // view.heads
        assert torch.allclose(view.column_sums().sum(-1), torch.tensor(float(groups * view.new)), atol=1e-3)
        merged = view.apply(kvfold.parse("kvmerger", budget=0.3, skip=()).after_prefill(view))
        assert merged.valid.sum() < view.valid.sum()
        # A query whose every visible token was merged into a later slot sees nothing: at most 1 each.
        sums = merged.column_sums().sum(-1)
        assert (sums <= groups * view.new + 1e-3).all() and (sums > 0.5 * groups * view.new).all()


def test_a_prefill_serves_only_caches_of_its_model() -> None:
    model, other = build("llama"), build("llama", seed=1)
    with pytest.raises(ValueError, match="another LlamaForCausalLM"):
        prefill_many(model, tokens(8), [kvfold.Cache(other, "full")])


def test_learned_sinks_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="learned sinks"):
        kvfold.Cache(model, "full")
    assert model.config._attn_implementation == "sdpa"
