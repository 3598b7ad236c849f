"""EliteKV's conversion and uptraining on tiny models: what is folded is held without loss, and the loss falls."""

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold import artefacts
from kvfold.calibration import Run, calibrate
from kvfold.calibration.uptrain import attending, attention_of, check_linear, fold, uptrain
from kvfold.methods.elitekv import EliteFrame, EliteKV
from models import VOCAB, build, follow, subject
from test_calibration import TEXTS, Words


def run_of(model, **options) -> Run:
    return Run(model, Words(), TEXTS, **{"length": 64, **options})


@pytest.fixture
def measured(tmp_path):
    """A calibration of a model by the real search, and its frame."""

    def make(model, **options):
        found = calibrate("elitekv", run_of(model, samples=2, **options), name="tiny")
        path = artefacts.save(found, tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
        return found, EliteFrame(str(path), None)

    return make


def text(seed: int = 0, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def rest(attention, basis) -> torch.Tensor:
    """The rows of W_k and W_v that a latent holds, (N, d): of each head those of its rest, then those of its value."""
    keys, values = (each.weight.double().view(2, 16, -1) for each in (attention.k_proj, attention.v_proj))
    return torch.cat([part for h in range(2) for part in (keys[h][~basis.elite[h]], values[h])])


@pytest.mark.parametrize("biased", [False, True])
def test_a_converted_model_loses_nothing_when_it_is_stored(measured, tmp_path, biased):
    """Folded weights attend as the factors did, and as what a cache holds of them token by token."""
    model = build("llama", attention_bias=biased)
    found, frame = measured(model, rank=17)
    with torch.no_grad():
        for layer in model.model.layers if biased else ():
            for each in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                each.bias.normal_()
    attention = attention_of(model, frame)
    with torch.no_grad():
        for back in attention.back:  # as training may leave it: no longer orthonormal
            back += 0.1 * torch.randn(back.shape, generator=torch.Generator().manual_seed(1))
        with attending(model, attention):
            want = model(text(), use_cache=False).logits
        modules = [layer.self_attn for layer in model.model.layers]
        bases = [fold(module, attention, i) for i, module in enumerate(modules)]
    data = {**found.data, "basis": torch.stack(bases)}
    path = artefacts.save(artefacts.Artefact("elitekv", found.model, data, {}), tmp_path / "new.safetensors")
    prompt, said = text()[:, :1], text()[:, 1:]
    got = follow(model, kvfold.Cache(model, EliteKV(calibration=str(path))), prompt, torch.ones_like(prompt), said)
    assert_close(got, want, atol=2e-3, rtol=1e-3)
    old = kvfold.Cache(model, EliteKV(calibration=frame.calibration))
    other = follow(model, old, prompt, torch.ones_like(prompt), said)
    assert (other - want).abs().max() > 0.05  # the basis of before does not hold what is there now


def test_conversion_alone_is_the_projection(measured):
    """Without a step the weights become W P P': what the cache of the old model would give back of its keys."""
    model, plain = build("llama"), build("llama")
    found, frame = measured(model, rank=17)
    made = uptrain(run_of(model, samples=0), found, frame)
    assert made.losses["converted"] == made.losses["trained"] != made.losses["full"]
    for i in range(3):
        basis = frame.layers[i]
        onto = basis.latent.double() @ basis.latent.double().mT
        ours, theirs = (x.model.layers[i].self_attn for x in (model, plain))
        assert_close(rest(ours, basis), onto @ rest(theirs, basis), atol=1e-6, rtol=0)
        elite = basis.elite.flatten()
        assert torch.equal(ours.k_proj.weight[elite], theirs.k_proj.weight[elite])
        new = made.artefact.data["basis"][i].double()
        assert_close(new @ new.mT, onto, atol=3e-3, rtol=0)  # a calibration is float16


def test_uptraining_lowers_the_loss(measured):
    model = build("llama")
    found, frame = measured(model, rank=12)
    lines: list[str] = []
    made = uptrain(run_of(model, samples=30, tick=lines.append), found, frame, rate=3e-3)
    assert made.losses["trained"] < made.losses["converted"] - 0.5
    first, last = (float(line.rsplit(" ", 1)[1]) for line in (lines[-30], lines[-1]))
    assert lines[-1].startswith("step 30 of 30: loss ") and last < first
    told = made.artefact.provenance["uptrained"][-1]
    assert told["steps"] == 30 and told["held-out loss"] == made.losses


def test_what_cannot_be_converted_is_refused_before_a_weight_changes(measured):
    for name, message in (
        ("qwen3", "the keys of layer 0 are not what k_proj gives"), ("phi3", "has no linear k_proj"),
        ("gemma3", "has layers without full attention"), ("yarn", "the keys of layer 0 are not what k_proj gives"),
    ):  # fmt: skip
        model = build(name)
        before = {path: weight.clone() for path, weight in model.named_parameters()}
        found, frame = measured(model)
        with pytest.raises(ValueError, match=message):
            uptrain(run_of(model, samples=2), found, frame)
        assert all(torch.equal(weight, before[path]) for path, weight in model.named_parameters())
    model = subject("llama")
    found, frame = measured(model)
    wrong = {"rate=0.0": {"rate": 0.0}, "batch=0": {"batch": 0}, "rate=nan": {"rate": float("nan")}}
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            uptrain(run_of(model, samples=2), found, frame, **options)
    check_linear(model, attention_of(model, frame), text())  # raises for none that is plain


def test_options_of_the_search_are_checked():
    model = subject("llama")
    for options, message in (
        ({"pairs": 9}, "pairs=9 must be between 1 and 8"), ({"rank": 57}, "rank=57 must be between 1 and 56"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            calibrate("elitekv", run_of(model, samples=1, **options))
