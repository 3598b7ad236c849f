"""ShadowKV against its card: what is read, what is exact, and what the rank costs."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Indexed, Spec
from kvfold.formats.chunks import chunk_means
from kvfold.hf.rope import find_ropes
from kvfold.methods.shadowkv import ShadowKV
from kvfold.selectors import Means
from kvfold.testing import feed, follow, grow, tokens
from kvfold.testing import steps as forced
from kvfold.views import Site
from models import dynamic, reference, subject

H, G, D = 2, 2, 16
SITE = Site(0, 0, (0,), 1)
SMALL = ShadowKV(48, rank=6, chunk=4, local=1, outliers=2)


def test_oracle_1_what_is_read_of_a_long_prompt():
    """131,072 tokens, chunks of 8: of 16,384 the last four, 48 outliers and 256 by their landmark, 2,464 tokens."""
    method, n = ShadowKV(2464), 16384
    selection = method.selection(SITE)
    room = selection.room(np.array([131072]))
    assert room.tolist() == [308] and method.format.local == 4
    always = selection.always.units(8, np.array([[n]]), room)
    index = Means(8).open(Spec(1, 1, 2, 2, torch.float32, torch.device("cpu")))
    index.held = torch.randn(1, 1, n, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    q, count = torch.randn(1, 1, 1, 2), np.array([[131072]])
    read = selection.choose(index, q, count, np.array([131072]))[0].mask
    odd = selection.odd.among(index, ~always, room, room[:, None] - always.sum(-1))
    # Of the last four and the one that was last to grow all are always read here: a chunk more, one less by landmark.
    assert read.sum() == 308 and odd.sum() == 48 and always.sum() == 5 and not (odd & always).any()
    assert always[0, 0, -5:].all() and read[0, 0, 0][(odd | always)[0, 0]].all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "yarn"])
def test_oracle_2_all_read_and_every_direction_kept_is_full_attention(family):
    """A prompt of one token again and again: its keys before RoPE are of rank 1 in every layer."""
    prompt, said = tokens(66, 40), forced(2, 8)
    prompt["input_ids"] = torch.where(prompt["attention_mask"] > 0, 7, prompt["input_ids"])
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    cache = kvfold.Cache(subject(family), ShadowKV(1.0, rank=2, chunk=2, local=1, outliers=0))
    assert_close(follow(subject(family), cache, *prompt.values(), said), dense, atol=2e-4, rtol=0)
    assert max(coded(cache)) == 64 and min(coded(cache)) == 64
    # As many numbers as keys have: as they are.
    cache = kvfold.Cache(subject(family), ShadowKV(1.0, rank=512))
    assert_close(follow(subject(family), cache, *prompt.values(), said), dense, atol=1e-4, rtol=0)
    assert max(coded(cache)) == 0


def coded(cache) -> list[int]:
    return [int(layer.segments[0][1].inner.coded.counts().max()) for layer in cache.paged]


def test_oracle_2_keys_that_are_coded_come_back():
    """Keys of the model, in a product of their own rank, which is less than they are numbers."""
    model, prompt, said = subject("llama"), tokens(120, 120), forced(2, 8)
    wide = model.config.num_key_value_heads * (model.config.hidden_size // model.config.num_attention_heads)
    caches = [kvfold.Cache(model, ShadowKV(1.0, rank, 4, 1, 0)) for rank in (wide // 2, wide // 8, wide)]
    near, far, exact = (follow(model, cache, *prompt.values(), said) for cache in caches)
    assert coded(caches[2])[0] == 0 and coded(caches[1])[0] == 116
    assert caches[1].nbytes < caches[2].nbytes
    errors = [float((each - exact)[:, 1:].abs().max()) for each in (near, far)]
    assert 0 < errors[0] < errors[1] and torch.equal(near[:, 0], exact[:, 0])


def test_oracle_2_only_selected_keys_are_in_error():
    """Local and outlier chunks, generated keys and all values are as the model made them."""
    segment, chunk = stored(SMALL, 90)
    tokens = segment.dense()
    assert torch.equal(tokens.values, chunk.values)
    apart = ~torch.isclose(tokens.keys, chunk.keys, atol=1e-6).all(-1)
    _, alike = chunk_means(chunk.keys, 4)
    for head in range(H):
        outliers = alike[0, head, :21].argsort()[:2]
        exact = torch.zeros(90, dtype=torch.bool)
        exact[84:] = True
        for place in outliers.tolist():
            exact[4 * place : 4 * place + 4] = True
        assert torch.equal(apart[0, head], ~exact)


def test_oracle_3_the_order_of_outliers():
    keys = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [1, 0], [-1, 0.1], [10, 0], [10, 1]])[None, None]
    _, alike = chunk_means(keys, 2)
    assert_close(alike.flatten(), torch.tensor([1.0, 0.7071, 0.0, 0.9988]), atol=1e-4, rtol=0)
    index = Means(2).open(Spec(1, 1, 2, 2, torch.float32, torch.device("cpu")))
    index.extend(Chunk(keys, keys, torch.ones(1, 1, 8, dtype=torch.bool)), np.zeros((1, 1), dtype=np.int64))
    odd = ShadowKV(outliers=2).selection(SITE).odd
    for number, want in ((1, [2]), (2, [1, 2])):
        found = odd.among(index, np.ones((1, 1, 4), dtype=bool), np.array([7 * number]), np.array([[7]]))
        assert found[0, 0].nonzero()[0].tolist() == want


def spec(rows: int = 1) -> Spec:
    rope = find_ropes(subject("llama"))[0]
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), rope=rope, group=G)


def stored(method: ShadowKV, number: int, rows: int = 1, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, H, number, D, generator=rng)
    places = torch.arange(number, dtype=torch.int32).expand(rows, H, number)
    chunk = Chunk(keys, values, torch.ones(rows, H, number, dtype=torch.bool), {POSITION: places})
    segment = Indexed(method.format, method.selection(SITE)).open(spec(rows))
    segment.append(chunk)
    return segment, chunk


def test_oracle_4_what_is_read_is_local_or_an_outlier_or_selected():
    """At each step and of each head as many chunks as the budget has, and a slow loop chooses the same."""
    method, rng = ShadowKV(48, rank=6, chunk=4, local=1, outliers=2), torch.Generator().manual_seed(5)
    segment, chunk = stored(method, 90)
    keys = chunk.keys
    for place in range(90, 101):
        q, k, v = torch.randn(3, 1, H, G, 1, D, generator=rng)
        k, v = k[:, :, 0], v[:, :, 0]
        segment.step(q, k, v, torch.tensor([[place]]), 0.25, weights=False)
        keys = torch.cat([keys, k], 2)
        selection = method.selection(SITE)
        read = selection.choose(segment.index, q[:, :, :, 0], segment.counts(), segment.seen)[0].mask
        number, whole = -(-(place + 1) // 4), (place + 1) // 4
        for head in range(H):
            means, alike = (x[0, head] for x in chunk_means(keys, 4))
            local = {number - 1, number - 2}
            odd = [c for c in alike.argsort().tolist() if c not in local][:1]  # 48 of 308 of 12: one
            others = [c for c in range(whole) if c not in local and c not in odd]
            soft = (q[0, head, :, 0] @ means[others].T / D**0.5).softmax(-1).amax(0)
            best = {others[i] for i in soft.topk(9).indices.tolist()}
            assert set(read[0, head, 0].nonzero()[0].tolist()) == local | set(odd) | best


def test_oracle_5_a_group_that_asks_alike_selects_as_one_does():
    segment, _ = stored(SMALL, 90)
    q = torch.randn(1, H, 1, D, generator=torch.Generator().manual_seed(1))
    selection = SMALL.selection(SITE)
    one = selection.choose(segment.index, q, segment.counts(), segment.seen)[0].mask
    three = selection.choose(segment.index, q.expand(1, H, 3, D), segment.counts(), segment.seen)[0].mask
    assert np.array_equal(one, three) and one.shape[2] == 1


def test_outliers_of_the_index_are_held_as_they_are():
    """Whatever comes later: an outlier among the prompt's chunks is one of those that the format keeps exact."""
    segment, _ = stored(SMALL, 90)
    held = segment.inner.coded.joint.exact_at[0] // 4
    room, about = np.array([300]), np.ones((1, H, 21), dtype=bool)
    found = SMALL.selection(SITE).odd.among(segment.index, about, room, np.full((1, H), 21))
    for head in range(H):
        assert found[0, head].nonzero()[0].tolist() == sorted(set(held[head].tolist()))


