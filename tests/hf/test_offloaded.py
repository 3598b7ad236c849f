"""Models whose weights accelerate brings for a pass and takes away again: as those whose weights are there."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from transformers import AutoModelForCausalLM

import kvfold
from kvfold.conversations.topics import OwnStates
from kvfold.hf.draft import look_ahead
from kvfold.hf.looking import ids_device
from kvfold.hf.recurrence import carries_state
from kvfold.hf.rope import find_ropes
from kvfold.hf.saving.fingerprint import fingerprint
from models import build, feed, follow, grow, tokens

CPU = torch.device("cpu")
STEPS = torch.randint(5, 90, (2, 4), generator=torch.Generator().manual_seed(3))
WAYS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "whole": lambda model, folder: around(model),
}
"""The last: one hook on each decoder layer, for all that lies in it, and more than one hook on the embedding."""


def around(model):
    body = model.model
    for part in (*body.layers, body.norm, body.embed_tokens, model.lm_head):
        held = {name: value.detach() for name, value in part.named_parameters()}
        hook = AlignDevicesHook(CPU, offload=True, weights_map=held, place_submodules=True)
        add_hook_to_module(part, SequentialHook(ModelHook(), hook) if part is body.embed_tokens else hook)
    return model


@pytest.fixture(params=WAYS)
def away(request, tmp_path):
    """What takes a model's weights away."""
    return lambda model: WAYS[request.param](model, tmp_path / f"away{id(model)}")


def elsewhere(model):
    return [name for name, weight in model.named_parameters() if weight.is_meta]


def test_what_turns_is_known_and_the_look_leaves_nothing(away):
    model, plain = away(build("llama")), build("llama")
    names = elsewhere(model)
    assert names == [name for name, _ in model.named_parameters()]
    ropes = find_ropes(model)
    assert {i: r.channels for i, r in ropes.items()} == {i: r.channels for i, r in find_ropes(plain).items()}
    assert len(ropes) == 3 and elsewhere(model) == names and ids_device(model) == CPU


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("expected-attention", {"budget": 0.3}),
        ("streamingllm", {"budget": 16, "positions": "compact"}),
        ("kvmerger", {"budget": 16, "frame": "unrotated"}),
        ("kvfold", {"budget": 0.5}),
        ("speckv", {"budget": 16}),
    ],
)
def test_a_method_decides_as_ever(away, method, options):
    model, plain, prompt = away(build("llama")), build("llama"), tokens(60, 51)
    cache, other = kvfold.Cache(model, method, **options), kvfold.Cache(plain, method, **options)
    got = follow(model, cache, *prompt.values(), STEPS)
    torch.testing.assert_close(got, follow(plain, other, *prompt.values(), STEPS), atol=1e-4, rtol=0)
    assert cache.kept(1) == other.kept(1)


def test_recurrent_states():
    model, plain = cpu_offload(build("qwen3-next"), CPU), build("qwen3-next")
    names = elsewhere(model)
    assert carries_state(model) is carries_state(plain) and elsewhere(model) == names


def test_states_of_texts():
    def words(text, add_special_tokens):
        return type("Ids", (), {"input_ids": [5 + len(text), 9, 11]})

    texts = ["a", "bb", "ccc"]
    model, plain = cpu_offload(build("llama"), CPU), build("llama")
    assert (abs(OwnStates(model, words)(texts) - OwnStates(plain, words)(texts)) < 1e-5).all()


def test_a_draft(away):
    said, prompt = [], tokens(12, 9)
    for model in (away(build("llama")), build("llama")):
        said.append(look_ahead(kvfold.Cache(model), prompt["input_ids"], prompt["attention_mask"].bool(), 4))
    assert torch.equal(said[0][0], said[1][0])


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_model_is_known_by_its_weights_wherever_they_are(away, tied):
    def made(seed):
        config = build("llama").config
        config.tie_word_embeddings = tied
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    want = fingerprint(made(0))
    model = away(made(0))
    assert fingerprint(model) == want
    kvfold.Cache(model)
    assert fingerprint(model) == want != fingerprint(away(made(1)))


def test_files_go_from_one_to_the_other_and_not_to_another_model(away, tmp_path):
    plain, prompt = build("llama"), tokens(30)
    want = follow(plain, kvfold.Cache(plain, "snapkv", budget=8), *prompt.values(), STEPS[:1])[:, -4:]
    there, gone = build("llama"), away(build("llama"))
    for number, (writer, reader) in enumerate(((there, gone), (gone, there), (gone, gone))):
        cache = kvfold.Cache(writer, "snapkv", budget=8)
        feed(writer, cache, *prompt.values())
        cache.save(tmp_path / f"{number}")
        read, mask, got = kvfold.Cache.load(tmp_path / f"{number}", reader), prompt["attention_mask"], []
        for step in STEPS[:1].T:
            mask = grow(mask)
            got.append(feed(reader, read, step[None], mask)[:, -1:])
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="with other weights"):
            kvfold.Cache.load(tmp_path / f"{number}", away(build("llama", seed=1)))


def test_weights_that_nobody_brings(tmp_path):
    model = build("llama")
    cache = kvfold.Cache(model)
    feed(model, cache, *tokens(9).values())
    model.to("meta")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight of LlamaForCausalLM is on 'meta', and no hook"):
        cache.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())
