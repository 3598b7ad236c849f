"""Bad input of any kind ends a command with a line on stderr and 1 or 2, never with a traceback."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvfold
from kvfold.cli import common, main
from kvfold.evaluation import prompts

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "max_position_embeddings": 512,
}  # fmt: skip
ODD = [
    ("hidden_size", 0), ("hidden_size", "x"), ("hidden_size", None), ("hidden_size", 10**400),
    ("intermediate_size", {}), ("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("num_hidden_layers", -1),
    ("num_attention_heads", 0), ("num_attention_heads", 5), ("num_attention_heads", [4]), ("num_key_value_heads", 0),
    ("num_key_value_heads", 3), ("vocab_size", -1), ("vocab_size", 10**30), ("max_position_embeddings", 10**30),
    ("max_position_embeddings", "many"), ("max_position_embeddings", 0), ("head_dim", 0), ("head_dim", True),
    ("rope_parameters", 5), ("rope_parameters", {"rope_type": "none"}), ("layer_types", ["x"]),
    ("sliding_window", 10**30), ("model_type", 5), ("model_type", "none"), ("model_type", []), ("hidden_act", "none"),
    ("text_config", 5), ("torch_dtype", "x"), ("quantization_config", 5), ("rms_norm_eps", "x"), ("auto_map", 7),
]  # fmt: skip


def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and standard error of `kvfold words...`; any other exception than SystemExit comes through."""
    monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(("field", "value"), ODD)
def test_plan_names_an_odd_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**LLAMA, field: value}))
    code, err = ends(monkeypatch, capsys, "plan", "--model", path, "--device", "L4", "--json")
    assert code in (0, 2) and "Traceback" not in err  # what transformers can make a model of is one
    assert code == 0 or "odd.json" in err or field in err


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '"x"', "null", "[" * 100_000, "\udcff", "{}"])
def test_plan_names_a_file_that_is_no_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text, errors="surrogateescape")
    code, err = ends(monkeypatch, capsys, "plan", "--model", path, "--device", "L4")
    assert code == 2 and "odd.json" in err and len(err) < 2000


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "model_type"])
@pytest.mark.parametrize("value", [0, "x", 10**30, None])
def test_a_folder_whose_configuration_is_odd_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, document: Path, tmp_path: Path,
    field: str, value: Any,
) -> None:  # fmt: skip
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in folder.iterdir():
        (odd / path.name).symlink_to(path)
    given = json.loads((folder / "config.json").read_text())
    (odd / "config.json").unlink()
    (odd / "config.json").write_text(json.dumps({**given, field: value}))
    code, err = ends(monkeypatch, capsys, "run", "--model", odd, "--file", document, "--max-new-tokens", 2)
    assert code in (1, 2) and "odd" in err


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--context", 10**40, "--device", "L4"], ["plan", "--batch", 10**40, "--device", "L4"],
        ["plan", "--memory", "1e999", "--device", "L4"], ["bench", "kernels", "--context", "1e9"],
        ["plan", "--budget", "nan", "--device", "L4"], ["plan", "--reserve", "nan", "--device", "L4"],
        ["eval", "--tasks", "niah", "--lengths", 10**9], ["eval", "--tasks", "niah(", "--lengths", 300],
        ["eval", "--tasks", "(" * 5000], ["run", "--file", "/dev/null"], ["compare", "--file", "."],
        ["report", "."], ["report", "/dev/null"], ["models", "x"], ["methods", "\x00"], ["calibrate", "\x00"],
        ["calibrate", "headkv", "--texts", "/dev/null"], ["calibrate", "headkv", "--device", "mps"],
        ["eval", "/dev/null"], ["eval", "--tasks", "niah", "--texts", "/nowhere"],
    ],
)  # fmt: skip
def test_options_that_can_not_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, words: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    option = {"plan": "--model", "eval": "--models", "run": "--model", "compare": "--model", "calibrate": "--model"}
    given = [option[words[0]], folder] if words[0] in option and words[:2] != ["eval", "/dev/null"] else []
    code, err = ends(monkeypatch, capsys, *words, *given)
    assert code in (1, 2) and err and "Traceback" not in err


