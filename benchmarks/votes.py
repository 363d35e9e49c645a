"""How often votes promote a candidate that is no better, and how many votes find one that is: Markdown tables.

    python -m benchmarks.votes                    # every simulation
    python -m benchmarks.votes power worthless    # some of them; --help names them
    python -m benchmarks.votes --runs 2000        # more runs of each: surer rates, more time

Nothing but this code is needed. Runs with the same seed print the same numbers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp

from benchmarks.verdict import percent, print_simulations
from fine_tuning.common.errors import run
from fine_tuning.evaluation.records.statistics import Resampling, ratio_estimate
from fine_tuning.evaluation.review import in_random_order
from fine_tuning.evaluation.verdict.differences import LOOK_LEVEL
from fine_tuning.evaluation.verdict.judge import JudgeCount
from fine_tuning.evaluation.verdict.votes import RULED_OUT, VoteCount
from fine_tuning.evaluation.verdict.win_rate import DECIDES, EVEN, STAKES, evidence
from fine_tuning.schema.votes import JudgeVote, Side, Vote

Row = dict[str, Any]
CANDIDATE, BASE = "c" * 64, "b" * 64
PROMPTS = 200
MOST = 5000  # votes that are tried for a power
RATES = (0.7, 0.65, 0.6, 0.55)


# -----------------------------------------------------------------------------
# power


def votes_needed(rate: float, against: float = EVEN, power: float = 0.8) -> int | None:
    """After how many votes, each looked at, the evidence has decided with this probability; exact.

    `running` is the distribution of wins among those runs that have not stopped.
    """
    won, lost = np.log1p(STAKES * (1 - against) / (2 * against)), np.log1p(-STAKES / 2)
    running, wins_needed, decided = np.ones(1), 0, 0.0
    for votes in range(1, MOST + 1):
        step = np.zeros(votes + 1)
        step[1:] += running * rate
        step[:-1] += running * (1 - rate)

        def decides(wins: int, votes: int = votes) -> bool:
            products = wins * won + (votes - wins) * lost
            return bool(logsumexp(products) - np.log(len(STAKES)) >= np.log(DECIDES))

        while wins_needed <= votes and not decides(wins_needed):
            wins_needed += 1
        decided += step[wins_needed:].sum()
        step[wins_needed:] = 0
        running = step
        if decided >= power:
            return votes
    return None


def power(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """Votes after which the candidate is found better in so many of 100 cases, looked at after each vote; exact."""
    for rate in RATES:
        cells = {f"{share:.0%}": votes_needed(rate, power=share) for share in (0.5, 0.8, 0.9)}
        yield {"true win rate": f"{rate:.0%}", "against": f"{EVEN:.0%}"} | cells
    cells = {f"{share:.0%}": votes_needed(0.6, RULED_OUT, share) for share in (0.5, 0.8, 0.9)}
    yield {"true win rate": "60%", "against": f"{RULED_OUT:.0%} (compare.votes: required)"} | cells


# -----------------------------------------------------------------------------
# candidates that are no better


CHOICES = {1.0: "left", 0.0: "right", 0.5: "tie"}


def about(prompt: str, time: int) -> Row:
    """What a vote is about; the candidate's reply is the left one."""
    sides = {"left": Side(model=CANDIDATE, reply="0" * 64), "right": Side(model=BASE, reply="1" * 64)}
    hashed = hashlib.sha256(prompt.encode()).hexdigest()
    return {"id": f"{time}", "at": f"{time:09}", "conversation_id": prompt, "item": prompt, "prompt": hashed} | sides


def vote(prompt: str, value: float, person: str, time: int) -> Vote:
    """A vote for the candidate (1), for the base (0), or for neither."""
    return Vote(by=person, choice=CHOICES[value], **about(prompt, time))


def judge_vote(prompt: str, value: float, time: int, characters: Sequence[int] = (200, 100)) -> JudgeVote:
    """A vote of a model that gives one answer in both orders."""
    said = {"by": "judge", "rubric": "3" * 64, "choice": CHOICES[value], "answers": (CHOICES[value],) * 2}
    return JudgeVote(**said, characters=tuple(characters), **about(prompt, time))


