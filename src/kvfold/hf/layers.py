"""Cache layers as transformers wants them: paged layers that hand over to KVLayer, window layers that free memory."""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from kvfold.hf.attention import HANDLE, PAGED
from kvfold.hf.band import Band, BandLength
from kvfold.hf.eager import eager
from kvfold.hf.gradient import without_gradient
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan


@runtime_checkable
class Owner(Protocol):
    """What a paged layer asks of the cache that it belongs to."""

    call: Any
    """The call of the model in hand: `unread` is the layer that got keys which no attention function has seen yet."""

    def enter(self, ordinal: int, tokens: int, rows: int) -> Plan:
        """A layer is about to attend `tokens` new tokens."""
        ...

    def expect(self, ordinal: int) -> None:
        """It is about to read what it has stored."""
        ...

    def leave(self, ordinal: int, plan: Plan) -> None:
        """A layer has stored them."""
        ...

    def check_consumed(self) -> None:
        """Raise if a layer got keys that no attention function has seen."""
        ...


class PagedLayer(CacheLayerMixin):
    """The transformers side of a KVLayer. `update` only marks the keys; the attention function does the work.

    What belongs to the rows of the batch (`crop`, `reset` and the choice of rows) is the cache's to begin.
    """

    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, owner: Owner, core: KVLayer, latent: bool = False):
        super().__init__()
        self.latent = latent  # whether a key is its value and more, see hf/latent.py
        self.entering: Tensor | None = None  # what entered the attention that runs, where a method admits tokens
        self.owner = weakref.ref(owner)  # no cycle: the pages go when the last reference to the cache goes
        self.core = core

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first attention call knows the shapes."""
        self.is_initialized = True

    @eager
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same tensors, the keys carrying a handle on this layer."""
        owner = self.owner()
        assert owner is not None, "a layer outlived its cache"
        if owner.call.unread is not None:
            owner.check_consumed()
        owner.call.unread, self.is_initialized = self, True
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Called by the attention function: (B, Hq, Q, D) over new and stored tokens."""
        owner, core = self.owner(), self.core
        assert owner is not None, "a layer outlived its cache"
        if owner.call.unread is not self:
            raise ValueError(
                f"{type(module).__name__} attends twice with the keys of one update, as differential attention does, "
                "which a kvfold cache does not support"
            )
        owner.call.unread, hidden, self.entering = None, self.entering, None
        given, wants = (q, k, v), q.requires_grad or k.requires_grad or v.requires_grad
        if wants:
            q, k, v = (x.detach() for x in given)
        ordinal, parts = core.site.ordinal, owner.call.parts
        if parts is None:
            plan = owner.enter(ordinal, q.shape[2], q.shape[0])
        else:
            plan = owner.enter(ordinal, parts.total, q.shape[0]) if parts.start == 0 else owner.call.plan
            valid = parts.valid
        if core.memory is not None:
            owner.expect(ordinal)
        out = core.attend(q, k, v, valid, scale, plan, module, hidden, parts)
        if (plan.defer or plan.late or core.memory is not None) and (parts is None or parts.last):
            owner.leave(ordinal, plan)
        if wants:
            return without_gradient(out, f"layer {core.layer} of {type(module).__name__}", *given)
        return out

    def dense_bytes(self, tokens: int | None) -> int:
        """Bytes that transformers' own layer would hold for as many tokens; None: as this one has read."""
        total, (_, d, dv) = self.core.dense_bytes(tokens), self.core.shape or (0, 1, 0)
        return total * d // (d + dv) if self.latent else total

    @property
    def batch_size(self) -> int:
        return self.core.batch

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, PAGED

    def get_seq_length(self) -> int:
        # A graph is made before any layer has read: there is one number that changes with every token, not three.
        return self.core.rows.width if torch.compiler.is_compiling() else self.core.width

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.core.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """What the rows have read no longer goes; `Cache.crop` says how much that is."""
        self.core.drop_from(self.core.seen)

    def _select(self, rows: np.ndarray) -> None:
        if self.core.segments:
            self.core.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(np.repeat(np.arange(self.core.batch), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(np.arange(self.core.batch)[indices.cpu().numpy()])

    def offload(self) -> None:
        raise NotImplementedError("offloading=True: a kvfold cache does not move its pages")

    def prefetch(self) -> None:
        raise NotImplementedError("offloading=True: a kvfold cache does not move its pages")


class WindowLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, but it reads its band alone, and what leaves the window is freed.

    The parent keeps a slice of the whole prompt's keys, and with it all of the prompt's memory. `band`: what the keys
    carry to our attention, through which this layer's goes, and so no T x T mask is made.
    """

    keys: Tensor
    values: Tensor
    band: Band | None = None
    places: Tensor | None = None
    """Text positions of what is held, (B, n), -1 for padding, where a method narrowed the prompt on its way here."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns; of a narrowed text nothing yet: `end_at` knows where.

        Raises RuntimeError where the window has let go of tokens that would be in it again.
        """
        super().crop(tokens_to_remove if self.places is None else max(0, tokens_to_remove))
        self._give_back()

    def end_at(self, ends: Int[Tensor, "B"]) -> None:
        """Forget what stands in a narrowed text at `ends` and behind it; rows with less left are padded on the left."""
        if self.places is None or not self.is_initialized:
            return
        places = self.places.masked_fill(self.places >= ends.to(self.places.device)[:, None], -1)
        left = int((places >= 0).sum(1).max())
        columns = torch.argsort((places >= 0).byte(), dim=1, stable=True)[:, places.shape[1] - left :]
        self.places = places.gather(1, columns)
        wide = columns.to(self.keys.device)[:, None, :, None]
        wide = wide.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.cumulative_length = left

    @property
    def tokens(self) -> int:
        """Columns that are held."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return storage_bytes(self)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that transformers' own window would hold."""
        return self.nbytes

    def compact(self) -> None:
        """Give memory back that a copy of this layer held."""

    def _select(self, rows: Tensor) -> None:
        self.places = None if self.places is None else self.places[rows.to(self.places.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.places = None if self.places is None else self.places.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():  # transformers' own attention, over what makes one graph fit all steps
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()
        else:
            self._give_back()
        if self.band is not None:
            setattr(keys, HANDLE, self.band)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length)
        banded = self.band is not None and not torch.compiler.is_compiling()
        return (BandLength(length, self.sliding_window), offset) if banded else (length, offset)

    def _give_back(self) -> None:
        """Free what has left the window; while the past is recorded, all is held."""
        if self.is_initialized and self.keys.untyped_storage().nbytes() > 1.1 * self.keys.nbytes:
            self.keys, self.values = self.keys.clone(), self.values.clone()


def tensors(layer: Any) -> list[Tensor]:
    """All tensors that a cache layer of transformers holds, in dictionaries and lists too."""
    found: list[Tensor] = []
    todo = list(vars(layer).values())
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
    return found


def mark_of(layer: Any) -> Any:
    """How far a layer that is not on pages has read: another mark when it has read on."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.cumulative_length
    return tuple((id(state), state._version) for state in tensors(layer) if not state.is_inference())


def storage_bytes(layer: Any) -> int:
    """Bytes of the storages behind those tensors, each counted once."""
    stores = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(layer)}
    return sum(stores.values())


def beside_bytes(layer: Any) -> int:
    """Bytes that a layer which is not on pages of its cache holds."""
    return layer.nbytes if isinstance(layer, WindowLayer) else storage_bytes(layer)


def held_bytes(layers: Sequence[Any]) -> list[int]:
    """Bytes that each layer holds; what two of them share counts for the first."""
    counted: set[int] = set()
    return [
        layer.core.bytes_beside(counted) if isinstance(layer, PagedLayer) else beside_bytes(layer) for layer in layers
    ]


def dense_bytes(layer: Any, tokens: int | None) -> int:
    """Bytes that a layer of transformers' own would hold, see `PagedLayer.dense_bytes`."""
    if isinstance(layer, PagedLayer):
        return layer.dense_bytes(tokens)
    return layer.dense_nbytes if isinstance(layer, WindowLayer) else storage_bytes(layer)


__all__ = [
    "Owner", "PagedLayer", "WindowLayer", "beside_bytes", "dense_bytes", "held_bytes", "mark_of", "storage_bytes",
    "tensors",
]  # fmt: skip
