"""LaCache against its card: ladders that shift from layer to layer, fed token by token and as a prompt."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.lacache import LaCache
from views import kept, random_view, spared


def streamed(
    method: LaCache, layers: int, tokens: int, layer: int, chunks: list[int] | None = None, heads: int = 2
) -> list[int]:
    """What layer `layer` of `layers` holds when a text has been read, token by token unless `chunks` say otherwise."""
    paged = tuple(range(layers))
    q = torch.randn(1, heads, tokens, 4, generator=torch.Generator().manual_seed(0))
    cache, start = KVLayer(Rows(method), layer, paged, layers), 0
    for size in chunks or [1] * tokens:
        part = q[:, :, start : start + size]
        cache.attend(part, part, part, None, 0.5, Plan(prefill=size > 1 or start == 0))
        start += size
    left = cache.kept()[0]
    assert left[0] == left[-1]  # all heads of a layer keep the same
    return left[0]


def between(*parts: tuple[int, int, int]) -> list[int]:
    """Whole numbers of several ranges, both ends included."""
    return [n for first, last, step in parts for n in range(first, last + 1, step)]


SMALL = LaCache(budget=16, span=2, sinks=2)
ORACLE = {
    17: ([0, 1, 2, *range(4, 17)], [0, 1, *range(3, 17)]),
    20: (between((0, 2, 1), (4, 10, 2), (11, 19, 1)), [0, 1, 3, 5, 7, 9, *range(10, 20)]),
    26: (between((0, 0, 1), (1, 1, 1), (2, 20, 2), (22, 25, 1)), between((0, 1, 1), (3, 21, 2), (22, 25, 1))),
    30: ([0, 1, 2, 6, 10, 14, 18, 20, *range(22, 30)], [0, 1, 5, 9, 13, 17, 19, 21, *range(22, 30)]),
    40: ([0, 1, 2, 10, 18, 24, 28, 30, *range(32, 40)], [0, 1, 9, 17, 23, 27, 29, 31, *range(32, 40)]),
}


@pytest.mark.parametrize("tokens", ORACLE)
def test_oracle_1_and_2_ladders_and_a_new_start(tokens):
    for layer in range(4):
        assert streamed(SMALL, 4, tokens, layer) == ORACLE[tokens][layer % 2]


@pytest.mark.parametrize(("tokens", "held"), [(18, 15), (21, 15)])
def test_oracle_3_a_ladder_frees_several_tokens(tokens, held):
    for layer in range(4):
        left = streamed(LaCache(budget=17, span=1, sinks=2), 4, tokens, layer)
        ladders = [2 + layer + 4 * j for j in range(2 if tokens == 21 else 1)]
        assert left == [0, 1, *ladders, *range(10 if tokens == 21 else 6, tokens)] and len(left) == held


def test_oracle_4_together_the_layers_know_everything_until_the_new_start():
    for span, start in ((2, 26), (1, 40)):
        method = LaCache(budget=16, span=span, sinks=2)
        left = [set(streamed(method, 4, start, layer)) for layer in range(4)]
        assert set().union(*left) == set(range(start)) and all(len(kept) <= 16 for kept in left)


@pytest.mark.parametrize("budget", [20, 100, 1.0])
def test_oracle_5_nothing_goes_when_there_is_room(budget):
    assert streamed(LaCache(budget=budget, span=2), 4, 20, 1) == list(range(20))
    assert kept(LaCache(budget=budget), random_view(B=2, H=2, T=20, left_pad=(0, 6)))[1] == [list(range(14))] * 2


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 6), st.sampled_from(["cyclic", "consecutive"]))
def test_oracle_6_sinks_and_the_newest_are_in_every_layer(tokens, budget, sinks, ladder):
    method = LaCache(budget=budget, span=2, sinks=sinks, ladder=ladder)
    for layer in (0, 3):
        for chunks in ([tokens], [1] * tokens):
            left = streamed(method, 4, tokens, layer, chunks)
            assert len(left) <= min(budget, tokens)
            assert left[-min(4, len(left)) :] == list(range(tokens - min(4, len(left)), tokens))
            if budget > 4 + sinks and budget <= tokens:
                assert left[:sinks] == list(range(sinks))


def slow_lacache(method: LaCache, layers: int, layer: int, size: int, feeds: list[int]) -> list[int]:
    """The card, list by list: tokens come in portions, and what is over `size` is laddered away.

    Ours: of what a portion of several tokens frees too many of, the newest come back.
    """
    span, overlap = method.span, method.overlap
    before = 1 + math.ceil((layers - span) / (span - overlap))
    after = min(math.ceil(span / (span - overlap)), before)
    freed, cursor, cache, text = before - after, method.sinks, [], 0
    for fed in feeds:
        cache += range(text, text + fed)
        text += fed
        need = len(cache) - size
        if need <= 0:
            continue
        whole, slack = cache, size - cursor - layers
        can = slack // after * freed
        ladders = math.ceil(need / freed) if need <= can else slack // after
        turn = layer % (freed + 1)
        rungs = [cursor + turn + before * j + k for j in range(ladders) for k in range(after)]
        end = cursor + before * ladders
        border = cache[end] if end < len(cache) else text
        cache = [cache[i] for i in [*range(cursor), *rungs, *range(end, len(cache))]]
        cursor += ladders * after
        if need > can:
            times = math.ceil((need - can) / ((size - method.sinks - layers) // after * freed))
            wide = before + (times - 1) * (before - 1)
            turn, ladders = layer % (wide - after + 1), math.ceil((need - can) / (wide - after))
            rungs = [method.sinks + turn + wide * j + times * k for j in range(ladders) for k in range(after)]
            end = method.sinks + wide * ladders
            border, rest = cache[end] if end < len(cache) else text, range(end, len(cache))
            cache = [cache[i] for i in sorted({*range(method.sinks), *rungs, *rest})]
            cursor = method.sinks + ladders * after
        if fed > 1 and len(cache) < size:
            back = [token for token in whole if token not in cache][len(cache) - size :]
            cache, cursor = sorted(cache + back), cursor + sum(token < border for token in back)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "span", "overlap", "sinks", "size"),
    [(4, 2, 0, 2, 16), (6, 1, 0, 2, 24), (6, 3, 0, 4, 30), (8, 4, 2, 3, 40), (9, 5, 2, 1, 36), (8, 3, 1, 0, 33)],
)
def test_against_a_loop(layers, span, overlap, sinks, size):
    method = LaCache(budget=size, span=span, overlap=overlap, sinks=sinks)
    for layer in (0, layers // 2, layers - 1):
        for tokens in (size + 1, 2 * size, 3 * size + 5):
            assert streamed(method, layers, tokens, layer) == slow_lacache(method, layers, layer, size, [1] * tokens)


@pytest.mark.parametrize(("layers", "size"), [(4, 17), (4, 18), (6, 16)])
def test_every_length_of_ladders_that_free_several_tokens(layers, size):
    """The oldest rungs stay, whatever of the newest a ladder reaches."""
    method = LaCache(budget=size, span=1, sinks=2)
    for layer in (0, layers - 1):
        for tokens in range(size + 1, 3 * size + 5):
            assert streamed(method, layers, tokens, layer) == slow_lacache(method, layers, layer, size, [1] * tokens)


def test_a_budget_without_room_for_a_ladder_keeps_both_ends():
    method = LaCache(budget=8, span=15)
    for feeds in ([40], [40, 1, 1, 1], [1] * 43):
        assert streamed(method, 30, sum(feeds), 3, feeds) == spared(sum(feeds), 8, 43)


@pytest.mark.parametrize("tokens", [17, 30, 60, 200])
def test_a_long_prompt_is_cut_at_once(tokens):
    for layer in range(4):
        assert streamed(SMALL, 4, tokens, layer, [tokens]) == slow_lacache(SMALL, 4, layer, 16, [tokens])


@pytest.mark.parametrize("tokens", [25, 31, 64])
def test_a_prompt_uses_the_budget_up(tokens):
    """Ladders of 4 free 3 tokens: of those that need not go, the newest stay."""
    method = LaCache(budget=20, span=1, sinks=2)
    for layer in range(4):
        left = streamed(method, 4, tokens, layer, [tokens])
        assert len(left) == 20 and left == slow_lacache(method, 4, layer, 20, [tokens])


def test_a_second_turn_goes_on_where_the_first_stood():
    for feeds in ([20, 7, 1, 1, 30], [3, 3, 40, 2]):
        for layer in range(4):
            assert streamed(SMALL, 4, sum(feeds), layer, feeds) == slow_lacache(SMALL, 4, layer, 16, feeds)


LONG = pytest.param([150, *[1] * 30], marks=pytest.mark.slow)


@pytest.mark.parametrize("feeds", [[50], [50, *[1] * 9], [53, 1, 1, 1], LONG])
@pytest.mark.parametrize("budget", [0.31, 0.33, 0.507])
def test_layers_interlock_where_a_fraction_gives_some_one_token_more(budget, feeds):
    """What a layer holds over the others does not move its ladders: beside it, it is a cache of the floor."""
    layers, even, more = 8, int(budget * feeds[0]), 0
    for layer in range(layers):
        left, floor = (
            streamed(LaCache(budget=each, span=3, sinks=1), layers, sum(feeds), layer, feeds, heads=1)
            for each in (budget, even)
        )
        assert set(floor) <= set(left) and len(left) - len(floor) in (0, 1)
        more += len(left) - len(floor)
    assert more == int(budget * feeds[0] * layers) - even * layers


@pytest.mark.parametrize("feeds", [[30, 30], [41, 3, 3, 1, 1, 20], [100, 1, 1, 50]])
def test_with_a_fraction_further_turns_move_all_ladders_alike(feeds):
    """Without what some hold over the others, layers of the same rung hold the same."""
    method, left = LaCache(budget=0.505, span=2, sinks=1), []
    for layer in (0, 2):
        left.append(streamed(method, 4, sum(feeds), layer, feeds, heads=1))
    assert 0 <= len(left[0]) - len(left[1]) <= 1 and set(left[1]) <= set(left[0])


def test_with_a_fraction_too_the_layers_know_everything_until_the_new_start():
    method = LaCache(budget=0.75, span=2, sinks=2)
    left = [streamed(method, 4, 30, layer, [30], heads=1) for layer in range(4)]  # 22.5 tokens a layer
    assert sorted(map(len, left)) == [22, 22, 23, 23] and set().union(*left) == set(range(30))
    more = [streamed(method, 4, 33, layer, [30, 1, 1, 1], heads=1) for layer in range(4)]
    assert set().union(*more) == set(range(33)) and sum(map(len, more)) <= 90


def test_consecutive_layers_share_a_rung():
    method = LaCache(budget=16, span=2, sinks=2, ladder="consecutive")
    even, odd = ORACLE[20]
    assert [streamed(method, 4, 20, layer) for layer in range(4)] == [even, even, odd, odd]


def test_half_of_the_layers_by_default_and_a_ladder_always_frees_something():
    assert LaCache().rungs(32) == LaCache(span=16).rungs(32) == (2, 1, 16)
    assert LaCache(span=8, overlap=4).rungs(32) == (7, 2, 4)
    assert LaCache(span=9).rungs(4) == (2, 1, 9)
    assert LaCache().rungs(1) == (2, 1, 1)


def test_compact_positions_are_an_option():
    assert LaCache(positions="compact").compact and not LaCache().compact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"span": 0}, "span=0 must be an int >= 1"),
        ({"span": 4, "overlap": 4}, "overlap=4 must be less than span=4"),
        ({"overlap": -1}, "overlap=-1 must be an int >= 0"),
        ({"sinks": -1}, "sinks=-1 must be an int >= 0"),
        ({"ladder": "rope"}, "ladder='rope' must be one of 'cyclic', 'consecutive'"),
        ({"positions": "none"}, "positions='none' must be one of 'original', 'compact'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LaCache(**options)
