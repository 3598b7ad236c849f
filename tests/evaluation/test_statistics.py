"""Intervals, tests and fronts against brute force, known cases and what must hold for any numbers."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.evaluation import statistics
from kvfold.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_means,
    holm,
    pareto_front,
    percentile_interval,
    permutation_test,
    resampled_indices,
)

numbers = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=9)


def test_bootstrap_means_are_those_of_the_drawn_units():
    sums, sizes = [3.0, 1.0, 8.0, 2.0], [2, 1, 4, 1]
    drawn = np.concatenate(list(resampled_indices(4, 50, seed=3)))
    slow = [sum(sums[i] for i in row) / sum(sizes[i] for i in row) for row in drawn]
    np.testing.assert_allclose(bootstrap_means(sums, sizes, resamples=50, seed=3), slow)
    assert len({tuple(row) for row in drawn}) > 30 and drawn.min() == 0 and drawn.max() == 3


def test_blocks_cover_all_resamples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "BLOCK", 30)
    shapes = [block.shape for block in resampled_indices(7, 11)]
    assert shapes == [(4, 7), (4, 7), (3, 7)]
    assert bootstrap_means(range(7), resamples=11).shape == (11,)


@given(numbers, st.integers(0, 5))
def test_an_interval_lies_within_the_values_and_is_the_same_again(values: list[float], seed: int):
    low, high = bootstrap_interval(values, seed=seed)
    assert min(values) <= low <= high <= max(values)
    assert (low, high) == bootstrap_interval(values, seed=seed)
    wider = bootstrap_interval(values, 0.99, seed=seed)
    assert wider[0] <= low and high <= wider[1]


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values, resamples=4000)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = [low <= 0.7 <= high for low, high in (bootstrap_interval(rng.random(60) < 0.7) for _ in range(300))]
    assert 0.90 <= np.mean(hits) <= 0.98


def test_percentiles():
    assert percentile_interval(np.arange(101), 0.9) == pytest.approx((5.0, 95.0))


@given(numbers)
def test_few_differences_are_tested_exactly(differences: list[float]):
    patterns = list(product((1, -1), repeat=len(differences)))
    totals = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in patterns]
    expected = np.mean([total >= abs(sum(differences)) - 1e-12 for total in totals])
    assert permutation_test(differences) == pytest.approx(expected)


def test_known_permutations():
    assert permutation_test([1.0] * 6) == 2 / 2**6
    assert permutation_test([0.0, 0.0]) == 1.0
    assert permutation_test([2.0, 0.0, -2.0]) == 1.0


def test_random_signs_come_near_the_exact_answer(monkeypatch: pytest.MonkeyPatch):
    differences = np.random.default_rng(2).normal(0.4, 1, 13)
    exact = permutation_test(differences)
    monkeypatch.setattr(statistics, "EXACT", 0)
    assert permutation_test(differences) == pytest.approx(exact, abs=0.02)
    assert permutation_test(np.ones(60), resamples=999) == 1 / 1000


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(3)
    found = [permutation_test(rng.normal(size=20), resamples=500, seed=i) for i in range(300)]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.09


def test_holm_on_the_textbook_case():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.5]), [1.0, 1.0])
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_nothing_and_bonferroni(values: list[float]):
    raw, adjusted = np.array(values), holm(values)
    assert (adjusted >= raw).all() and (adjusted <= np.minimum(raw * raw.size, 1)).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]):
    expected = [not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points) for cost, gain in points]
    assert pareto_front([c for c, _ in points], [g for _, g in points]).tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_means([]), "sums="),
        (lambda: bootstrap_means([1.0, float("nan")]), "sums="),
        (lambda: bootstrap_means([1.0], [0]), "sizes="),
        (lambda: bootstrap_means([1.0], resamples=0), "resamples=0"),
        (lambda: percentile_interval([1.0], 1.0), "level=1.0"),
        (lambda: permutation_test([]), "differences="),
        (lambda: holm([1.2]), "p_values="),
        (lambda: pareto_front([1.0], [1.0, 2.0]), "costs="),
        (lambda: pareto_front([float("nan")], [1.0]), "costs="),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
