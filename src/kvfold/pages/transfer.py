"""Copies between the host and a device, beside what computes there, and how many bytes that were.

On CUDA they run on a stream of their own, through a few pinned buffers of a fixed size. On the CPU, where both are one
memory, the same copies are made at once: what they count is real, what they take says nothing about a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

BUFFERS = 2
"""While one is on its way the next is filled."""


class Transfer:
    """The way between the host and `device`; a copy to the device takes at most `room` bytes there on its way.

    `brought_nbytes` and `written_nbytes`: what was copied to the device, and from it.
    """

    def __init__(self, device: torch.device, room: int):
        self.device, self.room = device, room
        self.brought_nbytes = self.written_nbytes = 0
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: list[tuple[Tensor, Any]] = []  # and when the copy that used it last is done

    def up(
        self, plane: Tensor, slots: Int[np.ndarray, " N"], source: Tensor, pages: Int[np.ndarray, " N"]
    ) -> None:  # fmt: skip
        """Entries `slots` of a plane on the device get entries `pages` of one on the host."""
        to, origin = as_bytes(plane), as_bytes(source)
        size = origin.shape[1]
        step = max(1, self.room // max(1, size))
        with self._beside():
            for start in range(0, len(pages), step):
                here = self.numbers(slots[start : start + step])
                there = torch.from_numpy(pages[start : start + step].astype(np.int64))
                buffer = self._buffer(max(self.room, size))[: len(there) * size].view(len(there), size)
                torch.index_select(origin, 0, there, out=buffer)
                to.index_copy_(0, here, buffer.to(self.device, non_blocking=True))
                self._buffers[-1] = self._buffers[-1][0], self.mark()
                self.brought_nbytes += buffer.nbytes

    def numbers(self, x: Int[np.ndarray, " N"]) -> Int[Tensor, " N"]:
        """Numbers of slots on the device, for which the host does not wait."""
        here = torch.from_numpy(x.astype(np.int64))
        return here if self._stream is None else here.pin_memory().to(self.device, non_blocking=True)

    def lift(self, x: Tensor) -> Tensor:
        """What was gathered on the host, on the device, for whoever asked for it."""
        self.brought_nbytes += x.nbytes
        return x.to(self.device)

    def lower(self, x: Tensor) -> Tensor:
        """What the device has made, on the host, now."""
        self.written_nbytes += x.nbytes
        return x.to("cpu")

    def down(self, x: Tensor) -> Tensor:
        """A copy on the host of what the device has made; it is there when `finish` has seen a later `mark`."""
        self.written_nbytes += x.nbytes
        if self._stream is None:
            return x.clone()
        with self._beside():
            x.record_stream(self._stream)
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def mark(self) -> Any:
        """All copies up to now, to be waited for: by `wait` or `finish`."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """What computes waits for the copies before `mark`; the host goes on."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    @staticmethod
    def finish(mark: Any) -> None:
        """The host waits for the copies before `mark`."""
        if mark is not None:
            mark.synchronize()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Copies within the block run on the side, behind what was asked to compute up to now: that may read here."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def _buffer(self, nbytes: int) -> Tensor:
        """The buffer that was used longest ago, whose copy is done; it is the last one then."""
        if len(self._buffers) < (1 if self._stream is None else BUFFERS):
            self._buffers.append((torch.empty(0, dtype=torch.uint8), None))
        else:
            self._buffers.append(self._buffers.pop(0))
        buffer, mark = self._buffers[-1]
        self.finish(mark)
        if len(buffer) < nbytes:
            with torch.inference_mode(False):  # it is written outside, too
                buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[-1] = buffer, None
        return buffer


def as_bytes(plane: Tensor) -> Tensor:
    """A plane as (N, bytes of an entry), no copy."""
    flat = plane.view(len(plane), -1) if plane.dim() > 1 else plane[:, None]
    return flat.view(torch.uint8)
