"""Statistics: intervals against Student's tables, and resampling against what it has to keep."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from fine_tuning.evaluation.records.statistics import Estimate, Resampling, interval

# Student's t at 97.5 %, from the printed tables, by clusters: one degree of freedom less.
STUDENT = {5: 2.776, 10: 2.262, 61: 2.000}
EVEN = norm.ppf((np.arange(20_000) + 0.5) / 20_000)  # a normal distribution without chance


@pytest.mark.parametrize("clusters", STUDENT)
def test_the_expanded_interval_of_a_normal_bootstrap_is_students(clusters):
    # A bootstrap's standard deviation is the biased one: sqrt((n - 1) / n) of the standard error.
    draws = 10 + np.sqrt((clusters - 1) / clusters) * EVEN
    found = interval(10, draws, 0.95, clusters)
    assert (found.value, found.low, found.high) == pytest.approx(
        (10, 10 - STUDENT[clusters], 10 + STUDENT[clusters]), abs=0.05
    )


@pytest.mark.parametrize("clusters", STUDENT)
@pytest.mark.parametrize("draws", [[], student.ppf((np.arange(20_000) + 0.5) / 20_000, 4)])
def test_a_p_value_and_an_end_of_the_interval_say_the_same(clusters, draws):
    found = Estimate(1.0, 0.5, np.asarray(draws), 5 if len(draws) else clusters, studentised=True)
    low = found.interval(0.95).low
    assert low == pytest.approx(1.0 - 0.5 * STUDENT[found.clusters], abs=0.02)
    at_the_end = Estimate(1.0 - low, 0.5, found.draws, found.clusters, studentised=True)
    assert at_the_end.p_not_below_zero(-1) == pytest.approx(0.025, abs=0.001)
    assert at_the_end.p_not_below_zero(1) == pytest.approx(0.975, abs=0.001)


def test_one_draw_in_twenty_may_be_undefined():
    draws = np.arange(1000, dtype=float)
    draws[:50] = np.nan
    assert np.isfinite(interval(500, draws, 0.9, 10).high)
    draws[50] = np.inf
    assert np.isnan(interval(500, draws, 0.9, 10).high)


def test_one_cluster_has_no_interval():
    alone = Estimate(1.0, 0.0, np.zeros(100), 1, studentised=True)
    for found in (alone.interval(0.95), interval(1.0, np.ones(100), 0.95, clusters=1)):
        assert found.value == 1 and np.isnan([found.low, found.high]).all()


def test_clusters_of_unlike_size_are_drawn_alike_often():
    drawn = Resampling.over(["small", *["large"] * 9, *["middle"] * 3], 4000, seed=1)
    assert drawn.taken.shape == (4000, 3)
    assert drawn.taken.mean(axis=0) == pytest.approx(1.0, abs=0.05)
    one = np.ones((13, 1))
    assert set(np.unique(drawn.sums(one))) <= {3 * 1, 3 * 9, 3 * 3, 2 + 9, 2 + 3, 18 + 1, 18 + 3, 6 + 1, 6 + 9, 13}
    assert (drawn.taken == Resampling.over(["small", *["large"] * 9, *["middle"] * 3], 4000, seed=1).taken).all()