def tally(votes: Sequence[Vote]) -> VoteCount:
    """As compare counts them; each prompt is its own cluster."""
    records = [{"contender": "candidate", "id": name, "cluster": name} for name in {vote.item for vote in votes}]
    return VoteCount.of(votes, records, {"candidate": CANDIDATE, "base": BASE})


def ever_promoted(values: Sequence[float], at_most: float = EVEN) -> bool:
    """Whether somebody who looks after each vote sees the evidence decide once."""
    return any(evidence(values[:count], at_most) >= DECIDES for count in range(1, len(values) + 1))


def half_and_half(rng: np.random.Generator, order: str, prompts: int = PROMPTS) -> list[float]:
    """Values of bets where half of the prompts are won at 75 % and half at 25 %: the win rate is one half.

    Args:
        order: "hash": as they are shown; "difference": those that the candidate wins first.
    """
    rates = {f"{rng.integers(1 << 60):x}": 0.75 if index < prompts // 2 else 0.25 for index in range(prompts)}
    names = in_random_order(rates, {CANDIDATE, BASE}) if order == "hash" else list(rates)
    return [float(rng.random() < rates[name]) for name in names]


def sized_by_a_judge(rng: np.random.Generator, prompts: int = PROMPTS) -> bool:
    """Whether the same prompts promote where a judge who knows the pattern sizes the stakes."""
    rates = rng.permutation(np.repeat([0.75, 0.25], prompts // 2))
    won = rng.random(prompts) < rates
    stakes = np.where(rates > EVEN, 0.9, 0.1)
    return bool((np.cumsum(np.log1p(stakes * (won - EVEN))) >= np.log(DECIDES)).any())


def opposite_tastes(rng: np.random.Generator, turns: str, prompts: int = PROMPTS) -> bool:
    """Whether two people, of whom one prefers the candidate at 75 % and the other the base, promote it at some look.

    Args:
        turns: "in turn"; "one first": one votes on half of the prompts, then the other on the other half, and somebody
            looks when both have; "one alone": somebody looks while only the one has voted.
    """
    half, votes = prompts // 2, []
    for index in range(prompts):
        first = index % 2 == 0 if turns == "in turn" else index < half
        votes.append(
            vote(f"p{index}", float(rng.random() < (0.75 if first else 0.25)), "one" if first else "other", index)
        )
    looks = {"in turn": range(5, prompts + 1, 5), "one first": [prompts], "one alone": range(5, half + 1, 5)}[turns]
    tallies = (tally(votes[:count]) for count in looks)
    return any(found.win_rate.better >= DECIDES and not found.rejections() for found in tallies)


def repeated(rng: np.random.Generator, counted: str, prompts: int = 20, times: int = 10) -> bool:
    """Whether equal models are promoted where few prompts, half won at 90 % and half at 10 %, are voted on repeatedly.

    Args:
        counted: "first": as compare counts; "all": each vote as a bet of its own, for contrast.
    """
    rates = rng.permutation(np.repeat([0.9, 0.1], prompts // 2)).repeat(times)  # one prompt after the other
    values = [float(rng.random() < rate) for rate in rates]
    votes = [vote(f"p{index // times}", value, "one", index) for index, value in enumerate(values)]
    return ever_promoted(values if counted == "all" else tally(votes).values)


def longer_and_worse(rng: np.random.Generator, decides: str, prompts: int = PROMPTS) -> bool:
    """Whether a candidate whose replies are longer, and preferred by people on 45 % of the prompts, is promoted at some
    look. A judge prefers the longer reply in nine of ten pairs; it has judged all of them before people vote.

    Args:
        decides: "people": as compare counts, the judge only advises; "judge": by its win rate, for contrast.
    """
    judged = [judge_vote(f"p{index}", float(rng.random() < 0.9), index) for index in range(prompts)]
    votes = [vote(f"p{index}", float(rng.random() < 0.45), "one", index) for index in range(prompts)]
    for looks in range(10, prompts + 1, 10):
        people = tally(votes[:looks])
        (judge,) = JudgeCount.of(judged, votes[:looks], people, {"candidate": CANDIDATE, "base": BASE})
        values = people.values if decides == "people" else [*judge.rates["win_rate"].values()]
        if evidence(values, EVEN) >= DECIDES and not (decides == "people" and people.rejections()):
            return True
    return False


NULLS: dict[str, tuple[str, Callable[[np.random.Generator], bool]]] = {
    "equal models, a fifth of the votes ties": (
        "counts", lambda rng: ever_promoted(rng.choice([0.0, 0.5, 1.0], PROMPTS, p=[0.4, 0.2, 0.4])),
    ),
    "a worse model, 45 % of the prompts won": (
        "counts", lambda rng: ever_promoted(rng.choice([0.0, 1.0], PROMPTS, p=[0.55, 0.45])),
    ),
    "half the prompts won at 75 %, half at 25 %": ("counts", lambda rng: ever_promoted(half_and_half(rng, "hash"))),
    "the same, the most different first": (
        "not done", lambda rng: ever_promoted(half_and_half(rng, "difference")),
    ),
    "the same, bets sized by a judge who knows the pattern": ("not done", sized_by_a_judge),
    "two people of opposite tastes in turn": ("counts", lambda rng: opposite_tastes(rng, "in turn")),
    "two people of opposite tastes, one first, read when both have voted": (
        "counts", lambda rng: opposite_tastes(rng, "one first"),
    ),
    "the same, read while only the one who likes it has voted": (
        "votes as given", lambda rng: opposite_tastes(rng, "one alone"),
    ),
    "20 prompts, 10 votes on each, first ones counted": ("counts", lambda rng: repeated(rng, "first")),
    "the same, every vote counted": ("not done", lambda rng: repeated(rng, "all")),
    "longer replies, 45 % of the prompts won, a judge who likes length": (
        "counts", lambda rng: longer_and_worse(rng, "people"),
    ),
    "the same, the judge decides": ("not done", lambda rng: longer_and_worse(rng, "judge")),
}  # fmt: skip


def worthless(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """How often a candidate that is no better is promoted by somebody who looks after each of 200 votes (5 % at most
    are allowed). "Not done" is what the rules rule out, for contrast; votes as given are those of who has voted."""
    for name, (kind, promotes) in NULLS.items():
        share = np.mean([promotes(rng) for _ in range(runs)])
        yield {"candidate": name, "rule": kind, "promoted": percent(float(share))}


def surely_low(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """How often compare.votes = required lets a candidate pass whose win rate is 40 %, looked at after each vote."""
    passed = [ever_promoted(rng.choice([0.0, 1.0], PROMPTS, p=[0.6, 0.4]), RULED_OUT) for _ in range(runs)]
    yield {"true win rate": "40%", "passes": percent(float(np.mean(passed)))}


# -----------------------------------------------------------------------------
# looks


def any_promoted(rng: np.random.Generator, level: float, candidates: int = 20, clusters: int = 100) -> bool:
    """Whether one of several candidates, equal to the base, is surely better in nats a token on one test split."""
    resampling = Resampling.over([f"{index:05}" for index in range(clusters)], 2000, int(rng.integers(1 << 30)))
    tokens = rng.integers(5, 60, clusters).astype(float)
    for _ in range(candidates):
        gains = rng.standard_normal(clusters) * np.sqrt(tokens)
        estimate = ratio_estimate([np.stack([gains, tokens], axis=1)], resampling)
        if estimate.interval(1 - 2 * level).low > 0:
            return True
    return False


def looks(runs: int, rng: np.random.Generator) -> Iterator[Row]:
    """How often at least one of twenty candidates that equal the base passes the test of the primary metric on the same
    100 conversations, by the level of that test."""
    for level in (0.025, LOOK_LEVEL):
        share = np.mean([any_promoted(rng, level) for _ in range(min(runs, 400))])
        yield {"level of one test": f"{level:.2%}", "at least one of 20 passes": percent(float(share))}


SIMULATIONS = {"power": power, "worthless": worthless, "required": surely_low, "looks": looks}


def main() -> None:
    print_simulations(SIMULATIONS, __doc__, "simulated candidates a row", 500)


if __name__ == "__main__":
    run(main)
