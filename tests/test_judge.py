"""The judge that only advises: asked in both orders, remembered, kept as data, shown beside people, moving nothing."""

import json
import re
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from benchmarks.votes import BASE, CANDIDATE, judge_vote, tally, vote
from fine_tuning.commands.review import judge, review
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import write_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.conversation_logger import read_log
from fine_tuning.erasure.records import Found, clear_votes
from fine_tuning.evaluation.judge import KEY, MEMO, understood
from fine_tuning.evaluation.records.champion_records import method_sha256
from fine_tuning.evaluation.records.measurements import GUARDS
from fine_tuning.evaluation.records.settings import EvaluateSettings, JudgeSettings
from fine_tuning.evaluation.report.report import Findings, write_report
from fine_tuning.evaluation.review import REPLIES, VOTES, Review
from fine_tuning.evaluation.verdict.comparison import Evidence
from fine_tuning.evaluation.verdict.judge import JudgeCount
from fine_tuning.evaluation.verdict.settings import CompareSettings
from fine_tuning.integration.review_pairs import open_pairs
from fine_tuning.schema.votes import JudgeVote, read_all_votes, vote_lines
from tests import test_review
from tests.app_checkout import NOBODY
from tests.fake_ollama import FakeOllama, Manifest
from tests.registered import sh
from tests.test_review import answered, open_page

ROOT = Path(__file__).parents[1]
reviewable, checkout = test_review.reviewable, test_review.checkout
Said = Callable[[str, str], str]
GGUFS = {"candidate": CANDIDATE, "base": BASE}


def the_longer(first: str, second: str) -> str:
    """An opinion: the longer reply, never a tie."""
    return "1" if len(first) >= len(second) else "2"


def the_first(first: str, second: str) -> str:
    return "Reply 1"


class OllamaWithAJudge(FakeOllama):
    """Ollama with a model `judge` whose opinion is a function of the two replies it is shown."""

    def __init__(self, said: Said) -> None:
        super().__init__()
        self.said = said
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1", "size": 1}]
        self.manifests["judge:latest"] = Manifest(layers, "{{ range .Messages }}{{ .Content }}\n{{ end }}", "", {})

    def answer(self, manifest, prompt, limit):
        first, second = re.search(r"Reply 1:\n(.*)\n\nReply 2:\n(.*)\n\nWhich reply", prompt, re.DOTALL).groups()
        return [self.said(first, second)], True


def configure(folder: Path, url: str | None, model: str = "judge", rubric: str = "The better one.") -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["evaluate"]["judge"] = {"url": url, "model": model, "rubric": rubric}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def ollama(checkout) -> Iterator[OllamaWithAJudge]:
    with OllamaWithAJudge(the_longer) as fake:
        configure(checkout, fake.host)
        yield fake


def ask(pairs: int | None = None) -> None:
    judge(Namespace(pairs=pairs))


# --- asked -----------------------------------------------------------------------------------------------------------


def test_the_judge_reads_every_pair_in_both_orders_and_is_asked_once(checkout, ollama, capsys):
    ask(pairs=2)
    assert {one.item for one in read_all_votes(VOTES, JudgeVote)} == set(open_pairs().order[:2])
    ask()
    assert "pairs judged: 6, new in data/votes: 4. Next" in capsys.readouterr().out
    judged, pairs = read_all_votes(VOTES, JudgeVote), open_pairs()
    assert sorted(one.item for one in judged) == sorted(pairs.order)
    different = [one for one in judged if one.left.reply != one.right.reply]
    assert len(ollama.prompts) == 2 * len(different) > 0
    for one in different:
        texts = [reply.text for reply in pairs.replies(one.item).values()]
        assert one.characters == tuple(len(text) for text in texts)
        shown = [prompt for prompt in ollama.prompts if all(f":\n{text}\n" in prompt for text in texts)]
        assert {prompt.index(texts[0]) < prompt.index(texts[1]) for prompt in shown} == {True, False}
        assert all(prompt.startswith("The better one.") for prompt in shown)
    shutil.rmtree(VOTES)
    ask()
    assert len(ollama.prompts) == 2 * len(different), "answers are remembered by content"
    assert {one.id for one in read_all_votes(VOTES, JudgeVote)} == {one.id for one in judged}


