"""Building datasets: what is trained on, what is left out and why, files that are the same every time."""

import csv
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import write_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.data_cleaner import DataCleaner
from fine_tuning.data_collection.importers import import_records
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder, PrepareSettings
from fine_tuning.data_preparation.decontamination import HeldOut, repeating
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.data_preparation.tally import Tally, length_histogram, statistics
from fine_tuning.schema.chat_format import NOT_TRAINED, Encoded, load_tokenizer
from fine_tuning.schema.prepared import PreparedRow, encoded_row, read_rows, row_batch, write_batches
from fine_tuning.schema.reasons import in_words
from stages import prepare
from tests.evaluation_suite import write_rows

ROOT = Path(__file__).parents[1]
WORDS = [f"word{number}" for number in range(400)]


def conversation(identity: str, *contents: str, feedback: list[dict] | None = None, **more) -> dict:
    messages = [
        {"id": f"{identity}-{i}", "role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(contents)
    ]
    return {
        "id": identity,
        "source": "chat",
        "started_at": "2026-01-31T10:00:00Z",
        "messages": messages,
        "feedback": feedback or [],
        "metadata": {},
        **more,
    }


def random_conversations(count: int, words: int = 8) -> list[dict]:
    draw = random.Random(0)
    texts = lambda: " ".join(draw.choices(WORDS, k=words))  # noqa: E731
    return [conversation(f"c{index:03}", texts() + "?", texts() + ".") for index in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def everything(built) -> dict[str, str]:
    return {example.id: split for split in SPLITS for example in built.splits[split]} | built.left_out


# --- the direct use --------------------------------------------------------------------------------------------------


def test_conversations_become_train_validation_and_test():
    dataset = DatasetBuilder().build_dataset(random_conversations(100))
    assert list(dataset) == ["train", "validation", "test"]
    assert sum(map(len, dataset.values())) == 100
    assert len(dataset["train"]) > len(dataset["test"]) > 0
    row = dataset["train"][0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_logged_exchanges_are_accepted():
    exchanges = [
        {"id": f"e{i}", "user_message": f"q {i}?", "assistant_response": f"a {i}.", "metadata": {"session_id": f"{i}"}}
        for i in range(12)
    ]
    dataset = DatasetBuilder().build_dataset(exchanges)
    assert sum(map(len, dataset.values())) == 12
    assert all(dataset[split] for split in SPLITS)


def test_exchanges_of_one_session_share_a_split():
    exchanges = [
        {
            "id": f"e{i}",
            "user_message": f"q {i}?",
            "assistant_response": f"a {i}.",
            "metadata": {"session_id": f"{i % 5}"},
        }
        for i in range(50)
    ]
    dataset = DatasetBuilder().build_dataset(exchanges)
    found = {}
    for split, rows in dataset.items():
        for row in rows:
            found.setdefault(int(row["id"][1:]) % 5, set()).add(split)
    assert all(len(splits) == 1 for splits in found.values())


def test_one_session_alone_still_fills_the_splits():
    exchanges = [
        {"user_message": f"q {i}?", "assistant_response": f"a {i}.", "metadata": {"session_id": "test_session"}}
        for i in range(10)
    ]
    assert all(DatasetBuilder().build_dataset(exchanges).values())


def test_one_conversation_is_train():
    dataset = DatasetBuilder().build_dataset([conversation("c", "q", "a")])
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 1, "validation": 0, "test": 0}


def test_equal_conversations_share_a_split():
    twins = [conversation(f"c{i}", f"question {i // 2}?", f"ANSWER {i // 2}") for i in range(60)]
    dataset = DatasetBuilder().build_dataset(twins)
    where = {row["id"]: split for split, rows in dataset.items() for row in rows}
    assert all(where[f"c{i}"] == where[f"c{i + 1}"] for i in range(0, 60, 2))


def test_nothing_to_train_on_is_one_line_with_the_reasons():
    with pytest.raises(UserError, match="1 malformed, 2 no_reply"):
        DatasetBuilder().build_dataset(
            [conversation("a", "q"), conversation("b", "q"), conversation("c", "q", "a", messages=[{"role": "x"}])]
        )
    with pytest.raises(UserError, match="nothing was given"):
        DatasetBuilder().build_dataset([])


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_on": "some"},
        {"validation_fraction": 0.6, "test_fraction": 0.6},
        {"test_fraction": -0.1},
        {"test_fraction": "a tenth"},
        {"salt": ""},
        {"salt": None},
        {"latest_from": "yesterday"},
        {"latest_from": 2026},
        {"decontamination_words": -1},
        {"max_train_tokens": 1.5},
        {"tokenizer": "/nowhere"},
    ],
)
def test_an_argument_that_cannot_be_is_one_line(arguments):
    with pytest.raises(UserError) as told:
        DatasetBuilder(**arguments).build_dataset(random_conversations(20))
    assert "\n" not in str(told.value)


