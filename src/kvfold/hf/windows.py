"""Sliding windows in a format: a layer holds what it has read in codes, and a step reads them as they lie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvfold.formats import POSITION, Chunk, Format, Segment, Spec
from kvfold.formats.oldest import drop_oldest, unit_of
from kvfold.hf.attention import HANDLE
from kvfold.hf.band import SOFTMAX, Band
from kvfold.hf.eager import eager
from kvfold.hf.gradient import without_gradient
from kvfold.hf.layers import WindowLayer


@dataclass(frozen=True)
class CodedBand(Band):
    """What the keys of a window in codes carry: of a step's one token also the segment that holds it and the rest."""

    segment: Segment | None = None
    layer: int = 0

    def is_in(self, k: Tensor, mask: Tensor | None) -> bool:
        return self.segment is None and super().is_in(k, mask)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, scale: float | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `Band.attend`. Raises ValueError for a softmax that codes can't be read with, before a step comes."""
        given = [name for name in SOFTMAX if kwargs.get(name) is not None]
        if given or kwargs.get("dropout"):
            name = type(module).__name__
            raise ValueError(f"{name} attends with {(given or ['dropout'])[0]}, which no window in codes does")
        if self.segment is None:
            return super().attend(module, q, k, v, padding, scale, **kwargs)
        heads, scale = k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
        asked = q.detach().view(len(q), heads, -1, 1, q.shape[-1])
        out, _, _ = self.segment.attend(asked, scale, read=self._seen(self.segment, padding))
        answer = out.flatten(1, 2).transpose(1, 2).contiguous()
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            answer = without_gradient(answer, f"layer {self.layer} of {type(module).__name__}", q, k, v)
        return answer, None

    def _seen(self, segment: Segment, padding: Tensor | None) -> Bool[Tensor, "B H T"] | None:
        """Which slots the newest token sees; None: all. `padding`: see `Band.attend`."""
        counts = segment.counts()
        if padding is not None and padding.dim() == 4:  # a model's own mask, of all columns up to the newest
            padding = padding[:, 0, -1].expand(len(counts), -1)
        if padding is not None and bool(padding[:, -int(counts.max()) :].all()):
            padding = None
        if padding is None and counts.min() == segment.longest <= self.window:
            return None
        valid, _ = segment.columns()
        age = valid.flip(-1).cumsum(-1).flip(-1) - 1  # of the newest 0, of the one before it 1
        seen: Tensor = valid & (age < self.window)
        if padding is not None:
            told = padding.bool().to(age.device)[:, None].expand(*age.shape[:2], -1)
            seen &= told.gather(-1, (told.shape[-1] - 1 - age).clamp(min=0)) & (age < told.shape[-1])
        return seen


