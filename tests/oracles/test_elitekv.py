"""EliteKV against its card: RoPE in elite pairs alone, one latent of all else, and how both are chosen."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama import modeling_llama

import kvfold
from kvfold import artefacts
from kvfold.artefacts import Artefact
from kvfold.calibration.elite import elite_order, joint_basis, rest_of
from kvfold.formats import Basis, Elite, Spec
from kvfold.hf.rope import find_ropes
from kvfold.methods.elitekv import EliteFrame, EliteKV, turning
from kvfold.rotation import Still
from models import build, dynamic, feed, follow, grow, reference, subject, tokens

STEPS = torch.arange(5, 17).view(2, 6)
H, D, PAIRS = 2, 16, 8


def flags(pairs: int, layers: int = 3, seed: int = 0) -> Tensor:
    """Elite pairs (i, i + D / 2) of each head, drawn by chance."""
    rng = torch.Generator().manual_seed(seed)
    made = torch.zeros(layers, H, D, dtype=torch.bool)
    for layer in range(layers):
        for head in range(H):
            first = torch.randperm(PAIRS, generator=rng)[:pairs]
            made[layer, head, first] = made[layer, head, first + PAIRS] = True
    return made


def measured(pairs: int, rank: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    rng, wide = torch.Generator().manual_seed(seed), H * (2 * D - 2 * pairs)
    whole = torch.linalg.qr(torch.randn(3, wide, wide, generator=rng, dtype=torch.float64))[0]
    return {"elite": flags(pairs, seed=seed), "basis": whole[..., : rank or wide].float().contiguous()}


@pytest.fixture
def made(tmp_path):
    """A cache whose pairs and directions are these."""

    def make(data: dict[str, Tensor], name: str = "llama", **options) -> kvfold.Cache:
        model, path = subject(name), tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        about = {"fingerprint": artefacts.fingerprint(model), "name": name}
        artefacts.save(Artefact("elitekv", about, data, {}), path)
        return kvfold.Cache(model, EliteKV(calibration=str(path), **options))

    return make


def partly(elite: Tensor):
    """transformers' rotation, written anew, for the layers one after another: elite channels turn, others do not."""
    calls = iter(range(1 << 30))

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        mine = elite[next(calls) % len(elite)]
        found = []
        for x in (q, k):
            swapped = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
            turned = x * cos[:, None] + swapped * sin[:, None]
            keep = mine.repeat_interleave(x.shape[1] // H, 0)[None, :, None]
            found.append(torch.where(keep, turned, x))
        return found[0], found[1]

    return apply


def test_all_pairs_and_all_directions_are_the_full_cache(made):
    """Card, 1."""
    prompt = tokens(40, 29).values()
    got = follow(subject("llama"), made(measured(PAIRS)), *prompt, STEPS)
    assert_close(got, follow(reference("llama"), dynamic(reference("llama")), *prompt, STEPS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pairs", [1, 3])
def test_all_directions_are_the_model_without_rope_in_the_other_pairs(made, monkeypatch, pairs):
    """Card, 2: in a prompt, in what follows token by token, and in a further turn."""
    data, prompt, cache = measured(pairs), tokens(40, 29), made(measured(pairs))
    got = follow(subject("llama"), cache, *prompt.values(), STEPS)
    mask = grow(prompt["attention_mask"], 6)
    turn = feed(subject("llama"), cache, STEPS, torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], 1))
    find_ropes(subject("llama"))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", partly(data["elite"]))
    plain, theirs = reference("llama"), dynamic(reference("llama"))
    assert_close(got, follow(plain, theirs, *prompt.values(), STEPS), atol=2e-4, rtol=0)
    want = feed(plain, theirs, STEPS, torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], 1))
    assert_close(turn, want, atol=2e-4, rtol=0)


def test_a_step_reads_what_latents_give_back(made):
    """Card, 4: k = [k_rope, B_k z], v = B_v z, for each head, by a loop over the tokens of one layer."""
    data = measured(2, 20)
    cache, views, prompt = made(data), [], tokens(23, 23)
    feed(subject("llama"), cache, *prompt.values())
    plain = kvfold.Cache(subject("llama"), "full")
    with plain.observed(views.append):
        feed(subject("llama"), plain, *prompt.values())
    first, held, rope = views[0], cache.paged[0].segments[0][1].dense(), find_ropes(subject("llama"))[0]
    elite, basis = data["elite"][0], data["basis"][0].double()
    flat = rope.shift(first.keys, -first.positions)
    for row in range(2):
        for t in range(23):
            y = torch.cat([x for h in range(H) for x in (flat[row, h, t, ~elite[h]], first.values[row, h, t])]).double()
            z = torch.tensor([sum(float(y[n] * basis[n, c]) for n in range(len(y))) for c in range(20)]).double()
            back = (basis @ z).float().view(H, -1)
            for h in range(H):
                assert_close(held.keys[row, h, t, elite[h]], first.keys[row, h, t, elite[h]], atol=0, rtol=0)
                assert_close(held.keys[row, h, t, ~elite[h]], back[h, : D - 4], atol=1e-5, rtol=1e-5)
                assert_close(held.values[row, h, t], back[h, D - 4 :], atol=1e-5, rtol=1e-5)


