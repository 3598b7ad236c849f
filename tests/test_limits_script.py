"""benchmarks/limits.py: a limit that is broken at one step is seen, and so is what grows."""

import json
import runpy
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "limits.py"))
    for name in ("long_runs", "agreement"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Run by these words: the exit code and the numbers."""

    def made(words):
        monkeypatch.setattr("sys.argv", ["limits.py", *words.split(), "--json", str(tmp_path / "l.json")])
        with pytest.raises(SystemExit) as ended:
            script["main"]()
        return ended.value.code, json.loads((tmp_path / "l.json").read_text())["methods"]

    return made


def test_a_method_that_acts_at_each_step_holds(run, capsys):
    code, (streaming, h2o) = run("--methods streamingllm;h2o --budget 8 --prompt 12 --steps 24")
    assert code == 0 and not streaming["broken"] and not h2o["broken"]
    assert [each["tokens"] for each in h2o["thousands"]] == [8] and h2o["thousands"][0]["last"] == 24
    assert h2o["thousands"][0]["nbytes"] > 0 and h2o["thousands"][0]["cpu_ms"] > 0
    assert capsys.readouterr().out.count("The limit held at every step.") == 2


def test_a_method_of_the_prompt_alone_breaks_it(run):
    code, (found,) = run("--methods snapkv(window=2) --budget 8 --prompt 12 --steps 5")
    assert code == 1 and found["broken"] == "9 tokens a head after step 0, the limit is 8"
    assert found["thousands"][0]["tokens"] == 13


def test_what_breaks_a_limit_first_is_told(script):
    limits = script["Limits"](8, 100)
    limits.look(-1, 8, 100)
    assert not limits.broken
    limits.look(3, 8, 101)
    limits.look(4, 9, 100)
    assert limits.broken == "101 bytes after step 3, the limit is 100"
    first = script["Limits"](8, None)
    first.look(-1, 9, 1 << 40)
    assert first.broken == "9 tokens a head after the prompt, the limit is 8"


def test_flat_is_a_tenth_and_the_first_may_differ(script):
    one = script["Thousand"](1000, 8, 8, 100, 100, 1.0, 1.0, 1.0)
    found = script["flat"]([replace(one, nbytes=5), one, replace(one, nbytes=110, resident=111)])
    assert found["nbytes"] and not found["resident"] and found["tokens"]


def test_steps_are_counted_by_the_thousand(script):
    import torch

    model = script["build"]()
    ids = torch.randint(3, 97, (2, 25))
    cache = script["kvfold"].Cache(model, "full")
    found = list(script["thousands"](model, cache, ids, 10, script["Limits"](None, None), size=6))
    assert [each.last for each in found] == [6, 12, 15] and [each.tokens for each in found] == [16, 22, 25]


def test_sizes(script):
    size = script["nbytes_of"]
    assert size("2MiB") == 2 << 20 and size("1.5KB") == 1500 and size("4096") == 4096 and size("7B") == 7
    with pytest.raises(ArgumentTypeError, match="memory='lots'"):
        size("lots")
