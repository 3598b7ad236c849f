"""docs/methods: a page for each method, of what the registry says and of what was measured; tables of agreement.

    python docs/build.py

Text comes from each method's docstrings, formula and options from its `@method(...)`, curves from
`benchmarks/results/curves` and rows from `benchmarks/leaderboard.md`. Charts need altair; without it the old ones stay.
"""

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from inspect import getdoc
from pathlib import Path
from textwrap import fill
from typing import Any

from kvfold import artefacts
from kvfold.evaluation.report import make_report, read_results
from kvfold.evaluation.report.cells import ALL_LENGTHS
from kvfold.evaluation.report.markdown import budget_name
from kvfold.evaluation.report.records import ratio_note
from kvfold.files import write_whole
from kvfold.methods import MethodInfo, list_methods
from kvfold.testing import CONTRACTS

ROOT = Path(__file__).parents[1]
BYTES, PICTURES = (runpy.run_path(str(ROOT / f"docs/{name}.py")) for name in ("by_bytes", "pictures"))
chart, styled = PICTURES["chart"], PICTURES["styled"]
PAGES = ROOT / "docs/methods"
RESULTS, MERGING = ROOT / "benchmarks/results", ROOT / "benchmarks/merging.md"
AGREED = [RESULTS / f"merging-{model}.json" for model in ("smollm2-135m-instruct", "gemma3-270m")]
README, ROW = ROOT / "README.md", re.compile(r"^\| `([^`]+)` \|(?: \d+\.\d+ / \d\.\d+ \|)+$", re.MULTILINE)
CONTRIBUTING, EXAMPLE = ROOT / "CONTRIBUTING.md", ROOT / "src/kvfold/methods/snapkv.py"
OVERVIEW = ROOT / "docs/agreement.svg"
CURVES, LEADERBOARD = RESULTS / "curves", ROOT / "benchmarks/leaderboard.md"
DIFFERS = re.compile(r"\bDiffers from the (paper|code):\s")
SPELLED = {
    "{": "lbrace ", "}": "rbrace ", ",": "thinspace ", ":": "medspace ", ";": "thickspace ", "!": "negthinspace ",
    "|": "Vert ", "operatorname": "mathrm",
}  # fmt: skip
"""LaTeX whose backslash GitHub's Markdown takes away, or that it refuses, in words that it leaves alone."""
NOTATION = """In the formulas $A_{h,g,i,t}$ is the attention that query $i$ of query head $g$ in the group of KV head
$h$ gives to token $t$; $b$ is the budget, in tokens of a KV head, $n$ how many tokens there are, $K$ the tokens that
stay, $L$ layers, $H$ KV heads of a layer, $G$ query heads of a KV head, $D$ the head size, $q$, $k$ and $v$ a query, a
key and a value; $\\mathrm{top}_m(s)$ are the $m$ tokens with the highest scores. Letters in brackets in the tables of
options are those of the formulas."""
INDEX = """# Methods

Made by `python docs/build.py`, with the pages behind the names. `kvfold methods` prints the same list.

"""
MERGING_HEAD = """# Merging, and what it is measured against

A document's first 1,024, 1,536 or 2,048 tokens (in turn; WikiText-2 and L-Eval inputs) are read and compressed. Its
next 64 are fed in one pass, and every next-token distribution is compared with the full cache's: so methods act on the
prompt alone here, and `cam`, which merges only while it decodes, is StreamingLLM. `minicache` has no budget. The lowest
KL comes first. Bytes count columns and page tables, and the 64 tokens too; Gemma's sliding windows, which no method
touches, are in both. `python docs/build.py` makes the tables of `benchmarks/results/merging-*.json`."""


@dataclass(frozen=True)
class Point:
    """A method at a budget on one model: means over documents; `ratio` is bytes held over the full cache's."""

    model: str
    method: str
    budget: float | int
    kl: float
    low: float
    high: float
    top1: float
    ratio: float


def methods() -> list[MethodInfo]:
    """Those of kvfold itself."""
    return [info for info in list_methods() if info.cls.__module__.startswith("kvfold.")]


def measured(folder: Path = CURVES) -> list[Point]:
    """The curves of all methods; none where the sweep has not run."""
    if not (folder / "results.jsonl").is_file():
        return []
    found: dict[Any, dict[str, Any]] = {}
    for cell in make_report([folder]).cells:
        if cell.length == ALL_LENGTHS and cell.contender.budget is not None and cell.score is not None:
            found.setdefault((cell.setup.model, cell.contender), {})[cell.unit] = cell
    return [
        Point(model, one.method, one.budget, kl.score, kl.low, kl.high, units["top-1"].score / 100, kl.ratio)
        for (model, one), units in found.items()
        if (kl := units.get("KL")) is not None and "top-1" in units
    ]