def test_the_ratio_is_the_papers():
    """Card, 3: 12 pairs and 2048 numbers of 32 heads of 128 channels are 2816 of 8192 numbers."""
    elite = torch.zeros(32, 128, dtype=torch.bool)
    elite[:, :12] = elite[:, 64:76] = True
    found = Basis(elite, torch.zeros(32 * (128 - 24 + 128), 2048))
    spec = Spec(1, 32, 128, 128, torch.float16, torch.device("cpu"), artefact={"x": found})
    planes = Elite("x").planes(spec)
    assert planes["keys"].width + planes["latent"].width == 2816 == 0.34375 * 8192


def rotated(x: Tensor, angles: Tensor, pairs: set[int], t: int) -> Tensor:
    """(D,) with these pairs (i, i + D / 2) rotated for place t; a loop over numbers."""
    made, half = x.clone(), len(x) // 2
    for i in pairs:
        cos, sin = math.cos(t * angles[i]), math.sin(t * angles[i])
        made[i], made[i + half] = x[i] * cos - x[i + half] * sin, x[i] * sin + x[i + half] * cos
    return made


def brute(q: Tensor, k: Tensor, angles: Tensor, count: int) -> list[list[int]]:
    """RoPElite by its definition: whole score matrices for each candidate, heads of a group added up."""
    (heads, group, total, size), order = q.shape, []
    everything = set(range(size // 2))

    def logits(head: int, g: int, pairs: set[int]) -> Tensor:
        made = torch.zeros(total, total)
        for i in range(total):
            for j in range(i + 1):
                made[i, j] = rotated(q[head, g, i], angles, pairs, i) @ rotated(k[head, j], angles, pairs, j)
        return made

    for head in range(heads):
        chosen: list[int] = []
        truth = [logits(head, g, everything) for g in range(group)]
        for _ in range(count):
            off = {
                i: sum(float((logits(head, g, {*chosen, i}) - truth[g]).abs().mean()) for g in range(group))
                for i in everything - set(chosen)
            }
            chosen.append(min(off, key=lambda i: (round(off[i], 9), i)))
        order.append(chosen)
    return order


def changes(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
    """(H, G, P, T, T): what a logit changes by where one pair is not rotated."""
    (heads, group, total, _), half = q.shape, q.shape[-1] // 2
    made = torch.zeros(heads, group, half, total, total)
    for h in range(heads):
        for g in range(group):
            for i in range(total):
                for j in range(i + 1):
                    for p in range(half):
                        own = torch.tensor([p, p + half])
                        a, b = rotated(q[h, g, i], angles, {p}, i)[own], rotated(k[h, j], angles, {p}, j)[own]
                        made[h, g, p, i, j] = q[h, g, i, own] @ k[h, j, own] - a @ b
    return made


def test_the_search_is_the_greedy_one_of_the_paper():
    rng = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 7, 10, generator=rng), torch.randn(2, 7, 10, generator=rng)
    angles = 10.0 ** (-torch.arange(5) / 2)
    assert elite_order([changes(q, k, angles)], 4).tolist() == brute(q, k, angles, 4)
    assert elite_order([changes(q, k, angles)] * 3, 4).tolist() == brute(q, k, angles, 4)  # the same texts again


def test_a_head_that_speaks_in_one_pair_keeps_that():
    """Card, 4: with that pair nothing is off, and all others are alike."""
    rng = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, 6, 16), torch.zeros(1, 6, 16)
    q[..., 5], q[..., 13] = torch.randn(2, 1, 1, 6, generator=rng)
    k[..., 5], k[..., 13] = torch.randn(2, 1, 6, generator=rng)
    found = changes(q, k, 10.0 ** (-torch.arange(8) / 4))
    assert elite_order([found], 3).tolist() == [[5, 0, 1]] and not found[:, :, 5].eq(0).all()


def test_directions_are_those_of_a_plain_svd():
    """J-LRD: W P P' is the nearest matrix of that rank to W = [W_k, W_v]."""
    weights = torch.randn(30, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(weights, full_matrices=False)
    for rank in (1, 5, 14):
        basis = joint_basis(weights.mT @ weights, rank).double()
        assert basis.shape == (14, rank)
        assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-6, rtol=0)
        assert_close(weights @ basis @ basis.mT, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5, rtol=0)
    assert_close((weights @ joint_basis(weights.mT @ weights, 14).double()).norm(dim=0), s, atol=1e-5, rtol=0)


def test_the_rest_is_each_heads_keys_then_its_values():
    elite = torch.tensor([[True, False, True, False], [False, True, False, True]])
    assert rest_of(elite, 3).tolist() == [1, 3, 8, 9, 10, 4, 6, 11, 12, 13]


def test_logits_know_distances_alone():
    """Card, 6: shifting all positions changes nothing."""
    model = subject("llama")
    find, path = find_ropes(model)[0], artefacts.locate("elitekv", model)[0]
    frame = EliteFrame(path, None)
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 9, D, generator=rng), torch.randn(1, H, 9, D, generator=rng)
    places = torch.arange(9, dtype=torch.int32)[None]
    found = []
    for start in (0, 100):
        at = places + start
        asked, held = (frame.enter(find.shift(x, at[:, None].expand(x.shape[:3])), at, 0, find) for x in (q, k))
        found.append(asked @ held.repeat_interleave(2, 1).mT)
    assert_close(found[0], found[1], atol=1e-4, rtol=0)
    rest = ~frame.layers[0].elite
    assert_close(held[0][rest[:, None].expand(H, 9, D)], k[0][rest[:, None].expand(H, 9, D)], atol=1e-5, rtol=0)