def test_a_tokenizer_may_be_named_by_its_folder(tiny_base):
    dataset = DatasetBuilder(tokenizer=str(tiny_base)).build_dataset(random_conversations(20))
    assert all(row["input_ids"] for rows in dataset.values() for row in rows)


def test_building_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; from fine_tuning.data_preparation.dataset_builder import DatasetBuilder\n"
        "from fine_tuning.data_preparation.formatter import TrainingDataFormatter\n"
        "DatasetBuilder().build_dataset([{'user_message': 'q', 'assistant_response': 'a'}])\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_of_unpaired_preferences_the_disliked_half_is_not_trained(tokenizer):
    """TRL's KTO set from the file to the labels; a completion that is rated both ways is a disliked one."""
    texts = [row["messages"] for row in random_conversations(40)]
    rows = [
        {"prompt": q["content"], "completion": a["content"], "label": number % 2 == 0}
        for number, (q, a) in enumerate(texts)
    ]
    rows.append(rows[0] | {"label": False})
    found = list(import_records(enumerate(rows, start=1), "import", "2026-01-01T00:00:00Z"))
    cleaned = DataCleaner().filter_conversations([item.conversation for item in found])
    assert len(cleaned) == 40
    dataset = DatasetBuilder(train_on="not_disliked", tokenizer=tokenizer).build_dataset(cleaned)
    labels = [row["labels"] for split in SPLITS for row in dataset[split]]
    trained = {tokenizer.decode([label for label in row if label != NOT_TRAINED]) for row in labels}
    good = {row["completion"] for row in rows[1:] if row["label"]}
    assert {text.removesuffix("<|im_end|>").strip() for text in trained} == good


# --- what is trained on ----------------------------------------------------------------------------------------------

JUDGED = conversation(
    "c",
    "q1",
    "liked",
    "q2",
    "disliked",
    "q3",
    "unrated",
    "q4",
    "wrong",
    "q5",
    "last",
    feedback=[
        {"message_id": "c-1", "rating": 1},
        {"message_id": "c-3", "rating": 1, "by": "a"},
        {"message_id": "c-3", "rating": -1, "by": "b"},
        {"message_id": "c-7", "rating": -1, "edited": "right"},
        {"message_id": "c-9", "rating": -1},
    ],
)


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("all", ["liked", "disliked", "unrated", "right", "last"]),
        ("not_disliked", ["liked", "unrated", "right"]),
        ("endorsed", ["liked", "right"]),
    ],
)
def test_the_policy_says_which_replies_are_trained(train_on, trained):
    built = DatasetBuilder(train_on=train_on).build([JUDGED], {})
    example = built.splits["train"][0]
    found = [m["content"] for m, wanted in zip(example.messages, example.trained, strict=True) if wanted]
    assert found == trained
    # The others are context, up to the last reply that is trained.
    assert example.messages[-1]["content"] == trained[-1]
    assert "disliked" in [m["content"] for m in example.messages]


def test_the_author_of_a_reply_stays_known():
    judged = json.loads(json.dumps(JUDGED))
    judged["messages"][1]["model"] = "whetstone:3"
    messages = DatasetBuilder().build([judged], {}).splits["train"][0].messages
    assert messages[1] == {"role": "assistant", "content": "liked", "model": "whetstone:3", "rating": 1}
    assert messages[7] == {"role": "assistant", "content": "right", "edited": True, "person": True, "rating": -1}


def test_held_out_splits_do_not_change_with_what_is_trained_on():
    conversations = random_conversations(60)
    for index, one in enumerate(conversations):
        one["feedback"] = [{"message_id": f"{one['id']}-1", "rating": (1, -1, None)[index % 3]}]
    builds = {policy: DatasetBuilder(train_on=policy).build(conversations, {}) for policy in ("all", "endorsed")}
    for split in ("validation", "test"):
        assert builds["all"].splits[split] == builds["endorsed"].splits[split]
    assert len(builds["endorsed"].splits["train"]) < len(builds["all"].splits["train"])
    assert "not_endorsed" in builds["endorsed"].left_out.values()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("train_on", "reasons"),
    [
        ("all", {"broken": "context_only", "weightless": "context_only"}),
        ("not_disliked", {"broken": "context_only", "weightless": "context_only", "disliked": "disliked"}),
        (
            "endorsed",
            {"broken": "context_only", "weightless": "context_only", "disliked": "disliked", "plain": "not_endorsed"},
        ),
    ],
)
def test_what_no_reply_is_used_of_is_left_out_for_what_is_true_of_it(train_on, reasons, split):
    broken, weightless = conversation("broken", "q1", "half"), conversation("weightless", "q2", "told by a search")
    broken["messages"][1]["incomplete"] = "stopped"
    weightless["messages"][1]["weight"] = 0
    disliked = conversation("disliked", "q3", "wrong", feedback=[{"message_id": "disliked-1", "rating": -1}])
    liked = conversation("liked", "q4", "right", feedback=[{"message_id": "liked-1", "rating": 1}])
    given = [broken, weightless, disliked, liked, conversation("plain", "q5", "so so")]
    built = DatasetBuilder(train_on=train_on).build(given, {}, dict.fromkeys((one["id"] for one in given), split))
    if split == "test":  # always as not_disliked
        reasons = {"broken": "context_only", "weightless": "context_only", "disliked": "disliked"}
    assert built.left_out == reasons


