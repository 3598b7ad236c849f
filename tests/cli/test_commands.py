"""The commands on a tiny model: what they print, what they refuse, and with which exit code."""

import inspect
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import kvfold
from kvfold.cli import main
from kvfold.cli.app import app
from kvfold.cli.compare import tables_of
from kvfold.evaluation.compare import CompareRow, method_names

runner = CliRunner()


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `kvfold words...`."""
    monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_run_prints_what_the_cache_holds(folder: Path, document: Path) -> None:
    words = ["run", "--model", str(folder), "--file", str(document), "--ask", "What?", "--json"]
    result = runner.invoke(app, [*words, "--method", "kvmerger", "--budget", "0.35", "--max-new-tokens", "40"])
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got["method"].startswith("kvmerger(budget=0.35")
    assert got["prompt_tokens"] > 200
    assert got["kept_tokens"] <= 0.35 * got["prompt_tokens"]
    # Two of a page's 16 slots are half empty here, and the columns of a 16-wide head are 6 % of its bytes.
    assert got["nbytes"] < 0.46 * got["dense_nbytes"]
    assert got["nbytes"] < got["nbytes_at_end"]
    assert 1 <= got["new_tokens"] <= 40
    assert got["versions"]["kvfold"] == kvfold.__version__


def test_run_equals_the_library(folder: Path, document: Path) -> None:
    """The command's numbers are those of kvfold.Cache on the same prompt."""
    from kvfold.evaluation.prompts import build_prompt

    words = ["run", "--model", str(folder), "--file", str(document), "--method", "snapkv", "--budget", "40", "--json"]
    got = json.loads(runner.invoke(app, [*words, "-o", "window=4", "-o", "pool=max", "--layers"]).stdout)
    model, tokenizer = kvfold.load(folder)
    cache = kvfold.Cache(model, "snapkv", budget=40, window=4, pool="max")
    model(**build_prompt(tokenizer, document.read_text(), None), past_key_values=cache)
    assert (got["kept_tokens"], got["nbytes"]) == (40, cache.nbytes)
    assert [layer["tokens"] for layer in got["layers"]] == [40.0] * 3


def test_run_reads_from_disk(folder: Path, document: Path, tmp_path: Path) -> None:
    """The answer is that of memory; what was moved is said, and nothing is left."""
    (spill := tmp_path / "spill").mkdir()
    words = ["run", "--model", str(folder), "--file", str(document), "--method", "full", "--max-new-tokens", "12"]
    here = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    fast = [*words, "--fast-memory", "256KiB", "--spill", str(spill)]
    there = json.loads(runner.invoke(app, [*fast, "--json"]).stdout)
    assert there["answer"] == here["answer"] and here["spilled"] is None and there["spilled"]["brought_nbytes"]
    assert there["resident_nbytes_at_end"] <= 256 * 1024 == there["spilled"]["fast_memory"]
    assert here["resident_nbytes_at_end"] == here["nbytes_at_end"] and not list(spill.iterdir())
    told = runner.invoke(app, fast)
    assert "in memory" in told.stderr and "of blocks were in memory" in told.stderr and "disk" in told.stderr
    for wrong, said in (
        (["--spill", "."], "spill='.' is for fast_memory="),
        (["--fast-memory", "0.5"], "fast_memory='0.5' must be bytes"),
        (["--fast-memory", "1MiB", "--spill", "none"], "spill='none' is not a folder"),
    ):
        result = runner.invoke(app, [*words, *wrong])
        assert result.exit_code and said in str(result.exception)


def test_run_keeps_the_rest_on_the_host(folder: Path, document: Path) -> None:
    """Without a folder; what a token moved is said, and the answer is that of memory."""
    words = ["run", "--model", str(folder), "--file", str(document), "--method", "full", "--max-new-tokens", "12"]
    here = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    there = json.loads(runner.invoke(app, [*words, "--fast-memory", "64KiB", "--json"]).stdout)
    spilled = there["spilled"]
    assert there["answer"] == here["answer"] and spilled["host_nbytes"] > 64 * 1024 and spilled["disk_nbytes"] == 0
    assert there["resident_nbytes_at_end"] <= 64 * 1024 == spilled["fast_memory"] and spilled["brought_nbytes"]
    told = runner.invoke(app, [*words, "--fast-memory", "64KiB"])
    assert "host" in told.stderr and "written a token" in told.stderr and "of blocks were in memory" in told.stderr


