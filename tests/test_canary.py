"""The canary: what its statistics promise, who gets the candidate, what counts as bad, and how it ends."""

import hmac
import itertools
import re
import sqlite3
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.canary import LIVE, USERS, WORSE, alarm, stated
from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.evaluation.verdict.win_rate import evidence
from fine_tuning.integration import canary
from fine_tuning.integration.canary import Canary
from fine_tuning.model_management.canary_statistics import POWER, chance_to_find, harm, smallest_found
from tests.fake_ollama import FakeOllama, Manifest
from tests.test_gateway import QUESTION, TEMPLATE, running

# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_evidence_of_harm_is_that_of_bets_on_whose_the_bad_conversations_are(share):
    for candidate, live in ((0, 0), (3, 0), (0, 4), (12, 5), (400, 20)):
        expected = evidence([1.0] * candidate + [0.0] * live, share)
        assert float(harm(candidate, live, share)) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "within"), [(0.1, 559), (0.25, 283), (0.5, 205)])
def test_a_rise_of_bad_conversations_from_10_to_30_percent_is_found_within_the_stated_number(share, within):
    assert stated(share) <= within
    assert chance_to_find(share, LIVE, WORSE, within) >= POWER


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_simulated_people_raise_no_false_alarm_and_find_harm(share, name):
    rng, runs = np.random.default_rng(7), 200
    false = sum(alarm(rng, share, USERS[name], 1.0, 2000) is not None for _ in range(runs))
    # 5 % are allowed: with 200 runs, more than 18 have a probability below one in a hundred.
    assert false <= 18
    most = stated(share) + USERS[name].delay
    found = sum(alarm(rng, share, USERS[name], WORSE / LIVE, most) is not None for _ in range(runs))
    # A trend to fewer bad conversations leaves fewer of them to find it by.
    assert found >= (0.72 if USERS[name].trend >= 1 else 0.3) * runs


def test_the_harm_that_would_have_been_found_shrinks_with_the_conversations():
    few, many = smallest_found(0.5, 0.1, 100), smallest_found(0.5, 0.1, 400)
    assert few is not None and many is not None and 0.1 < many < few
    assert chance_to_find(0.5, 0.1, few, 100) >= POWER > chance_to_find(0.5, 0.1, few - 0.02, 100)
    assert smallest_found(0.5, 0.1, 4) is None
    assert chance_to_find(0.5, 0.0, 0.0, 100) == 0.0


