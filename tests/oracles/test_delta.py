"""DELTA against its card: roles, what a delta layer chooses, and that nobody reads what another step has chosen."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Kivi, Spec
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.delta import Delta, spread
from kvfold.selectors import Gives, Selection, Takes, Unremembered
from kvfold.testing import steps as forced
from models import build, dynamic, feed, follow, greedy, grow, reference, subject, tokens

DEEP = {"num_hidden_layers": 6}
FULL = (0, 1, 3)
"""Of six layers: 0 is plain, 1 chooses for 2, and 3 for 4 and 5."""
METHOD = Delta(64, FULL, page=8, recent=16)
DENSE = Delta(1.0, FULL, page=8, recent=16)


def by_definition(roles: tuple[int | None, ...], room: int, page: int, last: int):
    """Attention of transformers' cache in which layers read what DELTA says, in float64, from the paper's words."""
    chosen: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, mask, **kwargs):
        layer, source = module.layer_idx, roles[module.layer_idx]
        if query.shape[2] > 1 or source is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        group, t = query.shape[1] // key.shape[1], key.shape[2]
        k, v = (x.repeat_interleave(group, 1).double() for x in (key, value))
        logits = (query.double() @ k.mT)[:, :, 0] * kwargs["scaling"]
        real = torch.ones(len(query), t, dtype=torch.bool) if mask is None else mask[:, 0, 0, :t]
        logits = logits.masked_fill(~real[:, None], -torch.inf)
        if source == layer:
            chosen[layer] = torch.stack(
                [pages(p[:, r], room, page, last) for p, r in zip(logits.softmax(-1), real, strict=True)]
            )
        elif source is not None:
            read = real.clone()
            for row, own in enumerate(real):
                read[row, own] = chosen[source][row][torch.arange(int(own.sum())) // page]
            logits = logits.masked_fill(~read[:, None], -torch.inf)
        out = logits.softmax(-1)[:, :, None] @ v
        return out.transpose(1, 2).to(query.dtype), None

    def pages(p: torch.Tensor, room: int, page: int, last: int) -> torch.Tensor:
        number = -(-p.shape[-1] // page)
        worth = [float(some.sum()) for some in p.amax(0).split(page)]
        flags = torch.zeros(1024, dtype=torch.bool)
        if number <= room:
            flags[:number] = True
            return flags
        flags[number - last : number] = True
        for n in sorted(range(number - last), key=lambda n: (-worth[n], n))[: room - last]:
            flags[n] = True
        return flags

    return attend


@pytest.fixture(scope="module")
def six():
    """Six layers, for kvfold."""
    return build("llama", **DEEP)


@pytest.fixture(scope="module")
def paper():
    """The same weights with transformers' cache and the paper's attention: 8 pages of 8, of which 2 are recent."""
    AttentionInterface.register("delta-paper", by_definition((None, 1, 1, 3, 3, 3), 8, 8, 2))
    AttentionMaskInterface.register("delta-paper", sdpa_mask)
    model = build("llama", **DEEP)
    model.set_attn_implementation("delta-paper")
    return model


# -- the card ------------------------------------------------------------------------------------------------


def gives(budget: int, page: int, recent: int) -> Gives:
    selection = Delta(budget, page=page, recent=recent).selection(kvfold.views.Site(0, 0, (0, 1, 2), 3))
    assert isinstance(selection, Gives)
    return selection


def chosen(giver: Gives, got: torch.Tensor) -> list[int]:
    """Which units it hands on, of attention (Hq, T) of one row."""
    t, handed = got.shape[-1], {}
    unit = (torch.arange(t) // giver.unit)[None, None]
    giver.give(got[None, None], unit, np.array([[t]]), np.array([t]), handed)
    units = Takes(giver).take(np.array([[t]]), handed)
    return units[0, 0, 0].nonzero()[0].tolist()


def test_oracle_1_the_maximum_over_heads_and_not_the_mean():
    """Of two pages one is read, and neither is recent: a third, of nothing, is the newest."""
    got = torch.tensor([[0.9, 0, 0.05, 0.05, 0, 0], *[[0.1, 0.1, 0.4, 0.4, 0, 0]] * 3])
    assert chosen(gives(4, 2, 2), got) == [0, 2]
    assert chosen(gives(4, 2, 2), got.mean(0, keepdim=True)) == [1, 2]


def test_oracle_1_a_page_is_worth_the_sum_of_its_tokens():
    """And not the sum of each head's pages: the maximum comes first."""
    got = torch.tensor([[0.5, 0.0, 0.3, 0.0, 0.2, 0.0], [0.0, 0.5, 0.4, 0.1, 0.0, 0.0]])
    assert chosen(gives(4, 2, 2), got) == [0, 2]  # 1.0 against 0.5; one head alone has 0.5 in both
    assert chosen(gives(4, 2, 2), torch.tensor([[0.3, 0.3, 0.4, 0, 0, 0]])) == [0, 2]  # a mean or maximum says 1


