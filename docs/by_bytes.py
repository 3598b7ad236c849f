"""README's first picture and benchmarks/bytes.md: KL against bytes, of what `benchmarks/bytes.py` measured."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.report.charts import COLORS, REFERENCE

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/results/bytes"
PAGE, PICTURE = ROOT / "benchmarks/bytes.md", ROOT / "docs/bytes.svg"
MODELS = ("smollm2-135m-instruct", "gemma3-270m")
SHARES = (0.25, 0.125, 0.0625, 0.03125)
TOKENS, BITS, BOTH = "tokens alone", "bits alone", "both"
RESIDUAL = 128
"""Tokens that kivi keeps as they are."""
KVFOLD, CODES = "kvfold", "kvfold | turboquant(bits=4, basis='channels')"
HEAD = """# KL against bytes

A document's first {context:,} tokens are read and compressed; its next 64 are fed in one pass, and every next-token
distribution is compared with the full cache's: mean KL in nats a token [95 % bootstrap interval over {documents}
documents]. The model runs in {dtype}. Bytes are those of the layers on pages, everything in them included (codes,
scales, bases, positions, columns, page tables), over what float16 takes for the same tokens; sliding windows, which
none of these touches, are in the last column, over the same. A method has the largest budget whose bytes, as `kvfold
plan` counts them, fit the share, in pages of 16 tokens; what it then holds is in the table, and may be a little more. A
format alone takes what it takes. Behind `kivi`, which keeps its last 128 tokens as they are, budgets under that are
left out. `python docs/build.py` makes this page of `benchmarks/results/bytes`, which these commands fill:
"""


def family(name: str) -> str:
    """What a method saves: tokens, bits, or both."""
    stages = [stage.strip().partition("(")[0] for stage in name.split("|")]
    coded = any(stage in ("fp8", "kivi", "turboquant", "zipcache", "kvquant", "mustafar") for stage in stages)
    return BOTH if coded and len(stages) > 1 else BITS if coded else TOKENS


def summaries() -> dict[str, dict[str, Any]]:
    """What was measured, by model, without what lies in kivi's residual alone: no code is there."""
    found = {model: json.loads((FOLDER / model / "summary.json").read_text(encoding="utf-8")) for model in MODELS}
    return {
        model: {key: one for key, one in cells.items() if "kivi" not in one["method"] or one["tokens"] > RESIDUAL}
        for model, cells in found.items()
    }


def best(cells: Mapping[str, Any], share: float, kind: str, but: Sequence[str] = ()) -> dict[str, Any] | None:
    """The least KL of a family at a share; of formats alone that of those which fit it."""
    fitting = [
        one
        for one in cells.values()
        if family(one["method"]) == kind
        and one["method"] not in but
        and (one["share"] == share or (one["share"] is None and one["bytes"] <= share))
    ]
    return min(fitting, key=lambda one: one["kl"], default=None)


def page() -> str:
    """The tables of both models, and the commands."""
    found = summaries()
    about = {model: json.loads((FOLDER / model / "run.json").read_text(encoding="utf-8")) for model in MODELS}
    documents = " and ".join(f"{max(one['documents'] for one in cells.values())}" for cells in found.values())
    first = about[MODELS[0]]
    parts = [HEAD.format(context=first["context"], documents=documents, dtype=first["dtype"])]
    parts.append("```\n" + "\n".join(line for one in about.values() for line in one["commands"]) + "\n```\n")
    for model, cells in found.items():
        parts.append(f"## {model}\n")
        parts.append("\n".join(chosen(cells)) + "\n")
        parts.append("\n".join(rows(cells)) + "\n")
    return "\n".join(parts)


def chosen(cells: Mapping[str, Any]) -> Iterator[str]:
    """The best of each family at each share."""
    yield "| bytes | best of tokens alone, published | `kvfold` | best of bits alone that fits | best of both |"
    yield "| ---: | --- | --- | --- | --- |"
    for share in SHARES:
        ones = [
            best(cells, share, TOKENS, (KVFOLD,)), cells.get(f"{KVFOLD}@{share}"), best(cells, share, BITS),
            best(cells, share, BOTH),
        ]  # fmt: skip
        said = ["-" if one is None else f"{code_cell(one['method'])} {one['kl']:.3f}" for one in ones]
        yield f"| {share:.2%} | " + " | ".join(said) + " |"