def test_a_reply_that_was_broken_off_is_context():
    broken = conversation("c", "q1", "half a", "q2", "whole")
    broken["messages"][1]["incomplete"] = "stopped"
    assert DatasetBuilder().build([broken], {}).splits["train"][0].trained == [False, False, False, True]
    mended = broken | {"feedback": [{"message_id": "c-1", "rating": None, "edited": "half a loaf"}]}
    assert DatasetBuilder().build([mended], {}).splits["train"][0].trained == [False, True, False, True]


def test_a_reply_preferred_to_others_is_endorsed():
    preferred = conversation("c", "q1", "better", feedback=[{"message_id": "c-1", "rating": None, "over": ["x"]}])
    assert DatasetBuilder(train_on="endorsed").build([preferred], {}).splits["train"]


def test_a_greeting_before_the_first_question_is_not_trained():
    greeted = conversation("c", "q", "a")
    greeted["messages"].insert(0, {"role": "assistant", "content": "Welcome!"})
    assert DatasetBuilder().build([greeted], {}).splits["train"][0].trained == [False, False, True]


# --- what is left out ------------------------------------------------------------------------------------------------


def test_every_conversation_is_in_a_split_or_left_out_with_a_reason(tokenizer):
    conversations = [*random_conversations(30), conversation("x", "q"), conversation("y", "why " * 600, "so")]
    built = DatasetBuilder(tokenizer=tokenizer, max_train_tokens=1500).build(conversations, {}, {"y": "test"})
    assert everything(built).keys() == {c["id"] for c in conversations}
    assert built.left_out["x"] == "no_reply"
    assert built.left_out["y"] == "too_long"
    assert "max_train_tokens" in built.left_out.values()


def test_the_newest_version_of_a_conversation_wins_and_a_deleted_one_is_gone():
    versions = [conversation("a", "q", "old"), conversation("a", "q", "new"), conversation("b", "q", "a")]
    built = DatasetBuilder().build([*versions, {"id": "b", "messages": [], "deleted": True}], {})
    assert list(everything(built)) == ["a"]
    assert built.splits["train"][0].messages[1]["content"] == "new"


def test_train_conversations_that_quote_the_test_split_are_left_out():
    quoted = "one two three four five six seven eight nine ten eleven twelve"
    clean = [conversation(f"c{i}", f"question {i}", f"answer {i}") for i in range(20)]
    held_out = conversation("t", "quote?", f"It says: {quoted}.")
    copies = conversation("copy", "again?", f"well, {quoted.upper().replace(' ', ', ')}!")
    shorter = conversation("shorter", "again?", quoted.removesuffix(" twelve"))
    dealt = {"t": "test", "copy": "train", "shorter": "train"}
    built = DatasetBuilder().build([*clean, held_out, copies, shorter], {}, dealt)
    assert built.left_out == {"copy": "overlaps_test"}
    assert built.assigned["copy"] == "train"
    assert not DatasetBuilder(decontamination_words=0).build([*clean, held_out, copies], {}, dealt).left_out


@pytest.mark.parametrize("text", ["今日は天気がいいから散歩しましょう", "".join(map(chr, range(0x20000, 0x20010)))])
def test_scripts_without_spaces_are_decontaminated_too(text):
    dealt = {"t": "test", "copy": "train", "other": "train"}
    conversations = [conversation("t", "q", text), conversation("copy", "p", "ね、" + text)]
    built = DatasetBuilder().build([*conversations, conversation("other", "x", "y")], {}, dealt)
    assert built.left_out == {"copy": "overlaps_test"}


def test_a_phrase_that_everyone_uses_is_no_copy():
    phrase = "As an assistant of this house I would always be glad to help you further with"
    conversations = [conversation(f"c{i}", f"question {i}", f"{phrase} {WORDS[i]}") for i in range(100)]
    assert not DatasetBuilder().build(conversations, {}).left_out


