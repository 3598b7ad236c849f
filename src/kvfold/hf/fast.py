"""A cache that is larger than the memory it may take: what is asked of a model for it, and of a pass that comes.

The rest of it lies on the host, where the model may be on a device, or on a disk.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvfold.files import check_folder, nameless
from kvfold.formats import Dense, Indexed, Spec
from kvfold.formats.sizes import empty_segment
from kvfold.hf.argument import with_cache
from kvfold.hf.looking import has_weights, ids_device, looking
from kvfold.hf.memory import parse_size
from kvfold.layer.framing import measured
from kvfold.layer.layer import KVLayer, format_of
from kvfold.methods.base import Method
from kvfold.options import shown
from kvfold.pages import FastMemory, HostMemory, PagePool, SpillFile

Least = Callable[[Sequence[PagePool], int], int]
"""The bytes that a page of each of so many rows takes, in each of some pools or in any."""


def checked_fast(
    model: PreTrainedModel, method: Method, fast_memory: object, spill: object, arena: object
) -> int | None:
    """The limit in bytes; None: there is none. Raises ValueError, before anything is made, where it can't be kept."""
    if fast_memory is None and spill is None:
        return None
    if fast_memory is None:
        raise ValueError(f"spill={shown(spill)} goes with fast_memory=, which is not given: a limit, and a folder")
    nbytes, given = parse_size("fast_memory", fast_memory), f"fast_memory={shown(fast_memory)}"
    if arena is not None:
        raise ValueError(f"{given} can't be combined with arena=, whose pages are in memory")
    if method.shares_layers:
        raise ValueError(f"{given}: method={method} lets layers share memory, and what is elsewhere belongs to one")
    devices = {weight.device for weight in model.parameters() if not weight.is_meta} | {ids_device(model)}
    there = f"this {type(model).__name__} is on {sorted(map(str, devices))}"
    if spill is None:
        if len(devices) > 1 or ids_device(model).type not in ("cpu", "cuda"):
            raise ValueError(f"{given} is for models on one CUDA device, or on the CPU; {there}")
        return nbytes
    if {device.type for device in devices} != {"cpu"}:
        raise ValueError(f"spill={shown(spill)} is for models on the CPU; {there}")
    check_folder(spill, "spill")
    if not sys.platform.startswith("linux"):
        raise ValueError(f"{given}: memory can be given back to a file on Linux alone, not on {sys.platform}")
    return nbytes