class CodedWindow(WindowLayer):
    """A sliding-window layer whose tokens lie in a segment of a format; no method sees them.

    What a call of the model reads is attended to as it is and goes into the segment when the call is over: until then
    it is in `keys` and `values`, (B, H, n, D), behind what the segment holds; so is all that assisted decoding may take
    back. Codes are made once. A page of them stays until all its tokens have left the window, and pages begin where
    they would had the tokens come one by one, so that a prompt leaves what a stream of tokens does.
    """

    def __init__(self, sliding_window: int, form: Format, index: int):
        super().__init__(sliding_window=sliding_window)
        self.form, self.index, self.unit = form, index, unit_of(form)
        self.segment: Segment | None = None
        self.band = CodedBand(sliding_window, layer=index)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0].detach().clone(), value_states[:, :, :0].detach().clone()

    @eager
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: of one new token itself, with a handle on the segment; of several the window
        before them, too."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.cumulative_length += new
        if new == 1 and not self.record_past and not self.keys.shape[2]:
            self._store(key_states.detach(), value_states.detach())
            assert self.segment is not None
            setattr(key_states, HANDLE, CodedBand(self.sliding_window, self.segment, self.index))
            return key_states, value_states
        visible = self.sliding_window - 1 + new
        held = [torch.cat(each, 2) for each in zip(self._past(), (key_states, value_states), strict=True)]
        self.keys = torch.cat([self.keys, key_states.detach()], 2)
        self.values = torch.cat([self.values, value_states.detach()], 2)
        self._trim()
        keys, values = (states[:, :, -visible:] for states in held)
        setattr(keys, HANDLE, self.band)
        return keys, values

    def _past(self) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B H N Dv"]]:
        """What is held, as the model computes in; rows that hold less have zeros in front."""
        if self.segment is None or not self.segment.longest:
            return self.keys, self.values
        chunk = self.segment.dense()
        if not bool(chunk.valid.all()):
            most = int(chunk.valid.sum(-1).max())
            order = torch.argsort(chunk.valid.byte(), dim=-1, stable=True)[..., chunk.valid.shape[-1] - most :]
            chunk = chunk.take(order)
            there = chunk.valid[..., None]
            chunk = Chunk(chunk.keys * there, chunk.values * there, chunk.valid)
        return torch.cat([chunk.keys, self.keys], 2), torch.cat([chunk.values, self.values], 2)

    def _trim(self) -> None:
        """Of what came in this call only the window is wanted later, from where a page begins."""
        most = self.sliding_window + self.unit - 1
        if not self.record_past and self.keys.shape[2] > most:
            self.keys, self.values = (x[:, :, -most:].clone() for x in (self.keys, self.values))

    def settle(self) -> None:
        """A call is over: what it read goes into the segment."""
        if self.record_past or not self.is_initialized or not self.keys.shape[2]:
            return
        self._trim()
        first = self.cumulative_length - self.keys.shape[2]
        begins = max(0, self.cumulative_length - self.sliding_window) // self.unit * self.unit
        if first <= begins and self.segment is not None:
            self.segment.clear()
        behind = max(0, begins - first)
        self._store(self.keys[:, :, behind:], self.values[:, :, behind:])
        self.keys, self.values = (x[:, :, :0].clone() for x in (self.keys, self.values))

    def _store(self, keys: Tensor, values: Tensor) -> None:
        b, h, new, _ = keys.shape
        last = self.cumulative_length
        places = torch.arange(last - new, last, dtype=torch.int32, device=keys.device).expand(b, h, -1)
        chunk = Chunk(keys, values, torch.ones_like(places, dtype=torch.bool), {POSITION: places})
        if self.segment is None:
            with torch.inference_mode(False):
                self.segment = self.form.open(Spec.of(chunk, layer=self.index))
        self.segment.append(chunk, even=True)
        over = np.maximum(self.segment.counts() - self.sliding_window, 0)
        if over.max() >= self.unit:
            drop_oldest(self.form, self.segment, over // self.unit * self.unit)

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return (0 if self.segment is None else int(self.segment.counts().max(initial=0))) + super().tokens

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.segment is None else self.segment.nbytes)

    def row_nbytes(self, batch: int) -> np.ndarray:
        """Bytes of each row, (B,)."""
        held = np.zeros(batch, dtype=np.int64) if self.segment is None else self.segment.row_nbytes()
        sizes: np.ndarray = held + super().nbytes // max(1, batch)
        return sizes

    @property
    def dense_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        (b, h, _, d), dv = self.keys.shape, self.values.shape[-1]
        held = min(self.cumulative_length, self.sliding_window - 1)
        return int(b * h * held * (d + dv) * self.keys.element_size())

    # -- rows --------------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns.

        Raises RuntimeError where the window has let go of tokens that would be in it again, and for what was read
        before assisted decoding began.
        """
        length = self.cumulative_length
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if self.record_past or not count:
            if count > (self.keys.shape[2] if self.is_initialized else 0):
                raise RuntimeError(f"crop({tokens_to_remove}): a window in codes takes back what is recorded alone")
        elif length >= self.sliding_window:
            raise RuntimeError(f"crop({tokens_to_remove}): a window that was full does not know what it has let go of")
        self.cumulative_length -= min(count, length)
        if count and self.record_past:
            left = self.keys.shape[2] - count
            self.keys, self.values = self.keys[:, :, :left].clone(), self.values[:, :, :left].clone()
        elif count:
            self.settle()
            if self.segment is not None:
                self.segment.truncate(np.maximum(self.segment.counts() - count, 0))

    def end_recording(self) -> None:
        """Nobody takes anything back any more."""
        self.record_past = False
        self.settle()

    def choose(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was."""
        if not self.is_initialized:
            return
        index = torch.from_numpy(rows).to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        if self.segment is not None:
            old, self.segment = self.segment, self.segment.select(rows)
            old.clear()  # what only rows that are gone held is free
            self.segment.compact()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.choose(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.choose(np.repeat(np.arange(len(self.keys)), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.choose(np.arange(len(self.keys))[indices.cpu().numpy()])

    def compact(self) -> None:
        if self.segment is not None:
            self.segment.compact()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodedWindow":
        """A second layer with the same content; pages are shared until one of the two writes them."""
        other = CodedWindow(self.sliding_window, self.form, self.index)
        other.cumulative_length, other.record_past = self.cumulative_length, self.record_past
        if self.is_initialized:
            other.lazy_initialization(self.keys, self.values)
            other.keys, other.values = self.keys.clone(), self.values.clone()
            if self.segment is not None:
                other.segment = self.segment.select(np.arange(len(self.keys)))
        return other

    def join(self, other: "CodedWindow") -> None:
        """Take the rows of another such layer behind ours; both have read something, and no call is going on."""
        for layer in (self, other):
            layer.settle()  # after a call that failed
        assert self.segment is not None and other.segment is not None
        self.segment.join(other.segment)
        self.keys, self.values = (torch.cat(x) for x in ((self.keys, other.keys), (self.values, other.values)))
        self.cumulative_length = max(self.cumulative_length, other.cumulative_length)