def test_its_votes_are_tracked_and_hold_no_text(checkout, ollama):
    ask()
    (file,) = VOTES.glob("*.judge.jsonl")
    assert (VOTES / f"{file.name}.dvc").is_file()
    assert not sh(checkout, "git status --porcelain -uall data").count(".judge.jsonl\n")
    pairs = open_pairs()
    texts = [reply.text for cluster in pairs.order for reply in pairs.replies(cluster).values() if reply.text]
    kept = [file, *MEMO.iterdir()]
    assert not any(text in path.read_text() for path in kept for text in [*texts, "Where is box"])


def test_a_judge_that_says_the_first_every_time_prefers_nothing(checkout, ollama):
    ollama.said = the_first
    ask()
    found = Review(open_pairs(), "ann")
    (count,) = JudgeCount.of(read_all_votes(VOTES, JudgeVote), [], found.results(), found.pairs.ggufs)
    assert set(count.rates["win_rate"].values()) == {0.5} and set(count.rates["first"].values()) == {1.0}


def test_it_moves_no_order_no_vote_and_no_bet_and_is_shown_with_the_results(checkout, ollama, capsys):
    found = Review(open_pairs(), "ann")
    answered(found, "l")
    queue, results = found.queue(), found.results().as_json()
    ask()
    again = Review(open_pairs(), "ann")
    assert again.queue() == queue and again.results().as_json() == results
    capsys.readouterr()
    review(Namespace(by="Zoe", results=True))
    said = capsys.readouterr().out
    assert (
        "judge judge, rubric" in said
        and "only advises: win rate of the candidate" in said
        and "the same as people said" in said
    )
    at = open_page()
    assert not any("judge" in element.value for element in at.markdown)
    at.button(key="results").click().run()
    assert any("judge judge" in element.value for element in at.markdown)


def test_forgetting_a_conversation_takes_the_votes_of_judges_on_it_too(checkout, ollama):
    ask()
    (file,) = VOTES.glob("*.judge.jsonl")
    assert clear_votes(file, Found(ids={"c3"}))
    assert sorted(one.item for one in read_all_votes(VOTES, JudgeVote)) == ["c0", "c1", "c2", "c4", "c5"]
    assert all(event is not None for _, event in read_log(file))


# --- a server that speaks OpenAI's API, and ones that fail -----------------------------------------------------------


@contextmanager
def serving(status: int, content: bytes, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list]]:
    """A server that answers everything in one way; its address, and (path, key, body) of what it was asked."""
    asked: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_with_openais_api_is_asked_at_temperature_0_with_the_key(checkout, monkeypatch):
    monkeypatch.setenv(KEY, "a key")
    said = {"choices": [{"message": {"role": "assistant", "content": "<think>1 or 2?</think>\n**2**"}}]}
    with serving(200, json.dumps(said).encode()) as (address, asked):
        configure(checkout, f"{address}/of/vendors/v1/", "big-model")
        ask()
    assert {(path, key) for path, key, _ in asked} == {("/of/vendors/v1/chat/completions", "Bearer a key")}
    assert {(body["model"], body["temperature"]) for _, _, body in asked} == {("big-model", 0)}
    assert "a key" not in "".join(path.read_text() for path in VOTES.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, b"", f"answers with status 401: check evaluate.judge, \\${KEY} and the server's log"),
        (500, b'{"error": "Where is box number 1?"}', "answers with status 500: check"),
        (200, b"<html>", "does not speak OpenAI's chat completions: correct evaluate.judge"),
        (200, b'{"choices": []}', "does not speak OpenAI's chat completions"),
        (200, b'{"message": "Where is box number 1?"}', "does not speak OpenAI's chat completions"),
    ],
)
def test_a_judge_that_fails_is_one_line_that_quotes_nothing(checkout, status, content, words):
    with serving(status, content) as (address, _):
        configure(checkout, address)
        with pytest.raises(UserError, match=words) as caught:
            ask()
    assert "box" not in str(caught.value) and "\n" not in str(caught.value)
    assert not list(VOTES.glob("*.jsonl")) and not MEMO.exists()


