"""Which model families kvfold is exact for: every causal LM class of the installed transformers, made tiny.

    python benchmarks/families.py --out docs/models.md

For each class: a random model of a few layers, and three questions to it. Are the logits of a prompt, of a padded batch
and of some generated tokens those of transformers' own cache (`full`), and `generate`'s greedy tokens the same? Does a
method that evicts run (`h2o`)? If kvfold refuses, does it do so when the cache is made, with the model as it was?
"exact": yes. "refused": with the reason that a user is given. "not testable": transformers itself can't run the class
as a causal decoder of text, or a tiny one can't be made. "wrong": all else; then the exit code is 1.

A class runs in a process of its own, killed after `--seconds`. `--only llama,phi3` asks for some and writes nothing.
"""

import argparse
import copy
import inspect
import json
import selectors
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvfold
from kvfold.hf.argument import NEW, OLD, with_cache

LAYERS = (4, 6, 8, 12)
"""Numbers of layers that are tried: the first that has every kind of layer that the full model has."""
VOCAB, PROMPT, STEPS = 97, 40, 4
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, d_model=64, n_embd=64, emb_dim=64, embedding_dim=64, embedding_size=64,
    input_embedding_size=64, output_embedding_size=64, word_embed_proj_dim=64, attention_hidden_size=64, lru_width=64,
    intermediate_size=96, intermediate_size_mlp=96, ffn_hidden_size=96, ffn_dim=96, decoder_ffn_dim=96,
    encoder_ffn_dim=96, d_inner=96, dff=96, dim_ff=96, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32, dense_intermediate_size=96, shared_intermediate_size=32,
    shared_experts_intermediate_size=32, expert_ffn_hidden_size=32,
    num_attention_heads=4, attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, num_decoder_attention_heads=4, num_encoder_attention_heads=4,
    num_key_value_heads=2, num_kv_heads=2, num_query_groups=2, head_dim=16, dim_head=16, d_head=16, kv_channels=16,
    attention_head_size=16, swa_head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, rotary_dim=8,
    query_pre_attn_scalar=16, global_head_dim=16, attention_head_dim=16,
    max_position_embeddings=512, n_positions=512, n_ctx=512, max_seq_len=512, model_max_length=512,
    max_target_positions=512, original_max_position_embeddings=512, context_length=512, rel_extent=64, d_rel=8,
    sliding_window=8, sliding_window_size=8, attention_window_size=8, window_size=8, attention_chunk_size=8,
    local_attention=8,
    q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=24,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    num_experts_per_token=2, moe_topk=2, moe_k=2, n_group=1, topk_group=1, num_expert_group=1, first_k_dense_replace=1,
    zero_expert_num=2, top_k_experts=2, router_hidden_size=32,
    index_head_dim=16, index_n_heads=2, index_topk=4, index_block_size=8, index_topk_blocks=2, o_groups=2,
    o_lora_rank=16, hc_lowrank=8, gated_norm_rank=8,
    mamba_d_state=8, mamba_d_head=16, mamba_n_heads=8, mamba_expand=2, mamba_chunk_size=8, mamba_d_ssm=128,
    mamba_dt_rank=4, mamba_head_dim=16, mamba_num_heads=8, mamba_headdim=16, n_mamba_heads=2, ssm_state_size=8,
    state_size=8, n_groups=1, chunk_size=8, time_step_rank=4, adapter_rank=8,
    linear_num_heads=4, linear_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, block_size=8, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
    ple_embed_dim=16, ngram_vocab_size_base=31, split_ngram_parts=2, backbone_hidden_size=64, num_centroids=4,
    centroid_intermediate_top_k=2, laurel_rank=8, max_source_positions=32, num_hash_buckets=31,
    # Large enough for attention to be peaked: else every key weighs the same, and no fault shows.
    initializer_range=0.25, init_std=0.25, initializer_factor=0.25,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, unpadded_vocab_size=VOCAB,
    attention_dropout=0.0, is_decoder=True, is_encoder_decoder=False, tie_word_embeddings=False,
)  # fmt: skip
"""What options of configurations are called, and small values for them."""
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
OPTIONAL = ("sliding_window", "attention_chunk_size", "q_lora_rank", "num_key_value_heads")
"""What is left alone where the default is None: another kind of model would come of it."""
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "phimoe": {"initializer_range": 0.5},
    "roberta": {"initializer_range": 0.5},
    "roberta-prelayernorm": {"initializer_range": 0.1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "data2vec-text": {"initializer_range": 0.5},
    "marian": {"init_std": 0.5, "decoder_start_token_id": 1},
    "blenderbot": {"decoder_layers": 4, "encoder_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "dots3_note_text": {"per_layer_config": {
        layer: {"head_dim": 24, "kv_lora_rank": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
                "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        for layer in (2, 3)}},
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 8,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "hrm_text": {"initializer_range": 0.1},  # 32 passes through its layers: rounding grows
}  # fmt: skip
"""What some families need besides."""


@dataclass
class Row:
    """What was found of one class."""

    family: str
    name: str
    outcome: str
    reason: str
    paged: str = ""


class Untestable(Exception):
    """Transformers itself can't run the class as a decoder of text."""


class Wrong(Exception):
    """kvfold is not what it says."""


# -- tiny models ---------------------------------------------------------------------------------------------


def small(kind: str, config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """Options that make a configuration of this class tiny, its parts' too."""
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    names = {config.attribute_map.get(name, name): name for name in known} if config.attribute_map else {}
    aliases = set(names.values()) - set(names)
    options = {
        name: value
        for name, value in TINY.items()
        if name in known and name not in aliases and (name not in OPTIONAL or said(config, name) is not None)
    }
    if said(config, "kv_lora_rank") is not None:
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
        if said(config, "head_dim") == said(config, "qk_rope_head_dim"):
            options["head_dim"] = options["qk_rope_head_dim"]
    options |= {name: layers for name in DEPTH if name in known and name not in aliases}
    for part in config.sub_configs:
        inner = getattr(config, part, None)
        if isinstance(inner, PreTrainedConfig):
            options[part] = {**small(inner.model_type, inner, layers), "model_type": inner.model_type}
    return options | OWN.get(kind, {})


def said(config: PreTrainedConfig, name: str) -> Any:
    """An option; `getattr` would refuse one that each layer has for itself."""
    return config.to_dict().get(config.attribute_map.get(name, name))


def kinds(config: PreTrainedConfig) -> set[str]:
    """Kinds of cache layers."""
    return {type(layer).__name__ for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers}


def tiny(family: str) -> PreTrainedConfig:
    """A configuration with every kind of layer that the default has, and few layers."""
    full = CONFIG_MAPPING[family]()
    made = None
    for layers in LAYERS:
        made = CONFIG_MAPPING[family](**small(family, full, layers))
        if kinds(made) >= kinds(full):
            break
    return made


def build(family: str, implementation: str | None = None) -> PreTrainedModel:
    """A random model, the same at every call."""
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    torch.manual_seed(0)
    how = {} if implementation is None else {"attn_implementation": implementation}
    config = tiny(family)
    if not isinstance(config, cls.config_class):  # the text decoder of a model that reads images, too
        config = config.get_text_config(decoder=True)
    model: PreTrainedModel = cls._from_config(config, dtype=torch.float32, **how)
    count = sum(weight.numel() for weight in model.parameters())
    if count > 20_000_000:
        raise Untestable(f"a tiny one has {count:,} weights")
    return model.eval()


# -- questions -----------------------------------------------------------------------------------------------


def batch(padding: int) -> tuple[Tensor, Tensor]:
    """Two prompts, the second with padding in front."""
    ids = torch.randint(3, VOCAB - 5, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def logits(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Those of a prompt's real tokens, and of some tokens fed one by one behind it."""
    found = []
    forced = torch.randint(3, VOCAB - 5, (len(ids), STEPS), generator=torch.Generator().manual_seed(2))
    for step in range(STEPS + 1):
        new = ids if not step else forced[:, step - 1 : step]
        if step:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        extra = {"position_ids": places} if takes(model, "position_ids") else {}
        out = model(input_ids=new, attention_mask=mask, use_cache=True, **with_cache(model, cache), **extra).logits
        found.append(out[mask[:, -new.shape[1] :].bool()])
    return torch.cat(found)


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward names this argument."""
    return name in inspect.signature(type(model).forward).parameters


@torch.no_grad()
def answer(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy tokens."""
    made: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **with_cache(model, cache)
    )
    return made


def own_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def compare(expected: Tensor, got: Tensor, what: str) -> None:
    """Raise Wrong where logits differ by more than rounding."""
    scale = float(expected.abs().max())
    apart = float((expected - got).abs().max()) / scale
    if not apart < 1e-3:
        raise Wrong(f"{what}: logits differ by {apart:.1e} of their scale")


def reference(family: str) -> tuple[PreTrainedModel, dict[int, Tensor]]:
    """A model, and the logits that transformers gives with its own cache. Raises Untestable."""
    found, failures = {}, []
    for implementation in ("sdpa", None):
        try:
            model = build(family, implementation)
            if not {OLD, NEW} & set(inspect.signature(type(model).forward).parameters):
                return model, {}
            for padding in (0, 9):
                found[padding] = logits(model, own_cache(model), *batch(padding))
                if not bool(found[padding].isfinite().all()):
                    raise Untestable("its logits are not finite with transformers' own cache")
            changed = batch(0)[0].index_fill(1, torch.tensor([PROMPT - 6]), 7)
            other = logits(model, own_cache(model), changed, batch(0)[1])
            if float((other - found[0])[-1].abs().max()) < 5e-3 * float(found[0].abs().max()):
                raise Untestable("the tiny model's answer does not depend on the text before")
            return model, found
        except Exception as error:
            failures.append(
                first_line(error) if isinstance(error, Untestable) else f"{type(error).__name__}: {first_line(error)}"
            )
    raise Untestable(failures[-1])


def first_line(error: BaseException) -> str:
    """An error's words, short."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a refusal leaves as it was."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return sum(hooks), attentions(model), sorted(vars(model))


def attentions(model: PreTrainedModel) -> list[str]:
    """What a cache with nothing on pages leaves as it was: it has hooks, which change nothing of what is computed."""
    return [module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)]


def ask(family: str) -> Row:
    """What is found of a family."""
    row = Row(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], "exact", "")
    try:
        model, expected = reference(family)
    except Untestable as error:
        row.outcome, row.reason = "not testable", str(error)
        return row
    before, subject = state(model), copy.deepcopy(model)
    try:
        cache = kvfold.Cache(subject, "full")
    except ValueError as error:
        row.outcome, row.reason = "refused", first_line(error)
        if state(subject) != before:
            row.outcome, row.reason = "wrong", f"refused when the model was changed: {row.reason}"
        return row
    if not expected:
        row.outcome, row.reason = "wrong", "it takes no cache, but kvfold makes one"
        return row
    row.paged = f"{len(cache.paged)} of {len(cache.layers)}"
    try:
        if not cache.paged and attentions(subject) != attentions(model):
            raise Wrong("nothing is on pages, but the model was changed")
        for padding, wanted in expected.items():
            kind = "padded" if padding else "even"
            compare(wanted, logits(subject, own_cache(subject), *batch(padding)), f"without a kvfold cache, {kind}")
            compare(wanted, logits(subject, kvfold.Cache(subject, "full"), *batch(padding)), kind)
            logits(subject, kvfold.Cache(subject, "h2o", budget=16), *batch(padding))
        ids, mask = batch(0)
        try:
            spoken = answer(model, own_cache(model), ids, mask)
        except Exception as error:
            row.reason = f"generate fails with transformers' own cache: {type(error).__name__}"
            return row
        held = kvfold.Cache(subject, "full")
        if not bool((answer(subject, held, ids, mask) == spoken).all()):
            raise Wrong("generate gives other tokens")
        if held.get_seq_length() != PROMPT + STEPS - 1:
            raise Wrong(f"generate read {PROMPT + STEPS - 1} tokens, the cache {held.get_seq_length()}")
    except Exception as error:
        row.outcome, row.reason = "wrong", f"{type(error).__name__}: {first_line(error)}"
    return row


# -- one process after the other -----------------------------------------------------------------------------


def serve() -> None:
    """Families from stdin, one a line; rows as JSON to stdout."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            row = ask(line.strip())
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            row = Row(line.strip(), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[line.strip()], "wrong", reason)
        print(json.dumps(asdict(row)), flush=True)


def rows(families: list[str], seconds: float) -> Iterator[Row]:
    """A row for each family, asked in a process that is replaced where it dies or takes too long."""
    worker = None
    for family in families:
        if worker is None:
            worker = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(family + "\n")
        worker.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(worker.stdout, selectors.EVENT_READ)
            waited = bool(waiting.select(seconds))  # it has said something, or ended
            line = worker.stdout.readline() if waited else ""
        if line:
            yield Row(**json.loads(line))
            continue
        if not waited:
            worker.kill()
        worker.communicate()
        end, worker = worker.returncode, None
        name, late = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], f"no answer in {seconds:g} seconds"
        yield Row(family, name, *(("wrong", f"the process ended with {end}") if waited else ("not testable", late)))
    if worker is not None:
        worker.communicate()


def page(found: list[Row]) -> str:
    """The table as Markdown."""
    counts = {outcome: sum(row.outcome == outcome for row in found) for outcome in OUTCOMES}
    lines = [
        "# Models",
        "",
        f"Every causal LM class of transformers {version('transformers')}, made tiny with random weights and asked by",
        "`python benchmarks/families.py --out docs/models.md` (what it asks stands at its head). "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + ".",
        "",
        "Exact: with `full`, logits (even, padded, step by step) and greedy tokens are those of transformers' own",
        "cache, and `h2o` runs. Refused: when the cache is made, with the model as it was. Not testable: transformers",
        "can't run it with a cache of its own, or it can't be made tiny.",
        "",
        "*On pages*: how many of the tiny model's layers kvfold holds and compresses. Sliding windows and recurrent",
        "states are transformers' own. With none on pages the model computes as it did.",
        "",
    ]
    for outcome in OUTCOMES:
        chosen = [row for row in found if row.outcome == outcome]
        if not chosen:
            continue
        lines += [f"## {outcome.capitalize()}", "", "| family | class | on pages | |", "| --- | --- | --- | --- |"]
        for row in chosen:
            cells = (row.family, row.name, row.paged, row.reason)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


COMMAND = [sys.executable, __file__, "--serve"]
OUTCOMES = ("wrong", "exact", "refused", "not testable")


def main() -> int:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the page goes (docs/models.md)")
    parser.add_argument("--only", help="families, comma-separated")
    parser.add_argument("--seconds", type=float, default=120, help="for one class")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    if args.only and args.out:
        parser.error("--out is for a page of all families, --only is not")
    families = args.only.split(",") if args.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = []
    for row in rows(families, args.seconds):
        print(f"{row.family:24} {row.outcome:13} {row.paged:8} {row.reason}", flush=True)
        found.append(row)
    if args.out is not None:
        beside = args.out.with_name(args.out.name + ".part")
        beside.write_text(page(found))
        beside.replace(args.out)
    return int(any(row.outcome == "wrong" for row in found))


if __name__ == "__main__":
    sys.exit(main())
