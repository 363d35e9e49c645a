"""Splits are sticky: whatever arrives and goes, a conversation stays where it was dealt."""

import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fine_tuning.common.errors import UserError
from fine_tuning.data_preparation.catalogue import Catalogue, FactSettings, HeldConversations
from fine_tuning.data_preparation.splits import ENOUGH_TEST_CLUSTERS, LEFT_OUT, NAMES, SPLITS, Fractions, Ledger

ROOT = Path(__file__).parents[1]
TENTHS = Fractions(validation=0.1, test=0.1)


class Member(NamedTuple):
    """A conversation and the cluster that it is in."""

    id: str
    cluster: str
    started_at: str | None = None

    @property
    def conversation(self) -> dict:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return {"id": self.id, "started_at": self.started_at, "messages": messages}


def assign_splits(members: list[Member], dealt: dict[str, str], fractions: Fractions, salt: str) -> dict[str, str]:
    """Split of every member as `prepare` deals them: by the catalogue."""
    held, ledger = HeldConversations(member.conversation for member in members), Ledger(None, salt, dealt)
    facts, clusters = held.facts(FactSettings("all", salt, 0)), ((member.id, member.cluster) for member in members)
    catalogue = Catalogue(facts, clusters, ledger, fractions, salt)
    return {member.id: NAMES[split] for member, split in zip(members, catalogue.split.tolist(), strict=True)}


def alone(*ids: str) -> list[Member]:
    return [Member(identity, identity) for identity in ids]


def numbered(count: int, start: int = 0) -> list[Member]:
    return alone(*(f"c{index}" for index in range(start, start + count)))


def test_fractions_are_met_on_many_conversations():
    counts = Counter(assign_splits(numbered(5000), {}, Fractions(0.1, 0.2), "salt").values())
    assert 0.18 < counts["test"] / 5000 < 0.22
    assert 0.08 < counts["validation"] / 5000 < 0.12
    assert set(counts) == set(SPLITS)


def test_the_order_of_arrival_does_not_matter_to_a_deal():
    members = numbered(200)
    assert assign_splits(members, {}, TENTHS, "s") == assign_splits(members[::-1], {}, TENTHS, "s")


def test_another_salt_deals_otherwise():
    members = numbered(200)
    assert assign_splits(members, {}, TENTHS, "a") != assign_splits(members, {}, TENTHS, "b")


@pytest.mark.parametrize(("conversations", "held_out"), [(200, 40), (400, 80), (800, 100), (3000, 300)])
def test_a_fifth_is_held_out_until_a_hundred_clusters_are(conversations, held_out):
    """200 and 400: a fifth; 800: a tenth is 80, so it is topped up to 100; 3,000: a tenth."""
    counts = Counter(assign_splits(numbered(conversations), {}, TENTHS, "salt").values())
    assert counts["test"] == pytest.approx(held_out, rel=0.25)
    assert conversations != 800 or counts["test"] == ENOUGH_TEST_CLUSTERS
    assert counts["validation"] == pytest.approx(conversations / 10, rel=0.35)


def test_newcomers_are_held_out_more_while_the_ledger_holds_out_too_few():
    first = assign_splits(numbered(300), {}, TENTHS, "s")
    later = assign_splits(numbered(600), first, TENTHS, "s")
    assert {key: later[key] for key in first} == first
    newcomers = Counter(split for key, split in later.items() if key not in first)
    held_out = Counter(first.values())["test"]
    assert newcomers["test"] == min(ENOUGH_TEST_CLUSTERS, held_out + newcomers["test"]) - held_out > 300 * 0.11
    enough = {f"t{n}": "test" for n in range(ENOUGH_TEST_CLUSTERS)} | first
    many = assign_splits([*numbered(900), *alone(*(f"t{n}" for n in range(ENOUGH_TEST_CLUSTERS)))], enough, TENTHS, "s")
    assert sum(many[f"c{n}"] == "test" for n in range(300, 900)) == pytest.approx(60, rel=0.4)


def test_what_is_held_out_more_does_not_depend_on_the_order():
    members = numbered(300) + [Member(f"d{n}", f"c{n}") for n in range(300)]
    shuffled = members.copy()
    random.Random(0).shuffle(shuffled)
    assert assign_splits(members, {}, TENTHS, "s") == assign_splits(shuffled, {}, TENTHS, "s")


def test_no_test_split_stays_none_and_a_date_decides_alone():
    assert "test" not in assign_splits(numbered(300), {}, Fractions(0.1, 0.0), "s").values()
    old = [Member(f"c{n}", f"c{n}", "2026-01-01") for n in range(300)]
    assert "test" not in assign_splits(old, {}, Fractions(0.1, 0.1, "2026-02-01"), "s").values()