@pytest.mark.parametrize(
    ("status", "headers", "content", "words"),
    [
        (
            302,
            {"Location": "https://me:hidden@elsewhere/"},
            b"",
            "redirects: set evaluate.judge.url to where `curl -I`",
        ),
        (200, {"Content-Encoding": "gzip"}, b"no gzip", "does not speak OpenAI's chat completions: correct"),
        (200, {}, b"[" * 100_000, "does not speak OpenAI's chat completions: correct"),
    ],
)
def test_a_redirect_a_broken_encoding_and_a_deep_answer_are_told_as_what_they_are(
    checkout, status, headers, content, words
):
    with serving(status, content, headers) as (address, _):
        configure(checkout, address)
        with pytest.raises(UserError, match=words) as caught:
            ask()
    assert "hidden" not in str(caught.value)


def test_a_dead_address_is_found_before_the_models_write_anything(checkout):
    configure(checkout, NOBODY)
    with pytest.raises(UserError, match="no judge answers at"):
        ask()
    assert not REPLIES.exists()


def test_an_unclear_answer_is_counted_and_asked_for_again_the_next_time(checkout, ollama, capsys):
    ollama.said = lambda first, second: "Both are nice."
    ask()
    unclear = [one for one in read_all_votes(VOTES, JudgeVote) if None in one.answers]
    assert f"pairs judged: 6, unclear: {len(unclear)} (the next run asks about them again), new in" in (
        capsys.readouterr().out
    )
    ollama.said = the_longer
    ask()
    assert "unclear" not in capsys.readouterr().out
    found = Review(open_pairs(), "ann")
    (count,) = JudgeCount.of(read_all_votes(VOTES, JudgeVote), [], found.results(), found.pairs.ggufs)
    assert count.as_json()["unclear"] == 0 and len(count.rates["win_rate"]) == 6 and unclear


def test_two_servers_with_a_model_of_one_name_have_votes_of_their_own(checkout):
    said = json.dumps({"choices": [{"message": {"content": "1"}}]}).encode()
    for _ in range(2):
        with serving(200, said) as (address, _):
            configure(checkout, address)
            ask(pairs=1)
    assert len({one.id for one in read_all_votes(VOTES, JudgeVote)}) == 2


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(checkout, monkeypatch):
    configure(checkout, NOBODY)
    monkeypatch.setenv("WHETSTONE_JUDGE_KEY", "schlüssel")
    with pytest.raises(UserError, match=r"^.WHETSTONE_JUDGE_KEY has characters that no key has: copy it again$"):
        ask()


def test_what_was_answered_before_the_server_went_down_is_kept(checkout, ollama):
    ask(pairs=2)
    configure(checkout, NOBODY)
    with pytest.raises(UserError, match=r"no judge answers at http://127\.0\.0\.1:9/v1 \(ConnectError\): start it"):
        ask()
    assert len(read_all_votes(VOTES, JudgeVote)) == 2


def test_without_a_judge_nothing_is_asked(checkout):
    configure(checkout, None)
    with pytest.raises(UserError, match=r"there is no judge: set evaluate\.judge\.url and evaluate\.judge\.model"):
        ask()
    committed = read_params("evaluate", EvaluateSettings, ROOT / "params.yaml").judge
    assert committed is not None and committed.url is None


@pytest.mark.parametrize("url", ["localhost:11434", "file:///etc/passwd", "http://", "http://a b", "http://[x"])
def test_an_address_that_is_none_is_refused_where_parameters_are_read(checkout, url):
    configure(checkout, url)
    with pytest.raises(UserError, match=r"evaluate\.judge\.url = "):
        read_params("evaluate", EvaluateSettings)


@pytest.mark.parametrize(
    "url",
    ["http://me:hidden@host/v1", "http://me:hid/den?hidden@host", "https://host/v1?key=hidden", "http://h/#hidden"],
)
def test_a_refused_address_is_told_in_words_and_without_its_secrets(checkout, url):
    configure(checkout, url)
    with pytest.raises(UserError, match="should be an address such as http://localhost:11434 without user") as caught:
        read_params("evaluate", EvaluateSettings)
    said = str(caught.value)
    assert "hid" not in said and "^https" not in said and "WHETSTONE_JUDGE_KEY" in said


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("1", "left"), (" **2**.\n", "right"), ("Tie", "tie"), ("Reply 2 is better.", "right"),
        ("Reply 1 is short, reply 2 is wrong.\n\n1", "left"), ("<think>\n2, no, 1\n</think>tie", "tie"),
        ("1 or 2", None), ("", None), ("12", None), ("Both are nice.", None), ("Reply 1 is better than 2", None),
    ],
)  # fmt: skip
def test_an_answer_counts_where_it_names_one_preference(answer, preference):
    assert understood(answer) == preference


