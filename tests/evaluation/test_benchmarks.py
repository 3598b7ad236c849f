"""Every published format, from hand-written records in `published/` that have its fields."""

from pathlib import Path

import pytest

from kvfold.evaluation.benchmarks import infinitebench, leval, longbench, loogle, scbench, zeroscrolls
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.metrics.base import get_metric
from kvfold.evaluation.tasks import Setting, get_task, list_tasks, make_examples

PUBLISHED = Path(__file__).parent / "published"
FOLDERS = {
    "locomo": "chats",
    "realtalk": "chats/realtalk",
    "longmemeval": "chats",
    "longbench_e": "longbench",
    "scbench_data": "scbench",
}
STAND_INS = {
    **{f"longbench/{name}": "longbench/hotpotqa.jsonl" for name in longbench.SETS},
    **{f"longbench_e/{name}": "longbench/hotpotqa.jsonl" for name in longbench.BY_LENGTH},
    **dict.fromkeys(("longbench/trec", "longbench/lsht", "longbench_e/trec"), "longbench/trec.jsonl"),
    **dict.fromkeys(("longbench/passage_count", "longbench_e/passage_count"), "longbench/passage_count.jsonl"),
    "longbench/passage_retrieval_zh": "longbench/passage_retrieval_zh.jsonl",
    **{f"zeroscrolls/{name}": "zeroscrolls/qasper/validation.jsonl" for name in zeroscrolls.SETS},
    **{f"leval/{name}": "leval/quality.jsonl" for name in leval.SETS},
    **{f"leval/{name}": "leval/multidoc_qa.jsonl" for name, kind in leval.SETS.items() if kind == "f1"},
    **{f"leval/{name}": "leval/gov_report_summ.jsonl" for name, kind in leval.SETS.items() if kind == "rouge"},
}
"""Sets without a file of their own are read from another one of their format."""
OWN = {
    *(f"zeroscrolls/{name}" for name in ("quality", "space_digest", "book_sum_sort")),
    *(f"leval/{name}" for name in ("coursera", "gsm100", "topic_retrieval_longchat", "sci_fi")),
}
FEW = {"lostmiddle/qa": "(documents=2)"}
"""Options for which the records are enough."""
TASKS = sorted(info.name for info in list_tasks() if info.make.__module__.startswith("kvfold.evaluation.benchmarks."))


def setting(task: str, **fields: object) -> Setting:
    stand_in = None if task in OWN else STAND_INS.get(task)
    folder = task.split("/")[0]
    return Setting(None, data=PUBLISHED / (stand_in or FOLDERS.get(folder, folder)), **fields)


def examples(task: str, options: str = "", **fields: object) -> list[Example]:
    return make_examples(task + options, setting(task, **fields))


def test_all_sets_are_there():
    found = {name: sum(task.split("/")[0] == name for task in TASKS) for name in {t.split("/")[0] for t in TASKS}}
    assert found == {
        **{"longbench": 21, "longbench_e": 13, "longbench2": 1, "zeroscrolls": 10, "infinitebench": 12, "leval": 19},
        **{"scbench_data": 12, "loogle": 4, "locomo": 1, "realtalk": 1, "longmemeval": 1, "lostmiddle": 2, "gsm8k": 1},
    }


def right(query: Query) -> str:
    """A prediction that gives the right answer in the form that the query's metric reads."""
    if query.metric == "longbench2/choice":
        return f"The correct answer is ({query.answers[0]})"
    if query.metric in ("infinitebench/choice", "infinitebench/code_debug", "scbench/choice"):
        return f"{query.answers[1]}."
    if query.metric in ("scbench/variables", "infinitebench/math_calc"):
        return ", ".join(query.answers)
    if query.metric == "scbench/repoqa":
        pytest.importorskip("tree_sitter")
        return f"```python\n{query.answers[0]}\n```"
    return query.answers[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_full(task: str):
    assert not get_task(task).sized
    for example in examples(task, FEW.get(task, "")):
        assert example.context.strip()
        for query in example.queries:
            metric = get_metric(query.metric)  # raises where it is not registered
            score = metric.aggregate([metric(right(query), query)])
            assert score == pytest.approx(100.0), (query, right(query))


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_the_first(task: str):
    options = FEW.get(task, "")
    assert examples(task, options, samples=1) == examples(task, options)[:1]


def test_longbench_keeps_the_official_rules():
    first, second, third = examples("longbench_e/hotpotqa")
    assert [each.info["length_bin"] for each in (first, second, third)] == ["0-4k", "4-8k", "8k+"]
    assert first.chat and first.cut == "middle" and first.queries[0].answers == ("Paragraph 3",)
    assert second.queries[0].answers == ("Paragraph 3", "the third")
    chat = {name: examples(f"longbench/{name}")[0].chat for name in longbench.SETS}
    assert {name for name in chat if not chat[name]} == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    queries = {name: examples(f"longbench/{name}")[0].queries[0] for name in longbench.SETS}
    assert {name for name in queries if queries[name].info.get("first_line")} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name in queries if queries[name].stop} == {"samsum"}
    assert {name for name in queries if queries[name].min_new_tokens == 1} == {"samsum"}
    assert queries["trec"].info["classes"] == ("Human being", "Definition", "Place")


