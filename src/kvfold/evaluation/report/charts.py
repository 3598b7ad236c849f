"""The figures as Altair specifications without data: the page puts the rows in that its filters let through."""

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = "rows"
COLORS = ("#3f83c8", "#e07b39", "#2c9c86", "#c8499a", "#8a6fd1", "#b8901f", "#5aa632", "#d1495b", "#4fa9c9", "#94745a")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
REFERENCE = "#8b8f98"
"""Colours that stand out on white and on near-black alike; shapes repeat what they say."""


def looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each method; the full cache is grey."""
    rest = [method for method in methods if method != "full"]
    found = {name: (COLORS[i % len(COLORS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(rest)}
    return {name: found.get(name, (REFERENCE, "circle")) for name in methods}


def _marks(methods: Mapping[str, tuple[str, str]]) -> tuple[Any, Any]:
    import altair as alt

    domain, colors, shapes = list(methods), [c for c, _ in methods.values()], [s for _, s in methods.values()]
    return (
        alt.Color("method:N", scale=alt.Scale(domain=domain, range=colors), legend=None),
        alt.Shape("method:N", scale=alt.Scale(domain=domain, range=shapes), legend=None),
    )


def _tooltip() -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip("method:N"), alt.Tooltip("label:N", title="budget"), alt.Tooltip("protocol:N"),
        alt.Tooltip("score:Q", format=".4~f"), alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("ratio:Q", format=".1%", title="KV bytes / full"), alt.Tooltip("n:Q", title="examples"),
        alt.Tooltip("failed:Q"),
    ]  # fmt: skip


def against_budget(methods: Mapping[str, tuple[str, str]]) -> Any:
    """A line a method over budgets, bootstrap intervals as bars beside one another; the full cache a dashed rule."""
    import altair as alt

    color, shape = _marks(methods)
    height = alt.Y("score:Q", title=None, scale=alt.Scale(zero=False, nice=True))
    base = alt.Chart(alt.NamedData(ROWS)).transform_filter("datum.method != 'full'").encode(
        x=alt.X("label:O", title="budget", sort=alt.EncodingSortField("order"), axis=alt.Axis(labelAngle=0, grid=False),
                scale=alt.Scale(paddingInner=0.35)),
        xOffset=alt.XOffset("method:N", sort=list(methods)), color=color,
    )  # fmt: skip
    full = alt.Chart(alt.NamedData(ROWS)).transform_filter("datum.method == 'full'").encode(color=color)
    band = full.mark_rect(opacity=0.13).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    rule = full.mark_rule(strokeDash=[5, 4], strokeWidth=1.5).encode(y=height, tooltip=_tooltip())
    lines = base.mark_line(opacity=0.45, strokeWidth=1.5).encode(y=height)
    spans = base.mark_rule(strokeWidth=1.5, opacity=0.75).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    points = base.mark_point(size=55, filled=True, opacity=1).encode(y=height, shape=shape, tooltip=_tooltip())
    return alt.layer(band, rule, lines, spans, points).properties(width="container", height=300)


def against_cost(methods: Mapping[str, tuple[str, str]], field: str, title: str, form: str) -> Any:
    """A point a contender over what it costs; those on the Pareto front are ringed, and a line joins them."""
    import altair as alt

    color, shape = _marks(methods)
    scale = alt.Scale(zero=False, nice=False, padding=16)  # no round end, where an axis would show more than 100 %
    base = (
        alt.Chart(alt.NamedData(ROWS))
        .transform_filter(f"isValid(datum.{field}) && isValid(datum.score)")
        .encode(
            x=alt.X(f"{field}:Q", title=title, axis=alt.Axis(format=form, tickCount=6), scale=scale),
            y=alt.Y("score:Q", title=None, scale=scale),
        )
    )
    front = base.transform_filter("datum.front").mark_line(color=REFERENCE, strokeDash=[3, 3], interpolate="linear")
    spans = base.mark_rule(opacity=0.3).encode(y=alt.Y("low:Q", title=None), y2="high:Q", color=color)
    rings = base.transform_filter("datum.front").mark_point(size=260, strokeWidth=1.6, filled=False, shape="circle")
    points = base.mark_point(size=62, filled=True, opacity=1).encode(color=color, shape=shape, tooltip=_tooltip())
    return alt.layer(front.encode(order=f"{field}:Q"), spans, rings.encode(color=color), points).properties(
        width="container", height=300
    )


def heat_map() -> Any:
    """Length across, depth down, a column of panels a method and a row a budget; the page sets the panels' width."""
    import altair as alt

    base = alt.Chart(alt.NamedData(ROWS)).encode(
        x=alt.X("length:O", title=None, sort=alt.EncodingSortField("length_order"), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("depth:O", title="depth", axis=alt.Axis(format=".0%")),
        tooltip=[
            alt.Tooltip("method:N"), alt.Tooltip("label:N", title="budget"), alt.Tooltip("protocol:N"),
            alt.Tooltip("length:N"), alt.Tooltip("depth:Q", format=".0%"), alt.Tooltip("score:Q", format=".1f"),
            alt.Tooltip("n:Q", title="examples"),
        ],
    )  # fmt: skip
    scale = alt.Scale(domain=[0, 100], scheme="viridis", clamp=True)
    legend = alt.Legend(orient="top", title="score", gradientLength=160, gradientThickness=9, titleOrient="left")
    boxes = base.mark_rect(stroke="white", strokeOpacity=0.25).encode(
        color=alt.Color("score:Q", scale=scale, legend=legend)
    )
    ink = alt.condition("datum.score > 60", alt.value("#111"), alt.value("#fff"))
    texts = base.mark_text(fontSize=10).encode(text=alt.Text("score:Q", format=".0f"), color=ink)
    head = alt.Header(labelFontWeight="bold", title=None, labelLimit=150)
    return (
        alt.layer(boxes, texts).properties(width=110, height=alt.Step(19))
        .facet(
            column=alt.Column("method:N", header=head, sort=alt.EncodingSortField("method_order")),
            row=alt.Row("label:O", header=head, sort=alt.EncodingSortField("order")), spacing=10,
        )
    )  # fmt: skip


def specifications(methods: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """All figures as Vega-Lite."""
    charts = {
        "budget": against_budget(methods),
        "memory": against_cost(methods, "ratio", "KV bytes / full cache", "%"),
        "time": against_cost(methods, "step", "ms a generated token", "~r"),
        "depth": heat_map(),
    }
    return {name: chart.to_dict() for name, chart in charts.items()}
