"""Charts of benchmarks, each rate beside its bound; `kvfold.evaluation.chart.save_chart` writes them."""

from collections.abc import Sequence
from typing import Any

from kvfold.bench import endtoend, growth, kernels

KILO = "datum.value >= 1024 ? format(datum.value / 1024, '.3~r') + 'k' : datum.value"
COLORS = {
    "kvfold, pages in order": "#4c78a8", "plain read, pages in order": "#bab0ac", "torch SDPA": "#f58518",
    "kvfold, pages scattered": "#72b7b2", "plain read, pages scattered": "#d8d2cf",
    "kvfold, ragged": "#9ecae9", "plain read, ragged": "#e8e4e1", "torch SDPA, ragged": "#ffbf79",
}  # fmt: skip
MORE = ("#54a24b", "#b279a2", "#e45756", "#ff9da6", "#9d755d", "#d67195")
"""Colours of formats, in their order."""


def kernels_chart(rows: Sequence[kernels.KernelRow], bandwidth: float, title: str) -> Any:
    """GB/s of the KV bytes kept, a group of bars a shape, a panel a dtype; a rule at the read bandwidth (bytes/s)."""
    import altair as alt

    points = [
        {
            "shape": f"{row.case.context:,} x {row.case.batch}", "dtype": row.case.dtype,
            "contender": row.label,
            "rate": row.bytes_per_second / 1e9, "microseconds": row.seconds.median * 1e6,
            "low": row.kv_bytes / row.seconds.max / 1e9, "high": row.kv_bytes / row.seconds.min / 1e9,
            "share": row.of_bandwidth,
        }
        for row in rows
    ]  # fmt: skip
    found = dict.fromkeys(str(point["contender"]) for point in points)
    others = [name for name in found if name not in COLORS]
    order = [*(name for name in COLORS if name in found), *others]
    colors = COLORS | {name: MORE[i % len(MORE)] for i, name in enumerate(others)}
    shapes = list(dict.fromkeys(str(point["shape"]) for point in points))
    top = max([bandwidth / 1e9, *(float(str(point["rate"])) for point in points)]) * 1.1
    limit = alt.Chart(alt.Data(values=[{"limit": bandwidth / 1e9, "text": f"plain read: {bandwidth / 1e9:,.1f} GB/s"}]))

    def panel(dtype: str) -> Any:
        base = alt.Chart(alt.Data(values=[point for point in points if point["dtype"] == dtype])).encode(
            x=alt.X("shape:N", sort=shapes, title="tokens x rows", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("contender:N", sort=order),
            tooltip=[alt.Tooltip(f"{name}:N") for name in ("contender", "shape", "dtype")]
            + [alt.Tooltip(f"{name}:Q", format=",.2f") for name in ("rate", "low", "high", "microseconds", "share")],
        )
        scale = alt.Scale(domain=[0, top], nice=False)
        bars = base.mark_bar().encode(
            y=alt.Y("rate:Q", title="GB/s of keys and values kept", scale=scale),
            color=alt.Color(
                "contender:N", sort=order, title=None, legend=alt.Legend(orient="top", labelLimit=300),
                scale=alt.Scale(domain=order, range=[colors[name] for name in order]),
            ),
        )  # fmt: skip
        spans = base.mark_rule(color="#555", clip=True).encode(y="low:Q", y2="high:Q")
        rule = limit.mark_rule(strokeDash=[6, 4]).encode(y="limit:Q")
        text = limit.mark_text(align="right", dx=-4, dy=-7).encode(y="limit:Q", x=alt.value("width"), text="text:N")
        width = max(240, (30 + 15 * len(order)) * len(shapes))
        return (bars + spans + rule + text).properties(width=width, height=280, title=dtype)

    panels = [panel(dtype) for dtype in dict.fromkeys(str(point["dtype"]) for point in points)]
    under = "Medians; thin lines span fastest and slowest round."
    if any(row.kind == "ragged" for row in rows):
        under += " Ragged: 10 % to 100 % of the tokens kept; SDPA reads the rest, too."
    return alt.hconcat(*panels).properties(title=alt.TitleParams(title, subtitle=under))


def run_chart(rows: Sequence[endtoend.RunRow], title: str) -> Any:
    """Tokens/s with a tick at each bound, and KV bytes; a bar a cache, peers in a process of their own marked."""
    import altair as alt

    points = []
    for row in rows:
        name = row.contender + (f" {row.budget}" if row.budget is not None else "")
        name += f" ({row.library}, own process)" if row.separate_process else ""
        if row.decode is None:
            continue
        bytes_, rate = row.decode.kv_bytes, row.decode.tokens_per_second
        bound = row.decode.bound_tokens_per_second
        prefill = None if row.prefill is None else row.prefill.seconds.median
        points.append({
            "cache": name, "library": row.library, "rate": rate, "bound": bound, "MB": bytes_ / 1e6,
            "prefill": prefill,
        })  # fmt: skip
    order = [point["cache"] for point in points]
    tips = [alt.Tooltip("cache:N")] + [alt.Tooltip(f"{n}:Q", format=",.2f") for n in ("rate", "bound", "MB", "prefill")]

    def panel(field: str, caption: str, labels: bool) -> Any:
        axis = alt.Axis(labelLimit=320) if labels else None
        base = alt.Chart(alt.Data(values=points)).encode(
            y=alt.Y("cache:N", sort=order, title=None, axis=axis), tooltip=tips
        )
        bars = base.mark_bar().encode(
            x=alt.X(f"{field}:Q", title=caption),
            color=alt.Color("library:N", title=None, legend=alt.Legend(orient="top")),
        )
        values = base.mark_text(align="left", dx=3).encode(x=f"{field}:Q", text=alt.Text(f"{field}:Q", format=",.1f"))
        marks = bars + values
        if field == "rate":
            marks = marks + base.mark_tick(color="black", thickness=2, height=18).encode(x="bound:Q")
        return marks.properties(width=380, height=alt.Step(26))

    left = panel("rate", "decode tokens/s of the batch; black: its bound", True)
    right = panel("MB", "KV cache, MB", False)
    under = "Bound: weights and KV bytes read once at the bandwidth measured in the same run. Medians."
    return alt.hconcat(left, right).properties(title=alt.TitleParams(title, subtitle=under))


def growth_chart(rows: Sequence[growth.GrowthRow], title: str) -> Any:
    """Seconds a step, seconds of the prompt and KV bytes over the context, all on log scales; a line a cache.

    Below them the step over the step at the shortest context, with a band of a tenth around 1.
    """
    import altair as alt

    points = [
        {
            "cache": row.contender + (f" {row.budget}" if row.budget is not None else ""), "context": row.context,
            "step": row.amount("step_seconds") * 1e3, "bound": row.bound_seconds * 1e3,
            "prefill": row.amount("prefill_seconds"), "MB": row.kv_bytes / 1e6, "first": row.of_first.median,
            "low": row.of_first.min, "high": row.of_first.max,
        }
        for row in rows
    ]  # fmt: skip
    order, ticks = list(dict.fromkeys(str(p["cache"]) for p in points)), sorted({row.context for row in rows})
    tips = [alt.Tooltip("cache:N"), alt.Tooltip("context:Q", format=",")]
    tips += [alt.Tooltip(f"{name}:Q", format=",.3f") for name in ("step", "bound", "prefill", "MB", "first")]

    x = alt.X("context:Q", title="context (tokens)", axis=alt.Axis(values=ticks, labelExpr=KILO),
              scale=alt.Scale(type="log", base=2, domain=[ticks[0], ticks[-1]], nice=False, padding=8))  # fmt: skip
    color = alt.Color("cache:N", sort=order, title=None, legend=alt.Legend(orient="top", labelLimit=300))

    def flat() -> Any:
        band = alt.Chart(alt.Data(values=[{"low": 0.9, "high": 1.1}])).mark_rect(color="#999", opacity=0.2)
        band = band.encode(y="low:Q", y2="high:Q")
        base = alt.Chart(alt.Data(values=points)).encode(x=x, color=color, tooltip=tips)
        y = alt.Y("first:Q", title=None, scale=alt.Scale(zero=False))
        marks = base.mark_line().encode(y=y) + base.mark_point(filled=True, size=40, opacity=1).encode(y=y)
        spans = base.mark_rule(opacity=0.6).encode(y="low:Q", y2="high:Q")
        caption = "a step over the step at the shortest context; thin: least and most of the rounds, grey: a tenth"
        return (band + spans + marks).properties(width=1010, height=220, title=caption)

    def panel(field: str, caption: str) -> Any:
        # No zero on a log scale, and no axis of a single tick.
        values = [float(str(p[name])) for p in points for name in ((field, "bound") if field == "step" else (field,))]
        base = alt.Chart(alt.Data(values=points)).encode(
            x=x, color=color,
            y=alt.Y(f"{field}:Q", title=None, axis=alt.Axis(format="~g", tickCount=5),
                    scale=alt.Scale(type="log", domain=[min(values) / 1.2, max(values) * 1.2], nice=False)),
            tooltip=tips,
        )  # fmt: skip
        marks = base.mark_line() + base.mark_point(filled=True, size=40, opacity=1)
        if field == "step":
            marks = marks + base.mark_line(strokeDash=[3, 3], opacity=0.6).encode(y="bound:Q")
        return marks.properties(width=300, height=260, title=caption)

    panels = [
        panel("step", "ms for a decode step; dashed: its bound"), panel("prefill", "seconds of the prompt"),
        panel("MB", "KV cache, MB"),
    ]  # fmt: skip
    return alt.vconcat(alt.hconcat(*panels), flat()).properties(title=title)