def test_run_keeps_to_a_memory(folder: Path, document: Path) -> None:
    """Bytes, or a share of a dense float16 cache of the prompt and the answer; not beside a budget."""
    words = ["run", "--model", str(folder), "--file", str(document), "--max-new-tokens", "40", "--json"]
    got = json.loads(runner.invoke(app, [*words, "--memory", "120KiB"]).stdout)
    assert got["nbytes"] <= got["nbytes_at_end"] <= 120 * 1024 and got["memory"] == "120KiB"
    share = json.loads(runner.invoke(app, [*words, "--memory", "0.9", "--method", "h2o"]).stdout)
    assert share["method"].startswith("h2o(budget=") and share["nbytes_at_end"] <= 0.9 * got["dense_nbytes"]
    few = ["--memory", "70KiB"]
    coded, plain = (json.loads(runner.invoke(app, [*words, *few, *more]).stdout) for more in ([], ["--no-quantize"]))
    assert "|" in coded["method"] and "|" not in plain["method"]  # bits are chosen, unless they may not
    assert coded["kept_tokens"] > plain["kept_tokens"] and coded["nbytes_at_end"] <= 70 * 1024
    result = runner.invoke(app, [*words, "--no-quantize"])
    assert result.exit_code and "quantize=False is for memory=" in str(result.exception)
    for wrong, said in (("12 parsecs", "parsecs"), ("1.5", "memory=1.5"), ("9", "too little")):
        result = runner.invoke(app, [*words, "--memory", wrong])
        assert result.exit_code and said in str(result.exception)
    result = runner.invoke(app, [*words, "--memory", "1MB", "--budget", "9"])
    assert result.exit_code and "budget=9 is given, too" in str(result.exception)


def test_run_reads_in_chunks(folder: Path, document: Path) -> None:
    words = ["run", "--model", str(folder), "--file", str(document), "--method", "h2o", "--budget", "32", "--json"]
    got = json.loads(runner.invoke(app, [*words, "--prefill-chunk", "50"]).stdout)
    assert got["kept_tokens"] == 32


def test_run_and_compare_give_a_budget_to_the_stage_that_takes_one(folder: Path, document: Path) -> None:
    words = ["--model", str(folder), "--file", str(document), "--budget", "32", "--max-new-tokens", "3", "--json"]
    got = json.loads(runner.invoke(app, ["run", *words, "--method", "streamingllm(sinks=2) | full"]).stdout)
    assert got["kept_tokens"] == 32 and got["method"].startswith("streamingllm(budget=32, sinks=2")
    result = runner.invoke(app, ["compare", *words, "--methods", "full|streamingllm,snapkv(budget=16)|full,full|full"])
    rows = json.loads(result.stdout)["rows"]
    assert [(row["method"], row["budget"], row["kept_tokens"]) for row in rows[1:]] == [
        ("full|streamingllm", 32, 32), ("snapkv(budget=16)|full", 16, 16), ("full|full", None, got["prompt_tokens"]),
    ]  # fmt: skip


@pytest.mark.parametrize("words", [("run", "--method"), ("compare", "--methods"), ("plan", "--methods")])
def test_a_budget_for_several_stages_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, document: Path,
    words: tuple[str, str],
) -> None:  # fmt: skip
    command, option = words
    given = ["--model", folder, "--budget", "0.5", option, "h2o | tova"]
    place = ["--device", "L4"] if command == "plan" else ["--file", document]
    code, out, err = call(monkeypatch, capsys, command, *given, *place)
    assert (code, out) == (2, "")
    assert "h2o and tova each have one" in err


