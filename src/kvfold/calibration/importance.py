"""NOSA's training: what each token is worth whoever asks, by its values, the model frozen (arXiv:2510.13602).

Reconstructed: the official training code is not public, and trains the whole model. Each layer learns alone, from what
full attention does in it on running text, by two losses, added:

- importance: -sum_b a_b log softmax_b(P_b) / sum_b a_b over the blocks that are neither always read nor chosen by the
  query, a_b the full attention that the query heads of a KV head give block b, and P_b its importance before the scale
  A, softplus(delta(v)) pooled as E is. A choice of blocks has no gradient; this is least where importance is the log
  of the attention that blocks get on average, so that the best by it are those that lose least.
- agreement: behind the layer's output projection the mean square of the difference between attention over the chosen
  blocks, with e added to logits, and full attention, over the mean square of the latter. It says how large e is.

The two are apart because the best e to add is small in a model that was not trained with any, while the best one to
rank by is not: A trains by agreement alone, and is held above `FLOOR`, for below 0 it would turn the order around.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvfold.calibration.by_layer import ByLayer, frozen, views_of
from kvfold.calibration.gate import halves, window
from kvfold.calibration.run import Run
from kvfold.hf.anatomy import projected
from kvfold.methods.nosa import NOSA, Importance, choice
from kvfold.ops import top_mask
from kvfold.selectors import Lasting
from kvfold.selectors.windows import WindowMeans, best_over_blocks, over_windows, stride_means
from kvfold.views import LayerView

BUDGETS = (0.2, 0.3, 0.4)
"""The shares of a text that queries read, one of them for each draw of queries."""
RATE, DRAWS, QUERIES, FLOOR = 5e-3, 2, 96, 1e-3
"""Adam's rate (in the last third it falls to a tenth), draws of queries from a text and how many, the least A."""


@dataclass(frozen=True, eq=False)
class AskedBlocks:
    """Some queries of a layer over one text, the blocks that they read in any case, and those left to choose."""

    q: Float[Tensor, "H G N D"]
    k: Float[Tensor, "H T D"]
    v: Float[Tensor, "H T Dv"]
    places: Int[Tensor, " N"]
    """Where in the text the queries stand."""
    read: Bool[Tensor, "H N B"]
    """Blocks that are always read, and those that the query chooses."""
    left: Bool[Tensor, "H N B"]
    """Those before a query's own that are not read so."""
    wanted: Int[Tensor, "H N"]
    """How many of them importance adds."""
    index: WindowMeans
    scale: float
    dtype: torch.dtype
    """What the model computes in."""

    @property
    def seen(self) -> Bool[Tensor, "N T"]:
        """Which tokens each query sees."""
        return torch.arange(self.k.shape[1], device=self.k.device) <= self.places[:, None]

    def logits(self) -> Float[Tensor, "H G N T"]:
        """Of all tokens that a query sees, as full attention has them."""
        found: Tensor = torch.einsum("hgnd,htd->hgnt", self.q, self.k) * self.scale
        return found.masked_fill(~self.seen, -torch.inf)


