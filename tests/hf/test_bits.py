"""memory= with context=: in which format a limit is spent, by a table of what each was measured to cost."""

import math
from itertools import pairwise

import pytest
import torch
from test_latent import made

import kvfold
from kvfold import artefacts
from kvfold.bench.limit import limited_plan
from kvfold.bench.plan import shape_of
from kvfold.calibration import calibrate
from kvfold.hf.bits import GENERAL, PLAIN, Harm, choices, harm_of, table, usual
from kvfold.hf.cache import limited
from kvfold.methods import parse
from kvfold.methods.base import formats_of, stages_of
from kvfold.models.load import load
from models import build, subject, tokens
from saying import read
from test_calibration import run_of

SHARES = (0.03125, 0.25, 1.0)


def harm(**rows: float) -> Harm:
    """Forms whose KL falls with the share of tokens; `rows`: KL at all tokens, by the form's first word."""
    forms = {"plain": PLAIN, "fp8": "fp8", "four": "turboquant(bits=4)", "two": "turboquant(bits=2)"}
    return Harm(SHARES, {forms[name]: (10 * kl + 3.0, kl + 0.3, kl) for name, kl in rows.items()})


def forms(method) -> list[str]:
    return [str(form) for form in formats_of(stages_of(method))]


@pytest.fixture
def known(monkeypatch):
    """What is known of any model is the table that a test says."""

    def say(found: Harm) -> None:
        monkeypatch.setattr("kvfold.hf.memory.harm_of", lambda _: found)

    return say


def test_between_two_shares_the_line_is_straight_on_logarithmic_scales():
    known = Harm((0.1, 0.4, 1.0), {PLAIN: (0.08, 0.02, 0.0), "fp8": (0.08, 0.02, 0.015)})
    assert known.of(PLAIN, 0.2) == pytest.approx(0.04) and known.of(PLAIN, 0.4) == pytest.approx(0.02)
    assert known.of(PLAIN, 0.025) == pytest.approx(0.32)  # tokens count below the first share, too
    assert known.of(PLAIN, 0.8) == pytest.approx(0.01)  # and there is no cliff before all of them
    assert known.of("fp8", 0.8) == 0.015  # what rounding costs stays, however many tokens do


def test_more_tokens_never_harm_by_the_tables_that_ship():
    tables = [usual(), *(harm_of(load(name, progress=False)[0]) for name in ("smollm2-135m-instruct", "gemma3-270m"))]
    for known in tables:
        for form in known.kl:
            row = [known.of(form, 2 ** (-8 + i / 8)) for i in range(65)]
            assert all(more <= less * 1.001 for less, more in pairwise(row)), form


def test_bits_that_harm_nothing_are_taken_for_the_tokens_that_they_buy(known):
    model = subject("llama")
    known(harm(plain=0.0, four=0.001))
    many = kvfold.Cache(model, "kvfold", memory=0.1, context=2000).method
    assert forms(many) and "Rotated" in forms(many)[0]
    few = kvfold.Cache(model, "kvfold", memory=0.1, context=2000, quantize=False).method
    assert not forms(few) and many.stages[0].budget > 3 * few.budget


def test_bits_that_cost_more_than_their_tokens_bring_are_not(known):
    model = subject("llama")
    known(harm(plain=0.0, fp8=50.0, four=60.0))
    assert not forms(kvfold.Cache(model, "kvfold", memory=0.1, context=2000).method)


def test_what_fits_as_it_is_stays_as_it_is(known):
    """Whatever a table says: all tokens, as the model made them, are the full cache."""
    known(harm(plain=5.0, two=0.0))
    assert not forms(kvfold.Cache(subject("llama"), "kvfold", memory=10**8, context=500).method)


@pytest.mark.parametrize("text", ["kvfold | fp8", "streamingllm | turboquant(bits=3)"])
def test_a_format_that_is_said_is_kept(text, known):
    known(harm(plain=0.0, two=0.0, four=0.0))
    chosen = kvfold.Cache(subject("llama"), text, memory=0.2, context=2000).method
    assert [str(form) for form in formats_of(stages_of(parse(text)))] == forms(chosen)


def test_without_a_context_no_format_is_chosen(known):
    known(harm(plain=0.0, two=0.0))
    assert not forms(kvfold.Cache(subject("llama"), "kvfold", memory=300_000).method)


def test_the_least_that_can_be_is_that_of_the_narrowest_format(known):
    model = subject("llama")
    known(harm(plain=0.0, two=0.0))
    with pytest.raises(ValueError, match="bytes is the least") as wide:
        kvfold.Cache(model, "kvfold", memory=1000, context=2000, quantize=False)
    with pytest.raises(ValueError, match="bytes is the least") as narrow:
        kvfold.Cache(model, "kvfold", memory=1000, context=2000)
    least = [int(str(each.value).split(": ")[1].split()[0]) for each in (wide, narrow)]
    assert least[1] < least[0]
    assert forms(kvfold.Cache(model, "kvfold", memory=least[1], context=2000).method)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("text", ["kvfold", "h2o", "decoding(snapkv)"])
def test_the_limit_holds_in_the_format_that_was_chosen(name, text, known):
    known(harm(plain=0.0, two=0.0))
    model = subject(name)
    cache = kvfold.Cache(model, text, memory=90_000 if name == "llama" else 140_000, context=2000)
    assert forms(cache.method)
    limit = 90_000 if name == "llama" else 140_000
    read(model, cache, tokens(700)["input_ids"])
    held = [cache.nbytes]
    for token in tokens(60)["input_ids"].T:
        read(model, cache, token[:, None])
        held.append(cache.nbytes)
    assert max(held) <= limit