def test_compare_measures_against_full(folder: Path, document: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.html"
    words = ["compare", "--model", str(folder), "--file", str(document), "--methods", "full,kvmerger,tova,streamingllm"]
    result = runner.invoke(
        app, [*words, "--budget", "0.5,1.0", "--max-new-tokens", "6", "--chart", str(chart), "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", None), ("kvmerger", 0.5), ("tova", 0.5), ("streamingllm", 0.5),
        ("kvmerger", 1.0), ("tova", 1.0), ("streamingllm", 1.0),
    ]  # fmt: skip
    full = rows[0]
    assert (full["ratio"], full["kl"], full["top1"]) == (1.0, 0.0, 1.0)
    for row in rows[1:4]:
        assert row["ratio"] < 0.65 and row["prefill_seconds"] > 0 and row["kl"] > 1e-4
    for row in rows[4:]:
        assert row["prefill_seconds"] is None  # they share one prefill
        assert row["kl"] < 1e-6 and row["top1"] == 1.0 and row["answer"] == full["answer"]
    page = chart.read_text()
    assert "vega" in page and "streamingllm" in page and "https://cdn" not in page
    said = [line for line in result.stderr.splitlines() if line.startswith(tuple(row["method"] for row in rows))]
    assert said[0].startswith("full: ") and said[1].startswith("kvmerger 0.5: ") and len(said) == 7
    assert "all methods about" in result.stderr


def test_compare_prints_a_table(folder: Path, document: Path) -> None:
    words = ["compare", "--model", str(folder), "--file", str(document), "--methods", "h2o", "--max-new-tokens", "3"]
    result = runner.invoke(app, words, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "h2o" in result.stdout and "full" in result.stdout and "top-1" in result.stdout
    assert "the probe" not in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--budget", "16"), ("compare", "--methods", "kvfold", "--budget", "16"),
        ("bench", "run", "--methods", "kvfold", "--context", "30", "--batch", "1", "--steps", "1", "--rounds", "1"),
        ("bench", "growth", "--methods", "kvfold", "--budget", "8", "--context", "20,40", "--steps", "1",
         "--rounds", "1"),
    ],
)  # fmt: skip
def test_what_the_probe_took_is_said_beside_timings(folder: Path, document: Path, words: tuple[str, ...]) -> None:
    text = [] if words[0] == "bench" else ["--file", str(document), "--max-new-tokens", "3"]
    result = runner.invoke(app, [*words, "--model", str(folder), *text])
    assert result.exit_code == 0, result.output
    assert "Once for this model, and in no time here: the probe, copying" in " ".join(result.output.split())
    found = json.loads(runner.invoke(app, [*words, "--model", str(folder), *text, "--json"]).stdout)
    assert found["probe_seconds"]["copying"] > 0


def test_all_is_every_method() -> None:
    assert method_names("all") == [info.slug for info in kvfold.list_methods()]
    assert method_names("h2o, snapkv(window=8, kernel=3)") == ["h2o", "snapkv(window=8, kernel=3)"]


