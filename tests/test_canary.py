"""The canary: what its statistics promise, who gets the candidate, what counts as bad, and how it ends."""

import numpy as np
import pytest

from benchmarks.canary import LIVE, USERS, WORSE, alarm, stated
from fine_tuning.evaluation.verdict.win_rate import evidence
from fine_tuning.model_management.canary_statistics import POWER, chance_to_find, harm, smallest_found

# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_evidence_of_harm_is_that_of_bets_on_whose_the_bad_conversations_are(share):
    for candidate, live in ((0, 0), (3, 0), (0, 4), (12, 5), (400, 20)):
        expected = evidence([1.0] * candidate + [0.0] * live, share)
        assert float(harm(candidate, live, share)) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "within"), [(0.1, 559), (0.25, 283), (0.5, 205)])
def test_a_rise_of_bad_conversations_from_10_to_30_percent_is_found_within_the_stated_number(share, within):
    assert stated(share) <= within
    assert chance_to_find(share, LIVE, WORSE, within) >= POWER


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_simulated_people_raise_no_false_alarm_and_find_harm(share, name):
    rng, runs = np.random.default_rng(7), 200
    false = sum(alarm(rng, share, USERS[name], 1.0, 2000) is not None for _ in range(runs))
    # 5 % are allowed: with 200 runs, more than 18 have a probability below one in a hundred.
    assert false <= 18
    most = stated(share) + USERS[name].delay
    found = sum(alarm(rng, share, USERS[name], WORSE / LIVE, most) is not None for _ in range(runs))
    # A trend to fewer bad conversations leaves fewer of them to find it by.
    assert found >= (0.72 if USERS[name].trend >= 1 else 0.3) * runs


def test_the_harm_that_would_have_been_found_shrinks_with_the_conversations():
    few, many = smallest_found(0.5, 0.1, 100), smallest_found(0.5, 0.1, 400)
    assert few is not None and many is not None and 0.1 < many < few
    assert chance_to_find(0.5, 0.1, few, 100) >= POWER > chance_to_find(0.5, 0.1, few - 0.02, 100)
    assert smallest_found(0.5, 0.1, 4) is None
    assert chance_to_find(0.5, 0.0, 0.0, 100) == 0.0
