"""Pages whose tokens are written together, in a few bits: keys by channel over the page, values by token."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.flat import Flat
from kvfold.formats.paged import PagedSegment
from kvfold.formats.segment import Spec
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.ops.attend import blocked
from kvfold.ops.codes.naive import decoded_keys, decoded_values, key_pages, value_pages
from kvfold.ops.codes.packing import pack, quantise, width
from kvfold.pages import PageTable, Plane
from kvfold.rotation import Compact


def coded_planes(spec: Spec, bits: int, channels: int) -> dict[str, Plane]:
    """What a page holds: packed codes, scale and zero of each key channel, and of each `channels` of a value."""
    # As wide as the model's own numbers. bfloat16 would round a zero to 8 bits, which is as coarse as the codes.
    dtype = torch.float16 if spec.dtype.itemsize == 2 else torch.float32
    by_page = Plane(spec.key_size, dtype, per_page=True)
    by_token = Plane(spec.value_size // channels, dtype)
    return {
        "keys": Plane(width(spec.key_size, bits), torch.uint8), "key_scale": by_page, "key_zero": by_page,
        "values": Plane(width(spec.value_size, bits), torch.uint8), "value_scale": by_token, "value_zero": by_token,
        POSITION: Plane(None, torch.int32),
    }  # fmt: skip


class CodedPages(PagedSegment):
    """Full pages of codes. They are added and dropped whole."""

    codes = ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero")
    listed = True

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype, value_size: int, bits: int):
        super().__init__(table, heads, compute)
        self.value_size, self.bits = value_size, bits

    @property
    def key_size(self) -> int:
        return self.pool.planes["key_scale"].shape[-1]

    @property
    def group(self) -> int:
        """Tokens of a page."""
        return self.pool.page_size

    def like(self, table: PageTable, rows: np.ndarray) -> "CodedPages":
        return CodedPages(table, self.heads, self.compute, self.value_size, self.bits)

    # -- writing -----------------------------------------------------------------------------------------------

    def add_pages(self, tokens: Flat) -> None:
        """Tokens in the model's numbers become pages, of which each row gets whole ones."""
        if not tokens.counts.any():
            return
        columns = {name: plane for name, plane in tokens.planes.items() if name not in ("keys", "values")}
        keys = self.encode_keys(tokens.planes["keys"].reshape(-1, self.group, self.key_size))
        self.table.add(tokens.counts, columns | keys | self.encode_values(tokens.planes["values"]))

    def encode_keys(self, keys: Float[Tensor, "N P D"]) -> dict[str, Tensor]:
        """What planes hold of the keys of N pages: codes by token, scale and zero by page."""
        some = torch.split(keys, _at_once(self.group * self.key_size))
        parts = [(pack(c, self.bits), s, z) for c, s, z in (quantise(x, 1, self._kind, self.bits) for x in some)]
        codes, scale, zero = (torch.cat(x) for x in zip(*parts, strict=True))
        return {"keys": codes.flatten(0, 1), "key_scale": scale[:, 0], "key_zero": zero[:, 0]}

    def encode_values(self, values: Float[Tensor, "N Dv"]) -> dict[str, Tensor]:
        """What planes hold of N values."""
        shared = self.value_size // self.pool.planes["value_scale"].shape[-1]
        wide = values.reshape(len(values), self.value_size // shared, shared)
        parts = [quantise(x, 2, self._kind, self.bits) for x in torch.split(wide, _at_once(self.value_size))]
        codes, scale, zero = (torch.cat(x) for x in zip(*parts, strict=True))
        return {"values": pack(codes.flatten(1), self.bits), "value_scale": scale[..., 0], "value_zero": zero[..., 0]}

    def rewrite(self, rows: np.ndarray, slots: np.ndarray, keys: Tensor | None, values: Tensor | None) -> None:
        """Write keys and values (N, D) over slots of rows; of a key all those on its page are rounded anew."""
        if values is not None:
            self.table.write(rows, slots, self.encode_values(values))
        if keys is None:
            return
        pages, which = np.unique(np.stack([rows, slots // self.group]), axis=1, return_inverse=True)
        holders = np.repeat(pages[0], self.group)
        index = (pages[1][:, None] * self.group + np.arange(self.group)).reshape(-1)
        whole = self.read(holders, index)["keys"].reshape(-1, self.group, self.key_size)
        whole[self.place(which.reshape(-1)), self.place(slots % self.group)] = keys.to(whole.dtype)
        planes = self.encode_keys(whole)
        self.table.write(holders, index, {"keys": planes.pop("keys")})
        numbers = self.place(self.table.table[pages[0], pages[1]])  # they may just have been copied
        for some in self.pool.visits(planes, numbers.numpy(force=True), written=True):
            for name, plane in planes.items():
                self.pool.planes[name][numbers[some]] = plane[some]

    def set_columns(self, columns: Mapping[str, Tensor]) -> None:
        """Set columns (B, H, T) on all tokens; pages that others hold are copied, where that changes anything."""
        rows, slots = self.table.spans()
        at = self.place(rows), self.place(slots)
        planes = {name: column.flatten(0, 1)[at] for name, column in self.add_columns(columns).items()}
        if self.shared:
            old = self.table.read(planes, rows, slots)
            planes = {name: new for name, new in planes.items() if not torch.equal(new.to(old[name].dtype), old[name])}
        if planes:
            self.table.write(rows, slots, planes)

    # -- reading -----------------------------------------------------------------------------------------------

    def read(self, rows: np.ndarray, slots: np.ndarray) -> dict[str, Tensor]:
        """Keys, values and columns at slots of rows, (N, ...), in the model's numbers."""
        names = [name for name, spec in self.pool.specs.items() if not spec.per_page]
        planes = self.table.read(names, rows, slots)
        pages = self.place(self.table.table[rows, slots // self.group])
        key_scale, key_zero = (self.pool.planes[name][pages] for name in ("key_scale", "key_zero"))
        keys = decoded_keys(planes["keys"][:, None], key_scale, key_zero, self.bits)[:, 0]
        codes, scale, zero = (planes[name] for name in ("values", "value_scale", "value_zero"))
        values = decoded_values(codes, scale, zero, self.value_size, self.bits)
        columns = {name: plane for name, plane in planes.items() if name not in self.codes}
        return {
            "keys": self._computed(keys),
            "values": self._computed(values),
            **columns,
        }

    def states(self, what: str) -> Tensor:
        size = self.key_size if what == "keys" else self.value_size
        pages, step = self.longest // self.group, _at_once(self.table.rows * self.group * size)
        parts = [self._states(what, first, min(first + step, pages)) for first in range(0, pages, step)]
        return torch.cat(parts, 2) if parts else self._states(what, 0, 0)

    def _states(self, what: str, first: int, last: int) -> Float[Tensor, "B H T _"]:
        if what == "keys":
            wide = key_pages(self.table, first, last, self.bits)
        else:
            wide = value_pages(self.table, first, last, self.value_size, self.bits)
        return self._computed(self._rows(wide.flatten(1, 2)))

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        return ops.attend_codes(
            q, self.table, scale, bits=self.bits, value_size=self.value_size, mass=LOG_MASS if self.weighed else None,
            read=read, compact=compact, position=POSITION, weights=weights,
        )  # fmt: skip

    def _computed(self, states: Tensor) -> Tensor:
        most = torch.finfo(self.compute).max  # a scale that was rounded up may lead past the largest number
        return states.clamp(-most, most).to(self.compute)

    @property
    def _kind(self) -> torch.dtype:
        return self.pool.specs["key_scale"].dtype

    def place(self, numbers: np.ndarray) -> Tensor:
        """Indices, where the pages are."""
        return torch.from_numpy(numbers).to(self.pool.device)


def _at_once(numbers: int) -> int:
    """Of what has so many numbers, how much is worked out at once."""
    return max(1, blocked.BLOCK_ELEMENTS // max(1, numbers))