class Spilled:
    """The fast memory of a cache and of its forks; `shapes`: its layers on pages, each for one row (none: not known).

    What lies elsewhere comes and goes by itself (`kvfold.pages.FastMemory`, `HostMemory`). Here is what has to be known
    of layers: what counts in the limit beside their pages, whether a pass has room, and who is read next.
    """

    def __init__(self, memory: FastMemory | HostMemory, shapes: Sequence[Spec] = ()):
        self.memory, self.shapes = memory, shapes

    @classmethod
    def opened(cls, model: PreTrainedModel, nbytes: int, spill: Any, empty: Any, cores: Sequence[KVLayer]) -> "Spilled":
        """For a cache whose layers on pages are `cores`; `empty` is another cache of the model.

        The model reads two tokens with it, which show the layers' shapes. Without a folder (None) what has no room lies
        on the host. Raises ValueError where the limit has no room for a page of each of a sequence's heads, the folder
        takes no file, or a device can't read a format's pages from slots.
        """
        host = None if spill is not None else HostMemory(nbytes, ids_device(model))
        least: Least = FastMemory.least if host is None else host.least
        if host is not None and host.device.type != "cpu":
            _check_formats(nbytes, cores)
        shapes = list[Spec]()
        if has_weights(model):
            with looking(model):
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64), **with_cache(model, empty), use_cache=True)
            for core, other in zip(cores, empty.paged, strict=True):
                found = measured((group.method for group in core.rows.groups), core.site)
                shapes.append(replace(other.stored.spec, rows=1, artefact=found))
        for core, spec in zip(cores, shapes, strict=False):
            for group in core.rows.groups:
                segment = empty_segment(format_of(group.method, core.site), spec)
                pools = list(segment.pages_for(np.zeros((1, spec.heads), dtype=np.int64)))
                _check_least(nbytes, 0, least, pools, core, spec.heads)
        if host is not None:
            return cls(host, shapes)
        return cls(FastMemory(nbytes, SpillFile(nameless(spill, "spill"), os.fspath(spill))), shapes)

    def check_room(self, cores: Sequence[KVLayer], batch: int, tokens: int, wanted: Mapping[PagePool, int]) -> None:
        """Raise, before any layer has read, where so many more tokens have no room.

        `wanted`: the pages that they take in pools that are there; layers that hold nothing yet are as `shapes` says.
        SpillFull where the disk is full; ValueError where a page of each row, a (sequence, KV head), has no room in
        memory beside indexes, tables and windows.
        """
        memory = self.memory
        for core in cores:
            rows = batch * core.stored.spec.heads
            _check_least(memory.nbytes, memory.beside_nbytes, memory.least, self._pools(core), core, rows)
        needed = sum(max(0, pages - pool.free) * pool.page_nbytes for pool, pages in wanted.items())
        for core, spec in zip(cores, self.shapes, strict=False):
            for group in core.rows.groups if not core.segments else ():
                rows = batch if group.rows is None else len(group.rows)
                segment = empty_segment(format_of(group.method, core.site), spec)
                more = segment.pages_for(np.full((1, spec.heads), tokens))
                needed += rows * sum(pages * pool.page_nbytes for pool, pages in more.items())
                _check_least(memory.nbytes, memory.beside_nbytes, memory.least, [*more], core, batch * spec.heads)
        self.memory.check_room(needed)

    def left(self, core: KVLayer, *, settle: bool) -> None:
        """A layer has attended: what it read without a word goes, and what it holds beside its pages counts.

        `settle`: what was written goes to the disk, once for all; else what rows are still filling waits for that.
        """
        pools = self._pools(core)
        for pool in pools:
            if settle:
                self.memory.settle(pool)
            self.memory.sweep(pool)
        self.memory.hold(core, core.stored.bytes_beside({id(pool) for pool in pools}))

    def expect(self, core: KVLayer) -> None:
        """A layer is read after the one that is about to be: the disk may begin."""
        for pool in self._pools(core):
            self.memory.expect(pool)

    def fetch(self, core: KVLayer) -> None:
        """A layer is read next, and no other is being read: what it surely reads may come to the device."""
        for pool in self._pools(core):
            self.memory.fetch(pool)

    def _pools(self, core: KVLayer) -> list[PagePool]:
        """The pools that a layer's tokens lie in, elsewhere."""
        none = np.zeros((core.stored.spec.rows, core.stored.spec.heads), dtype=np.int64)
        return [pool for _, segment in core.segments for pool in segment.pages_for(none) if pool.memory is self.memory]


def _check_least(
    nbytes: int, beside: int, least: Least, pools: Sequence[PagePool], core: KVLayer, rows: int
) -> None:  # fmt: skip
    wanted = least(pools, rows)
    if pools and wanted > nbytes - beside:
        raise ValueError(
            f"fast_memory={nbytes} is too little: a page of each of {rows} KV heads of layer {core.layer} takes "
            f"{wanted} bytes of it, and {beside} are taken by indexes, tables and windows"
        )


def _check_formats(nbytes: int, cores: Sequence[KVLayer]) -> None:
    """Raise ValueError where a device would have to read slots of codes: those kernels read pools alone."""
    for core in cores:
        for group in core.rows.groups:
            form = format_of(group.method, core.site)
            form = form.form if isinstance(form, Indexed) else form
            if not isinstance(form, Dense) or group.method.stores:
                raise ValueError(
                    f"fast_memory={nbytes}: on a device only tokens as they are can lie on the host, and "
                    f"method={group.method} holds them in another format"
                )
