"""Charts of results: memory against agreement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.evaluation.compare import CompareRow

SUFFIXES = (".html", ".png", ".svg", ".json")


def check_chart_path(path: Path) -> None:
    """Raise ValueError unless charts can be written there: known suffix, folder there, altair installed."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"chart={str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"chart={str(path)!r}: there is no folder {str(path.parent)!r}")
    try:
        import altair  # noqa: F401
    except ImportError:
        raise ValueError("chart: needs altair; pip install 'kvfold[plot]'") from None


def memory_against_agreement(rows: Sequence[CompareRow], title: str) -> Any:
    """An altair chart: bytes held over the full cache's across, mean KL and equal greedy tokens up; a line a method."""
    import altair as alt

    best = [row for row in rows if row.method != "full"]
    points = [
        {
            "method": row.method,
            "budget": f"{row.budget}",
            "KV bytes / full": row.ratio,
            "mean KL (nats)": row.kl,
            "equal greedy tokens": row.top1,
            "answer": row.answer,
        }
        for row in best
    ]
    order = list(dict.fromkeys(row.method for row in best))
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("KV bytes / full:Q", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False, padding=12)),
        color=alt.Color("method:N", sort=order),
        shape=alt.Shape("method:N", sort=order, legend=None),
        tooltip=[alt.Tooltip(f"{name}:N") for name in ("method", "budget", "answer")]
        + [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("KV bytes / full", "mean KL (nats)")],
    )

    def panel(field: str, scale: Any, caption: str) -> Any:
        marks = base.encode(y=alt.Y(f"{field}:Q", scale=scale))
        lines = marks.mark_line(opacity=0.6, clip=True)
        dots = marks.mark_point(size=70, filled=True, clip=True)
        return (lines + dots).properties(width=380, height=300, title=caption)

    left = panel("mean KL (nats)", alt.Scale(type="symlog", constant=0.01), "Divergence from full (lower is better)")
    right = panel(
        "equal greedy tokens",
        alt.Scale(domain=[0, 1.02], nice=False),
        "Same next token as full (higher is better)",
    )
    return alt.hconcat(left, right).properties(title=title)


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart under a temporary name first; HTML is self-contained and opens without a network."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        chart.save(str(temporary), **({"inline": True} if path.suffix == ".html" else {}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
