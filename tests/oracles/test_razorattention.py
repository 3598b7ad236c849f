"""RazorAttention against its card: head roles, the compensation token and its weight, the buffer."""

import math
from dataclasses import replace

import pytest
import torch

from kvfold.formats import LOG_MASS, Chunk
from kvfold.methods.razorattention import RazorAttention, retrieval_heads
from kvfold.scores.stripes import stripes
from views import asked_view, kept, random_view, run

ONE = {"induction": ((0.9, 0.1),), "echo": ((0.2, 0.1),), "induction_ratio": 0.5, "echo_ratio": 0.0}
"""One layer: head 0 keeps all, head 1 does not."""


def test_oracle_1_echo_and_induction():
    """Heads that put all their attention three back, two back, and on themselves; the text repeats after three."""
    total, logits = 9, torch.full((1, 3, 1, 9, 9), -200.0)
    for head, back in enumerate((3, 2, 0)):
        for i in range(total):
            logits[0, head, 0, i, i - back if i >= 3 else i] = 200.0
    echo, induction = stripes(asked_view(logits, total), period=3, start=0)[..., 0]
    torch.testing.assert_close(echo, torch.tensor([6.0, 0.0, 0.0]))
    torch.testing.assert_close(induction, torch.tensor([0.0, 6.0, 0.0]))


def test_stripes_against_the_matrix():
    """Two copies back count too, the first token never does."""
    view = random_view(H=2, G=3, T=13, D=8, seed=4)
    q, k = view.queries.states[0], view.keys[0].repeat_interleave(3, 0)
    probs = (q @ k.transpose(1, 2) * view.place.scale).masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
    probs, expected = probs.softmax(-1), torch.zeros(2, 6)
    for i in range(1, 13):
        for j in range(1, i):
            if (i - j) % 4 == 0:
                expected[0] += probs[:, i, j]
                expected[1] += probs[:, i, j + 1]
    torch.testing.assert_close(stripes(view, 4, start=1).reshape(2, 6), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weighed", [True, False])
def test_oracle_2_equal_tokens_fold_without_loss(weighed):
    view = random_view(H=2, G=2, T=41, D=16, seed=2)
    k, v = view.keys.clone(), view.values.clone()
    k[:, :, 4:32], v[:, :, 4:32] = k[:, :, 4:5], v[:, :, 4:5]
    q = view.queries.states
    method = RazorAttention(local=8, share=0.0, sinks=4, **ONE)
    cache, outs = run(method, q, k, v, [40, 1])
    assert len(cache.kept()[0][0]) == 41 and len(cache.kept()[0][1]) == 4 + 1 + 8 + 1
    full = attention(q[0, :, 40], k[0], v[0])
    if weighed:
        torch.testing.assert_close(outs[1][0, :, 0], full, atol=1e-5, rtol=1e-4)
    else:  # with weight 1 it would be something else
        less = [*range(5), *range(32, 41)]
        light = attention(q[0, 2:, 40], k[0, 1:, less], v[0, 1:, less])
        assert ((outs[1][0, 2:, 0] - light).abs().amax(1) > 1e-3).all()


def attention(q, k, v):
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    return ((k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5).softmax(-1)[:, None].matmul(v)[:, 0]


def slow(q, k, v, sinks, buffer, before):
    """Step 7 of the card for one query of one head: `before` prompt tokens, then all that came after them."""
    scale, dropped = q.shape[-1] ** -0.5, range(sinks, before - buffer)
    mean_k, mean_v = k[list(dropped)].mean(0), v[list(dropped)].mean(0)
    weight = len(dropped) * math.exp(float(q @ mean_k) * scale)
    above, below = weight * mean_v, weight
    for i in range(len(k)):
        if i not in dropped:
            each = math.exp(float(q @ k[i]) * scale)
            above, below = above + each * v[i], below + each
    return above / below


@pytest.mark.parametrize(("sinks", "local", "share"), [(4, 6, 0.0), (0, 3, 0.25), (2, 1, 0.5)])
def test_against_a_loop(sinks, local, share):
    view = random_view(H=2, G=2, T=44, D=16, seed=5)
    q, k, v = view.queries.states, view.keys, view.values
    cache, outs = run(RazorAttention(sinks=sinks, local=local, share=share, **ONE), q, k, v, [40, 1, 1, 1, 1])
    buffer = max(local, int(share * 40))
    assert len(cache.kept()[0][1]) == sinks + 1 + buffer + 4
    for t in range(40, 44):
        for head in (2, 3):
            expected = slow(q[0, head, t], k[0, 1, : t + 1], v[0, 1, : t + 1], sinks, buffer, 40)
            torch.testing.assert_close(outs[t - 39][0, head, 0], expected, atol=1e-5, rtol=1e-4)


def test_a_further_prompt_folds_into_the_same_token():
    """The compensation token weighs as many as it stands for: two turns give what one prompt gives."""
    view = random_view(B=2, H=2, G=2, T=61, D=16, left_pad=(0, 9), seed=6)
    q, k, v, mask = view.queries.states, view.keys, view.values, view.queries.valid
    method = RazorAttention(sinks=3, local=7, share=0.0, **ONE)
    once, one = run(method, q, k, v, [60, 1], mask)
    twice, two = run(method, q, k, v, [30, 30, 1], mask)
    assert once.kept() == twice.kept()
    torch.testing.assert_close(one[-1], two[-1], atol=1e-5, rtol=1e-4)


def test_oracle_3_short_texts_and_whole_heads_stay():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 7))
    assert RazorAttention(**ONE).after_prefill(view) is None
    assert RazorAttention(local=26, share=0.0, **ONE).after_prefill(view) is None
    everyone = RazorAttention(local=1, share=0.0, **{**ONE, "induction_ratio": 1.0})
    assert everyone.after_prefill(view) is None


