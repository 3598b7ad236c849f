"""Gradients that would come through a cache are refused; those that don't are right."""

import pytest
import torch

import kvfold
from models import build, dynamic, tokens

PROMPT, MORE = tokens(20)["input_ids"], tokens(9, seed=1)["input_ids"]


def loss_of(model, cache, **given):
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    logits = model(past_key_values=cache, **given).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], MORE[0, 1:])


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "kivi(residual=32)"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_backward_through_a_prefix_is_refused(name, method):
    model = build(name)
    loss = loss_of(model, kvfold.Cache(model, method), input_ids=MORE)
    with pytest.raises(RuntimeError, match=r"no gradient comes through layer .*DynamicCache"):
        loss.backward()


def test_backward_through_a_prompt_and_a_step_is_refused():
    model = build("llama")
    for count in (9, 1):
        cache = kvfold.Cache(model, "full")
        if count == 1:
            model(PROMPT, past_key_values=cache)
        with pytest.raises(RuntimeError, match="no gradient"):
            model(MORE[:, :count], past_key_values=cache).logits.sum().backward()


def test_the_gradient_of_what_a_prompt_can_learn_is_refused():
    """Of embeddings: a leaf before anything is read, what was made of one when the gradient comes back."""
    model = build("llama").requires_grad_(False)
    wanted = model.get_input_embeddings()(MORE).detach().requires_grad_()
    cache = kvfold.Cache(model, "full")
    with pytest.raises(ValueError, match=r"inputs_embeds.requires_grad=True must be False"):
        loss_of(model, cache, inputs_embeds=wanted)
    assert cache.get_seq_length() == PROMPT.shape[1]
    with pytest.raises(RuntimeError, match="no gradient"):
        loss_of(model, kvfold.Cache(model, "full"), inputs_embeds=wanted * 1.0).backward()
    with torch.no_grad():
        loss_of(model, kvfold.Cache(model, "full"), inputs_embeds=wanted)


@pytest.mark.filterwarnings("ignore:.*has no layer with full attention")
def test_gradients_that_meet_no_pages_are_right():
    """Of the head alone; and through a model whose layers are all windows."""
    found = []
    for make in (dynamic, lambda model: kvfold.Cache(model, "full")):
        model = build("llama").requires_grad_(False)
        model.lm_head.requires_grad_()
        loss_of(model, make(model), input_ids=MORE).backward()
        windows = build("mistral-sliding")
        loss_of(windows, make(windows), input_ids=MORE).backward()
        found.append((model.lm_head.weight.grad, windows.model.layers[0].self_attn.k_proj.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert bool((mine != 0).any())
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_without_a_cache_of_ours_gradients_are_transformers():
    model, other = build("llama"), build("llama")
    kvfold.Cache(model, "full")
    for each in (model, other):
        loss_of(each, dynamic(each), input_ids=MORE).backward()
    mine, theirs = (each.model.layers[0].self_attn.q_proj.weight.grad for each in (model, other))
    torch.testing.assert_close(mine, theirs)
