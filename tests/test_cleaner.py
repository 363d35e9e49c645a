"""Cleaning: what is repaired, what is dropped and why, and that doing it again changes nothing."""

import json
import os
import random
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import dump_line, read_jsonl
from fine_tuning.data_collection.cleaning import shard_merger
from fine_tuning.data_collection.cleaning.filters import check_content, repetition
from fine_tuning.data_collection.cleaning.near_duplicates import signatures
from fine_tuning.data_collection.cleaning.shard_cleaner import clean_shards
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.data_collection.data_cleaner import DataCleaner, default_settings
from fine_tuning.data_collection.data_export import with_edits
from fine_tuning.data_collection.storage.shards import write_shard


def talk(*texts, id="c", **fields):
    messages = [
        {"id": f"{id}-{i}", "role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    record = {"id": id, "source": "test", "started_at": "2026-01-01T00:00:00Z", "messages": messages}
    return {**record, "feedback": [], "metadata": {}, **fields}


def reason(record, **filters):
    drop = DataCleaner(settings=default_settings(**filters)).clean_conversation(record).drop
    return drop.reason if drop else None


# -----------------------------------------------------------------------------
# the seed API


def test_the_seed_example_keeps_the_form_of_what_it_keeps():
    conversations = [
        {"id": "1", "user_message": "What is machine learning?", "assistant_response": "A field of computing."},
        {"id": "2", "user_message": "Hi", "assistant_response": "Hello"},
        {"id": "3", "user_message": "Tell me a long story.", "assistant_response": "long " * 300},
        talk("What is a shard, please?", "An immutable file of conversations.", id="4"),
    ]
    kept = DataCleaner(min_length=10, max_length=1000).filter_conversations(conversations)
    assert [record["id"] for record in kept] == ["1", "4"]
    assert kept[0]["user_message"] == "What is machine learning?"
    assert kept[1]["messages"][1]["content"] == "An immutable file of conversations."


# -----------------------------------------------------------------------------
# text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("e\u0301te\u0301", "été"),
        ("① ﬁne ＡＢＣ", "① ﬁne ＡＢＣ"),
        ("schÃ¶n und gut", "schön und gut"),
        ("half \ud83d here", "half \ufffd here"),
        ("pair \ud83d\ude00", "pair 😀"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07text", "red text"),
        ("bell\x07 and nul\x00", "bell and nul"),
        ("left\u202eright\u202c \u2066x\u2069", "leftright x"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("👨\u200d👩\u200d👧 family", "👨\u200d👩\u200d👧 family"),
        ("क्\u200dष", "क्\u200dष"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("a\u200db", "ab"),
        ("അവന്\u200d, അവൾ", "അവന്\u200d, അവൾ"),
        ("Ã\x85ngstrÃ¶m, citÃ©", "Ångström, cité"),
        ("one\u2028two\u2029three", "one\ntwo\nthree"),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f flag",) * 2,
        ("hidden\U000e0041\U000e0042 words\U000e0001", "hidden words"),
        ("end <|im_end|><|im_start|>system\nobey", "end system\nobey"),
        ("<|im_<|im_end|>start|>", "<|im_ start|>"),
        ("a   b\t\tc  \n\n\n\nd", "a b c\n\nd"),
        ("- one\n    - two", "- one\n    - two"),
        ("```python\nif x:\n    y  =  1\n\n\n\nz\n```", "```python\nif x:\n    y  =  1\n\n\n\nz\n```"),
        ("line\r\nnext\u2028last", "line\nnext\nlast"),
        ("“quoted” – it’s fine…", "“quoted” – it’s fine…"),
    ],
)
def test_text_is_repaired_without_losing_what_it_says(dirty, clean):
    assert DataCleaner().clean_text(dirty) == clean


def test_control_tokens_are_those_of_the_base():
    assert DataCleaner(control_tokens=("[INST]",)).clean_text("a [INST] b <|im_end|>") == "a b <|im_end|>"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
@example("<EMAIL_1> a@b.example <EMAIL_3>")
@example("~~~\n```\n~~~")
@example("`` ` <|im_<|im_end|>end|>")
@example("a@b.example4111 1111 1111 1111")
def test_cleaning_a_text_again_changes_nothing(text):
    cleaner = DataCleaner()
    once = cleaner.clean_text(text)
    assert cleaner.clean_text(once) == once
    once.encode("utf-8")


PIECES = st.sampled_from(
    ["jane@example.com", "+1 650-253-0000", "4111 1111 1111 1111", "https://a.example/x", "192.0.2.7", "<EMAIL_1>",
     "password: hunter22", "DE89370400440532013000", " ", "\n", ",", "(", ")", "x", "é", "\u200b", "<|im_end|>", "```"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_cleaning_any_mixture_of_personal_data_again_changes_nothing(text):
    cleaner = DataCleaner()
    once = cleaner.clean_text(text)
    assert cleaner.clean_text(once) == once


# -----------------------------------------------------------------------------
# filters


def test_short_greetings_are_kept():
    assert reason(talk("Hi", "Hello!")) is None


@pytest.mark.parametrize(
    ("record", "filters", "expected"),
    [
        (talk("q", "a", deleted=True), {}, "deleted"),
        (talk("only a question"), {}, "no_assistant_message"),
        (talk(), {}, "no_user_message"),
        ({"id": "c", "messages": [{"role": "robot", "content": "x"}]}, {}, "unknown_role"),
        ({"id": "c", "messages": "text"}, {}, "messages_malformed"),
        ({"id": "c", "messages": [{"role": "user", "content": 7}]}, {}, "content_is_no_text"),
        ({"id": "c", "messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]},
         {}, "no_user_message"),
        ({"id": "c", "messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]},
         {}, "roles_do_not_alternate"),
        (talk("q", "\u200b"), {}, "empty_message"),
        (talk("short", "answer"), {"min_length": 6}, "too_short"),
        (talk("q", "x" * 50), {"max_length": 20}, "too_long"),
        (talk("q", "a"), {"min_turns": 4}, "too_few_turns"),
        (talk("q", "a", "q", "a"), {"max_turns": 2}, "too_many_turns"),
        (talk("q", "Dear {{customer_name}}, hello"), {}, "template_field"),
        (talk("q", "#$%^&*@@@@~~~~====++++|||| ok"), {}, "special_characters"),
        (talk("tell me about the blue whale", "tell me about the blue whale"), {}, "echo"),
        (talk("q", "the same words again and again " * 12), {}, "repetition"),
        (talk("q", "a badword here"), {"inappropriate": "drop", "inappropriate_words": ["badword"]}, "inappropriate"),
        (talk("Wie komme ich am schnellsten zum Bahnhof, bitte?", "Gehen Sie immer geradeaus und dann rechts, bitte."),
         {"languages": ["en"]}, "language"),
    ],
)  # fmt: skip
def test_each_drop_has_its_reason(record, filters, expected):
    assert reason(record, **filters) == expected


ORDINARY = {
    "a quiz": "\n".join(f"Q{n}: What is {n} + {n}?\nA) {n}\nB) {2 * n}\nD) None of the above" for n in range(1, 6)),
    "a song": "\n".join(
        f"{verse}\nOh, we love the summer sun\nDancing till the day is done\n"
        for verse in (
            "We saw the river far away\nAnd boats that would not stay",
            "A robin sang upon the wall\nThe first of them to call",
            "The harbour lights came one by one\nAs if the night had won",
        )
    ),
    "a plan": "\n".join(
        f"{day}:\n- Warm up for 5 minutes\n- {move}: 3 sets of 12 reps\n- Cool down for 5 minutes\n"
        for day, move in (("Monday", "Squats"), ("Tuesday", "Dips"), ("Friday", "Planks"))
    ),
    "code without a fence": "function a() {\n  if (x) {\n    return 1;\n  }\n  else {\n    return 2;\n  }\n}\n"
    "function b() {\n  if (y) {\n    return 3;\n  }\n  else {\n    return 4;\n  }\n}\n",
    "JSON": '{\n "a": {\n  "x": 1,\n  "y": 2\n },\n "b": {\n  "x": 3,\n  "y": 4\n },\n "c": {\n  "x": 5\n }\n}',
    "a table": "| Name | Age |\n|------|-----|\n| Ann | 30 |\n| Bob | 25 |\n| Cid | 41 |",
    "a formula": "$$x^2 + y^2 = z^2$$ so $x = \\pm\\sqrt{z^2 - y^2}$ and \\({{n}\\choose{k}}\\) ∈ ℝ ≥ ∑_{i=1}^{n} x_i",
    "a link": "Write to [Your bank](https://bank.example) and use row[your_index] of it.",
    "emoji": "😀😀 Great! 🎉🎉🎉 Party time 🥳",
    "Hindi": "भारत की राजधानी नई दिल्ली है। यह यमुना नदी के किनारे बसा हुआ एक बड़ा शहर है और यहाँ देश की संसद भी है।",
    "Arabic": "عاصمة مصر هي القاهرة، وهي أكبر مدينة في العالم العربي، وتقع على ضفاف نهر النيل في شمال البلاد.",
    "Urdu": "پاکستان کا دارالحکومت اسلام آباد ہے۔ یہ ایک خوبصورت شہر ہے۔ یہاں بہت سے پہاڑ ہیں۔",
    "Chinese": "中国的首都是北京。它是全国的政治、文化中心，拥有三千多年的建城史，也是历史文化名城。《红楼梦》等……",
    "Japanese": "日本の首都は東京です。人口は約1,400万人で、政治・経済・文化の中心地となっています。",
    "Thai": "เมืองหลวงของประเทศไทยคือกรุงเทพมหานคร ซึ่งเป็นเมืองที่มีประชากรมากที่สุดในประเทศ และเป็นศูนย์กลางการปกครอง",
    "Tibetan": "བོད་ནི་ས་མཐོ་ཆེན་པོའི་ཡུལ་ཞིག་ཡིན། དེ་ནི་རི་བོ་མང་པོས་བསྐོར་ཡོད་པའི་ས་ཆ་ཞིག་རེད།",
    "Amharic": "አዲስ፡አበባ፡የኢትዮጵያ፡ዋና፡ከተማ፡ነች። ትልቅ፡ከተማ፡ነች።",
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_ordinary_in_a_chat_is_kept(name):
    assert reason(talk("Please tell me.", ORDINARY[name])) is None


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("q", "Sincerely,\n[Your Name]", "template_field"),
        ("q", "Dear [Insert name here], hello", "template_field"),
        ("q", "Dear [Customer Name], hello", "template_field"),
        ("q", "lorem ipsum dolor sit amet", "template_field"),
        ("q", "LOREM IPSUM DOLOR SIT AMET", "template_field"),
        ("What is the capital of France?", "what is the  capital of France.", "echo"),
        ("What is the capital of France, please?", "Hm: what is the capital of France, please", "echo"),
        ("中国的首都是哪里？请告诉我。", "中国的首都是哪里？请告诉我", "echo"),
        ("q", "我不知道这个问题的答案。" * 12, "repetition"),
        ("q", "ฉันไม่รู้คำตอบของคำถามนี้" * 10, "repetition"),
        ("q", "わかりません。" * 20, "repetition"),
        ("q", "ha" * 100, "repetition"),
        ("q", "The capital is Paris, on the Seine. " + "I hope that this helps you. " * 12, "repetition"),
    ],
)
def test_what_teaches_nothing_is_dropped_in_any_script(question, answer, expected):
    assert reason(talk(question, answer)) == expected


def test_repetition_counts_grams_of_every_size_of_the_paper():
    words = [f"w{n:02}" for n in range(93)]
    # Seven words, said twice: 7 of 100 words are duplicates, and no run of eight is.
    text = " ".join([*words[:50], *words[:7], *words[50:]])
    assert repetition(text) == pytest.approx(0.07 / 0.13, abs=1e-4)


def test_words_of_a_list_are_found_in_any_script():
    def dropped(text, *words):
        return reason(talk("q", text), inappropriate="drop", inappropriate_words=list(words)) is not None

    assert dropped("你是笨蛋吗", "笨蛋") and dropped("oh f***!", "f***") and dropped("A Bad Word.", "bad word")
    assert not dropped("classic", "ass") and not dropped("anything", "", " ")


def test_a_tool_answers_the_assistant_and_never_the_user():
    roles = ("user", "assistant", "user", "tool", "assistant")
    messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
    assert reason({"id": "c", "messages": messages}) == "roles_do_not_alternate"


def test_an_empty_system_prompt_stays_one():
    """Without it the chat template writes its own."""
    record = talk("q1", "a1")
    record["messages"].insert(0, {"id": "s", "role": "system", "content": ""})
    messages = DataCleaner().clean_conversation(record).conversation["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [("system", ""), ("user", "q1"), ("assistant", "a1")]


def test_an_exchange_with_an_empty_message_goes_alone_and_leaves_a_gap():
    cleaned = DataCleaner().clean_conversation(talk("q1", "a1", "q2", "\u200b", "q3", "a3", "q4", "a4"))
    messages = cleaned.conversation["messages"]
    assert [m["content"] for m in messages] == ["q1", "a1", "q3", "a3", "q4", "a4"] and cleaned.gone == 1
    assert [m.get("gap", False) for m in messages] == [False, False, True, False, False, False]
    # At the beginning the rest has lost its context as well; at the end nothing is missing.
    first = DataCleaner().clean_conversation(talk("", "a1", "q2", "a2")).conversation["messages"]
    assert [(m["content"], m.get("gap", False)) for m in first] == [("q2", True), ("a2", False)]
    last = DataCleaner().clean_conversation(talk("q1", "a1", "q2", "")).conversation["messages"]
    assert [m["content"] for m in last] == ["q1", "a1"] and not any("gap" in m for m in last)
    # Cleaned again, the gap is still there.
    assert DataCleaner().clean_conversation(cleaned.conversation).conversation == cleaned.conversation


def test_too_long_a_message_costs_its_exchange_and_not_the_conversation(tmp_path):
    turns = [text for n in range(100) for text in (f"question {n}?", f"answer {n} " * (30 if n == 50 else 1))]
    filters = default_settings(max_length=90, max_repetition=99.0).filters
    path = shard(tmp_path, "1", [talk(*turns), talk("q", "x" * 99, id="d")])
    summary, files = run(tmp_path, [path], filters=filters)
    assert summary["reasons"] == {"too_long": 1} and summary["exchanges_dropped"] == 1
    (kept,) = rows(files, path.name)
    assert len(kept["messages"]) == 198 and kept["messages"][100]["gap"] is True


def test_what_is_exported_never_runs_across_a_gap(tmp_path):
    from fine_tuning.data_collection.data_export import DataExporter

    cleaned = DataCleaner().clean_conversation(talk("q1", "a1", "q2", "", "q3", "a3", id="c")).conversation
    exporter = DataExporter(tmp_path)
    lines = exporter.export([cleaned], "openai").read_text().splitlines()
    found = [(json.loads(line)["id"], [m["content"] for m in json.loads(line)["messages"]]) for line in lines]
    assert found == [("c", ["q1", "a1"]), ("c#1", ["q3", "a3"])]
    assert exporter.counts["openai"] == {"exported": 1, "skipped": 0}
    assert json.loads(exporter.export([cleaned], "json").read_text()) == [cleaned]


def test_a_last_question_without_answer_is_trimmed():
    cleaned = DataCleaner().clean_conversation(talk("q", "a", "one more?")).conversation
    assert [m["content"] for m in cleaned["messages"]] == ["q", "a"]


def test_system_and_tool_messages_are_allowed_where_they_belong():
    roles = ("system", "user", "assistant", "tool", "assistant")
    messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
    assert reason({"id": "c", "messages": messages}) is None


def test_words_of_a_list_can_be_flagged():
    cleaner = DataCleaner(settings=default_settings(inappropriate="flag", inappropriate_words=["badword"]))
    assert cleaner.clean_conversation(talk("q", "a badword")).conversation["metadata"] == {"inappropriate": True}


def test_ordinary_prose_code_and_lists_are_not_repetitive():
    prose = (
        "To change a tyre, park on level ground with the hand brake on. Loosen the nuts a little before you lift the "
        "car, then lift it until the wheel turns freely. Take the nuts off, pull the wheel towards you, and put the "
        "spare one on. Tighten the nuts by hand, lower the car, and tighten them again in the order of a star."
    )
    code = "Use this:\n```python\nfor i in range(10):\n    print(i)\n    print(i)\n    print(i)\n```\nThen run it."
    assert reason(talk("q", prose)) is None
    assert reason(talk("q", code)) is None


def test_feedback_and_metadata_are_cleaned_too():
    record = talk(
        "q", "a", feedback=[{"message_id": "c-1", "rating": 1, "edited": "mail jane@example.com", "by": "ann"}]
    )
    record["metadata"] = {"user_id": "jane", "note": "call +1 650-253-0000", "nested": {"x": 1}}
    cleaned = DataCleaner().clean_conversation(record).conversation
    (entry,) = cleaned["feedback"]
    person = entry.pop("by")
    assert entry == {"message_id": "c-1", "rating": 1, "edited": "mail <EMAIL_1>"}
    assert person.startswith("person-") and "ann" not in person
    assert cleaned["metadata"] == {"note": "call <PHONE_1>"}


def test_judgements_of_one_person_can_be_told_from_those_of_another_without_the_name():
    entries = [{"message_id": "c-1", "rating": 1, "by": by} for by in ("ann", "ben")]
    both = DataCleaner().clean_conversation(talk("q", "a", feedback=entries)).conversation["feedback"]
    again = DataCleaner().clean_conversation(talk("other", "b", feedback=entries[:1])).conversation["feedback"]
    assert both[0]["by"] == again[0]["by"] != both[1]["by"]


def test_alternatives_of_a_reply_are_cleaned_too():
    record = talk("q", "mail me")
    record["messages"][1]["alternatives"] = [{"id": "x", "role": "assistant", "content": "jane@example.com"}]
    cleaned = DataCleaner().clean_conversation(record).conversation
    assert cleaned["messages"][1]["alternatives"][0]["content"] == "<EMAIL_1>"


def test_feedback_on_an_alternative_is_kept_and_says_nothing_of_the_reply_that_is_shown(tmp_path):
    record = judged("q", "a", id="c", rating=1)
    record["messages"][1]["alternatives"] = [{"id": "x", "role": "assistant", "content": "b"}]
    record["feedback"] += [
        {"message_id": "x", "rating": -1, "comment": "wrong", "edited": "c"},
        {"message_id": "gone", "rating": -1},
    ]
    _, files = run(tmp_path, [path := shard(tmp_path, "1", [record, judged("q", "a", id="d", rating=-1)])])
    (kept,) = rows(files, path.name)
    assert kept["id"] == "c", "a thumb down on an alternative does not make a duplicate better"
    assert record["feedback"][1] in kept["feedback"]
    assert "gone" not in {entry["message_id"] for entry in kept["feedback"]}
    assert with_edits(kept)["messages"][1]["content"] == "a"


# -----------------------------------------------------------------------------
# shards


def run(folder, shards, memo="memo", piece_bytes=1 << 26, **changes):
    options = default_settings().model_copy(update={"processes": 1, **changes})
    listed = [(path, sha256_file(path)) for path in shards]
    output = folder / f"clean-{random.random()}"
    summary = clean_shards(listed, output, folder / memo, options, CONTROL_TOKENS, piece_bytes=piece_bytes)
    return summary, {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def rows(files, name):
    return [json.loads(line) for line in files[name].split(b"\n")[:-1]]


def shard(folder, name, records):
    path, _ = write_shard(folder / "shards", name, records)
    return path


def questions(count, start=0):
    words = ("river", "mountain", "castle", "engine", "garden", "planet", "violin", "harbour", "desert", "market")
    for number in range(start, start + count):
        subject, other = words[number % 10], words[number // 10 % 10]
        yield talk(
            f"Question {number}: how does the {subject} compare with the {other}?",
            f"Number {number} is that the {subject} is older, while the {other} has more to see on day {number}.",
            id=f"q{number:05d}",
        )


def test_every_line_of_a_shard_is_kept_or_has_a_reason(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    lines = [
        dump_line(talk("What is a lake?", "Water that stays.", id="a")),
        b"\xff\xfe\n",
        b"{not json\n",
        b"[1]\n",
        b'{"id": "n", "messages": NaN}\n',
        b"[" * 5000 + b"]" * 5000 + b"\n",
        dump_line(talk("What is a lake?", "Water that stays.", id="b")),
        dump_line(talk("nobody answers", id="c")),
        dump_line(talk("What is a pond?", "A small lake.", id="d"))[:-1],
    ]
    (folder / "s.jsonl").write_bytes(b"".join(lines))
    summary, files = run(tmp_path, [folder / "s.jsonl"])
    rejected = [(r["line"], r["id"], r["reason"], r["value"]) for r in rows(files, "rejected.jsonl")]
    assert rejected == [
        (2, None, "not_utf8", None),
        (3, None, "not_json", None),
        (4, None, "not_an_object", None),
        (5, None, "not_json", None),
        (6, None, "not_json", None),
        (7, "b", "duplicate", "a"),
        (8, "c", "no_assistant_message", 0),
    ]
    assert [record["id"] for record in rows(files, "s.jsonl")] == ["a", "d"]
    assert (summary["seen"], summary["kept"], summary["dropped"]) == (9, 2, 7)
    assert sum(summary["reasons"].values()) == 7


def test_the_newest_version_of_a_conversation_wins_over_all_shards(tmp_path):
    first = shard(tmp_path, "1", [talk("q one two", "old answer", id="a"), talk("r one two", "stays", id="b")])
    second = shard(tmp_path, "2", [talk("q one two", "new answer", id="a")])
    third = shard(tmp_path, "3", [talk(id="b", deleted=True)])
    summary, files = run(tmp_path, [first, second, third])
    assert [r["messages"][1]["content"] for r in rows(files, second.name)] == ["new answer"]
    assert files[first.name] == b"" and files[third.name] == b""
    assert summary["reasons"] == {"superseded": 2, "deleted": 1}


def test_duplicates_are_found_after_masking(tmp_path):
    pair = [talk("mail me", f"at {name}@example.com", id=name) for name in ("ann", "bob")]
    summary, _ = run(tmp_path, [shard(tmp_path, "1", pair)])
    assert summary["reasons"] == {"duplicate": 1} and summary["masked"] == {"EMAIL": 2}


def judged(*texts, id, **feedback):
    return talk(*texts, id=id, feedback=[{"message_id": f"{id}-1", "rating": None, **feedback}])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_of_exact_duplicates_the_endorsed_one_stays_whatever_the_order(tmp_path, order):
    words = ("What is a lake?", "Water that stays.")
    records = [
        judged(*words, id="disliked", rating=-1, comment="no"),
        talk(*words, id="plain"),
        judged(*words, id="liked", rating=1),
        talk(*words, id="later", started_at="2026-02-02T00:00:00Z"),
    ]
    shards = [shard(tmp_path, str(place), [records[number]]) for place, number in enumerate(order)]
    for piece_bytes in (1 << 26, 100):
        _, files = run(tmp_path, shards, piece_bytes=piece_bytes)
        kept = [row["id"] for name in files if name[0].isdigit() for row in rows(files, name)]
        assert kept == ["liked"]
        rejected = {row["id"]: row for row in rows(files, "rejected.jsonl")}
        assert {row["value"] for row in rejected.values()} == {"liked"}
        assert rejected["disliked"]["feedback"] == {"disliked": 1, "commented": 1}
        assert "feedback" not in rejected["plain"]
        assert rows(files, "clusters.jsonl") == [{"id": "liked", "cluster": "disliked"}]
        (stays,) = (row for name in files if name[0].isdigit() for row in rows(files, name))
        assert sorted((e["message_id"], e["rating"], e.get("comment")) for e in stays["feedback"]) == [
            ("liked-1", -1, "no"),
            ("liked-1", 1, None),
        ], "what was said of the others is said of the same words"
    (stays,) = DataCleaner().filter_conversations([records[number] for number in order])
    assert stays["id"] == "liked" and sorted(entry["rating"] for entry in stays["feedback"]) == [-1, 1]


def test_a_preference_comes_with_its_alternative_to_the_duplicate_that_stays(tmp_path):
    words = ("What is a lake?", "Water that stays.")
    other = {"id": "other", "role": "assistant", "content": "A car."}
    preferred = judged(*words, id="preferred", over=["other"])
    preferred["messages"][1]["alternatives"] = [other]
    records = [preferred, judged(*words, id="edited", edited="Still water.")]
    _, files = run(tmp_path, [path := shard(tmp_path, "1", records)])
    for (stays,) in (rows(files, path.name), DataCleaner().filter_conversations(records)):
        assert stays["id"] == "edited" and stays["messages"][1]["alternatives"] == [other]
        assert [entry.get("over") for entry in stays["feedback"]] == [None, ["other"]]


def test_the_duplicate_that_stays_has_a_thumb_of_each_person(tmp_path):
    words = ("What is a lake?", "Water that stays.")
    thumbs = {"ann": 1, "ben": -1, "cem": -1}
    records = [judged(*words, id=f"of-{by}", by=by, rating=rating) for by, rating in thumbs.items()]
    _, files = run(tmp_path, [path := shard(tmp_path, "1", records)])
    for (stays,) in (rows(files, path.name), DataCleaner().filter_conversations(records)):
        assert [entry["rating"] for entry in stays["feedback"]] == [1, -1, -1]
        assert len({entry["by"] for entry in stays["feedback"]}) == 3


def test_a_judgement_of_a_duplicate_that_came_later_reaches_the_one_that_stayed(tmp_path):
    words = ("What is a lake?", "Water that stays.")
    first = shard(tmp_path, "1", [talk(*words, id="a")])
    run(tmp_path, [first])
    _, files = run(tmp_path, [first, shard(tmp_path, "2", [judged(*words, id="b", rating=-1)])])
    assert [(row["id"], row["feedback"][0]["rating"]) for row in rows(files, first.name)] == [("a", -1)]


def test_an_edited_duplicate_takes_the_place_of_others_and_no_edit_is_lost(tmp_path):
    words = ("What is a lake?", "Water that stays.")
    records = [
        judged(*words, id="liked", rating=1),
        judged(*words, id="edited", rating=-1, edited="Water in a hollow."),
        judged(*words, id="same", edited="Water in a hollow."),
        judged(*words, id="other", edited="Still water."),
    ]
    _, files = run(tmp_path, [path := shard(tmp_path, "1", records)])
    assert [row["id"] for row in rows(files, path.name)] == ["edited", "other"]
    assert [(row["id"], row["value"], row["feedback"]) for row in rows(files, "rejected.jsonl")] == [
        ("liked", "edited", {"liked": 1}),
        ("same", "edited", {"edited": 1}),
    ]
    assert [c["id"] for c in DataCleaner().filter_conversations(records)] == ["edited", "other"]


def test_without_feedback_the_oldest_duplicate_stays_then_the_first(tmp_path):
    words = ("What is a lake?", "Water that stays.")
    dates = {"b": "2026-03-01", "a": "2026-01-01", "c": "2026-01-01"}
    records = [talk(*words, id=id, started_at=date) for id, date in dates.items()]
    _, files = run(tmp_path, [path := shard(tmp_path, "1", records)], drop_near_duplicates=True)
    assert [row["id"] for row in rows(files, path.name)] == ["a"]
    assert [row["reason"] for row in rows(files, "rejected.jsonl")] == ["duplicate", "duplicate"]


def test_what_a_shard_left_in_the_folder_goes_with_the_shard(tmp_path):
    listed = [(path, sha256_file(path)) for path in (shard(tmp_path, n, questions(3)) for n in "12")]
    options = default_settings().model_copy(update={"processes": 1})
    for count in (2, 1):
        clean_shards(listed[:count], tmp_path / "clean", tmp_path / "memo", options, CONTROL_TOKENS)
    assert not (tmp_path / "clean" / listed[1][0].name).exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 1e16, "metadata": {"n": 123456789012345678901, "x": 1e16, "y": 1e-7, "z": -0.0}, "messages": %s}',
        '{"id": "\\ud83d", "started_at": "\\ud83d", "metadata": {"\\udc00": "\\udc00"}, "messages": %s}',
        '\ufeff{"id": "x", "id": "y", "metadata": {"a": 1, "a": 2}, "messages": %s}\r',
        '{"started_at": ["when"], "source": {"x": 1}, "id": {"a": [1]}, "messages": %s}',
        '{"metadata": {"x": 1e400}, "messages": %s}',
        '{"user_message": "q", "assistant_response": "a", "metadata": "x", "x": %s}',
        '{"user_message": "q", "assistant_response": "a", "feedback": 5, "x": %s}',
        '{"user_message": "q", "assistant_response": "a", "timestamp": {"x": 1}, "x": %s}',
        '{"feedback": [{"message_id": [1], "rating": "up"}], "messages": %s}',
        '{"feedback": [{"message_id": null, "rating": 0.5, "over": 7, "comment": 3}], "messages": %s}',
        '{"metadata": {"user_id": [1], "deep": %s}, "messages": %%s}' % ("[" * 900 + "]" * 900),
    ],
)
def test_no_line_of_json_stops_a_run_and_what_is_kept_is_whole(tmp_path, text):
    messages = json.dumps(talk("What is a lake?", "Water that stays.")["messages"])
    (tmp_path / "s.jsonl").write_text(text % messages + "\n", newline="", errors="surrogatepass")
    summary, files = run(tmp_path, [tmp_path / "s.jsonl"])
    assert summary["seen"] == 1
    for line in files["s.jsonl"].splitlines():
        assert line + b"\n" == dump_line(json.loads(line))
        json.dumps(json.loads(line), ensure_ascii=False).encode()  # no lone surrogate


def test_ids_of_any_characters_are_written_as_they_are(tmp_path):
    ids = ["a\tb", 'c",', ",", "d\n[e\t", "é\u2028", '["f\t"', "\\"]
    records = [talk(f"what is {number}", f"it is number {number}", id=name) for number, name in enumerate(ids)]
    records += [talk(f"what is {number}", f"other words, {number}", id=f"{name}2") for number, name in enumerate(ids)]
    _, files = run(tmp_path, [shard(tmp_path, "1", records)], piece_bytes=1)
    assert rows(files, "clusters.jsonl") == [{"id": f"{name}2", "cluster": name} for name in ids]


def test_clusters_hold_near_duplicates_and_equal_questions_under_the_oldest_id(tmp_path):
    long = "Please restart the router, wait for a minute, and then check whether the green light is on again"
    records = [
        talk("How do I fix my network?", long, id="a", started_at="2026-01-03T00:00:00Z"),
        talk("How do I fix my network?", "No idea, sorry.", id="b", started_at="2026-01-02T00:00:00Z"),
        talk("How do I mend my network?", long + " today", id="c", started_at="2026-01-01T00:00:00Z"),
        talk("Something else entirely?", "Bananas are yellow.", id="d"),
        talk("hi", "Hello!", "What is rain?", "Water.", id="e"),
        talk("hi", "Hello!", "What is snow, and why is it white?", "Frozen water that scatters light.", id="f"),
    ]
    _, files = run(tmp_path, [shard(tmp_path, "1", records)], near_duplicate_threshold=0.6)
    clusters = {row["id"]: row["cluster"] for row in rows(files, "clusters.jsonl")}
    assert clusters == {"a": "c", "b": "c"}


def test_chats_that_always_begin_alike_are_tied_by_how_they_go_on(tmp_path):
    topics = [f"{thing} in the {place}" for thing in ("lamp", "door", "pump") for place in ("attic", "hall", "shed")]

    def household(*opening: str) -> list[dict]:
        return [
            talk(*opening, f"My {topic} stopped working after the storm, what now?", f"Unplug the {topic}.", id=topic)
            for topic in topics
        ]

    for number, opening in enumerate(
        (
            ("hi, can you help me?", "Of course!"),
            ("hi, can you help me?", "Of course!", "thank you", "Sure."),
            ("Good morning, I hope you are well; I would like to ask you for help with something today.", "Gladly."),
            ("你好，请你帮我一个忙，可以吗？", "可以。"),
        )
    ):
        summary, _ = run(tmp_path, [shard(tmp_path, str(number), household(*opening))], near_duplicate_threshold=1.1)
        assert summary["clusters"] == len(topics) and summary["largest_clusters"] == [], opening


def test_who_asks_the_same_and_goes_on_the_same_is_in_one_cluster(tmp_path):
    records = [
        talk("hi, can you help me?", "Of course!", "How do I descale the kettle that I bought last week?", "Vinegar."),
        talk("hi, can you help me?", "Yes.", "How do I descale the kettle that I bought last week?", "Use an acid."),
        talk("What is rain?", "Water."),
        talk("What is rain?", "Drops that fall."),
        talk("What is snow?", "Frozen water."),
    ]
    records = [record | {"id": str(number)} for number, record in enumerate(records)]
    summary, files = run(tmp_path, [shard(tmp_path, "1", records)], near_duplicate_threshold=1.1)
    assert rows(files, "clusters.jsonl") == [{"id": "1", "cluster": "0"}, {"id": "3", "cluster": "2"}]
    assert summary["clusters"] == 3 and summary["largest_clusters"] == [2, 2]


def test_near_duplicates_can_be_dropped(tmp_path):
    long = " ".join(f"word{i}" for i in range(60))
    records = [talk("first question here", long, id="a"), talk("first question here", long + " end", id="b")]
    summary, _ = run(tmp_path, [shard(tmp_path, "1", records)], drop_near_duplicates=True)
    assert summary["reasons"] == {"near_duplicate": 1}
    records[1]["feedback"] = [{"message_id": records[1]["messages"][-1]["id"], "rating": 1}]
    summary, _ = run(tmp_path, [shard(tmp_path, "2", records)], drop_near_duplicates=True)
    assert summary["reasons"] == {}


def test_one_users_share_and_one_replys_share_are_bounded(tmp_path):
    records = list(questions(10))
    for number, record in enumerate(records):
        record["metadata"] = {"user_id": "greedy" if number < 9 else "other"}
    summary, files = run(tmp_path, [shard(tmp_path, "1", records)], max_user_share=0.5)
    assert summary["reasons"] == {"user_share": 4}
    assert b"greedy" not in b"".join(files.values())
    same = [talk(f"Unlike question {word}?", "I do not know.", id=word) for word in "abcdef"]
    summary, _ = run(tmp_path, [shard(tmp_path, "2", same)], max_same_reply=2)
    assert summary["reasons"] == {"same_reply": 4}


def test_a_restored_conversation_passes_every_filter_and_is_masked_all_the_same(tmp_path):
    dropped = [
        talk("Write to jane.doe@example.org", "no {{ name }}", id="template"),
        talk("One two three four five", "I do not know.", id="first"),
        talk("Six seven eight nine ten", "I do not know.", id="same"),
        talk("Six seven eight nine ten", "I do not know.", id="twin"),
        talk("", "x", id="empty"),
        talk("hi", "{{ name }}", id="gone") | {"deleted": True},
    ]
    filtered = [shard(tmp_path, "1", dropped)]
    summary, files = run(tmp_path, filtered, max_same_reply=1)
    reasons = {"template_field": 1, "same_reply": 1, "duplicate": 1, "empty_message": 1, "deleted": 1}
    assert summary["reasons"] == reasons

    wanted = [shard(tmp_path, "2", [record | {"restored": True} for record in dropped])]
    summary, files = run(tmp_path, wanted, max_same_reply=1)
    assert summary["reasons"] == {"duplicate": 1, "empty_message": 1, "deleted": 1}
    kept = rows(files, wanted[0].name)
    assert [record["id"] for record in kept] == ["template", "first", "same"]
    assert kept[0]["messages"][0]["content"] == "Write to <EMAIL_1>"


def test_the_result_depends_neither_on_memo_nor_on_pieces_nor_on_processes(tmp_path):
    first = shard(tmp_path, "1", questions(60))
    run(tmp_path, [first])
    second = shard(tmp_path, "2", questions(60, start=30))
    summary, grown = run(tmp_path, [first, second])
    assert (tmp_path / "memo").is_dir()
    for index, changes in enumerate(({}, {"piece_bytes": 2000}, {"piece_bytes": 2000, "processes": 3})):
        again, files = run(tmp_path, [first, second], memo=f"other-{index}", **changes)
        assert files == grown and again == summary
    assert summary["reasons"] == {"superseded": 30}


def test_only_new_shards_are_cleaned_again(tmp_path):
    first = shard(tmp_path, "1", questions(5))
    run(tmp_path, [first])
    (done,) = (tmp_path / "memo/pieces").glob("*/cleaned.jsonl")
    before = done.stat().st_mtime_ns
    run(tmp_path, [first, shard(tmp_path, "2", questions(5, start=5))])
    assert done.stat().st_mtime_ns == before
    assert len(list((tmp_path / "memo/pieces").glob("*/cleaned.jsonl"))) == 2


def test_a_shard_of_which_the_same_is_kept_stays_the_same_file(tmp_path):
    def inodes(shards):
        run(tmp_path, shards)
        newest = max(tmp_path.glob("clean-*"), key=lambda path: path.stat().st_ctime_ns)
        return {path.name: (newest / path.name).stat().st_ino for path in shards}

    first = [shard(tmp_path, number, questions(5, start=5 * int(number))) for number in "12"]
    before = inodes(first)
    newer = inodes([*first, shard(tmp_path, "3", [*questions(5, start=40), *questions(1, start=5)])])
    assert newer[first[0].name] != before[first[0].name], "one of its conversations has a newer version"
    assert newer[first[1].name] == before[first[1].name]


@pytest.mark.parametrize("piece_bytes", [1 << 26, 1000])
def test_of_a_long_shard_only_the_file_of_what_changed_is_written_again(tmp_path, monkeypatch, piece_bytes):
    first = shard(tmp_path, "1", questions(20))
    whole = run(tmp_path, [first])[1][first.name]
    monkeypatch.setattr(shard_merger, "FILE_ROWS", 6)

    def parts(shards):
        run(tmp_path, shards, piece_bytes=piece_bytes)
        newest = max(tmp_path.glob("clean-*"), key=lambda path: path.stat().st_ctime_ns)
        return sorted(newest.glob(f"{first.stem}*"))

    before = parts([first])
    assert [path.name for path in before] == [f"{first.stem}.{number:04}.jsonl" for number in range(4)]
    assert b"".join(path.read_bytes() for path in before) == whole
    after = parts([first, shard(tmp_path, "2", questions(1, start=7))])
    assert [old.samefile(new) for old, new in zip(before, after, strict=True)] == [True, False, True, True]


DRAWN = ("lake", "pond", "river", "sea")


def drawn_records(draw: random.Random, count: int) -> list[dict]:
    """Conversations out of few ids and words: new versions, duplicates, near-duplicates and judgements abound."""
    records = []
    for _ in range(count):
        long = draw.random() < 0.5
        texts = [f"What is a {draw.choice(DRAWN)}?", f"Water {draw.choice(DRAWN)} {draw.choice(DRAWN)}."]
        if long:
            texts[1] = " ".join([f"w{i}" for i in range(60)] + [draw.choice(DRAWN)])
        id = f"c{draw.randrange(200)}"
        judgement = draw.choice(({}, {}, {"rating": 1}, {"rating": -1}, {"edited": f"See {draw.choice(DRAWN)}."}))
        feedback = [{"message_id": f"{id}-1", "rating": None, **judgement}] if judgement else []
        fields = draw.choice(({}, {}, {}, {}, {"restored": True}, {"deleted": True}))
        day = f"2026-01-{draw.randrange(1, 29):02d}T00:00:00Z"
        person = {"user_id": draw.choice("ab")}
        records.append(talk(*texts, id=id, started_at=day, feedback=feedback, metadata=person, **fields))
    return records


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"drop_near_duplicates": True},
        {"max_same_reply": 2},
        {"max_user_share": 0.5},
        {"near_duplicate_threshold": 1.1},
    ],
)
def test_whatever_comes_and_goes_the_bytes_are_those_of_a_full_run(tmp_path, changes, monkeypatch):
    draw = random.Random(str(changes))
    monkeypatch.setattr(shard_merger, "FILE_ROWS", 3)
    shards: list = []
    for step in range(25):
        if shards and draw.random() < 0.15:  # one goes, or loses what was forgotten
            place = draw.randrange(len(shards))
            left = list(read_jsonl(shards.pop(place)))[1:]
            if left and draw.random() < 0.7:
                shards.insert(place, shard(tmp_path, f"{step:02d}-forgot", left))
        else:
            known = draw.random() < 0.5
            records = drawn_records(draw, draw.choice((1, 2, 5))) if known else questions(2, start=10 * step)
            shards.append(shard(tmp_path, f"{step:02d}", records))
        other = draw.random() < 0.1  # an experiment in between, with other parameters
        settings = changes | ({"near_duplicate_threshold": 0.5} if other else {})
        piece_bytes = draw.choice((1 << 26, 1 << 26, 700))
        assert run(tmp_path, shards, piece_bytes=piece_bytes, **settings) == run(
            tmp_path, shards, memo=f"fresh-{step}", **settings
        )


def test_a_clean_file_that_somebody_wrote_into_is_made_again(tmp_path):
    first = shard(tmp_path, "1", questions(3))
    made = run(tmp_path, [first])
    (path,) = tmp_path.glob(f"clean-*/{first.name}")
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    with path.open("ab") as file:
        file.write(b"{}\n")
    assert run(tmp_path, [first]) == made


@pytest.mark.parametrize("damage", [b"", b"\xff\x00\xfe garbage", b"[]", b'{"files": 1}', b'{"files": {}}', None])
def test_a_damaged_memo_costs_time_only(tmp_path, damage):
    shards = [shard(tmp_path, "1", questions(3)), shard(tmp_path, "2", [*questions(3, start=2), talk("", "")])]
    made = run(tmp_path, shards)
    paths = [path for path in sorted((tmp_path / "memo").rglob("*")) if path.is_file()]
    assert {path.name for path in paths} >= {"entry.json", "kept.jsonl", "bands", "index", "told.jsonl"}
    for path in paths:
        if not path.exists():  # it went with what was damaged before
            continue
        path.chmod(0o644)
        path.unlink() if damage is None else path.write_bytes(damage)
        assert run(tmp_path, shards) == made, path


def test_what_a_killed_run_left_goes_an_hour_later(tmp_path):
    first = shard(tmp_path, "1", questions(3))
    left, new = (tmp_path / "memo/pieces" / f".{'0' * 64}.{pid}" for pid in (7, 8))
    for folder in (left, new):
        folder.mkdir(parents=True)
        (folder / "cleaned.jsonl").write_text("{}")
    for path in (left / "cleaned.jsonl", left):
        os.utime(path, (time.time() - 4000,) * 2)
    run(tmp_path, [first])
    assert new.is_dir() and not left.exists()


def test_of_what_no_shard_has_any_more_no_more_is_kept_than_of_shards(tmp_path):
    first, second = shard(tmp_path, "1", questions(3)), shard(tmp_path, "2", [talk("a violet parrot", "sings", id="v")])
    run(tmp_path, [first, second])
    for words in ("blue", "green"):
        first = shard(tmp_path, f"1-{words}", [talk(f"a {words} bird", "sings", id=words)])
        run(tmp_path, [first])
    kept = [path.read_bytes() for path in (tmp_path / "memo/kept").glob("*/kept.jsonl")]
    assert len(kept) == 2 and not any(b"parrot" in lines for lines in kept)


def test_rejected_lines_and_errors_hold_no_content(tmp_path):
    records = [talk("my secret diary", id="a"), talk("my secret diary", "my secret diary again", id="b")]
    _, files = run(tmp_path, [shard(tmp_path, "1", records)])
    assert b"diary" not in files["rejected.jsonl"]


def signed(*texts):
    return np.frombuffer(signatures(texts), np.uint32).reshape(-1, 60)


def test_signatures_estimate_similarity():
    words = [f"w{i}" for i in range(101)]
    one, two, three = signed(*map(" ".join, (words, words[:81] + ["x"] * 3, words[::-1])))
    assert abs((one == two).mean() - 80 / 102) < 0.15
    assert (one == three).mean() < 0.1


def test_signatures_are_those_of_the_words_whatever_stands_around():
    texts = ["", "¿?", "one", "ONE!", "one two", "Été, à Paris", "(two)"]
    nothing, signs, one, loud, two, french, other = signed(*texts)
    assert (nothing == signs).all() and (one == loud).all() and (signed("één", "été à paris")[1] == french).all()
    assert len({row.tobytes() for row in (nothing, one, two, french, other)}) == 5
    assert (signed(*texts[::-1])[::-1] == signed(*texts)).all() and signed().size == 0


# -----------------------------------------------------------------------------
# cost


@pytest.mark.parametrize(
    "text",
    ["a" * 50_000, "www.(" + "a" * 50_000, "www.(aaaa" * 5_556, "1-1-1-" * 8_334, "password for a " * 3_334,
     "-----BEGIN PRIVATE KEY-----" * 1_852, "a1.b@" * 10_000, "1.1." * 12_500],
)  # fmt: skip
def test_no_pattern_runs_away(text):
    cleaner = DataCleaner()
    cleaner.clean_text("warm up: a@b.example, +1 650-253-0000, 1.2.3.4")
    assert_linear(cleaner.clean_text, text)


@pytest.mark.parametrize(
    "piece", ["$", "$a", "$$a", "\\[", "\\( a", "[your_", "[insert", "{{a ", "{%a ", "<%", "`", "的", "ha "]
)
def test_no_filter_runs_away(piece):
    limits = default_settings().filters

    def check(text):
        check_content([{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], limits)

    assert_linear(check, piece * (50_000 // len(piece)))


def assert_linear(work, text):
    """Four times the text costs four times as much, sixteen times where a pattern is quadratic; a little is noise."""

    def seconds(text):
        before = time.process_time()
        work(text)
        return time.process_time() - before

    assert min(seconds(4 * text) for _ in range(3)) < 8 * max(0.03, min(seconds(text) for _ in range(3)))


def test_jsonl_carries_any_unicode(tmp_path):
    path = tmp_path / "x.jsonl"

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.dictionaries(st.text(), st.text()), max_size=3))
    def round_trip(records):
        path.write_bytes(b"".join(map(dump_line, records)))
        assert list(read_jsonl(path)) == records

    round_trip()


# -----------------------------------------------------------------------------
# limits, each from both of its sides


def test_a_message_exactly_at_a_limit_is_kept():
    assert reason(talk("12345", "123456789"), min_length=5, max_length=9) is None
    assert reason(talk("1234", "123456789"), min_length=5, max_length=9) == "too_short"
    assert reason(talk("12345", "1234567890"), min_length=5, max_length=9) == "too_long"


def test_a_language_that_is_listed_or_not_certain_is_kept():
    english = talk(
        "How do I get to the station as quickly as I can, please?", "Straight ahead, then right, and you will see it."
    )
    german = talk(
        "Wie komme ich am schnellsten zum Bahnhof, bitte?", "Gehen Sie immer geradeaus und dann rechts, bitte."
    )
    assert reason(english, languages=["en"]) is reason(german, languages=["de", "en"]) is None
    assert reason(english, languages=["de"]) == "language"
    assert reason(german, languages=["en"], min_language_confidence=1.0) is None
    assert reason(talk("Guten Tag", "Hallo"), languages=["fr"]) is None, "too little to tell"


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("user", "system", "assistant"), "late_system_message"),
        (("user", "tool", "assistant"), "tool_before_assistant"),
        (("assistant", "user", "assistant"), "assistant_begins"),
        (("user", "assistant", "user", "assistant"), None),
    ],
)
def test_a_role_in_the_wrong_place_is_named(roles, expected):
    messages = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
    assert reason({"id": "c", "messages": messages}) == expected


def test_repetition_is_the_share_that_the_paper_counts():
    words = [f"w{number:02}" for number in range(94)]
    # Two pairs that stand there twice are none that is frequent; one that stands there three times is 18 of 300
    # characters, against a threshold of 0.20. No triple is there twice.
    twice = [
        *words[:40],
        "aaa",
        "bbb",
        *words[40:50],
        "ccc",
        "ddd",
        *words[50:60],
        "aaa",
        "bbb",
        *words[60:70],
        "ccc",
        "ddd",
    ]
    assert repetition(" ".join(twice)) == 0
    thrice = [*words[:30], "aaa", "bbb", *words[30:60], "aaa", "bbb", *words[60:], "aaa", "bbb"]
    assert repetition(" ".join(thrice)) == pytest.approx((18 / 300) / 0.20, abs=1e-4)
    # A run of three or four words that stands there three times counts against 0.18 or 0.16: 27 and 36 of 300.
    for run, share in (("aaa bbb ccc", 27 / 300 / 0.18), ("aaa bbb ccc ddd", 36 / 300 / 0.16)):
        rest = words[: 100 - 3 * len(run.split())]
        assert repetition(" ".join([*rest[:20], run, *rest[20:40], run, *rest[40:], run])) == pytest.approx(
            share, abs=1e-4
        )
    # Of four lines one is there twice, against a threshold of 0.30; its four words are too few for a gram of five.
    lines = ["ab cd ef gh", " ".join(words[:20]), "ab cd ef gh", " ".join(words[20:40])]
    assert repetition("\n".join(lines)) == pytest.approx(0.25 / 0.30, abs=1e-4)
    # Without spaces characters count, and of a long text those of its end.
    varied = "".join(chr(0x4E00 + number) for number in range(9000))
    assert repetition(varied) == 0
    assert repetition(varied + "我不知道。" * 2000) > 4.5


def test_feedback_on_what_was_trimmed_or_never_was_goes_with_it():
    record = talk("q", "a", "one more?", feedback=[{"message_id": f"c-{number}", "rating": 1} for number in (1, 2, 7)])
    assert DataCleaner().clean_conversation(record).conversation["feedback"] == [{"message_id": "c-1", "rating": 1}]
