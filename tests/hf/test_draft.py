"""Looking ahead: greedy tokens of the model itself or of another one, row by row, without a trace."""

from dataclasses import dataclass

import pytest
import torch

import kvfold
from drafters import drafter_folder
from kvfold import Keep, Method
from kvfold.hf.draft import drafter, go_on, look_ahead
from kvfold.hf.fanout import prefill_many
from kvfold.hf.reading import Raw
from models import VOCAB, build, dynamic, feed, greedy, positions, reference, subject, tokens


def raw(prompt, model) -> Raw:
    return Raw(prompt["input_ids"], prompt["attention_mask"].bool(), model)


def looking(draft=None, count=6):
    """A method that looks ahead when a prompt is over, then keeps the last ten tokens; and what it saw."""
    said = []

    @kvfold.method("test-looking", title="Looking", kind="evict")
    @dataclass(frozen=True)
    class Looking(Method):
        def after_prompt(self, prompt):
            ids, valid = prompt.look_ahead(count, draft)
            said.append([row[here].tolist() for row, here in zip(ids, valid, strict=True)])
            return {i: Keep(prompt[i].last(10)) for i in range(len(prompt))}

    return Looking(), said


def true(name: str, prompt, steps: int = 6) -> list[list[int]]:
    model = reference(name)
    return greedy(model, dynamic(model), *prompt.values(), steps)[0].tolist()


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_the_model_itself(name):
    prompt, (method, said) = tokens(30, 30) if name == "qwen3-next" else tokens(30, 21), looking()
    model, cache = subject(name), kvfold.Cache(subject(name), method)
    logits = feed(model, cache, *prompt.values())
    assert said == [true(name, prompt)] and logits[:, -1].argmax(-1).tolist() == [row[0] for row in said[0]]
    assert all(core.width == 30 and core.counts().tolist() == [[10] * core.shape[0]] * 2 for core in cache.paged)


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_that_was_adopted(name):
    """By hand, in the middle of the other cache's pass; or by `prefill_many`, which knows what comes next."""
    prompt, (method, said) = tokens(30, 21), looking()
    model = subject(name)
    prefill_many(
        model, prompt | {"position_ids": positions(prompt["attention_mask"], 30)}, [kvfold.Cache(model, method)]
    )
    if name == "llama":
        full, adopted = kvfold.Cache(model, "full"), kvfold.Cache(model, method)
        with full.observed(adopted.adopt):
            feed(model, full, *prompt.values())
    assert said == [true(name, prompt)] * len(said) and said


@pytest.mark.usefixtures("scratch_methods")
def test_every_chunk_and_after_a_crop():
    method, said = looking(count=3)
    ids = tokens(30)["input_ids"]
    model = build("llama")
    with torch.no_grad():
        model(ids, past_key_values=kvfold.Cache(model, method, prefill_chunk=12))
    assert said[0] == true("llama", tokens(30) | {"input_ids": ids[:, :12], "attention_mask": torch.ones(1, 12)}, 3)
    assert len(said) == 3
    said.clear()
    cache = kvfold.Cache(model, method)
    model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False)
    assert said[0] and said[0][0][0] < VOCAB and len(said) == 1


@pytest.mark.usefixtures("scratch_methods")
def test_padding_behind_the_prompt():
    prompt, (method, said) = tokens(20, 20), looking()
    ids, mask = prompt["input_ids"], prompt["attention_mask"].clone()
    mask[1, 15:] = 0
    feed(subject("llama"), kvfold.Cache(subject("llama"), method), ids, mask)
    assert [said[0][0]] == true("llama", {"input_ids": ids[:1], "attention_mask": mask[:1]})
    assert [said[0][1][:1]] == true("llama", {"input_ids": ids[1:, :15], "attention_mask": mask[1:, :15]}, 1)


def test_a_row_ends_with_its_end_token():
    prompt = tokens(30, 21)
    model = build("llama")
    expected = true("llama", prompt, 20)
    model.generation_config.eos_token_id = [expected[0][3], 96]
    ids, valid = look_ahead(model, prompt["input_ids"], prompt["attention_mask"].bool(), 20)
    got = [row[here].tolist() for row, here in zip(ids, valid, strict=True)]
    for row, said in zip(expected, got, strict=True):
        ends = [i for i, token in enumerate(row) if token in (expected[0][3], 96)]
        assert said == row[: ends[0] + 1 if ends else 20]
    assert len(got[0]) == expected[0].index(expected[0][3]) + 1 and ids.shape[1] == max(map(len, got))


def test_nothing_and_one_token():
    prompt = tokens(30, 21)
    for count in (0, 1):
        assert look_ahead(subject("llama"), prompt["input_ids"], prompt["attention_mask"].bool(), count)[0].shape == (
            2,
            count,
        )
    cache = kvfold.Cache(subject("llama"), "full")
    assert go_on(subject("llama"), cache, torch.ones(1, 1).long(), torch.ones(1, 3).bool(), 1)[0].tolist() == [[1]]


@pytest.mark.usefixtures("scratch_methods")
def test_another_model(tmp_path):
    folder = drafter_folder(tmp_path, seed=1)
    prompt, (method, said) = tokens(30, 21), looking(folder)
    feed(subject("llama"), kvfold.Cache(subject("llama"), method), *prompt.values())
    other = build("llama", seed=1)
    assert said == [greedy(other, dynamic(other), *prompt.values(), 6)[0].tolist()] != [true("llama", prompt)]
    assert drafter(folder, subject("llama")) is drafter(folder, subject("gemma3"))
    ids, valid = raw(prompt, subject("llama")).look_ahead(6, lambda view: None, folder)
    assert ids.tolist() == said[0] and valid.all()


def test_of_another_vocabulary(tmp_path):
    mine, other = drafter_folder(tmp_path / "a"), drafter_folder(tmp_path / "b", prefix="v")
    target = kvfold.load(mine, progress=False)[0]
    assert drafter(mine, target) is not target
    with pytest.raises(ValueError, match=r"draft='.*b' .* and the model '.*a' .* must share a vocabulary"):
        drafter(other, target)
    small = build("llama-one-layer")
    small.config.vocab_size = 50
    with pytest.raises(ValueError, match=r"draft='.*a' \(vocabulary of 97\) and the model 'LlamaForCausalLM' \(50\)"):
        drafter(mine, small)


@pytest.mark.usefixtures("scratch_methods")
def test_a_model_without_a_head():
    from transformers import AutoModel

    method, _ = looking()
    model = AutoModel.from_config(build("gemma3").config)
    cache = kvfold.Cache(model, method)
    with torch.no_grad(), pytest.raises(ValueError, match="looks ahead: call a model with a head"):
        model(input_ids=tokens(12)["input_ids"], past_key_values=cache)