def test_methods_and_models_as_json() -> None:
    found = json.loads(runner.invoke(app, ["methods", "--json"]).stdout)
    assert [m["slug"] for m in found] == [info.slug for info in kvfold.list_methods()]
    merger = next(m for m in found if m["slug"] == "kvmerger")
    assert (merger["arxiv"], merger["kind"], merger["options"]["mass"]) == ("2407.08454", "merge", "counted")
    names = {m["name"] for m in json.loads(runner.invoke(app, ["models", "--json"]).stdout)}
    assert {"smollm2-135m-instruct", "gemma3-270m"} <= names
    assert "kvmerger" in runner.invoke(app, ["methods"], env={"COLUMNS": "160"}).stdout
    assert "smollm2" in runner.invoke(app, ["models"], env={"COLUMNS": "160"}).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "nope"], "method='nope' is unknown"),
        (["--method", "snapkw"], "did you mean 'snapkv'"),
        (["--budget", "1.5"], "budget=1.5 must be a fraction"),
        (["--budget", "lots"], "budget='lots'"),
        (["--method", "full", "--budget", "0.5"], "full has no option budget=0.5"),
        (["-o", "window"], "option='window' must be of the form name=value"),
        (["-o", "windw=3"], "kvfold has no option windw=3"),
        (["-o", "window=3", "-o", "window=4"], "option='window=4': window is given twice"),
        (["--budget", "0.5", "-o", "budget=0.2"], "budget='0.5' is given twice: option='budget=0.2' says it, too"),
        (["--file", "missing.txt"], "file='missing.txt' is not a file"),
        (["--max-new-tokens", "400"], "the model's context is 512; --context 112 cuts the document"),
        (["--max-new-tokens", "9000"], "the model's context is 512; ask for fewer new tokens"),
    ],
)
def test_wrong_usage_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, document: Path,
    words: list[str], said: str,
) -> None:  # fmt: skip
    code, out, err = call(monkeypatch, capsys, "run", "--model", folder, "--file", document, *words)
    assert (code, out) == (2, "")
    assert said in err


def test_a_model_that_is_not_there_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], document: Path, tmp_path: Path
) -> None:
    code, _, err = call(monkeypatch, capsys, "run", "--model", tmp_path / "nothing", "--file", document)
    assert code in (1, 2) and "nothing" in err


def test_chart_path_is_checked_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], document: Path
) -> None:
    words = ["compare", "--model", "never-loaded", "--file", document, "--chart", "chart.pdf"]
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "must end in one of .html" in err


def test_answers_are_not_markup() -> None:
    """A model may say [/INST] or [bold]; both are text."""
    row = CompareRow("h2o", 0.5, "[bold] see [/INST]", 5.0, 50, 100, 100, 1.0, 2.0, 0.9, 0.1)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*tables_of([row], "title"))
    assert "[bold] see [/INST]" in capture.get()


def test_numbers_fit_eighty_columns_and_equal_answers_are_said_once() -> None:
    answer = "The name of the hotel was the Hotel Cosmopolitan. " * 3
    rows = [
        CompareRow("full", None, answer, 6328.0, 294_550_000, 294_550_000, 294_550_000, 20.4, 10.9, 1.0, 0.0),
        CompareRow(
            "streamingllm", 0.35, answer, 2215.0, 103_700_000, 294_550_000, 294_550_000, 118.8, 113.1, 0.95, 0.031
        ),
        CompareRow("kvfold", 0.35, "No.", 2215.0, 103_700_000, 294_550_000, 294_550_000, None, None, 0.95, 0.031),
    ]
    console = Console(width=80)
    with console.capture() as capture:
        for table in tables_of(rows, "title"):
            console.print(table)
    lines = capture.get().splitlines()
    numbers = next(line.split() for line in lines if line.startswith(" streamingllm"))
    assert numbers == ["streamingllm", "0.35", "2215", "98.9", "MiB", "0.352", "118.8", "s", "113.1", "0.95", "0.031"]
    assert " ".join(" ".join(lines).split()).count("The name of") == 3
    whose = [line.partition("  ")[0] for line in lines if line.startswith(("full,", "kvfold "))]
    assert whose == ["full, streamingllm 0.35", "kvfold 0.35"]
    assert " ".join(" ".join(lines).split()).endswith("kvfold 0.35 No.")


