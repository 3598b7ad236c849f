"""Looking ahead: greedy tokens of the model itself or of another one, row by row, without a trace."""

from dataclasses import dataclass

import pytest
import torch

import kvfold
from drafters import drafter_folder
from kvfold import Keep, Method
from kvfold.hf.call.rewriting import Raw
from kvfold.hf.draft import drafter, look_ahead
from kvfold.hf.greedy import end_tokens, go_on
from kvfold.hf.shared_prefill import prefill_many
from kvfold.views import LookAhead
from models import VOCAB, build, dynamic, feed, greedy, grow, positions, reference, subject, tokens


def raw(prompt, model) -> Raw:
    return Raw(prompt["input_ids"], prompt["attention_mask"].bool(), model, kvfold.Cache)


def looking(draft=None, count=6):
    """A method that looks ahead when a prompt is over, then keeps the last ten tokens; and what it saw."""
    said = []

    @kvfold.method("test-looking", title="Looking", kind="evict")
    @dataclass(frozen=True)
    class Looking(Method):
        def after_prompt(self, prompt):
            ids, valid = yield LookAhead(count, draft)
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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_adopted_prompt_is_looked_ahead_of_before_what_went(name):
    """As in a pass of its own: what comes next is what the whole prompt says, though another stage has dropped some."""
    method, prompt, model = "h2o(budget=0.2) | speckv(budget=4, window=0, lookahead=6)", tokens(60, 41), subject(name)
    plain, adopted = kvfold.Cache(model, method), kvfold.Cache(model, method)
    feed(model, plain, *prompt.values())
    given = prompt | {"position_ids": positions(prompt["attention_mask"], 60)}
    prefill_many(model, given, [adopted])
    assert [core.kept() for core in plain.paged] == [core.kept() for core in adopted.paged]
    if name == "llama":  # nobody says what comes next, and the whole prompt is gone
        base, by_hand = kvfold.Cache(model, "full"), kvfold.Cache(model, method)
        with base.observed(by_hand.adopt), pytest.raises(ValueError, match="looks ahead: call a model with a head"):
            feed(model, base, *prompt.values())


@pytest.mark.parametrize("chunk", [None, 25])
def test_the_prompt_is_over_when_the_head_has_spoken(chunk):
    """A body that was once given a cache of its own has hooks, too: it knows no logits."""
    method, prompt, kept = "h2o(budget=0.2) | speckv(budget=4, window=0, lookahead=6)", tokens(60, 41), []
    for hooked in (False, True):
        model = build("llama")
        if hooked:
            kvfold.Cache(model.model, "full")
        cache = kvfold.Cache(model, method, prefill_chunk=chunk)
        logits = feed(model, cache, *prompt.values())
        step = feed(model, cache, logits[:, -1:].argmax(-1), grow(prompt["attention_mask"]))
        kept.append(([core.kept() for core in cache.paged], step.argmax(-1).tolist()))
    assert kept[0] == kept[1]


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
    assert [said[0][1]] == true("llama", {"input_ids": ids[1:, :15], "attention_mask": mask[1:, :15]})


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([19, 2])], ids=["one", "three", "chosen"])
def test_logits_that_are_not_those_of_each_rows_last_token(keep):
    prompt, (method, said), model = tokens(20, 20), looking(), subject("llama")
    ids, mask = prompt["input_ids"], prompt["attention_mask"].clone()
    mask[1, 15:] = 0
    given = {"attention_mask": mask, "position_ids": positions(mask, 20), "logits_to_keep": keep}
    with torch.no_grad():
        model(input_ids=ids, past_key_values=kvfold.Cache(model, method), **given)
        alone = true("llama", {"input_ids": ids[1:, :15], "attention_mask": mask[1:, :15]})
        assert said == [[*true("llama", {"input_ids": ids[:1], "attention_mask": mask[:1]}), *alone]]
        for other in ("gemma3", "llama"):  # windows can't be read again, nor can what went
            method = looking()[0] if other == "gemma3" else kvfold.parse("h2o(budget=5)") | looking()[0]
            with pytest.raises(ValueError, match=r"last token \(logits_to_keep=0 for padding behind it\)"):
                subject(other)(input_ids=ids, past_key_values=kvfold.Cache(subject(other), method), **given)


@pytest.mark.usefixtures("scratch_methods")
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_the_columns_that_go_on(side):
    """Behind a narrowed layer there are fewer columns, and every row's last token stands in the last of them."""
    prompt, (method, said), model = tokens(30, 21), looking(), subject("llama")
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    if side == "right":
        ids, mask = ids.clone(), mask.flip(1)
        ids[1] = ids[1].roll(21 - 30)
    composed = kvfold.parse("fastkv(budget=1.0, propagated=12, window=3, layer=0)") | method
    feed(model, kvfold.Cache(model, composed), ids, mask)
    together = said.pop()
    for row, length in enumerate((30, 21)):
        alone = prompt["input_ids"][row : row + 1, -length:]
        feed(model, kvfold.Cache(model, composed), alone, torch.ones_like(alone))
        assert said.pop() == together[row : row + 1]


def test_a_row_ends_with_its_end_token():
    prompt = tokens(30, 21)
    model = build("llama")
    expected = true("llama", prompt, 20)
    model.generation_config.eos_token_id = [expected[0][3], 96]
    ids, valid = look_ahead(kvfold.Cache(model), prompt["input_ids"], prompt["attention_mask"].bool(), 20)
    got = [row[here].tolist() for row, here in zip(ids, valid, strict=True)]
    for row, said in zip(expected, got, strict=True):
        ends = [i for i, token in enumerate(row) if token in (expected[0][3], 96)]
        assert said == row[: ends[0] + 1 if ends else 20]
    assert len(got[0]) == expected[0].index(expected[0][3]) + 1 and ids.shape[1] == max(map(len, got))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_nobody_asks_in_a_row_that_has_ended(name):
    """Whoever observes a draft sees the queries of its tokens, but neither the end token's nor any behind it."""
    prompt, model = tokens(30, 30) if name == "qwen3-next" else tokens(30, 21), build(name)
    said = true(name, prompt, 12)
    model.generation_config.eos_token_id = [said[0][3], said[1][6]]
    ends = [min(row.index(token) for token in (said[0][3], said[1][6]) if token in row) for row in said]
    for rows in ([0, 1], [0]):
        views = []
        ids, mask = prompt["input_ids"][rows], prompt["attention_mask"][rows].bool()
        look_ahead(kvfold.Cache(model), ids, mask, 12, views.append)
        layers = len(kvfold.Cache(model, "full").paged)
        assert len(views) == layers * (1 + max(ends[row] for row in rows))
        for row in rows:
            fed = [int(view.queries.valid[row].sum()) for view in views[layers::layers]]
            assert sum(fed) == ends[row] and fed == sorted(fed, reverse=True)
            assert views[-1].count[row].tolist() == [mask[row].sum() + ends[row]] * views[-1].heads


def test_the_end_token_of_a_model_that_can_not_generate():
    model = build("llama")
    model.config.eos_token_id, model.generation_config.eos_token_id = [7, 8], 9
    assert end_tokens(model) == {9} and end_tokens(model.model) == {7, 8}


def test_nothing_and_one_token():
    prompt = tokens(30, 21)
    for count in (0, 1):
        assert look_ahead(kvfold.Cache(subject("llama")), prompt["input_ids"], prompt["attention_mask"].bool(), count)[
            0
        ].shape == (
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
