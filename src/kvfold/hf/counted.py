"""What a user reads of a cache: the bytes and the tokens that it holds."""

from kvfold.hf.adopting import Adopting
from kvfold.hf.layers import PagedLayer, dense_bytes, held_bytes
from kvfold.hf.report import Report, layer_report
from kvfold.pages import FastMemory, HostMemory


class Counted(Adopting):
    """The part of a cache that says what it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: pages with their columns and tables, windows, recurrent states."""
        return sum(held_bytes(self.layers))

    @property
    def fast(self) -> FastMemory | HostMemory | None:
        """What brings the pages from a disk or from the host, for this cache and its forks; None: they are here."""
        return None if self.spilled is None else self.spilled.memory

    @property
    def resident_nbytes(self) -> int:
        """Those of them in memory, or on the device: with `fast_memory` no more than that, shared forks included."""
        return self.nbytes if self.fast is None else self.fast.resident_nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a dense cache would hold for the same tokens (padding not counted, windows as they are)."""
        return sum(dense_bytes(layer, self.text_tokens) for layer in self.layers)

    @property
    def kept_tokens(self) -> float:
        """Tokens held per KV head, a mean over the paged layers, rows and heads."""
        counts = [layer.counts().mean() for layer in self.paged if layer.width]
        return float(sum(counts) / len(counts)) if counts else 0.0

    def kept(self, layer: int) -> list[list[list[int]]]:
        """Text positions that model layer `layer` holds: kept[row][kv_head], ascending, padding not counted.

        Raises ValueError for a layer that is not on pages.
        """
        if not 0 <= layer < len(self.layers) or not isinstance(self.layers[layer], PagedLayer):
            paged = [core.layer for core in self.paged]
            raise ValueError(f"layer={layer} is not one of the layers with full attention: {paged}")
        found: list[list[list[int]]] = self.layers[layer].core.kept()
        if self.reading is not None:
            return [[self.reading.in_text(row, head) for head in heads] for row, heads in enumerate(found)]
        return found

    def report(self) -> Report:
        """Tokens and bytes of each layer; prints as a table."""
        return layer_report(self)
