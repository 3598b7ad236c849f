"""The benchmarks' scores: parity with the figures of their official scripts, and what the cards and papers fix."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import benchmark_file
from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.metrics.base import _scan, metrics

PARITY = Path(__file__).parent / "parity"
NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
EXPECTED = "eat a sandwich and sit in Dolores Park on a sunny day."

TOLERANCE = {"contains_all": 1e-4}  # RULER's script rounds to hundredths of a percent

# jieba has regular expressions with invalid escapes, seen where its files were not compiled on installing.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")


def cases() -> dict[str, list[dict[str, Any]]]:
    """The recorded cases of all benchmarks, by metric."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(PARITY.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            found.setdefault(case["metric"], []).append(case)
    return found


CASES = cases()


def query(metric: str, *answers: str, **info: Any) -> Query:
    return Query("", answers, metric, info=info)


def score(metric: str, prediction: str, *answers: str, **info: Any) -> Any:
    found = get_metric(metric)(prediction, query(metric, *answers, **info))
    return found["score"] if set(found) == {"score"} else found


def needs_parser(case: dict[str, Any]) -> bool:
    return case["metric"] == "scbench/repoqa" and case["prediction"].count("```") > 1


@pytest.mark.parametrize("name", CASES)
def test_same_as_the_official_script(name: str):
    assert len(CASES[name]) >= 19
    for case in CASES[name]:
        if needs_parser(case):
            continue
        found = score(name, case["prediction"], *case["answers"], **case["info"])
        assert found == pytest.approx(case["score"], abs=TOLERANCE.get(name, 1e-6)), case


@pytest.mark.parametrize("lang", ["python", "java", "go", "rust", "typescript", "cpp"])
def test_same_as_the_official_script_where_code_is_parsed(lang: str):
    parsed = [case for case in CASES["scbench/repoqa"] if needs_parser(case) and case["info"]["lang"] == lang]
    assert parsed
    for package in ("tree_sitter", f"tree_sitter_{lang}"):
        pytest.importorskip(package, reason=f"parses code blocks: needs {package}")
    for case in parsed:
        assert score("scbench/repoqa", case["prediction"], *case["answers"], **case["info"]) == case["score"], case


def test_every_metric_has_figures_to_compare_with():
    _scan()
    logits = {"agreement", "perplexity"}
    assert set(metrics) - logits == set(CASES)


