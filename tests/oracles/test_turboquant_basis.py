"""TurboQuant in a measured basis, against its definition: A of the moments, R A k coded, R A^{-T} q asking."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kvfold
from kvfold import artefacts
from kvfold.artefacts import Artefact
from kvfold.bench.devices import Device
from kvfold.bench.plan import make_plan, shape_of
from kvfold.calibration.moments import balance, diagonal
from kvfold.formats import POSITION, Chunk, Rotated, Spec, format_from, format_to
from kvfold.formats.gaussian import Rotation, lloyd_max
from kvfold.formats.key_basis import KeyBasis
from kvfold.formats.rotated import RotatedSegment
from kvfold.formats.sizes import segment_bytes
from kvfold.methods.turboquant import KeyBases, TurboQuant, key_bases
from kvfold.ops import dispatch
from models import build, feed, follow, grow, subject, tokens

H, G, D, LAYERS = 2, 3, 16, 3
STEPS = torch.arange(5, 17).view(2, 6)


def bases(heads: int = H, size: int = D, seed: int = 0, layers: int = LAYERS) -> list[KeyBasis]:
    """A basis of each layer."""
    return key_bases(drawn_bases(heads, size, seed, layers))


def drawn_bases(heads: int = H, size: int = D, seed: int = 0, layers: int = LAYERS) -> dict[str, Tensor]:
    """What a calibration holds."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(layers, heads, size, size, generator=rng, dtype=torch.float64))[0]
    weight = torch.logspace(-1, 1, size, base=3.0).expand(layers, heads, -1)
    return {"turn": turn.float().contiguous(), "weight": weight.contiguous(), "channels": weight.flip(-1).contiguous()}


def matrix(basis: KeyBasis) -> Tensor:
    """W V', float64."""
    weight = basis.weight.double()
    return torch.diag_embed(weight) if basis.turn is None else weight[..., None] * basis.turn.double().mT


def opened(
    keys: Tensor, values: Tensor, form: Rotated, basis: KeyBasis | None = None, layer: int = 0
) -> RotatedSegment:
    """Keys and values (B, H, T, D)."""
    b, h, t, d = keys.shape
    spec = Spec(b, h, d, d, keys.dtype, keys.device, layer=layer, artefact={} if basis is None else {"known": basis})
    segment = form.open(spec)
    at = torch.arange(t, dtype=torch.int32).expand(b, h, t)
    segment.append(Chunk(keys, values, torch.ones(b, h, t, dtype=torch.bool), {POSITION: at}))
    return segment


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loop(key: Tensor, basis: Tensor, turn: Tensor, form: Rotated) -> Tensor:
    """What is held of a key, number by number, in the frame of its codes; float64."""
    y = [sum(float(basis[i, j]) * float(key[j]) for j in range(D)) for i in range(D)]
    length = sum(n * n for n in y) ** 0.5
    y = [sum(float(turn[i, j]) * y[j] for j in range(D)) for i in range(D)]
    unit = length / D**0.5
    near = [min(lloyd_max(form.key_bits), key=lambda level: abs(level - n / unit)) for n in y]
    share = {
        "norm": 1.0, "unit": (D / sum(n * n for n in near)) ** 0.5,
        "aligned": D / sum(n * m for n, m in zip((n / unit for n in y), near, strict=True)),
    }  # fmt: skip
    return torch.tensor([unit * share[form.scale] * n for n in near], dtype=torch.float64)