def test_pairs_are_measured():
    assert turning(find_ropes(subject("llama"))[0], D).tolist() == [[i, i + 8] for i in range(8)]
    assert turning(find_ropes(subject("phi3"))[0], D).tolist() == [[i, i + 4] for i in range(4)]
    assert turning(Still(), D).shape == (0, 2)


def test_a_lower_rank_is_the_first_directions(made):
    data = measured(2, 30)
    short = {**data, "basis": data["basis"][..., :12].contiguous()}
    prompt = tokens(30, 21).values()
    got = [follow(subject("llama"), cache, *prompt, STEPS) for cache in (made(data, rank=12), made(short))]
    assert torch.equal(got[0], got[1])
    assert made(data, rank=12).method.format == made(short).method.format != made(data).method.format
    numbers = made(data, rank=12).method.own_frame.layers[0]
    assert numbers.rank == 12 and numbers.fits(H, D, D)


def test_damaged_and_foreign_calibrations_are_refused(made, tmp_path):
    data = measured(2, 30)
    basis, elite = data["basis"], data["elite"].clone()
    elite[1, 0, elite[1, 0].nonzero()[0]] = False
    split = data["elite"].clone()
    split[0, 0] = torch.arange(D) < 4
    wrong = {
        "lacks 'basis'": {"elite": data["elite"]},
        "lacks 'elite'": {**data, "elite": data["elite"][0].contiguous()},
        "do not fit together": {**data, "elite": elite},
        "parts that do not fit": {**data, "basis": basis[:2].contiguous()},
        "not orthonormal": {**data, "basis": basis * 1.1},
        "rank=31 of elitekv must be at most 30": data,
    }
    for message, damaged in wrong.items():
        with pytest.raises(ValueError, match=message):
            made(damaged, rank=31 if "rank" in message else None)
    with pytest.raises(ValueError, match="does not rotate in pairs"):
        made({**data, "elite": split})
    path = tmp_path / "cut.safetensors"
    good = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a calibration file"):
        kvfold.Cache(subject("llama"), EliteKV(calibration=str(path)))
    made(data)
    last = max(tmp_path.glob("[0-9]*.safetensors"), key=lambda each: int(each.stem))
    with pytest.raises(ValueError, match="was made on 'llama'"):
        kvfold.Cache(subject("qwen3"), EliteKV(calibration=str(last)))
    with pytest.raises(ValueError, match="rank=0"):
        EliteKV(rank=0)


def test_a_layer_whose_rotation_nobody_knows_is_refused():
    model = build("gpt2")
    with pytest.raises(ValueError, match="what rotates the keys of each layer, which is not known"):
        kvfold.Cache(model, "elitekv")


def test_what_drops_tokens_of_single_heads_is_refused_when_it_is_composed():
    for before in ("snapkv(budget=0.5)", "streamingllm", "attention-gate", "cake", "kvzip", "think"):
        with pytest.raises(ValueError, match=r"which holds those of all heads together: .* can't stand before it"):
            kvfold.parse(f"{before} | elitekv")
    with pytest.raises(ValueError, match="two stages with a format"):
        kvfold.parse("elitekv | kivi")
    model = subject("llama")
    cache = kvfold.Cache(model, "jrt-prompt | elitekv")
    assert follow(model, cache, *tokens(30, 30).values(), STEPS).isfinite().all()


def test_rows_of_other_methods_stand_beside_it():
    """A batch whose rows have different methods: each row gets what it gets alone."""
    model, prompt = subject("llama"), tokens(30, 21)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    alone = []
    batch = kvfold.Cache(model, "elitekv")
    for row, method in enumerate(("elitekv", "full")):
        start = int((mask[row] == 0).sum())
        own = [x[row : row + 1, start:] for x in (ids, mask)]
        alone.append(follow(model, kvfold.Cache(model, method), *own, STEPS[row : row + 1])[:, 1:])
        other = kvfold.Cache(model, method)
        feed(model, other, *own)
        batch.join(other)
    found = []
    for step in STEPS.T:
        mask = grow(mask)
        found.append(feed(model, batch, step[:, None], mask))
    assert_close(torch.cat(found, 1), torch.cat(alone), atol=1e-4, rtol=0)
