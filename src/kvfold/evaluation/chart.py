"""Charts of results: memory against agreement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.evaluation.compare import CompareRow
from kvfold.evaluation.escaping import in_script
from kvfold.evaluation.report.charts import looks
from kvfold.evaluation.report.page import can_draw, vega
from kvfold.files import check_regular, write_whole

SUFFIXES = (".html", ".png", ".svg", ".json")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvfold</title>
<link rel="icon" href="data:,">
</head>
<body>
<div id="chart"></div>
<script>
{vega}
</script>
<script type="application/json" id="spec">{spec}</script>
<script>
vegaEmbed("#chart", JSON.parse(document.getElementById("spec").textContent), {{ mode: "vega-lite" }});
</script>
</body>
</html>
"""


def check_chart_path(path: Path) -> None:
    """Raise ValueError unless charts can be written there: known suffix, folder there, kvfold[plot] installed."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"chart={str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"chart={str(path)!r}: there is no folder {str(path.parent)!r}")
    check_regular(path, "chart")
    if not can_draw():
        raise ValueError("chart: needs altair and vl-convert-python; pip install 'kvfold[plot]'")


def agreement_panels(rows: Sequence[CompareRow], legend: Any = None, **size: Any) -> tuple[Any, Any]:
    """Two altair charts over the bytes held of the full cache's: mean KL, and equal greedy tokens; a line a method."""
    import altair as alt

    points = [
        {
            "method": row.method,
            "budget": f"{row.budget}",
            "KV bytes / full": row.ratio,
            "mean KL (nats)": row.kl,
            "equal greedy tokens": row.top1,
            "answer": row.answer,
        }
        for row in rows
        if row.method != "full"
    ]
    colors = {
        name: color
        for name, (color, _) in looks(list(dict.fromkeys(row.method for row in rows))).items()
        if name != "full"
    }
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X(
            "KV bytes / full:Q", title="KV bytes of the full cache's", axis=alt.Axis(format="%", tickCount=5),
            scale=alt.Scale(zero=False, nice=False, padding=16),
        ),
        color=alt.Color("method:N", scale=scale, legend=legend),
        tooltip=[alt.Tooltip(f"{name}:N") for name in ("method", "budget", "answer")]
        + [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("KV bytes / full", "mean KL (nats)")],
    )  # fmt: skip

    def panel(field: str, scale: Any, caption: str, form: str) -> Any:
        marks = base.encode(y=alt.Y(f"{field}:Q", title=None, scale=scale, axis=alt.Axis(format=form, tickCount=6)))
        lines, dots = marks.mark_line(opacity=0.6), marks.mark_point(size=70, filled=True, opacity=1)
        return (lines + dots).properties(height=280, title=caption, **size)

    most, least = max([row.kl for row in rows]), min([row.top1 for row in rows])
    # A root spreads the small divergences, which are the good ones; both axes end where the numbers do.
    kl = alt.Scale(type="sqrt", domain=[0, 1.1 * most or 0.1], nice=False)
    equal = alt.Scale(domain=[max(0.0, min(least, 0.95) - 0.05), 1.01], nice=False, clamp=True)
    return (
        panel("mean KL (nats)", kl, "KL divergence from full, nats (lower is better)", ".2~f"),
        panel("equal greedy tokens", equal, "Same next token as full (higher is better)", "%"),
    )


def memory_against_agreement(rows: Sequence[CompareRow], title: str) -> Any:
    """Both panels of `agreement_panels` side by side, with a legend."""
    import altair as alt

    return alt.hconcat(*agreement_panels(rows, alt.Legend(title=None, orient="top"), width=380)).properties(title=title)


def chart_page(chart: Any) -> str:
    """A chart as an HTML page that opens without a network. Whatever its data say is text there, never markup."""
    return PAGE.format(vega=vega(), spec=in_script(chart.to_dict()))


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart, whole or not at all; HTML is self-contained and opens without a network."""
    if path.suffix == ".html":  # altair's own page has the data in its script as they come
        write_whole(path, chart_page(chart).encode(), "chart")
    else:
        write_whole(path, lambda part: chart.save(str(part)), "chart")
