"""EliteKV's calibration: which rotary pairs of each head stay, and the directions of all else (arXiv:2503.01586)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.calibration.gate import halves, window
from kvfold.calibration.run import Run
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.methods.elitekv import turning
from kvfold.rotation import Rope
from kvfold.views import LayerView

QUERIES = 32
"""Queries of a text whose logits are looked at, at places drawn by chance."""
SHARE = 0.5
"""Bytes of what is held, of those of keys and values, where nobody says a rank."""


@dataclass(frozen=True)
class EliteText:
    """What one text has shown of one layer: some queries and all keys, as they attend and turned back to position 0."""

    asked: tuple[Float[Tensor, "H G W D"], Float[Tensor, "H G W D"]]
    keys: tuple[Float[Tensor, "H T D"], Float[Tensor, "H T D"]]
    behind: Bool[Tensor, "W T"]
    """Keys that a query does not see."""
    scale: float

    def changes(self, pairs: Int[Tensor, "P 2"]) -> Float[Tensor, "H G P W T"]:
        """What a query's logit changes by where a pair is not rotated; 0 for keys that it does not see."""
        turned, flat = (
            torch.einsum("hgwpe,htpe->hgpwt", asked[..., pairs], keys[..., pairs])
            for asked, keys in zip(self.asked, self.keys, strict=True)
        )
        return ((flat - turned) * self.scale).masked_fill(self.behind, 0.0)


@dataclass
class EliteLayer:
    """What texts have shown of one layer."""

    rope: Rope
    pairs: Int[Tensor, "P 2"]
    """The pairs of channels that a head may keep rotated."""
    heads: int
    key_size: int
    value_size: int
    texts: list[EliteText] = field(default_factory=list)
    gram: Float[Tensor, "N N"] | int = 0
    """Sum over tokens of y y', y the un-rotated keys of all heads, then all values; float64."""


def elite_order(changes: Sequence[Float[Tensor, "H G P W T"]], count: int) -> Int[Tensor, "H r"]:
    """RoPElite: the first `count` pairs of each head, greedily, the one first that brings the logits nearest.

    Rotating only a set E of pairs leaves a logit off by the sum of the changes of all others. Each round adds to E the
    pair with which the mean of that sum's amount is least; heads of a group add up, and ties go to the lower pair.
    """
    heads, pairs = changes[0].shape[0], changes[0].shape[2]
    chosen = torch.zeros(heads, pairs, dtype=torch.bool)
    order = torch.zeros(heads, count, dtype=torch.int64)
    left = [text.sum(2, keepdim=True) for text in changes]
    for turn in range(count):
        off = torch.zeros(heads, pairs, dtype=torch.float64)
        for rest, text in zip(left, changes, strict=True):
            off += (rest - text).abs().mean((1, 3, 4), dtype=torch.float64)
        order[:, turn] = off.masked_fill(chosen, torch.inf).argmin(-1)
        chosen.scatter_(1, order[:, turn : turn + 1], True)
        for rest, text in zip(left, changes, strict=True):
            index = order[:, turn].view(-1, 1, 1, 1, 1).expand(-1, text.shape[1], 1, *text.shape[3:])
            rest -= text.gather(2, index)
    return order


