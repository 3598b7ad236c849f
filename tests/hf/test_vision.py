"""Models that read images: exact with everything kept, and methods that know which tokens are images."""

import pytest
import torch

import kvfold
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.shared_prefill import prefill_many
from models import IMAGE, VISION, build, dynamic, pictured, positions, reference, subject

ROWS = {"one": ((5, 9),), "padded": ((6, 3, 4), (2, 7), (8,))}
NAMES = pytest.mark.parametrize("name", VISION)
STEPS = 10
LIMITED = [
    ("look-m", 0.4), ("look-m", 12), ("elastic-cache-vlm", 0.4), ("elastic-cache-vlm", 12),
    ("prefixkv(merge='bucket')", 0.4), ("h2o", 12), ("snapkv", 0.4), ("kvmerger", 0.4),
]  # fmt: skip


def say(model, prompt, cache=None, steps=STEPS, **options):
    """Greedy decoding: the tokens that are said (B, steps) and their logits."""
    given = {"max_new_tokens": steps, "do_sample": False, **options}
    said = model.generate(**prompt, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **given)
    return said.sequences[:, prompt["input_ids"].shape[1] :], torch.stack(said.logits, 1)


def row_alone(name, prompt, row):
    """A row of a batch without its padding, with its images."""
    here = prompt["attention_mask"][row].bool()
    alone = {x: prompt[x][row : row + 1, here] for x in prompt if prompt[x].shape == prompt["input_ids"].shape}
    before, own = ((prompt["input_ids"][rows] == IMAGE).sum() // 16 for rows in (slice(row), row))
    if own:
        patches = 64 if name == "qwen2-vl" else 1
        alone["pixel_values"] = prompt["pixel_values"][before * patches : (before + own) * patches]
        if name == "qwen2-vl":
            alone["image_grid_thw"] = prompt["image_grid_thw"][before : before + own]
    return alone


def held(cache, row):
    return sum(int(core.counts()[row].sum()) for core in cache.paged)


# -- exactness -----------------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_full_is_the_dynamic_cache(name, rows):
    prompt = pictured(name, *rows)
    expected, logits = say(reference(name), prompt, dynamic(reference(name)))
    assert expected.unique().numel() > 5
    for method in (
        "full",
        "h2o(budget=1.0)",
        "snapkv(budget=1.0)",
        "elastic-cache-vlm(budget=1.0)",
        "look-m(budget=1.0)",
    ):
        cache = kvfold.Cache(subject(name), method)
        got, ours = say(subject(name), prompt, cache)
        assert torch.equal(got, expected)
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
        lengths = prompt["attention_mask"].sum(1)
        assert [held(cache, row) for row in range(len(rows))] == ((lengths + STEPS - 1) * 6).tolist()


@NAMES
def test_the_images_matter(name):
    """Or the other tests would say nothing of them."""
    prompt = pictured(name, (5, 9))
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(0, -1)}
    one, two = (say(reference(name), given, steps=1)[1] for given in (prompt, other))
    assert (one - two).abs().max() > 0.1