def test_oracle_4_how_many_heads():
    generator = torch.Generator().manual_seed(0)
    induction, echo = (tuple(map(tuple, torch.rand(32, 8, generator=generator).tolist())) for _ in range(2))
    chosen = [a or b for one, two in zip(retrieval_heads(induction, 0.14), retrieval_heads(echo, 0.01), strict=True)
              for a, b in zip(one, two, strict=True)]  # fmt: skip
    assert sum(map(sum, retrieval_heads(induction, 0.14))) == 36 and sum(map(sum, retrieval_heads(echo, 0.01))) == 3
    assert 36 <= sum(chosen) <= 39


def test_a_ratio_protects_one_head_at_least():
    assert retrieval_heads(((0.1,), (0.3,), (0.2,)), 0.01) == ((False,), (True,), (False,))
    assert not any(map(any, retrieval_heads(((0.1, 0.3),), 0.0)))


def test_oracle_5_the_buffer_of_a_long_text():
    view = random_view(H=2, T=64)
    states, wide = torch.zeros(1, 2, 20_000, 1), torch.ones(1, 2, 20_000, dtype=torch.bool)
    place = replace(view.place, prompt=torch.tensor([20_000]))
    longer = replace(view, tokens=Chunk(states, states, wide), place=place)
    dropped = RazorAttention(**ONE).dropped(longer, torch.tensor([True, False]))
    assert (20_000 - dropped.sum(-1) + dropped.any(-1)).tolist() == [[20_000, 4005]]


def test_the_mean_takes_the_first_dropped_slot():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 7))
    method = RazorAttention(local=5, share=0.0, sinks=2, **ONE)
    rows = kept(method, view)
    assert rows == [[list(range(30)), [0, 1, 2, *range(25, 30)]], [list(range(23)), [0, 1, 2, *range(18, 23)]]]
    folded = view.apply(method.after_prefill(view))
    for row, pad, length in ((0, 0, 30), (1, 7, 23)):
        gone = slice(pad + 2, pad + length - 5)
        for new, old in ((folded.keys, view.keys), (folded.values, view.values)):
            torch.testing.assert_close(new[row, 1, pad + 2], old[row, 1, gone].mean(0), atol=1e-5, rtol=1e-4)
            assert torch.equal(new[row, 0], old[row, 0])
        assert float(folded.columns[LOG_MASS][row, 1, pad + 2]) == pytest.approx(math.log(length - 7))


@pytest.mark.parametrize(
    "options", [{"induction_ratio": 1.5}, {"echo_ratio": -1}, {"sinks": -1}, {"local": 0}, {"share": 2.0}, {"echo": ()}]
)
def test_bad_options(options, unchecked):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        RazorAttention(**options)