def test_no_train_conversation_shares_twelve_words_with_test():
    draw = random.Random(1)
    pool = [" ".join(draw.choices(WORDS, k=14)) for _ in range(60)]
    conversations = [
        conversation(f"c{i}", " ".join(draw.choices(WORDS, k=draw.randrange(1, 9))), draw.choice(pool))
        for i in range(80)
    ]
    built = DatasetBuilder().build(conversations, {})

    def runs(split):
        for example in built.splits[split]:
            words = example.messages[1]["content"].split()
            yield from (tuple(words[i : i + 12]) for i in range(len(words) - 11))

    assert "overlaps_test" in built.left_out.values()
    assert set(runs("train")).isdisjoint(runs("test"))


@given(st.integers(1, 14), st.text("ab ,ß’も", max_size=60), st.text("ab ,ß’も", max_size=60))
@settings(max_examples=300, deadline=None)
def test_looking_at_few_places_misses_nothing(length, held, other):
    def runs(text):
        words = [word for word in re.split(r"[ ,’]+|(も)", text.casefold()) if word]
        return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}

    held_out = HeldOut(length)
    held_out.add([{"role": "user", "content": held}])
    shared = held_out.shared_with([{"role": "user", "content": other}])
    assert len(shared) == len(runs(held) & runs(other))
    assert set(held_out.pieces_of([other])) & set(held_out.pieces.tolist()) or not shared


def test_the_sample_of_train_tokens_is_stable_when_data_grow(tokenizer):
    builder = DatasetBuilder(tokenizer=tokenizer, max_train_tokens=4000)
    small, large = random_conversations(100), random_conversations(110)
    first = builder.build(small, {})
    second = builder.build(large, {}, first.assigned)
    before, after = ({e.id for e in built.splits["train"]} for built in (first, second))
    assert sum(len(e.input_ids) for e in second.splits["train"]) <= 4000
    assert len(before & after) >= 0.8 * len(before)


def test_own_conversations_are_trained_on_before_those_of_the_sample(tokenizer):
    sample = [{**c, "source": "sample"} for c in random_conversations(100)]
    own = [{**conversation(f"own{i}", f"question {i}?", f"reply {i}."), "source": "chat"} for i in range(10)]
    built = DatasetBuilder(tokenizer=tokenizer, max_train_tokens=1500).build([*sample, *own], {})
    assert "max_train_tokens" in built.left_out.values()
    assert not {c["id"] for c in own} & built.left_out.keys()
    assert any(e.id.startswith("own") for e in built.splits["train"])


def test_only_the_sample_is_capped_unless_everything_is(tokenizer):
    sample = [{**c, "source": "sample"} for c in random_conversations(100)]
    own = [{**conversation(f"own{i}", f"question {i}?", f"reply {i}."), "source": "chat"} for i in range(100)]
    built = DatasetBuilder(tokenizer=tokenizer, max_sample_tokens=1000).build([*sample, *own], {})
    assert set(built.left_out.values()) == {"max_sample_tokens"}
    assert not {c["id"] for c in own} & built.left_out.keys()
    tokens = [len(e.input_ids) for e in built.splits["train"] if e.source == "sample"]
    assert 800 < sum(tokens) <= 1000
    held_out = {e.id for split in ("test", "validation") for e in built.splits[split]}
    assert len(held_out & {c["id"] for c in sample}) > 15
    # The larger cap counts both; it is met first where people's own conversations fill it.
    both = DatasetBuilder(tokenizer=tokenizer, max_sample_tokens=1000, max_train_tokens=600)
    assert set(both.build([*sample, *own], {}).left_out.values()) == {"max_train_tokens"}


def long_conversation(identity: str, turns: int, words: int = 12) -> dict:
    draw = random.Random(identity)
    return conversation(identity, *(" ".join(draw.choices(WORDS, k=words)) for _ in range(2 * turns)))


