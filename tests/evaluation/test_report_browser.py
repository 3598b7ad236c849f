"""The page in a real browser: figures are drawn, filters and the drill-down work, nothing is fetched, nothing fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.report import make_report
from report_folders import METHODS, MODELS, NASTY, write_folder

pytestmark = pytest.mark.slow

DRAWN = "#figure-budget svg.marks, #figure-cost svg.marks, #figure-depth svg.marks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run = write_folder(
        folder / "run", models=MODELS, protocols=("agnostic", "aware"), lengths=(256, 1024), samples=5
    )  # fmt: skip
    (folder / "page.html").write_text(make_report([run]).html(), encoding="utf-8")
    return folder


@pytest.fixture(params=[(1280, "light"), (800, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, folder: Path) -> Iterator[Any]:
    """The page, drawn. At its end: no message in the console, no request but for the file itself."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    address = (folder / "page.html").as_uri()
    page.goto(address)
    drawn(page)
    yield page
    page.close()
    assert (said, asked) == ([], [address])


def drawn(page: Any) -> None:
    """Wait until every panel holds its chart, or says that there is none."""
    page.wait_for_function(
        "[...document.querySelectorAll('.chart')].length"
        " && [...document.querySelectorAll('.chart')].every(c => c.querySelector('svg.marks, .nothing'))"
    )


def marks(page: Any, section: str) -> int:
    """Points and boxes in a figure."""
    return page.locator(f"#{section} svg.marks .mark-symbol path, #{section} svg.marks .mark-rect path").count()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text(encoding="utf-8").splitlines()]


def test_figures_are_drawn_and_fit(page: Any):
    assert page.locator(DRAWN).count() == 3 + 2 + 1  # score, KL, top-1; memory, time; depth
    for section in ("figure-budget", "figure-cost", "figure-depth"):
        assert marks(page, section) > 20
    for box in page.locator(DRAWN).all():
        size = box.bounding_box()
        assert size["width"] > 250 and size["height"] > 150
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#ranking table").count() == 4
    assert page.locator("figcaption").all_inner_texts()
    assert all("protocol agnostic" in text for text in page.locator("figcaption").all_inner_texts())


def test_the_front_is_ringed(page: Any):
    data = json.loads(page.locator("#data").text_content())
    here = [
        c for c in data["cells"] if (c["setup"], c["task"], c["length"]) == (0, "average over tasks", "all lengths")
    ]
    rings = page.locator("[data-key='cost:memory'] svg.marks .mark-symbol path[fill='transparent']")
    assert rings.count() == sum(c["front_memory"] for c in here) > 1


def test_filters_act_on_figures_ranking_and_table(page: Any, folder: Path):
    before = {section: marks(page, section) for section in ("figure-budget", "figure-cost", "figure-depth")}
    page.locator("#methods label", has_text="streamingllm").click()
    drawn(page)
    assert all(marks(page, section) < count for section, count in before.items())
    assert "streamingllm" not in page.locator("#ranking").inner_text()
    page.locator("#budgets label", has_text="512 tokens").click()
    drawn(page)
    assert page.locator("#ranking table").count() == 3
    page.select_option("#task", "ruler/vt")
    page.select_option("#length", "1024")
    page.select_option("#protocol", "aware")
    page.select_option("#model", "org/base-model, float32")
    drawn(page)
    assert page.locator("#figure-depth .nothing").count() == 1
    assert all("protocol aware" in text for text in page.locator("figcaption").all_inner_texts())
    kept = [
        line for line in lines(folder, "results.jsonl")
        if line["task"] == "ruler/vt" and line["length"] == 1024 and line["protocol"] == "aware"
        and line["model"] == "org/base-model" and line["method"] != "streamingllm" and line["budget"] != 512
    ]  # fmt: skip
    assert page.locator("#count").inner_text().startswith(f"{len(kept)} results")
    page.select_option("#outcome", "failed")
    assert page.locator("#rows tbody tr").count() == sum("error" in line for line in kept) == 3
    page.select_option("#outcome", "all")
    page.fill("#search", "ruler/vt-1024-3")
    assert page.locator("#rows tbody tr").count() == 1 + 4 * 3


def test_the_numbers_shown_are_those_of_the_files(page: Any, folder: Path):
    page.select_option("#task", "niah")
    page.select_option("#length", "256")
    drawn(page)
    own = [
        line for line in lines(folder, "results.jsonl")
        if (line["model"], line["protocol"], line["task"], line["length"]) == (MODELS[0], "agnostic", "niah", 256)
        and line["budget"] == 0.25 and "error" not in line
    ]  # fmt: skip
    rows = page.locator("#ranking [data-budget='0.25'] tbody tr")
    shown = {row.locator("td").nth(1).inner_text(): row.locator("td").nth(2).inner_text() for row in rows.all()}
    assert set(shown) == set(METHODS)
    for method, text in shown.items():
        scores = [line["queries"][0]["scores"]["score"] for line in own if line["method"] == method]
        assert text.startswith(f"{100 * sum(scores) / len(scores):.1f} [")


def test_a_row_opens_its_example(page: Any, folder: Path):
    page.select_option("#task", "niah")
    page.fill("#search", "niah-1024-2")
    row = page.locator("#rows tbody tr", has_text="snapkv(window=32)").nth(1)
    row.click()
    (result,) = (
        line for line in lines(folder, "results.jsonl")
        if (line["model"], line["protocol"], line["example"]) == (MODELS[0], "agnostic", "niah-1024-2")
        and line["method"].startswith("snapkv(") and line["budget"] == 0.25
    )  # fmt: skip
    (example,) = (
        line for line in lines(folder, "examples.jsonl")
        if (line["model"], line["example"]) == (MODELS[0], "niah-1024-2")
    )  # fmt: skip
    panel = page.locator("#panel")
    assert panel.locator("h3").first.inner_text() == "niah-1024-2 · snapkv(window=32) | kivi(bits=2), 25 %"
    assert panel.locator(".context").text_content() == example["context"]
    assert NASTY in example["context"]  # so markup came through as text
    assert panel.locator(".prediction").text_content() == result["queries"][0]["prediction"]
    assert panel.locator(".gold").text_content() == example["queries"][0]["answers"][0]
    assert "".join(panel.locator(".context .answer").all_text_contents()) == example["queries"][0]["answers"][0]
    shares = [float(each) for each in panel.locator(".strip button").evaluate_all(
        "all => all.map(each => each.style.getPropertyValue('--share'))")]  # fmt: skip
    assert len(shares) == 64
    assert max(abs(a - b) for a, b in zip(shares, result["kept"], strict=True)) <= 0.5 / 35 + 1e-9
    panel.locator(".others button").first.click()
    assert panel.locator("h3").first.inner_text() == "niah-1024-2 · full"
    assert panel.locator("b, script", has_text="bold").count() == 0


def test_lower_is_better_for_agreement(page: Any):
    page.select_option("#task", "agreement")
    drawn(page)
    assert page.locator("#better").inner_text() == "Down and left"
    first = page.locator("#ranking tbody").first.locator("tr td:nth-child(3)").all_inner_texts()
    values = [float(text.split(" ")[0]) for text in first]
    assert values == sorted(values) and len(values) == len(METHODS)
    assert page.locator("#figure-budget .chart").count() == 2  # KL once, and top-1


def test_a_failure_says_why_and_the_keyboard_works(page: Any):
    page.select_option("#outcome", "failed")
    page.locator("#rows tbody tr").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#panel .error").inner_text() == f"ValueError: <b>no room</b> {NASTY}"
