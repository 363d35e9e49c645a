"""Pairs and thumbs: what people said becomes training data, in the split of its conversation, and nothing else does."""

from collections import Counter

import pytest

from fine_tuning.common.records import read_jsonl
from fine_tuning.data_collection.data_export import DataExporter
from fine_tuning.data_collection.importers import import_records
from fine_tuning.data_preparation.catalogue import HeldConversations
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.encodings import HeldRows
from fine_tuning.data_preparation.preferences import find_preferences, settle
from fine_tuning.data_preparation.splits import Ledger
from fine_tuning.evaluation.suite.preferences import preference_items
from fine_tuning.schema.chat_format import end_of_turn_ids, load_tokenizer
from fine_tuning.schema.judgements import judgements_of
from fine_tuning.schema.preferences import PreferredPair, read_pairs, read_preferences, read_thumbs, write_preferences


def chat(identity: str, question: str, reply: str, *feedback: dict, others: tuple[str, ...] = (), **more) -> dict:
    """A chat of one exchange; `others` are alternatives of the reply, with ids identity-0, identity-1, …"""
    alternatives = [
        {"id": f"{identity}-{n}", "role": "assistant", "content": text, "model": "other", "version": 2}
        for n, text in enumerate(others)
    ]
    messages = [
        {"id": f"{identity}-user", "role": "user", "content": question},
        {"id": identity, "role": "assistant", "content": reply, "model": "tiny", "alternatives": alternatives},
    ]
    said = [{"message_id": identity} | entry for entry in feedback]
    start = {"source": "chat", "started_at": "2026-01-31T10:00:00.000Z", "metadata": {}}
    return {"id": identity, "messages": messages, "feedback": said} | start | more


def settled(*conversations: dict):
    dropped: Counter[str] = Counter()
    pairs, thumbs = settle([j for c in conversations for j in judgements_of(c)], dropped)
    said = [(p.judgement.kind, p.judgement.better.text, p.judgement.worse.text) for p in pairs]
    return said, [(t.judgement.liked, t.judgement.better.text) for t in thumbs], dict(dropped)


def test_an_edit_was_preferred_to_what_it_replaced():
    (judgement,) = judgements_of(chat("c", "Hello?", "Hi", {"edited": "Good day."}))
    assert judgement.better == ("Good day.", "person") and judgement.worse == ("Hi", "tiny")
    assert judgement.prompt == [{"role": "user", "content": "Hello?"}]


def test_a_reply_was_preferred_to_the_alternatives_that_were_named():
    said = chat("c", "Hello?", "Good day.", {"over": ["c-0"]}, others=("Hi", "Ho"))
    assert settled(said) == ([("preferred", "Good day.", "Hi")], [], {})
    assert settled(said | {"source": "compare"})[0] == [("vote", "Good day.", "Hi")]
    (judgement,) = judgements_of(said)
    assert judgement.worse.author == "other@2"


def test_a_liked_and_a_disliked_reply_to_one_prompt_are_a_pair_also_of_different_conversations():
    found = settled(
        chat("a", "How  do I restart?", "Hold the button.", {"rating": 1}),
        chat("b", "how do I RESTART?", "No idea.", {"rating": -1}),
        chat("c", "Another question?", "Fine.", {"rating": 1}),
    )
    assert found == ([("thumbs", "Hold the button.", "No idea.")], [(True, "Fine.")], {})


def test_an_alternative_with_a_thumb_counts_too():
    said = chat("c", "Hello?", "Hi", {"rating": -1}, {"message_id": "c-0", "rating": 1}, others=("Good day.",))
    assert settled(said)[0] == [("thumbs", "Good day.", "Hi")]


def test_thumbs_do_not_repeat_what_was_compared_directly():
    said = chat(
        "c", "Hello?", "Hi", {"rating": 1, "over": ["c-0"]}, {"message_id": "c-0", "rating": -1}, others=("Ho",)
    )
    assert settled(said) == ([("preferred", "Hi", "Ho")], [], {})


def test_of_one_person_the_newest_judgement_counts_and_of_several_the_majority():
    def vote(identity, at, better, worse, by):
        return chat(identity, "Hello?", better, {"over": [f"{identity}-0"], "by": by}, others=(worse,), started_at=at)

    changed = [vote("a", "2026-01-01", "Hi", "Ho", "ann"), vote("b", "2026-01-02", "Ho", "Hi", "ann")]
    assert settled(*changed)[0] == [("preferred", "Ho", "Hi")]
    several = [*changed, vote("c", "2026-01-03", "Hi", "Ho", "ben")]
    assert settled(*several) == ([], [], {"tie": 1})
    several.append(vote("d", "2026-01-04", "Hi", "Ho", "cem"))
    assert settled(*several)[0] == [("preferred", "Hi", "Ho")]
    # Without sign-in there is one person; who gave judgements of one moment, as in an import, is not known.
    unnamed = [vote("a", "2026-01-01", "Hi", "Ho", None), vote("b", "2026-01-02", "Ho", "Hi", None)]
    assert settled(*unnamed)[0] == [("preferred", "Ho", "Hi")]
    assert settled(*unnamed, vote("c", "2026-01-02", "Hi", "Ho", None)) == ([], [], {"tie": 1})


