"""DuoAttention's calibration: gates that say which heads need the whole text, by gradient (arXiv:2410.10819)."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.calibration.by_layer import frozen
from kvfold.calibration.run import Run
from kvfold.hf.cache import Cache

NAME = "kvfold-duo"
WORDS = [
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey",
    "x-ray", "yankee", "zulu",
]  # fmt: skip
PASSKEYS, PASSKEY_WORDS, SINKS, RECENT, PENALTY, RATE = 4, 8, 64, 256, 0.05, 0.1
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class Mixer:
    """The attention of both passes: the teacher's outputs are kept, the student mixes them with streaming ones."""

    def __init__(self, gates: Tensor, paged: list[int]):
        self.gates, self.ordinals = gates, {layer: i for i, layer in enumerate(paged)}
        self.teacher: dict[int, Tensor] = {}
        self.student = False

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        ordinal = self.ordinals.get(layer)
        if ordinal is None or not self.student:
            out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
            if ordinal is not None:
                self.teacher[layer] = out.detach()
            return out, None
        group = query.shape[1] // key.shape[1]
        k, v = (states.repeat_interleave(group, 1) for states in (key, value))
        near = streaming_mask(query.shape[2], query.device)
        stream = F.scaled_dot_product_attention(query, k, v, attn_mask=near, scale=kwargs.get("scaling"))
        gate = self.gates[ordinal].clamp(0.0, 1.0).repeat_interleave(group)[:, None].to(stream.dtype)  # Hq 1
        return gate * self.teacher[layer] + (1.0 - gate) * stream.transpose(1, 2), None


def streaming_mask(total: int, device: torch.device) -> Tensor:
    """(T, T): the sinks, the recent tokens and the token itself."""
    query, key = torch.arange(total, device=device)[:, None], torch.arange(total, device=device)
    return (key <= query) & ((key < SINKS) | (query - key <= RECENT))


@contextmanager
def mixing(model: Any, mixer: Callable[..., Any]) -> Iterator[None]:
    """The model attends through the mixer; weights take no gradient."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    AttentionInterface.register(NAME, mixer)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        with frozen(model):
            yield
    finally:
        model.set_attn_implementation(before)


def train_gates(run: Run) -> dict[str, Any]:
    """One gate for each KV head: distillation of the last hidden states on a passkey tail, and an L1 penalty.

    Smaller than the paper's (2000 steps of 1,000 to 32,000 tokens, 10 passkeys of 32 words at rate 0.02), to run
    without a GPU; masks are exact where the paper's have blocks of 128. More `samples` (steps) and `length` go there.
    """
    steps, length = run.sizes(30, 1000)
    run.about.update(passkeys=PASSKEYS, words=PASSKEY_WORDS, sinks=SINKS, recent=RECENT, rate=RATE)
    model, rng = run.model, random.Random(run.seed)
    core = Cache(model, "full")
    paged = [layer.layer for layer in core.paged]
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    gates = nn.Parameter(torch.ones(len(paged), heads, device=model.device, dtype=torch.float32))
    optimizer = torch.optim.AdamW([gates], lr=RATE, weight_decay=0.0)
    ramp = max(1, steps // 5)
    losses = []
    mixer = Mixer(gates, paged)
    with mixing(model, mixer):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))
            with torch.no_grad():
                gates.clamp_(0.0, 1.0)
            ids, tail = passkeys(run, rng, length)
            loss = distance(model, mixer, ids.to(model.device), tail)
            losses.append(float(loss.detach()))
            run.tick(f"step {step + 1} of {steps}: distance {losses[-1]:.3f}, gates {float(gates.detach().mean()):.2f}")
            optimizer.zero_grad()
            torch.autograd.backward(loss + PENALTY * gates.abs().mean())
            optimizer.step()
    run.about["distance at the end"] = round(sum(losses[-ramp:]) / ramp, 4)
    table: list[list[float]] = gates.detach().clamp(0.0, 1.0).cpu().tolist()
    return {"gates": table}


def distance(model: Any, mixer: Mixer, ids: Tensor, tail: int) -> Tensor:
    """Mean squared difference between the last hidden states of teacher and student, over the last `tail` tokens."""
    body = model.get_decoder()
    mixer.student = False
    with torch.no_grad():
        wanted: Tensor = body(ids, use_cache=False).last_hidden_state[:, -tail:].float()
    mixer.student = True
    got: Tensor = body(ids, use_cache=False).last_hidden_state[:, -tail:].float()
    return (wanted - got).pow(2).mean()


def passkeys(run: Run, rng: random.Random, length: int) -> tuple[Tensor, int]:
    """Running text with passkeys at random depths, then questions and answers; ids (1, T), tokens of that tail."""

    def tokens(text: str) -> list[int]:
        return list(run.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    keys = [" ".join(rng.choice(WORDS) for _ in range(PASSKEY_WORDS)) for _ in range(PASSKEYS)]
    planted = [tokens(f"\n\nThis is the {ORDINALS[i]} passkey: {key}.\n\n") for i, key in enumerate(keys)]
    tail = tokens("".join(f"\n\nWhat is the {ORDINALS[i]} passkey? It is: {key}." for i, key in enumerate(keys)))
    words = tokens(rng.choice(list(run.texts))[1])
    size = rng.randint(length // 2, length)
    room = max(64, size - len(tail) - sum(map(len, planted)))
    start = rng.randrange(max(1, len(words) - room))
    text = words[start : start + room]
    cuts = sorted((int(len(text) * rng.uniform(0.05, 0.95)) for _ in planted), reverse=True)
    for cut, key in zip(cuts, rng.sample(planted, len(planted)), strict=True):
        text[cut:cut] = key
    return torch.tensor([[*run.first, *text, *tail]], dtype=torch.int64), len(tail)
