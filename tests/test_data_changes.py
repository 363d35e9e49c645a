"""Training data since the champion: what came, what went, a source a row, without a word of what was said."""

from fine_tuning.common.records import write_jsonl
from fine_tuning.evaluation.records.data_changes import MEMBERS, changes_since, data_changes, training_members
from tests.evaluation_suite import conversation, write_items


def member(id: str, source: str, tokens: int) -> dict:
    return {"id": id, "source": source, "tokens": tokens}


def test_conversations_and_tokens_are_counted_by_source():
    before = [member("a", "sample", 10), member("b", "sample", 20), member("c", "app", 5)]
    now = [member("a", "sample", 12), member("d", "app", 7), member("e", "app", 8)]
    found = data_changes(before, now)
    assert found["app"] == {
        "kept": {"conversations": 0, "tokens": 0},
        "added": {"conversations": 2, "tokens": 15},
        "removed": {"conversations": 1, "tokens": 5},
    }
    assert found["sample"]["kept"] == {"conversations": 1, "tokens": 12}
    assert found["sample"]["removed"] == {"conversations": 1, "tokens": 20}


def test_what_a_champion_keeps_of_its_training_data_holds_no_text(tiny_base, tmp_path):
    told = {"a": conversation("secret question", "secret answer"), "b": conversation("x", "y")}
    train = write_items(tmp_path / "train", tiny_base, told)
    members = training_members(train)
    assert [set(line) for line in members] == [{"id", "source", "tokens"}] * 2
    assert changes_since(tmp_path, train) is None
    write_jsonl(tmp_path / MEMBERS, members)
    assert b"secret" not in (tmp_path / MEMBERS).read_bytes()
    assert changes_since(tmp_path, train)["sample"]["kept"]["conversations"] == 2