def in_readme(text: str) -> str:
    """README.md's text with the numbers of its table of bytes as measured: one model's columns after the other's."""
    found = list(summaries().values())

    def ours(name: str) -> Iterator[dict[str, Any] | None]:
        return (cells.get(f"{name}@{share}") for cells in found for share in SHARES)

    def theirs(kind: str) -> Iterator[dict[str, Any] | None]:
        own = {one["method"] for cells in found for one in cells.values() if is_ours(one["method"])}
        return (best(cells, share, kind, () if kind == BITS else own) for cells in found for share in SHARES)

    lines = text.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("| bytes of float16 |")) + 2
    for i, ones in enumerate((ours(CODES), ours(KVFOLD), theirs(TOKENS), theirs(BOTH), theirs(BITS)), at):
        label = re.match(r"\| (.*?[^\\]) \|", lines[i])
        assert label is not None, lines[i]
        numbers = ["-" if one is None else f"{one['kl']:.3f}" for one in ones]
        lines[i] = f"| {label[1]} | {' | '.join(numbers)} |\n"
    return "".join(lines)


def is_ours(name: str) -> bool:
    """Whether a method is the library's own, or stands on a basis that is."""
    return name.startswith(KVFOLD) or "basis" in name


def rows(cells: Mapping[str, Any]) -> Iterator[str]:
    """All methods, by share and KL."""
    yield "| share | method | KL [95 %] | equal tokens | tokens a head | bytes of float16 | windows beside |"
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: |"
    for one in sorted(cells.values(), key=lambda one: (-(one["share"] or 2.0), one["kl"])):
        share = "its own" if one["share"] is None else f"{one['share']:.2%}"
        yield (
            f"| {share} | {code_cell(one['method'])} | {one['kl']:.4f} [{one['kl_low']:.4f}, {one['kl_high']:.4f}] | "
            f"{one['top1']:.3f} | {one['tokens']:.0f} | {one['bytes']:.4f} | {one['windows']:.3f} |"
        )


def picture() -> Any:
    """KL over bytes on both models: methods that drop tokens as lines, formats alone as points, and both together."""
    import altair as alt

    kinds = {
        "kvfold, in 4 bits": COLORS[0], "kvfold": COLORS[1], "published: tokens alone": COLORS[2],
        "published: formats alone": COLORS[3], "published: tokens and bits": COLORS[4],
    }  # fmt: skip

    def kind(name: str) -> str | None:
        if name in (KVFOLD, CODES):
            return "kvfold" if name == KVFOLD else "kvfold, in 4 bits"
        if is_ours(name):
            return None
        names = {
            TOKENS: "published: tokens alone",
            BITS: "published: formats alone",
            BOTH: "published: tokens and bits",
        }
        return names[family(name)]

    points = [
        {"model": model, "who": kind(one["method"]), "method": one["method"], "bytes": one["bytes"], "kl": one["kl"]}
        for model, cells in summaries().items()
        for one in cells.values()
        if kind(one["method"])
    ]  # fmt: skip
    color = alt.Color(
        "who:N", scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
        legend=alt.Legend(title=None, orient="bottom", columns=5, symbolOpacity=1, labelFontSize=12, labelLimit=220),
    )  # fmt: skip

    def panel(model: str) -> Any:
        mine = alt.Chart(alt.Data(values=[point for point in points if point["model"] == model])).encode(
            x=alt.X("bytes:Q", title="bytes of a dense float16 cache", scale=alt.Scale(type="log", domain=[0.02, 0.6]),
                    axis=alt.Axis(format="~%", values=[0.03125, 0.0625, 0.125, 0.25, 0.5], grid=False)),
            y=alt.Y("kl:Q", title=None, scale=alt.Scale(type="log", domain=[0.001, 1], nice=False),
                    axis=alt.Axis(values=[0.001, 0.01, 0.1, 1], format="~g")),
            color=color, detail="method:N",
        )  # fmt: skip
        lines = mine.transform_filter("datum.who != 'published: formats alone'").mark_line(
            strokeWidth=2, point=alt.OverlayMarkDef(size=30)
        )
        alone = mine.transform_filter("datum.who == 'published: formats alone'").mark_point(
            size=60, filled=True, shape="diamond", opacity=1
        )
        return (lines + alone).properties(width=370, height=260, title=model)

    return alt.hconcat(*(panel(model) for model in MODELS), spacing=40).properties(
        title=alt.TitleParams(
            "KL divergence from the full cache (nats, lower is better) over what the cache holds", anchor="start",
            color=REFERENCE, fontSize=14,
        )
    )  # fmt: skip
