"""The report's numbers, against slow loops over the same files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from kvfold.evaluation.report import SweepReport, make_report, read_results
from kvfold.evaluation.report.cells import ALL_LENGTHS, ALL_TASKS, Cell, choices
from kvfold.evaluation.report.depths import depths_of, spots
from kvfold.evaluation.report.drilldown import drilldown, kept_digits
from kvfold.evaluation.report.page import page, page_data
from kvfold.evaluation.report.ranking import paired_differences, standings
from kvfold.evaluation.report.records import ratio_note
from kvfold.evaluation.report.strata import ReportContender
from report_folders import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("report") / "run", lengths=(256, 512), samples=6)


@pytest.fixture(scope="module")
def report(folder: Path) -> SweepReport:
    return make_report([folder])


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def chosen(lines: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    """Successful lines of a key."""
    return [line for line in lines if "error" not in line and all(line[k] == v for k, v in key.items())]


def cell(report: SweepReport, task: str, length: str, method: str, budget: float | int | None) -> Cell:
    (found,) = (
        c for c in report.cells if (c.task, c.length, c.contender) == (task, length, ReportContender(method, budget))
    )
    return found


def mean_score(lines: list[dict[str, Any]], name: str = "score") -> float:
    return fmean(query["scores"][name] for line in lines for query in line["queries"])


@pytest.mark.parametrize(("method", "budget"), [("full", None), ("h2o", 0.25), ("snapkv", 512)])
def test_scores_are_means_over_tasks_of_means_over_lengths(
    report: SweepReport, lines: list[Any], method: str, budget: Any
):
    key = {"method": method, "budget": budget}
    for task in ("niah", "ruler/vt"):
        expected = 100 * fmean(mean_score(chosen(lines, task=task, length=length, **key)) for length in (256, 512))
        assert cell(report, task, ALL_LENGTHS, method, budget).score == pytest.approx(expected)
    at_512 = 100 * fmean(mean_score(chosen(lines, task=task, length=512, **key)) for task in ("niah", "ruler/vt"))
    assert cell(report, ALL_TASKS, "512", method, budget).score == pytest.approx(at_512)
    own = chosen(lines, task="agreement", length=256, **key)
    kl = cell(report, "agreement", "256", method, budget)
    assert kl.score == pytest.approx(mean_score(own, "kl")) and not kl.higher
    assert cell(report, "agreement: top-1", "256", method, budget).score == pytest.approx(100 * mean_score(own, "top1"))


def test_memory_time_and_counts(report: SweepReport, lines: list[Any]):
    own = chosen(lines, task="niah", length=512, method="h2o", budget=0.5)
    found = cell(report, "niah", "512", "h2o", 0.5)
    assert found.ratio == pytest.approx(fmean(line["nbytes"] / line["full_nbytes"] for line in own))
    timing = [line["timing"] for line in own]
    seconds = sum(t["decode_seconds"] for t in timing) / sum(t["decode_tokens"] for t in timing)
    assert found.step == pytest.approx(1000 * seconds)
    assert (found.n, found.failed, found.partial) == (5, 1, True)
    assert not cell(report, "niah", "512", "snapkv", 0.5).partial


def test_fronts_are_what_no_complete_cell_beats(report: SweepReport):
    here = [c for c in report.cells if (c.task, c.length) == ("agreement", "512") and not c.partial]
    for flag, cost in (("front_memory", "ratio"), ("front_time", "step")):
        points = [(getattr(c, cost), c.score or 0.0) for c in here]
        beaten = [
            any(x <= cost and y <= kl and (x, y) != (cost, kl) for x, y in points) for cost, kl in points
        ]  # fmt: skip
        assert [getattr(c, flag) for c in here] == [not each for each in beaten]
        assert 1 < sum(beaten) < len(beaten) - 1
    assert not any(c.front_memory or c.front_time for c in report.cells if c.partial)


def test_intervals_hold_the_score(report: SweepReport):
    for each in report.cells:
        assert each.score is not None and each.low is not None and each.high is not None
        assert each.low <= each.score <= each.high or each.n < 8


def test_depths_are_means_of_their_examples(report: SweepReport, lines: list[Any]):
    found = spots(report.strata, depths_of(report.results))
    (spot,) = (
        s for s in found
        if (s.task, s.length, s.depth, s.contender) == ("niah", "256", 0.0, ReportContender("kvmerger", 0.1))
    )  # fmt: skip
    own = [chosen(lines, method="kvmerger", budget=0.1, example=f"niah-256-{i}") for i in (0, 5)]  # of 6, at depth 0
    assert spot.score == pytest.approx(100 * fmean(map(mean_score, own))) and spot.n == 2
    assert {s.task for s in found} == {ALL_TASKS, "niah"}


def test_many_depths_are_rounded(tmp_path: Path):
    folder = write_folder(tmp_path / "run", lengths=(256,), samples=20, tasks=("niah",))
    path = folder / "examples.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    moved = [line | {"info": {"depth": (i + 0.5) / 20}} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in moved), encoding="utf-8")
    depths = set(depths_of(read_results([folder])).values())
    assert depths <= {i / 10 for i in range(11)} and len(depths) >= 10


def test_a_method_without_a_budget_is_ranked(tmp_path: Path):
    folder = write_folder(tmp_path / "run", lengths=(256,), samples=4, tasks=("niah",), failures=False)
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    plain = [line | {"method": "kivi", "budget": None} for line in lines if line["budget"] == 0.5]
    kept = {line["example"]: line for line in plain if line["method"] == "kivi"}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *kept.values()]), encoding="utf-8")
    report = make_report([folder])
    (rank,) = (
        s for s in standings(report.strata, report.cells)
        if s.cell.contender == ReportContender("kivi", None) and (s.cell.task, s.cell.length) == ("niah", ALL_LENGTHS)
    )  # fmt: skip
    assert (rank.rank, rank.p) == (1, None) and rank.loss is not None
    assert "| kivi | - |" in report.markdown()


def test_paired_differences_add_up_to_the_difference_of_the_averages(report: SweepReport):
    one, other = ReportContender("kvmerger", 0.25), ReportContender("streamingllm", 0.25)
    for choice in choices(report.strata):
        total = sum(paired_differences(choice, one, other))
        mine, theirs = (cell(report, choice.task, choice.length, c.method, c.budget).score for c in (one, other))
        assert mine is not None and theirs is not None
        assert total == pytest.approx(mine - theirs)


def test_an_example_weighs_in_the_test_as_in_the_average(tmp_path: Path):
    """By its questions, or by its tokens where the metric pools those."""
    folder = write_folder(tmp_path / "run", lengths=(256,), samples=5, tasks=("ruler/vt", "agreement"), failures=False)
    for name in ("examples.jsonl", "results.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            number = int(line["example"].rsplit("-", 1)[1])
            line["queries"] = line["queries"] * (1 + 3 * (number % 2))
            for each in line["queries"]:
                if each.get("metric") == "agreement":
                    each["metric"] = "perplexity"
                if "tokens" in each.get("scores", ()):
                    each["scores"] = each["scores"] | {"tokens": 10 ** (number % 3)}
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = make_report([folder])
    one, other = ReportContender("kvmerger", 0.25), ReportContender("streamingllm", 0.25)
    seen = []
    for choice in choices(report.strata):
        total = sum(paired_differences(choice, one, other))
        mine, theirs = (cell(report, choice.task, choice.length, c.method, c.budget).score for c in (one, other))
        assert mine is not None and theirs is not None
        expected = math.log(mine / theirs) if choice.unit == "perplexity" else mine - theirs
        assert total == pytest.approx(expected) and total
        seen.append(choice.unit)
    assert set(seen) == {"score", "perplexity"}


def test_the_strong_win_and_the_weak_are_told_apart(tmp_path: Path):
    report = make_report([write_folder(tmp_path / "run", lengths=(512,), samples=40, tasks=("niah", "agreement"))])
    ranks = [s for s in standings(report.strata, report.cells) if s.cell.contender.budget == 0.5]
    for task, length in ((ALL_TASKS, ALL_LENGTHS), ("agreement", "512")):
        here = [s for s in ranks if (s.cell.task, s.cell.length) == (task, length)]
        assert [s.rank for s in here] == [1, 2, 3, 4, 5]
        scores = [s.cell.score for s in here]
        assert scores == sorted(scores, reverse=task == ALL_TASKS)
        assert here[0].p is None and here[-1].cell.contender.method == "streamingllm"
        assert here[-1].p is not None and here[-1].p < 0.01 and here[-1].loss is not None and here[-1].loss > 0


def test_markdown_names_the_protocol_above_every_table(report: SweepReport):
    text = report.markdown()
    blocks = text.split("\n\n")
    tables = [i for i, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) == 2  # all lengths, and by length
    assert all("rotocol agnostic" in blocks[i - 1] for i in tables)
    assert r"snapkv(window=32) \| kivi(bits=2)" in text
    rows = [line.replace(r"\|", "").count("|") for line in blocks[tables[0]].splitlines()]
    assert len(set(rows)) == 1 and len(rows) == 2 + 1 + 5 * 4
    h2o = next(line for line in text.splitlines() if line.startswith("| h2o | 25 %"))
    assert h2o.endswith("| 0.250 | 30 | 6 |") and "†" in h2o


def test_ratios_of_a_full_cache_that_had_grown_are_said_to_be_too_small(report: SweepReport):
    records = report.results.records
    assert ratio_note(records) == "" and "too small" not in report.markdown()
    grown = [replace(r, full_nbytes=r.full_nbytes * 5 // 4) if r.method == "h2o" else r for r in records]
    assert "up to 25.0 % larger" in ratio_note(grown)
    results = replace(report.results, records=tuple(grown))
    later = replace(report, results=results)
    assert ratio_note(grown) in later.markdown()
    data = page_data(results, report.strata, report.cells, [], [])
    assert data["caveat"] == ratio_note(grown) and data["caveat"] in page(data)


def test_perplexity_is_pooled_by_its_metric(tmp_path: Path):
    folder = write_folder(tmp_path / "run", lengths=(256,), samples=4, tasks=("agreement",))
    path = folder / "examples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"agreement", "', '"text", "').replace(
        '"metric": "agreement"', '"metric": "perplexity"'), encoding="utf-8")  # fmt: skip
    path = folder / "results.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"task": "agreement"', '"task": "text"'), encoding="utf-8")
    report = make_report([folder])
    full = cell(report, "text", "256", "full", None)
    assert full.score == pytest.approx(2.718281828**2) and full.unit == "perplexity" and not full.higher
    assert not [c for c in report.cells if c.task == ALL_TASKS]


def test_texts_beyond_the_limit_are_left_out_and_their_scores_stay(report: SweepReport):
    setups = list(report.strata.samples)
    everything = drilldown(report.results, report.strata, setups)
    assert all(example["context"] is not None for example in everything["examples"])
    little = drilldown(report.results, report.strata, setups, limit=40_000)
    shown = [example["context"] is not None for example in little["examples"]]
    assert any(shown) and not all(shown) and len(little["rows"]) == len(report.results.records)
    hidden = [row for row in little["rows"] if little["examples"][row["example"]]["context"] is None]
    assert all(a["prediction"] is None and a["scores"] for row in hidden for a in row.get("answers", []))
    assert sum(map(len, little["contexts"])) <= 40_000


def test_kept_shares_as_digits():
    assert kept_digits([0.0, 0.5, 1.0, 1.2]) == "0izz"
