"""Tables of benchmarks for a rich console."""

from collections.abc import Callable, Sequence

import torch
from rich.table import Table

from kvfold.bench import endtoend, growth, kernels, reading
from kvfold.bench.arithmetic import Arithmetic
from kvfold.bench.machine import Spread
from kvfold.bench.parts import PARTS


def megabytes(nbytes: float | int) -> str:
    """Bytes in MB, powers of ten as bandwidths have them."""
    return f"{nbytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds with the unit that shows three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def spanned(found: Spread, rounds: Sequence[float], form: Callable[[float], str]) -> str:
    """A median with the least and the most of the rounds' own."""
    return f"{form(found.median)} [{form(min(rounds))}, {form(max(rounds))}]"


def ratio_of(found: Spread) -> str:
    """A median of ratios with the least and the most."""
    return spanned(found, (found.min, found.max), "{:.2f}".format)


def _table(title: str, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def kernels_table(
    rows: Sequence[kernels.KernelRow], bandwidth: float, title: str, cores: Sequence[Arithmetic] = ()
) -> Table:
    """A line for each case and contender; `bandwidth` in bytes/s is what they are compared with.

    `cores`: what they can do where nothing waits for memory, a line under the table for each.
    """
    caption = (
        f"A plain read of a large array gives {bandwidth / 1e9:,.1f} GB/s in this run; bound: the bytes of the tokens "
        "kept at that rate, which GB/s count. Of same read: over a plain read of the same pages in the same order. "
        "Cost/token: over that of the full-length case."
    )
    caption = "\n".join([caption, *(sum_of(each, bandwidth) for each in cores)])
    right = (
        "time", "min", "max", "bound", "arithmetic", "GB/s", "of read", "of same read", "times SDPA", "cost/token",
        *(("beside", "keeps") if any(row.keeps is not None for row in rows) else ()),
    )  # fmt: skip
    table = _table(title, caption, ("dtype", "tokens x rows", "kernel"), right)
    for row in rows:
        cost, same = ("-" if x is None else f"{x:.2f}" for x in (row.cost_per_token, row.of_read))
        table.add_row(
            row.case.dtype, f"{row.case.context:,} x {row.case.batch}", row.label, duration(row.seconds.median),
            duration(row.seconds.min), duration(row.seconds.max), duration(row.bound_seconds),
            "-" if row.arithmetic_seconds is None else duration(row.arithmetic_seconds),
            f"{row.bytes_per_second / 1e9:.1f}", f"{row.of_bandwidth:.2f}", same, f"{row.of_sdpa:.2f}", cost,
            *(() if row.beside_seconds is None else (duration(row.beside_seconds.median), f"{row.keeps:.2f}")),
        )  # fmt: skip
    return table


def sum_of(cores: Arithmetic, bandwidth: float) -> str:
    """The arithmetic bound of attention, worked out in a line, and what memory's (bytes/s) is beside it."""
    width = int(getattr(torch, cores.dtype).itemsize)
    done = cores.numbers_per_second
    widening = "" if width == 4 else "widened, and "
    first, second = ("arithmetic", "memory") if done * width < bandwidth else ("memory", "arithmetic")
    return (
        f"Arithmetic, {cores.dtype}, {cores.group} heads: a number is {widening}multiplied and added {cores.group} "
        f"times; a core does {cores.per_cycle:.2f} numbers ({cores.per_cycle * cores.group:.1f} products) a cycle of "
        f"{cores.hertz / 1e9:.2f} GHz from its first cache, all together {done / 1e9:.1f} G numbers/s x {width} "
        f"bytes = {done * width / 1e9:.1f} GB/s: {first} binds before {second}; one after the other "
        f"{1e-9 / (1 / (done * width) + 1 / bandwidth):.1f} GB/s."
    )


def run_table(rows: Sequence[endtoend.RunRow], bandwidth: float, weights: int, title: str) -> Table:
    """A line a cache; a peer of another process says so. `weights` in bytes, `bandwidth` in bytes/s."""
    caption = (
        f"Bound: {megabytes(weights)} of weights and the KV bytes read once at {bandwidth / 1e9:,.1f} GB/s, the plain "
        "read of this run. Step and speedup: medians, in brackets the least and the most of "
        "the rounds; speedup over DynamicCache, round by round, with its bound. Prefill: against DynamicCache's and "
        "full's."
    )
    right = [
        "step", "tokens/s", "at most", "speedup", "at most", "KV cache", "of dense", "prefill", "of dense", "of full",
    ]  # fmt: skip
    peaks = any(row.memory is not None for row in rows)
    beside = any(row.decode is not None and row.decode.keeps is not None for row in rows)
    right += ["beside", "keeps"] * beside + ["peak memory"] * peaks
    table = _table(title, caption, ("cache", "budget"), right)
    for row in rows:
        table.add_row(
            row.contender + (f" ({row.library}, own process)" if row.separate_process else ""),
            "-" if row.budget is None else str(row.budget), *_decode(row), *_prefill(row),
            *(_beside(row) if beside else ()), *([_peak(row)] if peaks else []),
        )  # fmt: skip
    return table


def _decode(row: endtoend.RunRow) -> tuple[str, ...]:
    d = row.decode
    if d is None:
        return ("-",) * 7
    return (
        spanned(d.step_seconds, d.round_seconds, duration), f"{d.tokens_per_second:.1f}",
        f"{d.bound_tokens_per_second:.1f}", ratio_of(d.speedup),
        f"{d.bound_speedup:.2f}", megabytes(d.kv_bytes), f"{d.kv_ratio:.3f}",
    )  # fmt: skip


def _beside(row: endtoend.RunRow) -> tuple[str, str]:
    d = row.decode
    if d is None or d.beside_seconds is None or d.keeps is None:
        return "-", "-"
    return duration(d.beside_seconds.median), ratio_of(d.keeps)


NAMES = dict(zip(PARTS, ("linears", "attention", "methods", "kvfold's Python", "rest of the model"), strict=True))


def parts_table(rows: Sequence[endtoend.RunRow], bandwidth: float, title: str) -> Table:
    """Where the time of a step goes, a line a cache: its floor, and its parts with their shares, beside their bounds.

    Caches without parts, as peers and those on a device, have no line.
    """
    caption = (
        "Floor: the same step with an empty cache, in the same rounds; kvfold's is that of full. Parts are those of "
        "steps under Python's profiler, which make a step longer by what stands last. Bounds: weights (floor, linears) "
        f"and KV bytes (attention) read once at {bandwidth / 1e9:,.1f} GB/s; the others need not read anything."
    )
    right = ["step", "floor", "at least"]
    for part in PARTS:
        right += [NAMES[part], "at least"] if part in ("linears", "attention") else [NAMES[part]]
    right.append("profiled")
    table = _table(title, caption, ("cache", "budget"), right)
    for row in rows:
        d = row.decode
        if d is None or d.parts is None:
            continue
        floor = "-" if d.floor_seconds is None else duration(d.floor_seconds)
        bounds = {"linears": d.floor_bound_seconds, "attention": d.bound_seconds - d.floor_bound_seconds}
        cells = []
        for part in PARTS:
            cells.append(f"{duration(getattr(d.parts, part))}, {d.parts.share(part):.0%}")
            cells += [duration(bounds[part])] if part in bounds else []
        table.add_row(
            row.contender, "-" if row.budget is None else str(row.budget), duration(d.step_seconds.median), floor,
            duration(d.floor_bound_seconds), *cells, f"x {d.parts.step_seconds / d.step_seconds.median:.2f}",
        )  # fmt: skip
    return table


def peer_lines(rows: Sequence[endtoend.RunRow]) -> list[str]:
    """Each peer's step over each cache's, a line a peer."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.decode is not None and not row.separate_process:
            for peer, ratio in row.decode.times_peers.items():
                found.setdefault(peer, []).append(f"{row.contender} {ratio_of(ratio)}")
    return [f"times as fast as {peer}, round by round: {', '.join(ratios)}" for peer, ratios in found.items()]


def _prefill(row: endtoend.RunRow) -> tuple[str, ...]:
    if row.prefill is not None:
        full = row.prefill.ratio_full
        ratio = f"{row.prefill.ratio_dynamic:.2f}"
        return duration(row.prefill.seconds.median), ratio, "-" if full is None else f"{full:.2f}"
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
        f"and KV bytes read once at {bandwidth / 1e9:,.1f} GB/s, the plain read of this run. Of first: the step over "
        "that at the shortest context, round by round; in brackets the least and the most."
    )
    right = ("context", "step", "of first", "bound", "exponent", "prefill", "exponent", "KV cache", "exponent")
    table = _table(title, caption, ("cache", "budget"), right)
    known = {(each.contender, each.measure, each.stop): f"{each.exponent:.2f}" for each in exponents}
    order = list(dict.fromkeys(row.contender for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row.contender), row.context)):
        step, prefill, kv = (known.get((row.contender, measure, row.context), "") for measure in growth.MEASURES)
        table.add_row(
            row.contender, "-" if row.budget is None else str(row.budget), f"{row.context:,}",
            duration(row.step_seconds.median), ratio_of(row.of_first),
            duration(row.bound_seconds), step,
            duration(row.prefill_seconds.median), prefill, megabytes(row.kv_bytes), kv,
        )  # fmt: skip
    return table


def reading_table(rows: Sequence[reading.ReadRow], title: str) -> Table:
    """A line for each method; the first is the full cache's."""
    caption = (
        "KL and equal tokens beside the full cache. Recall: of the tokens that a query head reads the share that is "
        "among as many with the largest exact attention; attention: how much of that they have. Read: bytes of a step, "
        "index included, in the layers that choose, and their share of what is stored there."
    )
    first, rest = (
        ("KL", "equal tokens", "recall", "attention", "read a step"),
        ("of stored", "index", "KV cache", "step"),
    )
    table = _table(title, caption, ("method",), (*first, *rest, "times"))
    for row in rows:
        shares = ["-" if share is None else f"{share:.3f}" for share in (row.recall, row.attention)]
        chose = row.stored_bytes > 0
        table.add_row(
            row.method, f"{row.kl:.4f}", f"{row.top1:.3f}", *shares,
            megabytes(row.read_bytes) if chose else "-", f"{row.read:.3f}" if chose else "-",
            megabytes(row.index_bytes) if row.index_bytes else "-", megabytes(row.nbytes), duration(row.step_seconds),
            f"{rows[0].step_seconds / row.step_seconds:.2f}",
        )  # fmt: skip
    return table