def test_longbench2_reasons_on_demand():
    (plain,) = examples("longbench2")
    (cot,) = examples("longbench2", "(cot=True)")
    assert plain.context == cot.context and plain.context.endswith(
        "<text>\nAnna rows, Bert mills, Carla keeps the light."
    )
    assert (plain.queries[0].max_new_tokens, cot.queries[0].max_new_tokens) == (128, 1024)
    assert cot.queries[0].text.startswith(plain.queries[0].text)
    assert {"difficulty": "easy", "length": "short"}.items() <= plain.info.items()


def test_zeroscrolls_groups_references_and_keeps_the_prompt_whole():
    first, second = examples("zeroscrolls/qasper")
    assert first.queries[0].answers == ("on the pier", "the pier") and second.queries[0].answers == ("nowhere at all",)
    assert first.context.endswith("Story:\nThe light stands on the pier.") and first.cut == "end"
    assert first.queries[0].text == "\n\nQuestion:\nWhere is the light?\n\nAnswer:\n"
    assert first.info["separator"].startswith("... [")


def test_zeroscrolls_refuses_the_test_split():
    hidden = Setting(None, data=PUBLISHED / "zeroscrolls/qasper/test.jsonl")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: field 'output' is missing.*test split are private"):
        make_examples("zeroscrolls/qasper", hidden)


def test_infinitebench_answers_of_choices_have_text_and_letter():
    assert examples("infinitebench/longbook_choice_eng")[0].queries[0].answers == ("Carla", "C")
    assert examples("infinitebench/code_debug")[0].queries[0].answers == ("row", "B")
    assert examples("infinitebench/math_calc")[0].queries[0].answers == ("4", "14", "6")
    assert all(not examples(f"infinitebench/{name}")[0].chat for name in infinitebench.SETS)


def test_leval_asks_all_instructions_of_a_document():
    (coursera,) = examples("leval/coursera")
    assert [query.answers for query in coursera.queries] == [("AC",), ("B",)]
    (kept,) = examples("leval/multidoc_qa")  # the documents for a judge are left out
    assert "leaves at nine" in kept.context and kept.queries[0].text.endswith("about 4 words.")
    assert examples("leval/sci_fi")[0].queries[0].answers == ("True",)


def test_scbench_turns_share_one_context():
    (numbers,) = examples("scbench_data/mf")
    assert numbers.context == "[521, 104, 733]"
    assert [query.text for query in numbers.queries] == [
        "\n\nWhat is the largest number?\n\nThe largest number is",
        "\n\nWhat is the smallest number?\n\nThe smallest number is",
    ]
    assert len(examples("scbench_data/mf", "(turns=1)")[0].queries) == 1
    assert examples("scbench_data/many_shot")[0].queries[0].answers == ("Monday",)  # not its letters
    assert examples("scbench_data/qa_chn")[0].queries[0].answers == ("卡拉", "小卡拉")
    (mixed,) = examples("scbench_data/summary_with_needles")
    assert [(q.metric, q.max_new_tokens) for q in mixed.queries] == [("scbench/summary", 800), ("scbench/passkey", 15)]
    (code,) = examples("scbench_data/repoqa")
    assert set(code.queries[0].info["needles"]) == {"row", "mill"} and code.queries[1].info["name"] == "mill"
    assert set(scbench.SETS) == {path.stem.removeprefix("scbench_") for path in (PUBLISHED / "scbench").iterdir()}


