"""A decode step as a CUDA graph: captured once, replayed for each token, captured anew when the pages have moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfold.hf.argument import cache_in, with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.layers import PagedLayer
from kvfold.layer.layer import format_of


@contextmanager
def decode_graph(model: PreTrainedModel, cache: Cache) -> Iterator["DecodeGraph"]:
    """Within the block the model replays a CUDA graph for every generated token that goes to `cache`.

        with decode_graph(model, cache):
            model.generate(**inputs, past_key_values=cache)

    Prompts, other caches, and padded or assisted steps run as ever. Raises ValueError where no step could be
    captured: not on CUDA; layers that are no pages; a method that decides about generated tokens, or selects.
    """
    graph, own, forward = DecodeGraph(model, cache), model.__dict__.get("forward"), model.forward

    def step(*args: Any, **kwargs: Any) -> Any:
        token = graph.token_of(args, kwargs)
        if token is None:
            return forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=graph(token), past_key_values=cache)

    model.forward = step
    try:
        yield graph
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class DecodeGraph:
    """One token a row, all rows without padding. `captures` counts how often the step was captured."""

    def __init__(self, model: PreTrainedModel, cache: Cache):
        if model.device.type != "cuda":
            raise ValueError(f"model on {model.device}: a decode graph needs CUDA")
        other = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, PagedLayer)})
        if other:
            raise ValueError(f"{type(model).__name__} has layers that are no pages ({', '.join(other)}): no graph")
        if cache.fast is not None:
            raise ValueError(f"fast_memory={cache.fast.nbytes}: who is on the device changes at every step: no graph")
        groups, sites = cache.rows.groups, [core.site for core in cache.paged]
        formats = [str(g.method) for g in groups for site in sites if not format_of(g.method, site).traits.graphs]
        if formats:
            raise ValueError(f"method={formats[0]} stores tokens in a format whose steps can't be captured: no graph")
        events = ("after_decode", "after_interval", "before_attend", "after_layer", "after_forward")
        busy = [event for event in events if cache.method.listens(event)]
        if busy or cache.method.compact:
            why = ", ".join(busy) or "compact positions"
            raise ValueError(f"method={cache.method} acts on generated tokens ({why}), which a graph can't replay")
        self.cache, self.captures = cache, 0
        self._forward = model.forward
        self._graph: torch.cuda.CUDAGraph | None = None
        self._where: list[Tensor] = []
        self._token = self._logits = torch.empty(0, dtype=torch.float32)
        self._warm = False
        self._given = {**with_cache(model, cache), "use_cache": True}

    def token_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The tokens (B, 1) of a call that the graph can answer, else None."""
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if cache_in(kwargs) is not self.cache or self.cache.pending.recording or not isinstance(ids, Tensor):
            return None
        if ids.shape[1] != 1 or any(core.width == 0 or len(core.segments) != 1 for core in self.cache.paged):
            return None
        if any(core.stored.open.shared for core in self.cache.paged) or self.cache.mode.observe is not None:
            return None
        return ids if mask is None or mask.shape[1] == self.cache.get_seq_length() + 1 else None

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """Logits (B, 1, V) after `token` (B, 1)."""
        cores = self.cache.paged
        if not self._warm:  # a first step outside compiles its kernels
            self._warm = True
            out: Tensor = self._forward(input_ids=token, position_ids=self._positions(), **self._given).logits
            return out
        where = [tensor for core in cores for tensor in core.reserve_step()]
        same = len(where) == len(self._where) and all(a is b for a, b in zip(where, self._where, strict=True))
        if same:
            self.cache.rows.replayed()
            for core in cores:
                core.replayed()
        else:
            self._capture(token)
            self._where = where
        self._token.copy_(token)
        assert self._graph is not None
        self._graph.replay()
        return self._logits.clone()

    def _positions(self) -> Tensor:
        """Where each row's next token stands in its text, (B, 1), int64."""
        return self.cache.rows.clock(self.cache.paged[0].stored.spec.device).long()

    def _capture(self, token: Tensor) -> None:
        """Record a step. What Python counts counts for the replay that follows; on the device nothing runs yet."""
        self._graph, self._token = torch.cuda.CUDAGraph(), token.clone()
        self.captures += 1
        with torch.cuda.graph(self._graph):
            positions = self._positions()
            self._logits = self._forward(input_ids=self._token, position_ids=positions, **self._given).logits