def test_scores_stay_between_zero_and_one():
    for name, recorded in CASES.items():
        for case in recorded:
            figures = case["score"].values() if isinstance(case["score"], dict) else [case["score"]]
            if not name.startswith("loogle/cloze"):  # counts of masks
                assert all(0 <= figure <= 1 for figure in figures), case


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "info", "wanted"),
    [
        ("longbench/f1", "The cat sat on a mat.", ["cat on the mat"], {}, 6 / 7),
        ("longbench/rouge", "the cat sat on the mat.", ["the cat lay on the mat."], {}, 0.8),
        ("longbench/rouge", "the the the cat", ["the cat the cat"], {}, 1.0),
        ("longbench/rouge", "a b. c d.", ["c d. a b."], {}, 1.0),
        (
            "longbench/classification",
            "Human being or Entity",
            ["Human being"],
            {"classes": ["Human", "Human being", "Entity", "being"]},
            0.5,
        ),
        ("longbench/code", "return x+1", ["return x+2"], {}, 0.9),
        ("longbench/code", "    return x", ["return x"], {}, 0.8),
        ("longbench/code", "# first\nreturn x", ["return x"], {}, 1.0),
        ("longbench/retrieval", "3, not 5", ["Paragraph 3"], {}, 0.5),
        ("longbench/retrieval", "Paragraph 13", ["Paragraph 3"], {}, 0.0),
        ("zeroscrolls/exp_similarity", "70%", ["80%"], {}, 0.5),
        ("zeroscrolls/exp_similarity", "80.0%", ["80%"], {}, 1.0),
        ("zeroscrolls/exp_similarity", "eighty percent", ["80%"], {}, 0.0),
        ("zeroscrolls/concordance", "2, 1, 3, 4", ["1, 2, 3, 4"], {}, 5 / 6),
        ("zeroscrolls/concordance", "4, 3, 2, 1", ["1, 2, 3, 4"], {}, 0.0),
        ("zeroscrolls/concordance", "1, 2, 3", ["1, 2, 3, 4"], {}, 0.0),
        ("zeroscrolls/concordance", "3, 2, 1", ["3, 1, 2"], {}, 2 / 3),
        ("zeroscrolls/accuracy", "(B) because A", ["B"], {}, 1.0),
        ("zeroscrolls/accuracy", "The answer is B", ["B"], {}, 1.0),
        ("zeroscrolls/accuracy", "A good answer is B", ["A"], {}, 1.0),
        ("infinitebench/kv", '"3f2a-11ee"', ["3f2a-11ee"], {}, 1.0),
        ("infinitebench/kv", "3f2a-11eex", ["3f2a-11ee"], {}, 0.0),
        ("infinitebench/math_calc", "4, 14, 7", ["4", "14", "6"], {}, 2 / 3),
        ("infinitebench/math_calc", "5, 14, 6", ["4", "14", "6"], {}, 0.0),
        ("infinitebench/math_find", "12.7 or 3", ["12"], {}, 1.0),
        ("scbench/contains", "x 3f2a.. y", ["3f2a.."], {}, 1.0),
        ("scbench/contains", "X 3F2A.. Y", ["3f2a.."], {}, 0.0),
        ("scbench/variables", "ab and ef", ["AB", "CD", "EF"], {}, 0.67),
        ("scbench/choice", "Baker", ["B", "text"], {}, 1.0),
        ("scbench/choice", "The answer is: C.", ["C", "text"], {}, 1.0),
        ("scbench/math_find", "12.7 or 3", ["12"], {}, 1.0),
        ("longctx/partial", "the key is 1234999", ["1234567"], {}, 4 / 7),
        ("longctx/exact", "the key is 1234999", ["1234567"], {}, 0.0),
        ("longctx/exact", "key 1234567.", ["1234567"], {}, 1.0),
        ("niah/rouge1", EXPECTED, [], {"needle": NEEDLE}, 24 / 33),
        ("niah/recall", EXPECTED, [EXPECTED], {}, 1.0),
        ("niah/recall", EXPECTED[:-1], [EXPECTED], {}, 10 / 11),
        ("niah/keyword", "in Dolores Park", ["Dolores Park"], {"needle": NEEDLE}, 1.0),
        ("niah/keyword", "kitten", ["absent"], {"needle": "sitting"}, 0.2 * (1 - 3 / 7)),
        ("convqa/f1", "2 dogs", ["two dogs"], {}, 1.0),
        ("convqa/f1", "a blue bike", ["the blue car"], {}, 0.5),
        ("convqa/f1", "c, x", ["x y, c"], {}, 0.8),
        ("convqa/locomo", "c, x", ["x y, c"], {"category": 1}, 5 / 6),
        ("convqa/locomo", "Rome, Berlin", ["Paris, Rome"], {"category": 1}, 0.5),
        ("contains_all", "north and east", ["north", "south", "east", "west"], {}, 0.5),
        ("contains_any", "north and east", ["north", "south", "east", "west"], {}, 1.0),
    ],
)
def test_the_cards_examples(metric: str, prediction: str, answers: list[str], info: dict[str, Any], wanted: float):
    assert score(metric, prediction, *answers, **info) == pytest.approx(wanted, abs=1e-6)


