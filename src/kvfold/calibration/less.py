"""LESS's training: feature maps by which a small state answers for what an eviction drops (arXiv:2402.09398)."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvfold.artefacts import text_config
from kvfold.calibration.by_layer import ByLayer, frozen, views_of
from kvfold.calibration.gate import halves, window
from kvfold.calibration.run import Run
from kvfold.formats import LateChunk
from kvfold.formats.feature_maps import FeatureMaps
from kvfold.hf.anatomy import projected
from kvfold.hf.cache import Cache
from kvfold.methods.h2o import H2O
from kvfold.methods.scored import Scored
from kvfold.views import LayerView

RANK, HIDDEN = 8, 64
"""R as in the paper; M (theirs: 512, for models of 7 B and up)."""
BUDGETS = (0.05, 0.1, 0.2, 0.35)
"""The shares of a prompt that H2O keeps, in turn."""
START, RATE, DRAWS, QUERIES, FLOOR = 1e-4, 3e-3, 3, 64, 1e-6
"""s1 and s2 at the start, Adam's rate (theirs: 1e-3; in the last third it falls to a tenth), the prompts that a text is
cut into, the queries of each, and the least weight of a state."""


@dataclass(frozen=True, eq=False)
class CutPrompt:
    """A layer after a prompt of which some tokens stayed, and later queries that the rest is gone for."""

    q: Float[Tensor, "1 Hq N D"]
    k: Float[Tensor, "1 H P D"]
    """All keys of the prompt; `gone` says which were dropped."""
    v: Float[Tensor, "1 H P Dv"]
    gone: Bool[Tensor, "1 H P"]
    kept: Float[Tensor, "1 Hq N Dv"]
    """What each query reads of the tokens that stayed, its own and those since the prompt."""
    lse: Float[Tensor, "1 Hq N"]
    full: Float[Tensor, "1 Hq N Dv"]
    """What it reads of all."""


def cases_of(
    view: LayerView, prompt: int, methods: Sequence[Scored], queries: Int[Tensor, " N"]
) -> Iterator[CutPrompt]:
    """Of a view of one text, for each of the methods: it cuts the first `prompt` tokens, and `queries` come later."""
    place, tokens, device = view.place, view.tokens, view.valid.device
    length = torch.tensor([prompt], dtype=torch.int64)
    columns = {name: column[..., :prompt] for name, column in tokens.columns.items()}
    cut = LateChunk(view.keys[:, :, :prompt], view.values[:, :, :prompt], view.valid[..., :prompt], columns)
    before = replace(
        view, tokens=cut, memo={}, queries=view.queries.pick(torch.arange(prompt, device=device)),
        place=replace(place, prompt=length, seen=length),
    )  # fmt: skip
    q = view.queries.states[:, :, queries]
    (b, hq, n, d), h = q.shape, view.heads
    logits = (q.float().view(b, h, -1, d) @ view.keys.float().mT).view(b, h, hq // h, n, -1) * place.scale
    logits.masked_fill_(torch.arange(logits.shape[-1], device=device) > queries[:, None], -torch.inf)
    values = view.values.float()

    def read(weights: Tensor) -> Tensor:
        return (weights.view(b, h, hq // h * n, -1) @ values).view(b, hq, n, -1)

    full = read(logits.softmax(-1))
    for method in methods:
        gone = ~method.after_prefill(before).mask
        kept = logits.clone()
        kept[..., :prompt].masked_fill_(gone[:, :, None, None], -torch.inf)
        yield CutPrompt(q, cut.keys, cut.values, gone, read(kept.softmax(-1)), kept.logsumexp(-1).view(b, hq, n), full)


def answer(maps: FeatureMaps, case: CutPrompt) -> Float[Tensor, "1 Hq N Dv"]:
    """What the queries read of kept tokens and of the state together, under one denominator."""
    (b, hq, n, _), h = case.q.shape, case.k.shape[1]
    psi = maps.psi(case.k) * case.gone[..., None]
    sums, mass = psi.mT @ case.v.float(), psi.sum(2)  # H R Dv, H R
    phi = maps.phi(case.q).view(b, h, hq // h * n, -1)
    total = (phi @ mass[..., None]).view(b, hq, n).clamp(min=FLOOR)
    share = torch.sigmoid(total.log() - case.lse)[..., None]
    return (1.0 - share) * case.kept + share * (phi @ sums).view(b, hq, n, -1) / total[..., None]


def errors(module: Any, case: CutPrompt, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Behind the layer's output projection: mean square errors of what was found, and of the kept tokens alone; and the
    mean square of what all tokens give.
    """
    outs = [x.transpose(1, 2).flatten(2).to(case.v.dtype) for x in (found, case.kept, case.full)]  # 1 N (Hq Dv)
    got, alone, full = (projected(module, x).float() for x in outs)
    return F.mse_loss(got, full), F.mse_loss(alone, full), full.square().mean()


