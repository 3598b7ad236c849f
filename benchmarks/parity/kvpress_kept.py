"""Which positions NVIDIA's kvpress keeps of real prompts, written to a file that parity.py compares with kvfold's.

Run by an environment that has kvpress (README.md); kvfold is not needed:

    kvpress-env/bin/python benchmarks/parity/kvpress_kept.py --model FOLDER --out kept.npz \
        examples/documents/blue-carbuncle.txt src/kvfold/evaluation/texts/a-scandal-in-bohemia.txt

A prompt is the first `--tokens` tokens of a document, read in one forward pass in float32. Each attention layer hands
what it has to the `compress` of every press, as the press's own hook would; the keys that come back are found again
among the layer's keys by their bits, less those that a press only masks. A press that needs a pass of its own (kvzip)
and, as a check, SnapKV run as a user runs them, inside `with press(model)`.
The presses after the blank line in `PRESSES` are kvpress's with one thing changed, to prove a reason.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar


class NewestCompetes(kvpress.TOVAPress):
    """TOVA without the newest token's place of its own."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return attentions[:, :, -1].mean(1, keepdim=True).expand(keys.shape[:3])


class Summed(kvpress.ObservedAttentionPress):
    """Observed attention as H2O's sum: not divided by the number of queries that saw a token."""

    recent = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        queries = torch.arange(keys.shape[2], 0, -1)
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs) * queries
        window = int(int(keys.shape[2] * (1 - self.compression_ratio)) * self.recent)
        scores[..., keys.shape[2] - window :] = torch.inf
        return scores


class SummedAndRecent(Summed):
    """The same, half the budget for H2O's recent window."""

    recent = 0.5


class PapersLine(kvpress.PyramidKVPress):
    """PyramidKV with the window outside the line, in every layer, as in the paper; no flat fallback."""

    def get_layer_budget(self, module, q_len):
        rest = q_len * (1 - self.compression_ratio) - self.window_size
        first = min((2 - 1 / self.beta) * rest, q_len - self.window_size)
        step = 2 * (first - rest) / (module.config.num_hidden_layers - 1)
        return self.window_size + round(first - module.layer_idx * step)


class Blend(kvpress.AdaKVPress):
    """Ada-KV with the floor as the paper's blend of even and won shares, not as a place for each head's best."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)[0]  # H T
        (heads, length), window = scores.shape, self.press.window_size
        rest = int(length * (1 - self.compression_ratio)) - window
        free = scores[:, :-window]
        won = torch.bincount(free.flatten().topk(heads * rest).indices // free.shape[1], minlength=heads)
        shares = won * (1 - self.alpha_safeguard) + rest * self.alpha_safeguard
        many = [int(n) for n in shares]
        for head in sorted(range(heads), key=lambda head: many[head] - float(shares[head]))[: heads * rest - sum(many)]:
            many[head] += 1  # the largest remainders
        masked = torch.ones_like(keys[..., 0], dtype=torch.bool)
        for head, n in enumerate(many):
            masked[0, head, free[head].topk(n).indices] = False
        masked[..., -window:] = False
        module.masked_key_indices = torch.nonzero(masked, as_tuple=True)
        return keys, values


class GivenGates(kvpress.DuoAttentionPress):
    """DuoAttention whose gates are given, not fetched."""

    @staticmethod
    def load_attention_pattern(model):
        return 64, 256, gates(model.config.num_hidden_layers, model.config.num_key_value_heads)


class KVzip(kvpress.KVzipPress):
    """KVzip that can cut again to another ratio: its scores need further passes over the prompt."""

    def compress_post(self, model):
        self.scores = self.score_val.clone()
        super().compress_post(model)

    def again(self, model, ratio: float) -> None:
        self.compression_ratio, self.score_val = ratio, self.scores
        self.compress_post(model)


class WholePrompt(KVzip):
    """KVzip of a prompt without a chat template before it: all of its tokens are scored."""

    def prepare(self, model, tokenizer, prev_postfix_size=8):
        self.prefix_length = 0
        return super().prepare(model, tokenizer, prev_postfix_size)


def gates(layers: int, heads: int) -> np.ndarray:
    """A gate for each KV head, at random: two programs that take the same need no others to be compared."""
    return np.random.default_rng(0).random((layers, heads)).round(6)


PRESSES: dict[str, Callable[[float], kvpress.BasePress]] = {
    "SnapKV": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32),
    "SnapKV, window 64": lambda ratio: kvpress.SnapKVPress(ratio),
    "TOVA": lambda ratio: kvpress.TOVAPress(ratio),
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "ObservedAttention": lambda ratio: kvpress.ObservedAttentionPress(ratio),
    "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "ExpectedAttention, epsilon 0.02": lambda ratio: kvpress.ExpectedAttentionPress(ratio, epsilon=0.02),
    "PyramidKV": lambda ratio: kvpress.PyramidKVPress(ratio, window_size=32),
    "AdaKV of SnapKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=32)),
    "AdaKV of SnapKV, no floor": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=32), 0.0),
    "AdaKV of ExpectedAttention": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    "AdaKV of ExpectedAttention, no floor": lambda ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(ratio), 0.0
    ),
    "DuoAttention, given gates": lambda ratio: GivenGates(ratio),
    "KVzip": lambda ratio: KVzip(ratio),

    "TOVA, newest competes": lambda ratio: NewestCompetes(ratio),
    "ObservedAttention, summed": lambda ratio: Summed(ratio),
    "ObservedAttention, summed, recent half": lambda ratio: SummedAndRecent(ratio),
    "PyramidKV, window outside": lambda ratio: PapersLine(ratio, window_size=32),
    "KVzip, whole prompt": lambda ratio: WholePrompt(ratio),
    "AdaKV of SnapKV, blend": lambda ratio: Blend(kvpress.SnapKVPress(ratio, window_size=32)),
}  # fmt: skip
WEIGHTS = {name for name in PRESSES if name.startswith("Observed")} | {"TOVA, newest competes"}
"""Presses that read the attention weights, which only transformers' eager attention returns."""
AS_USED = {name for name in PRESSES if name.startswith("KVzip")}
"""Presses with passes of their own over the prompt."""