def asked_of(view: LayerView, places: Int[Tensor, " N"], method: NOSA, lasting: Lasting | None) -> AskedBlocks:
    """The queries at `places` of a view of one text; `lasting` None: the query chooses all that is free."""
    selection, h = choice(method, lasting is not None, lasting), view.heads
    index, seen = selection.index, places.cpu().numpy() + 1
    assert isinstance(index, WindowMeans)
    k, v = view.keys[0].float(), view.values[0].float()
    q = view.queries.states[0][:, places].float().reshape(h, -1, len(places), k.shape[-1])
    units, room = -(-seen // index.unit), selection.room(seen)
    always = selection.always.units(index.unit, units[:, None], room)[:, 0]  # N B
    free = room - always.sum(-1)
    about = torch.from_numpy((np.arange(always.shape[1]) < units[:, None]) & ~always).to(k.device).expand(h, -1, -1)
    means = over_windows(stride_means(k, index.stride), index.wide)
    given = (torch.einsum("hgnd,hmd->hgnm", q, means) * q.shape[-1] ** -0.5).masked_fill(
        ~whole(index, places, means.shape[1]), -torch.inf
    )
    worth = blocks(index, given.softmax(-1).nan_to_num(0.0).sum(1), about.shape[-1])
    asks = free if lasting is None else lasting.asked(room, free[:, None])[:, 0]
    counts = torch.from_numpy(np.maximum(asks, 0)).to(k.device).expand(h, -1)
    best = top_mask(worth.masked_fill(~about, -torch.inf), counts)
    read = best | torch.from_numpy(always).to(k.device)
    wanted = torch.from_numpy(np.maximum(free - asks, 0)).to(k.device).expand(h, -1)
    return AskedBlocks(q, k, v, places, read, about & ~best, wanted, index, view.place.scale, view.values.dtype)


def whole(index: WindowMeans, places: Int[Tensor, " N"], windows: int) -> Bool[Tensor, "N M"]:
    """Which windows have all their tokens where queries at these places ask."""
    last = torch.arange(windows, device=places.device) * index.stride + index.window - 1
    return last <= places[:, None]


def blocks(index: WindowMeans, x: Float[Tensor, "H N M"], number: int) -> Float[Tensor, "H N B"]:
    """What blocks get of windows; those that no window overlaps, at the end of a text, the least."""
    found = best_over_blocks(x, index.parts, index.wide)[..., :number]
    return F.pad(found, (0, number - found.shape[-1]), value=-torch.inf)


def pooled(asked: AskedBlocks, each: Float[Tensor, "H T"]) -> Float[Tensor, "H N B"]:
    """What tokens have as their blocks have it, of windows that are whole where a query asks."""
    index = asked.index
    number = each.shape[1] // index.stride
    cut = each[:, : number * index.stride].reshape(len(each), number, index.stride)
    means = over_windows(cut.mean(-1, keepdim=True), index.wide)[..., 0]
    there = whole(index, asked.places, means.shape[1])
    return blocks(
        index, means[:, None].expand(-1, len(there), -1).masked_fill(~there, -torch.inf), asked.left.shape[-1]
    )


def chosen(asked: AskedBlocks, worth: Float[Tensor, "H N B"]) -> Bool[Tensor, "H N B"]:
    """All blocks that are read where those that are left are worth so much."""
    return asked.read | top_mask(worth.detach().masked_fill(~asked.left, -torch.inf), asked.wanted)


def losses(asked: AskedBlocks, heads: Importance | None, module: Any) -> tuple[Tensor, Tensor]:
    """(importance, agreement) of one layer; `heads` None: no token has any, and the first is 0."""
    logits, (h, t, _) = asked.logits(), asked.k.shape
    full, read, ranking = logits.softmax(-1), asked.read, logits.new_zeros(())
    if heads is not None:
        slope = heads.slope(asked.v[None])[0]
        worth, unit = pooled(asked, slope), asked.index.unit
        number = worth.shape[-1]
        mass = F.pad(full.sum(1), (0, number * unit - t)).reshape(h, -1, number, unit).sum(-1) * asked.left
        ways = worth.masked_fill(~asked.left, -torch.inf).log_softmax(-1).masked_fill(~asked.left, 0.0)
        ranking = -(mass * ways).sum() / mass.sum().clamp(min=1e-9)
        read = chosen(asked, worth)
        logits = logits + (heads.scale[:, None] * slope)[:, None, None]
    wide = read.repeat_interleave(asked.index.unit, -1)[..., :t]
    slots = F.pad(wide, (0, t - wide.shape[-1]))  # nobody asks at the text's end
    few = logits.masked_fill(~slots[:, None], -torch.inf).softmax(-1)
    outs = [(x @ asked.v[:, None]).flatten(0, 1).transpose(0, 1).flatten(1) for x in (few, full)]  # N (H G Dv)
    got, want = (projected(module, out.to(asked.dtype)).float() for out in outs)
    return ranking, F.mse_loss(got, want) / want.square().mean().clamp(min=1e-12)


class ImportanceTrainer(ByLayer):
    """The heads of all layers."""

    def __init__(self, views: list[LayerView], rate: float = RATE):
        layers = list[dict[str, nn.Parameter]]()
        for view in views:
            h, width = view.heads, view.heads * view.values.shape[-1]
            made = {
                "delta": torch.zeros(h, width, dtype=torch.float32),
                "scale": torch.full((h,), FLOOR, dtype=torch.float32),
            }
            layers.append({name: nn.Parameter(x.to(view.valid.device)) for name, x in made.items()})
        super().__init__(layers, rate)

    def heads(self, ordinal: int) -> Importance:
        """One layer's."""
        return Importance(**self.layers[ordinal])

    def learn(self, view: LayerView, asked: AskedBlocks) -> tuple[float, float]:
        """A step of one layer; its losses before the step."""
        ordinal = view.place.ordinal
        with torch.enable_grad():
            ranking, error = losses(asked, self.heads(ordinal), view.place.module)
            self.descend(ordinal, ranking + error)
        self.layers[ordinal]["scale"].data.clamp_(min=FLOOR)
        return float(ranking.detach()), float(error.detach())

    def data(self) -> dict[str, Tensor]:
        """All layers', in float32: e is added to logits."""
        return self.stacked()


def train_importance(run: Run) -> dict[str, Any]:
    """delta and A of all paged layers, on windows of running text; see above for what they learn.

    In the artefact's provenance: both losses on texts that were held back, before and after, and the second of the
    query's choice alone, without e, at the same budgets.
    """
    steps, length = run.sizes(60, 2048)
    rng, texts = random.Random(run.seed), halves(run)
    with frozen(run.model):
        trainer = ImportanceTrainer(views_of(run, window(texts[0], random.Random(run.seed), length, run.first)))
        before = judged(trainer, run, texts[1], length)
        for step in range(steps):
            trainer.slow_down(step / steps)
            found = [
                trainer.learn(view, asked)
                for view, asked, _ in cases(run, window(texts[0], rng, length, run.first), rng)
            ]
            ranking, error = np.mean(found, 0)
            run.tick(f"step {step + 1} of {steps}: importance {ranking:.3f}, error {error:.4f}")
        after = judged(trainer, run, texts[1], length)
    run.about.update(budgets=BUDGETS, rate=RATE, queries=QUERIES, **{"held out before": before, "held out": after})
    return trainer.data()


def cases(
    run: Run, ids: Int[Tensor, "1 T"], rng: random.Random
) -> Iterator[tuple[LayerView, AskedBlocks, AskedBlocks]]:
    """Each layer's view of a text, and queries of its second half; the last: all that is free the query's choice."""
    total, drawn = ids.shape[1], list[tuple[NOSA, Tensor]]()
    for _ in range(DRAWS):
        places = sorted(rng.sample(range(total // 2, total), min(QUERIES, total - total // 2)))
        drawn.append((NOSA(rng.choice(BUDGETS)), torch.tensor(places, dtype=torch.int64, device=run.model.device)))
    for view in views_of(run, ids):
        for method, at in drawn:
            with torch.no_grad():
                found = (asked_of(view, at, method, each) for each in (Lasting(method.query), None))
                yield view, next(found), next(found)


@torch.no_grad()
def judged(
    trainer: ImportanceTrainer, run: Run, held: list[list[int]], length: int, count: int = 3
) -> dict[str, float]:
    """Losses on texts that were held back, and the error of the query's choice alone; means over layers."""
    rng, found = random.Random(f"{run.seed}:held"), list[tuple[float, float, float]]()
    for _ in range(count):
        for view, asked, alone in cases(run, window(held, rng, length, run.first), rng):
            module = view.place.module
            ranking, error = losses(asked, trainer.heads(view.place.ordinal), module)
            found.append((float(ranking), float(error), float(losses(alone, None, module)[1])))
    means = np.mean(found, 0)
    return {n: round(float(x), 4) for n, x in zip(("importance", "error", "query alone"), means, strict=True)}
