"""What a model that judges says of the candidate, and how far to trust it. It only advises: no verdict reads it.

Agreement, position bias and length bias are means of one value a prompt with the interval of the win rate, which stays
valid while votes arrive. A judge that agrees with people by chance, prefers neither place and neither length has one
half in each (the biases after Zheng et al. 2023, "Judging LLM-as-a-judge", section 3.3).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fine_tuning.evaluation.records.record_types import CANDIDATE
from fine_tuning.evaluation.verdict.votes import VoteCount
from fine_tuning.evaluation.verdict.win_rate import WinRate
from fine_tuning.schema.votes import JudgeVote, Vote

RATES = {  # values by cluster; one half where there is no preference, or where both orders say the same
    "win_rate": "win rate of the candidate",
    "agreement": "the same as people said of the same replies",
    "first": "prefers what it reads first",
    "longer": "prefers the longer reply",
    "people_longer": "people prefer the longer reply, where both voted",
}


@dataclass
class JudgeCount:
    """The votes of one judge with one rubric on candidate and `against`.

    Args:
        rates: values of each of RATES by cluster.
        unclear: clusters of pairs where it said nothing that could be understood, so far.
    """

    judge: str
    rubric: str
    against: str
    rates: dict[str, dict[str, float]] = field(default_factory=lambda: {name: {} for name in RATES})
    unclear: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, judged: Iterable[JudgeVote], votes: Iterable[Vote], people: VoteCount, ggufs: Mapping[str, str]
    ) -> list["JudgeCount"]:
        """Count the votes of every judge, in order of time, without those on other models or prompts; `people` is the
        count of `votes`, `ggufs` has the SHA-256 of the GGUF file of each contender."""
        candidate, first = ggufs.get(CANDIDATE, ""), dict[Any, Vote]()
        for vote in votes:
            first.setdefault(vote.pair, vote)
        found: dict[tuple[str, str], JudgeCount] = {}
        for one in judged:
            cluster = people.clusters.get(one.item)
            if cluster is not None and one.models == {candidate, ggufs.get(people.against)}:
                count = found.setdefault((one.by, one.rubric), cls(one.by, one.rubric, people.against))
                if cluster not in count.rates["win_rate"]:
                    count._add(cluster, one, first.get(one.pair), candidate)
        return list(found.values())

    def _add(self, cluster: str, judged: JudgeVote, vote: Vote | None, candidate: str) -> None:
        if None in judged.answers:
            self.unclear.add(cluster)
            return
        self.unclear.discard(cluster)
        values = {"win_rate": judged.value_for(candidate)}
        if judged.left.reply != judged.right.reply:  # else nobody was asked
            places = zip(judged.answers, ("left", "right"), strict=True)
            values["first"] = sum(0.5 if said == "tie" else float(said == place) for said, place in places) / 2
            left, right = judged.characters
            longer = (judged.left if left > right else judged.right).model
            if left != right:
                values["longer"] = judged.value_for(longer)
            if vote is not None:
                values["agreement"] = 1 - abs(values["win_rate"] - vote.value_for(candidate))
            if vote is not None and left != right:
                values["people_longer"] = vote.value_for(longer)
        for name, value in values.items():
            self.rates[name][cluster] = value

    def as_json(self) -> dict[str, Any]:
        """For metrics/comparison.json."""
        rates = {name: asdict(WinRate.of([*values.values()])) for name, values in self.rates.items()}
        named = {"judge": self.judge, "rubric": self.rubric, "against": self.against}
        return named | {"unclear": len(self.unclear)} | rates

    def __str__(self) -> str:
        found = [(what, WinRate.of([*self.rates[name].values()])) for name, what in RATES.items()]
        said = [f"{what} {one.value:.0%} [{one.low:.0%}, {one.high:.0%}] of {one.n}" for what, one in found if one.n]
        said.append(f"unclear: {len(self.unclear)}")
        return f"judge {self.judge}, rubric {self.rubric[:8]}, only advises: {'; '.join(said)}"