def test_near_duplicates_share_a_split():
    members = [Member(f"c{index}", f"c{index % 50}") for index in range(500)]
    splits = assign_splits(members, {}, TENTHS, "s")
    assert all(splits[member.id] == splits[member.cluster] for member in members)


def test_three_conversations_fill_three_splits_and_one_is_train():
    for count in range(3, 30):
        assert set(assign_splits(numbered(count), {}, TENTHS, "s").values()) == set(SPLITS)
    assert set(assign_splits(numbered(2), {}, TENTHS, "s").values()) == {"train", "test"}
    assert assign_splits(numbered(1), {}, TENTHS, "s") == {"c0": "train"}


def test_a_newcomer_joins_the_split_of_its_near_duplicates():
    dealt = {"a": "test", "b": "train"}
    members = [Member("a", "a"), Member("new", "a"), Member("b", "b")]
    assert assign_splits(members, dealt, TENTHS, "s")["new"] == "test"


def test_a_newcomer_between_two_splits_is_left_out_and_they_stay():
    dealt = {"a": "test", "b": "train"}
    members = [Member("a", "a"), Member("b", "a"), Member("bridge", "a")]
    splits = assign_splits(members, dealt, TENTHS, "s")
    assert splits == {"a": "test", "b": "train", "bridge": LEFT_OUT}
    # It stays out when the ones that it linked are gone.
    assert assign_splits([Member("bridge", "bridge")], splits, TENTHS, "s") == {"bridge": LEFT_OUT}


def test_a_cluster_keeps_its_split_when_its_oldest_member_is_deleted():
    dealt = assign_splits([Member(f"c{i}", f"c{i // 2 * 2}") for i in range(100)], {}, TENTHS, "s")
    survivors = [Member(f"c{i}", f"c{i}") for i in range(1, 100, 2)]
    assert assign_splits(survivors, dealt, TENTHS, "s") == {m.id: dealt[m.id] for m in survivors}


def test_larger_fractions_move_nobody():
    dealt = assign_splits(numbered(100), {}, TENTHS, "s")
    assert assign_splits(numbered(100), dealt, Fractions(0.3, 0.3), "s") == dealt


def test_a_date_makes_the_latest_conversations_the_test_split():
    members = [Member(f"c{day}", f"c{day}", f"2026-01-{day:02}T08:00:00Z") for day in range(1, 31)]
    members += [Member("undated", "undated")]
    splits = assign_splits(members, {}, Fractions(0.2, 0.1, latest_from="2026-01-20"), "s")
    assert {key for key, split in splits.items() if split == "test"} == {f"c{day}" for day in range(20, 31)}
    assert set(splits.values()) == set(SPLITS)


