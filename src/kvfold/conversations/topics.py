"""A conversation in segments, their embeddings, and the episodes that those fall into (EpiCache's first stage)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvfold.hf.anatomy import text_decoder
from kvfold.hf.looking import ids_device
from kvfold.hf.tables import kept_tables

Turn = tuple[str, str] | str
"""Who speaks, and what; or a line as it stands."""
Encoder = Callable[[list[str]], Any]
"""From texts to their embeddings, an array (N, D)."""
SEED, RESTARTS = 42, 10


@dataclass(frozen=True)
class Cluster:
    """Segments that belong together, by their place in the conversation; the centroid is their mean, not normalised."""

    members: tuple[int, ...]
    centroid: np.ndarray

    def typical(self, vectors: np.ndarray, count: int) -> list[int]:
        """The `count` members with the highest cosine to the centroid, in the order of the conversation."""
        near = vectors[list(self.members)] @ self.centroid  # the centroid's length is the same for all
        best = np.argsort(-near, kind="stable")[:count]
        return sorted(self.members[i] for i in best)

    def joined(self, member: int, vectors: np.ndarray) -> "Cluster":
        """With one more member."""
        members = (*self.members, member)
        return replace(self, members=members, centroid=vectors[list(members)].mean(0))


def segments(turns: Sequence[Turn], window: int) -> list[str]:
    """The conversation cut at every `window` turns, as text."""
    said = [f"{turn}\n" if isinstance(turn, str) else f'{turn[0]} said, "{turn[1]}"\n' for turn in turns]
    return ["".join(said[i : i + window]) for i in range(0, len(said), window)]


def embed(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Embeddings of length 1, (N, D) float64. Raises ValueError where the encoder gives something else."""
    found = np.asarray(encoder(texts), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
        raise ValueError(f"encoder={encoder!r} must give a finite array (N, D) for N texts, not {found.shape}")
    unit: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)
    return unit


def cluster(vectors: np.ndarray, count: int) -> list[Cluster]:
    """K-means (k-means++, 10 restarts, seed 42), in the order of each cluster's first segment; at most `count`."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError('clustering needs scikit-learn: pip install "kvfold[episodes]"') from None
    count = min(count, len(np.unique(vectors, axis=0)))
    fitted = KMeans(count, init="k-means++", n_init=RESTARTS, random_state=SEED).fit(vectors)
    groups = [np.flatnonzero(fitted.labels_ == label) for label in range(count)]
    return [Cluster(tuple(map(int, g)), vectors[g].mean(0)) for g in sorted(groups, key=lambda g: int(g[0]))]


class OwnStates:
    """The model's own last hidden states, their mean over a text, less the mean of all texts of the first call.

    What all texts of a language model share outweighs what sets them apart, so it is taken out.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.centre: np.ndarray | None = None

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        means = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            with kept_tables(self.model):
                states = text_decoder(self.model)(
                    torch.tensor([ids], device=ids_device(self.model), dtype=torch.int64), use_cache=False
                )
            means.append(states.last_hidden_state[0].float().mean(0).cpu().numpy())
        found = np.stack(means)
        if self.centre is None:
            self.centre = found.mean(0) if len(found) > 1 else np.zeros_like(found[0])
        centred: np.ndarray = found - self.centre
        return centred


def encoder_of(encoder: Encoder | str | None, model: PreTrainedModel, tokenizer: Any) -> Encoder:
    """A callable as it is, the name of a sentence-transformers model, or (None) the model's own states."""
    if encoder is None:
        return OwnStates(model, tokenizer)
    if not isinstance(encoder, str):
        return encoder
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            f"encoder={encoder!r} needs sentence-transformers: pip install sentence-transformers"
        ) from None
    loaded: Encoder = SentenceTransformer(encoder).encode
    return loaded
