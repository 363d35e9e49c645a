"""How soon a canary finds a candidate that is worse, and how often it alarms for one that is not: Markdown tables.

    python -m benchmarks.canary                 # every simulation
    python -m benchmarks.canary found alarms    # some of them
    python -m benchmarks.canary --runs 5000     # more runs of each: surer rates, more time

Nothing but this code is needed. Runs with the same seed print the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.verdict import percent, print_simulations
from fine_tuning.common.errors import run
from fine_tuning.evaluation.verdict.win_rate import DECIDES
from fine_tuning.model_management.canary_statistics import POWER, chance_to_find, harm, smallest_found

Row = dict[str, Any]
SHARES = (0.1, 0.25, 0.5)
LIVE, WORSE = 0.1, 0.3  # parts of the conversations that go badly
ENDLESS = 5000  # conversations, looked at after each bad one
A_DAY = 40  # conversations


@dataclass(frozen=True)
class Users:
    """Whose conversations are simulated.

    Args:
        moody: each of 12 people has days on which up to four times as many conversations go badly.
        trend: what the last conversation's part of bad ones is, times that of the first.
        delay: longest time until a bad conversation is known, in conversations; `candidate_delay` that of the
            candidate's where it is another.
    """

    moody: bool = False
    trend: float = 1.0
    delay: int = 0
    candidate_delay: int | None = None


USERS = {
    "people who are all alike": Users(),
    "signals up to 20 conversations late": Users(delay=20),
    "12 moody people": Users(moody=True),
    "three times as many bad ones in the end": Users(trend=3.0),
    "a third as many bad ones in the end": Users(trend=1 / 3),
    "moody people, a trend, late signals": Users(moody=True, trend=2.0, delay=20),
}


def alarm(rng: np.random.Generator, share: float, users: Users, candidate: float, most: int) -> int | None:
    """How many conversations there had been when the evidence decided; None where it never did.

    Args:
        candidate: the part that goes badly of the candidate's conversations, times that of the live version's.
    """
    number = np.arange(most)
    part = LIVE * np.geomspace(1, users.trend, most)
    if users.moody:
        people, days = rng.integers(12, size=most), number // A_DAY
        moods = rng.choice([0.4, 1.0, 4.0], p=[0.5, 0.4, 0.1], size=(12, days[-1] + 1))
        part = part * moods[people, days]
    arm = rng.random(most) < share
    bad = rng.random(most) < np.minimum(part * np.where(arm, candidate, 1.0), 1.0)
    longest = np.where(arm & (users.candidate_delay is not None), users.candidate_delay or 0, users.delay)
    known = number + rng.random(most) * longest
    order = np.argsort(known[bad], kind="stable")
    theirs = arm[bad][order]
    values = harm(np.cumsum(theirs), np.cumsum(~theirs), share)
    decided = np.flatnonzero(values >= DECIDES)
    return int(np.ceil(known[bad][order][decided[0]])) + 1 if len(decided) else None


def stated(share: float) -> int:
    """After how many conversations a rise from LIVE to WORSE is found with a probability of POWER; exact."""
    low, high = 1, 4000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_to_find(share, LIVE, WORSE, middle) >= POWER else (middle, high)
    return high


def power(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """Conversations, of both versions together, after which a rise of the bad ones from 10 to 30 % is found in four
    cases of five; exact. With 100 conversations of the candidate: the smallest part of bad ones that is found so."""
    for share in SHARES:
        count = round(100 / share)
        found = {f"found at {live:.0%} before": _part(smallest_found(share, live, count)) for live in (0.05, 0.1, 0.2)}
        yield {"share": f"{share:.0%}", "10 to 30 %": stated(share), "100 of the candidate are": count} | found


def _part(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def found(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """How often three times as many bad conversations are found within the number stated by `power`."""
    for name, users in USERS.items():
        shares = {}
        for share in SHARES:
            most = stated(share)
            ends = (alarm(rng, share, users, WORSE / LIVE, most + users.delay) for _ in range(runs))
            shares[f"share {share:.0%}"] = percent(sum(end is not None for end in ends) / runs)
        yield {"people": name} | shares


def alarms(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """How often a candidate that is no worse is rolled back, looked at after each bad one of 5,000 conversations (5 %
    at most are allowed). The last row is outside the assumption: the candidate's signals come at once, the live
    version's up to 20 conversations late."""
    sooner = {"the candidate's signals sooner": Users(delay=20, candidate_delay=0)}
    for name, users in (USERS | sooner).items():
        shares = {}
        for share in SHARES:
            rolled_back = sum(alarm(rng, share, users, 1.0, ENDLESS) is not None for _ in range(runs))
            shares[f"share {share:.0%}"] = percent(rolled_back / runs)
        yield {"people": name} | shares


SIMULATIONS: dict[str, Callable[[int, np.random.Generator], Iterator[Row]]] = {
    "power": power, "found": found, "alarms": alarms,
}  # fmt: skip


def main() -> None:
    print_simulations(SIMULATIONS, __doc__, "simulated canaries a cell", 1000)


if __name__ == "__main__":
    run(main)
