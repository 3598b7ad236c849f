"""What models, files and methods are called or say is text in every page and table, never markup."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfold.evaluation.chart import memory_against_agreement, save_chart
from kvfold.evaluation.compare import CompareRow
from kvfold.evaluation.comparison import comparison_page
from kvfold.evaluation.escaping import code_cell, in_markdown, in_script
from kvfold.evaluation.report import make_report
from report_folders import write_folder

NASTY = "</script><script>owned()</script><!-- <b>&amp; | `x` \\ \n# $a$ ~~b~~ [c](d) \u2028\u2029\x1b[31m\ud800 *_"
texts = st.text(st.characters(codec=None), max_size=30) | st.text("|<>&`\\\n\r[]*_~$#\u2028\ud800 a")


class Read(HTMLParser):
    """The elements of a page, and the content of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


@given(texts)
@example(NASTY)
def test_json_in_a_script_is_the_same_data(text: str) -> None:
    data = {"text": text, text: [1.5, None, text]}
    said = in_script(data)
    assert json.loads(said) == data and said.encode("utf-8")
    assert not set(said) & set("<>&\u2028\u2029")


def test_json_in_a_script_has_no_nan() -> None:
    with pytest.raises(ValueError):
        in_script(float("nan"))


def rendered(cell: str) -> str:
    """What a reader of Markdown sees."""
    return html.unescape(re.sub(r"\\([\\|`*_~$\[\]])", r"\1", cell))


@given(texts)
@example(NASTY)
def test_a_cell_is_one_line_of_text(text: str) -> None:
    cell = in_markdown(text)
    assert len(cell.splitlines()) <= 1 and not set(cell) & set("<>")
    assert not set(map(ord, cell)) & {*range(0xD800, 0xE000), *range(32)}
    assert not re.search(r"(?:^|[^\\])(?:\\\\)*\|", cell)  # no bar that ends it
    printed = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)
    assert [c for c in rendered(cell) if c.isascii()] == [c for c in " ".join(printed.split()) if c.isascii()]


@given(texts)
@example(NASTY)
@example("a | b")
def test_code_in_a_cell(text: str) -> None:
    cell = code_cell(text)
    assert len(cell.splitlines()) <= 1 and not re.search(r"(?:^|[^\\])(?:\\\\)*\|", cell)
    if cell.startswith("`"):
        assert cell.count("`") == 2 and cell.endswith("`")


def rows(text: str) -> list[CompareRow]:
    """What `compare` found: everything that is text is `text`."""
    made = [CompareRow(name, budget, text, 1.0, 10, 10, 10, 1.0, 1.0, 0.5, 0.5) for name, budget in
            (("full", None), (text, 0.5))]  # fmt: skip
    return made


def test_pages_hold_the_scripts_that_they_hold_without_it(tmp_path: Path) -> None:
    """`compare --chart`, the charts of `bench` and `plan`, and the report."""
    pages: dict[str, list[str]] = {}
    for text in ("plain", NASTY):
        save_chart(memory_against_agreement(rows(text), text), tmp_path / "chart.html")
        pages.setdefault("chart", []).append((tmp_path / "chart.html").read_text(encoding="utf-8"))
        page = comparison_page(rows(text), text, text)
        pages.setdefault("compare", []).append(page.encode().decode())
    for name, (plain, nasty) in pages.items():
        ours, theirs = Read(plain), Read(nasty)
        assert (name, ours.tags) == (name, theirs.tags)
        assert "owned()" not in theirs.scripts[-1]  # our own code
        assert repr(NASTY) in repr(json.loads(theirs.scripts[-2]))


def test_a_report_has_no_markup_of_others(tmp_path: Path) -> None:
    name = NASTY.replace("\ud800", "")
    report = make_report([write_folder(tmp_path / name.replace("/", ""), models=[name])])
    page = Read(report.html())
    assert page.tags.count("script") == 3
    assert json.loads(page.scripts[1])["setups"][0]["model"] == name
    text = report.markdown()
    assert "<" not in text and text.encode("utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
