"""Tables of benchmarks for a rich console."""

from collections.abc import Sequence

from rich.table import Table

from kvfold.bench import endtoend, growth, kernels


def megabytes(nbytes: float | int) -> str:
    """Bytes in MB, powers of ten as bandwidths have them."""
    return f"{nbytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds with the unit that shows three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _table(title: str, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def kernels_table(rows: Sequence[kernels.KernelRow], bandwidth: float, title: str) -> Table:
    """A line for each case and contender; `bandwidth` in bytes/s is what they are compared with."""
    caption = (
        f"A plain read gives {bandwidth / 1e9:,.1f} GB/s in this run. Rates count the bytes of the tokens kept. "
        "Cost/token: over that of the full-length case."
    )
    right = ("time", "min", "max", "bound", "GB/s", "of read", "times SDPA", "cost/token")
    table = _table(title, caption, ("dtype", "tokens x rows", "kernel"), right)
    for row in rows:
        cost = "-" if row.cost_per_token is None else f"{row.cost_per_token:.2f}"
        table.add_row(
            row.case.dtype, f"{row.case.context:,} x {row.case.batch}",
            kernels.NAMES.get(row.contender, row.contender) + (", ragged" if row.ragged else ""),
            duration(row.seconds.median), duration(row.seconds.min), duration(row.seconds.max),
            duration(row.bound_seconds), f"{row.bytes_per_second / 1e9:.1f}", f"{row.of_bandwidth:.2f}",
            f"{row.of_sdpa:.2f}", cost,
        )  # fmt: skip
    return table


def run_table(rows: Sequence[endtoend.RunRow], bandwidth: float, weights: int, title: str) -> Table:
    """A line a cache; a peer of another process says so. `weights` in bytes, `bandwidth` in bytes/s."""
    caption = (
        f"Bound: {megabytes(weights)} of weights and the KV bytes read once at {bandwidth / 1e9:,.1f} GB/s, the plain "
        "read of this run. Speedup over DynamicCache, with its bound. Prefill: against DynamicCache's and full's."
    )
    right = [
        "step", "tokens/s", "at most", "speedup", "at most", "KV cache", "of dense", "prefill", "of dense", "of full",
    ]  # fmt: skip
    peaks = any(row.memory is not None for row in rows)
    table = _table(title, caption, ("cache", "budget"), [*right, "peak memory"] if peaks else right)
    for row in rows:
        table.add_row(
            row.contender + (f" ({row.library}, own process)" if row.separate_process else ""),
            "-" if row.budget is None else str(row.budget), *_decode(row), *_prefill(row),
            *([_peak(row)] if peaks else []),
        )  # fmt: skip
    return table


def _decode(row: endtoend.RunRow) -> tuple[str, ...]:
    if row.decode is not None:
        d = row.decode
        step, rate, kv, ratio = d.step_seconds.median, d.tokens_per_second, d.kv_bytes, d.kv_ratio
        most, speedup, bound = d.bound_tokens_per_second, d.speedup, f"{d.bound_speedup:.2f}"
    elif row.peer is not None:
        p = row.peer
        step, rate, kv, ratio = p["step_seconds"], p["decode_tokens_per_second"], p["kv_bytes"], p["kv_ratio"]
        most, speedup, bound = p["bound_tokens_per_second"], p["speedup"], "-"
    else:
        return ("-",) * 7
    return duration(step), f"{rate:.1f}", f"{most:.1f}", f"{speedup:.2f}", bound, megabytes(kv), f"{ratio:.3f}"


def _prefill(row: endtoend.RunRow) -> tuple[str, ...]:
    if row.prefill is not None:
        full = row.prefill.ratio_full
        ratio = f"{row.prefill.ratio_dynamic:.2f}"
        return duration(row.prefill.seconds.median), ratio, "-" if full is None else f"{full:.2f}"
    if row.peer is not None and "prefill_run" in row.peer:
        run = row.peer["prefill_run"]
        return duration(run["prefill_seconds"]), f"{run['ratio_dynamic']:.2f}", "-"
    return "-", "-", "-"


def _peak(row: endtoend.RunRow) -> str:
    found = row.memory or row.peer or {}
    nbytes = found.get("peak_cuda_bytes") or found.get("peak_resident_bytes") or found.get("peak_rss_bytes")
    if nbytes is None:
        return "-"
    added = None if found.get("peak_cuda_bytes") else found.get("added_bytes")
    return megabytes(nbytes) if added is None else f"{megabytes(nbytes)} (+{added / 1e6:,.1f})"


def growth_table(
    rows: Sequence[growth.GrowthRow], exponents: Sequence[growth.Exponent], bandwidth: float, title: str
) -> Table:
    """A line for each cache and context; exponents stand in the line of the longer context."""
    caption = (
        "Exponents between this context and the one before: 1.0 grows like the text, 0.0 not at all. Bound: weights "
        f"and KV bytes read once at {bandwidth / 1e9:,.1f} GB/s, the plain read of this run."
    )
    right = ("context", "step", "bound", "exponent", "prefill", "exponent", "KV cache", "exponent")
    table = _table(title, caption, ("cache", "budget"), right)
    known = {(each.contender, each.measure, each.stop): f"{each.exponent:.2f}" for each in exponents}
    order = list(dict.fromkeys(row.contender for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row.contender), row.context)):
        step, prefill, kv = (known.get((row.contender, measure, row.context), "") for measure in growth.MEASURES)
        table.add_row(
            row.contender, "-" if row.budget is None else str(row.budget), f"{row.context:,}",
            duration(row.step_seconds.median), duration(row.bound_seconds), step,
            duration(row.prefill_seconds.median), prefill, megabytes(row.kv_bytes), kv,
        )  # fmt: skip
    return table
