"""docs/methods says what the registry says, and its links lead somewhere."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from report_folders import write_folder

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "docs/build.py"))
PAGES = ROOT / "docs/methods"
LINK = re.compile(r"\]\(([^)#]+)")


def points():
    """A made-up curve of every method with a budget on two models."""
    return [
        BUILD["Point"](model, info.slug, budget, 0.3 - budget / 2, 0.2 - budget / 4, 0.4 - budget / 2, 0.9, budget)
        for model in ("one", "two")
        for info in BUILD["methods"]()
        if "budget" in info.options
        for budget in (0.1, 0.2, 0.5)
    ]


def test_pages_are_up_to_date():
    made = BUILD["pages"](BUILD["measured"]())
    assert sorted(made) == sorted(path.name for path in PAGES.glob("*.md")), "run: python docs/build.py"
    old = [name for name, text in made.items() if (PAGES / name).read_text(encoding="utf-8") != text]
    assert not old, f"{old} are not what the registry says; run: python docs/build.py"
    assert BUILD["MERGING"].read_text(encoding="utf-8") == BUILD["merging"](), "run: python docs/build.py"
    said = BUILD["README"].read_text(encoding="utf-8")
    assert said == BUILD["readme"](), "run: python docs/build.py"
    assert len(BUILD["ROW"].findall(said)) > 10
    assert BUILD["CONTRIBUTING"].read_text(encoding="utf-8") == BUILD["contributing"](), "run: python docs/build.py"


def test_every_method_has_a_page_and_links_lead_somewhere():
    made = BUILD["pages"]([])
    assert set(made) == {"README.md", *(f"{info.slug}.md" for info in BUILD["methods"]())}
    for name, text in made.items():
        links = [link for link in LINK.findall(text) if not link.startswith("https://")]
        assert links and not [link for link in links if not (PAGES / link).exists() and link not in made], name
    page = made["snapkv.md"]
    assert "https://arxiv.org/abs/2404.14469" in page and "tests/oracles/test_snapkv.py" in page
    assert "$$\ns_{h,t} = " in page and "| `window` | `32` | `int` |" in page
    assert 'kvfold.Cache(model, "snapkv", budget=0.25, window=32)' in page and "not measured yet" in page
    assert "kvfold calibrate headkv --model MODEL" in made["headkv.md"]


def test_formulas_survive_markdown():
    assert BUILD["github"](r"\operatorname{top}_b\{s\}\,c") == r"\mathrm{top}_b\lbrace s\rbrace \thinspace c"
    for info in BUILD["methods"]():
        eaten = re.findall(r"\\[^A-Za-z ]", BUILD["github"](info.formula))
        assert not eaten, f"{info.slug}: Markdown takes the backslash of {eaten}"


def test_a_curve_is_a_table_and_a_chart():
    made = points()
    page = BUILD["pages"](made)["h2o.md"]
    assert "| two | 20 % | 0.200 [0.150, 0.300] | 0.900 | 0.200 |" in page and "charts/h2o.svg" in page
    pytest.importorskip("altair")
    convert = pytest.importorskip("vl_convert")
    svg = convert.vegalite_to_svg(BUILD["chart"]("h2o", made).to_dict())
    assert svg.startswith("<svg") and "KL from full" in svg and len(svg) < 60_000
    assert (ROOT / "docs/agreement.svg").read_text() == convert.vegalite_to_svg(BUILD["overview"]().to_dict())
    bytes_too = BUILD["styled"](BUILD["BYTES"]["picture"]()).to_dict()
    assert (ROOT / "docs/bytes.svg").read_text() == convert.vegalite_to_svg(bytes_too)


def test_the_page_of_bytes_is_made_of_what_was_measured():
    made, found = BUILD["BYTES"]["page"](), BUILD["BYTES"]["summaries"]()
    assert (ROOT / "benchmarks/bytes.md").read_text(encoding="utf-8") == made, "run: python docs/build.py"
    family = BUILD["BYTES"]["family"]
    assert [family(name) for name in ("h2o", "kivi(bits=4)", "snapkv | kivi(bits=2)", "kvfold | windows")] == [
        "tokens alone", "bits alone", "both", "tokens alone",
    ]  # fmt: skip
    for cells in found.values():
        for one in cells.values():
            assert one["share"] is None or one["bytes"] <= 1.04 * one["share"], one
            assert 0 <= one["kl_low"] <= one["kl"] <= one["kl_high"]


def test_curves_are_read_from_a_result_folder(tmp_path):
    folder = write_folder(tmp_path / "curves", lengths=[1024], samples=4, tasks=["agreement"], failures=False)
    found = BUILD["measured"](folder)
    h2o = {point.budget: point for point in found if point.method == "h2o"}
    assert list(h2o) == [0.1, 0.25, 0.5, 512] and "full" not in {point.method for point in found}
    assert h2o[0.25].ratio == pytest.approx(0.25) and h2o[0.25].low <= h2o[0.25].kl <= h2o[0.25].high
    assert h2o[0.25].top1 == pytest.approx(1 - h2o[0.25].kl / 2) and BUILD["measured"](tmp_path) == []


@pytest.mark.parametrize("said", [{"command": "last"}, {"commands": ["first", "last"]}])
def test_ablations_end_with_the_last_command(said, tmp_path, monkeypatch):
    one = {"documents": 2, "kl": 0.1, "kl_low": 0.0, "kl_high": 0.2, "top1": 0.9}
    text = json.dumps({**said, "model": "tiny", "summary": {"h2o@0.5": one}})
    (tmp_path / "ablation-h2o-tiny.json").write_text(text)
    monkeypatch.setitem(BUILD["ablations"].__globals__, "RESULTS", tmp_path)
    (info,) = (info for info in BUILD["methods"]() if info.slug == "h2o")
    parts = list(BUILD["ablations"](info))
    assert parts[-1] == "```sh\nlast\n```" and "| `h2o` | 0.1000 [0.0000, 0.2000] / 0.900 |" in parts[-2]


def test_the_length_of_the_curves_is_the_suites():
    suite = tomllib.loads((ROOT / "src/kvfold/evaluation/suites/curves.toml").read_text(encoding="utf-8"))
    words = f"{suite['lengths'][0]:,} tokens"
    (found,) = re.findall(r"`curves` \((.*?)\)", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), re.DOTALL)
    assert words in " ".join(found.split()) and words in BUILD["pages"](points())["h2o.md"].replace("\n", " ")


def test_docstrings_as_markdown():
    assert BUILD["markdown"]("a * b `x * y` <c> [d]") == r"a \* b `x * y` \<c> \[d\]"
    text = BUILD["wrapped"]("word " * 24 + "- no list, " + "word " * 22 + "1. nor here")
    assert not re.search(r"^(- |\d+\. )", text, re.MULTILINE) and r"\- no list" in text and r"1\. nor" in text
    assert BUILD["prose"]("One\n  line.\n\nTwo.") == "One line.\n\nTwo."


def test_rows_of_the_leaderboard():
    table = "| method | budget | niah |\n| --- | ---: | ---: |\n| h2o | 25 % | 5.0 |\n| full | - | 9.0 |\n"
    found = BUILD["leaderboard"](f"# L\n\n## m, aware\n\nWords.\n\n{table}\n\n## n, agnostic\n\n{table}")
    row = {"method": "h2o", "budget": "25 %", "niah": "5.0"}
    assert found["h2o"] == [{"suite": "m, aware"} | row, {"suite": "n, agnostic"} | row] and len(found) == 2