@pytest.mark.parametrize("words", [["compare", "--methods", "streamingllm"], ["methods"], ["models"]])
def test_no_terminal_is_too_narrow_for_a_name(folder: Path, document: Path, words: list[str]) -> None:
    """Where a row does not fit, each of its cells has a line."""
    if words[0] == "compare":
        words = [*words, "--model", str(folder), "--file", str(document), "--max-new-tokens", "2"]
    result = runner.invoke(app, words, env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 40
    assert ("streamingllm" if words[0] != "models" else "smollm2-135m-instruct") in result.stdout.split()


def test_a_pipe_has_no_width(folder: Path, document: Path) -> None:
    result = runner.invoke(app, ["methods"], env={"COLUMNS": None})
    assert 80 < max(map(len, result.stdout.splitlines())) <= 180


def test_run_and_compare_say_what_a_limit_cuts(folder: Path, document: Path) -> None:
    words = ["--model", str(folder), "--file", str(document), "--context", "100", "--max-new-tokens", "2"]
    for command in ("run", "compare"):
        result = runner.invoke(app, [command, *words, "--json"])
        got = json.loads(result.stdout)
        whole = got["prompt_tokens"] + got["cut_tokens"]
        assert got["prompt_tokens"] <= 100 < whole == len(document.read_text())
        assert f"cut {got['cut_tokens']} of {whole} tokens" in result.stderr
    assert "cut" not in runner.invoke(app, ["run", *words[:4], "--max-new-tokens", "2"]).stderr


def test_an_answer_is_written_as_it_comes(folder: Path, document: Path) -> None:
    words = ["run", "--model", str(folder), "--file", str(document), "--max-new-tokens", "30", "--method", "full"]
    said = json.loads(runner.invoke(app, [*words, "--json"]).stdout)["answer"]
    assert runner.invoke(app, words, env={"COLUMNS": "20"}).stdout.strip() == said


def test_one_method_with_its_options() -> None:
    text = " ".join(runner.invoke(app, ["methods", "snapkv"]).stdout.split())
    assert "arXiv:2404.14469" in text and "Differs from the paper" in text and "window 32 queries at the" in text
    found = json.loads(runner.invoke(app, ["methods", "snapkv", "--json"]).stdout)
    assert found["slug"] == "snapkv" and found["meanings"]["window"].startswith("queries at")


def test_a_budget_of_one_is_one_token_and_said_so(folder: Path, document: Path) -> None:
    words = ["run", "--model", str(folder), "--file", str(document), "--max-new-tokens", "1", "--method", "h2o"]
    for given, said in (("1", True), ("1.0", False), ("2", False)):
        result = runner.invoke(app, [*words, "--budget", given, "--json"])
        assert ("one token per KV head; 1.0 keeps everything" in result.stderr) == said


def test_a_hub_that_is_not_there_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], document: Path
) -> None:
    """Not five times with a pause between: a name is mistyped more often than a network is back in a minute."""
    asked: list[str] = []

    def refuse(name: str, **_: object) -> None:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("kvfold.models.load.model_info", refuse)
    words = ["--model", "smolm2-135m"]
    for command in (["run", "--file", document, *words], ["plan", "--device", "L4", *words]):
        code, _, err = call(monkeypatch, capsys, *command)
        assert code == 1 and "did you mean 'smollm2-135m-instruct'" in err and "no network" in err
    assert asked == ["smolm2-135m"] * 2


def test_a_folder_without_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, document: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    code, _, err = call(monkeypatch, capsys, "run", "--model", tmp_path, "--file", document)
    assert code == 1 and "has no tokenizer that transformers can read" in err


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"], ["bench", "run", "--help"]])
def test_help_needs_no_torch(words: list[str]) -> None:
    script = f"""
import sys
sys.argv[1:] = {words}
from kvfold.cli import main
try:
    main()
except SystemExit:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("\n")[-2].split()
    assert "kvfold.cli" in loaded and not {"torch", "transformers", "numpy"} & set(loaded)


def test_an_empty_document_is_refused_on_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = call(monkeypatch, capsys, "run", "--model", folder, "--file", "-")
    assert code == 2 and "file='-' is empty" in err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "kvfold", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kvfold.__version__


def test_the_librarys_own_method_is_among_the_defaults() -> None:
    from kvfold.cli import bench, compare, plan
    from kvfold.evaluation.sweep import suite

    commands = (compare.compare_command, plan.plan, bench.run_command, bench.growth_command)
    shown = [inspect.signature(command).parameters["methods"].default.split(",") for command in commands]
    assert all("kvfold" in names for names in [*shown, suite("smoke")["methods"]])
