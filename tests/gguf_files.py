"""Tiny random models as GGUF files, written as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = list(bytes_to_unicode().values())
VOCABULARY = [*BYTES, "ĊĊ", "ĠĠ", "<|start|>", "<|end|>"]
CHAT = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores Llama's queries and keys: the two halves of each head, row by row."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def start(path: Path, architecture: str, config) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    return writer


def finish(writer: gguf.GGUFWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(model, norms: dict[str, str], plus: float = 0.0) -> dict[str, torch.Tensor]:
    """The tensors under llama.cpp's names; `plus` is what it adds to the weights of norms."""
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight + plus,
    }
    for n, layer in enumerate(model.model.layers):
        named = {f"attn_{c}": getattr(layer.self_attn, f"{c}_proj").weight for c in "qkv"}
        named["attn_output"] = layer.self_attn.o_proj.weight
        named |= {f"ffn_{name}": getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
        named |= {theirs: getattr(layer, ours).weight + plus for ours, theirs in norms.items()}
        tensors |= {f"blk.{n}.{name}.weight": weight for name, weight in named.items()}
    return tensors


def write_llama(path: Path, *, scaled: bool = False, without: str = "") -> LlamaForCausalLM:
    """A tiny random Llama with SmolLM's kind of tokenizer, as a GGUF file; returns the model."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        vocab_size=len(VOCABULARY),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    writer = start(path, "llama", config)
    writer.add_license("apache-2.0")
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 2) + [3, 3])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(len(VOCABULARY) - 2)
    writer.add_eos_token_id(len(VOCABULARY) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    tensors = blocks(model, {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"})
    for n in range(config.num_hidden_layers):
        for name, heads in (("q", 4), ("k", 2)):
            key = f"blk.{n}.attn_{name}.weight"
            tensors[key] = interleaved(tensors[key], heads)
    finish(writer, {name: tensor for name, tensor in tensors.items() if name != without})
    return model


def write_gemma(path: Path) -> Gemma3ForCausalLM:
    """A tiny random Gemma 3 with a sentencepiece vocabulary, as a GGUF file; returns the model."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    config = Gemma3TextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=32,
        vocab_size=len(tokens),
    )
    model = Gemma3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight)
    writer = start(path, "gemma3", config)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    writer.add_token_types([3] * 4 + [1] * 6)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    tensors = blocks(model, NORMS, plus=1.0)
    for n, layer in enumerate(model.model.layers):
        tensors[f"blk.{n}.attn_q_norm.weight"] = layer.self_attn.q_norm.weight + 1
        tensors[f"blk.{n}.attn_k_norm.weight"] = layer.self_attn.k_norm.weight + 1
    finish(writer, tensors)
    return model