def joint_basis(gram: Float[Tensor, "N N"], rank: int) -> Float[Tensor, "N C"]:
    """J-LRD: the `rank` directions in which most of y lies, by its Gram matrix, the largest first; float32.

    They are the right singular vectors of the matrix whose rows are the y. The sign of each is fixed.
    """
    vectors = torch.linalg.eigh(gram.double())[1].flip(-1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    made: Tensor = (vectors * largest.sign()).float().contiguous()
    return made


def rest_of(elite: Bool[Tensor, "H D"], value_size: int) -> Int[Tensor, " N"]:
    """Where y has the numbers that the latent holds: of each head the rest of its key, then its value."""
    heads, size = elite.shape
    keys = [head * size + (~elite[head]).nonzero()[:, 0] for head in range(heads)]
    start = heads * size
    values = [torch.arange(start + h * value_size, start + (h + 1) * value_size) for h in range(heads)]
    return torch.cat([part for both in zip(keys, values, strict=True) for part in both])


def sizes(run: Run, heads: int, size: int, value_size: int, pairs: int) -> tuple[int, int]:
    """Elite pairs and rank: what is asked for, else an eighth of the channels and half of the bytes.

    Raises ValueError for what can't be.
    """
    count = max(1, size // 8) if run.pairs is None else run.pairs
    if not 0 < count <= pairs:
        raise ValueError(f"pairs={run.pairs} must be between 1 and {pairs}, the pairs that RoPE rotates in each head")
    most = heads * (size - 2 * count + value_size)
    rank = max(1, int(SHARE * heads * (size + value_size)) - 2 * count * heads) if run.rank is None else run.rank
    if not 0 < rank <= most:
        raise ValueError(f"rank={rank} must be between 1 and {most}, the numbers that are not rotated")
    return count, rank


def elitekv_tensors(run: Run) -> dict[str, Any]:
    """`elite` (L, H, D), which channels stay rotated, and `basis` (L, N, C), float16; see `kvfold.formats.Basis`.

    Smaller than the paper's search (2000 texts of 2048 tokens, all queries), to run without a GPU; more `samples` and
    `length` go there. The directions are those of keys and values on the same texts, not of the weights.
    """
    samples, length = run.sizes(12, 512)
    layers = look(run, samples, length)
    one = layers[0]
    heads, value_size = one.heads, one.value_size
    count, rank = sizes(run, heads, one.key_size, value_size, min(len(each.pairs) for each in layers))
    elite, basis, off = [], [], []
    for number, seen in enumerate(layers):
        run.tick(f"layer {number + 1} of {len(layers)}: {count} pairs, {rank} directions")
        changes = [text.changes(seen.pairs) for text in seen.texts]
        flags = elite_flags(seen, elite_order(changes, count))
        rows = rest_of(flags, value_size)
        assert isinstance(seen.gram, Tensor)
        gram = seen.gram[rows][:, rows]
        made = joint_basis(gram, rank)
        elite.append(flags)
        basis.append(made)
        off.append(1.0 - float((made.double() * (gram @ made.double())).sum() / gram.diagonal().sum()))
    run.about.update(
        pairs=count, rank=rank, queries=QUERIES,
        ratio=round((2 * count * heads + rank) / (heads * (one.key_size + value_size)), 4),
        **{"share of keys and values outside": round(sum(off) / len(off), 5)},
    )  # fmt: skip
    return {"elite": torch.stack(elite), "basis": torch.stack(basis).half()}


def elite_flags(seen: EliteLayer, order: Int[Tensor, "H r"]) -> Bool[Tensor, "H D"]:
    """The channels of the pairs that were chosen."""
    flags = torch.zeros(len(order), seen.key_size, dtype=torch.bool)
    return flags.scatter_(1, seen.pairs[order].flatten(1), True)


@torch.no_grad()
def look(run: Run, samples: int, length: int) -> list[EliteLayer]:
    """Read `samples` windows of running text. Raises ValueError where a layer's rotation is not known."""
    rng, texts = random.Random(run.seed), halves(run)[0]
    found: list[EliteLayer] = []
    for sample in range(samples):
        run.tick(f"text {sample + 1} of {samples}")
        ids = window(texts, rng, length, run.first)
        places = sorted(rng.sample(range(ids.shape[1]), min(QUERIES, ids.shape[1])))
        cache = Cache(run.model, "full")

        def observe(view: LayerView, places: list[int] = places) -> None:
            layer = view.place.ordinal
            if layer == len(found):
                found.append(_new(view))
            _add(found[layer], view, places)

        with cache.observed(observe):
            run.model(ids.to(run.model.device), logits_to_keep=1, **with_cache(run.model, cache))
    return found


def _new(view: LayerView) -> EliteLayer:
    rope, size = view.place.rope, view.keys.shape[-1]
    if rope is None:
        raise ValueError(f"elitekv needs to know what rotates the keys of layer {view.place.layer}, which is not known")
    pairs = turning(rope, size)
    if not len(pairs):  # nothing turns, whichever stay
        pairs = torch.arange(size // 2 * 2).view(2, -1).mT.contiguous()
    return EliteLayer(rope, pairs, view.heads, size, view.values.shape[-1])


def _add(seen: EliteLayer, view: LayerView, places: list[int]) -> None:
    """What one text shows of a layer."""
    keys, values, asked = (x[0].float() for x in (view.keys, view.values, view.queries.states))  # heads T D
    at = view.positions[:1, :1]  # 1 1 T
    heads, group = len(keys), len(asked) // len(keys)
    flat = seen.rope.shift(keys[None], -at.expand(1, heads, -1))[0]
    asked_at = at[..., places].expand(1, len(asked), -1)
    asked = asked[:, places]
    asked_flat = seen.rope.shift(asked[None], -asked_at)[0]
    behind = at[0, 0] > at[0, 0, places, None]  # W T
    split = (x.reshape(heads, group, *x.shape[1:]).cpu() for x in (asked, asked_flat))
    seen.texts.append(EliteText((next(split), next(split)), (keys.cpu(), flat.cpu()), behind.cpu(), view.place.scale))
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in (flat, values)], -1).double()  # T N
    seen.gram = seen.gram + (rows.mT @ rows).cpu()


__all__ = ["elite_order", "elitekv_tensors", "joint_basis", "rest_of", "sizes"]
