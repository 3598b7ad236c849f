"""Where transformers' modelling files ask for the name of their attention, and what kvfold's name changes there.

    python benchmarks/attention_names.py

Reads the source of every model of the installed transformers (hf/source.py does so for a model before its first cache)
and prints each place. KNOWN has those that somebody has looked at; another one, of a new release, ends with 1. Look
whether the class has layers that kvfold holds on pages; `Cache` refuses it then, unless HARMLESS in hf/source.py says
why that is not needed. Add it here.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import transformers

from kvfold.hf.source import Question, questions

SPARSE = "an indexer chooses keys; the mask for it is made for known names only. Not on pages, or refused"
KNOWN: dict[tuple[str, str], str] = {
    ("axk2", "AXK2Attention.forward"): SPARSE,
    ("decision_transformer", "DecisionTransformerGPT2Attention.forward"): "the same for sdpa and kvfold",
    ("deepseek_v32", "DeepseekV32Attention.forward"): SPARSE,
    ("diffusion_gemma", "DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask"): "kvfold is registered",
    ("dots3_note", "Dots3NoteTextAttention.forward"): SPARSE,
    ("falcon", "FalconAttention.forward"): "refused: does not go through AttentionInterface",
    ("gemma4", "Gemma4TextModel._maybe_slice_kv_shared_inputs"): "only before layers that share keys: refused",
    ("gemma4_unified", "Gemma4UnifiedTextModel._maybe_slice_kv_shared_inputs"): "only before layers that share keys",
    ("glm5_next", "Glm5NextTextAttention.build_attention_mask_from_topk"): SPARSE,
    ("glm_moe_dsa", "GlmMoeDsaAttention.forward"): SPARSE,
    ("gpt2", "GPT2Attention.forward"): "the same for sdpa and kvfold",
    ("hrm_text", "HrmTextPreTrainedModel._check_and_adjust_attn_implementation"): "the same for sdpa and kvfold",
    ("hy_v4", "HYV4Attention.forward"): SPARSE,
    ("hy_v4_vl", "HYV4VLAttention.forward"): SPARSE,  # from transformers 5.24 on
    ("minimax_m3_vl", "MiniMaxM3VLAttention.forward"): SPARSE,
    ("mistral_large4", "MistralLarge4TextAttention.forward"): SPARSE,
    ("timm_wrapper", "TimmWrapperPreTrainedModel.post_init"): "when it is made, before kvfold comes",
}
"""Model and place, and what there is to it."""


def places(root: Path | None = None) -> Iterator[tuple[str, Question]]:
    """Model and question, for all modelling files under a folder of models."""
    root = root or Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for question in questions(path.read_text(encoding="utf-8")):
            yield path.parent.name, question


def main(root: Path | None = None) -> int:
    """Print all, the new ones last."""
    new = []
    for model, question in places(root):
        answer = {True: "differs", False: "the same", None: "unclear"}[question.differs]
        line = f"{model:22} {answer:9} {question.where}: {question.text}"
        if (model, question.where) in KNOWN:
            print(f"{line}\n{'':33}{KNOWN[model, question.where]}")
        else:
            new.append(line)
    for line in new:
        print(f"NEW {line}")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
