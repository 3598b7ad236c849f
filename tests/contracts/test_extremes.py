"""What every method promises at the edges: budgets without room, numbers that are none, options at their ends."""

import copy
from functools import lru_cache

import pytest
import torch

import kvfold
from calibrated import SMALL, calibrate
from families import FREE, LIMITED, METHODS, each
from kvfold.methods import get_method
from kvfold.options import LARGEST
from models import feed, follow, grow, subject, tokens

RANKED = {"tova", "mpcache", "epicache", "kvmerger", "keydiff", "knorm"}
"""By their papers nothing at the beginning of a text is exempt."""
TABLES = [
    (info.slug, option)
    for info in kvfold.list_methods()
    for option in ("heads", "errors", "gates", "induction", "echo", "sensitivity")
    if option in info.options and info.slug != "kvmerger"
]  # fmt: skip
STEPS = torch.arange(5, 9).view(2, 2)


@each([slug for slug in LIMITED if slug not in RANKED], chunk=[None, 16])
def test_a_window_shares_a_budget_without_room_with_the_sinks(slug, chunk):
    """8 of 32 tokens, fewer than windows have: the first one stays in every head, and the newest."""
    model = subject("llama")
    cache = kvfold.Cache(model, slug, budget=0.25, prefill_chunk=chunk)
    feed(model, cache, *tokens(32).values())
    heads = [head for layer in range(3) for head in cache.kept(layer)[0]]
    assert all(0 in head and (31 in head or slug in FREE) for head in heads), heads


@lru_cache(maxsize=4)
def broken(where: str):
    """A model that makes NaN of one token of the prompt, of some values, or keys that overflow."""
    model = copy.deepcopy(subject("llama"))
    with torch.no_grad():
        if where == "token":
            model.model.embed_tokens.weight[int(tokens(40, 23)["input_ids"][0, -12])] = torch.nan
        elif where == "values":
            model.model.layers[1].self_attn.v_proj.weight[0] = torch.nan
        else:
            model.model.layers[1].self_attn.k_proj.weight[0] = torch.inf
    calibrate(model, f"broken {where}")
    return model


@each(LIMITED, where=["token", "values", "keys"])
def test_scores_that_are_no_numbers_do_not_empty_a_cache(slug, where):
    """They count as the least: layers together hold their budget, and none holds nothing."""
    model, prompt = broken(where), tokens(40, 23)
    options = {"heads": "even"} if slug == "kvfold" else {}
    cache = kvfold.Cache(model, slug, budget=0.5, **options)
    feed(model, cache, *prompt.values())
    held = [int(core.counts().sum()) for core in cache.paged]
    assert abs(sum(held) - 0.5 * 63 * 2 * 3) <= 6 and min(held) >= 8, held
    feed(model, cache, STEPS[:, :1], grow(prompt["attention_mask"]))
    assert min(int(core.counts().sum()) for core in cache.paged) >= 8


@each(METHODS)
def test_options_at_their_ends_are_refused_or_work(slug):
    model, info, worked = subject("llama"), get_method(slug), 0
    for name, default in info.options.items():
        for value in (0, 1, LARGEST, 10**20, 0.0, 1.0, float(LARGEST), 1e300, float("inf")):
            numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
            if not numeric or (type(default) is not type(value) and name != "budget"):
                continue
            budget = {"budget": 0.5} if "budget" in info.options else {}
            try:
                cache = kvfold.Cache(model, slug, **{**SMALL.get(slug, {}), **budget, name: value})
            except ValueError as error:
                assert any(word in str(error) for word in (f"{name}=", "calibration")), error
                continue
            assert value <= LARGEST, f"{name}={value} is taken"
            assert follow(model, cache, *tokens(40, 23).values(), STEPS).isfinite().all(), (name, value)
            worked += 1
    assert worked or not any(isinstance(default, (int, float)) for default in info.options.values())


@pytest.mark.parametrize(("slug", "option"), TABLES)
def test_tables_hold_finite_numbers_in_tuples(slug, option, unchecked):
    flat = option in ("errors", "sensitivity")
    for bad in (-0.1, float("inf"), float("nan"), True, [1.0], "1"):
        row = (0.5, bad)
        with pytest.raises(ValueError, match=f"{option}="):
            kvfold.parse(slug, **{option: row if flat else (row,)})
    for table in ([0.5, 0.1], [(0.5, 0.1)], ([0.5, 0.1],)):
        with pytest.raises(ValueError, match=f"{option}="):
            kvfold.parse(slug, **{option: table})
    kvfold.parse(slug, **{option: (0.5, 0) if flat else ((0.5, 0),)})
