"""benchmarks/families.py: which classes of transformers kvfold is exact for, and the page that says so."""

import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
PATH = ROOT / "benchmarks/families.py"
SCRIPT = runpy.run_path(str(PATH))
PAGE = ROOT / "docs/models.md"
ROW = SCRIPT["Row"]


def test_the_page_has_every_class_and_none_that_is_wrong():
    text = PAGE.read_text(encoding="utf-8")
    assert "## Wrong" not in text and "## Exact" in text and "0 wrong" in text
    if f"transformers {version('transformers')}," not in text:
        pytest.skip("the page is about another release: run benchmarks/families.py")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (\w+) \|", text, re.MULTILINE))
    assert rows | {"family": "class"} == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | {"family": "class"}


@pytest.mark.parametrize(("outcome", "code"), [("exact", 0), ("refused", 0), ("not testable", 0), ("wrong", 1)])
def test_a_wrong_row_is_an_error(outcome, code, tmp_path, monkeypatch):
    main = SCRIPT["main"]
    made = ROW("llama", "LlamaForCausalLM", outcome, "a | b <c>", "4 of 4")
    monkeypatch.setitem(main.__globals__, "rows", lambda families, seconds: iter([made]))
    monkeypatch.setattr("sys.argv", ["families.py", "--out", str(tmp_path / "models.md")])
    assert main() == code
    text = (tmp_path / "models.md").read_text(encoding="utf-8")
    assert f"## {outcome.capitalize()}" in text and r"| llama | LlamaForCausalLM | 4 of 4 | a \| b &lt;c> |" in text
    assert [path.name for path in tmp_path.iterdir()] == ["models.md"]


def test_a_class_that_takes_too_long_does_not_stop_the_others(monkeypatch):
    rows = SCRIPT["rows"]
    code = "import sys\nfor line in sys.stdin:\n    if line.startswith('dies'): sys.exit(3)\n    while True: pass\n"
    monkeypatch.setitem(rows.__globals__, "COMMAND", [sys.executable, "-c", code])
    monkeypatch.setitem(rows.__globals__, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {"loops": "A", "dies": "B"})
    found = list(rows(["loops", "dies", "loops"], 2))
    late, dead = "no answer in 2 seconds", "the process ended with 3"
    assert [(row.outcome, row.reason) for row in found] == [
        ("not testable", late), ("wrong", dead), ("not testable", late)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_handful_of_families():
    """Plain, latent, windows and states beside, nothing on pages, refused, and one without a cache of this kind."""
    wanted = {
        "llama": "exact", "deepseek_v3": "exact", "qwen2_moe": "exact", "phi3": "exact", "deepseek_v32": "exact",
        "gemma3_text": "exact", "bamba": "exact", "gpt_oss": "refused", "falcon": "refused", "mamba": "refused",
        "xlm": "not testable",
    }  # fmt: skip
    command = [sys.executable, str(PATH), "--only", ",".join(wanted)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {line.split()[0]: line[25:38].strip() for line in run.stdout.splitlines()}
    assert found == wanted, run.stdout


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x.roll(1, 0)], ids=["scaled", "moved"])
def test_another_answer_is_seen(change, monkeypatch):
    """The matrix can fail: a model whose answers kvfold would change is wrong, not exact."""
    ask = SCRIPT["ask"]
    real = ask.__globals__["logits"]

    def logits(model, cache, ids, mask):
        found = real(model, cache, ids, mask)
        return change(found) if type(cache).__module__.startswith("kvfold") else found

    monkeypatch.setitem(ask.__globals__, "logits", logits)
    row = ask("llama")
    assert row.outcome == "wrong" and "logits differ" in row.reason
