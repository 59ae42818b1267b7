"""Accuracy, paired differences and McNemar's test."""

import math
from itertools import product

import pytest

from qtool.evaluation.task_statistics import MOST_SUMMED, mcnemar, metric_of


def by_counting(won, lost):
    """The two-sided p-value from every way in which so many coins can fall."""
    count = won + lost
    far = abs(won - lost)
    ways = [sum(1 if side else -1 for side in way) for way in product((0, 1), repeat=count)]
    return sum(abs(way) >= far for way in ways) / len(ways)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 3), (5, 1), (0, 6), (9, 4), (2, 11)])
def test_mcnemar_is_the_two_sided_binomial_test(won, lost):
    assert mcnemar(won, lost) == pytest.approx(by_counting(won, lost))
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_the_two_ways_to_compute_it_meet():
    half = MOST_SUMMED // 2
    for shift in (10, 30, 60):
        exact, rough = mcnemar(half + shift, half - shift), mcnemar(half + shift + 1, half - shift)
        assert rough == pytest.approx(exact, rel=0.15)
    assert mcnemar(600_000, 400_000) < 1e-12


def test_accuracy_has_the_error_of_its_samples():
    values = [1.0] * 30 + [0.0] * 10
    found = metric_of(values, None)
    assert found.value == 0.75
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert found.paired is None


def test_pairs_make_the_error_of_a_difference_small():
    reference = [1.0, 0.0] * 50
    values = [0.0, *reference[1:]]  # one of a hundred is lost
    found = metric_of(values, reference)
    pair = found.paired
    assert (pair.won, pair.lost, pair.p_value) == (0, 1, 1.0)
    assert pair.reference == 0.5
    assert pair.difference == pytest.approx(-0.01)
    assert pair.error == pytest.approx(0.01)
    assert pair.error < found.error / 4


def test_values_between_right_and_wrong_have_no_mcnemar():
    pair = metric_of([0.5, 0.25], [0.25, 1.0]).paired
    assert (pair.won, pair.lost, pair.p_value) == (None, None, None)
    assert pair.difference == pytest.approx(-0.25)


def test_one_sample_has_no_error():
    found = metric_of([1.0], [0.0])
    assert math.isnan(found.error)
    assert math.isnan(found.paired.error)