def test_windows_of_a_conversation_share_id_cluster_and_split_and_train_each_reply_once(tokenizer, tmp_path):
    conversations = [long_conversation("long", 40), *random_conversations(30)]
    builder = DatasetBuilder(tokenizer=tokenizer, max_length=256)
    built = builder.build(conversations, {"long": "its-cluster"}, {"long": "train"})
    windows = [e for e in built.splits["train"] if e.id == "long"]
    assert len(windows) > 5 and [e.window for e in windows] == list(range(len(windows)))
    assert {e.cluster for e in windows} == {"its-cluster"}
    assert "long" not in {e.id for s in ("test", "validation") for e in built.splits[s]}
    said = [
        tokenizer.decode([label for label in e.labels if label != NOT_TRAINED]).split("<|im_end|>") for e in windows
    ]
    replies = [reply.strip() for window in said for reply in window if reply.strip()]
    assert replies == [m["content"] for m in conversations[0]["messages"] if m["role"] == "assistant"]
    tally = Tally()
    with open(tmp_path / "rows.parquet", "wb") as file:
        write_batches(file, tally.watch([row_batch(built.splits["train"])]))
    rows = read_rows(tmp_path, ("id", "window"))
    assert [row.window for row in rows if row.id == "long"] == list(range(len(windows)))
    counts = tally.statistics()
    assert counts["windows"] == len(rows) and counts["conversations"] == len({row.id for row in rows})
    assert counts["several_windows"] == 1 and counts["lost_reply_tokens"] == 0


def test_of_a_long_held_out_conversation_some_windows_are_measured(tokenizer):
    conversations = [long_conversation(f"long{n}", 40) for n in range(6)]
    dealt = {c["id"]: ("test", "validation", "train")[n % 3] for n, c in enumerate(conversations)}
    whole = DatasetBuilder(tokenizer=tokenizer, max_length=256).build(conversations, {}, dealt)
    some = DatasetBuilder(tokenizer=tokenizer, max_length=256, max_held_out_tokens=60_000)
    built = some.build(conversations, {}, dealt)
    assert not built.left_out and built.splits["train"] == whole.splits["train"]
    for split in ("test", "validation"):
        windows = Counter(e.id for e in built.splits[split])
        assert set(windows) == {e.id for e in whole.splits[split]} and set(windows.values()) <= {2, 3}
        trained = [tuple(e.labels) for e in whole.splits[split]]
        assert all(tuple(e.labels) in trained for e in built.splits[split])
        assert [e.window for e in built.splits[split] if e.id == min(windows)] == list(range(windows[min(windows)]))
        tally = Tally()
        (batch,) = tally.watch([row_batch(built.splits[split])])
        assert batch.num_rows + tally.statistics()["windows_left_out"] == len(trained)


def test_rows_out_of_the_memo_are_those_that_were_never_in_it(tokenizer, tmp_path, monkeypatch):
    from fine_tuning.data_preparation import encoded_memo
    from fine_tuning.data_preparation.catalogue import Catalogue, FactSettings, HeldConversations
    from fine_tuning.data_preparation.encodings import HeldRows
    from fine_tuning.data_preparation.splits import Ledger

    monkeypatch.setattr(encoded_memo, "BLOCK_BYTES", 9000)
    held = HeldConversations([*(long_conversation(f"long{n}", 40) for n in range(4)), *random_conversations(40)])
    builder = DatasetBuilder(tokenizer=tokenizer, max_length=256, max_held_out_tokens=60_000, max_train_tokens=9000)
    ledger = Ledger(None, builder.salt, {"long0": "test", "long1": "validation", "long2": "train"})

    def built(encoded):
        facts = held.facts(FactSettings("all", builder.salt, builder.decontamination_words))
        facts.of(0, "line")[:] = np.arange(2 * len(facts)).reshape(-1, 2)
        catalogue = Catalogue(facts, [("c001", "c000")], ledger, builder.fractions, builder.salt)
        return {
            split: list(encoded.take(chosen.ordered(catalogue)))
            for split, chosen in builder.choose(held, catalogue, encoded)
        }

    plain = {split: row_batch(rows).to_pylist() for split, rows in built(HeldRows()).items()}
    assert any(row["windows_left_out"] for row in plain["test"]) and len(plain["train"]) > 5
    for _ in range(2):
        with encoded_memo.EncodedMemo(tmp_path, ()) as encoded:
            found = built(encoded)
        for split, rows in plain.items():
            assert [
                {name: row[name] for name in rows[0]} for batch in found[split] for row in batch.to_pylist()
            ] == rows


def test_held_out_splits_are_sampled_likewise(tokenizer):
    built = DatasetBuilder(tokenizer=tokenizer, max_held_out_tokens=300).build(random_conversations(100), {})
    assert all(0 < sum(len(e.input_ids) for e in built.splits[s]) <= 300 for s in ("validation", "test"))
    assert "max_held_out_tokens" in built.left_out.values()


def test_the_sample_is_never_empty(tokenizer):
    built = DatasetBuilder(tokenizer=tokenizer, max_train_tokens=1).build(random_conversations(30), {})
    assert len(built.splits["train"]) == 1


