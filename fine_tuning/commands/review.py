"""`review`: choose, blind, between replies of the candidate and of what it is compared with, in the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import main_checkout, person_name, root
from fine_tuning.evaluation.review import Review, Shown, seal_votes
from fine_tuning.integration.reply_markdown import printable
from fine_tuning.integration.review_pairs import open_pairs
from fine_tuning.schema.votes import Choice

ANSWERS: dict[str, Choice] = {
    "1": "left", "2": "right", "3": "tie", "t": "tie", "4": "both bad", "b": "both bad",
}  # fmt: skip
KEYS = "1 or 2 is better · 3 as good · 4 both bad · s skip · u undo · r results · q quit"
WAIT_SECONDS = 0.2


def review(arguments: argparse.Namespace) -> None:
    """Ask about one pair after the other until nothing is left or somebody quits; then seal the votes.

    Raises:
        UserError: there is nothing to review.
    """
    if root().resolve() != main_checkout():
        raise UserError("this is a temporary experiment's folder: run review in the main checkout")
    found = Review(open_pairs(), person_name(arguments.by))
    if arguments.results:
        say_results(found)
        return
    try:
        ask(found, keys())
    finally:
        if sealed := seal_votes():
            print(f"{count_of(sealed, 'vote')} in data/votes. Next: `git add data/votes`, then `dvc repro`")


def ask(found: Review, pressed: Iterator[str]) -> None:
    """Show pairs and obey keys; ends with `q` or the last pair."""
    while (shown := next_pair(found)) is not None:
        show(found, shown)
        key = next(pressed, "q")
        if key == "q":
            return
        if key in ANSWERS:
            found.vote(shown, ANSWERS[key])
        elif key == "s":
            found.skip(shown)
        elif key == "r":
            say_results(found)
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


def keys() -> Iterator[str]:
    """Keys as they are pressed; where there is no terminal, the first letter of each line."""
    if not sys.stdin.isatty():
        yield from (line.strip()[:1].lower() for line in sys.stdin)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        while (key := sys.stdin.read(1).lower()) not in ("", "\x04"):
            yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def say_results(found: Review) -> None:
    """The win rate so far, and each person's. Votes after this are marked."""
    results = found.results()
    print(results)
    for person, rate in results.people.items():
        print(f"  {person}: {rate}")
