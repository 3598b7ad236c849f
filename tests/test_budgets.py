"""Budgets: one rounding rule, a sum that is never exceeded."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.budgets import allocate, check_budget, is_all, round_shares
from kvfold.budgets.allocate import exempt_layers
from kvfold.options import check_choice, check_int, check_ints, check_number

MANY = settings(max_examples=150)
fractions = st.floats(0.001, 1.0)
weights = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=12).filter(lambda w: sum(w) > 0.1)


def total(table) -> int:
    return sum(map(sum, table))


def test_floor_then_the_largest_fractions_ties_to_the_lower_index():
    assert round_shares(np.array([2.3, 1.6, 0.1]), 9).tolist() == [2, 2, 0]
    assert round_shares(np.array([1.5, 1.5, 1.5]), 9).tolist() == [2, 1, 1]
    assert round_shares(np.array([0.25] * 4), 9).tolist() == [1, 0, 0, 0]
    assert round_shares(np.array([0.9, 0.9]), 9).tolist() == [1, 0]  # 1.8 becomes 1
    assert round_shares(np.array([[1.2, 1.4], [1.4, 2.0]]), 9).tolist() == [[1, 2], [1, 2]]


def test_a_cap_hands_on_in_proportion():
    assert round_shares(np.array([10.0, 2.0, 1.0]), 7).tolist() == [7, 4, 2]
    assert round_shares(np.array([10.0, 6.0, 1.0]), 7).tolist() == [7, 7, 3]  # what is handed on is capped too
    assert round_shares(np.array([10.0, 0.0]), 4).tolist() == [4, 4]
    assert round_shares(np.array([10.0, 10.0]), 4).tolist() == [4, 4]


def test_all_is_a_fraction():
    assert is_all(1.0) and not any(map(is_all, (1, 0.999, 2, True)))


@MANY
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.integers(1, 3))
def test_of_an_even_share_only_a_text_that_is_shorter_changes_anything(budget, seen, layers, heads):
    capped = allocate(budget, 1, min(budget, seen), layers, heads)
    assert capped == allocate(budget, 1, seen, layers, heads) == ((min(budget, seen),) * heads,) * layers


@MANY
@given(st.lists(st.floats(0, 50), min_size=1, max_size=20), st.integers(0, 40))
def test_round_shares_keeps_the_sum_and_the_cap(shares, cap):
    whole = round_shares(np.array(shares), cap)
    assert whole.sum() == min(math.floor(sum(shares) + 1e-9), cap * len(shares))
    assert (whole >= 0).all() and (whole <= cap).all()
    if max(shares) <= cap:
        assert (np.abs(whole - np.array(shares)) < 1 + 1e-6).all()


@MANY
@given(fractions, st.integers(1, 5000), st.integers(1, 12), st.integers(1, 8))
def test_a_fraction_is_used_up_and_never_exceeded(budget, length, layers, heads):
    table = allocate(budget, length, length, layers, heads)
    assert len(table) == layers and {len(row) for row in table} == {heads}
    assert total(table) == math.floor(budget * length * layers * heads + 1e-6)
    flat = [n for row in table for n in row]
    assert max(flat) - min(flat) <= 1 and flat == sorted(flat, reverse=True)


@MANY
@given(st.one_of(fractions, st.integers(1, 300)), st.integers(1, 200), weights, st.integers(1, 4))
def test_weights_share_the_same_sum(budget, length, weights, heads):
    layers = len(weights)
    table = allocate(budget, length, length, layers, heads, tuple(weights))
    each = budget * length if isinstance(budget, float) else budget
    assert total(table) == min(math.floor(each * layers * heads + 1e-6), length * layers * heads)
    assert all(0 <= n <= length for row in table for n in row)
    for row, weight in zip(table, weights, strict=True):
        for other, less in zip(table, weights, strict=True):
            if weight >= less:
                assert sum(row) >= sum(other) - heads  # more weight, no fewer tokens, but for rounding


@MANY
@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 400), st.integers(1, 6), weights)
def test_monotone_in_the_budget(length, one, other, heads, weights):
    low, high = sorted((one, other))
    small, large = (allocate(n, length, length, 3, heads) for n in (low, high))
    assert all(a <= b for x, y in zip(small, large, strict=True) for a, b in zip(x, y, strict=True))
    uneven = [total(allocate(n, length, length, len(weights), heads, tuple(weights))) for n in (low, high)]
    assert uneven[0] <= uneven[1]


@given(st.integers(1, 300), weights)
def test_all_of_it(length, weights):
    for each in (1.0, length, length + 5):
        for share in (None, tuple(max(w, 0.1) for w in weights)):
            table = allocate(each, length, length, len(weights), 2, share)
            assert table == ((length, length),) * len(weights)


def test_one_token_is_not_the_whole_prompt():
    """1 == 1.0 and both hash alike, but a cache of results must not mix them up."""
    for first, second in ((1, 1.0), (1.0, 1)):
        allocate.cache_clear()
        got = {type(n): allocate(n, 50, 50, 1, 2) for n in (first, second)}
        assert got == {int: ((1, 1),), float: ((50, 50),)}


def test_examples():
    assert allocate(0.35, 100, 100, 2, 2) == ((35, 35), (35, 35))
    assert allocate(0.25, 10, 10, 1, 4) == ((3, 3, 2, 2),)  # 2.5 each
    assert allocate(0.1, 3, 3, 2, 2) == ((1, 0), (0, 0))  # 0.3 each: 1.2 in all
    assert allocate(8, 100, 5, 1, 2) == ((5, 5),)
    assert allocate(10, 100, 100, 2, 1, (3.0, 1.0)) == ((15,), (5,))
    assert allocate(10, 100, 12, 2, 1, (3.0, 1.0)) == ((12,), (8,))


@MANY
@given(
    st.lists(st.integers(-40, 40), max_size=6), st.integers(1, 32), st.floats(0.01, 1.0), st.integers(1, 3000),
    st.integers(1, 4),
)  # fmt: skip
def test_exempt_layers_never_cost_more_than_the_budget(layers, depth, budget, length, heads):
    shares = exempt_layers(layers, depth, budget)
    assert sum(shares) == pytest.approx(depth) and min(shares) >= 0.75 - 1e-9
    table = allocate(budget, length, length, depth, heads, shares)
    assert total(table) == math.floor(budget * length * depth * heads + 1e-6)
    chosen = {layer % depth for layer in layers if -depth <= layer < depth}
    for layer in range(depth):
        assert budget * shares[layer] <= 1 + 1e-9 or len(chosen) in (0, depth)
        if chosen and layer not in chosen:
            assert shares[layer] <= min(shares[i] for i in chosen) + 1e-9


def test_exempt_layers_examples():
    assert exempt_layers((), 4, 0.5) == exempt_layers((0, 1, 2, 3), 4, 0.5) == (1.0,) * 4
    assert exempt_layers((0, -1), 4, 1.0) == exempt_layers((9,), 4, 0.5) == (1.0,) * 4
    thirty = exempt_layers((0, 1, -1), 30, 0.5)  # whole: 2 each, the others 24 / 27
    assert thirty[0] == thirty[1] == thirty[29] == 2.0 and thirty[5] == pytest.approx(24 / 27)
    four = exempt_layers((0, 1, -1), 4, 0.2)  # the fourth keeps three quarters, the others the rest
    assert four == pytest.approx((3.25 / 3, 3.25 / 3, 0.75, 3.25 / 3))


@pytest.mark.parametrize("budget", [0, -1, True, False, 0.0, 1.0001, -0.5, float("nan"), float("inf"), "0.5", None])
def test_bad_budgets_are_named(budget):
    with pytest.raises(ValueError, match=r"room=.* must be a fraction of the prompt .* or tokens"):
        check_budget(budget, "room")


@pytest.mark.parametrize("budget", [1, 4096, 1e-6, 0.5, 1.0])
def test_good_budgets(budget):
    check_budget(budget)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda x: check_int("n", x, 3), [3, 4, 2**31 - 1], [2, 3.0, True, "3", None, 10**20]),
        (lambda x: check_int("n", x, 1, odd=True), [1, 5], [0, 2, -1]),
        (lambda x: check_number("n", x, 0.0, 1.0), [0, 1, 0.5], [-0.1, 1.1, float("nan"), True, "1", None]),
        (lambda x: check_number("n", x, 0.0), [0, 1e9], [float("inf"), 1e300]),
        (lambda x: check_choice("n", x, ("a", "b")), ["a", "b"], ["c", None, ["a"], 1]),
        (lambda x: check_ints("n", x), [(), (0, -1)], [(0.5,), 3, "01", (True,), None, [1]]),
    ],
)
def test_checks_of_options_name_the_option_and_the_value(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError) as error:
            check(value)
        assert str(error.value).startswith(f"n={value!r} must be ")