def test_loogle_reads_python_lists_but_runs_nothing(tmp_path: Path):
    assert examples("loogle/longdep_qa")[0].queries[0].info == {"kind": "comprehension_and_reasoning"}
    assert examples("loogle/shortdep_cloze")[0].queries[0].metric == "loogle/cloze_exact"
    assert examples("loogle/shortdep_qa", '(metric="bleu")')[0].queries[0].metric == "loogle/bleu"
    with pytest.raises(ValueError, match="metric='f1' must be one of 'rouge', 'bleu'"):
        examples("loogle/shortdep_qa", '(metric="f1")')
    mark = tmp_path / "ran"
    code = f'{{"input": "x", "title": "t", "qa_pairs": "[open({str(mark)!r}, \'w\')]", "output": "none"}}'
    (tmp_path / "shortdep_qa.jsonl").write_text(code, encoding="utf-8")
    with pytest.raises(ValueError, match=r"shortdep_qa\.jsonl, line 1: field 'qa_pairs' is no Python list"):
        make_examples("loogle/shortdep_qa", Setting(None, data=tmp_path))
    assert not mark.exists()


def test_locomo_orders_sessions_by_number():
    (chat,) = examples("locomo")
    _, _, said = chat.context.partition("each of them.\n")
    assert said == (
        '\nDATE: 1 May, 2023\nCONVERSATION:\nCarla said, "The light is mended."\n'
        'Bert said, "Look!" and shared a photo of a mill.\n'
        '\nDATE: 4 May, 2023\nCONVERSATION:\nBert said, "I sold the mill."\n'
    )
    assert [query.info["category"] for query in chat.queries] == [4, 2, 1]
    assert "DATE" in chat.queries[1].text and "DATE" not in chat.queries[0].text
    assert chat.queries[2].answers == ("1",)
    (everything,) = examples("locomo", '(adversarial=True, metric="convqa/locomo")')
    assert everything.queries[3].answers == ("not mentioned",) and everything.queries[3].metric == "convqa/locomo"
    with pytest.raises(ValueError, match="metric='f1' must be one of 'convqa/f1', 'convqa/locomo'"):
        examples("locomo", '(metric="f1")')


def test_realtalk_reads_no_events():
    (chat,) = examples("realtalk")
    assert chat.context.count("The tide is late.") == 1 and "waits" not in chat.context


def test_longmemeval_has_a_history_per_question():
    made = examples("longmemeval")
    assert [each.id for each in made] == ["m1", "m3"]
    assert made[0].context.index("I mend nets.") < made[0].context.index("It rains.")  # by date
    assert [each.id for each in examples("longmemeval", "(abstention=True)")] == ["m1", "m2_abs", "m3"]
    with pytest.raises(ValueError, match="variant='l' must be one of"):
        examples("longmemeval", '(variant="l")')


def test_lost_in_the_middle_puts_the_gold_where_it_is_told():
    (published,) = examples("lostmiddle/kv")
    (last,) = examples("lostmiddle/kv", "(gold_index=2)")
    assert published.info == {"gold_index": 1, "depth": 0.5} and last.info == {"gold_index": 2, "depth": 1.0}
    assert last.context.endswith('"k1": "v1"}')
    with pytest.raises(ValueError, match=r"gold_index=3 must be in 0\.\.2"):
        examples("lostmiddle/kv", "(gold_index=3)")
    with pytest.raises(ValueError, match=r"gold_index=3 must be in 0\.\.2, for documents=3"):
        examples("lostmiddle/qa", "(documents=3, gold_index=3)")


def test_distractors_hold_no_answer():
    made = examples("lostmiddle/qa", "(documents=3, gold_index=1)", samples=1)
    (first,) = made
    assert "Document [2](Title: Light) The light is kept by Carla." in first.context
    assert "Anna sails with Carla." not in first.context  # it names the answer
    assert made == examples("lostmiddle/qa", "(documents=3, gold_index=1)", samples=1)
    with pytest.raises(ValueError, match=r"documents=4 must be at most 3: nq-open-oracle\.jsonl, line 1"):
        examples("lostmiddle/qa", "(documents=4)")
    with pytest.raises(ValueError, match="documents=1 must be at least 2"):
        examples("lostmiddle/qa", "(documents=1)")


def test_gsm8k_has_its_shots_in_the_context():
    (example,) = examples("gsm8k")
    (one,) = examples("gsm8k", "(shots=1)")
    assert example.context.count("Q: ") == 8 and one.context.count("Q: ") == 1
    assert example.context.startswith(one.context) and example.queries == one.queries
    assert example.queries[0].answers == ("1,000",)
    with pytest.raises(ValueError, match=r"shots=9 must be in 1\.\.8"):
        examples("gsm8k", "(shots=9)")


def test_options_are_listed():
    assert dict(get_task("scbench_data/kv").options) == {"turns": 5}
    assert dict(get_task("loogle/shortdep_qa").options) == {"metric": None}
    assert not get_task("longbench/qasper").options
    assert loogle.SETS.keys() == {path.stem for path in (PUBLISHED / "loogle").iterdir()}
