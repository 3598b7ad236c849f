"""EliteKV's conversion and uptraining: weights whose keys and values lie where they are held (arXiv:2503.01586).

A layer's rest y, of all heads' keys and values, becomes B P' y, P the calibration's basis and B = P to begin with: then
the model attends as EliteKV's cache reads. All weights and B are trained on running text with the language model loss.
At the end B P' goes into W_k and W_v: an unmodified model whose y lies in the span of B's columns, so that a basis of
that span holds it without loss.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.artefacts import Artefact
from kvfold.calibration.duo import mixing
from kvfold.calibration.gate import halves, window
from kvfold.calibration.run import Run
from kvfold.formats import Basis
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.cache import Cache
from kvfold.methods.elitekv import EliteFrame
from kvfold.rotation import Rope

RATE, HELD_TEXTS = 1e-4, 8
"""AdamW's rate after a tenth of the steps, from which it falls to a tenth; texts that are held back and judged on."""
LINEAR = 1e-3
"""How far a key that is turned back may be from what its projection gave, of the largest."""


class EliteAttention(nn.Module):
    """The attention of a model as EliteKV's cache would have it: in its frame, over what its latents give back."""

    def __init__(self, layers: Mapping[int, tuple[int, Rope | None]], frame: EliteFrame, found: Sequence[Basis]):
        super().__init__()
        self.layers, self.frame, self.bases = dict(layers), frame, found
        self.back = nn.ParameterList([nn.Parameter(basis.latent.clone()) for basis in found])
        """B of each layer, (N, C)."""

    def forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What transformers asks of an attention function; whole texts, without padding."""
        ordinal, rope = self.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        places = torch.arange(query.shape[2], device=query.device)[None].expand(len(query), -1)
        query, key = (self.frame.enter(x, places, ordinal, rope) for x in (query, key))
        key, value = self.given_back(ordinal, key, value)
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return out, None

    def given_back(self, ordinal: int, key: Float[Tensor, "B H T D"], value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as their latents give them back."""
        basis, back = self.bases[ordinal], self.back[ordinal]
        (b, h, t, _), rows = key.shape, len(basis.elite)
        at, rest = (x[None, :, None].expand(b, h, t, -1) for x in (basis.at, basis.rest))
        held = torch.cat([key.gather(-1, rest), value], -1).transpose(1, 2).flatten(2)  # B T N
        made = (held @ basis.latent.to(held.dtype) @ back.mT.to(held.dtype)).view(b, t, rows, -1).transpose(1, 2)
        split = rest.shape[-1]
        order = torch.cat([basis.at, basis.rest], 1).argsort(1)[None, :, None].expand(b, h, t, -1)
        return torch.cat([key.gather(-1, at), made[..., :split]], -1).gather(-1, order), made[..., split:]


@dataclass(frozen=True)
class Uptrained:
    """What `uptrain` has made of a model, whose weights it has changed."""

    artefact: Artefact
    losses: dict[str, float]


def uptrain(run: Run, artefact: Artefact, frame: EliteFrame, *, batch: int = 1, rate: float = RATE) -> Uptrained:
    """Convert `run.model` in place and train it: `run.samples` steps (0: none) on `batch` texts of `run.length` tokens.

    Raises ValueError, before any weight is changed, for a model whose keys and values are no linear maps of the layer's
    input (norms, fused projections), for layers without full attention, and for a rate or a batch that can't be.
    """
    if not rate > 0.0 or batch < 1:
        raise ValueError(f"rate={rate} must be above 0, batch={batch} at least 1")
    steps, (_, length) = 0 if run.samples == 0 else run.samples or 100, run.sizes(1, 256)
    model, rng, texts = run.model, random.Random(f"{run.seed}:uptrain"), halves(run)
    held = [window(texts[1], random.Random(f"{run.seed}:{i}"), length, run.first) for i in range(HELD_TEXTS)]
    attention = attention_of(model, frame).to(model.device)
    check_linear(model, attention, held[0])
    weights = [*model.parameters(), *attention.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses = {"full": mean_loss(model, held)}
    with attending(model, attention):
        losses["converted"] = mean_loss(model, held)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 10), max(0.1, (steps - step) / steps))
            ids = [window(texts[0], rng, length, run.first) for _ in range(batch)]
            loss = torch.stack([loss_of(model, text) for text in ids]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            run.tick(f"step {step + 1} of {steps}: loss {float(loss.detach()):.4f}")
        losses["trained"] = mean_loss(model, held)
    made = [fold(module, attention, ordinal) for ordinal, module in enumerate(projections(model, attention))]
    data = {"elite": artefact.data["elite"], "basis": torch.stack([each.cpu() for each in made])}
    losses = {name: round(value, 4) for name, value in losses.items()}
    told = {"steps": steps, "batch": batch, "length": length, "rate": rate, "seed": run.seed, "held-out loss": losses}
    past = [*artefact.provenance.get("uptrained", []), told]
    return Uptrained(replace(artefact, data=data, provenance={**artefact.provenance, "uptrained": past}), losses)


def attention_of(model: Any, frame: EliteFrame) -> EliteAttention:
    """Raises ValueError where a layer is no full attention, or the calibration does not fit."""
    paged = Cache(model, "full").paged
    modules = attention_modules(model)
    if len(paged) != len(modules) or set(modules) != {core.layer for core in paged}:
        raise ValueError(f"model={type(model).__name__} has layers without full attention, which can't be converted")
    layers = {core.layer: (core.ordinal, core.site.rope) for core in paged}
    found = [frame.of_layer(core.ordinal, core.site.rope).to(model.device) for core in paged]
    return EliteAttention(layers, frame, found)


@contextmanager
def attending(model: Any, attention: EliteAttention) -> Iterator[None]:
    """The model attends so, and its weights take gradients."""
    with mixing(model, attention):
        model.requires_grad_(True)
        yield


def loss_of(model: Any, ids: Int[Tensor, "1 T"]) -> Tensor:
    """Mean negative log likelihood of a text's tokens, in nats."""
    ids = ids.to(model.device)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:])


