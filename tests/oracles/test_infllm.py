"""InfLLM against its card: what stands for a block, which are read, and where what is far away stands."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Indexed, Spec
from kvfold.hf.rope import find_ropes
from kvfold.layer.layer import DENSE
from kvfold.methods.infllm import InfLLM
from kvfold.selectors import Representatives, looked
from kvfold.testing import feed, follow, grow, tokens
from kvfold.testing import steps as forced
from kvfold.views import Site
from models import dynamic, reference, subject

H, G, D = 2, 2, 16
SITE = Site(0, 0, (0,), 1)
SMALL = InfLLM(40, block=4, sinks=4, local=12, representatives=2)


def rope():
    return find_ropes(subject("llama"))[0]


def spec(rows: int = 1) -> Spec:
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), rope=rope(), group=G)


def stored(method: InfLLM, number: int, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, H, number, D, generator=rng)
    places = torch.arange(number, dtype=torch.int32).expand(1, H, number)
    given = {looked(head): torch.rand(1, H, number, generator=rng) for head in range(G)}
    chunk = Chunk(keys, values, torch.ones(1, H, number, dtype=torch.bool), {POSITION: places, **given})
    segment = Indexed(DENSE, method.selection(SITE)).open(spec())
    segment.append(chunk)
    return segment, chunk


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "yarn"])
@pytest.mark.parametrize("budget", [1.0, 90])
def test_oracle_1_within_the_window_it_is_full_attention(family, budget):
    prompt, said = tokens(60, 33), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    method = InfLLM(budget, block=4, sinks=4, local=68)
    assert_close(follow(subject(family), kvfold.Cache(subject(family), method), *prompt.values(), said), dense,
                 atol=1e-4, rtol=0)  # fmt: skip
    # One token more than the window: what is further stands elsewhere, and nothing is as it was.
    far = InfLLM(budget, block=4, sinks=4, local=40)
    got = follow(subject(family), kvfold.Cache(subject(family), far), *prompt.values(), said)
    assert_close(got[1, :7], dense[1, :7], atol=1e-4, rtol=0)  # 33 + 7 tokens
    assert float((got[0, 1:] - dense[0, 1:]).abs().max()) > 1e-4


@pytest.mark.parametrize(("more", "blocks"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_oracle_2_which_tokens_are_blocks(more, blocks):
    """Of sinks + window + 5 tokens the four behind the sinks are one; of a token fewer, none (see its docstring)."""
    selection = SMALL.selection(SITE)
    count = 4 + 12 + more
    units = np.array([[-(-count // 4)]])
    always = selection.always.units(4, units, np.array([100]))
    free = ~always[0, 0]
    assert free.nonzero()[0].tolist() == list(range(1, 1 + blocks))


def test_oracle_3_the_representatives_of_a_block():
    keys = torch.eye(4)[None, None].repeat(1, 1, 1, 4)  # a, b, c, d of 16 numbers
    places = torch.zeros(1, 1, 4, dtype=torch.int32)
    columns = {POSITION: places, looked(0): torch.tensor([[[0.1, 0.5, 0.2, 0.4]]]), looked(1): torch.zeros(1, 1, 4)}
    one = Spec(1, 1, 16, 16, torch.float32, torch.device("cpu"), rope=rope(), group=2)
    index = Representatives(4, 2, 7).open(one)
    index.extend(Chunk(keys, keys, torch.ones(1, 1, 4, dtype=torch.bool), columns), np.zeros((1, 1), dtype=np.int64))
    first, second = index.held[0, 0, 0].view(2, 16)
    assert_close(first, (keys[0, 0, 1] + keys[0, 0, 3]) / 2)
    assert_close(second, keys[0, 0].mean(0))  # nobody looked: all of them


def test_the_score_of_a_block_is_of_all_heads():
    segment, chunk = stored(SMALL, 80)
    q = torch.randn(1, H, G, D, generator=torch.Generator().manual_seed(1))
    selection = SMALL.selection(SITE)
    read = selection.choose(segment.index, q, segment.counts(), np.array([80]))[0].mask
    plain = rope().shift(chunk.keys, -chunk.positions)
    asked = rope().shift(q, torch.full((1, H, G), 11 - 79, dtype=torch.int32))
    scores = torch.zeros(20)
    for block in range(20):
        mine = slice(4 * block, 4 * block + 4)
        for h in range(H):
            for g in range(G):
                best = chunk.columns[looked(g)][0, h, mine].argsort(descending=True)[:2]
                scores[block] += asked[0, h, g] @ plain[0, h, mine][best].mean(0)
    always = selection.always.units(4, np.full((1, H), 20), np.array([10]))
    assert always[0, 0].nonzero()[0].tolist() == [0, 16, 17, 18, 19][-int(always[0, 0].sum()) :]
    left = torch.from_numpy(~always[0, 0])
    best = scores.masked_fill(~left, -torch.inf).topk(10 - int(always[0, 0].sum())).indices.tolist()
    for h in range(H):
        assert set(read[0, h, 0].nonzero()[0].tolist()) == set(best) | set(always[0, h].nonzero()[0].tolist())


def step(segment, place: int, seed: int = 9):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, H, n, 1, D, generator=rng) for n in (G, 1, 1))
    out, lse, left = segment.step(q, k[:, :, 0], v[:, :, 0], torch.tensor([[place]]), 0.25, weights=True)
    return out, lse, left, (q, k[:, :, 0], v[:, :, 0])


def test_oracle_4_every_token_once_and_far_ones_at_one_distance():
    """All is read: two parts by definition, each with its own queries, under one softmax."""
    segment, chunk = stored(InfLLM(1.0, block=4, sinks=4, local=12), 50)
    out, _, left, (q, k, v) = step(segment, 50)
    assert_close(left.sum(-1), torch.ones(1, H, G, 1), atol=1e-5, rtol=0)
    assert left.shape[-1] == 51 and (left > 0).all()
    keys, values = torch.cat([chunk.keys, k], 2), torch.cat([chunk.values, v], 2)
    far = rope().shift(keys[:, :, :39], -torch.arange(39, dtype=torch.int32).expand(1, H, 39))
    asked = rope().shift(q[:, :, :, 0], torch.full((1, H, G), 11 - 50, dtype=torch.int32))
    logits = torch.cat([asked @ far.mT, q[:, :, :, 0] @ keys[:, :, 39:].mT], -1) * 0.25
    assert_close(out[:, :, :, 0], logits.softmax(-1) @ values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1.0, 24])
def test_oracle_5_what_is_far_has_no_order(budget):
    method = InfLLM(budget, block=4, sinks=4, local=12)

    def told(order: list[int]) -> torch.Tensor:
        _, chunk = stored(method, 49)
        segment = Indexed(DENSE, method.selection(SITE)).open(spec())
        plain = rope().shift(chunk.keys, -chunk.positions)[:, :, order]
        given = {name: x[..., order] for name, x in chunk.columns.items() if name != POSITION}
        columns = {POSITION: chunk.positions, **given}
        segment.append(Chunk(rope().shift(plain, chunk.positions), chunk.values[:, :, order], chunk.valid, columns))
        return step(segment, 49)[0]

    blocks = list(range(49))
    blocks[4:8], blocks[20:24] = blocks[20:24], blocks[4:8]
    assert_close(told(blocks), told(list(range(49))), atol=1e-5, rtol=0)
    window = list(range(49))
    window[44], window[46] = window[46], window[44]
    assert not torch.allclose(told(window), told(list(range(49))), atol=1e-3)


@pytest.mark.parametrize("local", [200, 16])
def test_what_tokens_got_of_the_queries_in_the_window_behind_them(local):
    """By a slow loop over a layer's attention, padding and further turns included."""
    model, prompt = subject("llama"), tokens(50, 37)
    seen = []
    cache = kvfold.Cache(model, InfLLM(16, block=4, sinks=4, local=local))
    with cache.observed(lambda view: seen.append((view.attention(view.new), view.positions, view.valid))):
        feed(model, cache, *prompt.values())
    for layer, (attention, positions, valid) in enumerate(seen):
        _, columns = cache.paged[layer].segments[0][1].columns()
        for row, length in enumerate((50, 37)):
            mine = attention[row, :, :, 50 - length :][..., valid[row, 0]]  # H G Q T
            behind = torch.arange(length)[:, None] - torch.arange(length)
            want = (mine * ((behind >= 0) & (behind < local))).sum(2)
            for head in range(mine.shape[1]):
                assert_close(columns[looked(head)][row, :, :length], want[:, head], atol=1e-4, rtol=0)
        assert positions.shape == valid.shape