def test_zeroscrolls_rouge_takes_the_geometric_mean_of_means():
    rouge = get_metric("zeroscrolls/rouge")
    asked = [("exact match example", ["exact match example"]), ("hello there", ["hello", "hi there"])]
    asked.append(("general kenobi", ["commander kenobi"]))
    scores = [rouge(prediction, query(rouge.name, *answers)) for prediction, answers in asked]
    means = {kind: 100 * sum(each[kind] for each in scores) / 3 for kind in scores[0]}
    assert means == pytest.approx({"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222}, abs=1e-3)
    assert rouge.aggregate(scores) == pytest.approx(55.8136, abs=1e-3)


def test_loogle_cloze_counts_masks_over_all_questions():
    exact, partial = get_metric("loogle/cloze_exact"), get_metric("loogle/cloze_partial")
    asked = query("", '{"<mask-0>": "Bob Hope", "<mask-1>": "Rome"}')
    answers = ['{"<mask-0>": "Bob", "<mask-1>": "Rome"}', "no dictionary", "__import__('os').getcwd()"]
    assert [exact(answer, asked) for answer in answers] == [
        {"hits": hits, "masks": 2.0} for hits in (1.0, 0.0, 0.0)
    ]  # fmt: skip
    assert partial(answers[0], asked) == {"hits": 2.0, "masks": 2.0}
    other = exact('{"m": "x"}', query("", '{"m": "x"}'))
    assert exact.aggregate([exact(answers[0], asked), other]) == pytest.approx(100 * 2 / 3)


def test_a_rouge_recall_rewards_what_is_long():
    assert score("loogle/rouge", "a b c", "a b")["rouge1"] == 1.0


def test_the_gold_answers_of_real_exams_score_one():
    for name in ("coursera", "quality", "gsm100", "topic_retrieval_longchat"):
        for line in benchmark_file(f"leval/{name}.jsonl").read_text(encoding="utf-8").splitlines():
            for answer in json.loads(line)["outputs"]:
                assert score("leval/exam", answer, answer, set=name) == 1.0, (name, answer)


def test_the_gold_summaries_and_answers_of_leval_score_one():
    for name, metric in (("gov_report_summ", "leval/rouge"), ("multidoc_qa", "leval/f1")):
        line = benchmark_file(f"leval/{name}.jsonl").read_text(encoding="utf-8").splitlines()[0]
        answer = json.loads(line)["outputs"][0]
        found = score(metric, answer, answer)
        assert found == (1.0 if metric == "leval/f1" else {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})


@pytest.mark.parametrize(
    ("metric", "answers", "info", "named"),
    [
        ("longbench/f1", [], {}, "answers"),
        ("longbench/classification", ["City"], {}, "classes"),
        ("longbench/retrieval", ["3"], {}, "Paragraph"),
        ("longctx/partial", [""], {}, "empty key"),
        ("zeroscrolls/accuracy", ["none"], {}, "letter A to D"),
        ("zeroscrolls/exp_similarity", ["many"], {}, "percentage"),
        ("zeroscrolls/concordance", ["2, 4"], {}, "1 to n"),
        ("infinitebench/math_calc", ["1", "x"], {}, "whole numbers"),
        ("infinitebench/code_debug", ["name"], {}, "name, letter"),
        ("niah/rouge1", [], {}, "needle"),
        ("convqa/locomo", ["x"], {"category": 6}, "category"),
        ("leval/exam", ["x"], {"set": "sci_fi"}, "sci_fi"),
        ("loogle/cloze_exact", ["Bob"], {}, "dictionary"),
        ("scbench/repoqa", ["x"], {"needles": {"x": "x"}, "name": "x", "lang": "perl"}, "perl"),
    ],
)
def test_a_query_that_cannot_be_scored_is_refused(metric: str, answers: list[str], info: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        score(metric, "12 B", *answers, **info)


@pytest.mark.parametrize(
    ("metric", "module", "told"),
    [("longbench/rouge", "rouge", "kvfold"), ("longbench/code", "rapidfuzz.fuzz", "kvfold")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, metric: str, module: str, told: str):
    def missing(name: str) -> Any:
        assert name == module
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf'{module.split(".")[0]}: pip install "{told}\[eval\]"'):
        get_metric(metric).score("x", query(metric, "x"))