def test_oracle_2_roles():
    assert Delta(layers=(0, 1, 2, 14, 22)).roles(tuple(range(28)), 28) == (
        None, None, *[2] * 12, *[14] * 8, *[22] * 6
    )  # fmt: skip
    assert Delta(layers=tuple(range(5))).roles(tuple(range(5)), 5) == (None,) * 5
    assert Delta(layers=(0,)).roles(tuple(range(4)), 4) == (0, 0, 0, 0)
    assert Delta(layers=(1, 3)).roles(tuple(range(4)), 4) == (None, 1, 1, None)  # the last has nobody to choose for
    # Sliding windows count in neither kind: neighbours are those among the layers on pages.
    assert Delta(layers=(0, 5)).roles((5, 11, 17), 18) == (5, 5, 5)
    assert Delta(layers=(5, 11)).roles((5, 11, 17), 18) == (None, 11, 11)


def test_roles_where_nobody_says():
    """Ours: nobody is left out, and each choice is read by somebody."""
    assert spread(28) == (0, 1, 2, 10, 19)
    for n in range(2, 81):
        full = spread(n)
        assert list(full) == sorted(set(full)) and full[0] == 0 and full[-1] < n - 1
        roles = Delta().roles(tuple(range(n)), n)
        assert sum(role is not None for role in roles) > n / 2
    assert Delta().roles((4,), 5) == (None,)


def test_oracle_2_all_layers_in_it_is_full_attention(six):
    prompt, said = tokens(90, 61), forced(2, 6)
    assert torch.equal(
        follow(six, kvfold.Cache(six, Delta(16, tuple(range(6)))), *prompt.values(), said),
        follow(six, kvfold.Cache(six, "full"), *prompt.values(), said),
    )


def test_oracle_3_the_best_and_the_last():
    got = torch.zeros(1, 1600)
    got[0, [165, 322, 490]] = torch.tensor([0.5, 0.4, 0.3])
    assert chosen(gives(64, 16, 32), got) == [10, 20, 98, 99]
    for even in (0.0, 1 / 1600):
        assert chosen(gives(64, 16, 32), torch.full((1, 1600), even)) == [0, 1, 98, 99]


@pytest.mark.parametrize(("budget", "recent"), [(64, 8), (6, 3), (4, 2), (2, 1), (1, 1)])
def test_recent_pages_count_and_are_never_all(budget, recent):
    """Of 64 pages 8 by the paper; of few at most half of those beside the newest."""
    got = torch.linspace(1, 0, 1600)[None]
    read = chosen(gives(16 * budget, 16, 128), got)
    assert read == [*range(budget - recent), *range(100 - recent, 100)]


@pytest.mark.parametrize("method", [Delta(400, FULL), DENSE], ids=str)
def test_oracle_4_a_budget_of_all_there_is_is_full_attention_bit_by_bit(six, method):
    prompt, said = tokens(120, 83), forced(2, 6)
    dense = follow(six, kvfold.Cache(six, "full"), *prompt.values(), said)
    assert torch.equal(follow(six, kvfold.Cache(six, method), *prompt.values(), said), dense)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_oracle_4_against_transformers(family):
    prompt, said = tokens(40, 23), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), Delta(64)), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(150,), (150, 150), (150, 90, 20)], ids=str)