@pytest.mark.parametrize(
    ("conversation", "dropped"),
    [
        (chat("c", "Hello?", "Hi", {"edited": " hi "}), {"equal_replies": 1}),
        (chat("c", "Hello?", "Hi", {"edited": "  "}), {}),
        (chat("c", "Hello?", "Hi", {"over": ["gone"]}, others=("Ho",)), {}),
        (chat("c", "", "Hi", {"edited": "Ho"}), {}),
        (chat("c", "Hello?", "Hi", {"comment": "nice"}), {}),
    ],
)
def test_what_says_nothing_makes_no_pair(conversation, dropped):
    assert settled(conversation) == ([], [], dropped)


@pytest.mark.parametrize("mark", [{"incomplete": "stopped"}, {"weight": 0}])
def test_replies_that_broke_off_or_are_context_make_none(mark):
    said = chat("c", "Hello?", "Hi", {"over": ["c-0"], "rating": 1}, others=("Ho",))
    said["messages"][1] |= mark
    assert settled(said) == ([], [], {})


def test_the_prompt_begins_after_a_gap_and_has_edits_in_it():
    said = chat("c", "First?", "One", {"edited": "Two"})
    said["messages"] += [
        {"id": "q", "role": "user", "content": "Next?"},
        {"id": "r", "role": "assistant", "content": "Three"},
    ]
    said["feedback"].append({"message_id": "r", "edited": "Four"})
    later = [j for j in judgements_of(said) if j.better.text == "Four"]
    assert [m["content"] for m in later[0].prompt] == ["First?", "Two", "Next?"]
    said["messages"][2]["gap"] = True
    assert [m["content"] for m in list(judgements_of(said))[-1].prompt] == ["Next?"]


# --- encoded, in their splits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def prepared(conversations, tokenizer, dealt=None, **settings):
    builder = DatasetBuilder(tokenizer=tokenizer, **settings)
    held, rows = HeldConversations(conversations), HeldRows()
    catalogue = builder.catalogue(held, (), Ledger(None, builder.salt, dealt or {}))
    list(builder.choose(held, catalogue, rows))
    return find_preferences(held, catalogue, builder)


def many(count: int) -> list[dict]:
    return [
        chat(f"c{n:02}", f"Question number {n}?", f"Reply {n}", {"edited": f"Better reply {n}"}) for n in range(count)
    ]


def test_pairs_and_thumbs_are_in_the_split_of_their_conversations(tokenizer):
    conversations = [*many(12), chat("t", "Thumb?", "Yes", {"rating": 1}), chat("d", "Down?", "No", {"rating": -1})]
    dealt = {c["id"]: "test" if n % 3 == 0 else "train" for n, c in enumerate(conversations)}
    found = prepared(conversations, tokenizer, dealt | {"c01": "validation"})
    assert {split: len(pairs) for split, pairs in found.pairs.items()} == {"train": 7, "validation": 1, "test": 4}
    assert found.pairs["validation"][0].conversations == ["c01"]
    assert [t.liked for t in found.thumbs["test"] + found.thumbs["train"]] == [True, False]


def test_a_pair_of_conversations_in_two_splits_is_dropped(tokenizer):
    both = [chat("a", "Hello?", "Hi", {"rating": 1}), chat("b", "Hello?", "Ho", {"rating": -1})]
    dealt = {c["id"]: "train" for c in many(12)} | {"c03": "test", "c04": "validation", "a": "train", "b": "test"}
    found = prepared([*many(12), *both], tokenizer, dealt)
    assert found.dropped == {"two_splits": 1}


def test_a_training_pair_whose_rejected_reply_stands_in_the_test_split_is_dropped(tokenizer):
    copied = " ".join(f"word{n}" for n in range(14))
    held_out = chat("h", "What is it?", copied)
    pair = chat("p", "Something else?", "Short", {"over": ["p-0"]}, others=(copied,))
    dealt = {c["id"]: "train" for c in many(12)} | {"c03": "validation", "h": "test", "p": "train"}
    found = prepared([*many(12), held_out, pair], tokenizer, dealt)
    assert found.dropped == {"overlaps_test": 1}


