"""`review` and `judge`: a person, blind, or a model chooses between replies of the candidate and its baseline."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from fine_tuning.common.dvc_files import pipeline_stands_still
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import VOTES, main_checkout, person_name, root
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.judge import Judge
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.review import Pairs, Review, Shown, keep_votes, seal_votes
from fine_tuning.integration.reply_markdown import printable
from fine_tuning.integration.review_pairs import open_pairs
from fine_tuning.schema.votes import JUDGES, Choice, JudgeVote, votes_file

ANSWERS: dict[str, Choice] = {
    "1": "left", "2": "right", "3": "tie", "t": "tie", "4": "both bad", "b": "both bad",
}  # fmt: skip
KEYS = "1 or 2 is better · 3 as good · 4 both bad · s skip · u undo · r results · q quit"
ESCAPED = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)  # keys without a character (ECMA-48, 5.4)
WAIT_SECONDS = 0.2
TWICE_SECONDS = 0.3  # a key so soon after a pair was shown is the one before, pressed twice


def review(arguments: argparse.Namespace) -> None:
    """Ask about one pair after the other until nothing is left or somebody quits; then seal the votes. Raises UserError
    if there is nothing to review."""
    if arguments.results:
        print(*Review(pairs_here(), person_name(arguments.by)).result_lines(), sep="\n")
        return
    with keyboard() as pressed:  # from the beginning: what is typed while models are loaded is no answer
        found = Review(pairs_here(), person_name(arguments.by))
        try:
            ask(found, pressed)
        finally:
            if sealed := seal_votes():
                print(f"{count_of(sealed, 'vote')} in data/votes. Next: `git add data/votes`, then `dvc repro`")


def judge(arguments: argparse.Namespace) -> None:
    """Let the model of evaluate.judge vote on the first pairs of the review; what it clearly answered once is not asked
    again. Raises UserError if there is no judge or nothing to review, or the judge does not answer; what it said before
    is kept."""
    settings = read_params("evaluate", EvaluateSettings).judge
    if settings is None or not settings.url or not settings.model:
        raise UserError("there is no judge: set evaluate.judge.url and evaluate.judge.model in params.yaml")
    if arguments.pairs is not None and arguments.pairs < 1:
        raise UserError(f"--pairs {arguments.pairs}: give 1 or more")
    pairs, asked = pairs_here(), Judge(settings.url, settings.model, settings.rubric)
    votes = []
    try:
        for cluster in tqdm(pairs.order[: arguments.pairs], desc="judge", unit="pair", disable=None):
            if pairs.replies(cluster) is None:
                asked.check()  # making replies takes long
                pairs.make([cluster], wait=True)
            votes.append(asked.vote(pairs, cluster))
    finally:
        with pipeline_stands_still() as repo:
            new = keep_votes(repo, VOTES / votes_file(settings.model, JUDGES), votes, JudgeVote)
        unclear = sum(None in vote.answers for vote in votes)
        said = f", unclear: {unclear} (the next run asks about them again)" if unclear else ""
        then = ". Next: `git add data/votes`, then `dvc repro`" if new else ""
        print(f"pairs judged: {len(votes)}{said}, new in data/votes: {new}{then}")


def pairs_here() -> Pairs:
    """The pairs of this checkout. Raises UserError if there are none, or this is the folder of an experiment, which
    goes with its votes."""
    if root().resolve() != main_checkout():
        raise UserError("this is a temporary experiment's folder: run this in the main checkout")
    return open_pairs()


def ask(found: Review, pressed: Callable[[], str]) -> None:
    """Show pairs and obey keys; ends with `q` or the last pair."""
    while (shown := next_pair(found)) is not None:
        show(found, shown)
        key = pressed()
        if key == "q":
            return
        if key in ANSWERS:
            found.vote(shown, ANSWERS[key])
        elif key == "s":
            found.skip(shown)
        elif key == "r":
            print(*found.result_lines(), sep="\n")
        elif key == "u" and not found.undo():
            print("nothing to take back")
    print("every pair is voted on: `python -m fine_tuning review --results`")


def next_pair(found: Review) -> Shown | None:
    """The next pair, waited for while its replies are made; None where every pair is voted on."""
    waiting = False
    while (shown := found.current()) is None and found.queue():
        if not waiting:
            print("the models are writing their replies …", flush=True)
        waiting = True
        time.sleep(WAIT_SECONDS)
    return shown


def show(found: Review, shown: Shown) -> None:
    """The conversation and both replies, and no name, number or length that would tell the models apart."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    console.rule(f"{found.done} of {len(found.pairs.order)} voted on")
    for message in shown.item.history:
        if message["role"] != "system":
            console.print(Text(f"{message['role']}: ", "bold").append(printable(message["content"]), "not bold"))
    for number, reply in (("1", shown.left), ("2", shown.right)):
        text = printable(reply.text) or "(nothing)"
        console.print(Panel(Text(text if reply.finished else f"{text} … (cut off)"), title=number, title_align="left"))
    console.print(KEYS)


@contextmanager
def keyboard() -> Iterator[Callable[[], str]]:
    """Waits for a key that is pressed from then on; where there is no terminal, takes the first letter of a line."""
    if not sys.stdin.isatty():
        yield lambda: next(sys.stdin, "q").strip()[:1].lower()
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed() -> str:
        time.sleep(TWICE_SECONDS)
        termios.tcflush(descriptor, termios.TCIFLUSH)
        while typed := os.read(descriptor, 1024):
            # What a terminal sends for an arrow or a function key ends in a letter that may be a key of ours.
            if key := ESCAPED.sub("", typed.decode(errors="replace")).lower()[:1]:
                return "q" if key == "\x04" else key
        return "q"

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
