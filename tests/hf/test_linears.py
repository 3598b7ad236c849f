"""`fast_linears`: the same answers by the fastest way, undone exactly, and nothing that is not plain is touched."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import kvfold
from kvfold import ops
from kvfold.hf.linears import ROWS, TRIES, WAYS, FastLinear
from kvfold.ops import _cpu, dispatch
from models import subject, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("isa", [name for name in _cpu.names() if not name.endswith("vnni")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_against_its_definition(isa, dtype, bias):
    sets = _cpu.names()
    _cpu.use(isa)
    try:
        for rows in (1, 2, 3, 4, 5, 8, 16):
            for n, k in ((4, 4), (8, 20), (100, 64), (36, 576), (300, 1000)):
                x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) * 0.1).to(dtype)
                more = torch.randn(n).to(dtype) if bias else None
                with dispatch.use("cpu"):
                    got = ops.linear(x, weight, more)
                want = x.double() @ weight.double().T + (0 if more is None else more.double())
                narrow = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
                assert got.dtype == dtype
                assert_close(got.double(), want, atol=1e-4, rtol=narrow)
    finally:
        _cpu.use(sets[0])


@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 3)])
def test_odd_widths_are_left_to_the_definition(n, k):
    x, weight = torch.randn(2, k), torch.randn(n, k)
    with dispatch.use("cpu"):
        assert_close(ops.linear(x, weight, None), x @ weight.T)


def layer_with(*, rows: int = 2) -> tuple[nn.Sequential, torch.Tensor]:
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).requires_grad_(False), torch.randn(rows, 32)


def test_every_way_is_tried_and_the_fastest_taken_since():
    model, x = layer_with()
    want = model(x)
    with kvfold.fast_linears(model) as fast:
        for _ in range(TRIES * len(WAYS) + 1):
            assert_close(model(x), want)
        taken = fast.choices.seconds
        assert {shape[:2] for shape in fast.report()} == {(64, 32), (32, 64)}
        for shape, way in fast.report().items():
            assert min(taken[shape][way]) == min(min(each) for each in taken[shape].values())
            assert {len(each) for each in taken[shape].values()} == {TRIES}
        model(x)
        assert {len(each) for each in taken[shape].values()} == {TRIES}  # timed no more
    assert all(type(layer) is nn.Linear and "kvfold_choices" not in vars(layer) for layer in model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("method", ["full", "h2o(budget=16)"])
def test_a_model_generates_as_before(method):
    model = subject("llama")
    ids = tokens(2, 20)
    options = dict(max_new_tokens=12, do_sample=False)
    want = model.generate(**ids, past_key_values=kvfold.Cache(model, method), **options)
    with kvfold.fast_linears(model) as fast:
        got = model.generate(**ids, past_key_values=kvfold.Cache(model, method), **options)
        assert fast.report()
    assert torch.equal(got, want)
    assert not any(isinstance(module, FastLinear) for module in model.modules())


def test_prompts_gradients_and_autocast_take_torchs_way(monkeypatch):
    model, x = layer_with()
    with kvfold.fast_linears(model) as fast:
        monkeypatch.setattr(type(fast.choices), "run", lambda *_: pytest.fail("not torch's way"))
        model(torch.randn(ROWS + 1, 32))
        assert model(torch.randn(0, 32)).shape == (0, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double())


def test_shapes_of_inputs_stay():
    layer = nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(3, 2, 16).transpose(0, 1)
    want = layer(x)
    with kvfold.fast_linears(layer):
        assert_close(layer(x), want)
        assert_close(layer(x[0, 0]), want[0, 0])


class Special(nn.Linear):
    pass


def test_what_is_not_plain_is_left_alone():
    special, wrapped, odd = Special(8, 8), nn.Linear(8, 8), nn.Linear(7, 8)
    wrapped.forward = lambda x: x  # as accelerate's hooks do
    plain = nn.Linear(8, 8)
    model = nn.ModuleList([special, wrapped, odd, nn.Linear(8, 8).double(), plain])
    with kvfold.fast_linears(model) as fast:
        assert fast.layers == [plain]
        assert type(special) is Special and type(wrapped) is nn.Linear


def test_what_cannot_be_done_is_refused_before_anything_is_set():
    with pytest.raises(ValueError, match="model=Embedding has no torch"):
        kvfold.fast_linears(nn.Embedding(3, 4))
    model, _ = layer_with()
    with kvfold.fast_linears(model), pytest.raises(ValueError, match="has fast linear layers already"):
        kvfold.fast_linears(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_it_is_undone_after_an_error():
    model, _ = layer_with()
    with pytest.raises(KeyError), kvfold.fast_linears(model):
        raise KeyError
    assert all(type(layer) is nn.Linear for layer in model)


def test_copies_are_plain():
    model, x = layer_with()
    with kvfold.fast_linears(model):
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert all(type(layer) is nn.Linear and "kvfold_choices" not in vars(layer) for layer in other)
        assert torch.equal(other(x), model(x))
        with kvfold.fast_linears(other):
            assert_close(other(x), model(x))


def test_layers_that_became_something_else_meanwhile_stay_that():
    model, x = layer_with()
    want = model(x)
    with kvfold.fast_linears(model):
        nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
        assert_close(model(x), want)
    assert type(model[0]) is not nn.Linear and type(model[1]) is nn.Linear
    assert_close(model(x), want)


def test_without_compiled_kernels_torchs_ways_are_taken(monkeypatch):
    monkeypatch.setattr("kvfold.hf.linears.library", lambda: None)
    model, x = layer_with()
    with kvfold.fast_linears(model) as fast:
        for _ in range(3 * TRIES):
            model(x)
        assert set(fast.report().values()) <= {"torch", "transposed"} and fast.report()


def trained_bias(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    model[1].bias.requires_grad_()
    return model(x)


def traced(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated, in several ways
        return torch.jit.trace(model, (x,), check_trace=False)(x)


LOOKED_AT = {
    "vmap": lambda model, x: torch.vmap(model)(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "make_fx": lambda model, x: make_fx(model)(x)(x),
    "jit.trace": traced,
    "trained bias": trained_bias,
    "float64": lambda model, x: copy.deepcopy(model).double()(x.double()),
    "fewer outputs": lambda model, x: nn.Sequential(pruned(model[0]))(x),
}


def pruned(layer: nn.Linear) -> nn.Linear:
    layer.weight, layer.bias = nn.Parameter(layer.weight[:8], False), nn.Parameter(layer.bias[:8], False)
    return layer


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch itself calls it
@pytest.mark.parametrize("how", LOOKED_AT)
def test_whoever_looks_at_the_product_sees_torchs(how, monkeypatch):
    model, x = layer_with()
    plain = copy.deepcopy(model)
    want = LOOKED_AT[how](plain, x)
    fast = kvfold.fast_linears(model)
    for shape in ((64, 32), (32, 64)):
        fast.choices.chosen[(*shape, torch.float32, 2, torch.get_num_threads())] = "kvfold"
    assert_close(LOOKED_AT[how](model, x), want)
    fast.undo()
