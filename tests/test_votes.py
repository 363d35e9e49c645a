"""Votes: what they prove of a candidate, how they are kept, and how often they err."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import votes as simulations
from fine_tuning.commands.summary import summary
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json
from fine_tuning.evaluation.looks import LOOKS, looked_at, record_looks
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.review import in_random_order
from fine_tuning.evaluation.verdict.comparison import compare
from fine_tuning.evaluation.verdict.differences import LOOK_LEVEL, differences
from fine_tuning.evaluation.verdict.votes import VoteCount
from fine_tuning.evaluation.verdict.win_rate import DECIDES, WinRate, evidence
from fine_tuning.schema.votes import read_all_votes, vote_lines, votes_file
from tests.evaluation_suite import MODULES
from tests.registered import sh
from tests.test_comparison import INTERVALS, SETTINGS, spread
from tests.test_comparison import records as items

ROOT = Path(__file__).parents[1]

# --- evidence --------------------------------------------------------------------------------------------------------


def test_before_the_first_vote_nothing_is_known():
    rate = WinRate.of([])
    assert (rate.n, rate.value, rate.low, rate.high, rate.better, rate.worse) == (0, None, None, None, 1, 1)


def test_evidence_is_the_mean_of_products_over_the_stakes():
    stakes = np.linspace(0.005, 0.995, 100)
    expected = np.mean((1 + 0.5 * stakes) ** 2 * (1 - 0.5 * stakes))
    assert evidence([1, 1, 0, 0.5], 0.5) == pytest.approx(expected)


def test_evidence_falls_as_the_rate_that_it_speaks_against_rises():
    values = [1.0] * 14 + [0.0] * 5 + [0.5] * 3
    found = [evidence(values, at_most) for at_most in np.linspace(0, 1, 21)]
    assert found == sorted(found, reverse=True)


def test_either_end_of_the_interval_is_where_the_evidence_stops_deciding():
    values = np.array([1.0] * 30 + [0.0] * 12 + [0.5] * 8)
    rate = WinRate.of(values)
    assert rate.value == pytest.approx(0.68)
    assert evidence(values, rate.low - 0.001) >= DECIDES > evidence(values, rate.low)
    assert evidence(1 - values, 1 - rate.high - 0.001) >= DECIDES > evidence(1 - values, 1 - rate.high)
    assert (rate.better >= DECIDES) == (rate.low > 0.5)


def test_many_votes_overflow_nothing():
    rate = WinRate.of([1.0] * 5000)
    assert rate.high == 1 and rate.low > 0.99 and np.isfinite(rate.better) and rate.worse < 1e-6


# --- simulations, small; `python -m benchmarks.votes` runs them at length --------------------------------------------


@pytest.mark.parametrize("name", [name for name, (kind, _) in simulations.NULLS.items() if kind == "counts"])
def test_a_candidate_that_is_no_better_is_promoted_in_at_most_five_of_a_hundred_cases(name):
    rng = np.random.default_rng(3)
    runs = 25 if "people" in name else 60
    promoted = sum(simulations.NULLS[name][1](rng) for _ in range(runs))
    assert promoted <= np.ceil(0.05 * runs) + 3  # chance is wrong in at most one of a thousand


def test_with_the_most_different_pairs_first_or_repeated_votes_chance_would_promote():
    rng = np.random.default_rng(4)
    for name, (kind, promotes) in simulations.NULLS.items():
        if kind == "not done":
            assert sum(promotes(rng) for _ in range(30)) > 6, name


def test_a_better_candidate_is_found_after_as_many_votes_as_the_docs_say():
    needed = simulations.votes_needed(0.7)
    rng = np.random.default_rng(5)
    found = [simulations.ever_promoted((rng.random(needed) < 0.7).astype(float)) for _ in range(150)]
    assert 0.68 < np.mean(found) < 0.92
    assert needed < simulations.votes_needed(0.65) < simulations.votes_needed(0.6)


def test_twenty_looks_at_the_level_of_one_cost_far_less_than_at_the_usual_level():
    def passes(level):
        rng = np.random.default_rng(6)
        return sum(simulations.any_promoted(rng, level, clusters=60) for _ in range(12))

    assert passes(simulations.LOOK_LEVEL) <= 3 < passes(0.025) + 1


# --- the count -------------------------------------------------------------------------------------------------------

C, B = simulations.CANDIDATE, simulations.BASE
GGUFS = {"candidate": C, "base": B}


def cast(*said, **changes) -> list:
    """Votes of (prompt, person, value), one after the other."""
    made = [simulations.vote(prompt, value, person, at) for at, (prompt, person, value) in enumerate(said)]
    return [vote.model_copy(update=changes) for vote in made]


def records(**clusters: str) -> list[dict]:
    return [{"contender": name, "id": i, "cluster": c} for name in GGUFS for i, c in clusters.items()]


def test_each_cluster_gives_one_bet_the_first_vote_on_it():
    votes = cast(("a", "ann", 1.0), ("b", "ann", 0.0), ("a", "bob", 0.0), ("c", "bob", 0.5))
    found = VoteCount.of(votes, records(a="one", b="one", c="two"), GGUFS)
    assert found.bets == {"one": ("ann", 1.0), "two": ("bob", 0.5)}
    assert found.as_json()["people"]["ann"]["decides"] == 1
    assert found.as_json()["people"]["bob"]["n"] == 2


def test_a_later_change_of_mind_counts_for_agreement_only():
    votes = cast(("a", "ann", 1.0), ("a", "ann", 0.0), ("a", "bob", 1.0))
    found = VoteCount.of(votes, records(a="a"), GGUFS).as_json()
    assert found["n"] == 1 and found["value"] == 1
    assert found["agreement"] == {"each other": {"same": 1, "of": 1}, "themselves": {"same": 0, "of": 1}}


def test_a_vote_on_other_models_or_other_prompts_is_not_counted():
    votes = cast(("a", "ann", 1.0), ("gone", "ann", 1.0))
    found = VoteCount.of(votes, records(a="a"), GGUFS)
    assert len(found.bets) == 1 and found.not_counted == 1
    assert VoteCount.of(votes, records(a="a"), GGUFS | {"base": "d" * 64}).as_json() == {"not_counted": 2}
    assert VoteCount.of(votes, records(a="a"), {}).as_json() == {"not_counted": 2}


def test_a_person_for_whom_the_candidate_is_surely_worse_speaks_against_it():
    liked = [(f"p{index}", "ann", 1.0) for index in range(40)]
    disliked = [(f"p{index}", "bob", 0.0) for index in range(12)]
    found = VoteCount.of(cast(*liked, *disliked), records(**{f"p{i}": f"p{i}" for i in range(40)}), GGUFS)
    assert found.win_rate.better >= DECIDES
    (reason,) = found.rejections()
    assert "bob prefers the base: win rate 0%" in reason


def test_the_order_is_fixed_by_the_pair_and_no_other_order_shows_through():
    clusters = [f"{index:03}" for index in range(60)]
    order = in_random_order(clusters, {C, B})
    assert order == in_random_order(clusters[::-1], {B, C}) != sorted(clusters)
    assert order != in_random_order(clusters, {C, "d" * 64})


# --- as data ---------------------------------------------------------------------------------------------------------


def test_votes_are_read_as_they_were_written_in_order_of_time_each_once(tmp_path):
    first, second, third = cast(("a", "ann", 1.0), ("b", "ann", 0.5), ("a", "bob", 0.0))
    (tmp_path / votes_file("ann")).write_bytes(vote_lines([second, first]))
    (tmp_path / votes_file("bob")).write_bytes(vote_lines([third, first]))
    assert read_all_votes(tmp_path) == [first, second, third]
    assert read_all_votes(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "vote", "id": "1"',
        b"[]",
        b'{"user_message": "a private word"}',
        vote_lines(cast(("a", "ann", 1.0)))[:-1].replace(b"c" * 64, b"a private word"),
        vote_lines(cast(("a", "ann", 1.0)))[:-1].replace(b':"left"', b':"best"'),
    ],
)
def test_a_line_that_is_no_vote_is_one_line_without_what_it_says(tmp_path, line):
    path = tmp_path / "ann.jsonl"
    path.write_bytes(vote_lines(cast(("a", "ann", 1.0))) + line + b"\n")
    untracked = r"ann\.jsonl, line 2, is no vote: take the line out, or move the file away: `mv \S+ \.`"
    with pytest.raises(UserError, match=untracked) as caught:
        read_all_votes(tmp_path)
    assert "private" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_file_among_the_votes_is_one_line(tmp_path):
    for name in ("README.md", "ann.jsonl", "ann.jsonl.dvc", ".DS_Store", "._ann.jsonl"):
        (tmp_path / name).write_text("")
    assert read_all_votes(tmp_path) == []
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt is not a file of votes: move it out of"):
        read_all_votes(tmp_path)


def test_a_folder_a_dangling_link_and_a_file_that_was_not_pulled_are_one_line_each(tmp_path):
    for make, words in (
        (lambda: (tmp_path / "ann.jsonl").mkdir(), r"ann\.jsonl is not a file of votes: move it out of"),
        (lambda: (tmp_path / "bob.jsonl").symlink_to("nowhere"), r"bob\.jsonl is a link to nothing: remove it"),
        (lambda: (tmp_path / "bob.jsonl.dvc").touch(), r"bob\.jsonl is not here: run `dvc pull .*bob\.jsonl`"),
    ):
        make()
        with pytest.raises(UserError, match=words):
            read_all_votes(tmp_path)
        if (tmp_path / "ann.jsonl").is_dir():
            (tmp_path / "ann.jsonl").rmdir()


def test_people_whose_names_look_alike_have_files_of_their_own():
    names = [votes_file(name) for name in ("Ann Lee", "ann-lee", "李", "ann@example.org")]
    assert len(set(names)) == 4 and all(name.isascii() and "/" not in name for name in names)


# --- in the verdict --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics():
    return [load_metric(name, MODULES) for name in ("perplexity", "token_accuracy")]


def people(wins: int, losses: int, by: str = "ann", against: str = "base", count: int = 60) -> VoteCount:
    votes = cast(*[(f"c{index:04d}", by, float(index < wins)) for index in range(wins + losses)])
    lines = [{"contender": name, "id": f"c{i:04d}", "cluster": f"k{i}"} for name in GGUFS for i in range(count)]
    champion = [line | {"contender": "champion"} for line in lines if against == "champion"]
    return VoteCount.of(votes, lines + champion, GGUFS | {against: B})


def decide(metrics, tally: VoteCount, gain: float = 1.0, count: int = 60, **changes) -> dict:
    lines = [*items("base", spread(3.0, count)), *items("candidate", spread(3.0 - gain, count, seed=1), correct=0.6)]
    return compare(lines, metrics, SETTINGS.model_copy(update=changes), INTERVALS, people=tally)


def test_beside_a_gain_votes_hold_only_a_candidate_that_is_surely_worse(metrics):
    for wins, losses, verdict in ((0, 0, "PROMOTE"), (12, 15, "PROMOTE"), (20, 5, "PROMOTE"), (5, 30, "HOLD")):
        found = decide(metrics, people(wins, losses))
        assert found["verdict"] == verdict
        assert found["votes"].get("n", 0) == wins + losses
    assert found["reasons"][0].startswith("people prefer the base: win rate 14%")


def test_a_person_who_surely_prefers_the_baseline_holds_although_the_others_do_not(metrics):
    tally = people(40, 0)
    for index in range(12):
        tally.own.setdefault("bob", {})[f"k{index}"] = 0.0
    found = decide(metrics, tally)
    assert found["verdict"] == "HOLD" and found["reasons"][0].startswith("bob prefers the base")
    assert found["votes"]["people"]["ann"]["decides"] == 40 and found["votes"]["people"]["bob"]["decides"] == 0


def test_where_votes_are_required_a_low_win_rate_has_to_be_ruled_out(metrics):
    for tally, verdict in ((people(0, 0), "HOLD"), (people(15, 12), "HOLD"), (people(38, 20), "PROMOTE")):
        found = decide(metrics, tally, votes="required")
        assert found["verdict"] == verdict, tally
    assert "a win rate below 40% is not ruled out" in decide(metrics, people(0, 0), votes="required")["reasons"][0]


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"),
    [(0, 0, "INCONCLUSIVE"), (14, 12, "INCONCLUSIVE"), (30, 5, "PROMOTE"), (5, 30, "HOLD")],
)
def test_the_win_rate_may_be_the_primary_metric(metrics, wins, losses, verdict):
    found = decide(metrics, people(wins, losses), gain=-0.01, primary="win_rate")
    assert (found["verdict"], found["primary"]["metric"]) == (verdict, "win_rate")
    assert found["clusters"] == wins + losses


def test_with_the_win_rate_as_primary_metric_the_guards_still_hold(metrics):
    memory = [
        {"contender": name, "id": "m", "kind": "training", "word_for_word": name == "candidate", "nll": 50.0}
        for name in ("base", "candidate")
    ]
    lines = [*items("base", spread(3.0)), *items("candidate", spread(2.0), correct=0.6)]
    settings = SETTINGS.model_copy(update={"primary": "win_rate"})
    found = compare(lines, metrics, settings, INTERVALS, memory=memory, people=people(40, 0))
    assert found["verdict"] == "HOLD" and "memorised" in found["reasons"][0]


def test_where_there_are_too_few_references_votes_decide_by_themselves(metrics):
    for wins, losses, verdict in ((0, 0, "INCONCLUSIVE"), (8, 7, "INCONCLUSIVE"), (30, 5, "PROMOTE"), (5, 30, "HOLD")):
        assert decide(metrics, people(wins, losses), count=10)["verdict"] == verdict
    found = decide(metrics, people(30, 5), count=10)
    assert found["reasons"][0] == "win rate 86% [64%, 97%] in 35 votes against the base"


def test_where_every_reply_is_a_models_own_votes_decide(metrics):
    def own_words(name: str) -> list[dict]:
        kept = ("contender", "id", "cluster", "turns")
        return [{key: line[key] for key in kept} for line in items(name, spread(3.0))]

    lines = own_words("base") + own_words("candidate")
    for tally, verdict in ((people(0, 0), "INCONCLUSIVE"), (people(30, 5), "PROMOTE"), (people(9, 8), "INCONCLUSIVE")):
        assert compare(lines, metrics, SETTINGS, INTERVALS, people=tally)["verdict"] == verdict


def test_the_primary_metric_is_tested_at_the_level_that_twenty_looks_can_afford(metrics):
    found = decide(metrics, people(0, 0))
    tested, shown = found["primary"]["base"], found["differences"]["base"]["perplexity"]
    assert tested["low"] < shown["low"] < shown["high"] < tested["high"]
    estimate = differences(
        [*items("base", spread(3.0)), *items("candidate", spread(2.0, seed=1))], metrics, "base", INTERVALS
    )
    assert tested["high"] == pytest.approx(estimate["perplexity"].at(1 - 2 * LOOK_LEVEL).high)


def test_the_verdict_with_votes_is_json_and_the_same_again(metrics):
    first, second = (json.dumps(decide(metrics, people(50, 9)), sort_keys=True, allow_nan=False) for _ in range(2))
    assert first == second


# --- the ledger of looks ---------------------------------------------------------------------------------------------


def seen(number: int, suite: str = "s", **fields: object) -> dict:
    found = {"eval_set_sha256": suite, "adapter_sha256": f"adapter {number}", "verdict": "PROMOTE", "reasons": ["good"]}
    return found | fields


def test_a_look_is_recorded_once_a_pair_and_the_twentieth_is_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (*range(19), 3, 18):
        assert looked_at(seen(number)) == seen(number)
    held = looked_at(seen(19))
    assert held["verdict"] == "HOLD" and held["reasons"][1:] == ["good"]
    assert held["reasons"][0].startswith("look 20 at one test split, and 20 are too many: ")
    assert looked_at(seen(19)) == held and looked_at(seen(20))["verdict"] == "HOLD"
    assert looked_at(seen(4))["verdict"] == "PROMOTE", "what was seen in time stays as it was"
    assert looked_at(seen(30, "fresh"))["verdict"] == "PROMOTE"
    assert looked_at(seen(31, verdict="INCONCLUSIVE"))["verdict"] == "INCONCLUSIVE"
    assert len(LOOKS.read_bytes().splitlines()) == 23


def test_what_is_no_candidate_is_no_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    champion = seen(1, champion={"version": 1})
    assert looked_at(champion) == champion and looked_at({"verdict": "HOLD"}) == {"verdict": "HOLD"}
    assert record_looks([{"eval_set_sha256": None, "adapter_sha256": "a"}, seen(2), seen(2)]) == [("s", "adapter 2")]


def test_looks_of_two_clones_are_joined_by_git(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    (tmp_path / "one/.gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    sh(tmp_path / "one", "git init -q -b main && git config user.name A && git config user.email a@example.org")
    record_looks([seen(0)])
    sh(tmp_path / "one", "git add -A && git commit -qm Start")
    sh(tmp_path / "one", "git switch -qc other")
    record_looks([seen(1), seen(2)])
    sh(tmp_path / "one", "git commit -qam Other && git switch -q main")
    record_looks([seen(2), seen(3)])
    sh(tmp_path / "one", "git commit -qam Mine && git merge -q --no-edit other")
    assert {adapter for _, adapter in record_looks([])} == {f"adapter {number}" for number in range(4)}


def test_a_damaged_ledger_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_looks([seen(0)])
    with open(LOOKS, "a") as file:
        file.write("{torn\n")
    with pytest.raises(UserError, match=r"line 2 of data/looks\.jsonl is damaged: `git checkout"):
        looked_at(seen(1))


def test_the_summary_shows_the_held_verdict_and_no_stage_writes_the_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("evaluation", "comparison", "prepare"):
        (tmp_path / "metrics").mkdir(exist_ok=True)
        (tmp_path / f"metrics/{name}.json").write_bytes((ROOT / f"metrics/{name}.json").read_bytes())
    suite = read_json(tmp_path / "metrics/comparison.json")["eval_set_sha256"]
    record_looks([seen(number, suite) for number in range(19)])
    summary(Namespace(all=False))
    said = capsys.readouterr().out
    assert "Verdict: HOLD" in said and "fresh conversations" in said and "make promote" not in said
    stages = (ROOT / "stages").glob("*.py")
    assert not any("looks" in path.read_text() for path in stages)
