"""The page of `kvfold compare`: what it says, that nothing in it is markup, and how it looks on a phone."""

from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.compare import CompareRow
from kvfold.evaluation.comparison import answers_of, comparison_page

NASTY = "</script><script>document.title = 'owned'</script><b>&amp;"


def row(method: str, budget: float | None, answer: str, ratio: float, top1: float, kl: float) -> CompareRow:
    timed = budget in (None, 0.2)
    return CompareRow(
        method, budget, answer, 3220 * ratio, int(1e8 * ratio), 10**8, 10**8, 8.0 if timed else None,
        14.0 if timed else None, top1, kl,
    )  # fmt: skip


ROWS = [
    row("full", None, "Cosmopolitan.", 1.0, 1.0, 0.0), row("kvfold", 0.2, "Cosmopolitan.", 0.207, 1.0, 0.003),
    row("h2o", 0.2, NASTY, 0.205, 0.9, 0.4), row("kvfold", 0.1, "Cosmopolitan.", 0.104, 1.0, 0.01),
    row("h2o", 0.1, "", 0.105, 0.7, 0.5),
]  # fmt: skip


def test_answers_by_who_gave_them():
    assert next(iter(answers_of(ROWS).items())) == ("Cosmopolitan.", ["full", "kvfold 0.2", "kvfold 0.1"])
    assert answers_of(ROWS)[""] == ["h2o 0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 360])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, width: int):
    path, said, asked = tmp_path / "page.html", [], []
    path.write_text(comparison_page(ROWS, f"a model of {NASTY}", f"Which hotel? {NASTY}"), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg.marks'))")
    assert page.title() == page.inner_text("h1") == f"a model of {NASTY}"
    assert page.inner_text("h2 >> nth=0") == f"Which hotel? {NASTY}"
    assert page.locator("dt").all_inner_texts() == ["full, kvfold 0.2, kvfold 0.1", "h2o 0.2", "h2o 0.1"]
    assert page.locator("dd").all_inner_texts() == ["Cosmopolitan.", NASTY, "(nothing)"]
    assert page.locator("tbody tr").count() == 5 and page.locator("b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # the table scrolls within its place
    ticks = page.locator(".chart >> nth=1").locator(".role-axis-label text").all_text_contents()
    assert "100%" in ticks and "50%" not in ticks and "60%" not in ticks  # an axis ends where the numbers do
    page.close()
    assert (said, asked) == ([], [path.as_uri()])