def test_a_near_duplicate_of_an_old_conversation_is_not_latest():
    members = [Member("old", "old", "2025-01-01"), Member("new", "old", "2026-02-01")]
    splits = assign_splits(members, {}, Fractions(0.1, 0.1, latest_from="2026-01-01"), "s")
    assert splits["old"] == splits["new"] != "test"


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1, max_size=3), max_size=60), st.text(min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_conversations_are_dealt_by_whole_clusters_and_train_is_never_empty(clusters, salt):
    splits = assign_splits([Member(key, cluster) for key, cluster in clusters.items()], {}, TENTHS, salt)
    assert splits.keys() == clusters.keys()
    by_cluster: dict[str, set[str]] = {}
    for key, split in splits.items():
        by_cluster.setdefault(clusters[key], set()).add(split)
    assert all(len(found) == 1 for found in by_cluster.values())
    assert not splits or "train" in splits.values()
    if len(by_cluster) >= 3:
        assert set(splits.values()) == set(SPLITS)


class Arrivals(RuleBasedStateMachine):
    """Conversations arrive, link others, disappear and come back; fractions and dates change; the ledger is all that
    is kept from one deal to the next."""

    def __init__(self):
        super().__init__()
        self.links: dict[str, set[str]] = {}  # near-duplicates among all conversations that ever were
        self.present: set[str] = set()
        self.ledger: dict[str, str] = {}
        self.fractions = TENTHS

    @rule(near=st.lists(st.integers(0, 40), max_size=3), earlier=st.integers(0, 3))
    def arrive(self, near, earlier):
        for _ in range(earlier + 1):
            identity = f"c{len(self.links):03}"
            self.links[identity] = {f"c{index:03}" for index in near if index < len(self.links)}
            for other in self.links[identity]:
                self.links[other].add(identity)
            self.present.add(identity)

    @rule(index=st.integers(0, 40))
    def delete(self, index):
        self.present.discard(f"c{index:03}")

    @rule(index=st.integers(0, 40))
    def come_back(self, index):
        if f"c{index:03}" in self.links:
            self.present.add(f"c{index:03}")

    @rule(
        validation=st.floats(0.05, 0.4),
        test=st.floats(0.05, 0.4),
        latest=st.sampled_from([None, "2026-01-01", "2027-01-01"]),
    )
    def change_parameters(self, validation, test, latest):
        self.fractions = Fractions(validation, test, latest)

    @rule()
    def deal(self):
        before = dict(self.ledger)
        clusters = self.clusters()
        members = [Member(key, clusters[key], "2026-06-01") for key in sorted(self.present)]
        splits = assign_splits(members, before, self.fractions, "salt")
        assert splits.keys() == self.present
        # Nobody that was dealt moves.
        assert all(splits[key] == before[key] for key in splits if key in before)
        # A newcomer is in no other split than its near-duplicates.
        for member in members:
            if member.id not in before and splits[member.id] != LEFT_OUT:
                same = {splits[other.id] for other in members if other.cluster == member.cluster} - {LEFT_OUT}
                assert same == {splits[member.id]}
        # The same deal again changes nothing.
        self.ledger |= splits
        assert assign_splits(members, self.ledger, self.fractions, "salt") == splits

    @invariant()
    def ledger_knows_only_splits(self):
        assert set(self.ledger.values()) <= {*SPLITS, LEFT_OUT}

    def clusters(self) -> dict[str, str]:
        """Connected near-duplicates among those present, named by the oldest."""
        named: dict[str, str] = {}
        for start in sorted(self.present):
            waiting = [start] if start not in named else []
            while waiting:
                current = waiting.pop()
                if current not in named:
                    named[current] = start
                    waiting += [other for other in self.links[current] if other in self.present]
        return named


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_knows_what_was_appended_and_holds_no_id(tmp_path):
    path = tmp_path / "splits.txt"
    dealt = {f"conversation {n} of zoe": split for n, split in enumerate([*SPLITS, LEFT_OUT] * 5)}
    assert Ledger(path, "s").append(dealt.items()) == 20
    assert dict(Ledger(path, "s").find([*dealt, "unknown"])) == dealt
    text = path.read_text()
    assert "zoe" not in text and all(len(line) <= 26 for line in text.splitlines())
    assert Ledger(path, "s").append(dealt.items()) == 0 and path.read_text() == text
    assert Ledger(path, "s").append([("new", "test")]) == 1 and path.read_text().startswith(text)


def test_another_salt_knows_nothing_and_does_not_disturb(tmp_path):
    path = tmp_path / "splits.txt"
    Ledger(path, "s").append([("a", "test")])
    assert dict(Ledger(path, "other").find(["a"])) == {}
    Ledger(path, "other").append([("a", "train")])
    assert dict(Ledger(path, "s").find(["a"])) == {"a": "test"}
    assert dict(Ledger(path, "other").find(["a"])) == {"a": "train"}


def test_branches_that_dealt_the_same_conversation_are_merged_to_the_stricter_split(tmp_path):
    def git(*command: str) -> None:
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / "data/splits.txt"
    git("init", "-q", "-b", "main")
    attributes = (ROOT / ".gitattributes").read_text()
    (tmp_path / ".gitattributes").write_text(attributes)
    Ledger(path, "s").append([("old", "train")])
    git("add", "-A")
    git("commit", "-qm", "before")
    pairs = [("train", "test"), ("validation", "train"), ("test", "validation"), ("test", LEFT_OUT), ("train", "train")]
    git("checkout", "-qb", "theirs")
    Ledger(path, "s").append([(f"c{n}", theirs) for n, (_, theirs) in enumerate(pairs)])
    git("commit", "-qam", "theirs")
    git("checkout", "-q", "main")
    Ledger(path, "s").append([(f"c{n}", ours) for n, (ours, _) in enumerate(pairs)])
    git("commit", "-qam", "ours")
    git("merge", "-q", "theirs", "-m", "both")
    found = dict(Ledger(path, "s").find(["old", *(f"c{n}" for n in range(5))]))
    assert list(found.values()) == ["train", "test", "validation", "test", LEFT_OUT, "train"]


def test_git_takes_the_ledger_in():
    assert subprocess.run(["git", "check-ignore", "-q", "data/splits.txt"], cwd=ROOT).returncode == 1


def test_what_is_forgotten_leaves_the_ledger(tmp_path):
    path = tmp_path / "splits.txt"
    Ledger(path, "s").append([("a", "test"), ("b", "train")])
    assert Ledger(path, "s").forget(["a", "unknown"]) == 1
    assert dict(Ledger(path, "s").find(["a", "b"])) == {"b": "train"}


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "0123 somewhere", "f" * 30 + " test", "{}"])
def test_a_damaged_ledger_is_one_line(tmp_path, line):
    path = tmp_path / "splits.txt"
    Ledger(path, "s").append([("a", "test")])
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*splits.txt is damaged: `git checkout"):
        Ledger(path, "s")
