"""FP8 against a loop over numbers: e4m3 as torch has it, a scale for each token and head."""

import pytest
import torch

import kvfold
from kvfold.methods.fp8 import Float8
from models import dynamic, feed, follow, grow, reference, subject, tokens


def rounded(vector: list[float]) -> list[float]:
    """The nearest numbers that e4m3 has: 3 bits of mantissa, exponents from 2^-6, below that multiples of 2^-9."""
    most = max(map(abs, vector))
    scale = most / 448 if most else 1.0
    found = []
    for number in vector:
        x = abs(number) / scale
        exponent = max(-6, torch.tensor(x).log2().floor().int().item()) if x else -6
        step = 2.0 ** (exponent - 3)
        low = int(x / step) * step
        near = sorted((abs(x - each), each / step % 2, each) for each in (low, low + step))[0][2]  # ties to even
        found.append((1 if number >= 0 else -1) * near * scale)
    return found


def test_codes_are_the_nearest_that_there_are():
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "fp8")
    plain = kvfold.Cache(model, "full")
    for each in (cache, plain):
        feed(model, each, *tokens(12).values())
    ours, theirs = (c.paged[0].stored.tokens()[0] for c in (cache, plain))
    for what in ("keys", "values"):
        held, true = getattr(ours, what)[0], getattr(theirs, what)[0]
        for head in range(2):
            for token in range(12):
                expected = torch.tensor(rounded(true[head, token].tolist()))
                torch.testing.assert_close(held[head, token], expected, atol=1e-6, rtol=1e-5)


def test_the_prompt_is_exact_and_everything_stays():
    prompt, steps = tokens(40, 23), torch.arange(5, 11).view(2, 3)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "fp8")
    got = follow(model, cache, *prompt.values(), steps)
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps)
    torch.testing.assert_close(got[:, 0], truth[:, 0], atol=1e-4, rtol=0)
    assert 0 < (got[:, 1:] - truth[:, 1:]).norm() < 0.2 * truth[:, 1:].norm()
    assert cache.kept(2) == [[list(range(43))] * 2, [list(range(26))] * 2]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.35), (torch.bfloat16, 0.72)])
def test_bytes(dtype, share):
    """A byte a number and four a vector of 16: .31 of float32, .63 of bfloat16, and what tables and positions take."""
    model = subject("llama", dtype)
    cache = kvfold.Cache(model, "fp8")
    feed(model, cache, *tokens(320, 320).values())
    assert share - 0.1 < cache.nbytes / cache.dense_nbytes < share


def test_it_says_how_what_another_method_keeps_is_held():
    prompt = tokens(60, 41)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "snapkv(budget=12) | fp8")
    plain = kvfold.Cache(model, "snapkv(budget=12)")
    for each in (cache, plain):
        feed(model, each, *prompt.values())
        feed(model, each, torch.tensor([[5], [6]]), grow(prompt["attention_mask"]))
    assert [cache.kept(i) for i in range(3)] == [plain.kept(i) for i in range(3)]
    assert cache.method.stages[1] == Float8() and cache.nbytes < 0.5 * plain.nbytes
