"""Attention-Gate against its card: flags before attention, a token sees itself, what is shut out is not stored."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import kvfold
from kvfold import artefacts, ops
from kvfold.artefacts import Artefact
from kvfold.calibration import gate as training
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.attention_gate import AttentionGate, Gate
from kvfold.methods.base import Method
from kvfold.ops import dispatch
from kvfold.views import HiddenView
from models import dynamic, feed, follow, grow, reference, subject, tokens
from views import place

STEPS = torch.arange(5, 17).view(2, 6)


def random_gates(layers: int, width: int, heads: int, bias: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Two heads of size 8 a gate, which see other tokens, too."""
    rng = torch.Generator().manual_seed(seed)
    look = torch.randn(3, layers, 2, 8, width, generator=rng) / width**0.5
    flags = torch.randn(layers, heads, 2, 8, generator=rng)
    return dict(zip(("wq", "wk", "wv"), look.clone(), strict=True)) | {
        "wg": flags, "bg": torch.full((layers, heads), bias)
    }  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A model and a cache whose gates are random, with this bias."""

    def made(name: str = "llama", bias: float = 0.0, composed: str = "", **options):
        model = subject(name)
        layers = len(kvfold.Cache(model, "full").paged)
        data = random_gates(layers, model.config.hidden_size, 2, bias)
        about = {"fingerprint": artefacts.fingerprint(model), "name": name, "layers": layers, "kv_heads": 2}
        path = tmp_path / f"{name}{bias}.safetensors"
        if not path.exists():
            artefacts.save(Artefact("attention-gate", about, data, {}), path)
        method = AttentionGate(calibration=str(path), **options)
        return model, kvfold.Cache(model, f"{method}{composed}")

    return made


def states_of(model, ids: Tensor, mask: Tensor, cache) -> list[Tensor]:
    """What enters each layer's attention in a pass over a prompt."""
    seen: list[Tensor] = []

    def hear(module, args, kwargs):
        seen.append(kwargs["hidden_states"])

    hooks = [layer.self_attn.register_forward_pre_hook(hear, with_kwargs=True) for layer in model.model.layers]
    try:
        feed(model, cache, ids, mask)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def slow_gate(x: Tensor, data: dict[str, Tensor], layer: int) -> Tensor:
    """The gates (H, T) of one row's states (T, C), token by token as the card has it."""
    x = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    wq, wk, wv, wg, bg = (data[name][layer] for name in ("wq", "wk", "wv", "wg", "bg"))
    out = torch.zeros(len(bg), len(x))
    for t in range(len(x)):
        parts = []
        for n in range(wq.shape[0]):
            logits = torch.stack([(wq[n] @ x[t]) @ (wk[n] @ x[j]) for j in range(t + 1)]) / wq.shape[1] ** 0.5
            parts.append(sum(p * (wv[n] @ x[j]) for j, p in enumerate(logits.softmax(0))))
        for h in range(len(bg)):
            out[h, t] = torch.sigmoid(sum(wg[h, n] @ part for n, part in enumerate(parts)) + bg[h])
    return out


