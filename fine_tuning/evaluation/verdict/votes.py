"""What people's votes say of the candidate, and what of that holds or promotes it. Votes and records in, numbers out.

Each cluster of held-out prompts gives one bet: the first vote on it. People are strata and no sample of anybody: the
win rate is over the votes as they were given, and each person's own is beside it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fine_tuning.evaluation.records.record_types import CANDIDATE
from fine_tuning.evaluation.verdict.settings import DECIDES, CompareSettings
from fine_tuning.evaluation.verdict.win_rate import WinRate, evidence
from fine_tuning.schema.votes import NOBODY, Vote

RULED_OUT = 0.4  # win rate that compare.votes = required has to rule out
MORE = "vote on more pairs: `python -m fine_tuning review`"


@dataclass
class VoteCount:
    """The votes on candidate and `against`.

    Args:
        clusters: of the windows of the suite, by id.
        bets: (person, value) of the first vote on each cluster.
        own: value of each person's own first vote on each cluster.
        agreement: of later votes on a cluster [how many say the same as the first, how many there are]: of people with
            each other, and with themselves.
        not_counted: votes on replies of other models, or on prompts that are not in the suite.
        after_results: how many counted votes came after their person had seen the win rate.
    """

    against: str
    clusters: Mapping[str, str] = field(default_factory=dict)
    bets: dict[str, tuple[str, float]] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)
    agreement: dict[str, list[int]] = field(default_factory=lambda: {"each other": [0, 0], "themselves": [0, 0]})
    not_counted: int = 0
    after_results: int = 0

    @classmethod
    def of(cls, votes: Iterable[Vote], records: Sequence[dict[str, Any]], ggufs: Mapping[str, str]) -> "VoteCount":
        """Count votes, given in order of time; `records` are lines of items.jsonl, `ggufs` has the SHA-256 of the GGUF
        file of each contender."""
        against = "champion" if any(line["contender"] == "champion" for line in records) else "base"
        clusters = {line["id"]: line["cluster"] for line in records if line["contender"] == CANDIDATE}
        found = cls(against, clusters)
        candidate, pair = ggufs.get(CANDIDATE), {ggufs.get(CANDIDATE), ggufs.get(found.against)}
        for vote in votes:
            cluster = clusters.get(vote.item)
            if cluster is None or candidate is None or vote.models != pair:
                found.not_counted += 1
                continue
            if vote.by == NOBODY and cluster in found.bets:
                continue  # two people met the same equal replies
            found.after_results += vote.after_results
            value, own = vote.value_for(candidate), found.own.setdefault(vote.by, {})
            if cluster in own:
                found._compare("themselves", own[cluster], value)
            elif cluster in found.bets:
                found._compare("each other", found.bets[cluster][1], value)
            own.setdefault(cluster, value)
            found.bets.setdefault(cluster, (vote.by, value))
        return found

    def _compare(self, whom: str, before: float, value: float) -> None:
        self.agreement[whom][0] += before == value
        self.agreement[whom][1] += 1

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.bets.values()]

    @property
    def win_rate(self) -> WinRate:
        return WinRate.of(self.values)

    @property
    def people(self) -> dict[str, WinRate]:
        voted = ((person, values) for person, values in sorted(self.own.items()) if person != NOBODY)
        return {person: WinRate.of(list(values.values())) for person, values in voted}

    def as_json(self) -> dict[str, Any]:
        """For metrics/comparison.json; {} where nobody voted on this pair."""
        if not self.bets:
            return {"not_counted": self.not_counted} if self.not_counted else {}
        deciding = Counter(person for person, _ in self.bets.values())
        people = {person: asdict(rate) | {"decides": deciding[person]} for person, rate in self.people.items()}
        agreement = {name: {"same": same, "of": of} for name, (same, of) in self.agreement.items()}
        return asdict(self.win_rate) | {
            "against": self.against,
            "people": people,
            "equal": deciding[NOBODY],
            "agreement": agreement,
            "not_counted": self.not_counted,
            "after_results": self.after_results,
        }

    def notes(self) -> list[str]:
        """What the votes say, whatever the verdict."""
        if not self.bets:
            not_counted = f"votes on other replies or prompts, not counted: {self.not_counted}"
            return [not_counted] if self.not_counted else []
        deciding = Counter(person for person, _ in self.bets.values())
        people = [f"{person} {rate.value:.0%}, decides {deciding[person]}" for person, rate in self.people.items()]
        return [f"{self}: {'; '.join(people)}"]

    def rejections(self) -> list[str]:
        """Reasons to hold: the candidate is surely worse, for all votes or for a person's."""
        everybody, people = self.win_rate, self.people
        found = [f"people prefer the {self.against}: {everybody}"] if everybody.worse >= DECIDES else []
        return found + [
            f"{person} prefers the {self.against}: {rate}"
            for person, rate in people.items()
            if rate.worse >= DECIDES and not (found and len(people) == 1)
        ]

    def missing(self, settings: CompareSettings) -> list[str]:
        """The reason to hold where compare.votes requires what the votes do not show."""
        if settings.votes != "required" or evidence(self.values, RULED_OUT) >= DECIDES:
            return []
        return [f"a win rate below {RULED_OUT:.0%} is not ruled out, and compare.votes requires it: {self}; {MORE}"]

    def __str__(self) -> str:
        return f"{self.win_rate} against the {self.against}"