def test_a_further_turn_leaves_what_blocks_were_made_by():
    model, prompt = subject("llama"), tokens(40)
    cache = kvfold.Cache(model, InfLLM(16, block=4, sinks=4, local=12))
    feed(model, cache, *prompt.values())
    layer = cache.paged[0].segments[0][1]
    before, held = layer.columns()[1][looked(0)].clone(), layer.index.held[:, :, :10].clone()
    mask = prompt["attention_mask"]
    for at in forced(1, 3).T:
        mask = grow(mask)
        feed(model, cache, at[:, None], mask)
    generated = layer.columns()[1][looked(0)][..., 40:]
    assert generated.shape[-1] == 3 and not generated.any()
    feed(model, cache, tokens(9, seed=5)["input_ids"], torch.ones(1, 52, dtype=torch.long))
    assert torch.equal(layer.columns()[1][looked(0)][..., :40], before)
    assert torch.equal(layer.index.held[:, :, :10], held)
    assert (layer.columns()[1][looked(0)][..., 43:] > 0).all()


def test_what_is_always_read_shrinks_with_the_budget():
    for length, exempt in ((6272, 3), (62720, 34)):
        selection = InfLLM(0.1).selection(SITE)
        units, room = np.array([[length // 128]]), selection.room(np.array([length]))
        always = selection.always.units(128, units, room)
        assert room[0] == length // 1280 and always.sum() == exempt
    whole = InfLLM(6272).selection(SITE)
    always = whole.always.units(128, np.array([[1000]]), whole.room(np.array([128000])))
    assert always[0, 0, 0] and always[0, 0, -32:].all()


def test_heads_that_hold_other_tokens_choose_for_themselves():
    with pytest.raises(ValueError, match=r"let all heads read the same tokens, and .*snapkv.* may leave each head"):
        kvfold.parse("snapkv(budget=0.5) | infllm")
    model, prompt = subject("llama"), tokens(80, 70)
    for text in ("snapkv(budget=0.5) | infllm(budget=16, block=4, vote='group')", "infllm(budget=16, block=4) | kivi"):
        cache = kvfold.Cache(model, text)
        feed(model, cache, *prompt.values())
        assert feed(model, cache, forced(2, 1), grow(prompt["attention_mask"])).isfinite().all()


def test_it_must_know_how_keys_turn():
    with pytest.raises(ValueError, match="needs the model's RoPE, and layer 0 has none"):
        Representatives(4).open(Spec(1, 1, 8, 8, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "said"), [({"block": 0}, "block=0"), ({"sinks": -1}, "sinks=-1"), ({"local": 0}, "local=0"),
                          ({"representatives": 0}, "representatives=0"), ({"vote": "all"}, "vote='all'")]
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        InfLLM(**options)
