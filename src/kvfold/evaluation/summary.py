"""Results put together: a number for each model, protocol, method, budget, task and length."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.records import EXAMPLES, RESULTS, read_lines

Row = dict[str, Any]


def summarise(folder: Path) -> list[Row]:
    """Rows with `column` (task and length), `value` (the metric's aggregate), `text` (for tables), `n`, ...

    Agreement shows mean KL and top-1. Order: as in the file.
    """
    metrics = {
        (each["model"], each["task"], each["length"], each["example"]): each["queries"][0]["metric"]
        for each in read_lines(folder / EXAMPLES)
    }
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in read_lines(folder / RESULTS):
        key = tuple(record[name] for name in ("model", "protocol", "method", "budget", "task", "length"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (model, protocol, method, budget, task, length), records in groups.items():
        good = [record for record in records if "error" not in record]
        column = task if length is None else f"{task}, {length:,}"
        row = {"model": model, "protocol": protocol, "method": method, "budget": budget, "task": task, "length": length,
               "column": column, "n": len(good), "failed": len(records) - len(good)}  # fmt: skip
        if good:
            metric = metrics[(model, task, length, good[0]["example"])]
            row |= {"metric": metric, **_measured(good, metric)}
        else:
            row |= {"metric": None, "value": None, "text": "failed", "ratio": float("nan")}
        rows.append(row)
    return rows


def _measured(records: Sequence[Row], metric: str) -> Row:
    scores = [query["scores"] for record in records for query in record["queries"]]
    value = get_metric(metric).aggregate(scores)
    ratio = sum(record["nbytes"] for record in records) / sum(record["full_nbytes"] for record in records)
    found: Row = {"value": value, "ratio": ratio, "text": f"{value:.1f}"}
    if "top1" in scores[0]:
        found |= {"top1": fmean(each["top1"] for each in scores)}
        found["text"] = f"{value:.3f} {found['top1']:.2f}" if metric == "agreement" else f"{value:.2f}"
    return found
