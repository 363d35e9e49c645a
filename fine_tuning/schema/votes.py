"""Votes: which of two models' replies to a held-out prompt a person preferred, without knowing whose they were.

One JSON object a line, in data/votes one file a person, tracked with `dvc add`. A vote names what it is about by
content and holds none: the models by the SHA-256 of their GGUF files, the replies and the prompt by that of their text.

A model that judges has votes of another form, in files of their own (`*.judge.jsonl`) beside the people's.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import dump_line, read_lines
from fine_tuning.schema.conversation import short_hash

Choice = Literal["left", "right", "tie", "both bad", "equal"]  # equal: the same replies, so nobody was asked
NOBODY = ""  # by whom equal replies are
JUDGES = ".judge.jsonl"  # how the file of a model's votes ends
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Side(BaseModel):
    """One of the two replies: SHA-256 of the GGUF file that wrote it, and of its text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Sha256
    reply: Sha256


class Vote(BaseModel):
    """One vote. `left` and `right` is the order in which the replies were shown; `item` is the window's id.
    `after_results`: the person had looked at the win rate of this pair before."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    event: Literal["vote"] = "vote"
    id: str
    at: str
    by: str
    conversation_id: str
    item: str
    prompt: Sha256
    left: Side
    right: Side
    choice: Choice
    after_results: bool = False

    @property
    def models(self) -> set[str]:
        return {self.left.model, self.right.model}

    @property
    def pair(self) -> tuple[str, frozenset[Side]]:
        """Prompt and replies, whatever side they were on."""
        return self.prompt, frozenset((self.left, self.right))

    def value_for(self, model: str) -> float:
        """1 where the model's reply was preferred, 0 where the other one was, else one half."""
        if self.choice not in ("left", "right"):
            return 0.5
        chosen = self.left if self.choice == "left" else self.right
        return float(chosen.model == model)


class JudgeVote(Vote):
    """A vote of the model `by`: what both of its answers say, the left and the right reply read first, else a tie.

    `rubric` is the SHA-256 of its instructions, an answer is null where it could not be understood, and `characters`
    are those of the left and the right reply.
    """

    rubric: Sha256
    answers: tuple[Choice | None, Choice | None]
    characters: tuple[int, int]


VoteT = TypeVar("VoteT", bound=Vote)


def scan_votes(path: Path, form: type[VoteT] = Vote) -> tuple[list[VoteT], dict[int, bytes]]:  # type: ignore[assignment]
    """(votes, {number: line} of the lines that are none) of a file; nothing where there is no file."""
    votes, damaged = [], {}
    for number, line in read_lines(path) if path.is_file() else ():
        try:
            votes.append(form.model_validate_json(line))
        except ValidationError:
            damaged[number] = line
    return votes, damaged


def read_votes(path: Path, form: type[VoteT] = Vote) -> list[VoteT]:  # type: ignore[assignment]
    """The votes of a file in the order of its lines; none where there is no file. Raises UserError if a line is no
    vote, or of another version of this project; names it."""
    votes, damaged = scan_votes(path, form)
    if damaged:
        tracked = path.with_name(f"{path.name}.dvc").exists()
        back = f"bring the file's last version back with `dvc checkout --force {path}`"
        mend = f"take the line out, or {back if tracked else f'move the file away: `mv {path} .`'}"
        raise UserError(f"{path}, line {min(damaged)}, is no vote: {mend}")
    return votes


def read_all_votes(folder: Path, form: type[VoteT] = Vote) -> list[VoteT]:  # type: ignore[assignment]
    """People's votes, or judges', of every file of a folder, in order of time; the same vote in two files counts once.
    Raises UserError if a line is no vote, or the folder holds something else, or lacks a file that DVC tracks there."""
    present = sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    for path in present:
        data = path.with_suffix("") if path.suffix == ".dvc" else path
        if not data.exists():
            tracked = data.with_name(f"{data.name}.dvc") in present
            raise UserError(
                f"{data} {f'is not here: run `dvc pull {data}`' if tracked else 'is a link to nothing: remove it'}"
            )
        if not path.is_file() or path.suffix not in (".jsonl", ".dvc", ".md"):
            raise UserError(f"{path} is not a file of votes: move it out of {folder}")
    files = (path for path in present if path.suffix == ".jsonl")
    files = (path for path in files if path.name.endswith(JUDGES) == (form is JudgeVote))
    found = {vote.id: vote for path in files for vote in read_votes(path, form)}
    return sorted(found.values(), key=lambda vote: (vote.at, vote.id))


def vote_lines(votes: Iterable[Vote]) -> bytes:
    return b"".join(dump_line(vote.model_dump()) for vote in votes)


def votes_file(name: str, ending: str = ".jsonl") -> str:
    """Name of a person's or judge's file: letters and digits of the name, and a hash, since two may have the same."""
    return f"{re.sub('[^a-z0-9]+', '-', name.casefold()).strip('-')[:40] or 'votes'}-{short_hash(name)[:6]}{ending}"