# --- counted ---------------------------------------------------------------------------------------------------------


def counted(judged: list, votes: list) -> JudgeCount:
    """The count of one judge."""
    people = tally([*votes, *(vote(one.item, 0.5, "nobody else", 99) for one in judged)])
    (found,) = JudgeCount.of(judged, votes, people, GGUFS)
    return found


def test_agreement_is_that_with_the_first_vote_on_the_same_replies():
    votes = [vote("a", 1.0, "ann", 0), vote("b", 1.0, "ann", 1), vote("c", 0.5, "bob", 2), vote("a", 0.0, "bob", 3)]
    other = vote("d", 1.0, "ann", 4)
    votes.append(other.model_copy(update={"left": other.left.model_copy(update={"reply": "9" * 64})}))
    found = counted([judge_vote(name, 1.0, n) for n, name in enumerate("abcd")], votes)
    assert found.rates["agreement"] == {"a": 1.0, "b": 1.0, "c": 0.5}
    assert found.rates["win_rate"] == dict.fromkeys("abcd", 1.0)
    assert found.as_json()["agreement"]["n"] == 3


def test_where_its_two_answers_differ_it_is_a_tie_and_shows_its_bias():
    swayed = judge_vote("a", 1.0, 0).model_copy(update={"answers": ("left", "right"), "choice": "tie"})
    half = judge_vote("b", 1.0, 1).model_copy(update={"answers": ("left", "tie"), "choice": "tie"})
    firm = judge_vote("c", 0.0, 2)
    found = counted([swayed, half, firm], [])
    assert found.rates["win_rate"] == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert found.rates["first"] == {"a": 1.0, "b": 0.75, "c": 0.5}


def test_length_bias_stands_beside_that_of_people_on_the_same_pairs():
    judged = [judge_vote(name, 1.0, n, (9, 5)) for n, name in enumerate("abc")] + [judge_vote("d", 0.0, 3, (5, 5))]
    found = counted(judged, [vote("a", 1.0, "ann", 0), vote("b", 0.0, "ann", 1), vote("d", 0.0, "ann", 2)])
    assert found.rates["longer"] == dict.fromkeys("abc", 1.0)
    assert found.rates["people_longer"] == {"a": 1.0, "b": 0.0}


def test_unclear_answers_equal_replies_and_other_models_say_nothing():
    unclear = judge_vote("a", 1.0, 0).model_copy(update={"answers": ("left", None), "choice": "tie"})
    equal = judge_vote("b", 0.5, 1)
    equal = equal.model_copy(update={"right": equal.right.model_copy(update={"reply": equal.left.reply})})
    other = judge_vote("c", 1.0, 2)
    other = other.model_copy(update={"left": other.left.model_copy(update={"model": "d" * 64})})
    found = counted([unclear, equal, other], [])
    assert (found.as_json()["unclear"], found.rates["win_rate"]) == (1, {"b": 0.5})
    assert found.rates["first"] == found.rates["longer"] == found.rates["agreement"] == {}
    assert JudgeCount.of([other], [], tally([]), GGUFS) == []


def test_a_pair_is_unclear_once_and_no_longer_when_a_later_answer_is_clear():
    unclear, clear = (judge_vote("a", 1.0, n) for n in (0, 2))
    unclear = unclear.model_copy(update={"answers": ("left", None), "choice": "tie"})
    again = unclear.model_copy(update={"id": "again", "answers": (None, None)})
    assert counted([unclear, again], []).as_json()["unclear"] == 1
    found = counted([unclear, again, clear], [])
    assert (found.as_json()["unclear"], found.rates["win_rate"]) == (0, {"a": 1.0})


def test_each_judge_and_each_rubric_is_counted_by_itself():
    one = judge_vote("a", 1.0, 0)
    others = [one.model_copy(update={"by": "other"}), one.model_copy(update={"rubric": "5" * 64})]
    found = JudgeCount.of([one, one, *others], [], tally([vote("a", 1.0, "ann", 0)]), GGUFS)
    assert [count.rates["win_rate"] for count in found] == [{"a": 1.0}] * 3