def test_a_table_is_measured_kept_and_found(monkeypatch, tmp_path):
    """The whole way, on a model whose windows may hold codes, too."""
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    model = build("gemma3")
    assert harm_of(model) == usual()
    made = calibrate("memory", run_of(model, samples=1, length=200))
    assert made.data["forms"][: len(GENERAL)] == list(GENERAL)
    assert any("windows" in form for form in made.data["forms"])
    assert made.data["kl"][0][-1] == 0.0 and all(kl > 0 for kl in made.data["kl"][0][:-1])
    assert all(math.isfinite(kl) and kl >= 0 for row in made.data["kl"] for kl in row)
    artefacts.save(made)
    assert harm_of(model) == table(made.data, "gemma3") != usual()
    with_windows = [form for form in choices(model, parse("kvfold"), harm_of(model)) if "windows" in form]
    assert with_windows
    assert not [form for form in choices(subject("llama"), parse("kvfold"), harm_of(model)) if "windows" in form]


def test_what_ships_knows_every_general_format_and_falls_with_the_tokens():
    known = usual()
    assert list(known.kl) == list(GENERAL)
    for form, row in known.kl.items():
        assert row[0] > row[-1] >= 0, form
    assert known.of("fp8", 1.0) < known.of("turboquant(bits=4)", 1.0) < known.of("turboquant(bits=2)", 1.0)


@pytest.mark.parametrize(
    "data",
    [
        {}, {"kl": []}, {"kl": [[0.1]]}, {"shares": [1.0, 0.5, 0.2]}, {"shares": [0.5, 1.0], "kl": [[0.1, 0.0]]},
        {"shares": [0.2, 0.5, 2.0]}, {"shares": [0.2, 0.5, 0.9]}, {"kl": [[0.2, 0.1, float("nan")]]},
        {"kl": [[0.2, 0.1, "x"]]}, {"kl": [[0.2, 0.1, 10**400]]}, {"forms": ["fp8"]}, {"forms": [3]},
        {"forms": ["", "h2o"], "kl": [[0.2, 0.1, 0.0]] * 2}, {"forms": ["", "nosuch"], "kl": [[0.2, 0.1, 0.0]] * 2},
        {"forms": ["", "fp8", "fp8"], "kl": [[0.2, 0.1, 0.0]] * 3},
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(data):
    whole = {"shares": [0.2, 0.5, 1.0], "forms": [""], "kl": [[0.2, 0.1, 0.0]]}
    assert table(whole, "x").kl == {"": (0.2, 0.1, 0.0)}
    with pytest.raises(ValueError, match=r"calibration of memory for 'x'"):
        table({**whole, **data} if data else {}, "x")


def test_a_damaged_basis_is_said_and_not_passed_over(known, monkeypatch, tmp_path):
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    model = build("llama")
    about = {"fingerprint": artefacts.fingerprint(model), "name": "a", "layers": 3}  # found first
    damaged = {"turn": 2 * torch.eye(8).repeat(3, 2, 1, 1), "weight": torch.ones(3, 2, 8)}
    artefacts.save(artefacts.Artefact("turboquant", about, {**damaged, "channels": torch.ones(3, 2, 8)}, {}))
    known(Harm(SHARES, {PLAIN: (3.0, 1.0, 0.0), "turboquant(bits=4, basis='measured')": (0.1, 0.0, 0.0)}))
    with pytest.raises(ValueError, match="not orthogonal"):
        kvfold.Cache(model, "kvfold", memory=0.2, context=2000)


def test_rows_share_a_basis():
    """What a cache holds once leaves each row of a large batch as much as it leaves one, and more."""
    model = subject("llama")
    text = "streamingllm | turboquant(basis='measured')"
    alone, many = (
        kvfold.Cache(model, text, memory=batch * 60_000, batch=batch).method.stages[0].budget for batch in (1, 8)
    )
    assert many > alone
    cache = kvfold.Cache(model, text, memory=8 * 60_000, batch=8)
    read(model, cache, tokens(*[700] * 8)["input_ids"])
    assert 0.7 * 8 * 60_000 < cache.nbytes <= 8 * 60_000


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("text", ["kvfold", "h2o", "kvfold | fp8"])
def test_a_plan_chooses_what_a_cache_chooses(name, text):
    """Before a weight is there: the same stages, and a budget that is the same but for a page."""
    model = made(name) if name == "deepseek_v3" else subject(name)
    at = {"context": 3000, "batch": 2}
    planned = limited_plan(shape_of(model), model, parse(text), 0.15, dtype="float32", **at)
    real = limited(model, parse(text), 0.15, **at)
    assert forms(planned) == forms(real)
    budgets = [next(s.budget for s in stages_of(each) if hasattr(s, "budget")) for each in (planned, real)]
    assert abs(budgets[0] - budgets[1]) <= 16


def test_a_first_look_at_a_form_that_the_model_refuses_leaves_the_others(known):
    known(Harm(SHARES, {PLAIN: (3.0, 1.0, 0.0), "kivi(bits=2)": (0.0, 0.0, 0.0)}))
    model = subject("llama")
    assert "kivi" not in str(kvfold.Cache(model, "kvfold", memory=0.2, context=2000).method)