@pytest.mark.parametrize("kernels", ["cpu", "naive"])
@pytest.mark.parametrize("scale", ["norm", "unit", "aligned"])
@pytest.mark.parametrize("bits", [(4, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("channels", [False, True])
def test_attention_is_its_definition(kernels, scale, bits, channels):
    keys, values, q = drawn(2, H, 11, D), drawn(2, H, 11, D, seed=2), drawn(2, H, G, 4, D, seed=3)
    form, basis = Rotated(*bits, scale, key="known"), key_bases(drawn_bases(), channels)[1]
    segment = opened(keys, values, form, basis, layer=5)
    if kernels == "cpu" and "cpu" not in dispatch.versions("attend_tokens"):
        pytest.skip("no compiled kernels")
    with dispatch.use(kernels):
        out, lse, _ = segment.attend(q, 0.3)
    turn = Rotation(42, 5, D).matrix(keys.device, torch.float64)
    held = segment.dense().values.double()
    for b, h in np.ndindex(2, H):
        codes = torch.stack([by_loop(key, matrix(basis)[h], turn, form) for key in keys[b, h]])
        inverse = torch.linalg.inv(matrix(basis)[h])
        asked = q[b, h].double() @ inverse @ turn.T  # R A^{-T} q
        logits = 0.3 * asked @ codes.T
        assert_close(lse[b, h].double(), logits.logsumexp(-1), atol=2e-5, rtol=1e-5)
        assert_close(out[b, h].double(), logits.softmax(-1) @ held[b, h], atol=2e-5, rtol=1e-5)
        assert_close(segment.dense().keys[b, h].double(), codes @ turn @ inverse.T, atol=1e-4, rtol=1e-4)


def test_a_basis_that_changes_nothing_is_the_random_one():
    keys, values, q = drawn(2, H, 30, D), drawn(2, H, 30, D, seed=2), drawn(2, H, G, 1, D, seed=3)
    plain = opened(keys, values, Rotated())
    still = KeyBasis(torch.eye(D).expand(H, -1, -1), torch.ones(H, D))
    mine = opened(keys, values, Rotated(key="known"), still)
    assert all(torch.equal(mine.plane(name), plain.plane(name)) for name in ("keys", "values", "value_scale"))
    assert_close(mine.plane("key_scale"), plain.plane("key_scale"), atol=0, rtol=1e-6)
    assert_close(mine.attend(q, 0.3)[:2], plain.attend(q, 0.3)[:2], atol=1e-5, rtol=1e-5)
    assert plain.state()[0].keys() == {"counts"} and plain.basis is None


def moments(spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors (H, N, D) that lie mostly in some directions, and their second moments."""
    turn = torch.linalg.qr(drawn(H, D, D, seed=seed))[0]
    x = (drawn(H, 400, D, seed=seed + 1) * torch.logspace(0, -spread, D)) @ turn
    return x, (x.double().mT @ x.double()) / 400


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_logits_err_less_than_in_the_random_basis(bits):
    (keys, of_keys), (q, of_queries) = moments(1.5, 10), moments(1.5, 20)
    weight, turn = torch.linalg.eigh(balance(of_keys, of_queries))
    basis = KeyBasis(turn.half(), weight.float())
    truth, errors = torch.einsum("hqd,htd->hqt", q, keys), []
    for form in (Rotated(bits, bits), Rotated(bits, bits, key="known")):
        found = opened(keys[None], keys[None], form, basis).dense().keys[0]
        errors.append(float((torch.einsum("hqd,htd->hqt", q, found) - truth).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_no_other_matrix_does_better_by_the_formula():
    """The least tr(A S_k A') tr(A^{-T} S_q A^{-1}), which is ||S_k^{1/2} S_q^{1/2}||_* squared."""
    (_, of_keys), (_, of_queries) = moments(1.0, 30), moments(1.0, 40)

    def cost(a: Tensor) -> Tensor:
        inverse = torch.linalg.inv(a)
        left, right = a @ of_keys @ a.mT, inverse.mT @ of_queries @ inverse
        return left.diagonal(dim1=-2, dim2=-1).sum(-1) * right.diagonal(dim1=-2, dim2=-1).sum(-1)

    made = balance(of_keys, of_queries)
    assert_close(made, made.mT, atol=1e-10, rtol=0)
    assert_close(made.diagonal(dim1=-2, dim2=-1).mean(-1), torch.ones(H, dtype=torch.float64))
    roots = [torch.linalg.cholesky(x) for x in (of_keys, of_queries)]
    least = torch.linalg.svdvals(roots[0].mT @ roots[1]).sum(-1).square()
    assert_close(cost(made), least, atol=0, rtol=1e-4)
    for seed in range(5):
        other = made + 0.05 * drawn(H, D, D, seed=seed).double()
        assert (cost(other) > cost(made)).all()


@pytest.mark.parametrize("dead", ["keys", "queries", "both", "all"])
def test_directions_that_never_vary_have_an_inverse(dead):
    (_, of_keys), (_, of_queries) = moments(1.0, 50), moments(1.0, 60)
    for name, each in (("keys", of_keys), ("queries", of_queries)):
        if dead in (name, "both"):
            each[:, 3], each[:, :, 3] = 0.0, 0.0
        if dead == "all":
            each.zero_()
    made = balance(of_keys, of_queries)
    assert made.isfinite().all() and (torch.linalg.cond(made) < 4e3).all()


@pytest.mark.parametrize("bits", [(4, 4), (4, 2)], ids=str)
def test_what_is_not_finite_spoils_itself_alone_and_zeros_stay(bits):
    x = torch.ones(1, H, 5, D)
    x[:, :, 1], x[0, 0, 2, 3], x[0, 1, 3, 5] = 0.0, torch.inf, torch.nan
    found = opened(x, x, Rotated(*bits, key="known"), bases()[0]).dense().keys[0]
    assert found[:, 1].eq(0).all() and found[0, 2].isnan().all() and found[1, 3].isnan().all()
    assert found[:, [0, 4]].isfinite().all() and found[0, 3].isfinite().all() and found[1, 2].isfinite().all()


def test_a_state_knows_its_basis_and_a_segment_that_has_another_is_refused(unchecked):
    keys, form = drawn(2, H, 9, D), Rotated(key="known")
    one, other = (opened(keys, keys, form, basis) for basis in (bases()[0], bases(seed=1)[0]))
    spec = Spec(2, H, D, D, keys.dtype, keys.device, artefact={"known": bases()[0]})
    said, tensors = one.state()
    assert torch.equal(form.restore(spec, said, tensors).dense().keys, one.dense().keys)
    plain, names = opened(keys, keys, Rotated()).state()
    assert format_from(format_to(form)) == form != Rotated() and tensors.keys() == names.keys()
    for damaged in (other.state()[0], plain):
        with pytest.raises(ValueError, match=r"basis=.* of keys, where what was measured is [0-9a-f]{16}"):
            form.check(spec, damaged, tensors)
    with pytest.raises(ValueError, match=r"basis=.* of keys, where what was measured is None"):
        Rotated().check(spec, said, tensors)
    with pytest.raises(ValueError, match="has keys in another basis: 'known' was measured anew"):
        one.join(other)
    for wrong in ({}, {"known": None}, {"other": bases()[0]}):
        with pytest.raises(ValueError, match="key='known' of a rotated format is not what was measured"):
            form.open(Spec(2, H, D, D, keys.dtype, keys.device, artefact=wrong))
    with pytest.raises(ValueError, match=r"basis=\(1, 16\) of keys does not fit layer 0: it must be \(2, 16\)"):
        form.open(Spec(2, H, D, D, keys.dtype, keys.device, artefact={"known": bases(1)[0]}))


def test_no_other_weights_of_channels_do_better():
    (_, of_keys), (_, of_queries) = moments(1.0, 70), moments(1.0, 80)
    k, q = (x.diagonal(dim1=-2, dim2=-1) for x in (of_keys, of_queries))

    def cost(a: Tensor) -> Tensor:
        return (a.square() * k).sum(-1) * (q / a.square()).sum(-1)

    made = diagonal(of_keys, of_queries)
    assert_close(cost(made), (k * q).sqrt().sum(-1).square(), atol=0, rtol=1e-9)
    for seed in range(5):
        assert (cost(made * (1 + 0.1 * drawn(H, D, seed=seed).double())) > cost(made)).all()


def test_weights_of_channels_take_next_to_nothing():
    spec = Spec(1, H, D, D, torch.float16, torch.device("cpu"))
    sizes = [segment_bytes(Rotated(key=key), spec, (100,) * H) for key in ("", "x#channels")]
    assert sizes[1] - sizes[0] == 4 * H * D


def test_sizes_need_no_matrices_and_count_them():
    found, cpu = ({}, {"known": bases()[0]}), torch.device("cpu")
    spec, known = (Spec(1, H, D, D, torch.float16, cpu, artefact=each) for each in found)
    sizes = [segment_bytes(form, at, (100,) * H) for form in (Rotated(), Rotated(key="known")) for at in (spec, known)]
    assert sizes == [sizes[0], sizes[0], *[sizes[0] + H * D * (2 * D + 4)] * 2]


# -- with a model ------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """A file of what was measured on the tiny llama."""

    def make(data: dict[str, Tensor] | None, name: str = "llama") -> str:
        model, path = subject(name), tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        about = {"fingerprint": artefacts.fingerprint(model), "name": name}
        data = {"other": torch.zeros(1)} if data is None else {k: x.contiguous() for k, x in data.items()}
        artefacts.save(Artefact("turboquant", about, data, {}), path)
        return str(path)

    return make


@pytest.mark.parametrize("basis", ["measured", "channels"])
def test_a_model_reads_on_drops_forks_saves_and_joins(made, tmp_path, basis):
    model, prompt, path = subject("llama"), tokens(60, 41), made(drawn_bases())
    text = f"turboquant(basis={basis!r}, scale='aligned', calibration={path!r})"
    truth = follow(model, kvfold.Cache(model, "full"), *prompt.values(), STEPS)
    cache = kvfold.Cache(model, text)
    got = follow(model, cache, *prompt.values(), STEPS)
    assert 0 < (got - truth).norm() < 0.85 * truth.norm()  # of 16 numbers a head, in bases that fit nothing
    cache.save(tmp_path / "c")
    again = kvfold.Cache.load(tmp_path / "c", model, allow=[path])
    mask = grow(prompt["attention_mask"], 7)
    both = [feed(model, each, STEPS[:, :1], mask) for each in (cache, again, cache.fork())]
    assert torch.equal(both[0], both[1])
    assert_close(both[2], both[0], atol=1e-5, rtol=1e-5)
    assert again.nbytes <= cache.nbytes and not again.method.own_prefill
    with pytest.raises(ValueError, match=r"turboquant has calibration=.* loaded, which a file can't ask for"):
        kvfold.Cache.load(tmp_path / "c", model)
    other = kvfold.Cache(model, "turboquant")  # rows of the random basis beside those of the measured one
    lone = tokens(13)
    feed(model, other, *lone.values())
    alone = feed(model, other.fork(), STEPS[:1, :1], grow(lone["attention_mask"]))
    cache.join(other)
    wide = torch.zeros(3, cache.get_seq_length() + 1, dtype=torch.long)
    wide[:2, :-1], wide[2, -14:], wide[:2, -1] = mask, 1, 1
    joined = feed(model, cache, torch.cat([STEPS[:, :1], STEPS[:1, :1]]), wide)
    assert_close(joined[2], alone[0], atol=1e-4, rtol=1e-4)


def test_rows_of_a_basis_that_was_measured_anew_are_refused_and_nothing_changes(made):
    """The file was written again between two caches: found out before a layer has taken rows."""
    model, path = subject("llama"), made(drawn_bases())
    text = f"decoding(snapkv, budget=24, interval=4) | turboquant(basis='measured', calibration={path!r})"
    caches = []
    for seed in (0, 1):
        data = {name: x.contiguous() for name, x in drawn_bases(seed=seed).items()}
        about = {"fingerprint": artefacts.fingerprint(model), "name": "llama"}
        artefacts.save(Artefact("turboquant", about, data, {}), Path(path))
        caches.append(kvfold.Cache(model, text))
        feed(model, caches[-1], *tokens(30).values())
    before = caches[0].row_nbytes().copy()
    with pytest.raises(ValueError, match=r"in another basis: .* was measured anew"):
        caches[0].join(caches[1])
    assert np.array_equal(caches[0].row_nbytes(), before)
    for cache in caches:
        feed(model, cache, STEPS[:1, :1], grow(tokens(30)["attention_mask"]))


@pytest.mark.parametrize(
    "text", ["h2o(budget=20) | {}", "kvfold(budget=0.25) | {}", "decoding(snapkv, budget=24, interval=4) | {}"]
)
def test_it_goes_behind_methods_that_drop(made, text):
    model, prompt = subject("llama"), tokens(60, 41)
    cache = kvfold.Cache(model, text.format(f"turboquant(basis='measured', calibration={made(drawn_bases())!r})"))
    follow(model, cache, *prompt.values(), STEPS)
    assert all(form.key for core in cache.paged for form, _ in core.segments)
    assert all((core.counts() <= 40).all() for core in cache.paged)


def test_a_limit_in_bytes_is_kept(made):
    model, prompt = subject("llama"), tokens(200)
    text = f"h2o | turboquant(basis='measured', calibration={made(drawn_bases())!r})"
    cache = kvfold.Cache(model, text, memory=60_000, context=240)
    follow(model, cache, *prompt.values(), STEPS[:1])
    assert 0.5 * 60_000 < cache.nbytes <= 60_000


def test_a_plan_sizes_what_nobody_has_measured():
    model = build("qwen3", head_dim=64, num_hidden_layers=2)
    heads, device = model.config.num_key_value_heads, Device("small", 10**9, 1e11, {"float32": 1e13})
    plans = [
        make_plan(shape_of(model), device, kvfold.parse(text), dtype="float32", context=500)
        for text in ("turboquant", "turboquant(basis='measured')", "snapkv(budget=0.5) | turboquant(basis='measured')")
    ]
    assert plans[1].kv_bytes - plans[0].kv_bytes == 2 * heads * 64 * (2 * 64 + 4)
    assert plans[2].kv_bytes < plans[1].kv_bytes


def test_what_was_not_measured_is_refused(made, unchecked, monkeypatch, tmp_path):
    model = subject("llama")
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"turboquant has no calibration for .*kvfold calibrate turboquant --model"):
        kvfold.Cache(model, "turboquant(basis='measured')")
    with pytest.raises(ValueError, match=r"turboquant needs its basis: .*kvfold calibrate turboquant"):
        KeyBases(None).of_layer(0, None)
    whole, broken, skew, flat = (drawn_bases() for _ in range(4))
    broken["turn"][1, 0, 0, 0], skew["turn"][0, 1, 2], flat["weight"][2, 1, 4] = torch.nan, 0.0, 0.0
    narrow, alone = {**whole, "turn": whole["turn"][..., :8]}, {"turn": whole["turn"]}
    for damaged in (None, alone, narrow, {**whole, "weight": whole["weight"][:1]}):
        with pytest.raises(ValueError, match="the calibration of turboquant must have a basis of each head"):
            kvfold.Cache(model, TurboQuant(basis="measured", calibration=made(damaged)))
    for damaged in (broken, skew, flat):
        with pytest.raises(ValueError, match="the calibration of turboquant has bases of keys that are not orthogonal"):
            kvfold.Cache(model, TurboQuant(basis="measured", calibration=made(damaged)))
    with pytest.raises(ValueError, match="the calibration of turboquant has 2 layers, not number 2"):
        kvfold.Cache(model, TurboQuant(basis="measured", calibration=made(drawn_bases(layers=2))))
    cache = kvfold.Cache(model, TurboQuant(basis="measured", calibration=made(drawn_bases(1))))
    with pytest.raises(ValueError, match="of keys does not fit layer 0"):
        feed(model, cache, *tokens(9).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "pca"}, "basis='pca' must"),
        ({"calibration": "x"}, "calibration='x' is what a basis that was measured is for"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TurboQuant(**options)


def test_sliding_windows_have_none():
    with pytest.raises(ValueError, match="needs what is measured on a model, and windows have none of that"):
        kvfold.parse("windows(form=\"turboquant(basis='measured')\")")


def test_nothing_is_read_before_a_layer_asks():
    """A file may name a calibration, which is asked about before anything of it is read."""
    made = kvfold.parse("h2o | turboquant(basis='measured', calibration='/nowhere')")
    assert made.format.key == "/nowhere" and made.needs