@cache
def caveat(name: str) -> str:
    """What is to be said of the ratios of a folder of results, if anything."""
    folder = RESULTS / name
    return ratio_note(read_results([folder]).records) if (folder / "results.jsonl").is_file() else ""


def pages(points: Sequence[Point]) -> dict[str, str]:
    """All files by name, less the charts."""
    infos, rows = methods(), leaderboard(LEADERBOARD.read_text(encoding="utf-8"))
    head = ["method", "title", "arXiv", "kind", "keeps"]
    lines = [
        [f"[`{i.slug}`]({i.slug}.md)", cell(i.title), arxiv(i) or "-", i.kind, cell(markdown(i.summary))] for i in infos
    ]
    found = {"README.md": f"{INDEX}{table(head, lines)}\n\n{NOTATION}\n"}
    return found | {f"{info.slug}.md": page(info, points, rows.get(info.slug, [])) for info in infos}


def page(info: MethodInfo, points: Sequence[Point], rows: Sequence[Mapping[str, str]]) -> str:
    """A method's page."""
    name = info.cls.__module__.rpartition(".")[2]
    links = [
        arxiv(info), f"kind: {info.kind}", f"[source](../../src/kvfold/methods/{name}.py)",
        f"[test against the paper](../../tests/oracles/test_{name}.py)", "[all methods](README.md)",
    ]  # fmt: skip
    about, *differs = DIFFERS.split(getdoc(info.cls) or "", maxsplit=1)
    parts = [f"# {info.title}", " · ".join(filter(None, links)), lead(info), "## What it keeps, and when", prose(about)]
    if info.formula:
        parts += ["## Formula", *(f"$$\n{github(line)}\n$$" for line in info.formula.splitlines())]
        parts += ["What the letters are: [notation](README.md)."]
    if differs:
        parts += [f"## Where it differs from the {differs[0]}", prose(differs[1][:1].upper() + differs[1][1:])]
    parts += ["## Options", options(info), "## Use", *usage(info), "## Measured", *curve(info, points)]
    return "\n\n".join([*parts, *standing(rows), *ablations(info)]) + "\n"


