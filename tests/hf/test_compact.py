"""Compact positions (StreamingLLM, arXiv:2309.17453): tokens are read as if what lies between them had never been."""

import pytest
import torch

import kvfold
from models import VOCAB, dynamic, feed, follow, grow, reference, subject, tokens

ROPES = ["llama", "qwen3", "phi3", "gemma3", "yarn"]
STEPS = torch.arange(5, 25).view(2, 10)


def make(name, dtype=torch.float32, **options):
    options = {"positions": "compact", **options}
    return subject(name, dtype), kvfold.Cache(subject(name, dtype), "streamingllm", **options)


def prompt_with_middle(middle: int, seed: int) -> torch.Tensor:
    """Two sinks and five recent tokens, always the same, and `middle` tokens between them."""
    ends, between = tokens(7)["input_ids"], tokens(max(1, middle), seed=seed)["input_ids"][:, :middle]
    return torch.cat([ends[:, :2], between, ends[:, 2:]], 1)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_evicted_tokens_leave_no_trace(positions):
    """With one layer, what was evicted matters neither by its content nor by its place (the card's oracle 4)."""
    logits = []
    for middle, seed in ((0, 1), (1, 1), (12, 1), (12, 2), (40, 3)):
        ids = prompt_with_middle(middle, seed)
        model, cache = make("llama-one-layer", budget=7, sinks=2, positions=positions)
        feed(model, cache, ids, torch.ones_like(ids))
        got = follow(model, cache, torch.tensor([[9]]), grow(torch.ones_like(ids)), STEPS[:1, :6])
        logits.append(got)
        seen = ids.shape[1] + 7
        assert cache.kept(0)[0] == [[0, 1, *range(seen - 5, seen)]] * 2
    same = [bool((other - logits[0]).abs().max() < 1e-4) for other in logits]
    if positions == "compact":
        assert same == [True] * 5
    else:  # the distance from the sinks to the rest grows with what lay between
        assert same == [True, False, False, False, False]
        assert (logits[2] - logits[3]).abs().max() < 1e-4  # the same distance, other tokens


def test_a_block_of_tokens_sees_compact_positions():
    """A second turn: several queries at once, over what is left of the first."""
    logits, turn = [], tokens(6, seed=8)["input_ids"]
    for middle in (0, 5, 33):
        ids = prompt_with_middle(middle, 1)
        model, cache = make("llama-one-layer", budget=7, sinks=2)
        feed(model, cache, ids, torch.ones_like(ids))
        logits.append(feed(model, cache, turn, grow(torch.ones_like(ids), 6)))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ROPES)
def test_nothing_evicted_is_full(name):
    prompt = tokens(30, 12)
    expected = follow(reference(name), dynamic(reference(name)), *prompt.values(), STEPS)
    for budget in (1.0, 64):
        model, cache = make(name, budget=budget)
        got = follow(model, cache, *prompt.values(), STEPS)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ROPES)
def test_moving_a_key_is_rotating_it_there(name):
    """Shifting a rotated key by p equals rotating it for p, whatever the convention and scaling of the model."""
    _, cache = make(name)
    rope = cache.paged[0].site.rope
    keys = torch.randn(1, 2, 5, 16)
    still = rope.shift(keys, torch.zeros(1, 2, 5, dtype=torch.int32))
    torch.testing.assert_close(still, keys)
    far = rope.shift(keys, torch.full((1, 2, 5), 300, dtype=torch.int32))
    assert (far - keys).abs().max() > 0.1
    back = rope.shift(far, torch.full((1, 2, 5), -300, dtype=torch.int32))
    torch.testing.assert_close(back, keys, atol=1e-4, rtol=0)
    twice = rope.shift(rope.shift(keys, torch.full((1, 2, 5), 120)), torch.full((1, 2, 5), 180))
    torch.testing.assert_close(twice, far, atol=1e-4, rtol=0)


def test_rows_of_a_padded_batch():
    prompt = tokens(30, 12)
    model, cache = make("llama", budget=8)
    got = follow(model, cache, *prompt.values(), STEPS)
    for row, length in enumerate((30, 12)):
        own = prompt["input_ids"][row : row + 1, -length:]
        _, alone = make("llama", budget=8)
        expected = follow(model, alone, own, torch.ones_like(own), STEPS[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_long_stream_does_not_drift(dtype):
    """Keys turn from the angle that they were stored with: the sinks never change, however long the stream."""
    model, cache = make("llama-one-layer", dtype, budget=8, sinks=3)
    ids = tokens(20)["input_ids"]
    mask = torch.ones_like(ids)
    feed(model, cache, ids, mask)
    before = cache.paged[0].stored.tokens()[0].keys[:, :, :3].clone()
    stream = torch.randint(3, VOCAB, (1, 100), generator=torch.Generator().manual_seed(1))
    got = follow(model, cache, ids[:, :1], grow(mask), stream)
    assert torch.equal(cache.paged[0].stored.tokens()[0].keys[:, :, :3], before)
    # The same end of the stream, but a short way from the sinks.
    _, short = make("llama-one-layer", dtype, budget=8, sinks=3)
    feed(model, short, ids, mask)
    end = follow(model, short, stream[:, -11:-10], grow(mask), stream[:, -10:])
    bound = 1e-4 if dtype == torch.float32 else 0.15
    assert (got[:, -1] - end[:, -1]).abs().max() < bound * got.abs().max()
