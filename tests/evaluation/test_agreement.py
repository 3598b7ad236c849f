"""Agreement, prompts and charts."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvfold.evaluation.agreement import agreement, divergence
from kvfold.evaluation.chart import memory_against_agreement, save_chart
from kvfold.evaluation.compare import CompareRow, budget_of, split_names, with_budget
from kvfold.evaluation.prompts import build_prompt
from kvfold.methods import parse


def test_agreement_is_the_mean_kl_and_the_share_of_equal_tokens() -> None:
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.6, 0.4]]).log()
    found = agreement(full, other)
    expected = [0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), 0.0, 0.2 * math.log(1 / 3) + 0.8 * math.log(2)]
    assert found.kl == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert found.top1 == pytest.approx(1 / 3)  # at the tie of the first row, full takes the earlier token
    assert found.tokens == 3


def test_agreement_ignores_a_shift_of_the_logits() -> None:
    logits = torch.randn(5, 11)
    assert agreement(logits, logits + 3.0).kl == pytest.approx(0.0, abs=1e-6)


def test_a_token_that_can_not_be_costs_nothing_where_the_other_has_none_either() -> None:
    """A logit of -inf is a probability of 0, whose share of the sum is 0."""
    full, other = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert agreement(full, other).kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), abs=1e-6)
    assert agreement(other, torch.zeros(1, 3)).kl == pytest.approx(0.25 * math.log(0.75) + 0.75 * math.log(2.25))
    kl, same = divergence(full, other)
    assert float(kl) == pytest.approx(agreement(full, other).kl) and float(same) == 0.0


class Letters:
    """A tokenizer of one token a character, with a chat template."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) for c in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return f"<{messages[0]['content']}>"


def test_prompt_puts_document_then_question_in_the_template() -> None:
    ids = build_prompt(Letters(), "doc", "who?")["input_ids"][0].tolist()
    assert Letters().decode(ids) == "<doc\n\nQuestion: who?>"  # no special token twice
    plain = build_prompt(Letters(), "doc", "who?", chat=False)["input_ids"][0].tolist()
    assert plain[0] == 1 and Letters().decode(plain[1:]) == "doc\n\nQuestion: who?\nAnswer:"


def test_a_long_document_is_cut_in_its_middle() -> None:
    document = "A" * 60 + "B" * 60
    made = build_prompt(Letters(), document, "who?", limit=50)
    text = Letters().decode(made["input_ids"][0].tolist())
    assert made["input_ids"].shape[1] <= 50 and made["attention_mask"].sum() == made["input_ids"].shape[1]
    assert text.startswith("<AAA") and text.endswith("BBB\n\nQuestion: who?>")
    with pytest.raises(ValueError, match="limit=12"):
        build_prompt(Letters(), document, "a question that is much longer", limit=12)


def test_budget_goes_to_the_methods_that_take_one() -> None:
    assert with_budget("snapkv", 0.3).budget == 0.3  # type: ignore[attr-defined]
    assert str(with_budget("full", 0.3)) == "full()"
    assert with_budget("snapkv(budget=7)", 0.3).budget == 7  # type: ignore[attr-defined]
    assert with_budget("streamingllm(sinks=2) | full", 0.3) == parse("streamingllm(sinks=2, budget=0.3) | full")
    for text in ("full | full", "snapkv(budget=7) | full", "tova(budget=9) | streamingllm(budget=0.2)"):
        assert with_budget(text, 0.3) == parse(text)
    made = with_budget("snapkv(window=8, pool='max')", 0.3)
    assert (made.budget, made.window) == (0.3, 8)  # type: ignore[attr-defined]


def test_a_budget_that_several_stages_could_take_is_refused() -> None:
    for text in ("tova|streamingllm(sinks=2)", "tova(budget=9) | streamingllm"):
        with pytest.raises(ValueError, match="tova and streamingllm each have one"):
            with_budget(text, 0.3)


def test_the_budget_of_a_method() -> None:
    texts = {"full": None, "h2o(budget=7)": 7, "full | h2o(budget=0.5)": 0.5, "tova | h2o": None, "full | full": None}
    assert {text: budget_of(parse(text)) for text in texts} == texts


def test_names_are_cut_at_commas_outside_parentheses() -> None:
    assert split_names("full, snapkv(window=8, pool='max'),tova") == ["full", "snapkv(window=8, pool='max')", "tova"]
    with pytest.raises(ValueError, match="names no method"):
        split_names(" , ")
    assert split_names("niah(keys=4, depths=(0.0, 0.5)),fewshot") == ["niah(keys=4, depths=(0.0, 0.5))", "fewshot"]


def test_chart_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = [
        CompareRow("full", None, "x", 9.0, 100, 100, 100, 1.0, 2.0, 1.0, 0.0),
        CompareRow("h2o", 0.5, "x", 5.0, 50, 100, 100, 1.0, 2.0, 0.9, 0.1),
    ]
    chart = memory_against_agreement(rows, "a title")
    save_chart(chart, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")

    class Broken:
        def save(self, name: str, **_: object) -> None:
            Path(name).write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_chart(Broken(), tmp_path / "other.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