def test_ids_out_of_a_table_are_texts():
    plain = random_conversations(60)
    tabled = [c | {"id": np.str_(c["id"]), "source": np.str_(c.get("source") or "chat")} for c in plain]
    built = DatasetBuilder().build_dataset(tabled)
    assert built == DatasetBuilder().build_dataset([c | {"source": c.get("source") or "chat"} for c in plain])
    assert {type(row["id"]) for rows in built.values() for row in rows} == {str}


def test_newcomers_move_nobody(tokenizer):
    conversations = random_conversations(120)
    first = DatasetBuilder().build(conversations[:60], {})
    second = DatasetBuilder().build(conversations, {}, first.assigned)
    where = everything(second)
    assert all(where[key] == split for key, split in everything(first).items())


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_same_conversations_give_the_same_bytes(tokenizer, tmp_path):
    for name in ("one", "two"):
        built = DatasetBuilder(tokenizer=tokenizer).build(random_conversations(30), {})
        write_rows(tmp_path / name, built.splits["train"])
    assert (tmp_path / "one/rows.parquet").read_bytes() == (tmp_path / "two/rows.parquet").read_bytes()


def test_a_split_is_read_as_it_was_written(tokenizer, tmp_path):
    built = DatasetBuilder(tokenizer=tokenizer).build([JUDGED, *random_conversations(5)], {})
    write_rows(tmp_path / "train", built.splits["train"])
    names = ("id", "source", "cluster", "window", "messages", "input_ids", "labels")
    rows = read_rows(tmp_path / "train", names)
    assert [row.stored() for row in rows] == [row.stored() for row in built.splits["train"]]
    assert all(any(label != NOT_TRAINED for label in row.labels) for row in rows)


def test_a_missing_split_names_the_command(tmp_path):
    with pytest.raises(UserError, match="dvc repro prepare"):
        read_rows(tmp_path / "test")


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A folder with clean conversations and a base, as the stage finds them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(tiny_base)
    document = yaml.safe_load((ROOT / "params.yaml").read_text())

    class Project:
        def clean(self, conversations: list[dict]) -> None:
            write_jsonl("data/clean/shard.jsonl", conversations)
            write_jsonl("data/clean/rejected.jsonl", [{"id": "r", "reason": "too_short"}])
            write_jsonl("data/clean/clusters.jsonl", [])

        def params(self, **prepare) -> None:
            changed = document | {"prepare": document["prepare"] | prepare}
            (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed))

        def split_of(self) -> dict[str, str]:
            return {row.id: split for split in SPLITS for row in read_rows(f"data/prepared/{split}")}

    project = Project()
    project.clean(random_conversations(60))
    project.params()
    return project


def test_the_stage_writes_splits_ledger_metrics_and_plot(project):
    prepare.main()
    metrics = json.loads(Path("metrics/prepare.json").read_text())
    assert metrics["conversations"] == 60
    assert {split: metrics["splits"][split]["conversations"] for split in SPLITS} == {
        split: len(read_rows(f"data/prepared/{split}")) for split in SPLITS
    }
    assert metrics["splits"]["train"]["by_source"]["chat"]["tokens"] == metrics["splits"]["train"]["tokens"]
    assert 0 < metrics["splits"]["train"]["trained_share"] < 1
    # of the tiny base's template: two marks a turn, and the system prompt's
    assert metrics["splits"]["test"]["control_tokens"] >= 4 * metrics["splits"]["test"]["conversations"]
    parts = list(csv.DictReader(Path("metrics/plots/prepare_tokens.csv").read_text().splitlines()))
    assert {row["part"]: int(row["tokens"]) for row in parts} == {
        f"{split}: {source}": counts["tokens"]
        for split in SPLITS
        for source, counts in metrics["splits"][split]["by_source"].items()
    }
    header, *bins = Path("metrics/plots/prepare_lengths.csv").read_text().splitlines()
    assert header == "tokens,train,validation,test"
    assert sum(sum(map(int, line.split(",")[1:])) for line in bins) == 60 - sum(metrics["left_out"].values())
    assert len(Path("data/splits.txt").read_text().splitlines()) == 60


def test_the_stage_writes_the_same_bytes_again(project):
    prepare.main()
    files = [*Path("data/prepared").rglob("*.parquet"), Path("data/splits.txt"), Path("metrics/prepare.json")]
    before = [file.read_bytes() for file in files]
    prepare.main()
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("second", [{"train_on": "all"}, {"salt": "other"}, {"max_held_out_tokens": 300}])
def test_files_of_earlier_runs_are_taken_only_where_their_rows_are_the_same(project, second):
    judged = [JUDGED | {"id": f"{n}", "messages": [m | {"content": f"{m['content']} {n}"} for m in JUDGED["messages"]]}
              for n in range(30)]  # fmt: skip
    project.clean([*judged, *(long_conversation(f"long{n}", 40) for n in range(9))])
    prepare.main()
    project.params(**second)
    prepare.main()
    files = [*Path("data/prepared").rglob("*.parquet"), Path("metrics/prepare.json")]
    taken = [file.read_bytes() for file in files]
    shutil.rmtree(".whetstone")
    prepare.main()
    assert [file.read_bytes() for file in files] == taken