def slow_attention(q: Tensor, k: Tensor, v: Tensor, flags: Tensor, scale: float) -> Tensor:
    """(Hq, T, D) by torch.softmax over the keys that each query sees, one query at a time."""
    group, out = q.shape[0] // k.shape[0], torch.zeros(*q.shape[:2], v.shape[2])
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            see = [j for j in range(i + 1) if flags[head // group, j] or j == i]
            weights = (k[head // group, see] @ q[head, i] * scale).softmax(0)
            out[head, i] = weights @ v[head // group, see]
    return out


# -- the card's oracle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_oracle_1_open_gates_are_the_full_cache(make, name):
    prompt = tokens(40, 30)
    model, cache = make(name, bias=99.0)
    got = follow(model, cache, *prompt.values(), STEPS)
    assert torch.equal(got, follow(model, kvfold.Cache(model, "full"), *prompt.values(), STEPS))
    assert_close(got, follow(reference(name), dynamic(reference(name)), *prompt.values(), STEPS), atol=1e-4, rtol=0)
    assert all(core.kept() == [[list(range(46))] * 2, [list(range(36))] * 2] for core in cache.paged)


def test_oracle_2_shut_gates_leave_each_token_alone(make):
    prompt = tokens(40, 30)
    model, cache = make(bias=-99.0)
    feed(model, cache, *prompt.values())
    assert cache.kept_tokens == 0
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    none = torch.zeros(2, 2, 9, dtype=torch.bool)
    assert_close(ops.causal_admitted(q, k, v, none, 0.25)[0], v)
    mask = prompt["attention_mask"]
    for column in range(6):  # what is generated sees what was generated
        mask = grow(mask)
        feed(model, cache, STEPS[:, column : column + 1], mask)
    assert all(core.kept() == [[list(range(40, 46))] * 2, [list(range(30, 36))] * 2] for core in cache.paged)


def test_oracle_3_the_threshold_is_strict():
    gates = torch.tensor([[[0.6, 0.5, 0.4]]])
    flags = training.straight_through(gates, 0.5)
    assert flags.tolist() == [[[1.0, 0.0, 0.0]]]
    q, k, v = torch.randn(3, 1, 1, 3, 8)
    out = ops.causal_admitted(q, k, v, flags > 0, 0.3)[0]
    for query, seen in ((0, [0]), (1, [0, 1]), (2, [0, 2])):
        weights = (k[0, 0, seen] @ q[0, 0, query] * 0.3).softmax(0)
        assert_close(out[0, 0, query], weights @ v[0, 0, seen])


def test_oracle_4_the_gradient_goes_straight_through():
    logits = torch.randn(3, 2, 9, requires_grad=True)
    flags = training.straight_through(torch.sigmoid(logits), 0.5)
    assert torch.equal(flags, (logits > 0).float())
    (through,) = torch.autograd.grad(flags.sum(), logits)
    (plain,) = torch.autograd.grad(torch.sigmoid(logits).sum(), logits)
    assert torch.equal(through, plain)


def test_oracle_5_the_eviction_loss():
    even = torch.tensor([[0.2, 0.6], [0.4, 0.4]])
    assert float(training.eviction_loss(even, 0.4)) == pytest.approx(0.0, abs=1e-7)
    assert float(training.eviction_loss(torch.full((3, 2, 5), 0.9), 0.4)) == pytest.approx(0.5)
    assert float(training.eviction_loss(torch.tensor([[0.9], [0.4]]), 0.4)) == pytest.approx(0.25)


def test_oracle_6_a_ragged_cache_is_a_dense_one_with_a_mask(make):
    prompt = tokens(37, 29)
    model, cache = make()
    data = artefacts.load(cache.method.calibration).data
    mask = prompt["attention_mask"]
    states, views = [], []
    with cache.observed(views.append):
        states = states_of(model, *prompt.values(), cache)
    flags = [
        [slow_gate(states[layer][row, -length:], data, layer) > 0.5 for row, length in enumerate((37, 29))]
        for layer in range(3)
    ]
    for layer, core in enumerate(cache.paged):
        for row in range(2):
            assert core.counts()[row].tolist() == flags[layer][row].sum(-1).tolist()
            assert core.kept()[row] == [head.nonzero()[:, 0].tolist() for head in flags[layer][row]]
    assert 0.2 < cache.kept_tokens / 33 < 0.8
    with cache.observed(views.append):
        for column in range(3):
            mask = grow(mask)
            ask = feed(model, cache, STEPS[:, column : column + 1], mask)
    assert ask.isfinite().all()
    for view in views[3:]:  # decoding: the softmax over what the flags left, by the dense keys of the prompt
        before = views[view.place.ordinal]
        new = int(view.place.seen[0]) - 37
        for row, length in enumerate((37, 29)):
            for head in range(2):
                kept = flags[view.place.ordinal][row][head].nonzero()[:, 0] + 37 - length
                alive = view.valid[row, head]
                assert int(alive.sum()) == len(kept) + new
                assert torch.equal(view.keys[row, head][alive][: len(kept)], before.keys[row, head, kept])


class Given(Method):
    """Flags as a test has them."""

    def __init__(self, flags: Tensor):
        self.flags = flags

    def admit(self, view):
        return self.flags


@pytest.mark.parametrize("pad", [0, 4])
def test_oracle_6_decoding_sees_the_flagged_tokens_and_the_new_ones(pad):
    q, k, v = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    flags = torch.rand(1, 2, 17) < 0.4
    mask = torch.arange(17)[None] >= pad
    layer = KVLayer(Rows(Given(flags)), 0)
    new = slice(0, 17)
    out = layer.attend(
        q[:, :, new], k[:, :, new], v[:, :, new], mask, 0.3, Plan(prefill=True), None, torch.zeros(1, 17, 8)
    )
    flags = flags & mask[:, None]
    assert layer.counts().tolist() == flags.sum(-1).tolist()
    seen = torch.cat([flags, torch.ones(1, 2, 3).bool()], 2)[0]
    assert_close(out[0, :, pad:], slow_attention(q[0], k[0], v[0], seen, 0.3)[:, pad:17], atol=1e-5, rtol=1e-5)
    for i in range(17, 20):
        one = slice(i, i + 1)
        out = layer.attend(q[:, :, one], k[:, :, one], v[:, :, one], None, 0.3, Plan(prefill=False))
        assert_close(out[0], slow_attention(q[0], k[0], v[0], seen, 0.3)[:, one], atol=1e-5, rtol=1e-5)


def test_oracle_7_later_tokens_change_no_flag(make):
    ids, mask = tokens(40).values()
    model, long = make()
    feed(model, long, ids, mask)
    _, short = make()
    feed(model, short, ids[:, :25], mask[:, :25])
    for one, other in zip(long.paged, short.paged, strict=True):
        assert [[p for p in head if p < 25] for head in one.kept()[0]] == other.kept()[0]


# -- loops, versions, state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", dispatch.versions("causal_admitted"))
@pytest.mark.parametrize("total", [1, 7, 63, 129, 300])
@pytest.mark.parametrize(("share", "group", "dv"), [(0.4, 1, 16), (0.1, 3, 16), (0.9, 2, 24), (0.0, 2, 16)])
def test_attention_against_a_loop(version, total, share, group, dv):
    rng = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(2, h, total, d, generator=rng) for h, d in ((2 * group, 16), (2, 16), (2, dv)))
    flags = torch.rand(2, 2, total, generator=rng) < share
    with dispatch.use(version):
        out, lse = ops.causal_admitted(q, k, v, flags, 0.3)
    wide = torch.ones(total, total, dtype=torch.bool).tril(-1)
    seen = ((flags[:, :, None] & wide) | torch.eye(total, dtype=torch.bool)).repeat_interleave(group, 1)
    logits = (q @ k.repeat_interleave(group, 1).transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    assert_close(lse, logits.logsumexp(-1), atol=2e-5, rtol=2e-5)
    assert_close(out, logits.softmax(-1) @ v.repeat_interleave(group, 1), atol=2e-5, rtol=2e-5)
    if total < 64:
        assert_close(out[1], slow_attention(q[1], k[1], v[1], flags[1], 0.3), atol=2e-5, rtol=2e-5)


def test_narrow_attention_and_open_flags():
    q, k, v = torch.randn(3, 1, 2, 200, 16)
    everyone = torch.ones(1, 2, 200, dtype=torch.bool)
    for version in dispatch.versions("causal_admitted"):
        with dispatch.use(version):
            assert_close(ops.causal_admitted(q, k, v, everyone, 0.25)[0], ops.causal(q, k, v, 0.25)[0])
            got = ops.causal_admitted(*(x.bfloat16() for x in (q, k, v)), everyone, 0.25)[0]
        assert got.dtype == torch.bfloat16
        assert_close(got.float(), ops.causal(q, k, v, 0.25)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_rows_and_padding(make, name):
    prompt = tokens(41, 24, 9)
    model, cache = make(name)
    got = follow(model, cache, *prompt.values(), STEPS[:1].expand(3, -1))
    for row, length in enumerate((41, 24, 9)):
        own = prompt["input_ids"][row : row + 1, -length:]
        _, alone = make(name)
        expected = follow(model, alone, own, torch.ones_like(own), STEPS[:1])
        assert [core.kept()[0] for core in alone.paged] == [core.kept()[row] for core in cache.paged]
        assert_close(got[row], expected[0], atol=1e-4, rtol=0)


def test_chunks_and_further_turns(make):
    """The gates read what is new; it attends what was kept, and is let in beside it."""
    ids, mask = tokens(60).values()
    model, cache = make()
    data = artefacts.load(cache.method.calibration).data
    wanted = [[[], []] for _ in range(3)]
    for start, stop in ((0, 23), (23, 40), (40, 60)):
        for layer, states in enumerate(states_of(model, ids[:, start:stop], mask[:, :stop], cache)):
            for head, flags in enumerate(slow_gate(states[0], data, layer) > 0.5):
                wanted[layer][head] += (flags.nonzero()[:, 0] + start).tolist()
    assert [core.kept()[0] for core in cache.paged] == wanted
    _, split = make()
    inside = kvfold.Cache(model, split.method, prefill_chunk=20)
    feed(model, inside, ids, mask)
    _, by_hand = make()
    for start in (0, 20, 40):
        feed(model, by_hand, ids[:, start : start + 20], mask[:, : start + 20])
    assert [core.kept() for core in inside.paged] == [core.kept() for core in by_hand.paged]


def test_it_composes_and_is_saved(make, tmp_path):
    prompt = tokens(60, 50)
    mask = grow(prompt["attention_mask"])
    model, cache = make(composed=" | h2o(budget=12)")
    feed(model, cache, *prompt.values())
    _, alone = make()
    feed(model, alone, *prompt.values())
    for both, one in zip(cache.paged, alone.paged, strict=True):
        assert both.counts().max() <= 12
        assert all(
            set(a) <= set(b) for x, y in zip(both.kept(), one.kept(), strict=True) for a, b in zip(x, y, strict=True)
        )
    alone.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=r"attention-gate has calibration='.*' loaded, which a file can't ask for"):
        kvfold.Cache.load(tmp_path / "cache.safetensors", model)
    loaded = kvfold.Cache.load(tmp_path / "cache.safetensors", model, allow=[str(alone.method.calibration)])
    assert loaded.method == alone.method and kvfold.parse(str(alone.method)) == alone.method
    assert torch.equal(feed(model, loaded, STEPS[:, :1], mask), feed(model, alone, STEPS[:, :1], mask))


def test_refused(make, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"threshold=2.0 must be a number in \[0.0, 1.0\]"):
        AttentionGate(threshold=2.0)
    model, cache = make()
    assert not cache.shares_prefill
    with pytest.raises(ValueError, match="no assisted decoding with it"):
        model.generate(tokens(20)["input_ids"], past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5)
    view = HiddenView(
        torch.zeros(1, 3, 64), torch.ones(1, 3).bool(), torch.zeros(1, 3).int(), 2, place(torch.tensor([3]))
    )
    with pytest.raises(
        ValueError, match=r"needs trained gates: give it to kvfold.Cache\(model, ...\), which finds them"
    ):
        AttentionGate().admit(view)
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no calibration for .*kvfold calibrate attention-gate"):
        kvfold.Cache(model, "attention-gate")
    with pytest.raises(ValueError, match=r"calibration='shipped:nothing' is not a calibration file"):
        kvfold.Cache(model, "attention-gate", calibration="shipped:nothing")


# -- training ----------------------------------------------------------------------------------------------------


def test_training_attends_as_the_method_does():
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    flags = torch.rand(1, 2, 30) < 0.4
    assert_close(training.gated_attention(q, k, v, flags.float(), 0.3), ops.causal_admitted(q, k, v, flags, 0.3)[0])
    gate = Gate.of(random_gates(1, 12, 2), 0)
    states = torch.randn(1, 30, 12)
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    assert_close(gate(states, causal)[0], slow_gate(states[0], random_gates(1, 12, 2), 0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on", [0.0, 1.0])
def test_the_gradient_of_a_flag_is_what_the_key_weighs(on):
    q, k, v = torch.randn(3, 1, 1, 2, 4, dtype=torch.float64)
    flags = torch.tensor([[[on, 1.0]]], dtype=torch.float64, requires_grad=True)
    out = training.gated_attention(q, k, v, flags, 0.5)
    weight = (k[0, 0] @ q[0, 0, 1] * 0.5).softmax(0)[0]
    wish = torch.randn(4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((out[0, 0, 1] * wish).sum(), flags)
    own = out[0, 0, 1].detach()
    assert_close(grad[0, 0, 0], weight * ((v[0, 0, 0] - own) @ wish), atol=1e-6, rtol=1e-6)
    assert grad[0, 0, 1] == 0


@pytest.mark.parametrize("kind", ["lm", "kl"])
def test_a_few_steps_bring_the_keep_rate_to_its_target(kind, monkeypatch):
    from test_calibration import run_of

    monkeypatch.setattr(training, "LOSS", kind)
    monkeypatch.setattr(training, "OPEN", 2.0)
    model = subject("llama")
    before = [weight.clone() for weight in model.parameters()]
    run = run_of(model, samples=80, length=64)
    data = training.train_attention_gates(run)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert abs(run.about["kept at the end"] - 0.4) < 0.15 and run.about["loss"] == kind
    assert {name: tuple(x.shape) for name, x in data.items()} == {
        "wq": (3, 1, 16, 64), "wk": (3, 1, 16, 64), "wv": (3, 1, 16, 64), "wg": (3, 2, 1, 16), "bg": (3, 2),
    }  # fmt: skip
    assert all(x.dtype == torch.bfloat16 for x in data.values())
