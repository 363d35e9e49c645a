"""Personal data: precision and recall on labelled cases, and what masking does to a conversation."""

import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import masking
from fine_tuning.common.records import read_jsonl
from fine_tuning.common.writing_systems import ascii_forms
from fine_tuning.data_collection.data_cleaner import DataCleaner
from fine_tuning.data_collection.personal_data.finder import TYPES, Masker, find, may_hold

CASES = list(read_jsonl(masking.CASES))
FLOOR = 0.98


@pytest.fixture(scope="module")
def outcome():
    return masking.score(CASES)


@pytest.mark.parametrize("kind", TYPES)
def test_precision_and_recall_stay_above_the_floor(outcome, kind):
    assert outcome.found[kind] >= 5
    misses = [miss for of, miss in outcome.misses if of == kind]
    for right, whole in (outcome.precision(kind), outcome.recall(kind)):
        assert right / whole >= FLOOR, misses


def test_a_value_counts_only_with_its_type_and_both_its_ends():
    text = "a@b.example a@b.example, 192.0.2.1"
    hits = [["EMAIL", "a@b.example"], ["EMAIL", "b.example"], ["PHONE", "192.0.2.1"]]
    outcome = masking.score([{"text": text, "hits": hits, "source": "RFC 5322"}])
    assert outcome.recall("EMAIL") == (1, 2) and outcome.precision("EMAIL") == (1, 2)
    assert outcome.recall("PHONE") == (0, 1) and outcome.precision("IP") == (0, 1)
    assert len(outcome.misses) == 4 and all("RFC 5322" in miss for _, miss in outcome.misses)


def test_find_personal_data_gives_type_start_and_end():
    (hit,) = DataCleaner().find_personal_data("mail jane@example.com now")
    assert tuple(hit) == ("EMAIL", 5, 21)


def test_the_same_value_has_the_same_placeholder_however_it_is_written():
    masker = Masker()
    assert masker.mask("650-253-0000 or a@x.example") == "<PHONE_1> or <EMAIL_1>"
    assert masker.mask("(650) 253-0000, b@x.example, A@x.example") == "<PHONE_1>, <EMAIL_2>, <EMAIL_1>"
    assert masker.counts == {"PHONE": 2, "EMAIL": 3}


def test_numbers_of_placeholders_that_are_there_already_are_not_given_again():
    assert DataCleaner().clean_text("<EMAIL_1> and jane@example.com") == "<EMAIL_1> and <EMAIL_2>"


def test_only_the_listed_types_and_regions_count():
    text = "jane@example.com, 030 901820"
    assert [hit.type for hit in find(text, ["EMAIL"])] == ["EMAIL"]
    assert [hit.type for hit in find(text, regions=("US",))] == ["EMAIL"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Passwort: $ecret12", ["$ecret12"]),
        ("hasło: $ecret12", ["$ecret12"]),
        ("password: $pass1", []),  # a variable
        ("PASSWORD: $DB_PASS1", []),
        ("Passwort: $passwort", []),
        ("我的密码abc12345，谢谢", ["abc12345"]),
        ("パスワードTaro2024です", ["Taro2024"]),
        ("密码argon2id算法", []),  # a name of a cipher
        ("密码HMAC-SHA256算法", []),
        ("密码学CS10123", []),
        ("Berlin: 4156667777", []),
        ("Frankreich: 4156667777", []),
        ("Anna: 4156667777", ["4156667777"]),
        ("Sofia: 4156667777", ["4156667777"]),
        ("C14.0096 15.7474 15.8278", []),  # the decimals of a path in SVG
        ("Call 0044 20 8361 2345 now.", ["0044 20 8361 2345"]),
        ("token: 12345678 pieces", []),
        ("API token: 128000 Wörter", []),
        ("token: 12345678", ["12345678"]),
        ("token: 834921 and your name", ["834921"]),
    ],
)
def test_a_name_says_what_a_value_is_and_what_follows_may_take_it_back(text, values):
    assert [text[hit.start : hit.end] for hit in find(text)] == values