@NAMES
@torch.no_grad()
def test_a_single_forward_and_a_turn_of_text(name):
    prompt = pictured(name, (5, 9), (6, 8))
    models, caches = (reference(name), subject(name)), [dynamic(reference(name)), kvfold.Cache(subject(name))]
    more = torch.randint(3, 90, (2, 7))
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(more)], 1)
    first, second = [], []
    for model, cache in zip(models, caches, strict=True):
        first.append(model(**prompt, past_key_values=cache).logits)
        given = {"position_ids": positions(mask, 7)}
        if name == "qwen2-vl":
            given["position_ids"] = (given["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)
        second.append(model(input_ids=more, attention_mask=mask, past_key_values=cache, **given).logits)
    torch.testing.assert_close(first[1], first[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(second[1], second[0], atol=1e-4, rtol=0)


@NAMES
def test_beams_and_saving(name, tmp_path):
    prompt = pictured(name, (5, 9), (4, 3))
    expected, _ = say(reference(name), prompt, num_beams=3)
    assert torch.equal(say(subject(name), prompt, kvfold.Cache(subject(name)), num_beams=3)[0], expected)
    cache = kvfold.Cache(subject(name), "look-m(budget=0.6)")
    say(subject(name), prompt, cache, num_beams=3)
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvfold.Cache.load(tmp_path / "cache.safetensors", subject(name))
    assert [core.kept() for core in loaded.paged] == [core.kept() for core in cache.paged]


@NAMES
def test_only_the_text_decoder_has_attention_that_is_cached(name):
    kinds = {type(module).__name__ for module in attention_modules(subject(name)).values()}
    assert kinds == {"LlamaAttention" if name == "llava" else "Qwen2VLAttention"}
    assert sorted(attention_modules(subject(name))) == [0, 1, 2]


# -- methods -------------------------------------------------------------------------------------------------


@NAMES
@torch.no_grad()
def test_the_view_knows_the_images(name):
    prompt, seen = pictured(name, *ROWS["padded"]), []
    cache = kvfold.Cache(subject(name), "h2o")
    with cache.observed(seen.append):
        subject(name)(**prompt, past_key_values=cache)
    assert len(seen) == 3
    for view in seen:
        wanted = (prompt["input_ids"] == IMAGE)[:, None].expand_as(view.images)
        assert wanted.any() and torch.equal(view.images, wanted)


@NAMES
def test_look_m_keeps_text_and_merges_images(name):
    prompt = pictured(name, *ROWS["padded"])
    lengths, seen = prompt["attention_mask"].sum(1).tolist(), []
    text = [
        (ids[mask.bool()] != IMAGE).nonzero()[:, 0].tolist()
        for ids, mask in zip(prompt["input_ids"], prompt["attention_mask"], strict=True)
    ]
    cache = kvfold.Cache(subject(name), "look-m", budget=0.7)
    with cache.observed(lambda view: seen.append(view.keys.clone())):
        say(subject(name), prompt, cache, steps=1)
    for row, length in enumerate(lengths):
        limit = int(0.7 * length * 6 + 1e-6) if row < 2 else length * 6  # the last row has no image
        assert held(cache, row) == limit
        assert all(set(text[row]) <= set(head) for layer in range(3) for head in cache.kept(layer)[row])
    for layer, before in enumerate(seen):
        tokens = cache.paged[layer].stored.tokens()[0]
        for row, length in enumerate(lengths):
            there = before[row, 0, before.shape[2] - length :][tokens.positions[row, 0][tokens.valid[row, 0]].long()]
            changed = (tokens.keys[row, 0][tokens.valid[row, 0]] != there).any(-1).sum()
            assert bool(changed > 0) == (row < 2)


@NAMES
@pytest.mark.parametrize(("method", "budget"), LIMITED)
def test_budgets_and_rows_alone(name, method, budget):
    prompt = pictured(name, (6, 3, 4), (2, 7))
    text = method.replace("(", f"(budget={budget}, ") if "(" in method else f"{method}(budget={budget})"
    cache = kvfold.Cache(subject(name), text)
    _, logits = say(subject(name), prompt, cache, steps=3)
    for row, length in enumerate(prompt["attention_mask"].sum(1).tolist()):
        allowed = (budget * length if isinstance(budget, float) else budget) * 6
        assert held(cache, row) <= allowed + 1e-6 + (0 if cache.method.listens("after_decode") else 2 * 6)
        alone = kvfold.Cache(subject(name), text)
        _, own = say(subject(name), row_alone(name, prompt, row), alone, steps=3)
        torch.testing.assert_close(own[0], logits[row], atol=1e-3, rtol=0)
        assert [alone.kept(layer)[0] for layer in range(3)] == [cache.kept(layer)[row] for layer in range(3)]


@NAMES
@torch.no_grad()
def test_one_prefill_for_look_m(name):
    prompt = pictured(name, *ROWS["padded"])
    own, adopted = (kvfold.Cache(subject(name), "look-m", budget=0.5) for _ in range(2))
    subject(name)(**prompt, past_key_values=own)
    prefill_many(subject(name), prompt, [adopted])
    assert [core.kept() for core in adopted.paged] == [core.kept() for core in own.paged]
    assert own.kept_tokens < int(prompt["attention_mask"].sum()) / 3


@torch.no_grad()
def test_a_second_image_in_a_further_turn():
    model, first, second = subject("llava"), pictured("llava", (5, 9)), pictured("llava", (3, 6), seed=1)
    mask = torch.ones(1, 55, dtype=torch.long)
    truth, cache = dynamic(reference("llava")), kvfold.Cache(model, "look-m", budget=20)
    exact = kvfold.Cache(model, "look-m", budget=1.0)
    for given, columns in ((first, 30), (second, 55)):
        given = {**given, "attention_mask": mask[:, :columns]}
        expected = reference("llava")(**given, past_key_values=truth).logits
        torch.testing.assert_close(model(**given, past_key_values=exact).logits, expected, atol=1e-4, rtol=0)
        model(**given, past_key_values=cache)
    assert (cache.paged[0].counts() == 20).all()
    for head in cache.kept(1)[0]:  # 23 tokens of text, and the end of the second image among the last ten
        assert not set(head) & {*range(5, 21), *range(33, 45)} and set(head) > {*range(45, 55)}


# -- refusals ------------------------------------------------------------------------------------------------


@NAMES
@torch.no_grad()
def test_what_would_need_the_prompts_ids_again(name):
    model, prompt = subject(name), pictured(name, (5, 9))
    for call in (lambda cache: model(**prompt, past_key_values=cache), lambda cache: say(model, prompt, cache)):
        with pytest.raises(ValueError, match=r"prefill_chunk=8 can't split a prompt with images"):
            call(kvfold.Cache(model, prefill_chunk=8))
    assert len(say(model, prompt, kvfold.Cache(model, prefill_chunk=64), steps=2)[0]) == 1
    for method in ("kvzip", "jrt-prompt", "specpc"):
        if name == "llava":
            with pytest.raises(ValueError, match=rf"method={method}\(.*in its own way, which leaves"):
                say(model, prompt, kvfold.Cache(model, method))
        else:
            with pytest.raises(ValueError, match=rf"method={method}\(.*Qwen2VL.*gives images others \(M-RoPE\)"):
                kvfold.Cache(model, method)


@NAMES
@torch.no_grad()
def test_look_m_needs_ids(name):
    model, prompt = subject(name), pictured(name, (5, 9))
    states = model.get_input_embeddings()(prompt["input_ids"])
    cache = kvfold.Cache(model, "look-m", budget=0.5)
    with pytest.raises(ValueError, match=r"method=look-m\(.*must know which tokens are images: call .* with input_ids"):
        model(inputs_embeds=states, past_key_values=cache)
    with pytest.raises(ValueError, match="give input_ids"):
        prefill_many(model, {"inputs_embeds": states}, [kvfold.Cache(model, "look-m")])
    cache = kvfold.Cache(model, "look-m", budget=0.5)
    model(**prompt, past_key_values=cache)
    model(inputs_embeds=states[:, :1], past_key_values=cache)  # a generated token is text
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 1


@torch.no_grad()
def test_tokens_with_places_in_a_grid_are_not_moved():
    model, prompt = subject("qwen2-vl"), pictured("qwen2-vl", (5, 9))
    with pytest.raises(ValueError, match=r"needs RoPE with fixed angles.*Qwen2VL.*none that it could use"):
        kvfold.Cache(model, "streamingllm", positions="compact")
    with pytest.raises(ValueError, match=r"frame='unrotated'.*none that it could use"):
        model(**prompt, past_key_values=kvfold.Cache(model, "ems", frame="unrotated"))
    for method in ("streamingllm(positions='compact')", "ems(frame='unrotated')"):
        say(subject("llava"), pictured("llava", (5, 9)), kvfold.Cache(subject("llava"), method), steps=2)


@NAMES
@torch.no_grad()
def test_parts_of_the_model_that_had_caches_of_their_own(name):
    """Their hooks see no ids, or the same ones again."""
    model, prompt = build(name), pictured(name, (5, 9))
    kvfold.Cache(model.model.language_model)
    kvfold.Cache(model.model)
    caches = [kvfold.Cache(which, "look-m", budget=0.5) for which in (model, subject(name), model.model)]
    for cache in caches:
        cache.model(**prompt, past_key_values=cache)
    kept = [[core.kept() for core in cache.paged] for cache in caches]
    assert kept[0] == kept[1] == kept[2]
    assert caches[0].kept_tokens == prompt["input_ids"].shape[1] / 2
