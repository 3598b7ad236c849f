"""Attention-Gate's training: gates by a straight-through gradient, the model itself frozen (arXiv:2410.12876)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.artefacts import text_config
from kvfold.calibration.duo import mixing
from kvfold.calibration.run import Run
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.cache import Cache
from kvfold.methods.attention_gate import Gate

GATE_HEADS, GATE_SIZE = 1, 16
"""h' and d_h' (reconstructed: far less than the model's)."""
TARGET, WEIGHT, THRESHOLD = 0.4, 5.0, 0.5
"""beta, lambda and tau (reconstructed)."""
LOSS, RATES, OPEN, HELD = "kl", (1e-3, 2e-2), 0.5, 0.1
"""What stands for the paper's language-model loss ("lm"; or "kl", to the full model's), AdamW's rates for attention and
flags, the bias at the start, and the share at each text's end that is not trained on."""


class Gated:
    """The attention of a training pass: each query sees itself and the earlier tokens that the gates let in."""

    def __init__(self, paged: list[int]):
        self.ordinals = {layer: i for i, layer in enumerate(paged)}
        self.gates: list[Gate] = []
        self.full = True
        """Whether the model attends in full."""
        self.entering: Tensor | None = None
        self.flags: list[Tensor] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        ordinal = self.ordinals.get(int(module.layer_idx))  # type: ignore[arg-type]
        if ordinal is None or self.full:
            out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
            return out, None
        assert self.entering is not None
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
        flags = straight_through(self.gates[ordinal](self.entering, attend), THRESHOLD)
        self.flags.append(flags)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return gated_attention(query, key, value, flags, scale).transpose(1, 2).contiguous(), None


def straight_through(gates: Tensor, threshold: float) -> Tensor:
    """1 where a gate is above the threshold, else 0, with the gradient of the gate itself."""
    return (gates > threshold).float() + (gates - gates.detach())


def eviction_loss(gates: Tensor, target: float) -> Tensor:
    """Mean over layers and heads of |mean over tokens - target|, of (..., H, T)."""
    return (gates.mean(-1) - target).abs().mean()


def gated_attention(q: Tensor, k: Tensor, v: Tensor, flags: Tensor, scale: float) -> Tensor:
    """Query i sees key i, and key j < i where `flags` (B, H, T) is 1; (B, Hq, T, D).

    The gradient to a flag that is 1 is that of its softmax weight; to one that is 0, what the key's weight would be if
    it were 1 (own rule: the plain derivative there has no bound).
    """
    total, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v, flags = (x.repeat_interleave(group, 1) for x in (k, v, flags))
    earlier = torch.ones(total, total, dtype=torch.bool, device=q.device).tril(-1)
    on = (flags.detach() > 0.5)[:, :, None]
    seen = (earlier & on) | torch.eye(total, dtype=torch.bool, device=q.device)
    logits = (q @ k.transpose(2, 3)).float() * scale
    kept = logits.masked_fill(~seen, -torch.inf)
    out = kept.softmax(-1).to(v.dtype) @ v
    with torch.no_grad():
        over = logits - kept.logsumexp(-1, keepdim=True)
        share = torch.where(on, over.clamp(max=0.0).exp(), over.sigmoid()).masked_fill(~earlier, 0.0)
    change = (share * (flags - flags.detach())[:, :, None]).to(v.dtype)  # 0, but for its gradient
    return out + change @ v.detach() - change.sum(-1, keepdim=True) * out.detach()


@contextmanager
def listening(model: Any, gated: Gated) -> Iterator[None]:
    """The model attends through `gated`, which gets what enters each attention module."""

    def hear(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        gated.entering = kwargs.get("hidden_states", args[0] if args else None)

    hooks = [
        module.register_forward_pre_hook(hear, with_kwargs=True)
        for layer, module in attention_modules(model).items()
        if layer in gated.ordinals
    ]
    try:
        with mixing(model, gated):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def train_attention_gates(run: Run) -> dict[str, Any]:
    """The gates of all paged layers, each a stack of what its layers have: wq, wk, wv, wg, bg, in bfloat16.

    Trained on windows of running text. Differs from the paper: the loss is the divergence from the full model (which
    takes fewer steps than the language-model loss), and the eviction loss counts flags, not gates, so that what it
    holds is how much is kept.
    """
    steps, length = run.sizes(150, 256)
    model, rng, texts = run.model, random.Random(run.seed), halves(run)
    paged = [core.layer for core in Cache(model, "full").paged]
    weights = start(model, len(paged))
    gated = Gated(paged)
    sets = [[weights[name] for name in names] for names in (("wq", "wk", "wv"), ("wg", "bg"))]
    optimizer = torch.optim.AdamW([{"params": each} for each in sets], weight_decay=0.0)
    ramp = max(1, steps // 10)
    with listening(model, gated):
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / ramp, max(0.1, (steps - step) / (steps / 2)))
            gated.gates = [Gate(*(each[i] for each in weights.values())) for i in range(len(paged))]
            loss, flags = losses(model, gated, window(texts[0], rng, length, run.first), LOSS)
            now, kept = float(loss.detach()), float(flags.detach().mean())
            run.tick(f"step {step + 1} of {steps}: {LOSS} {now:.3f}, kept {kept:.2f}")
            optimizer.zero_grad()
            torch.autograd.backward(loss + WEIGHT * eviction_loss(flags, TARGET))
            optimizer.step()
        data = {name: each.detach().to("cpu", torch.bfloat16).contiguous() for name, each in weights.items()}
        gated.gates = [Gate.of(data, i, model.device) for i in range(len(paged))]
        run.about.update(judged(model, gated, texts[1], length, run.first, run.seed))
    run.about.update(
        target=TARGET, weight=WEIGHT, threshold=THRESHOLD, loss=LOSS, rates=RATES, mask="causal", decode="kept",
        gate={"heads": GATE_HEADS, "size": GATE_SIZE},
    )  # fmt: skip
    return data


def start(model: Any, layers: int) -> dict[str, nn.Parameter]:
    """Gates before training: each token attends mostly to itself, and all gates are open."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shape = (layers, GATE_HEADS, GATE_SIZE, config.hidden_size)
    rows = torch.randn(2, *shape, dtype=torch.float32) / config.hidden_size**0.5
    made = {
        "wq": rows[0] * 2**0.5, "wk": rows[0] * 2**0.5, "wv": rows[1],
        "wg": torch.randn(layers, heads, GATE_HEADS, GATE_SIZE, dtype=torch.float32)
        * (0.5 / (GATE_HEADS * GATE_SIZE) ** 0.5),
        "bg": torch.full((layers, heads), OPEN, dtype=torch.float32),
    }  # fmt: skip
    return {name: nn.Parameter(weight.clone().to(model.device)) for name, weight in made.items()}


def losses(model: Any, gated: Gated, ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The loss of one text ("lm" or "kl"), and the flags (L, H, T) that the gates gave."""
    ids = ids.to(model.device)
    truth: Tensor | None = None
    if kind == "kl":
        gated.full = True
        with torch.no_grad():
            truth = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    gated.full, gated.flags = False, []
    got = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    gated.full = True
    flags = torch.cat(gated.flags)
    if truth is None:
        return F.nll_loss(got.flatten(0, 1), ids[:, 1:].flatten()), flags
    return F.kl_div(got.flatten(0, 1), truth.flatten(0, 1), log_target=True, reduction="batchmean"), flags


def halves(run: Run) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each text: what is trained on, and the end that is held back."""
    trained, held = [], []
    for _, text in run.texts:
        words = list(run.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        cut = int(len(words) * (1.0 - HELD))
        trained.append(words[:cut])
        held.append(words[cut:])
    return trained, held


def window(texts: list[list[int]], rng: random.Random, length: int, first: list[int]) -> Tensor:
    """At most `length` tokens of running text, (1, T), after those that every text starts with."""
    words, room = rng.choice(texts), length - len(first)
    at = rng.randrange(max(1, len(words) - room + 1))
    return torch.tensor([[*first, *words[at : at + room]]], dtype=torch.int64)


@torch.no_grad()
def judged(
    model: Any, gated: Gated, held: list[list[int]], length: int, first: list[int], seed: int, count: int = 6
) -> dict[str, Any]:
    """Losses on texts that were held back, and how much the gates keep."""
    rng = random.Random(f"{seed}:held")
    found = {"lm": 0.0, "kl": 0.0, "kept": 0.0, "lm of the full model": 0.0}
    for _ in range(count):
        ids = window(held, rng, length, first)
        for kind in ("lm", "kl"):
            loss, flags = losses(model, gated, ids, kind)
            found[kind] += float(loss) / count
        found["kept"] += float(flags.mean()) / count
        logits = model(ids.to(model.device), use_cache=False).logits[0, :-1].float()
        found["lm of the full model"] += float(F.cross_entropy(logits, ids[0, 1:].to(logits.device))) / count
    return {f"{name} at the end": round(value, 4) for name, value in found.items()}
