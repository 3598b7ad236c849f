"""Prompts are the official ones, byte for byte.

`published/prompts.json` has the sha256 of the prompts that the official code makes of the records in `published/`,
with its repository, commit and file; of LongBench and Lost in the Middle's QA that of the templates.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest

from kvfold.evaluation.benchmarks import infinitebench, longbench, loogle, scbench
from kvfold.evaluation.tasks import Setting, make_examples

PUBLISHED = Path(__file__).parent / "published"
OFFICIAL = json.loads((PUBLISHED / "prompts.json").read_text(encoding="utf-8"))
FOLDERS = {"longmemeval": "chats"}
WHOLE = [
    (task, wanted)
    for name, entry in OFFICIAL.items()
    if name not in ("longbench", "scbench_data")
    for task, wanted in entry["sha256"].items()
]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("task", "wanted"), WHOLE, ids=[task for task, _ in WHOLE])
def test_context_and_query_are_the_official_prompt(task: str, wanted: str):
    folder = re.split(r"[/(]", task)[0]
    example = make_examples(task, Setting(None, data=PUBLISHED / FOLDERS.get(folder, folder)))[0]
    query = example.queries[0]
    assert sha256(example.context + query.text + query.prefix) == wanted


@pytest.mark.parametrize("name", longbench.SETS)
def test_longbench_templates_are_official(name: str, tmp_path: Path):
    record = {
        "input": "{input}",
        "context": "{context}",
        "answers": ["x"],
        "length": 1,
        "_id": "a",
        "all_classes": ["x"],
    }
    for file in (name, f"{name}_e"):  # the slots stand in for themselves, so that the prompt is its template
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(record), encoding="utf-8")
    tasks = [f"longbench/{name}", *([f"longbench_e/{name}"] if name in longbench.BY_LENGTH else [])]
    for task in tasks:
        (example,) = make_examples(task, Setting(None, data=tmp_path))
        (query,) = example.queries
        assert example.context.endswith("{context}") and not query.prefix
        assert sha256(example.context + query.text) == OFFICIAL["longbench"]["sha256"][name]
        assert query.max_new_tokens == OFFICIAL["longbench"]["max_new_tokens"][name]


@pytest.mark.parametrize("task", OFFICIAL["scbench_data"]["sha256"])
def test_scbench_contexts_and_queries_are_official(task: str):
    (example,) = make_examples(task, Setting(None, data=PUBLISHED / "scbench"))
    context, *queries = OFFICIAL["scbench_data"]["sha256"][task]
    if task != "scbench_data/mf":  # there the official context begins with the first turn's query
        assert sha256(example.context) == context
    assert all(query.text.startswith("\n\n") for query in example.queries)
    assert [sha256(query.text[2:]) for query in example.queries] == queries


def test_lost_in_the_middle_asks_as_its_authors_do():
    example = make_examples("lostmiddle/qa(documents=3)", Setting(None, samples=1, data=PUBLISHED / "lostmiddle"))[0]
    prompt = example.context + example.queries[0].text
    template = re.sub(r"Document \[1\].*(?=\n\nQuestion)", "{search_results}", prompt, flags=re.DOTALL)
    template = template.replace("who keeps the light", "{question}")
    assert sha256(template) == OFFICIAL["lostmiddle"]["qa_template"]
    shape = r"Document \[1\]\(Title: \w+\) .+\nDocument \[2\]\(Title: \w+\) .+\nDocument \[3\]\(Title: \w+\) [^\n]+$"
    assert re.search(shape, example.context)


def test_answer_lengths_are_official():
    found = {name: entry.max_new_tokens for name, entry in infinitebench.SETS.items()}
    assert found == OFFICIAL["infinitebench"]["max_new_tokens"]
    assert {name: entry.max_new_tokens for name, entry in loogle.SETS.items()} == OFFICIAL["loogle"]["max_new_tokens"]
    wanted = OFFICIAL["scbench_data"]["max_new_tokens"]
    for name, entry in scbench.SETS.items():
        lengths = {kind: turn.max_new_tokens for kind, turn in entry.turns.items()}
        assert (lengths if isinstance(wanted[name], dict) else lengths[""]) == wanted[name]
