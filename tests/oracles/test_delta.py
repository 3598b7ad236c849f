"""DELTA against its card: roles, what a delta layer chooses, and which layers read it. More: tests/test_handed.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from delta_paper import FULL, METHOD, paper, six
from kvfold import ops
from kvfold.formats import POSITION, Chosen, Chunk, Dense, Indexed, Kivi, Spec
from kvfold.methods.delta import Delta, spread
from kvfold.selectors import Gives, Selection, Takes, Unremembered
from kvfold.testing import steps as forced
from models import dynamic, follow, greedy, reference, subject, tokens

SPEC = Spec(1, 1, 8, 8, torch.float32, torch.device("cpu"))
DENSE = Delta(1.0, FULL, page=8, recent=16)

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
    units = Takes(giver).take(np.array([[t]]), handed, giver.index.open(SPEC))
    return units.numbers[0, 0, 0].tolist()


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


def test_oracle_2_all_layers_in_it_is_full_attention():
    prompt, said = tokens(90, 61), forced(2, 6)
    assert torch.equal(
        follow(six(), kvfold.Cache(six(), Delta(16, tuple(range(6)))), *prompt.values(), said),
        follow(six(), kvfold.Cache(six(), "full"), *prompt.values(), said),
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
def test_oracle_4_a_budget_of_all_there_is_is_full_attention_bit_by_bit(method):
    prompt, said = tokens(120, 83), forced(2, 6)
    dense = follow(six(), kvfold.Cache(six(), "full"), *prompt.values(), said)
    assert torch.equal(follow(six(), kvfold.Cache(six(), method), *prompt.values(), said), dense)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_oracle_4_against_transformers(family):
    prompt, said = tokens(40, 23), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), Delta(64)), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(150,), (150, 150), (150, 90, 20)], ids=str)
def test_oracle_5_layers_read_what_the_one_before_them_chose_in_the_same_step(lengths):
    """Logits of 12 steps as the paper's attention gives them: last step's choice gives others (the last lines)."""
    prompt, said = tokens(*lengths), forced(len(lengths), 12)
    want = follow(paper(), dynamic(paper()), *prompt.values(), said)
    assert_close(follow(six(), kvfold.Cache(six(), METHOD), *prompt.values(), said), want, atol=2e-4, rtol=0)
    dense = follow(six(), kvfold.Cache(six(), "full"), *prompt.values(), said)
    assert not torch.allclose(dense[0, 1:], want[0, 1:], atol=1e-2)

    kept = {}
    plain = Takes.take

    def late(self, counts, handed, remembered):  # what the step before has handed on
        before = kept.get(self.of)
        kept[self.of] = handed.get(self.of)
        if before is None or before[1] is None:
            return plain(self, counts, handed, remembered)
        wide = Chosen(before[1].numbers, before[1].counts, int(-(-counts.max() // self.unit)))
        return wide.of_heads(np.zeros(counts.shape[1], dtype=np.int64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Takes, "take", late)
        stale = follow(six(), kvfold.Cache(six(), METHOD), *prompt.values(), said)
    assert not torch.allclose(stale[0, 2:], want[0, 2:], atol=1e-2)


def test_oracle_5_two_layers_choose_apart(monkeypatch):
    handed = []
    plain = Gives.give

    def noted(self, *given):
        plain(self, *given)
        handed.append((self.layer, given[-1][self][1].mask))

    monkeypatch.setattr(Gives, "give", noted)
    follow(six(), kvfold.Cache(six(), METHOD), *tokens(150).values(), forced(1, 4))
    assert [layer for layer, _ in handed] == [1, 3] * 4
    assert any((one != two).any() for (_, one), (_, two) in zip(handed[::2], handed[1::2], strict=True))


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
    held, (counts, units) = segment.dense(), handed[form][giver]
    assert counts.tolist() == [[100, 100], [71, 71]] and units.mask.shape == (2, 1, 1, 13)
    for row in range(2):
        own = held.keys[row][held.valid[row]].view(2, -1, 16)
        token = (q[row, :, :, 0] @ own.mT * 0.25).softmax(-1).amax((0, 1))
        worth = torch.stack([some.sum() for some in token.split(8)])
        want = sorted([*worth[:-1].topk(3).indices.tolist(), len(worth) - 1])
        assert units.mask[row, 0, 0].nonzero()[0].tolist() == want


def test_sparse_layers_read_few_tokens(monkeypatch):

    seen, plain = [], ops.attend_pages
    monkeypatch.setattr(
        ops, "attend_pages", lambda q, table, *a, **b: seen.append(int(table.lengths.max())) or plain(q, table, *a, **b)
    )
    method = Delta(64, FULL, recent=16)  # pages of 16, which are what a segment has
    follow(six(), kvfold.Cache(six(), method), *tokens(200).values(), forced(1, 1))
    # The plain layer has a kernel of its own. Three whole pages, and the nine tokens of the open one.
    assert seen == [201, 57, 201, 57, 57]


@pytest.mark.parametrize(
    "text", ["snapkv(budget=0.5) | delta", "delta | streamingllm(budget=0.5)", "fastkv | delta", "delta | mikv",
             "minicache | delta", "delta | quest"],
)  # fmt: skip
def test_where_heads_or_layers_hold_other_tokens_it_is_refused(text):
    with pytest.raises(ValueError, match=r"read the same tokens, and|in a format of their own|two stages that choose"):
        kvfold.parse(text)


def test_codes_are_read_in_parts():
    text = "delta(budget=64, layers=(0, 1, 3), page=32) | kivi(bits=4, residual=32)"
    prompt, said = tokens(200), forced(1, 5)
    got = follow(six(), kvfold.Cache(six(), text), *prompt.values(), said)
    plain = follow(six(), kvfold.Cache(six(), "kivi(bits=4, residual=32)"), *prompt.values(), said)
    assert_close(got[:, 0], plain[:, 0])
    assert not torch.allclose(got, plain, atol=1e-3)
    whole = follow(six(), kvfold.Cache(six(), text.replace("budget=64", "budget=1.0")), *prompt.values(), said)
    assert_close(whole, plain, atol=1e-5, rtol=0)


def test_it_generates():
    prompt = tokens(150, 131)
    got, _ = greedy(six(), kvfold.Cache(six(), METHOD), *prompt.values(), 10)
    want, _ = greedy(paper(), dynamic(paper()), *prompt.values(), 10)
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
