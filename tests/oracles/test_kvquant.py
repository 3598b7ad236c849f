"""KVQuant against a loop over numbers, its rotation, what stays exact, and k-means that weighs."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kvfold
from kvfold import artefacts
from kvfold.calibration.levels import SINKS, fitted, layer_levels, quantile, still, weighted_means
from kvfold.formats import LEVELS, POSITION, Chunk, Levels, Spec, Uneven
from kvfold.formats.uneven import UnevenSegment
from kvfold.hf.rope import find_ropes
from kvfold.methods.kvquant import KVQuant
from models import build, feed, follow, grow, subject, tokens

STEPS = torch.arange(5, 25).view(2, 10)
D, T = 16, 40


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_levels(bits: int, heads: int = 1, seed: int = 1) -> Levels:
    """Uneven ones, of channels that differ, and a fit that changes something."""
    rng = torch.Generator().manual_seed(seed)
    low = -1.0 - 2 * torch.rand(heads, D, generator=rng)
    high = 1.0 + torch.rand(heads, D, generator=rng)
    keys, values = (2 * torch.rand(heads, 1 << bits, generator=rng).sort(-1).values - 1 for _ in range(2))
    fits = (torch.tensor([scale, shift]).expand(heads, 2) for scale, shift in ((1.1, 0.02), (0.9, -0.01)))
    return Levels(low, high, keys, next(fits), values, next(fits))


def stored(
    keys: Tensor, values: Tensor, form: Uneven, told: Levels | None, rope=None, start: int = 0, dtype=torch.float32
) -> UnevenSegment:
    """Keys and values (T, D) of one head, at positions from `start` on."""
    segment = form.open(Spec(1, 1, D, values.shape[1], dtype, keys.device, rope=rope))
    if told is not None:
        segment.hear({LEVELS: told.flat()[None]}, torch.ones(1, 1, dtype=torch.bool))
    write(segment, keys, values, start)
    return segment


def write(segment: UnevenSegment, keys: Tensor, values: Tensor, start: int = 0) -> None:
    at = torch.arange(start, start + len(keys), dtype=torch.int32).view(1, 1, -1)
    segment.append(Chunk(keys[None, None], values[None, None], torch.ones_like(at, dtype=torch.bool), {POSITION: at}))


def turned(rope, states: Tensor, sign: int = 1, start: int = 0) -> Tensor:
    """Keys (T, D) rotated for their positions."""
    at = sign * torch.arange(start, start + len(states), dtype=torch.int32)
    return rope.shift(states[None, None].float(), at.view(1, 1, -1))[0, 0]


def near(x: float, levels: list[float]) -> int:
    return min(range(len(levels)), key=lambda i: (abs(x - levels[i]), i))


def key_by_loop(x: Tensor, told: Levels, exact: int) -> Tensor:
    """A key before RoPE, number by number."""
    low, high, levels = told.low[0].double(), told.high[0].double(), told.keys[0].double().tolist()
    centre, reach = (low + high) / 2, (high - low) / 2
    out = [abs(float((x[c].double() - centre[c]) / reach[c])) for c in range(D)]
    whole = sorted(range(D), key=lambda c: (-out[c], c))[:exact]
    found = []
    for c in range(D):
        level = levels[near(float((x[c].double() - centre[c]) / reach[c]), levels)]
        level = level * float(told.key_fit[0, 0]) + float(told.key_fit[0, 1])
        found.append(float(x[c]) if c in whole else float(centre[c] + reach[c] * level))
    return torch.tensor(found, dtype=torch.float32)


def value_by_loop(x: Tensor, told: Levels, exact: int) -> Tensor:
    ordered = sorted(x.tolist())
    median = ordered[(len(x) - 1) // 2]
    whole = sorted(range(len(x)), key=lambda c: (-abs(float(x[c]) - median), c))[:exact]
    rest = [float(x[c]) for c in range(len(x)) if c not in whole]
    centre, reach = (min(rest) + max(rest)) / 2, (max(rest) - min(rest)) / 2
    levels, found = told.values[0].double().tolist(), []
    for c in range(len(x)):
        level = levels[near((float(x[c]) - centre) / (reach or 1.0), levels)]
        level = level * float(told.value_fit[0, 0]) + float(told.value_fit[0, 1])
        found.append(float(x[c]) if c in whole else centre + reach * level)
    return torch.tensor(found, dtype=torch.float32)


# -- what a token is held as -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("exact", [1, 3])
def test_a_token_against_a_loop(bits, exact):
    told, keys, values = some_levels(bits), 1.5 * numbers(T, D), numbers(T, 8, seed=2)
    found = stored(keys, values, Uneven(bits, exact), told).dense()
    assert_close(found.keys[0, 0], torch.stack([key_by_loop(key, told, exact) for key in keys]), atol=1e-5, rtol=0)
    want = torch.stack([value_by_loop(value, told, exact) for value in values])
    assert_close(found.values[0, 0], want, atol=1e-5, rtol=0)


def test_points_of_the_grid_are_exact_and_others_off_by_half_a_gap():
    """Oracle 1."""
    told = some_levels(3)
    told = Levels(told.low, told.high, told.keys, torch.tensor([[1.0, 0.0]]), told.values, told.value_fit)
    which = torch.randint(0, 8, (T, D), generator=torch.Generator().manual_seed(3))
    points = told.centre + told.reach * told.keys[0][which]
    assert_close(stored(points, points, Uneven(3), told).dense().keys[0, 0], points, atol=1e-6, rtol=1e-6)
    inside = told.low + (told.high - told.low) * torch.rand(T, D, generator=torch.Generator().manual_seed(4))
    error = (stored(inside, inside, Uneven(3), told).dense().keys[0, 0] - inside).abs() / told.reach
    ends = torch.cat([torch.tensor([-1.0]), told.keys[0], torch.tensor([1.0])])
    gaps = torch.cat([(ends[1] - ends[0]).view(1), (told.keys[0].diff() / 2), (ends[-1] - ends[-2]).view(1)])
    assert bool((error <= gaps.max() + 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_stands_out_is_held_to_the_last_bit(dtype):
    """Oracle 2: the numbers outside, and all of them where all may stay."""
    keys, values = numbers(T, D).to(dtype), numbers(T, D, seed=2).to(dtype)
    places = torch.arange(T) * 5 % D
    for states in (keys, values):
        states[torch.arange(T), places] = (100 * numbers(T, seed=5)).to(dtype)
    found = stored(keys, values, Uneven(2, 1), some_levels(2), dtype=dtype).dense()
    for states, held in ((keys, found.keys), (values, found.values)):
        out = states[torch.arange(T), places].abs() > 20
        assert torch.equal(held[0, 0][torch.arange(T), places][out], states[torch.arange(T), places][out])
        assert not torch.equal(held[0, 0], states)
    everything = stored(keys, values, Uneven(2, D), some_levels(2), dtype=dtype).dense()
    assert torch.equal(everything.keys[0, 0], keys) and torch.equal(everything.values[0, 0], values)
    with pytest.raises(ValueError, match="exact=17 must be at most the key size 16"):
        Uneven(2, 17).open(Spec(1, 1, D, D, dtype, keys.device))


def test_an_offset_of_a_channel_costs_nothing():
    """Oracle 3."""
    keys, errors = numbers(400, D), []
    for offset in (0.0, 100.0):
        moved = keys.clone()
        moved[:, 3] += offset
        tables = layer_levels(moved[None], torch.ones(1, *keys.shape), moved[None], torch.ones(1, *keys.shape))
        told = told_by(tables, 4)
        errors.append((stored(moved, moved, Uneven(4), told).dense().keys[0, 0] - moved).square().mean(0))
    assert_close(errors[1], errors[0], atol=1e-5, rtol=1e-3)


def told_by(tables: dict[str, Tensor], bits: int) -> Levels:
    return KVQuant(bits=bits).measured({name: table[None] for name, table in tables.items()}, 0)


def test_a_value_of_zeros_and_a_spike():
    """Oracle 7: the spike stands apart, and the rest has a range of 0."""
    value = torch.zeros(1, D)
    value[0, -1] = 1000.0
    segment = stored(numbers(1, D), value, Uneven(3), some_levels(3))
    assert torch.equal(segment.dense().values[0, 0], value)
    flat = torch.full((1, D), 7.0)
    assert torch.equal(stored(flat, flat, Uneven(3), some_levels(3)).dense().values[0, 0], flat)


# -- before RoPE -----------------------------------------------------------------------------------------------


def test_keys_are_coded_at_position_0_and_read_at_their_own():
    """Oracle 4: what is read is the rotation of what was coded before RoPE."""
    rope, told, before = find_ropes(subject("llama"))[0], some_levels(3), numbers(T, D)
    segment = stored(turned(rope, before, start=900), numbers(T, D, seed=2), Uneven(3, 2), told, rope, start=900)
    coded = stored(before, numbers(T, D, seed=2), Uneven(3, 2), told)
    want = turned(rope, coded.dense().keys[0, 0], start=900)
    assert_close(segment.dense().keys[0, 0], want, atol=2e-3, rtol=0)  # of a number between two levels
    apart = (segment.dense().keys[0, 0] - want).abs().amax(-1) > 1e-4
    assert apart.float().mean() < 0.1
    q = numbers(1, 1, 2, 1, D, seed=6)
    weights = torch.softmax(torch.einsum("gd,td->gt", q[0, 0, :, 0], segment.dense().keys[0, 0]) * 0.3, -1)
    out = segment.attend(q, 0.3)[0][0, 0, :, 0]
    assert_close(out, weights @ segment.dense().values[0, 0], atol=1e-5, rtol=1e-5)


def test_a_channel_that_stands_out_costs_more_behind_rope():
    """Oracle 4: rotation spreads it over both channels of its pair."""
    rope, before = find_ropes(subject("llama"))[0], numbers(600, D)
    before[:, 1] += 30.0
    keys, errors = turned(rope, before), []
    for frame, states in ((rope, before), (None, keys)):
        ones = torch.ones(1, *keys.shape)
        told = told_by(layer_levels(states[None], ones, states[None], ones), 3)
        found = stored(keys, keys, Uneven(3), told, frame).dense().keys[0, 0]
        errors.append(float((found - keys).square().mean()))
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_gives_the_codes_of_one_shot(dtype):
    rope, told = find_ropes(subject("llama"))[0], some_levels(4)
    keys, values, states = numbers(50, D).to(dtype), numbers(50, D, seed=2).to(dtype), []
    for parts in ([50], [1] * 50, [7, 20, 1, 22]):
        segment = stored(keys[: parts[0]], values[: parts[0]], Uneven(4), told, rope, 3, dtype)
        for start, stop in itertools.pairwise(itertools.accumulate(parts)):
            write(segment, keys[start:stop], values[start:stop], 3 + start)
        states.append(segment.state())
    for said, planes in states[1:]:
        assert said == states[0][0]
        assert all(torch.equal(x.view(torch.uint8), states[0][1][n].view(torch.uint8)) for n, x in planes.items())


def test_a_key_that_is_amended_is_coded_at_its_own_position():
    rope, told = find_ropes(subject("llama"))[0], some_levels(4)
    keys, other = numbers(T, D), numbers(T, D, seed=8)
    one = stored(keys, keys, Uneven(4), told, rope, 500)
    one.amend(torch.tensor([[[7, -1]]]), other[None, None, 7:9], other[None, None, 7:9])
    keys[7] = other[7]
    want = stored(keys, keys, Uneven(4), told, rope, 500).dense()
    assert torch.equal(one.dense().keys, want.keys)


# -- levels ----------------------------------------------------------------------------------------------------


def kmeans(x: Tensor, weights: Tensor, bits: int) -> float:
    """The least weighted squared error of any levels: the best cuts of the ordered numbers, tried one by one."""
    order = x.argsort()
    x, w = x[order].double(), weights[order].double()
    sums = [torch.cat([torch.zeros(1, dtype=torch.float64), y.cumsum(0)]) for y in (w, w * x, w * x * x)]

    def cost(i: int, j: int) -> float:
        mass, first, second = (float(s[j] - s[i]) for s in sums)
        return second - first**2 / mass if mass > 0 else 0.0

    best = [cost(0, j) for j in range(len(x) + 1)]
    for _ in range((1 << bits) - 1):
        best = [min(best[i] + cost(i, j) for i in range(j + 1)) for j in range(len(x) + 1)]
    return best[-1]


@pytest.mark.parametrize("seed", range(3))
def test_levels_are_near_the_best_of_k_means(seed):
    x = (0.35 * numbers(120, seed=seed)).clamp(-1, 1)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(seed)) ** 3
    levels = weighted_means(x, weights, 2)
    error = float((weights * (x[:, None] - levels).square().amin(-1)).sum())
    assert error <= 1.25 * kmeans(x, weights, 2) + 1e-4 and bool((levels.diff() > 0).all())


def test_weights_pull_levels_and_none_are_all_the_same():
    """Oracle 5."""
    x = torch.cat([torch.full((100,), -0.8), torch.linspace(0.1, 0.9, 100)])
    even = weighted_means(x, torch.ones(200), 2)
    assert torch.equal(even, weighted_means(x, torch.zeros(200), 2))
    assert even[0] == pytest.approx(-0.8) and even[1] > 0.1
    heavy = torch.ones(200)
    heavy[100:125] = 1e6
    pulled = weighted_means(x, heavy, 2)
    assert ((even > 0.1) & (even < 0.32)).sum() == 1 and ((pulled > 0.1) & (pulled < 0.32)).sum() >= 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_q_norm_gives_back_mean_and_spread(bits):
    """Oracle 6."""
    x, weights = (0.3 * numbers(5000) + 0.1).clamp(-1, 1), numbers(5000, seed=2).square()
    made = fitted(x, weights, bits)
    levels, gain, shift = made[:-2], made[-2], made[-1]
    coded = levels[(x[:, None] - levels).abs().argmin(-1)] * gain + shift
    assert_close(coded.mean(), x.mean(), atol=1e-4, rtol=0)
    assert_close(coded.std(), x.std(), atol=1e-4, rtol=0)
    assert fitted(torch.full((9,), 0.25), torch.ones(9), bits)[-2:].tolist() == [1.0, 0.0]


def test_gradients_are_turned_back_as_keys_are():
    rope, wanted = find_ropes(subject("llama"))[0], numbers(T, D, seed=9)
    before = numbers(T, D).requires_grad_()
    keys = turned(rope, before)
    loss = (keys * wanted).sin().sum()
    of_keys, of_before = torch.autograd.grad(loss, [keys, before])
    assert_close(still(of_keys[None, None], rope)[0], of_before[SINKS:], atol=1e-5, rtol=0)
    assert torch.equal(still(of_keys[None, None], None)[0], of_keys[SINKS:])


def test_ranges_leave_one_per_cent_outside():
    keys = numbers(2, 1000, D).cumsum(0)
    ones = torch.ones_like(keys)
    made = layer_levels(keys, ones, keys, ones)
    outside = (keys < made["low"][:, None]) | (keys > made["high"][:, None])
    assert outside.sum(1).float().mean() == pytest.approx(10, abs=0.5)
    assert_close(quantile(keys[1], 0.3), torch.quantile(keys[1], 0.3, dim=0))
    assert set(made) == {"low", "high", *(f"{name}.{bits}" for name in ("keys", "values") for bits in (2, 3, 4))}


# -- the method ------------------------------------------------------------------------------------------------


def places(cache, layer: int = 0) -> dict[str, list[list[list[int]]]]:
    """Text positions of the tokens of each segment, by row and head."""
    found = {}
    for form, segment in cache.paged[layer].segments:
        chunk = segment.dense()
        found[type(form).__name__] = [
            [sorted(chunk.positions[b, h][chunk.valid[b, h]].tolist()) for h in range(chunk.valid.shape[1])]
            for b in range(len(chunk.valid))
        ]
    return found


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_sinks_stay_as_they_are_and_all_others_are_coded(sinks):
    model, prompt = subject("llama"), tokens(30, 21)
    cache = kvfold.Cache(model, f"kvquant(sinks={sinks})")
    follow(model, cache, *prompt.values(), STEPS[:, :3])
    for layer in range(3):
        found = places(cache, layer)
        assert found["Dense"] == [[list(range(sinks))] * 2] * 2
        assert found["Uneven"] == [[list(range(sinks, 33))] * 2, [list(range(sinks, 24))] * 2]
    plain = kvfold.Cache(model, "full")
    follow(model, plain, *prompt.values(), STEPS[:, :3])
    if sinks:
        dense = next(segment for form, segment in cache.paged[0].segments if not isinstance(form, Uneven))
        found, held = dense.dense(), plain.paged[0].segments[0][1].dense()
        for b, h in itertools.product(range(2), range(2)):
            assert torch.equal(found.keys[b, h][found.valid[b, h]], held.keys[b, h, :sinks])


def test_levels_are_those_of_the_layer():
    model = build("llama")
    found = artefacts.find("kvquant", model)
    data = {name: table.clone() for name, table in found.data.items()}
    data["low"][1, 1, 5], data["keys.4"][2, 3] = -9.0, -0.7
    path = artefacts.user_folder() / "other.safetensors"
    artefacts.save(artefacts.Artefact("kvquant", found.model, data, {}), path)
    cache = kvfold.Cache(model, "kvquant", calibration=str(path))
    feed(model, cache, *tokens(20, 12).values())
    path.unlink()
    known = [next(s for f, s in core.segments if isinstance(f, Uneven)).known for core in cache.paged]
    assert [float(x.low[0, 1, 5]) for x in known] == [-6.0, -9.0, -6.0]
    assert [round(float(x.keys[1, 0, 3]), 3) for x in known] == [-0.6, -0.6, -0.7]


def test_more_bits_and_more_exact_numbers_are_nearer_to_the_full_cache():
    model, prompt = subject("llama"), tokens(60, 41)
    truth = follow(model, kvfold.Cache(model, "full"), *prompt.values(), STEPS)
    options = ["bits=2", "bits=3", "bits=4", "bits=4, exact=4", "bits=4, exact=16"]
    errors = []
    for some in options:
        got = follow(model, kvfold.Cache(model, f"kvquant({some})"), *prompt.values(), STEPS)
        errors.append(float((got - truth).norm() / truth.norm()))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.5 and errors[-1] < 1e-4, errors


def test_q_norm_is_for_two_bits_unless_told():
    data = {"low": -torch.ones(1, 2, D), "high": torch.ones(1, 2, D)}
    for bits, name in itertools.product((2, 3, 4), ("keys", "values")):
        data[f"{name}.{bits}"] = torch.tensor([[*torch.linspace(-1, 1, 1 << bits).tolist(), 1.5, 0.25]])
    fits = [KVQuant(bits=bits).measured(data, 0).key_fit[0].tolist() for bits in (2, 3, 4)]
    assert fits == [[1.5, 0.25], [1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="exact=17 must be at most the key size 16"):
        KVQuant(exact=17).measured(data, 0)
    assert KVQuant(bits=4, norm=True).measured(data, 0).value_fit[1].tolist() == [1.5, 0.25]
    assert KVQuant(bits=2, norm=False).measured(data, 0).value_fit[1].tolist() == [1.0, 0.0]
    for name, wrong in (
        ("low", data["low"][:0]), ("keys.4", data["keys.4"].flip(-1)), ("values.4", data["values.4"][:, 1:]),
        ("high", data["high"] * torch.nan), ("high", data["low"] - 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the calibration of kvquant"):
            KVQuant().measured({**data, name: wrong}, 0)


@pytest.mark.usefixtures("unchecked")
def test_without_a_calibration_it_is_refused(monkeypatch, tmp_path):
    model = build("llama")
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    with pytest.raises(ValueError, match="kvfold calibrate kvquant --model"):
        kvfold.Cache(model, "kvquant")
    for options, name in (({"bits": 8}, "bits=8"), ({"exact": 0}, "exact=0"), ({"sinks": -1}, "sinks=-1")):
        with pytest.raises(ValueError, match=name):
            kvfold.parse("kvquant", **options)
    with pytest.raises(ValueError, match="norm='yes'"):
        kvfold.parse("kvquant", norm="yes")


@pytest.mark.parametrize("other", ["snapkv(budget=0.5)", "h2o(budget=0.5)", "tova(budget=12)"])
def test_it_says_how_the_rest_is_held(other):
    model, prompt = subject("llama"), tokens(40, 31)
    cache, plain = kvfold.Cache(model, f"{other} | kvquant"), kvfold.Cache(model, other)
    for each in (cache, plain):
        feed(model, each, *prompt.values())
    assert cache.kept(0) == plain.kept(0)
    for step in range(4):
        feed(model, cache, STEPS[:, step : step + 1], grow(prompt["attention_mask"], step + 1))
    coded = places(cache)["Uneven"]
    assert all(head and min(head) >= 1 for row in coded for head in row)