def test_the_longer_of_two_that_overlap_counts():
    (hit,) = find("https://example.com/?mail=jane@example.com&ip=192.0.2.1")
    assert hit.type == "URL"


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize(
    "value",
    ["jane@example.com", "650-253-0000", "+49 30 901820", "4111 1111 1111 1111", "536-90-4399", "192.0.2.7",
     "DE89 3704 0044 0532 0130 00", "00:1b:44:11:3a:b7", "https://a.example/x", "2001:db8::1"],
)  # fmt: skip
def test_values_side_by_side_are_all_found(value, count):
    assert len(find(" ".join([value] * count))) == count


WORDS = st.text(st.characters(categories=("Ll", "Lu", "Lo")), min_size=1, max_size=8)
VALUES = st.sampled_from(
    ["jane@example.com", "+1 650-253-0000", "4111 1111 1111 1111", "https://a.example/x", "192.0.2.7",
     "DE89370400440532013000", "00:1b:44:11:3a:b7"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@example(["PAGE"], "+1 650-253-0000", ["A"])
@given(st.lists(WORDS, min_size=1, max_size=4), VALUES, st.lists(WORDS, min_size=1, max_size=4))
def test_no_placeholder_swallows_its_neighbours(before, value, after):
    left, right = " ".join(before), " ".join(after)
    masked = Masker().mask(f"{left} {value} {right}")
    assert masked.startswith(f"{left} <") and masked.endswith(f"> {right}")


def test_luhn_is_the_standards():
    assert [hit.type for hit in find("4111 1111 1111 1111, 4111 1111 1111 1112")] == ["CREDIT_CARD"]


def test_what_may_hold_nothing_holds_nothing():
    assert all(may_hold(case["text"]) for case in CASES if case["hits"])
    assert not may_hold("Most people never need more than that. Then wait, step by step!")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_the_quick_look_misses_nothing(text):
    assert may_hold(text) or find(text) == []


def test_a_phone_number_alone_does_not_load_the_names_of_places_which_take_100_mb():
    code = """if True:
        import sys
        from fine_tuning.data_collection.personal_data.finder import find

        assert find("call +1 650 253 0000") and "phonenumbers.geodata" not in sys.modules
        assert find("Anna: 4156667777") and "phonenumbers.geodata" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_valid_phone_numbers_of_many_countries_are_found_in_sentences_and_other_figures_are_not():
    outcome = masking.score(masking.phone_cases(seed=3, each=2))
    for (right, whole), floor in ((outcome.recall("PHONE"), 0.95), (outcome.precision("PHONE"), 0.99)):
        assert right / whole >= floor, outcome.misses


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.characters(categories=("Nd", "Lo", "Po", "Lu")) | st.sampled_from("１：．－ＡＢ（）＋＠٣๔９"), max_size=40
    )
)
def test_ascii_forms_keep_every_place_and_change_nothing_twice(text):
    forms = ascii_forms(text)
    assert len(forms) == len(text) and ascii_forms(forms) == forms
    assert not any(character.isdecimal() and not character.isascii() for character in forms)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("カードは４１１１１１１１１１１１１１１１です", "カードは<CREDIT_CARD_1>です"),
        ("我的信用卡号是4111111111111111，IP是192.168.1.77", "我的信用卡号是<CREDIT_CARD_1>，IP是<IP_1>"),
        ("密码：Ab3(xY9)zz，请不要告诉别人", "密码：<SECRET_1>，请不要告诉别人"),
        ("用（password: Ab3xY9zz）登录", "用（password: <SECRET_1>）登录"),
        ("connect(user, password=Ab3xY9zz)", "connect(user, password=<SECRET_1>)"),
        ("IP 192.168.1.77 and １９２．１６８．１．７７", "IP <IP_1> and <IP_1>"),
    ],
)
def test_what_stands_around_a_value_stays(text, masked):
    assert Masker().mask(text) == masked


# each began a search again at every place, or made one long run, in some version of the patterns
@pytest.mark.parametrize(
    "part",
    ["password for a b c d ", "mi número de ", "my number is ", "appeler me ", "Anna: ", "密码是", "电话", "是@.", "मे@",
     "邮箱", "１２", "：１", "（１２）", "A1a1", "password: (1", "((((", "$a", "“a", "PIN: 1", "senhaaaaaa", "12-"],
)  # fmt: skip
def test_a_long_text_of_one_part_takes_no_longer_than_its_length(part):
    """A search that begins again at every place takes minutes here, the one there is some tenths of a second."""
    text = (part * 200_000)[:200_000]
    start = time.process_time()
    find(text)
    assert time.process_time() - start < 10
