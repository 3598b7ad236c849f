"""JRT-Prompt against its card: the prompt's tokens, several times over, as the model reads them."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.hf.call.rewriting import Raw
from kvfold.methods.jrt_prompt import JRTPrompt, begin
from models import build, dynamic, feed, follow, grow, reference, subject, tokens

NOBODY = SimpleNamespace()
STEPS = torch.arange(5, 13).view(2, 4)


def order(ids: list[list[int]], valid: list[list[int]], model=NOBODY, copies: int = 2) -> list[list[int]]:
    return JRTPrompt(copies).read_order(Raw(torch.tensor(ids), torch.tensor(valid).bool(), model)).tolist()


def test_oracle_the_prompt_so_many_times():
    assert order([[7, 8, 9]], [[1, 1, 1]]) == [[0, 1, 2, 0, 1, 2]]
    assert order([[7, 8]], [[1, 1]], copies=3) == [[0, 1, 0, 1, 0, 1]]
    assert JRTPrompt(1).read_order(Raw(torch.ones(1, 2).long(), torch.ones(1, 2).bool(), NOBODY)) is None


def test_a_text_begins_once():
    model = subject("llama")
    assert begin(model) == 1 and begin(NOBODY) == -1
    assert order([[1, 8, 1]], [[1, 1, 1]], model) == [[0, 1, 2, 1, 2]]
    assert order([[7, 8, 1]], [[1, 1, 1]], model) == [[0, 1, 2, 0, 1, 2]]


def test_padding_stands_in_front():
    ids, valid = [[1, 8, 9], [0, 8, 9], [0, 1, 9]], [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert order(ids, valid, subject("llama")) == [[0, 1, 2, 1, 2], [-1, 1, 2, 1, 2], [-1, -1, 1, 2, 2]]
    assert order([[0, 1, 9]], [[0, 1, 1]], subject("llama")) == [[1, 2, 2]]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_model_reads_a_longer_prompt(copies):
    """Model-external: what comes out is what the repeated prompt gives."""
    prompt = tokens(20, 13)
    got = follow(subject("llama"), kvfold.Cache(subject("llama"), "jrt-prompt", copies=copies), *prompt.values(), STEPS)
    for row, length in enumerate((20, 13)):
        own = prompt["input_ids"][row : row + 1, -length:].repeat(1, copies)
        model = reference("llama")
        expected = follow(model, dynamic(model), own, torch.ones_like(own), STEPS[row : row + 1])
        assert_close(got[row], expected[0], atol=1e-4, rtol=0)


def test_before_a_method_that_compresses():
    prompt = tokens(20, 13)
    model, cache = build("llama"), None
    cache = kvfold.Cache(model, "jrt-prompt | snapkv(budget=0.5, window=4)")
    feed(model, cache, *prompt.values())
    for core in cache.paged:
        assert core.counts().tolist() == [[20, 20], [13, 13]]
    assert feed(model, cache, STEPS[:, :1], grow(prompt["attention_mask"])).isfinite().all()


def test_generate_answers_behind_the_given_prompt():
    prompt = tokens(20, 13)
    model = build("llama")
    cache = kvfold.Cache(model, "jrt-prompt")
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, :20], prompt["input_ids"]) and out.shape == (2, 25)


@pytest.mark.parametrize("copies", [0, 1.5])
def test_options_are_checked(copies, unchecked):
    with pytest.raises(ValueError, match=f"copies={copies} must be an int >= 1"):
        JRTPrompt(copies)
