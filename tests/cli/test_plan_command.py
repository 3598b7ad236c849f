"""`kvfold plan`: what it prints, draws and refuses; no weights are ever read."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvfold
from kvfold.bench import MemoryPlan, find_device
from kvfold.cli import main
from kvfold.cli.app import app
from kvfold.cli.plan import amount, contexts_up_to, lines_of, read_config

runner = CliRunner()
ROW = {
    "method", "budget", "context", "batch", "kept_tokens", "weight_bytes", "reserve_bytes", "kv_bytes",
    "dense_kv_bytes", "total_bytes", "fits", "largest_batch", "dense_largest_batch", "step_seconds",
    "tokens_per_second", "dense_tokens_per_second", "gain", "gain_bound", "largest_tokens_per_second",
    "dense_largest_tokens_per_second", "prefill_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's config.json alone: 512 tokens at most."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text((folder / "config.json").read_text())
    return path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `kvfold plan words...`."""
    monkeypatch.setattr(sys, "argv", ["kvfold", "plan", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_json_has_every_row_and_what_it_rests_on(config: Path) -> None:
    words = ["plan", "--model", str(config), "--device", "L4", "--batch", "3", "--json"]
    result = runner.invoke(app, [*words, "--methods", "full,snapkv,h2o(budget=0.1)", "--budget", "0.25,64"])
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert set(got) == {
        "model", "parameters", "active_parameters", "active_parameters_estimated", "device", "dtype", "context",
        "batch", "reserve", "weight_bits", "prefill_chunk", "versions", "rows",
    }  # fmt: skip
    assert got["device"] == find_device("L4").to_dict()
    assert (got["dtype"], got["context"], got["batch"]) == ("bfloat16", 512, 3)
    assert got["active_parameters"] == got["parameters"] and not got["active_parameters_estimated"]
    assert got["versions"]["kvfold"] == kvfold.__version__
    rows = got["rows"]
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", None), ("snapkv 0.25", 0.25), ("snapkv 64", 64), ("h2o(budget=0.1) 0.1", 0.1),
    ]  # fmt: skip
    assert all(set(row) == ROW for row in rows)
    assert [row["kept_tokens"] for row in rows[:3]] == [512, 128, 64]
    assert all(row["fits"] and row["gain"] <= row["gain_bound"] for row in rows)


def test_a_limit_says_tokens_and_bits_and_whether_that_fits(config: Path) -> None:
    words = ["plan", "--model", str(config), "--device", "L4", "--kv-memory", "0.2", "--batch", "2"]
    result = runner.invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    dense, mine = json.loads(result.stdout)["rows"]
    assert dense["method"] == "full" and mine["method"].startswith("kvfold(budget=")
    assert mine["kv_bytes"] <= 0.2 * dense["dense_kv_bytes"] and mine["budget"] >= 1
    said = runner.invoke(app, words)
    assert f"Under a limit of 0.2 {mine['method']} keeps" in " ".join(said.stdout.split())
    assert f"and {mine['budget']} at most while it generates; the limit with weights and reserve" in " ".join(
        said.stdout.split()
    )
    several = runner.invoke(app, [*words, "--methods", "full,h2o,streamingllm,decoding(snapkv)", "--json"])
    rows = json.loads(several.stdout)["rows"][1:]
    assert len(rows) == 3 and all(row["kv_bytes"] <= 0.2 * dense["dense_kv_bytes"] for row in rows)


def test_a_limit_that_the_device_has_not_does_not_fit(config: Path) -> None:
    """Whatever a prompt leaves of it: what is generated may fill it."""
    said = runner.invoke(app, ["plan", "--model", str(config), "--device", "L4", "--kv-memory", "25GB"])
    assert "does not fit in 24.00 GB" in " ".join(said.stdout.split())


def test_a_limit_is_drawn_over_the_context(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    page = tmp_path / "plan.json"
    words = ["plan", "--model", str(config), "--device", "L4", "--kv-memory", "0.1", "--chart", str(page)]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    drawn = page.read_text()
    assert '"kvfold"' in drawn and "budget=" not in drawn


def test_a_folder_and_its_config_are_the_same(folder: Path, config: Path) -> None:
    words = ["plan", "--device", "T4", "--dtype", "float16", "--context", "300", "--json"]
    got = [json.loads(runner.invoke(app, [*words, "--model", str(path)]).stdout) for path in (folder, config)]
    assert got[0].pop("model") != got[1].pop("model")
    assert got[0] == got[1]


def test_the_table_says_what_does_not_fit(config: Path) -> None:
    words = ["plan", "--model", str(config), "--memory", "99KB", "--bandwidth", "1GB/s", "--flops", "1T"]
    result = runner.invoke(app, [*words, "--context", "512"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "datasheet" in result.stdout
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("kvfold 0.35"))
    assert row[6:] == ["too", "much", "none"]  # and no speed
    assert "Nothing fits in 0.10 MB" in result.stdout
    assert result.stdout.endswith("--prefill-chunk 512 and --weight-bits 4.5 may help.\n")


LLAMA_8B = """{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}"""


def test_eight_billion_weights_read_a_long_text_on_24_gb_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "8b.json").write_text(LLAMA_8B)
    words = ["plan", "--model", str(tmp_path / "8b.json"), "--device", "RTX4090"]
    found = {}
    for given in ("", "--prefill-chunk 512", "--prefill-chunk 512 --weight-bits 4.5", "--weight-bits 4.5"):
        result = runner.invoke(app, [*words, *given.split()], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        *table, last = result.stdout.splitlines()
        assert max(map(len, table)) <= 80 and all(f"\n{name} 0.35 " in result.stdout for name in ("kvfold", "snapkv"))
        found[given] = last
    nothing, chunks, both, bits = found.values()
    assert nothing.startswith("Nothing fits in 24.00 GB: snapkv 0.35 takes 38.36 GB")
    assert chunks.startswith("All but full fit in 24.00 GB, and snapkv 0.35 answers most, 1 row, at most 47.8 tokens/s")
    assert both.startswith("All but full fit") and "2 rows at once" in both and "may help" not in both
    assert bits.startswith("Nothing fits") and bits.endswith("; --prefill-chunk 512 may help.")


def test_the_chart_opens_without_a_network(config: Path, tmp_path: Path) -> None:
    chart = tmp_path / "plan.html"
    words = ["plan", "--model", str(config), "--device", "H100", "--chart", str(chart), "--methods", "tova,h2o"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    page = chart.read_text()
    assert "vega" in page and "tova 0.35" in page and "https://cdn" not in page
    assert "the device has 80.00 GB" in page
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_contexts_and_amounts() -> None:
    assert contexts_up_to(5000) == [1024, 2048, 4096, 5000]
    assert contexts_up_to(4096) == [1024, 2048, 4096]
    assert contexts_up_to(100) == [16, 32, 64, 100]
    assert contexts_up_to(9) == [9]
    assert (amount(17.18e9), amount(2.5e6)) == ("17.18 GB", "2.50 MB")


def test_methods_of_one_size_share_a_line() -> None:
    def row(method: str, context: int, size: int) -> MemoryPlan:
        return MemoryPlan(
            method, None, context, 1, 1.0, 1, 1, size, 1, True, 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
        )

    rows = [row("a", 1, 100), row("a", 2, 200), row("b", 1, 101), row("b", 2, 300), row("c", 1, 99), row("c", 2, 201)]
    assert lines_of(rows) == {"a": "a, c", "c": "a, c", "b": "b"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "H1000"], "device='H1000' must be one of B200"),
        ([], "device=None must be one of"),
        (["--memory", "24GB"], "lacks --bandwidth, --flops"),
        (["--device", "L4", "--memory", "lots"], "memory='lots' must be a positive number of bytes, as 24GB"),
        (["--device", "L4", "--context", "0"], "context=0 must be at least 1"),
        (["--device", "L4", "--context", "513"], "context=513 must be at most 512"),
        (["--device", "L4", "--batch", "0"], "batch=0 must be at least 1"),
        (["--device", "L4", "--budget", "1.5"], "budget=1.5 must be a fraction"),
        (["--device", "L4", "--methods", "snapkw"], "did you mean 'snapkv'"),
        (["--device", "L4", "--methods", ","], "methods=',' names no method"),
        (["--device", "L4", "--dtype", "int8"], "dtype='int8' must be one of bfloat16, float16, float32"),
        (["--device", "T4"], "dtype='bfloat16' must be one that T4 multiplies fast"),
        (["--device", "L4", "--kv-memory", "2 parsecs"], "memory='2 parsecs' must be bytes"),
        (["--device", "L4", "--kv-memory", "0.1", "--budget", "9"], "kv_memory='0.1' sets the budget; budget='9' is"),
        (["--device", "L4", "--kv-memory", "9"], "bytes is the least"),
        (["--device", "L4", "--kv-memory", "1MB", "--context", "0"], "context=0 must be"),
        (["--device", "L4", "--kv-memory", "1MB", "--methods", "snapkv"], "try decoding(snapkv)"),
        (["--device", "L4", "--chart", "plan.pdf"], "must end in one of .html"),
        (["--device", "L4", "--model", "nowhere/config.json"], "model='nowhere/config.json' is not a file"),
    ],
)
def test_wrong_usage_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, words: list[str], said: str
) -> None:
    code, out, err = call(monkeypatch, capsys, "--model", config, *words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("text", ["{", '{"model_type": "nothing-like-it"}', "{}"])
def test_files_that_are_no_config_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config.json' holds no configuration"):
        read_config(str(path))


def test_models_that_are_no_decoder_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "vit"}')
    code, _, err = call(monkeypatch, capsys, "--model", path, "--device", "L4")
    assert code == 2 and "'vit' is no causal language model" in err


def test_a_hub_id_without_a_network_fails_clearly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = call(monkeypatch, capsys, "--model", "nobody/nothing-at-all", "--device", "L4")
    assert (code, out) == (1, "")
    assert "nobody/nothing-at-all" in err and "hub id" in err