def test_the_ledger_outlives_arrivals_and_deletions(project):
    prepare.main()
    before = project.split_of()
    project.clean(random_conversations(90)[30:])
    prepare.main()
    after = project.split_of()
    assert all(after[key] == before[key] for key in after.keys() & before.keys())
    project.clean(random_conversations(60))
    prepare.main()
    assert project.split_of() == before


def test_splits_that_were_dealt_before_the_ledger_came_into_git_stay(project, capsys):
    prepare.main()
    before = project.split_of()
    # As it was kept: with other splits than would be dealt now, and some of another salt.
    moved = {key: SPLITS[(SPLITS.index(split) + 1) % 3] for key, split in before.items()}
    Path("data/splits.txt").unlink()
    lines = [{"id": key, "split": split, "salt": "whetstone"} for key, split in moved.items()]
    write_jsonl("data/splits/ledger.jsonl", [*lines, *({"id": k, "split": "train", "salt": "old"} for k in moved)])
    capsys.readouterr()
    prepare.main()
    assert project.split_of() == moved
    assert capsys.readouterr().out.count("60 splits taken over from data/splits into data/splits.txt") == 2
    assert not Path("data/splits").exists()


def test_newly_dealt_conversations_are_told(project, capsys):
    prepare.main()
    assert "60 new conversations" in capsys.readouterr().out
    project.clean(random_conversations(65))
    prepare.main()
    assert "5 new conversations" in capsys.readouterr().out


def test_what_is_left_out_is_told_with_its_reason_and_its_share_of_the_text(project, capsys):
    own = [{**c, "source": "chat", "id": f"own-{c['id']}"} for c in random_conversations(20)]
    project.clean([*own, *({**c, "source": "sample"} for c in random_conversations(80)[20:])])
    project.params(max_train_tokens=None, max_sample_tokens=600)
    prepare.main()
    metrics = json.loads(Path("metrics/prepare.json").read_text())
    assert metrics["splits"]["train"]["by_source"]["sample"]["tokens"] <= 600
    assert list(metrics["left_out"]) == ["max_sample_tokens"]
    share = metrics["characters_left_out"]["max_sample_tokens"] / metrics["characters"]
    assert share == pytest.approx(metrics["left_out"]["max_sample_tokens"] / 80, rel=0.2)
    assert f"left out: {metrics['left_out']['max_sample_tokens']} max_sample_tokens" in capsys.readouterr().out
    said = in_words(metrics)
    assert said[0].startswith(f"{metrics['splits']['train']['conversations']} conversations with")
    assert "prepare.max_sample_tokens" in said[1] and f"({share:.1%} of the text)" in said[1]
    # Metrics of an earlier version count no characters.
    assert "of the text" not in in_words({key: metrics[key] for key in ("splits", "left_out")})[1]


def test_another_salt_deals_anew(project):
    prepare.main()
    before = project.split_of()
    project.params(salt="other")
    prepare.main()
    assert project.split_of() != before


def test_a_split_without_conversations_is_one_line(project):
    project.clean(random_conversations(2))
    with pytest.raises(UserError, match=r"no conversation is left for the validation split.*fine_tuning import"):
        prepare.main()
    assert not Path("data/splits.txt").exists()


def test_three_conversations_are_enough(project):
    project.clean(random_conversations(3))
    prepare.main()
    assert sorted(project.split_of().values()) == sorted(SPLITS)


def test_a_date_in_params_makes_the_latest_test(project):
    conversations = random_conversations(40)
    for one in conversations[30:]:
        one["started_at"] = "2026-03-01T00:00:00Z"
    project.clean(conversations)
    project.params(latest_from="2026-02-01")
    prepare.main()
    assert {key for key, split in project.split_of().items() if split == "test"} == {
        c["id"] for c in conversations[30:]
    }


def test_the_section_of_params_is_read():
    assert read_params("prepare", PrepareSettings).test_fraction > 0


def test_statistics_count_what_was_left_out_by_reason(tokenizer):
    built = DatasetBuilder(tokenizer=tokenizer).build([*random_conversations(10), conversation("x", "q")], {})
    tallies = {split: Tally() for split in SPLITS}
    for split, tally in tallies.items():
        assert [batch.num_rows for batch in tally.watch([row_batch(built.splits[split])])] == [len(built.splits[split])]
    counts = statistics(tallies, Counter(built.left_out.values()))
    assert counts["left_out"] == {"no_reply": 1} and counts["conversations"] == 11
    assert sum(row["train"] for row in length_histogram(tallies)) == len(built.splits["train"])


