"""The review: pairs in an order that was fixed before, blind votes, undone, kept, sealed for compare."""

import io
import os
import pty
import re
import select
import sys
import termios
import threading
from argparse import Namespace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from fine_tuning.commands import review as command
from fine_tuning.commands.conversations import seal_inbox
from fine_tuning.commands.promote import check_verdict
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, write_json
from fine_tuning.evaluation import review
from fine_tuning.evaluation.review import LIVE, VOTES, Review, in_random_order, seal_votes
from fine_tuning.integration.embedded_engine import shared_engines
from fine_tuning.integration.review_pairs import open_pairs
from fine_tuning.schema.votes import read_all_votes, read_votes, votes_file
from tests.app_checkout import add_candidate, add_repositories, write_checkout
from tests.evaluation_suite import conversation, write_items
from tests.registered import sh


@pytest.fixture(scope="module")
def reviewable(once_a_run, tiny_base):
    """A checkout with a candidate and six held-out prompts."""
    return once_a_run("reviewable", lambda folder: _make(folder, tiny_base))


def _make(folder: Path, base: Path) -> None:
    folder.mkdir()
    add_repositories(add_candidate(write_checkout(folder, base)))


@pytest.fixture
def checkout(reviewable, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "checkout"
    shutil.copytree(reviewable, folder, symlinks=True)
    monkeypatch.chdir(folder)
    sh(folder, "git config user.name Ann && git config user.email a@example.org && git add -A && git commit -qm Start")
    yield folder
    shared_engines.close()


def answered(found: Review, answers: str) -> None:
    """Vote on the next pairs: l left, r right, t tie."""
    for answer in answers:
        found.pairs.make(found.queue()[:1], wait=True)
        found.vote(found.current(), {"l": "left", "r": "right", "t": "tie"}[answer])


def test_every_cluster_is_shown_once_in_the_order_that_the_hash_fixed(checkout):
    pairs = open_pairs()
    assert pairs.order == in_random_order([f"c{n}" for n in range(6)], pairs.ggufs.values())
    pairs.make(pairs.order, wait=True)
    found, shown = Review(pairs, "ann"), []
    while (pair := found.current()) is not None:
        shown.append(pair.item.cluster)
        found.vote(pair, "tie")
        found.vote(pair, "left")  # pressed twice
    assert shown == [cluster for cluster in pairs.order if cluster in shown]
    assert found.done == 6 and not found.queue() and found.results().win_rate.value == 0.5


def test_the_sides_are_fixed_before_the_vote_and_not_the_same_for_everybody(checkout):
    pairs = open_pairs()
    pairs.make(pairs.order, wait=True)

    def sides(person):
        return [Review(pairs, person).current().sides for _ in range(2)]

    found = [sides(f"person {number}") for number in range(12)]
    assert all(one == again for one, again in found)
    assert {one for one, _ in found} == {("candidate", "base"), ("base", "candidate")}


def test_a_reply_is_made_once_for_a_model_and_a_prompt(checkout):
    pairs = open_pairs()
    pairs.make(pairs.order[:2], wait=True)
    kept = {path: path.stat().st_mtime_ns for path in review.REPLIES.iterdir()}
    assert len(kept) == 4
    again = open_pairs()
    again.make(pairs.order[:2], wait=True)
    assert {path: path.stat().st_mtime_ns for path in review.REPLIES.iterdir()} == kept
    assert again.replies(pairs.order[0]) == pairs.replies(pairs.order[0])


def test_equal_replies_are_not_shown_and_count_one_half(checkout):
    pairs = open_pairs()
    first, second = pairs.order[:2]
    pairs.make([first, second], wait=True)
    kept = [pairs._file(model, first) for model in (pairs.candidate, pairs.against)]
    kept[1].write_bytes(kept[0].read_bytes())
    found = Review(pairs, "ann")
    assert found.current().item.cluster == second
    (vote,) = read_votes(LIVE)
    assert (vote.choice, vote.by) == ("equal", "")
    assert Review(pairs, "bob").current().item.cluster == second and len(read_votes(LIVE)) == 1
    assert found.results().values == [0.5] and found.results().people == {}


def test_a_vote_can_be_taken_back_until_the_next_one_and_a_skipped_pair_comes_last(checkout):
    pairs = open_pairs()
    found = Review(pairs, "ann")
    answered(found, "lr")
    assert [vote.item for vote in read_votes(LIVE)] == pairs.order[:2]
    assert found.undo() and not found.undo()
    assert found.queue()[0] == pairs.order[1] and len(read_votes(LIVE)) == 1
    found.pairs.make(found.queue()[:1], wait=True)
    found.skip(found.current())
    assert found.queue() == [*pairs.order[2:], pairs.order[1]]


def test_others_prompts_come_after_those_that_nobody_voted_on(checkout):
    pairs = open_pairs()
    answered(Review(pairs, "ann"), "ll")
    assert Review(pairs, "bob").queue() == [*pairs.order[2:], *pairs.order[:2]]


def test_votes_after_a_look_at_the_results_are_marked(checkout):
    pairs = open_pairs()
    found = Review(pairs, "ann")
    answered(found, "l")
    found.results()
    answered(found, "r")
    answered(Review(pairs, "bob"), "r")
    assert [vote.after_results for vote in read_votes(LIVE)] == [False, True, False]


def test_sealed_votes_are_tracked_and_counted_once_also_after_a_kill(checkout):
    found = Review(open_pairs(), "ann")
    answered(found, "lr")
    answered(Review(found.pairs, "bob"), "l")
    before = LIVE.read_bytes()
    assert seal_votes() == 3 and not LIVE.exists()
    review.CLOSED.write_bytes(before)  # a kill before the closed file was removed
    assert seal_votes() == 0 and not review.CLOSED.exists()
    assert [vote.by for vote in read_all_votes(VOTES)] == ["ann", "ann", "bob"]
    tracked = {path.name for path in VOTES.glob("*.dvc")}
    assert tracked == {f"{votes_file(name)}.dvc" for name in ("ann", "bob")}
    sh(checkout, "git add -A && git commit -qm Votes")
    files = {path.name: path.read_bytes() for path in VOTES.glob("*.jsonl")}
    for path in VOTES.glob("*.jsonl"):
        path.unlink()
    sh(checkout, "dvc checkout -q data/votes/*.dvc")
    assert {path.name: path.read_bytes() for path in VOTES.glob("*.jsonl")} == files
    assert "jsonl" not in sh(checkout, "git ls-files data/votes").replace(".jsonl.dvc", "")
    assert not found.undo()


def test_seal_hands_votes_over_too(checkout, capsys):
    answered(Review(open_pairs(), "ann"), "l")
    assert seal_inbox() == [VOTES] and "1 vote handed over" in capsys.readouterr().out, "and no conversation"
    assert not LIVE.exists() and len(read_all_votes(VOTES)) == 1
    assert not seal_inbox()


def test_a_damaged_file_of_votes_is_one_line(checkout):
    VOTES.mkdir(parents=True)
    (VOTES / "ann.jsonl").write_text('{"torn')
    with pytest.raises(UserError, match=r"data/votes/ann\.jsonl, line 1, is no vote"):
        Review(open_pairs(), "ann")


def test_a_damaged_line_in_the_inbox_stops_neither_review_nor_seal_and_is_kept(checkout, capsys):
    answered(Review(open_pairs(), "ann"), "l")
    review.CLOSED.write_bytes(b'{"torn\n' + LIVE.read_bytes().replace(b"left", b"best", 1))
    LIVE.write_bytes(LIVE.read_bytes() + b"[]\n\n")
    assert len(Review(open_pairs(), "ann").votes) == 1
    damaged = [*review.CLOSED.read_bytes().splitlines(), b"[]"]
    assert seal_votes() == 1 and len(read_all_votes(VOTES)) == 1
    assert review.TORN.read_bytes().splitlines() == damaged
    assert "2 lines of inbox/votes.jsonl set aside in inbox/votes.jsonl.torn" in capsys.readouterr().out
    assert not LIVE.exists() and not review.CLOSED.exists() and seal_votes() == 0


def test_a_damaged_file_that_is_tracked_is_mended_by_the_command_that_the_error_names(checkout):
    answered(Review(open_pairs(), "ann"), "l")
    seal_votes()
    (path,) = VOTES.glob("*.jsonl")
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(before + b"torn\n")
    with pytest.raises(UserError, match="line 2, is no vote") as caught:
        seal_votes() or Review(open_pairs(), "ann")
    sh(checkout, re.search("`(dvc .*)`", str(caught.value))[1])
    assert path.read_bytes() == before and len(Review(open_pairs(), "ann").votes) == 1


def test_there_is_nothing_to_review_without_a_candidate(checkout):
    (checkout / "models/package/model.gguf").unlink()
    with pytest.raises(UserError, match="there is no candidate to review"):
        open_pairs()


def test_a_model_that_cannot_answer_is_one_line(checkout):
    (checkout / "models/package/model.gguf").write_bytes(b"GGUF no model")
    found = Review(open_pairs(), "ann")
    found.pairs.make(found.queue()[:1], wait=True)
    with pytest.raises(UserError, match="is not a GGUF file"):
        found.current()


def _has_output(terminal: int) -> bool:
    return bool(select.select([terminal], [], [], 0)[0])


# --- kinds of versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "adapter+examples"])
def test_a_version_of_another_kind_replies_after_what_stands_before_its_questions(checkout, tiny_base, kind):
    plain = open_pairs()
    lamps = {f"t{n}": conversation(f"Where is lamp number {n}?", f"Lamp {n} is there.") for n in range(40)}
    write_items(checkout / "data/prepared/train", tiny_base, lamps)
    shown = {"name": kind, "system_prompt": "Say where." if kind == "prompt" else None, "examples": 40}
    write_json(checkout / "metrics/evaluation.json", {"suite": {"kind": shown}})
    pairs = open_pairs()
    assert pairs.candidate.gguf == (review.BASE if kind == "prompt" else review.CANDIDATE).gguf
    assert len(set(pairs.ggufs.values())) == 2 and pairs.ggufs["candidate"] not in plain.ggufs.values()
    item = pairs.items[pairs.order[0]]
    asked = pairs.tokenizers["candidate"].decode(pairs._prompt(pairs.candidate, item))
    fitting = asked.count("Lamp ")
    assert 0 < fitting < 40 and ("Say where." in asked) == (kind == "prompt")
    assert asked.index("Lamp ") < asked.index("Where is box") and "Lamp" not in (
        pairs.tokenizers["base"].decode(pairs._prompt(pairs.against, item))
    )
    assert len(pairs._prompt(pairs.candidate, item)) <= pairs.context - pairs.sampling["max_tokens"]
    answered(Review(pairs, "ann"), "l")
    (vote,) = read_votes(LIVE)
    assert vote.models == set(pairs.ggufs.values())
    write_items(checkout / "data/prepared/train", tiny_base, {"t1": lamps["t1"]})
    again = Review(open_pairs(), "ann")
    assert not again.done, "a vote on replies after other examples is one on another version"


# --- in the terminal -------------------------------------------------------------------------------------------------


def test_keys_vote_and_nothing_on_the_screen_names_a_model_or_a_direction(checkout, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nx\nt\nu\ns\n2\nq\n4\n"))
    command.review(Namespace(by="Zoe", results=False))
    said = capsys.readouterr().out
    assert [vote.choice for vote in read_all_votes(VOTES)] == ["left", "right"]
    assert "2 votes in data/votes" in said and "Where is box number" in said
    assert not any(word in said for word in ("candidate", "base", "win rate", "gguf"))
    command.review(Namespace(by="Zoe", results=True))
    assert "in 2 votes against the base" in capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch):
    """What types on the terminal that is the standard input."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as file:
        monkeypatch.setattr("sys.stdin", file)
        yield master
    os.close(master)


def test_on_a_terminal_a_key_is_enough(terminal):
    before = termios.tcgetattr(sys.stdin)
    with command.keyboard() as pressed:
        for typed, key in ((b"1", "1"), (b"S", "s"), (b"\x04", "q")):
            threading.Timer(2 * command.TWICE_SECONDS, os.write, (terminal, typed)).start()
            assert pressed() == key
        for at, typed in enumerate(
            (b"\x1b[B", b"\x1b[2~", b"\x1bOQ", b"x")
        ):  # arrow down, Insert, F2: B, 2, Q are keys
            threading.Timer((2 + at / 4) * command.TWICE_SECONDS, os.write, (terminal, typed)).start()
        assert pressed() == "x"
    assert termios.tcgetattr(sys.stdin) == before


def test_on_a_terminal_only_keys_after_a_pair_was_shown_vote_and_none_votes_twice(
    checkout, terminal, monkeypatch, capsys
):
    shown, show = [], command.show
    typed = iter((b"11", b"2", b"q"))  # as soon as a pair is there, and once more before the next one

    def show_and_type(found, pair):
        show(found, pair)
        shown.append(pair.item.cluster)
        os.write(terminal, b"4")
        threading.Timer(2 * command.TWICE_SECONDS, os.write, (terminal, next(typed))).start()

    def pairs_while_somebody_types():
        os.write(terminal, b"22")
        return open_pairs()

    monkeypatch.setattr(command, "show", show_and_type)
    monkeypatch.setattr(command, "pairs_here", pairs_while_somebody_types)
    command.review(Namespace(by="Zoe", results=False))
    assert len(shown) == 3 == len(set(shown))
    votes = sorted(read_all_votes(VOTES), key=lambda vote: vote.at)
    assert [vote.choice for vote in votes] == ["left", "right"]
    assert b"22" not in (os.read(terminal, 4096) if _has_output(terminal) else b""), "nothing typed is echoed"


# --- on the page -----------------------------------------------------------------------------------------------------


def open_page() -> AppTest:
    at = AppTest.from_string("from fine_tuning.integration.app_pages.review import page\npage()\n", default_timeout=60)
    at.run()
    assert not at.exception
    return at


def test_the_page_asks_blind_and_shows_progress_only(checkout):
    pairs = open_pairs()
    pairs.make(pairs.order, wait=True)
    at = open_page()
    at.button(key="answer-1").click().run()
    at.button(key="answer-3").click().run()
    at.button(key="undo").click().run()
    at.button(key="skip").click().run()
    at.button(key="answer-2").click().run()
    assert [vote.choice for vote in read_votes(LIVE)] == ["left", "right"]
    assert [vote.by for vote in read_votes(LIVE)] == ["Ann", "Ann"]
    text = "\n".join(str(element.value) for element in (*at.markdown, *at.caption, *at.info, *at.success))
    assert not any(word in text for word in ("candidate", "base", "win rate"))
    at.button(key="results").click().run()
    assert any("win rate" in markdown.value for markdown in at.markdown)
    at.button(key="seal").click().run()
    assert "2 votes in data/votes" in at.success[0].value
    assert len(read_all_votes(VOTES)) == 2


def test_the_page_says_what_is_missing(checkout):
    (checkout / "models/package/model.gguf").unlink()
    assert "there is no candidate to review" in open_page().info[0].value


# --- through the pipeline --------------------------------------------------------------------------------------------


@pytest.mark.end_to_end
def test_votes_run_the_comparison_alone_and_promote_computes_it_again(trained_project, tmp_path, monkeypatch):
    project = trained_project.copy(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    found = Review(open_pairs(), "ann")
    found.pairs.make(found.pairs.order, wait=True)
    while (shown := found.current()) is not None:
        found.vote(shown, "left" if shown.sides[0] == "candidate" else "right")
    shared_engines.close()
    sealed = seal_votes()
    assert sealed == len(found.pairs.order) > 0
    project.commit("Votes")
    said = project.run("dvc", "repro")
    assert re.findall(r"Running stage '(\w+)'", said) == ["compare"]
    compared = read_json("metrics/comparison.json")
    assert (compared["votes"]["n"], compared["votes"]["against"]) == (sealed, "base")
    asked = sealed - compared["votes"]["equal"]
    assert compared["votes"]["people"].get("ann", {}).get("value", 1.0) == 1.0 and compared["votes"]["not_counted"] == 0
    assert f"in {sealed} votes against the base" in "\n".join(compared["reasons"]) and asked >= 0
    check_verdict(compared)
    with pytest.raises(UserError, match="is not what its records give"):
        check_verdict(compared | {"votes": {}})
    assert "Data and pipelines are up to date" in project.run("dvc", "repro")


def test_the_command_answers_before_anything_heavy_is_imported():
    code = "import sys, fine_tuning.commands.review; print({'torch', 'evaluate', 'datasets'} & set(sys.modules))"
    assert sh(Path(__file__).parents[1], f'{sys.executable} -c "{code}"').strip() == "set()"