@pytest.mark.parametrize("command", ["run", "compare", "bench", "eval", "calibrate"])
def test_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, document: Path, command: str
) -> None:
    words: dict[str, list[Any]] = {
        "run": ["--file", document, "--model", folder], "compare": ["--file", document, "--model", folder],
        "bench": ["kernels"], "eval": ["--tasks", "niah", "--models", folder],
        "calibrate": ["headkv", "--model", folder],
    }  # fmt: skip
    first, *rest = ["bench", *words["bench"]] if command == "bench" else [command, *words[command]]
    for device in ("mps", "xpu", "meta", "nonsense", "cuda:77", ""):
        code, err = ends(monkeypatch, capsys, first, *rest, "--device", device)
        assert code == 2 and f"device={device!r} must be a device that" in err and len(err) < 500


@pytest.mark.parametrize(
    "words",
    [["methods", "\udcff"], ["run", "--file", "a\udcff.txt"], ["run", "--file", "a.txt", "--ask", "\udcff?"],
     ["plan", "--device", "\udcff"], ["eval", "--tasks", "\ud800"]],
)  # fmt: skip
def test_words_that_are_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, err = ends(monkeypatch, capsys, *words)
    assert code == 2 and "is not text in" in err and err.encode()


def test_standard_input_that_is_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb"), encoding="utf-8", errors=errors))
        code, err = ends(monkeypatch, capsys, "run", "--model", folder, "--file", "-")
        assert code == 2 and "is not UTF-8 text" in err


def written(monkeypatch: pytest.MonkeyPatch, encoding: str, *words: object) -> tuple[int, bytes]:
    """Exit code and the bytes of a standard output of this encoding."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["kvfold", *map(str, words)])
        patch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as exit_:
            main()
    out.flush()
    return int(exit_.value.code or 0), raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_any_output_takes_any_answer(
    monkeypatch: pytest.MonkeyPatch, folder: Path, document: Path, encoding: str
) -> None:
    asked = "Käse, 汉字, 🦊?"
    words = [
        "compare",
        "--model",
        folder,
        "--file",
        document,
        "--ask",
        asked,
        "--max-new-tokens",
        2,
        "--methods",
        "full",
    ]
    code, out = written(monkeypatch, encoding, *words, "--json")
    assert code == 0 and json.loads(out.decode(encoding))["question"] == asked
    assert (b"\\u6c49" in out) == (encoding != "utf-8")
    for others in (["eval", "--list"], ["methods"], ["methods", "kvfold"], ["models"]):
        code, out = written(monkeypatch, encoding, *others)
        assert code == 0 and out.decode(encoding)


def test_whoever_reads_may_have_enough(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["kvfold", "methods", "--json"])
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as exit_:
            main()
    assert exit_.value.code == 1 and "Traceback" not in capfd.readouterr().err


def test_what_is_missing_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["eval", "--tasks", "niah", "--models", folder, "--lengths", 300, "--ray", "local"]
    code, err = ends(monkeypatch, capsys, *words)
    assert code == 1 and 'pip install "kvfold[ray]"' in err


def test_help_of_all_commands_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run", "compare", "methods", "models", "plan", "eval", "calibrate", "report", "bench"):
        code, out = written(monkeypatch, "ascii", name, "--help")
        assert code == 0 and b"Usage" in out


def test_a_long_document_is_not_encoded_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """Refused, or cut, from what its ends and its first pieces say; cut as a text that is encoded whole."""
    text = "".join(f"{number} foxes jump. " for number in range(8_000))
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr(common, "LONG", 50_000)
    monkeypatch.setattr(prompts, "PIECE", 1024)
    _, tokenizer = kvfold.load(folder, progress=False)
    encoded: list[int] = []
    whole = type(tokenizer).__call__

    def counted(self: Any, given: str, *rest: Any, **named: Any) -> Any:
        encoded.append(len(given))
        return whole(self, given, *rest, **named)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    words = ["run", "--model", folder, "--file", tmp_path / "long.txt", "--max-new-tokens", 2, "--method", "full"]
    code, err = ends(monkeypatch, capsys, *words)
    assert code == 2 and "the prompt has at least" in err and "--context 510 cuts the document" in err
    assert encoded and sum(encoded) < 20_000
    encoded.clear()
    given = dict(chat=True, context=300, new=2)
    model, _ = kvfold.load(folder, progress=False)
    ids, cut = common.read_prompt(model, tokenizer, text, "What?", **given)
    assert sum(encoded) < 20_000 and cut == pytest.approx(len(text) - 300, rel=0.1)
    monkeypatch.setattr(common, "LONG", len(text))
    same, exact = common.read_prompt(model, tokenizer, text, "What?", **given)
    assert torch.equal(ids, same) and exact == pytest.approx(cut, rel=0.1)
