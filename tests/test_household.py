"""A household in small: people chat through the gateway while everything that can break does, and rounds go on."""

import pytest

from benchmarks.household import live_through

pytestmark = pytest.mark.end_to_end

FAULTS = {1: (["broken upstream", "killed gateway"], ["full disk", "killed round"])}


def test_what_was_acknowledged_is_kept_and_a_round_is_whole_whatever_breaks(tmp_path):
    household = live_through(tmp_path, rounds=1, chats=40, faults=FAULTS, steps=60)
    assert household.problems == []
    (day,) = household.days
    assert len(household.told) == day.chats >= 40 and day.failed > 6
    assert household.project.run("git", "log", "-1", "--format=%s").strip() == f"Round: {day.verdict}"