def ablations(info: MethodInfo) -> Iterator[str]:
    """A method's options, one changed at a time: what `benchmarks/agreement.py` measured of them."""
    for path in sorted(RESULTS.glob(f"ablation-{info.slug}-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        yield f"## What its options do: {found['model']}"
        yield from agreement(found, lambda pair: ("(" in pair[0], pair[0]))


def merging() -> str:
    """The page of all merging methods and what they are measured against."""
    parts = [MERGING_HEAD]
    for path in AGREED:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## {found['model']}"]
        parts += agreement(found, lambda pair: sum(one["kl"] for one in pair[1].values()), bytes_too=True)
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """README.md, the numbers in its table of methods as measured: one model's columns after the other's."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in AGREED]

    def row(line: re.Match[str]) -> str:
        cells = [one["summary"][f"{line[1]}@{budget}"] for one in found for budget in (0.5, 0.35, 0.2, 0.1)]
        return f"| `{line[1]}` | " + " | ".join(f"{cell['kl']:.3f} / {cell['top1']:.2f}" for cell in cells) + " |"

    return BYTES["in_readme"](ROW.sub(row, README.read_text(encoding="utf-8")))


def contributing() -> str:
    """CONTRIBUTING.md: its example is the method that ships, its table what the contracts ask."""
    source, text = EXAMPLE.read_text(encoding="utf-8"), CONTRIBUTING.read_text(encoding="utf-8")
    rows = [[f"`{each.__name__}`", cell(" ".join((getdoc(each) or "").split()))] for each in CONTRACTS]
    promises = f"<!-- contracts -->\n{table(['contract', 'what it asks'], rows)}\n<!-- end -->"
    text = re.sub(r"<!-- contracts -->.*?<!-- end -->", lambda _: promises, text, flags=re.DOTALL)
    return re.sub(r"```python\n.*?```", lambda _: f"```python\n{source}```", text, count=1, flags=re.DOTALL)


def overview() -> Any:
    """README.md's table as a chart."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in AGREED]
    return PICTURES["overview"](found, [row[1] for row in ROW.finditer(README.read_text(encoding="utf-8"))])


def agreement(
    found: Mapping[str, Any], order: Callable[[tuple[str, dict[str, Any]]], Any], bytes_too: bool = False
) -> Iterator[str]:
    """What `benchmarks/agreement.py` wrote, as a table, and its command."""
    cells: dict[str, dict[str, Any]] = {}
    for name, one in found["summary"].items():
        cells.setdefault(name.rpartition("@")[0], {})[name.rpartition("@")[2]] = one
    budgets = sorted({budget for row in cells.values() for budget in row}, key=float, reverse=True)
    documents = max(one["documents"] for one in found["summary"].values())

    def shown(one: Mapping[str, Any]) -> str:
        share = f" / {one['bytes_of_full']:.3f}" if bytes_too else ""
        return f"{one['kl']:.4f} [{one['kl_low']:.4f}, {one['kl_high']:.4f}] / {one['top1']:.3f}{share}"

    also = " / bytes of a dense cache" if bytes_too else ""
    yield wrapped(
        f"Mean KL from the full cache [95 % bootstrap interval] / equal greedy tokens{also} over {documents} "
        "documents, without a question in the text:"
    )
    yield table(
        ["method", *(budget_name(float(budget)) for budget in budgets)],
        [
            [f"`{cell(name)}`", *(shown(row[budget]) for budget in budgets)]
            for name, row in sorted(cells.items(), key=order)
        ],
    )
    yield f"```sh\n{(found.get('commands') or [found['command']])[-1]}\n```"


def arxiv(info: MethodInfo) -> str:
    """A link to the paper."""
    return f"[arXiv:{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""


def lead(info: MethodInfo) -> str:
    """The first line of the method's file, less its name and paper."""
    text = (sys.modules[info.cls.__module__].__doc__ or "").strip().splitlines()[0].rstrip(".")
    text = re.sub(r"\s*\(arXiv:[^)]*\)$", "", text).split(": ", 1)[-1]
    return f"**{markdown(text[:1].upper() + text[1:])}.**"


def prose(text: str) -> str:
    """The paragraphs of a docstring as Markdown."""
    return "\n\n".join(wrapped(markdown(" ".join(part.split()))) for part in re.split(r"\n\s*\n", text.strip()))


def markdown(text: str) -> str:
    """Text whose code is in backticks, with nothing outside of them that Markdown would take for markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*<\[\]])", r"\\\1", part) for part in parts)


def wrapped(text: str) -> str:
    """Lines of 120; one that begins as a list or a heading would is told not to be one."""
    lines = fill(text, 120, break_long_words=False, break_on_hyphens=False)
    return re.sub(r"^(?:([-+#>])(?=\s)|(\d+)([.)])(?=\s))", r"\2\\\1\3", lines, flags=re.MULTILINE)


def cell(text: str) -> str:
    """Text that can't end a cell."""
    return text.replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def github(formula: str) -> str:
    """LaTeX that survives GitHub's Markdown."""
    return re.sub(r"\\([{},:;!|]|operatorname(?![A-Za-z]))", lambda found: "\\" + SPELLED[found[1]], formula)


def options(info: MethodInfo) -> str:
    """Names, defaults, types and meanings."""
    if not info.options:
        return "None."
    types = {o.name: o.type if isinstance(o.type, str) else spelled(o.type) for o in fields(info.cls)}
    rows = [
        [f"`{name}`", f"`{cell(repr(value))}`", f"`{cell(types[name])}`", cell(markdown(info.meanings[name]))]
        for name, value in info.options.items()
    ]
    return table(["option", "default", "type", "what it is"], rows)


def spelled(kind: Any) -> str:
    """A type as it is written."""
    return kind.__name__ if type(kind) is type else str(kind).replace("kvfold.budgets.", "").replace("typing.", "")


SHOWN_ON = {"windows": "gemma3-270m"}
"""Models on which methods are shown that do nothing on the other one."""
CALIBRATED_AS = {"lserve": ("duoattention", "With `static_sparsity` above 0 it")}
"""Methods that go by another one's calibration, and what of them needs it."""


def usage(info: MethodInfo) -> Iterator[str]:
    """The command line and Python, with an option at its default."""
    given = {"budget": 0.25} if "budget" in info.options else {}
    own = (n for n, v in info.options.items() if n != "budget" and isinstance(v, int | float) and type(v) is not bool)
    if (name := next(own, None)) is not None:
        given[name] = info.options[name]
    words = [f"--{name} {value}" if name == "budget" else f"-o {name}={value}" for name, value in given.items()]
    if (model := SHOWN_ON.get(info.slug, "smollm2-135m-instruct")) != "smollm2-135m-instruct":
        words.insert(0, f"--model {model}")
    command = " ".join([f"kvfold run --file document.txt --method {info.slug}", *words])
    call = ", ".join([f'model, "{info.slug}"', *(f"{name}={value!r}" for name, value in given.items())])
    yield f'```sh\n{command} --ask "Who stole the stone?"\n```'
    yield (
        "```python\nfrom pathlib import Path\n\nimport kvfold\n\n"
        f'model, tokenizer = kvfold.load("{model}")\n'
        'text = Path("document.txt").read_text(encoding="utf-8")\n'
        f'inputs = tokenizer(text, return_tensors="pt")\ncache = kvfold.Cache({call})\n'
        "output = model.generate(**inputs, past_key_values=cache, max_new_tokens=32)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))\n```'
    )
    if "calibration" in info.options:
        slug, it = CALIBRATED_AS.get(info.slug, (info.slug, "It"))
        ships = sorted(path.stem for path in artefacts.shipped() if path.parent.name == slug)
        for_whom = "the bundled models" if len(ships) > 1 else "".join(ships)
        some = f"Those of {for_whom} ship; for another" if ships else "None ship"
        it = 'With `basis="measured"` it' if "basis" in info.options else it
        yield f"{it} needs numbers that are measured on the model once. {some}:"
        yield f"```sh\n{artefacts.command(slug, 'MODEL')}\n```"


def curve(info: MethodInfo, points: Sequence[Point]) -> Iterator[str]:
    """The chart and the table of a method against the full cache."""
    own = [point for point in points if point.method == info.slug]
    if not own:
        if "budget" in info.options:
            yield "Against the budget: not measured yet (`kvfold eval --suite curves --out benchmarks/results/curves`)."
        return
    yield wrapped(
        "Agreement with the full cache on running text (suite `curves`: 1,200 tokens of which the last 32 are forced, "
        "means over documents with 95 % bootstrap intervals, KL in nats, lower is better; top-1 is the share of equal "
        "greedy tokens; bytes are those of the whole cache, sliding windows included). Dashed: the median of all. "
        + caveat("curves")
    )
    yield f"![KL, top-1 and bytes against the budget](charts/{info.slug}.svg)"
    head = ["model", "budget", "KL", "top-1", "KV bytes of full"]
    rows = [
        [p.model, budget_name(p.budget), f"{p.kl:.3f} [{p.low:.3f}, {p.high:.3f}]", f"{p.top1:.3f}", f"{p.ratio:.3f}"]
        for p in own
    ]
    yield table(head, rows)


def leaderboard(text: str) -> dict[str, list[dict[str, str]]]:
    """By method, its row in each table of the leaderboard, with what stands above the table."""
    found: dict[str, list[dict[str, str]]] = {}
    for section in text.split("\n## ")[1:]:
        title, _, rest = section.partition("\n")
        tables = [re.split(r"\s+\|\s+", line.strip("| ")) for line in rest.splitlines() if line.startswith("| ")]
        for row in tables[1:]:
            if len(row) == len(tables[0]) and not row[0].startswith("---"):
                found.setdefault(row[0].replace("\\", ""), []).append(
                    {"suite": title} | dict(zip(tables[0], row, strict=True))
                )
    return found


def standing(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A method's rows of the leaderboard as one table."""
    if not rows:
        yield "Not in the [leaderboard](../../benchmarks/leaderboard.md) yet."
        return
    yield wrapped(f"In the [leaderboard](../../benchmarks/leaderboard.md). {caveat('leaderboard')}".strip())
    head = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "method"]
    yield table(head, [[row.get(name, "") for name in head] for row in rows])


def main() -> None:
    points = measured()
    made = pages(points)
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        write_whole(PAGES / name, text.encode())
    write_whole(MERGING, merging().encode())
    write_whole(BYTES["PAGE"], BYTES["page"]().encode())
    write_whole(README, readme().encode())
    write_whole(CONTRIBUTING, contributing().encode())
    drawn = draw(points, [name.removesuffix(".md") for name in made]) if points else 0
    print(f"{len(made)} pages, {drawn} charts in {PAGES.relative_to(ROOT)}")


def draw(points: Sequence[Point], among: Sequence[str]) -> int:
    """Write the charts of those methods that have points; how many."""
    try:
        import vl_convert
    except ImportError:
        print("no charts: they need altair and vl-convert-python (pip install 'kvfold[plot]')", file=sys.stderr)
        return 0
    (PAGES / "charts").mkdir(exist_ok=True)
    write_whole(OVERVIEW, vl_convert.vegalite_to_svg(overview().to_dict()).encode())
    write_whole(BYTES["PICTURE"], vl_convert.vegalite_to_svg(styled(BYTES["picture"]()).to_dict()).encode())
    slugs = [slug for slug in dict.fromkeys(point.method for point in points) if slug in among]
    for slug in slugs:
        svg = vl_convert.vegalite_to_svg(chart(slug, points).to_dict())
        write_whole(PAGES / "charts" / f"{slug}.svg", svg.encode())
    return len(slugs)


if __name__ == "__main__":
    main()
