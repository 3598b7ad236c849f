"""`kvfold compare` as one HTML page that opens without a network: question, answers, table, charts."""

from collections.abc import Sequence
from importlib.resources import files

from kvfold.evaluation.chart import agreement_panels
from kvfold.evaluation.compare import CompareRow
from kvfold.evaluation.escaping import in_html, in_script
from kvfold.evaluation.report.charts import REFERENCE, looks
from kvfold.evaluation.report.page import vega

HEAD = (
    "method",
    "budget",
    "tokens kept a head",
    "KV cache",
    "of full",
    "prompt read in",
    "tokens/s",
    "same tokens",
    "KL",
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
main {{ padding-top: 22px; padding-bottom: 40px; max-width: 960px; }}
.swatch {{ border-radius: 50%; }}
dl {{ margin: 10px 0; display: grid; gap: 4px 18px; }}
dt {{ color: var(--quiet); font-size: 13px; }}
dd {{ margin: 0 0 8px; overflow-wrap: anywhere; }}
@media (min-width: 640px) {{ dl {{ grid-template-columns: minmax(120px, 26%) 1fr; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="reading">Each method kept a part of the KV cache and answered from that. The full cache is what they are held
against.</p>
<h2>{question}</h2>
<dl>
{answers}
</dl>
<h2>What they kept, and how far that moves the model</h2>
<p class="reading">Same tokens and KL compare the next-token distributions with the full cache's, along its answer, in
nats. A budget's prompt is read by itself where it has a time; the other budgets share one reading.</p>
<div class="tables"><div><table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div></div>
<h2>Memory against agreement</h2>
<div class="panels"><div class="chart"></div><div class="chart"></div></div>
</main>
<script>
{vega}
</script>
<script type="application/json" id="specs">{specs}</script>
<script>
const specs = JSON.parse(document.getElementById("specs").textContent);
document.querySelectorAll(".chart").forEach((at, i) => vegaEmbed(at, specs[i], {{ actions: false, renderer: "svg" }}));
</script>
</body>
</html>
"""


def comparison_page(rows: Sequence[CompareRow], title: str, question: str | None) -> str:
    """The page. Whatever a model, a file or a method is called or says is text there, never markup."""
    grey = {"labelColor": REFERENCE, "titleColor": REFERENCE, "gridColor": REFERENCE, "gridOpacity": 0.25}
    config = {"background": "transparent", "view": {"stroke": None}, "axis": {**grey, "domainColor": REFERENCE},
              "title": {"color": REFERENCE, "fontSize": 13, "anchor": "start"}}  # fmt: skip
    specs = [{**panel.to_dict(), "config": config} for panel in agreement_panels(rows, width="container")]
    css = files("kvfold.evaluation.report") / "assets" / "page.css"
    return PAGE.format(
        title=in_html(title), question=in_html(question or "How the text goes on"),
        style=css.read_text(encoding="utf-8"), answers="\n".join(_answers(rows)),
        head="".join(f'<th{"" if name == "method" else " class=amount"}>{name}</th>' for name in HEAD),
        rows="\n".join(_rows(rows)), specs=in_script(specs), vega=vega(),
    )  # fmt: skip


def answers_of(rows: Sequence[CompareRow]) -> dict[str, list[str]]:
    """By answer, on one line, who gave it: methods with their budgets."""
    found: dict[str, list[str]] = {}
    for row in rows:
        who = row.method if row.budget is None else f"{row.method} {row.budget}"
        found.setdefault(" ".join(row.answer.split()), []).append(who)
    return found


def _answers(rows: Sequence[CompareRow]) -> list[str]:
    return [
        f"<dt>{in_html(', '.join(whose))}</dt><dd>{in_html(text) or '(nothing)'}</dd>"
        for text, whose in answers_of(rows).items()
    ]


def _rows(rows: Sequence[CompareRow]) -> list[str]:
    colors = looks(list(dict.fromkeys(row.method for row in rows)))
    made = []
    for row in rows:
        swatch = f'<span class="name"><i class="swatch" style="background:{colors[row.method][0]}"></i>'
        cells = (
            "" if row.budget is None else str(row.budget), f"{row.kept_tokens:,.0f}", f"{row.nbytes / 2**20:.1f} MiB",
            f"{row.ratio:.1%}", "" if row.prefill_seconds is None else f"{row.prefill_seconds:.1f} s",
            "" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:.1f}",
            f"{row.top1:.0%}", f"{row.kl:.3f}",
        )  # fmt: skip
        amounts = "".join(f'<td class="amount">{cell}</td>' for cell in cells)
        made.append(f"<tr><td>{swatch}{in_html(row.method)}</span></td>{amounts}</tr>")
    return made