# --- who gets the candidate ------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1.0e9

    def time(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """Hundreds of conversations are a transaction each."""

    class Connection(sqlite3.Connection):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.execute("PRAGMA synchronous = OFF")

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(canary, "time", found)
    return found


@pytest.fixture
def here(tmp_path, clock) -> Canary:
    found = Canary(tmp_path)
    found.begin("whetstone", 7, 2, 0.5)
    return found


def talk(here: Canary, name: str, reply: str = "Good day to you.", **metadata) -> str:
    """One exchange of a conversation, logged as gateway and app do; returns its id."""
    here.candidate_for(name, name, new=True)
    logger = ConversationLogger(here.checkout / "inbox/conversations.jsonl", on_event=here.observe)
    return logger.log_conversation("Hello", reply, {"session_id": name, "seconds": 1.0, **metadata})


def dislike(here: Canary, name: str) -> None:
    logger = ConversationLogger(here.checkout / "inbox/conversations.jsonl", on_event=here.observe)
    logger.log_feedback("some-reply", -1, conversation_id=name)


def talks_of(here: Canary, candidate: bool, count: int, start: int = 0) -> list[str]:
    """Names of new conversations, all of one version."""
    names = (f"c{number}" for number in range(start, start + 100_000))
    of_one = (name for name in names if (here.candidate_for(name, name, new=True) is not None) == candidate)
    return list(itertools.islice(of_one, count))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_new_conversations_stays_with_the_candidate(tmp_path, share):
    here = Canary(tmp_path)
    assert here.state() is None and here.candidate_for("c1", "c1", new=True) is None, "none was begun"
    here.begin("whetstone", 7, 2, share)
    names = [f"c{number}" for number in range(600)]
    chosen = {name for name in names if here.candidate_for(name, name, new=True)}
    assert abs(len(chosen) - 600 * share) < 4 * (600 * share * (1 - share)) ** 0.5
    again = Canary(tmp_path)  # another process
    assert {name for name in names if again.candidate_for(name, name, new=False)} == chosen
    assert again.candidate_for("old", "old", new=False) is None, "said with the live version before"
    again.begin("whetstone", 7, 2, 0.9)  # another share of those to come
    assert {name for name in names if again.candidate_for(name, name, new=False)} == chosen
    with pytest.raises(UserError, match="canary --stop"):
        again.begin("whetstone", 8, 2, 0.5)


def test_another_canary_chooses_others_and_no_id_is_kept(tmp_path):
    here, chosen = Canary(tmp_path), []
    for candidate in (7, 8):
        here.begin("whetstone", candidate, 2, 0.5)
        names = [f"conversation-{n}" for n in range(64)]
        chosen.append([name for name in names if here.candidate_for(name, name, new=True)])
        assert b"conversation-" not in (tmp_path / canary.STATE).read_bytes()
        salt = here.state().salt
        key = hmac.digest(salt, chosen[-1][0].encode(), "sha256")[:16]
        assert key in (tmp_path / canary.STATE).read_bytes()
        assert here.stop("by hand") and not here.stop("by hand")
        assert not any(part in (tmp_path / canary.STATE).read_bytes() for part in (salt, key))
        assert here.candidate_for(chosen[-1][0], chosen[-1][0], new=False) is None
    assert chosen[0] != chosen[1]


def test_equal_openings_are_one_unit(here):
    answers = {here.candidate_for(f"c{number}", "opening", new=True) is not None for number in range(40)}
    assert len(answers) == 1
    for number in range(40):
        dislike(here, f"c{number}")
    counts = here.counts()
    assert (counts.candidate + counts.live, counts.candidate_bad + counts.live_bad) == (1, 1)


# --- what is bad -----------------------------------------------------------------------------------------------------


def test_each_sign_of_a_bad_conversation_counts_once_within_an_hour_of_the_last_turn(here, clock):
    logger = ConversationLogger(here.checkout / "inbox/conversations.jsonl", on_event=here.observe)
    names = talks_of(here, True, 6)
    replies = [talk(here, name) for name in names]
    dislike(here, names[0])
    dislike(here, names[0])
    logger.log_edit(replies[1], "Better", conversation_id=names[1])
    talk(here, names[2], replaces=replies[2])
    here.failed(names[3])
    logger.log_feedback(replies[4], 1, conversation_id=names[4])
    dislike(here, "somebody-else")
    assert here.counts().candidate_bad == 4
    clock.now += 3000
    talk(here, names[4])
    clock.now += 3000
    dislike(here, names[4])
    dislike(here, names[5])
    assert here.counts().candidate_bad == 5, "the last one comes more than an hour after the last turn"
    clock.now -= 50_000  # somebody sets the clock back
    dislike(here, names[5])
    assert here.counts().candidate_bad == 6


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_harm_is_rolled_back_at_once(here):
    for number in range(1000):
        talk(here, f"c{number}")
        # Of the candidate's, every second conversation goes badly; of the live version's, every tenth.
        theirs = here.candidate_for(f"c{number}", f"c{number}", new=False) is not None
        if number % (2 if theirs else 10) == 0:
            dislike(here, f"c{number}")
        if here.state().outcome:
            break
    state = here.state()
    assert state.outcome == canary.ROLLED_BACK and number < 400
    assert float(re.search(r"e-value ([\d.]+) of 20", state.why)[1]) >= 20
    assert here.candidate_for("new", "new", new=True) is None
    assert here.counts() == canary.Counts(0, 0, 0, 0, 0, 1.0)


def test_shares_that_change_multiply_their_evidence(here):
    bad = talks_of(here, True, 3)
    here.begin("whetstone", 7, 2, 0.1)
    bad += [*talks_of(here, True, 2, 10_000), *talks_of(here, False, 1, 20_000)]
    for name in reversed(bad):
        dislike(here, name)
    assert here.counts().evidence == pytest.approx(float(harm(3, 0, 0.5) * harm(2, 1, 0.1)))


def test_it_finishes_when_no_signal_can_reach_100_of_its_conversations_any_more(here, clock):
    for name in [*talks_of(here, True, 100), *talks_of(here, False, 100, 10_000)]:
        talk(here, name)
    for name in talks_of(here, False, 8, 50_000):
        dislike(here, name)
    here.check()
    assert here.state().outcome is None
    clock.now += 3601
    here.check()
    state = here.state()
    assert state.outcome == canary.FINISHED
    assert re.search(r"a candidate with \d+% bad ones, instead of \d+%, would have been found", state.why)


def test_a_candidate_that_fails_or_is_slow_is_rolled_back(tmp_path, clock):
    here = Canary(tmp_path)
    here.begin("whetstone", 7, 2, 0.5)
    for candidate in (False, True) * 3:  # a server that is gone fails for both
        (name,) = talks_of(here, candidate, 1, int(clock.now))
        clock.now += 100_000
        here.failed(name)
    assert here.state().outcome is None
    for name in talks_of(here, True, 1, int(clock.now)):
        here.failed(name)
    assert here.state().why == "4 of its last 20 replies failed, 3 of the live version's"

    here.begin("whetstone", 8, 2, 0.5)
    (slow,), (quick,) = talks_of(here, True, 1), talks_of(here, False, 1)
    for _ in range(canary.SLOWER_OF):
        talk(here, quick)
        talk(here, slow, seconds=1.9)
    assert here.state().outcome is None
    for _ in range(canary.SLOWER_OF):
        talk(here, slow, seconds=3.0)
    assert re.fullmatch("its last 50 replies took 2[.][1-9] times as long as the live version's", here.state().why)


def test_short_replies_are_not_slow_for_what_comes_before_their_first_word(here):
    (short,), (long,) = talks_of(here, True, 1), talks_of(here, False, 1)
    for _ in range(canary.SLOWER_OF):
        talk(here, short, reply="No.", seconds=0.6)
        talk(here, long, reply="It is said to be so. " * 10, seconds=3.0)
    assert here.state().outcome is None


def test_chats_go_on_where_the_state_is_damaged(here):
    (here.checkout / canary.STATE).write_bytes(b"no database" * 100)
    assert here.candidate_for("c1", "c1", new=True) is None
    here.failed("c1")
    here.check()
    assert talk(here, "c1")
    with pytest.raises(UserError, match=r"canary\.sqlite cannot be used"):
        here.state()


# --- gateway ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path) -> Iterator[SimpleNamespace]:
    """A gateway before a server with versions 2 (live) and 7; a canary of 7 runs, and each model says its tag."""
    with FakeOllama(reply="Good day to you.", count_tokens=len) as ollama:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{n}", "size": 1} for n in "27"]
        for tag, layer in (("live", layers[0]), ("2", layers[0]), ("7", layers[1])):
            ollama.manifests[f"whetstone:{tag}"] = Manifest([layer], TEMPLATE, "", {})
        Canary(tmp_path).begin("whetstone", 7, 2, 0.5)
        with running(tmp_path, ollama.host) as gateway:
            yield SimpleNamespace(gateway=gateway, ollama=ollama, canary=Canary(tmp_path))


def ask(served: SimpleNamespace, name: str | None, *said: dict, model: str = "whetstone:live", **headers: str):
    named = {"X-Whetstone-Conversation-Id": name} if name else {}
    return served.gateway.chat(*said, model=model, headers=named | headers, stream=False)


def test_the_gateway_gives_a_share_of_the_live_models_conversations_to_the_candidate(served):
    first = {f"c{n}": ask(served, f"c{n}", QUESTION).json()["model"] for n in range(20)}
    assert set(first.values()) == {"whetstone:live", "whetstone:7"}
    reply = {"role": "assistant", "content": "Good day to you."}
    for name, model in first.items():
        assert ask(served, name, QUESTION, reply, {"role": "user", "content": "And then?"}).json()["model"] == model
    logged = {c["id"]: {m["model"] for m in c["messages"] if m["role"] == "assistant"}
              for c in served.gateway.conversations()}  # fmt: skip
    assert logged == {name: {{"whetstone:live": "whetstone:2"}.get(model, model)} for name, model in first.items()}
    assert ask(served, "other", QUESTION, model="whetstone:2").json()["model"] == "whetstone:2"
    counts = served.canary.counts()
    assert counts.candidate + counts.live == 20 and counts.candidate == list(first.values()).count("whetstone:7")


def test_every_api_is_asked_for_the_candidate_by_its_name(served):
    served.canary.begin("whetstone", 7, 2, 0.999999)
    for path, body in (
        ("/v1/chat/completions", {"messages": [QUESTION]}),
        ("/v1/messages", {"messages": [QUESTION], "max_tokens": 9}),
        ("/v1/responses", {"input": "Hello"}),
        ("/api/generate", {"prompt": "Hello", "stream": False}),
    ):
        name = {"X-Whetstone-Conversation-Id": path.replace("/", "-").strip("-")}
        answer = served.gateway.http.post(path, json={"model": "whetstone:live", **body}, headers=name)
        assert answer.json()["model"] == "whetstone:7", path
    recorded = {m["model"] for c in served.gateway.conversations() for m in c["messages"] if m["role"] == "assistant"}
    assert recorded == {"whetstone:7"}


def test_conversations_without_an_id_are_one_unit_where_they_begin_equally(served):
    said = [{"role": "user", "content": f"Question {number % 3}"} for number in range(12)]
    models = [ask(served, None, question).json()["model"] for question in said]
    assert models[:3] * 4 == models
    counts = served.canary.counts()
    assert counts.candidate + counts.live == 3


def test_a_server_that_is_down_is_no_fault_of_the_candidate(served):
    served.canary.begin("whetstone", 7, 2, 0.999999)
    assert ask(served, "before", QUESTION).json()["model"] == "whetstone:7"
    served.ollama.__exit__()
    assert {ask(served, f"c{n}", QUESTION).status_code for n in range(6)} == {502}
    with served.ollama:
        assert served.canary.state().outcome is None
        assert ask(served, "after", QUESTION).json()["model"] == "whetstone:7"


def test_what_is_not_recorded_goes_to_the_live_version(served):
    off = {"X-Whetstone-Record": "off"}
    assert {ask(served, f"c{n}", QUESTION, **off).json()["model"] for n in range(12)} == {"whetstone:live"}
    counts = served.canary.counts()
    assert counts.candidate + counts.live == 0


def test_disliked_replies_of_the_candidate_take_it_back_while_people_chat(served):
    for number in range(60):
        answer = ask(served, f"c{number}", QUESTION)
        rating = {"message_id": answer.headers["x-whetstone-message-id"], "rating": -1}
        if answer.json()["model"] == "whetstone:7":
            assert served.gateway.http.post("/v1/feedback", json=rating).status_code == 200
    state = served.canary.state()
    assert state.outcome == canary.ROLLED_BACK
    assert {ask(served, f"c{n}", QUESTION).json()["model"] for n in range(60, 72)} == {"whetstone:live"}


def test_a_candidate_that_the_server_does_not_have_is_taken_back_after_three_refusals(served):
    del served.ollama.manifests["whetstone:7"]
    codes = [ask(served, f"c{n}", QUESTION).status_code for n in range(40)]
    assert codes.count(404) == canary.ERRORS and set(codes[-12:]) == {200}
    assert served.canary.state().why == "3 of its last 20 replies failed, 0 of the live version's"
