"""Models whose own code asks for the name of their attention, or gets in the way of keys and masks: they are refused.

benchmarks/attention_names.py finds what transformers' own models ask, benchmarks/families.py what all of them do.
"""

import runpy
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import kvfold
from kvfold.hf.argument import cache_in
from kvfold.hf.source import changed_by_name, questions
from models import COMMON, build, dynamic, feed, greedy, tokens

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/attention_names.py"))


@cache
def families():
    return runpy.run_path(str(ROOT / "benchmarks/families.py"))


# -- what transformers has -----------------------------------------------------------------------------------


def test_no_place_of_transformers_is_new(capsys):
    assert SCRIPT["main"]() == 0, capsys.readouterr().out


def test_a_new_place_is_noticed(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    code = "class NewAttention:\n    def forward(self):\n        return self.config._attn_implementation == 'sdpa'\n"
    (tmp_path / "new" / "modeling_new.py").write_text(code)
    assert SCRIPT["main"](tmp_path) == 1
    assert "NEW new" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v32",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("axk2", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text", "gemma4_text", "falcon", "gpt2")
        ),
    ],
)
def test_a_model_that_asks_keeps_its_answers(name):
    matrix = families()
    model = matrix["build"](name)
    given = matrix["batch"](9)
    before, as_set = matrix["state"](model), matrix["attentions"](model)
    expected = matrix["logits"](model, matrix["own_cache"](model), *given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing on pages
        try:
            made = kvfold.Cache(model)
        except ValueError:
            made = None
    assert made is None or made.paged or matrix["attentions"](model) == as_set
    assert made is not None or matrix["state"](model) == before
    for held in [matrix["own_cache"](model), made]:
        if held is not None:
            got = matrix["logits"](model, held, *given)
            torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


# -- questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "differs"),
    [
        ("return self.config._attn_implementation == 'sdpa'", True),
        ("return 'sdpa' == config.get_text_config()._attn_implementation", True),
        ("return self.config._attn_implementation in ('eager', 'sdpa')", True),
        ("return self.attn_implementation not in {'sdpa'}", True),
        ("kind = self.config._attn_implementation\n        return kind != 'sdpa'", True),
        ("return self.config._attn_implementation.startswith('s')", True),
        ("return TABLE[self.config._attn_implementation](x)", True),
        ("return TABLE.get(self.config._attn_implementation, None)", True),
        ("return self.config._attn_implementation == 'eager'", False),
        ("return self.config._attn_implementation.startswith('flash')", False),
        ("return self.config._attn_implementation is None", False),
        ("return self.config._attn_implementation in TABLE", None),
    ],
)
def test_questions_are_found_and_answered(body, differs):
    (found,) = questions(f"class A:\n    def forward(self, x):\n        {body}\n")
    assert (found.where, found.differs) == ("A.forward", differs)


def test_the_interface_and_constructors_are_no_questions():
    code = "        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]\n"
    made = "        self.x = TABLE[config._attn_implementation]\n"
    source = f"class A:\n    def __init__(self, config):\n{made}    def forward(self):\n{code}"
    assert questions(source) == []


def test_only_code_of_the_models_classes_counts():
    class Plain(nn.Module):
        pass

    assert changed_by_name([LlamaForCausalLM, LlamaAttention, Plain]) is None
    assert changed_by_name([Asking]).where == "Asking.forward"
    assert changed_by_name([type("Heir", (Asking,), {})]) is not None


# -- models --------------------------------------------------------------------------------------------------


class Asking(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return (out if self.config._attn_implementation in ("eager", "sdpa") else 2 * out), weights


class MaskingAttention(LlamaAttention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        held, ALL_ATTENTION_FUNCTIONS = cache_in(kwargs), {"any": lambda *args: (hidden_states, None)}
        keys, values = held.update(hidden_states[:, None], hidden_states[:, None], self.layer_idx)
        mask = torch.ones_like(keys)
        attend = ALL_ATTENTION_FUNCTIONS["any"]
        return attend(self, hidden_states, keys, values, mask)


def llama(attention: type[LlamaAttention]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**COMMON)).eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    return model


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            Asking,
            r"LlamaForCausalLM computes something else .*\(Asking.forward asks: self.config._attn_implementation in",
        ),
        (MaskingAttention, r"MaskingAttention of LlamaForCausalLM attends with a mask of its own making \(mask\)"),
    ],
)
def test_refused_before_anything_is_set(attention, message):
    model = llama(attention)
    before = families()["state"](model)
    with pytest.raises(ValueError, match=message):
        kvfold.Cache(model)
    assert families()["state"](model) == before


@pytest.mark.parametrize("name", ["git", "doge", "jetmoe", "mllama"])
@pytest.mark.slow
def test_transformers_models_that_cant_be(name):
    matrix = families()
    row = matrix["ask"](name)
    assert row.outcome in ("refused", "not testable"), row


def test_a_model_with_nothing_on_pages_computes_as_it_did():
    matrix = families()
    model = LlamaForCausalLM(LlamaConfig(**COMMON)).eval()
    model.config.sliding_window = 8
    before = matrix["attentions"](model)
    with pytest.warns(UserWarning, match=r"no layer with full attention alone \(it has DynamicSlidingWindowLayer\)"):
        held = kvfold.Cache(model, "h2o")
    assert matrix["attentions"](model) == before
    prompt = tokens(12)
    expected, _ = greedy(model, dynamic(model), *prompt.values(), 8)
    assert torch.equal(greedy(model, held, *prompt.values(), 8)[0], expected)


def test_a_question_that_kvfold_answers_like_sdpa_is_no_hindrance():
    class Harmless(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            out, weights = super().forward(hidden_states, **kwargs)
            return (2 * out if self.config._attn_implementation == "eager" else out), weights

    model = llama(Harmless)
    feed(model, kvfold.Cache(model), *tokens(8).values())


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_towers_beside_the_text_keep_their_attention(name):
    model = build(name)
    kvfold.Cache(model)
    configs = {type(m).__name__: m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    assert model.config._attn_implementation == model.config.get_text_config()._attn_implementation == "kvfold"
    towers = [config for kind, config in configs.items() if "Vision" in kind or "CLIP" in kind]
    assert towers and {config._attn_implementation for config in towers} == {"sdpa"}


def test_layers_that_would_share_a_mask_with_paged_ones_are_refused():
    matrix = families()
    kinds = ["full_attention", "minimax_m3_sparse"] * 2
    config = matrix["tiny"]("minimax_m3_vl_text")
    config.layer_types = kinds
    model = type(matrix["build"]("minimax_m3_vl_text"))(config)
    before = matrix["state"](model)
    with pytest.raises(ValueError, match=r"has cache layers of type \w+ beside plain ones"):
        kvfold.Cache(model)
    assert matrix["state"](model) == before