def test_what_was_held_out_stays_held_out_when_a_better_duplicate_takes_its_place(tmp_path, monkeypatch):
    from fine_tuning.common.results import Memo
    from fine_tuning.data_collection.cleaning.shard_cleaner import clean_shards
    from fine_tuning.data_collection.data_cleaner import default_settings
    from fine_tuning.data_preparation.catalogue import ConversationFiles
    from fine_tuning.data_preparation.encodings import HeldRows
    from fine_tuning.data_preparation.splits import Ledger

    monkeypatch.chdir(tmp_path)
    cleaning = default_settings().model_copy(update={"processes": 1})
    texts = [(f"What is topic {n} about, please?", f"It is about {n * 7} things and {n * 3} more.") for n in range(150)]
    shards = [Path("a.jsonl"), Path("b.jsonl")]

    names = ("first", "second")

    def build(count: int) -> tuple[dict[str, str], dict[str, str]]:
        clean_shards([(path, path.name) for path in shards[:count]], prepare.CLEAN, Path("memo"), cleaning, ())
        clean = ConversationFiles(
            [prepare.CLEAN / path for path in shards[:count]], Memo(tmp_path / "facts", "prepare")
        )
        ledger, builder, rows = Ledger("splits.txt", "whetstone"), DatasetBuilder(), HeldRows()
        catalogue = builder.catalogue(clean, prepare.clusters(), ledger, map, prepare.dropped_duplicates())
        dealing = builder.choose(clean, catalogue, rows)
        splits = {
            e.messages[0]["content"]: split for split, chosen in dealing for e in rows.take(chosen.ordered(catalogue))
        }
        catalogue.remember(ledger)
        return splits, dict(Ledger("splits.txt", "whetstone").find(f"{k}{n}" for n in range(150) for k in names))

    write_jsonl(shards[0], (conversation(f"first{n}", *text) for n, text in enumerate(texts)))
    first, before = build(1)
    older = {"started_at": "2020-01-01T00:00:00Z"}
    write_jsonl(shards[1], (conversation(f"second{n}", *text, **older) for n, text in enumerate(texts)))
    second, after = build(2)
    assert second == first and set(first.values()) == set(SPLITS)
    assert {f"second{n}" for n in range(150)} <= after.keys() and before.items() <= after.items()


def test_a_run_of_words_is_common_when_more_than_ten_say_it_or_a_tenth_of_few():
    def named(sharing: int, conversations: int) -> int:
        shared = {f"c{number}": {(b"one", b"run")} for number in range(sharing)}
        return len(repeating(shared | {"other": set()}, conversations))

    assert (named(10, 1000), named(11, 1000)) == (10, 0)
    assert (named(5, 50), named(6, 50)) == (5, 0)
    assert (named(1, 3), named(2, 3)) == (1, 0)
    rare = {"a": {(b"common",), (b"rare",)}, "b": {(b"common",)}, "c": {(b"common",)}}
    assert repeating(rare, 20) == {"a"}


def test_lengths_and_shares_of_a_split_are_counted_by_hand():
    def example(identity: str, source: str, tokens: int, trained: int, cut: int) -> PreparedRow:
        labels = [NOT_TRAINED] * (tokens - trained) + [7] * trained
        encoded = Encoded([7] * tokens, labels, [], 0, cut, control_ids=2)
        return encoded_row(encoded, id=identity, source=source, cluster=identity)

    examples = [example("a", "chat", 4, 1, 0), example("b", "chat", 20, 5, 3), example("c", "sample", 6, 3, 0)]
    tally = Tally()
    assert [batch.num_rows for batch in tally.watch(map(row_batch, (examples[:2], examples[2:])))] == [2, 1]
    found = tally.statistics()
    by_hand = {
        "conversations": 3, "tokens": 30, "trained_tokens": 9, "trained_share": 0.3, "control_tokens": 6,
        "tokens_mean": 10.0, "tokens_median": 6, "tokens_max": 20,
    }  # fmt: skip
    assert {name: found[name] for name in by_hand} == by_hand
    counts = found["by_source"]["chat"]
    assert (counts["conversations"], counts["tokens"], counts["trained_tokens"]) == (2, 24, 6)
    rows = length_histogram({split: tally for split in SPLITS}, bins=4)
    assert [(row["tokens"], row["train"]) for row in rows] == [(5, 1), (10, 1), (15, 0), (20, 1)]
