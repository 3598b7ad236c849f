"""Mustafar against a loop: of each vector the numbers that are not below the k-th smallest magnitude."""

import pytest
import torch

import kvfold
from kvfold.formats import POSITION, Chunk, Sparse, Spec
from kvfold.methods.mustafar import Mustafar
from kvfold.ops.sparse.packing import kept_of, pack, unpack
from models import dynamic, feed, follow, reference, subject, tokens


def pruned(vector: list[float], sparsity: float) -> list[float]:
    """The card's rule, ties cut: theta is the k-th smallest magnitude; the earlier of equal ones stay."""
    k = max(1, int(sparsity * len(vector)))
    theta = sorted(map(abs, vector))[k - 1]
    above = sum(abs(x) > theta for x in vector)
    room, found = len(vector) - k + 1 - above, []
    for x in vector:
        tie = abs(x) == theta and room > 0
        room -= tie
        found.append(x if abs(x) > theta or tie else 0.0)
    return found


def stored(vectors: torch.Tensor, sparsity: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a format without a window gives back of (T, D)."""
    states = vectors.to(dtype)[None, None]
    places = torch.arange(len(vectors), dtype=torch.int32)[None, None]
    chunk = Chunk(states, states.clone(), torch.ones_like(places, dtype=torch.bool), {POSITION: places})
    segment = Sparse(sparsity, sparsity, residual=0, group=1).open(Spec.of(chunk))
    segment.append(chunk)
    tokens = segment.dense()
    torch.testing.assert_close(tokens.keys, tokens.values, rtol=0, atol=0, equal_nan=True)
    assert tokens.keys.dtype == dtype
    return tokens.keys[0, 0]


@pytest.mark.parametrize(("size", "sparsity", "count"), [
    (128, 0.5, 65), (128, 0.7, 40), (128, 0.0, 128), (64, 0.5, 33), (64, 0.7, 21), (4, 0.5, 3), (1, 0.9, 1),
])  # fmt: skip
def test_how_many_numbers_stay(size, sparsity, count):
    assert kept_of(size, sparsity) == count
    vectors = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    assert ((stored(vectors, sparsity) != 0).sum(-1) == count).all()


def test_the_papers_vector_and_ties():
    vectors = torch.tensor([[3, -1, 0.5, -2], [1, -1, 1, 1], [0, 0, 0, 0], [0, -0.0, 7, 0], [2, 5, -2, 2]])
    wanted = [[3, -1, 0, -2], [1, -1, 1, 0], [0, 0, 0, 0], [0, 0, 7, 0], [2, 5, -2, 0]]
    assert stored(vectors, 0.5).tolist() == wanted
    assert [pruned(vector, 0.5) for vector in vectors.tolist()] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "sparsity"), [(64, 0.7), (20, 0.35), (63, 0.5), (8, 0.99)])
def test_vectors_against_a_loop(dtype, size, sparsity):
    """Small integers, so that magnitudes are often the same."""
    vectors = torch.randint(-6, 7, (40, size), generator=torch.Generator().manual_seed(size)).to(dtype)
    found = stored(vectors, sparsity, dtype)
    assert found.tolist() == [pruned(vector, sparsity) for vector in vectors.tolist()]


def test_what_is_packed_comes_back_whatever_the_mask():
    """First set, none but the last set, all set: a map is D bits, the lowest bit the first channel."""
    vectors = torch.zeros(3, 16)
    vectors[0, 0], vectors[1, 15], vectors[2] = 5, -5, torch.arange(1.0, 17)
    kept, maps = pack(vectors, 1)
    assert maps.tolist() == [[1, 0], [0, 128], [0, 128]] and kept.flatten().tolist() == [5, -5, 16]
    kept, maps = pack(vectors, 16)
    assert maps.eq(255).all() and torch.equal(unpack(kept, maps, 16), vectors)


def test_what_is_not_a_number_is_kept_and_spoils_no_other_token():
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1e30
    vectors[1, 6], vectors[2, 7] = torch.nan, -torch.inf
    found = stored(vectors, 0.9)
    assert found[1, 6].isnan() and found[2, 7] == -torch.inf
    assert (found != 0).sum(-1).tolist() == [2, 2, 2, 2] and found[[0, 3]].isfinite().all()


@pytest.mark.parametrize(("length", "steps", "count"), [(15, 0, 0), (16, 0, 8), (40, 0, 32), (4, 31, 24), (40, 9, 40)])
def test_window_and_pruned_tokens_against_a_loop(length, steps, count):
    """Groups of 8 tokens leave the window as soon as 8 newer ones stand behind them: at once or one by one."""
    model, method = subject("llama"), Mustafar(0.7, 0.4, residual=8, group=8)
    cache, plain = kvfold.Cache(model, method), kvfold.Cache(model, "full")
    ids = torch.arange(5, 5 + steps)[None]
    for each in (cache, plain):
        feed(model, each, *tokens(length).values())
        for i in range(steps):
            feed(model, each, ids[:, i : i + 1], torch.ones(1, length + i + 1, dtype=torch.long))
    segment, (ours, true) = (
        cache.paged[0].stored.segments[0][1],
        (c.paged[0].stored.tokens()[0] for c in (cache, plain)),
    )
    assert (segment.coded.counts() == count).all() and (segment.tail.counts() == length + steps - count).all()
    for name, sparsity in (("keys", 0.7), ("values", 0.4)):
        held, whole = getattr(ours, name)[0], getattr(true, name)[0]
        for head in range(2):
            wanted = [pruned(vector, sparsity) for vector in whole[head, :count].tolist()]
            assert held[head, :count].tolist() == wanted  # the first layer's states are the same in both
            assert torch.equal(held[head, count:], whole[head, count:])


def test_the_prompt_is_exact_and_no_sparsity_is_the_full_cache():
    prompt, steps = tokens(60, 43), torch.arange(5, 11).view(2, 3)
    model = subject("llama")
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps)
    whole = follow(model, kvfold.Cache(model, Mustafar(0.0, 0.0, residual=8)), *prompt.values(), steps)
    torch.testing.assert_close(whole, truth, atol=1e-4, rtol=0)
    short = follow(model, kvfold.Cache(model, Mustafar(0.9, 0.9, residual=64)), *prompt.values(), steps)
    torch.testing.assert_close(short, truth, atol=1e-4, rtol=0)  # the window holds all of it
    some = follow(model, kvfold.Cache(model, Mustafar(0.2, 0.2, residual=8)), *prompt.values(), steps)
    torch.testing.assert_close(some[:, 0], truth[:, 0], atol=1e-4, rtol=0)
    assert 0 < (some[:, 1:] - truth[:, 1:]).norm() < 0.5 * truth[:, 1:].norm()


@pytest.mark.parametrize(("sparsity", "count", "share"), [(0.5, 65, 0.656), (0.7, 40, 0.461)])
def test_bytes_are_fewer_than_published(sparsity, count, share):
    """The card's shares of float16 at D = 128: values, padding, bitmaps and offsets. Ours have the positions, too."""
    chunk = Chunk(*torch.zeros(2, 1, 1, 4000, 128, dtype=torch.bfloat16), torch.ones(1, 1, 4000, dtype=torch.bool),
                  {POSITION: torch.arange(4000, dtype=torch.int32)[None, None]})  # fmt: skip
    segment = Mustafar(sparsity, sparsity).format.open(Spec.of(chunk))
    segment.append(chunk, even=True)
    whole = 2 * 128 * 2
    promised = (2 * (2 * count + 128 / 8) + 4) / whole
    assert promised < segment.nbytes / (4000 * whole) < 1.04 * promised < share


@pytest.mark.parametrize(("name", "value"), [
    ("key_sparsity", 1.0), ("value_sparsity", -0.1), ("key_sparsity", "half"), ("residual", -1), ("group", 0),
])  # fmt: skip
def test_bad_options_are_named(name, value, unchecked):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        Mustafar(**{name: value})
