"""EpiCache's conversations: a long dialogue in episodes, one budgeted cache for each (arXiv:2509.17396)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.conversations.topics import Cluster, Encoder, Turn, cluster, embed, encoder_of, segments
from kvfold.hf.anatomy import text_decoder
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.looking import ids_device
from kvfold.hf.words import WORDS
from kvfold.methods.base import Method
from kvfold.methods.registry import parse
from kvfold.options import check_int, check_number


@dataclass
class Episode:
    """Segments that belong together, and a cache of the whole conversation that was filled with those in mind."""

    cluster: Cluster
    cache: Cache
    ids: Int[Tensor, "B T"]
    """What the cache has read."""


class Episodes:
    """Answers questions about a long conversation, each from the cache of the episode that it is about.

    The turns are cut into segments of `window`, embedded, and clustered into `episodes`. For each the whole
    conversation is read in blocks of `block` tokens, and the method falls to its budget after each: with "epicache"
    by the attention of the `medoids` most typical segments (its option `patch`). `opening` stands before the turns.
    `encoder`: a function from texts to an array, the name of a sentence-transformers model, or None for the
    model's own last hidden states, centred. `add` goes on with the conversation: a segment joins the nearest episode,
    whose cache reads it uncompressed; one that holds more than budget + block tokens a head is built anew; a
    cosine to all centroids below `threshold` opens an episode (None: never).
    Differs from the paper: the default encoder is ours, as nothing may be downloaded; centroids follow what joins
    them, and a rebuilt or new episode reads all turns so far (reconstructed, the official code has no update);
    caches stay on the model's device, E of them, each within its budget.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, turns: Sequence[Turn],
        method: str | Method = "epicache(budget=2048)", *,
        block: int = 2048, episodes: int = 4, medoids: int = 4, window: int = 4,
        encoder: Encoder | str | None = None, opening: str = "", threshold: float | None = None,
    ):  # fmt: skip
        for name, value in (("episodes", episodes), ("medoids", medoids), ("window", window)):
            check_int(name, value, 1)
        check_int("block", block, 2)
        if threshold is not None:
            check_number("threshold", threshold, -1.0, 1.0)
        if not turns:
            raise ValueError("turns=[] must have at least one turn")
        self.model, self.tokenizer, self.method, self.opening = model, tokenizer, parse(method), opening
        self.block, self.medoids, self.window, self.threshold = block, medoids, window, threshold
        self.encoder = encoder_of(encoder, model, tokenizer)
        self.peak_tokens, self.peak_nbytes, self.patch_tokens = 0.0, 0, 0
        self.segments = segments(turns, window)
        self.vectors = embed(self.encoder, self.segments)
        self.episodes = [self.built(found) for found in cluster(self.vectors, episodes)]

    @property
    def nbytes(self) -> int:
        """Bytes of all episodes' caches; while one is built `peak_nbytes` counts that one alone, at its largest."""
        return sum(episode.cache.nbytes for episode in self.episodes)

    def built(self, about: Cluster) -> Episode:
        """The conversation so far, read block by block."""
        method, typical = self.method, about.typical(self.vectors, self.medoids)
        if any(option.name == "patch" for option in fields(method)):  # type: ignore[arg-type]
            text = "".join(f"{self.segments[i]}\n" for i in typical)
            method = replace(method, patch=text)  # type: ignore[type-var]
        cache = Cache(self.model, method, prefill_chunk=self.block)
        head, _ = self._frame()
        ids = torch.cat([head, *map(self._ids, self.segments)], 1)
        with torch.no_grad(), self._watched(cache):
            self.model(input_ids=ids, logits_to_keep=1, **with_cache(self.model, cache))
        return Episode(about, cache, ids)

    def route(self, text: str) -> int:
        """The episode that a text is about: the greatest dot product of its embedding with a centroid as it is."""
        (vector,) = embed(self.encoder, [text])
        return self._nearest(vector)

    @torch.no_grad()
    def answer(self, question: str, max_new_tokens: int = 50, **options: Any) -> str:
        """What the model says to a question, greedily unless `options` of `generate` say otherwise.

        Question and answer are read by a fork, so that nothing of them stays.
        """
        episode = self.episodes[self.route(question)]
        _, tail = self._frame()
        ids = torch.cat([episode.ids, self._ids(f"\n\n{question.strip()}"), tail], 1)
        fork = episode.cache.fork()
        with fork.undecided():
            given = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
            said = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), **with_cache(self.model, fork), **given
            )
        text: str = self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def add(self, turns: Sequence[Turn]) -> list[int]:
        """Go on with the conversation; returns which episode each new segment went to."""
        return [self._place(text) for text in segments(turns, self.window)]

    def _place(self, text: str) -> int:
        number = len(self.segments)
        self.segments.append(text)
        self.vectors = np.concatenate([self.vectors, embed(self.encoder, [text])])
        vector = self.vectors[-1]
        centroids = np.stack([episode.cluster.centroid for episode in self.episodes])
        cosines = centroids @ vector / np.linalg.norm(centroids, axis=1).clip(min=1e-12)
        if self.threshold is not None and cosines.max() < self.threshold:
            self.episodes.append(self.built(Cluster((number,), vector)))
            return len(self.episodes) - 1
        where = self._nearest(vector)
        episode = self.episodes[where]
        episode.cluster = episode.cluster.joined(number, self.vectors)
        new = self._ids(text)
        with torch.no_grad(), episode.cache.undecided():
            self.model(input_ids=new, logits_to_keep=1, **with_cache(self.model, episode.cache))
        episode.ids = torch.cat([episode.ids, new], 1)
        if episode.cache.kept_tokens > self.budget(episode.ids.shape[1]) + self.block:
            self.episodes[where] = self.built(episode.cluster)
        return where

    def budget(self, length: int) -> float:
        """Tokens per head that the method's budget allows after so many; all of them where it has none."""
        budget = getattr(self.method, "budget", 1.0)
        return float(budget * length if isinstance(budget, float) else min(budget, length))

    def _nearest(self, vector: np.ndarray) -> int:
        return int(np.argmax([episode.cluster.centroid @ vector for episode in self.episodes]))

    def _frame(self) -> tuple[Tensor, Tensor]:
        """What stands before the turns (`opening` included) and between a question and its answer, as tokens."""
        if getattr(self.tokenizer, "chat_template", None):
            user = [{"role": "user", "content": WORDS}]
            text = self.tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            head, _, tail = text.partition(WORDS)
            return self._ids(head + self.opening), self._ids(tail)
        first = self.tokenizer.bos_token_id
        start = self._ids(self.opening)
        return start if first is None else torch.cat([start.new_tensor([[first]]), start], 1), self._ids("\nAnswer:")

    def _ids(self, text: str) -> Int[Tensor, "B T"]:
        found = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([found], dtype=torch.long, device=ids_device(self.model))

    @contextmanager
    def _watched(self, cache: Cache) -> Iterator[None]:
        """Look at the cache after every pass of the decoder: all layers hold their budgets, a block, and the patch."""

        def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            held = [float(core.counts().mean()) for core in cache.paged]
            self.peak_tokens = max(self.peak_tokens, float(np.mean(held)) if held else 0.0)
            self.peak_nbytes = max(self.peak_nbytes, cache.nbytes)
            if not cache.mode.listening and "input_ids" in kwargs:
                self.patch_tokens = max(self.patch_tokens, kwargs["input_ids"].shape[1])

        handle = text_decoder(self.model).register_forward_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
