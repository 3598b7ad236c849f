"""The charts of docs/build.py: README's overview, and a method's page."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kvfold.evaluation.report.charts import COLORS, REFERENCE

NAMED = ("kvfold", "h2o", "snapkv", "keepkv", "streamingllm")


def overview(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """KL over the budget of the methods `names` on both models, some of them named and the others grey.

    `found`: what `benchmarks/agreement.py` wrote.
    """
    import altair as alt

    others = "other methods of the table"
    colors = dict(zip(NAMED, COLORS, strict=False)) | {others: REFERENCE}
    points = [
        {"model": one["model"], "method": name, "who": name if name in NAMED else others, "budget": budget,
         "kl": one["summary"][f"{name}@{budget}"]["kl"]}
        for one in found for name in names for budget in (0.5, 0.35, 0.2, 0.1)
    ]  # fmt: skip
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    legend = alt.Legend(
        title=None, orient="bottom", columns=6, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1,
        labelFontSize=12,
    )  # fmt: skip

    def panel(model: str) -> Any:
        mine = alt.Chart(alt.Data(values=[point for point in points if point["model"] == model])).encode(
            x=alt.X(
                "budget:Q", title="tokens kept of the prompt", scale=alt.Scale(domain=[0.09, 0.51], nice=False),
                axis=alt.Axis(format="%", values=[0.1, 0.2, 0.35, 0.5], grid=False),
            ),
            y=alt.Y("kl:Q", title=None, scale=alt.Scale(type="log", domain=[0.0004, 2], nice=False),
                    axis=alt.Axis(values=[0.001, 0.01, 0.1, 1], format="~g")),
            color=alt.Color("who:N", scale=scale, legend=legend),
            detail="method:N",
        )  # fmt: skip
        grey = mine.transform_filter(f"datum.who == '{others}'").mark_line(opacity=0.45, strokeWidth=1)
        named = mine.transform_filter(f"datum.who != '{others}'").mark_line(
            strokeWidth=2, point=alt.OverlayMarkDef(size=30)
        )
        return (grey + named).properties(width=370, height=260, title=model)

    return styled(alt.hconcat(*(panel(one["model"]) for one in found), spacing=40)).properties(
        title=alt.TitleParams(
            "KL divergence from the full cache (nats, lower is better)", anchor="start", color=REFERENCE, fontSize=14
        )
    )


def chart(slug: str, points: Sequence[Any]) -> Any:
    """KL, top-1 and bytes of a method over the budget, a colour a model; dashed, the median of all methods."""
    import altair as alt

    models = list(dict.fromkeys(point.model for point in points))
    own = [vars(point) | {"who": slug} for point in points if point.method == slug]
    others = [
        {"model": model, "budget": budget, "who": "median"}
        | {name: median(getattr(point, name) for point in same) for name in ("kl", "top1", "ratio")}
        for model in models for budget in sorted({point.budget for point in points})
        if (same := [point for point in points if (point.model, point.budget) == (model, budget)])
    ]  # fmt: skip
    color = alt.Color(
        "model:N", scale=alt.Scale(domain=models, range=list(COLORS[: len(models)])),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
    )  # fmt: skip

    def panel(name: str, title: str, scale: Any) -> Any:
        x = alt.X("budget:Q", title="budget", axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domainMin=0))
        y = alt.Y(f"{name}:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5))
        mine = alt.Chart(alt.Data(values=own)).encode(x=x, y=y, color=color)
        theirs = alt.Chart(alt.Data(values=others)).encode(x=x, y=y, color=color)
        layers = [theirs.mark_line(strokeDash=[4, 3], opacity=0.6, strokeWidth=1.3), mine.mark_line(strokeWidth=2)]
        if name == "kl":
            layers.append(mine.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title=None), y2="high:Q"))
        layers.append(mine.mark_point(filled=True, size=40, opacity=1))
        return alt.layer(*layers).properties(width=190, height=150, title=title)

    panels = [
        panel("kl", "KL from full (nats)", alt.Scale(zero=True)),
        panel("top1", "equal greedy tokens", alt.Scale(zero=False, domainMax=1)),
        panel("ratio", "KV bytes / full", alt.Scale(domain=[0, 1])),
    ]
    return styled(alt.hconcat(*panels, spacing=50, bounds="flush"))


def styled(chart: Any) -> Any:
    """Without a background, and grey where there is no colour: for white pages and for black ones."""
    grey = {"labelColor": REFERENCE, "titleColor": REFERENCE}
    return (
        chart.configure(background="transparent").configure_view(stroke=None)
        .configure_axis(**grey, gridColor=REFERENCE, gridOpacity=0.25, domainColor=REFERENCE, tickColor=REFERENCE)
        .configure_legend(labelColor=REFERENCE).configure_title(color=REFERENCE, fontSize=12)
    )  # fmt: skip