def found(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Which of the keys `whole` (1, H, T, D) stand in `part` (1, H, N, D), by their bits: (H, T)."""
    factors = torch.randint(-(2**62), 2**62, (whole.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    marks, kept = ((keys[0].contiguous().view(torch.int32).long() * factors).sum(-1) for keys in (whole, part))
    mask = torch.stack([torch.isin(each, other) for each, other in zip(marks, kept, strict=True)])
    if (mask.sum(-1) != part.shape[2]).any():
        raise RuntimeError(f"{part.shape[2]} keys came back, {mask.sum(-1).tolist()} of the prompt's are equal to them")
    return mask


def unmasked(mask: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Less the keys that a press has marked to be hidden from later queries; the marks are taken away."""
    hidden = getattr(module, "masked_key_indices", None)
    if hidden is not None:
        mask[hidden[1], hidden[2]] = False
        module.masked_key_indices = None
    return mask


@torch.no_grad()
def by_layer(model, presses: dict[str, kvpress.BasePress], ids: torch.Tensor) -> tuple[dict, list[torch.Tensor]]:
    """One pass for many presses: what each keeps (L, H, T), and every layer's keys."""
    masks: dict[str, list[torch.Tensor]] = {name: [] for name in presses}
    for press in presses.values():
        press.post_init_from_model(model)

    def hand_out(module, _, kwargs, output) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name, press in presses.items():
            keys, _ = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
            masks[name].append(unmasked(found(layer.keys, keys), module))

    attention = [layer.self_attn for layer in model.model.layers]
    for module in attention:
        module.rotary_emb = model.model.rotary_emb
    hooks = [module.register_forward_hook(hand_out, with_kwargs=True) for module in attention]
    cache = DynamicCache()
    try:
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(each) for name, each in masks.items()}, [layer.keys for layer in cache.layers]


@torch.no_grad()
def as_used(model, press: kvpress.BasePress, ratios: list[float], ids: torch.Tensor, keys: list[torch.Tensor]) -> list:
    """What a press keeps when it is used as its readme says: (L, H, T) for each ratio, the first being its own."""
    cache, masks = DynamicCache(), []
    with press(model):
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    for ratio in ratios:
        if masks:
            press.again(model, ratio)
        layers = zip(keys, cache.layers, model.model.layers, strict=True)
        masks.append(torch.stack([unmasked(found(own, held.keys), block.self_attn) for own, held, block in layers]))
    return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--budgets", default="0.5,0.25", help="fractions of the KV pairs that stay")
    parser.add_argument("--presses", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    disable_progress_bar()
    budgets = [float(budget) for budget in args.budgets.split(",")]
    names = [name for name in PRESSES if args.presses in name]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = model.config
    arrays: dict[str, np.ndarray] = {"gates": gates(config.num_hidden_layers, config.num_key_value_heads)}
    for path in args.documents:
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.tokens]
        masks: dict[str, torch.Tensor] = {}
        for implementation in ("eager", "sdpa"):  # sdpa last: the modes that only mask refuse eager
            model.set_attn_implementation(implementation)
            chosen = [n for n in names if n not in AS_USED and (n in WEIGHTS) == (implementation == "eager")]
            made = {f"{name}|{budget}": PRESSES[name](1 - budget) for name in chosen for budget in budgets}
            kept, keys = by_layer(model, made, ids)
            masks |= kept
            print(f"{path.stem}: {len(made)} in a pass of {implementation}", file=sys.stderr, flush=True)
        ratios = [1 - budget for budget in budgets]
        for name in (name for name in names if name in AS_USED):
            kept = as_used(model, PRESSES[name](ratios[0]), ratios, ids, keys)
            masks |= {f"{name}|{budget}": mask for budget, mask in zip(budgets, kept, strict=True)}
            print(f"{path.stem}: {name}", file=sys.stderr, flush=True)
        check = f"SnapKV|{budgets[0]}"
        if check in masks and not masks[check].equal(
            as_used(model, PRESSES["SnapKV"](ratios[0]), ratios[:1], ids, keys)[0]
        ):
            raise RuntimeError("SnapKV inside `with press(model)` keeps other tokens than SnapKV's compress alone")
        arrays[f"ids|{path.stem}"] = ids[0].numpy()
        arrays |= {f"{path.stem}|{name}": np.packbits(mask.numpy(), axis=-1) for name, mask in masks.items()}
    shown = {str(args.model): args.model.name, str(args.out): args.out.name}
    argv = [shown.get(word, word) for word in sys.argv[1:]]
    about = {
        "command": " ".join(["python", sys.argv[0], *argv]),
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
        "python": platform.python_version(), "model": args.model.name, "tokens": args.tokens, "budgets": budgets,
        "documents": [path.stem for path in args.documents], "presses": names,
    }  # fmt: skip
    np.savez_compressed(args.out, about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main()