# --- in the verdict --------------------------------------------------------------------------------------------------


def verdict_on(folder: Path, nats: float) -> dict:
    """The comparison by records of a base at 3 nats a token and a candidate at `nats`."""
    evaluate, compare = (
        read_params(name, kind, ROOT / "params.yaml")
        for name, kind in (("evaluate", EvaluateSettings), ("compare", CompareSettings))
    )
    lines = [
        {"contender": name, "id": f"c{n}", "source": "test", "cluster": f"c{n}", "suite": "s", "turns": []}
        | {"nll": 20 * (mean + n % 5 / 10), "tokens": 20, "correct": 10, "bytes": 80}
        for name, mean in (("base", 3.0), ("candidate", nats))
        for n in range(40)
    ]
    for name in ("items", "prompts", "memory", *GUARDS):
        write_jsonl(folder / f"{name}.jsonl", lines if name == "items" else [])
    return Evidence.read(folder, evaluate, folder / "votes").verdict(compare, "", {"sha256": "e" * 64, "ggufs": GGUFS})


@pytest.mark.parametrize(
    ("nats", "liked", "verdict"), [(2.0, 0.0, "PROMOTE"), (3.0, 1.0, "HOLD"), (2.9, 0.0, "PROMOTE")]
)
def test_whatever_a_judge_says_the_verdict_is_the_same(tmp_path, nats, liked, verdict):
    (tmp_path / "votes").mkdir()
    votes = [vote(f"c{n}", float(n % 2), "ann", n) for n in range(10)]
    (tmp_path / "votes/ann.jsonl").write_bytes(vote_lines(votes))
    before = verdict_on(tmp_path, nats)
    judged = [judge_vote(f"c{n}", liked, n) for n in range(40)]
    (tmp_path / "votes/judge.judge.jsonl").write_bytes(vote_lines(judged))
    assert read_all_votes(tmp_path / "votes") == votes and read_all_votes(tmp_path / "votes", JudgeVote) == judged
    after = verdict_on(tmp_path, nats)
    (found,) = after.pop("judges")
    said = after["reasons"].pop()
    assert before.pop("judges") == [] and after == before and after["verdict"] == verdict
    assert found["win_rate"]["value"] == liked and found["agreement"]["n"] == 10
    assert (
        f"only advises: win rate of the candidate {liked:.0%}" in said
        and "the same as people said of the same replies 50% [" in said
    )


def test_the_report_shows_the_judge_beside_people(tmp_path):
    (tmp_path / "votes").mkdir()
    (tmp_path / "votes/ann.jsonl").write_bytes(vote_lines([vote("c1", 1.0, "ann", 1)]))
    named = [judge_vote(f"c{n}", 1.0, n).model_copy(update={"by": "<b>wise"}) for n in range(40)]
    (tmp_path / "votes/wise.judge.jsonl").write_bytes(vote_lines(named))
    compared = verdict_on(tmp_path, 2.0)
    write_report(
        tmp_path / "r.html", Findings(compared, {"suite": {"sha256": ""}, "base": {}, "candidate": {}}, [], [])
    )
    page = (tmp_path / "r.html").read_text()
    assert "The judge &lt;b&gt;wise (rubric 33333333) only advises" in page
    assert (
        "win rate of the candidate: 100% [" in page
        and "40 pairs" in page
        and "the same as people said of the same replies: " in page
    )


def test_a_line_that_is_no_vote_of_a_judge_is_one_line(tmp_path):
    (tmp_path / "x.judge.jsonl").write_bytes(vote_lines([judge_vote("a", 1.0, 0), vote("a", 1.0, "ann", 0)]))
    with pytest.raises(UserError, match=r"x\.judge\.jsonl, line 2, is no vote"):
        read_all_votes(tmp_path, JudgeVote)


def test_the_judge_is_no_part_of_how_models_are_evaluated():
    settings = read_params("evaluate", EvaluateSettings, ROOT / "params.yaml")
    other = settings.model_copy(update={"by": JudgeSettings(url="http://x", model="y", rubric="z")})
    assert method_sha256(settings) == method_sha256(other)
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["params"]
    named = {name.partition(".")[2] for name in declared if name.startswith("evaluate.")}
    assert named == set(EvaluateSettings.model_fields) - {"judge"}