def test_oracle_5_layers_read_what_the_one_before_them_chose_in_the_same_step(six, paper, lengths):
    """Logits of 12 steps as the paper's attention gives them: last step's choice gives others (the last lines)."""
    prompt, said = tokens(*lengths), forced(len(lengths), 12)
    want = follow(paper, dynamic(paper), *prompt.values(), said)
    assert_close(follow(six, kvfold.Cache(six, METHOD), *prompt.values(), said), want, atol=2e-4, rtol=0)
    dense = follow(six, kvfold.Cache(six, "full"), *prompt.values(), said)
    assert not torch.allclose(dense[0, 1:], want[0, 1:], atol=1e-2)

    kept = {}
    plain = Takes.take

    def late(self, counts, handed):  # what the step before has handed on
        before = kept.get(self.of)
        kept[self.of] = handed.get(self.of)
        if before is None or before[1] is None:
            return plain(self, counts, handed)
        wide = np.zeros((*before[1].shape[:3], int(-(-counts.max() // self.unit))), dtype=bool)
        wide[..., : before[1].shape[-1]] = before[1]
        return np.repeat(wide, counts.shape[1], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Takes, "take", late)
        stale = follow(six, kvfold.Cache(six, METHOD), *prompt.values(), said)
    assert not torch.allclose(stale[0, 2:], want[0, 2:], atol=1e-2)


def test_oracle_5_two_layers_choose_apart(six, monkeypatch):
    handed = []
    plain = Gives.give

    def noted(self, *given):
        plain(self, *given)
        handed.append((self.layer, given[-1][self][1]))

    monkeypatch.setattr(Gives, "give", noted)
    follow(six, kvfold.Cache(six, METHOD), *tokens(150).values(), forced(1, 4))
    assert [layer for layer, _ in handed] == [1, 3] * 4
    assert any((one != two).any() for (_, one), (_, two) in zip(handed[::2], handed[1::2], strict=True))


# -- whose choice it is --------------------------------------------------------------------------------------


def test_joined_rows_read_what_their_own_layers_chose(six):
    """Of one method, of two with other budgets and other layers, and of one that chooses nothing."""
    methods = [METHOD, METHOD, Delta(40, (0, 2), page=8), kvfold.parse("full")]
    texts, said = [tokens(n, seed=n) for n in (150, 90, 120, 60)], forced(4, 12)
    caches = [kvfold.Cache(six, method) for method in methods]
    for cache, text in zip(caches, texts, strict=True):
        feed(six, cache, *text.values())
    apart = [cache.fork() for cache in caches]
    for other in caches[1:]:
        caches[0].join(other)
    own = [text["attention_mask"] for text in texts]
    mask = torch.stack([torch.arange(150) >= 150 - n for n in (150, 90, 120, 60)]).long()
    for step in said.T:
        mask, own = grow(mask), [grow(each) for each in own]
        both = feed(six, caches[0], step[:, None], mask)
        for row in range(4):
            alone = feed(six, apart[row], step[row : row + 1, None], own[row])
            assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


def test_beams_are_the_papers(six, paper):
    prompt, how = tokens(120, 90), {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    got = six.generate(**prompt, past_key_values=kvfold.Cache(six, METHOD), **how)
    assert got.tolist() == paper.generate(**prompt, past_key_values=dynamic(paper), **how).tolist()


def test_a_crop_leaves_nothing_of_what_was_chosen(six):
    prompt, said, other = tokens(150), forced(1, 8), forced(1, 16)[:, 8:]
    cache, fresh = kvfold.Cache(six, METHOD), kvfold.Cache(six, METHOD)
    want = follow(six, fresh, *prompt.values(), other)
    assert torch.equal(follow(six, cache, *prompt.values(), said)[:, 0], want[:, 0])
    cache.crop(150)
    mask = prompt["attention_mask"]
    for at, step in enumerate(other.T, 1):
        mask = grow(mask)
        assert_close(feed(six, cache, step[:, None], mask)[:, -1], want[:, at], atol=1e-5, rtol=0)


def test_two_caches_in_turn_on_one_model(six):
    texts, said = [tokens(150, seed=1), tokens(140, seed=2)], forced(2, 8)
    want = [
        follow(six, kvfold.Cache(six, METHOD), *text.values(), said[i : i + 1]) for i, text in enumerate(texts)
    ]  # fmt: skip
    caches, masks = [kvfold.Cache(six, METHOD) for _ in texts], [text["attention_mask"] for text in texts]
    for cache, text in zip(caches, texts, strict=True):
        feed(six, cache, *text.values())
    for at in range(8):
        for i, cache in enumerate(caches):
            masks[i] = grow(masks[i])
            got = feed(six, cache, said[i : i + 1, at : at + 1], masks[i])
            assert torch.equal(got[:, -1], want[i][:, at + 1])


def layer_alone(number: int) -> tuple[KVLayer, torch.Tensor, torch.Tensor]:
    """One layer of `METHOD` that has read 100 tokens by itself; its keys and values."""
    rng, rows = torch.Generator().manual_seed(number), Rows(METHOD)
    layer = KVLayer(rows, number, tuple(range(6)), 6)
    keys, values = (torch.randn(1, 2, 103, 8, generator=rng) for _ in range(2))
    layer.attend(torch.randn(1, 4, 100, 8, generator=rng), keys[:, :, :100], values[:, :, :100], None, 0.35, Plan(True))
    return layer, keys, values


@pytest.mark.parametrize("number", [2, 5])
def test_a_layer_by_itself_reads_everything(number):
    """Nobody has chosen for it in its pass, whatever was chosen in others."""
    layer, keys, values = layer_alone(number)
    rng, giver = torch.Generator().manual_seed(9), METHOD.selection(layer.site).of
    for at in range(100, 103):
        q, plan = torch.randn(1, 4, 1, 8, generator=rng), Plan(False)
        if at == 101:  # a pass in which somebody has: its first page and its last
            some = np.zeros((1, 1, 1, 13), dtype=bool)
            some[..., [0, 12]] = True
            plan.handed[giver] = np.full((1, 2), 102), some
        out = layer.attend(q, keys[:, :, at : at + 1], values[:, :, at : at + 1], None, 0.35, plan)
        read = [*range(8), *range(96, 102)] if at == 101 else range(at + 1)
        weights = (q.view(1, 2, 2, 8) @ keys[:, :, read].mT * 0.35).softmax(-1)
        assert_close(out.view(1, 2, 2, 8), weights @ values[:, :, read], atol=1e-5, rtol=0)


def test_a_choice_among_other_tokens_is_refused():
    layer, keys, values = layer_alone(4)
    plan = Plan(False)
    plan.handed[METHOD.selection(layer.site).of] = np.full((1, 2), 99), np.ones((1, 1, 1, 13), dtype=bool)
    with pytest.raises(ValueError, match=r"layer 3 has chosen among \[\[99, 99.* holds \[\[101, 101\]\]"):
        layer.attend(torch.zeros(1, 4, 1, 8), keys[:, :, 100:101], values[:, :, 100:101], None, 0.35, plan)


def test_nothing_is_kept_beyond_a_pass(six, tmp_path):
    cache = kvfold.Cache(six, METHOD)
    prompt = tokens(150, 120)
    full = kvfold.Cache(six, "full")
    for each in (cache, full):
        follow(six, each, *prompt.values(), forced(2, 3))
    read = sum(core.segments[0][1].seen.nbytes for core in cache.paged if isinstance(core.segments[0][0], Indexed))
    assert read == 5 * 2 * 8 and cache.nbytes == full.nbytes + read
    assert all(core.segments[0][1].choice is None for core in cache.paged[1:])
    cache.save(tmp_path / "it.safetensors")
    loaded, mask, steps = kvfold.Cache.load(tmp_path / "it.safetensors", six), prompt["attention_mask"], forced(2, 7)
    for step in steps[:, 3:].T:
        mask = grow(mask) if mask.shape[1] > 150 else torch.nn.functional.pad(mask, (0, 4), value=1)
        assert torch.equal(feed(six, cache, step[:, None], mask), feed(six, loaded, step[:, None], mask))


# -- formats, compositions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("form", [Dense(page_size=8), Dense(page_size=5), Kivi(group=8, residual=8)], ids=str)
def test_what_each_token_gets_is_known_of_every_format(form, leaves, monkeypatch):
    """By a loop over what the segment holds; where units are its pages or not, and where kernels leave no weights."""
    rng = torch.Generator().manual_seed(3)
    giver = Gives(0, Selection(Unremembered(8), 32))
    segment = Indexed(form, giver).open(Spec(2, 2, 16, 16, torch.float32, torch.device("cpu"), group=2))
    valid = torch.arange(100)[None, None] >= torch.tensor([0, 29])[:, None, None]
    keys, values = (torch.randn(2, 2, 100, 16, generator=rng) for _ in range(2))
    places = (valid.cumsum(-1) - 1).clamp(min=0).int().expand(2, 2, 100)
    segment.append(Chunk(keys, values, valid.expand(2, 2, 100).clone(), {POSITION: places}))
    q, handed = torch.randn(2, 2, 2, 1, 16, generator=rng), {}
    if not leaves:
        plain = segment.inner.attend
        monkeypatch.setattr(segment.inner, "attend", lambda *given, weights, **more: plain(*given, **more))
    segment.attend_few(q, 0.25, handed=handed)
    held, (counts, units) = segment.dense(), handed[giver]
    assert counts.tolist() == [[100, 100], [71, 71]] and units.shape == (2, 1, 1, 13)
    for row in range(2):
        own = held.keys[row][held.valid[row]].view(2, -1, 16)
        token = (q[row, :, :, 0] @ own.mT * 0.25).softmax(-1).amax((0, 1))
        worth = torch.stack([some.sum() for some in token.split(8)])
        want = sorted([*worth[:-1].topk(3).indices.tolist(), len(worth) - 1])
        assert units[row, 0, 0].nonzero()[0].tolist() == want


def test_sparse_layers_read_few_tokens(six, monkeypatch):
    from kvfold import ops

    seen, plain = [], ops.attend_pages
    monkeypatch.setattr(
        ops, "attend_pages", lambda q, table, *a, **b: seen.append(int(table.lengths.max())) or plain(q, table, *a, **b)
    )
    method = Delta(64, FULL, recent=16)  # pages of 16, which are what a segment has
    follow(six, kvfold.Cache(six, method), *tokens(200).values(), forced(1, 1))
    # The plain layer has a kernel of its own. Three whole pages, and the nine tokens of the open one.
    assert seen == [201, 57, 201, 57, 57]


@pytest.mark.parametrize(
    "text", ["snapkv(budget=0.5) | delta", "delta | streamingllm(budget=0.5)", "fastkv | delta", "delta | mikv",
             "minicache | delta", "delta | quest"],
)  # fmt: skip
def test_where_heads_or_layers_hold_other_tokens_it_is_refused(text):
    with pytest.raises(ValueError, match=r"read the same tokens, and|in a format of their own|two stages that choose"):
        kvfold.parse(text)


def test_codes_are_read_in_parts(six):
    text = "delta(budget=64, layers=(0, 1, 3), page=32) | kivi(bits=4, residual=32)"
    prompt, said = tokens(200), forced(1, 5)
    got = follow(six, kvfold.Cache(six, text), *prompt.values(), said)
    plain = follow(six, kvfold.Cache(six, "kivi(bits=4, residual=32)"), *prompt.values(), said)
    assert_close(got[:, 0], plain[:, 0])
    assert not torch.allclose(got, plain, atol=1e-3)
    whole = follow(six, kvfold.Cache(six, text.replace("budget=64", "budget=1.0")), *prompt.values(), said)
    assert_close(whole, plain, atol=1e-5, rtol=0)


def test_it_generates(six, paper):
    prompt = tokens(150, 131)
    got, _ = greedy(six, kvfold.Cache(six, METHOD), *prompt.values(), 10)
    want, _ = greedy(paper, dynamic(paper), *prompt.values(), 10)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0}, "budget=0"), ({"page": 0}, "page=0"), ({"recent": 0}, "recent=0"),
        ({"layers": ()}, r"layers=\(\) must be None, or a tuple"), ({"layers": (1, 0)}, "must ascend"),
        ({"layers": (0, 0)}, "must ascend"), ({"layers": (-1,)}, "counted from 0"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Delta(**options)


def test_layers_that_a_model_lacks_are_named():
    with pytest.raises(ValueError, match=r"layers=\(0, 3\) must be of the 3 layers"):
        Delta(layers=(0, 3)).roles((0, 1, 2), 3)
    with pytest.raises(ValueError, match=r"has none of those that attend to the whole text: \(1, 3\)"):
        Delta(layers=(0, 2)).roles((1, 3), 4)
