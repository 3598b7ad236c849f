"""What a cache holds, layer by layer."""

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table

from kvfold.hf.layers import WindowLayer, dense_bytes, held_bytes
from kvfold.pages import FastMemory, HostMemory


@dataclass(frozen=True)
class LayerReport:
    """One layer: tokens per KV head (mean, least, most), bytes held, bytes of a dense cache for the same tokens."""

    layer: int
    kind: str
    tokens: float
    least: int
    most: int
    nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class SpillReport:
    """What came and went between a fast memory of so many bytes and a disk, or the host, since the cache was made.

    `hits` and `misses`: blocks that were there when they were read or written, and those that were not. A block is
    64 KB on disk, and a page on the host.
    """

    fast_memory: int
    disk_nbytes: int
    host_nbytes: int
    hits: int
    misses: int
    brought_nbytes: int
    written_nbytes: int

    @classmethod
    def of(cls, memory: FastMemory | HostMemory) -> "SpillReport":
        """What was counted so far."""
        moved = memory.hits, memory.misses, memory.brought_nbytes, memory.written_nbytes
        there = (0, memory.slow_nbytes) if isinstance(memory, HostMemory) else (memory.slow_nbytes, 0)
        return cls(memory.nbytes, *there, *moved)


@dataclass(frozen=True)
class Report:
    """A cache: its method, totals, and each layer. `str()` gives a table.

    `resident_nbytes`: those of them in memory, all without a fast memory; `spilled`: what that moved.
    """

    method: str
    nbytes: int
    dense_nbytes: int
    layers: tuple[LayerReport, ...]
    resident_nbytes: int
    spilled: SpillReport | None = None

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a dense cache."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ratio": self.ratio}

    def table(self) -> Table:
        """For rich consoles."""
        table = Table(title=self.method)
        for name in ("layer", "kind", "tokens/head", "least", "most", "bytes", "of dense"):
            table.add_column(name, justify="left" if name == "kind" else "right")
        for row in self.layers:
            of = f"{row.nbytes / row.dense_nbytes:.3f}" if row.dense_nbytes else "-"
            cells = (f"{row.tokens:.1f}", f"{row.least}", f"{row.most}", f"{row.nbytes:,}", of)
            table.add_row(str(row.layer), row.kind, *cells)
        table.add_section()
        table.add_row("all", "", "", "", "", f"{self.nbytes:,}", f"{self.ratio:.3f}")
        if self.spilled is not None:
            table.add_row("in memory", "", "", "", "", f"{self.resident_nbytes:,}", "")
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=100)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


@runtime_checkable
class Reportable(Protocol):
    """The parts of a cache that a report reads."""

    layers: list[Any]

    @property
    def method_text(self) -> str: ...

    @property
    def text_tokens(self) -> int | None: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def resident_nbytes(self) -> int: ...

    @property
    def fast(self) -> FastMemory | HostMemory | None: ...

    @property
    def dense_nbytes(self) -> int: ...


def layer_report(cache: Reportable) -> Report:
    """The report of a cache; layers that are not on pages have no token counts per head.

    What two layers share counts for the lower.
    """
    rows = []
    for index, (layer, held) in enumerate(zip(cache.layers, held_bytes(cache.layers), strict=True)):
        core = getattr(layer, "core", None)
        if core is None:
            kind = "window" if getattr(layer, "is_sliding", False) else "state"
            keys = getattr(layer, "keys", None)
            length = 0 if keys is None or keys.dim() < 3 else keys.shape[-2]
            length = layer.tokens if isinstance(layer, WindowLayer) else length
            dense = dense_bytes(layer, None)
            rows.append(LayerReport(index, kind, float(length), length, length, held, dense))
        else:
            counts = core.counts()
            some = counts.size > 0
            least, most = (int(counts.min()), int(counts.max())) if some else (0, 0)
            mean = float(counts.mean()) if some else 0.0
            dense = dense_bytes(layer, cache.text_tokens)
            rows.append(LayerReport(index, "paged", mean, least, most, held, dense))
    moved = None if cache.fast is None else SpillReport.of(cache.fast)
    return Report(cache.method_text, cache.nbytes, cache.dense_nbytes, tuple(rows), cache.resident_nbytes, moved)
