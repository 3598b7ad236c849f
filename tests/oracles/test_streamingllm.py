"""StreamingLLM against its card: sinks, a rolling window, and positions numbered inside the cache."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold.methods.full import Full
from kvfold.methods.streamingllm import StreamingLLM
from views import kept, random_view, run


@dataclass(frozen=True)
class PlainRope:
    """Halves of a vector are the two coordinates of its planes (Llama); angle = position * 10000 ** (-i / half)."""

    def shift(self, x: Tensor, steps: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = steps[..., None].double() * 10_000.0 ** (-torch.arange(half).double() / half)
        one, two = x[..., :half].double(), x[..., half:].double()
        turned = torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)
        return turned.to(x.dtype)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    return PlainRope().shift(x, positions.expand(x.shape[:3]))


def stream(method: StreamingLLM, q: Tensor, k: Tensor, v: Tensor, chunks: list[int]):
    """Feed pre-RoPE q, k rotated by text position, as a model would."""
    at = torch.arange(k.shape[2])
    return run(method, rotated(q, at), rotated(k, at), v, chunks, rope=PlainRope())


def slow_stream(q: Tensor, k: Tensor, v: Tensor, sinks: int, recent: int) -> tuple[Tensor, list[int]]:
    """The paper's loop for one head, token by token: cache keys without RoPE, give slot j the angle j."""
    cache: list[int] = []
    outs = []
    for t in range(k.shape[0]):
        cache.append(t)
        keys = rotated(k[None, None, cache], torch.arange(len(cache)))[0, 0]
        query = rotated(q[None, None, t : t + 1], torch.tensor([len(cache) - 1]))[0, 0, 0]
        probs = (keys @ query * k.shape[1] ** -0.5).softmax(-1)
        outs.append(probs @ v[cache])
        if len(cache) > sinks + recent:
            del cache[sinks]
    return torch.stack(outs), cache


def test_oracle_1_one_by_one():
    view = random_view(T=8, D=8)
    q, k, v = view.queries.states, view.keys, view.values
    method = StreamingLLM(budget=5, sinks=2, positions="compact")
    cache, _ = stream(method, q[:, :, :7], k[:, :, :7], v[:, :, :7], [1] * 7)
    assert cache.kept() == [[[0, 1, 4, 5, 6]]]
    cache, outs = stream(method, q, k, v, [1] * 8)
    assert cache.kept() == [[[0, 1, 5, 6, 7]]]
    seen = [0, 1, 4, 5, 6, 7]
    keys = rotated(k[:, :, seen], torch.arange(6))
    query = rotated(q[:, :, 7:], torch.tensor([5]))  # token 7 stands at slot 5
    expected = (query @ keys.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v[:, :, seen]
    assert_close(outs[7], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("sinks", "recent", "tokens"), [(2, 3, 20), (0, 4, 11), (4, 1, 9), (1, 6, 40)])
def test_against_the_papers_loop(sinks, recent, tokens):
    view = random_view(H=2, G=3, T=tokens, D=16, seed=tokens)
    q, k, v = view.queries.states, view.keys, view.values
    method = StreamingLLM(budget=sinks + recent, sinks=sinks, positions="compact")
    cache, outs = stream(method, q, k, v, [1] * tokens)
    out = torch.cat(outs, 2)
    for head in range(6):
        expected, left = slow_stream(q[0, head], k[0, head // 3], v[0, head // 3], sinks, recent)
        assert_close(out[0, head], expected, atol=1e-5, rtol=1e-4)
        assert cache.kept()[0][head // 3] == left


def test_oracle_2_a_turn_of_two_tokens_leaves_five():
    """The official loop makes room before the turn ({0, 1, 6} + 2); here the turn is cut once, to the same tokens."""
    view = random_view(T=9, D=8)
    cache, _ = stream(StreamingLLM(budget=5, sinks=2), view.queries.states, view.keys, view.values, [7, 2])
    assert cache.kept() == [[[0, 1, 6, 7, 8]]]


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_oracle_3_a_short_text_is_full_attention(positions):
    view = random_view(B=2, H=2, G=2, T=12, D=8)
    tensors = view.queries.states, view.keys, view.values
    method = StreamingLLM(budget=12, sinks=4, positions=positions)
    _, outs = stream(method, *tensors, [8, 1, 1, 1, 1])
    at = torch.arange(12)
    _, full = run(Full(), rotated(tensors[0], at), rotated(tensors[1], at), tensors[2], [8, 1, 1, 1, 1])
    for out, expected in zip(outs, full, strict=True):
        if positions == "original":
            assert torch.equal(out, expected)
        assert_close(out, expected, atol=1e-6, rtol=1e-5)  # turned by 0, in float32


def test_oracle_4_an_evicted_token_more_changes_nothing():
    view = random_view(T=12, D=8)
    q, k, v = view.queries.states, view.keys, view.values
    method = StreamingLLM(budget=5, sinks=2, positions="compact")
    short = [0, 1, 2, 3, *range(5, 12)]  # without token 4, long evicted at token 11
    _, long = stream(method, q, k, v, [1] * 12)
    _, other = stream(method, q[:, :, short], k[:, :, short], v[:, :, short], [1] * 11)
    assert_close(long[11], other[10], atol=1e-5, rtol=1e-4)
    _, long = stream(StreamingLLM(budget=5, sinks=2), q, k, v, [1] * 12)
    assert not torch.allclose(long[11], stream(StreamingLLM(budget=5, sinks=2), q[:, :, short], k[:, :, short],
                                               v[:, :, short], [1] * 11)[1][10], atol=1e-3)  # fmt: skip


def test_oracle_5_turning_a_turned_key():
    k = torch.randn(1, 1, 50, 16, generator=torch.Generator().manual_seed(0))
    old, new = torch.arange(50) * 7, torch.arange(50)
    again = PlainRope().shift(rotated(k, old), (new - old).expand(1, 1, 50))
    assert_close(again, rotated(k, new), atol=1e-5, rtol=1e-5)


def test_oracle_6_no_sinks_is_a_sliding_window():
    assert kept(StreamingLLM(budget=4, sinks=0), random_view(T=10)) == [[[6, 7, 8, 9]]]


@given(st.integers(1, 20), st.integers(0, 6), st.integers(1, 24), st.integers(0, 8))
def test_the_rule_in_every_row_and_head(length, sinks, budget, pad):
    view = random_view(B=2, H=2, T=length + pad, left_pad=(pad, 0))
    for row, tokens in enumerate((length, length + pad)):
        room = min(tokens, budget)
        first = sinks if room > sinks else room // 2  # a budget that would be all sinks is shared
        expected = [*range(first), *range(tokens - (room - first), tokens)]
        assert kept(StreamingLLM(budget=budget, sinks=sinks), view)[row] == [expected] * 2


def test_padding_is_not_marked():
    view = random_view(B=2, T=9, left_pad=(0, 5))
    assert not (StreamingLLM(budget=6).after_prefill(view).mask & ~view.valid).any()


@pytest.mark.parametrize("options", [{"sinks": -1}, {"positions": "shifted"}, {"budget": 0}])
def test_bad_options(options):
    (name, value), = options.items()  # fmt: skip
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        StreamingLLM(**options)