def test_what_is_read_does_not_grow_with_what_is_generated():
    """The paper reads every generated token: here they are chunks like others."""
    model, prompt = subject("llama"), tokens(60)
    cache = kvfold.Cache(model, ShadowKV(16, rank=6, chunk=4, local=1, outliers=1))
    feed(model, cache, *prompt.values())
    mask, seen = prompt["attention_mask"], []
    inner = type(cache.paged[0].segments[0][1].inner)
    plain = inner.attend

    def counted(self, q, scale, *, read=None, **more):
        seen.append(None if read is None else int(read.sum(-1).max()))
        return plain(self, q, scale, read=read, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "attend", counted)
        for step in forced(1, 60).T:
            mask = grow(mask)
            feed(model, cache, step[:, None], mask)
    assert len(seen) == 3 * 60 and all(n is not None and n <= 16 for n in seen)


def test_always_read_chunks_shrink_with_the_budget():
    for length, last, odd in ((600, 1, 1), (4000, 5, 7), (40000, 5, 48)):
        selection = ShadowKV(0.1).selection(SITE)
        room = selection.room(np.array([length]))
        units = np.array([[length // 8]])
        always = selection.always.units(8, units, room)
        assert always.sum() == last + (length == 600) and int(min(48, room[0] * selection.odd.share)) == odd


def test_padded_rows_are_coded_as_they_are_alone():
    model, said, options = subject("llama"), forced(2, 12), {"rank": 6, "chunk": 4, "local": 1, "outliers": 1}
    both = tokens(90, 61)
    cache = kvfold.Cache(model, ShadowKV(24, **options))
    got = follow(model, cache, *both.values(), said)
    for row in range(2):
        ids, mask = (x[row : row + 1, both["attention_mask"][row].argmax() :] for x in both.values())
        alone = follow(model, kvfold.Cache(model, ShadowKV(24, **options)), ids, mask, said[row : row + 1])
        assert_close(got[row : row + 1], alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("stage", ["snapkv(budget=0.5)", "streamingllm", "kivi", "quest"])
def test_what_it_can_t_stand_beside_is_refused(stage):
    with pytest.raises(ValueError, match=r"method="):
        kvfold.parse(f"{stage} | shadowkv")


@pytest.mark.parametrize(
    ("options", "said"), [({"rank": 0}, "rank=0"), ({"chunk": 0}, "chunk=0"), ({"local": -1}, "local=-1"),
                          ({"outliers": -2}, "outliers=-2"), ({"budget": 0}, "budget=0")]
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        ShadowKV(**options)