@torch.no_grad()
def mean_loss(model: Any, texts: Sequence[Tensor]) -> float:
    """Over some texts."""
    return sum(float(loss_of(model, text)) for text in texts) / len(texts)


def projections(model: Any, attention: EliteAttention) -> list[nn.Module]:
    """The attention modules in the order of their layers. ValueError unless keys and values have a projection each."""
    found = attention_modules(model)
    modules = [found[layer] for layer, _ in sorted(attention.layers.items(), key=lambda item: item[1][0])]
    for module in modules:
        for name in ("k_proj", "v_proj"):
            if not isinstance(getattr(module, name, None), nn.Linear):
                raise ValueError(
                    f"model: {type(module).__name__} has no linear {name}; those that have one can be converted"
                )
        if (module.k_proj.bias is None) != (module.v_proj.bias is None):  # type: ignore[union-attr]
            raise ValueError(f"model: {type(module).__name__} has a bias of keys or of values alone, where both mix")
    return modules


@torch.no_grad()
def check_linear(model: Any, attention: EliteAttention, ids: Tensor) -> None:
    """ValueError unless a key that is turned back is what its projection gave: no norm and no scale behind it."""
    given: list[Tensor] = []
    modules = projections(model, attention)
    hooks = [module.k_proj.register_forward_hook(lambda _m, _i, out: given.append(out)) for module in modules]  # type: ignore[union-attr]
    wrong: list[int] = []

    def compare(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        _, rope = attention.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        b, h, t, d = key.shape
        places = torch.arange(t, device=key.device).expand(b, h, t)
        assert rope is not None
        want = given[-1].view(b, t, h, d).transpose(1, 2)
        close = LINEAR if key.dtype.itemsize >= 4 else 0.05
        if bool((rope.shift(key, -places) - want).abs().max() > close * want.abs().max()):
            wrong.append(int(module.layer_idx))  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    try:
        with mixing(model, compare):
            model(ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise ValueError(
            f"model={type(model).__name__}: the keys of layer {wrong[0]} are not what k_proj gives, rotated (a norm or "
            "a scale stands behind it), so no weights of its own could hold them in a latent's span"
        )


@torch.no_grad()
def fold(module: Any, attention: EliteAttention, ordinal: int) -> Float[Tensor, "N C"]:
    """B P' into W_k and W_v, and their biases; returns an orthonormal basis of what they span, the largest first."""
    basis, back = attention.bases[ordinal], attention.back[ordinal].double()
    heads, split = basis.rest.shape
    at = (basis.rest + basis.elite.shape[1] * torch.arange(heads, device=basis.rest.device)[:, None]).flatten()
    maps = [_with_bias(each) for each in (module.k_proj, module.v_proj)]
    held = torch.cat([maps[0][at].view(heads, split, -1), maps[1].view(heads, -1, maps[1].shape[-1])], 1).flatten(0, 1)
    latent = basis.latent.double().mT @ held
    made = (back @ latent).view(heads, -1, held.shape[-1])
    maps[0][at] = made[:, :split].flatten(0, 1)
    maps[1] = made[:, split:].flatten(0, 1)
    for each, new in zip((module.k_proj, module.v_proj), maps, strict=True):
        each.weight.copy_(new[:, : each.in_features])
        if each.bias is not None:
            each.bias.copy_(new[:, -1])
    span, inner = torch.linalg.qr(back)
    made_of: Tensor = (span @ torch.linalg.eigh(inner @ latent @ latent.mT @ inner.mT)[1].flip(-1)).float()
    return made_of


def _with_bias(linear: nn.Linear) -> Float[Tensor, "E I"]:
    """A linear map's weight, and its bias as one more column; float64."""
    weight, bias = linear.weight.double(), getattr(linear, "bias", None)
    return weight.clone() if bias is None else torch.cat([weight, bias.double()[:, None]], 1)
