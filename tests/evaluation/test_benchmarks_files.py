"""Published files: where they are looked for, how they are read, and what is said of broken ones."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmark_files import benchmark_file
from kvfold.evaluation.metrics.base import get_metric
from kvfold.evaluation.tasks import Setting, make_examples

RECORD = {"input": "Who?", "context": "Carla.", "answers": ["Carla"], "length": 1, "_id": "a", "all_classes": None}


def made(task: str, data: Path, **fields: object) -> list[str]:
    return [example.context for example in make_examples(task, Setting(None, data=data, **fields))]


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["hotpotqa.jsonl", "data/hotpotqa.jsonl"])
def test_files_are_found_by_the_hub_s_names(where: str, tmp_path: Path):
    path = write(tmp_path / where, RECORD)
    assert made("longbench/hotpotqa", tmp_path) == made("longbench/hotpotqa", path)


def test_archives_and_compressed_files_are_read_in_place(tmp_path: Path):
    plain = write(tmp_path / "plain/hotpotqa.jsonl", RECORD, "", RECORD)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(plain, "data/hotpotqa.jsonl")
        archive.write(plain, "data/qasper.jsonl")
    with gzip.open(tmp_path / "hotpotqa.jsonl.gz", "wb") as stream:
        stream.write(plain.read_bytes())
    wanted = made("longbench/hotpotqa", plain)
    assert len(wanted) == 2
    assert made("longbench/hotpotqa", tmp_path) == wanted  # data.zip in the folder
    assert made("longbench/hotpotqa", tmp_path / "data.zip") == wanted
    assert made("longbench/hotpotqa", tmp_path / "hotpotqa.jsonl.gz") == wanted


def test_parquet_files_are_read(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": i, "context": f"[{i}]", "multi_turns": [{"input": "The sum is", "answer": i}]} for i in range(3)]
    (tmp_path / "scbench_mf").mkdir()
    for name, part in (("test-00000-of-00002", rows[:2]), ("test-00001-of-00002", rows[2:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"scbench_mf/{name}.parquet")
    assert made("scbench_data/mf", tmp_path) == ["[0]", "[1]", "[2]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"hotpotqa\.jsonl, line 3: this is no JSON"),
        ("[1]", r"hotpotqa\.jsonl, line 3: this is a list; it must be an object"),
        ({**RECORD, "answers": None}, r"hotpotqa\.jsonl, line 3: field 'answers' is missing; there are 'input', 'con"),
        ({**RECORD, "answers": []}, r"hotpotqa\.jsonl, line 3: field 'answers' is \[\]; it must be a string, a number"),
        ({**RECORD, "context": 5}, r"hotpotqa\.jsonl, line 3: field 'context' is 5; it must be a string"),
        ({**RECORD, "length": "long"}, r"hotpotqa\.jsonl, line 3: field 'length' is 'long'; it must be a whole number"),
    ],
)
def test_broken_lines_are_named(line: object, message: str, tmp_path: Path):
    write(tmp_path / "hotpotqa.jsonl", RECORD, "", line)
    with pytest.raises(ValueError, match=message):
        made("longbench/hotpotqa", tmp_path)


def test_nested_fields_are_named(tmp_path: Path):
    turns = [{"input": "Who?", "answer": "Carla", "options": list("abcd")}]
    write(tmp_path / "scbench_choice_eng.jsonl", {"context": "Carla.", "multi_turns": turns})
    with pytest.raises(
        ValueError, match=r"line 1, multi_turns\[0\]: field 'answer' is 'Carla'; it must be one of the op"
    ):
        made("scbench_data/choice_eng", tmp_path)
    write(tmp_path / "scbench_kv.jsonl", {"context": "Carla.", "multi_turns": ["Who?"]})
    with pytest.raises(ValueError, match=r"line 1: field 'multi_turns' is \['Who\?'\]; it must be a list of objects"):
        made("scbench_data/kv", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("data.zip", b"PK?"), ("qasper.jsonl.gz", b"{}"), ("qasper.jsonl", b"\xff")]
)
def test_broken_files_are_named(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*: this file is broken"):
        made("longbench/qasper", tmp_path / name)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data='.*nowhere' does not exist"):
        made("longbench/qasper", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data='.*' has none of these files: qasper\.jsonl, data/qasper\.jsonl"):
        made("longbench/qasper", tmp_path)
    with pytest.raises(ValueError, match=r"qasper\.csv: files must end in \.jsonl, \.json, \.parquet"):
        made("longbench/qasper", write(tmp_path / "qasper.csv", "a,b"))
    with pytest.raises(ValueError, match=r"data=None: github\.com/snap-research/locomo is not on the Hugging Face hub"):
        make_examples("locomo", Setting(None))


def offline(task: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Make a task's examples from the hub's cache below `home`, in a process that may not use the network."""
    code = (
        "from kvfold.evaluation.tasks import Setting, make_examples\n"
        f"print(make_examples({task!r}, Setting(None))[0].context)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_hub_s_files_are_read(tmp_path: Path):
    cached = tmp_path / "hub/datasets--THUDM--LongBench"
    write(cached / "refs/main", "0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    with zipfile.ZipFile(snapshot / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps(RECORD))
    done = offline("longbench/hotpotqa", tmp_path)
    assert done.stdout.endswith("The following are given passages.\nCarla.\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "repository"), [("longbench/qasper", "THUDM/LongBench"), ("scbench_data/kv", "microsoft/SCBench")]
)
def test_a_failing_hub_names_the_way_out(task: str, repository: str, tmp_path: Path):
    if repository == "microsoft/SCBench":
        pytest.importorskip("datasets")
    error = offline(task, tmp_path).stderr.strip().splitlines()[-1]
    assert error.startswith(f"RuntimeError: {repository} could not be loaded from the Hugging Face hub"), error
    assert "--data" in error and 'pip install "kvfold[eval]"' in error


@pytest.mark.parametrize(
    ("name", "documents", "questions"),
    [
        ("coursera", 15, 172),
        ("quality", 15, 202),
        ("gsm100", 100, 100),
        ("topic_retrieval_longchat", 50, 150),
        ("multidoc_qa", 20, None),
        ("gov_report_summ", 13, 13),
    ],
)
def test_leval_as_published(name: str, documents: int, questions: int | None):
    folder = benchmark_file(f"leval/{name}.jsonl").parent
    examples = make_examples(f"leval/{name}", Setting(None, data=folder))
    asked = [query for example in examples for query in example.queries]
    assert len(examples) == documents and questions in (None, len(asked))
    for query in asked:
        if query.metric != "leval/rouge":
            assert get_metric(query.metric)(query.answers[0], query)["score"] == 1.0, query


def test_lost_in_the_middle_as_published():
    path = benchmark_file("kv-retrieval-75.jsonl")
    examples = make_examples("lostmiddle/kv", Setting(None, data=path.parent))
    assert len(examples) == 200
    moved = make_examples("lostmiddle/kv(gold_index=74)", Setting(None, data=path))
    for example, last in zip(examples, moved, strict=True):
        shown = json.loads(example.context.partition("JSON data:\n")[2])
        key = example.queries[0].text.split('"')[1]
        assert len(shown) == 75 and shown[key] == example.queries[0].answers[0]
        assert list(json.loads(last.context.partition("JSON data:\n")[2]))[-1] == key


def test_open_questions_as_published():
    path = benchmark_file("nq-open-oracle.jsonl")
    passages = [json.loads(line)["ctxs"][0] for line in path.read_text(encoding="utf-8").splitlines()]
    examples = make_examples("lostmiddle/qa(gold_index=4)", Setting(None, samples=40, data=path))
    for example, gold in zip(examples, passages, strict=False):
        assert f"\nDocument [5](Title: {gold['title']}) {gold['text']}\n" in example.context
        mixed = {each["text"] for each in passages if f") {each['text']}" in example.context} - {gold["text"]}
        assert len(mixed) == 9
        answers = example.queries[0].answers
        assert not [text for text in mixed if any(answer.lower() in text.lower() for answer in answers)]
    assert len({example.context for example in examples}) == 40