def test_both_replies_follow_the_same_prompt_and_only_they_are_trained(tokenizer, tmp_path):
    long = chat("long", "Hello?", "Hi", {"edited": "Good day to you."})
    long["messages"][:0] = [
        {"id": f"m{n}", "role": ("user", "assistant")[n % 2], "content": f"Turn {n} of many."} for n in range(20)
    ]
    found = prepared([*many(12), long], tokenizer, {"long": "test"}, max_length=96)
    write_preferences(tmp_path / "test.parquet", PreferredPair, found.pairs["test"])
    (pair,) = [p for p in read_pairs(tmp_path / "test.parquet") if "Good" in tokenizer.decode(p.chosen.input_ids)]
    prompts = []
    for row, text in ((pair.chosen, "Good day to you."), (pair.rejected, "Hi")):
        trained = [label for label in row.labels if label >= 0]
        assert tokenizer.decode(trained, skip_special_tokens=True).strip() == text
        assert row.labels[-len(trained) :] == trained or row.labels[-len(trained) - 1 : -1] == trained
        prompts.append([t for t, label in zip(row.input_ids, row.labels, strict=True) if label < 0])
        assert len(row.input_ids) <= 96
    assert prompts[0] == prompts[1] and "Turn 0 " not in tokenizer.decode(prompts[0])


def test_what_does_not_fit_is_counted(tokenizer):
    long = chat("x", "Hello?", "Hi", {"edited": "word " * 400})
    found = prepared([*many(12), long], tokenizer, {"x": "train"}, max_length=128)
    assert found.dropped == {"too_long": 1}


def test_the_files_are_the_same_whatever_the_order_and_are_read_as_they_were_written(tokenizer, tmp_path):
    conversations = [*many(20), *(chat(f"t{n}", f"Thumb {n}?", "Yes", {"rating": (-1) ** n}) for n in range(20))]
    for name, given in (("one", conversations), ("other", conversations[::-1])):
        prepared(given, tokenizer).write(tmp_path / name / "pairs", tmp_path / name / "thumbs")
    files = [path for path in (tmp_path / "one").rglob("*.parquet")]
    assert len(files) == 6
    for path in files:
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()
    record = read_preferences(tmp_path / "one/pairs/train.parquet")[0]
    assert record["messages"][0]["role"] == "user" and record["kind"] == "edit" and record["chosen_author"] == "person"
    thumbs = read_thumbs(tmp_path / "one/thumbs/train.parquet")
    for thumb in thumbs:
        said = [label for label in thumb.mismatched.labels if label >= 0]
        assert said and thumb.mismatched.input_ids[-len(said) :] == said
    assert {thumb.liked for thumb in thumbs} == {True, False}


def test_lengths_of_chosen_and_rejected_replies_are_reported(tokenizer):
    counts = prepared(many(12), tokenizer).statistics()
    assert counts["chosen_longer_share"] == 1.0
    assert counts["chosen_tokens_mean"] > counts["rejected_tokens_mean"] > 0
    assert counts["pairs_by_kind"] == {"edit": 12}


# --- exports ---------------------------------------------------------------------------------------------------------


def test_exported_preferences_are_imported_to_the_same_pairs_and_thumbs(tmp_path):
    conversations = [
        chat("a", "Hello?", "Good day.", {"over": ["a-0"], "by": "person-12345678"}, others=("Hi",)),
        chat("b", "How are you?", "Fine", {"edited": "Well, thank you."}),
        chat("c", "Is it late?", "Yes", {"rating": 1, "by": "person-87654321"}),
        chat("d", "Is it early?", "No", {"rating": -1}),
    ]
    files = DataExporter(tmp_path).export_all_formats(conversations, ["dpo", "kto"])
    again = []
    for path in files.values():
        rows = list(read_jsonl(path))
        assert len(rows) == 2 and all(row["prompt"][-1]["role"] == "user" for row in rows)
        imported = import_records(enumerate(rows), "import", "2026-01-01T00:00:00Z")
        again += [item.conversation for item in imported]
    said = [
        sorted(
            (j.prompt[-1]["content"], j.better, j.worse or ("", ""), j.liked, j.by, j.at)
            for c in found
            for j in judgements_of(c)
        )
        for found in (conversations, again)
    ]
    assert said[0] == said[1]


def test_held_out_replies_are_scored_up_to_the_token_that_ends_them(tokenizer):
    said = {"chosen": "A bird.", "rejected": "A bird. It sings."}
    pair = {"id": "p", "cluster": "c", "kind": "vote", "messages": [{"role": "user", "content": "What is it?"}], **said}
    pair |= {f"{side}_author": "model" for side in said}
    items = preference_items([pair], tokenizer, None, 200)
    (end,) = end_of_turn_ids(tokenizer)
    scored = [item.input_ids[start:stop] for item in items for start, stop in item.runs]
    assert [tokenizer.decode(ids[:-1]) for ids in scored] == ["A bird.", "A bird. It sings."]
    assert [ids[-1] for ids in scored] == [end, end]