def start(model: Any, layers: int, rank: int = RANK, hidden: int = HIDDEN) -> dict[str, nn.Parameter]:
    """Maps before training, all layers': the state weighs next to nothing."""
    config = text_config(model)
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries

    def drawn(*shape: int) -> Tensor:  # as a linear layer begins
        made: Tensor = (2.0 * torch.rand(layers, *shape, dtype=torch.float32) - 1.0) / shape[-2] ** 0.5
        return made

    small = torch.full((layers, heads, rank), START, dtype=torch.float32)
    made = {
        "q1": drawn(queries, size, hidden), "q2": drawn(queries, hidden, rank), "k1": drawn(heads, size, hidden),
        "k2": drawn(heads, hidden, rank), "k3": drawn(heads, rank, rank), "s1": small, "s2": small.clone(),
    }  # fmt: skip
    return {name: nn.Parameter(weight.to(model.device)) for name, weight in made.items()}


class Trainer(ByLayer):
    """The maps of all layers."""

    def __init__(self, model: Any, layers: int, rate: float = RATE):
        stacked = start(model, layers)
        each = [{n: nn.Parameter(x[i].detach().clone()) for n, x in stacked.items()} for i in range(layers)]
        super().__init__(each, rate)

    def maps(self, ordinal: int) -> FeatureMaps:
        """One layer's."""
        return FeatureMaps(**self.layers[ordinal])

    def learn(self, view: LayerView, case: CutPrompt) -> tuple[float, float]:
        """A step of one layer; its errors before the step."""
        ordinal, module = view.place.ordinal, view.place.module
        with torch.enable_grad():
            error, alone, size = errors(module, case, answer(self.maps(ordinal), case))
            self.descend(ordinal, error / size.clamp(min=1e-12))  # so that all layers learn at one rate
        return float(error.detach()), float(alone.detach())

    @torch.no_grad()
    def judge(self, view: LayerView, case: CutPrompt) -> tuple[float, float]:
        """The errors of one layer."""
        found = errors(view.place.module, case, answer(self.maps(view.place.ordinal), case))
        return float(found[0]), float(found[1])

    def data(self) -> dict[str, Tensor]:
        """All layers', in bfloat16."""
        return {name: each.to(torch.bfloat16).contiguous() for name, each in self.stacked().items()}


def train_feature_maps(run: Run) -> dict[str, Any]:
    """The maps of all paged layers, each a stack of what its layers have, in bfloat16.

    On windows of running text, of which a prompt's share is cut by H2O at one of `BUDGETS`; the later tokens ask. Each
    layer learns alone, to say behind its output projection what full attention says. Differs from the paper: steps are
    made as the texts are read, and none is read twice, so that there is no dropout and no epoch to choose; the kept set
    is that of the prompt's end; budgets vary; M is small.
    """
    steps, length = run.sizes(60, 1024)
    model, rng, texts = run.model, random.Random(run.seed), halves(run)
    trainer = Trainer(model, len(Cache(model, "full").paged))
    with frozen(model):
        before = judged(trainer, run, texts[1], length)
        for step in range(steps):
            trainer.slow_down(step / steps)
            found: list[tuple[float, float]] = []
            for view, case in cases(run, window(texts[0], rng, length, run.first), rng, DRAWS):
                found.append(trainer.learn(view, case))
            run.tick(f"step {step + 1} of {steps}: error {ratio(found):.3f} of what is left without a state")
        data = trainer.data()
        for layer, weights in enumerate(trainer.layers):  # as they are kept
            for name, weight in weights.items():
                weight.data.copy_(data[name][layer])
        after = judged(trainer, run, texts[1], length)
    run.about.update(
        rank=RANK, hidden=HIDDEN, score="h2o", budgets=BUDGETS, rate=RATE, draws=DRAWS, queries=QUERIES,
        **{"loss at the start": before, "loss at the end": after},
    )  # fmt: skip
    return data


def cases(run: Run, ids: Tensor, rng: random.Random, draws: int = 1) -> Iterator[tuple[LayerView, CutPrompt]]:
    """Each layer's view of a text, for each of `BUDGETS` and so many prompts, each with its queries, for all layers."""
    total, drawn = ids.shape[1], list[tuple[int, Tensor]]()
    for _ in range(draws):
        prompt = rng.randrange(total // 4, 3 * total // 4)
        places = sorted(rng.sample(range(prompt, total), min(QUERIES, total - prompt)))
        drawn.append((prompt, torch.tensor(places, dtype=torch.int64, device=run.model.device)))
    methods = [H2O(budget=budget) for budget in BUDGETS]
    for view in views_of(run, ids):
        for prompt, later in drawn:
            with torch.no_grad():
                found = list(cases_of(view, prompt, methods, later.to(view.valid.device)))
            yield from ((view, case) for case in found)


def judged(trainer: Trainer, run: Run, held: list[list[int]], length: int, count: int = 3) -> float:
    """The error on texts that were held back, a share of what is left without a state."""
    rng = random.Random(f"{run.seed}:held")
    found: list[tuple[float, float]] = []
    for _ in range(count):
        found += [trainer.judge(*each) for each in cases(run, window(held, rng, length, run.first), rng)]
    return round(ratio(found), 4)


def ratio(found: list[tuple[float, float]]) -> float:
    """The geometric mean of errors with a state to errors without, of cases where there is one."""
    logs = [math.log(with_it / alone) for with_it, alone in found if with_it > 0 and alone > 0]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
