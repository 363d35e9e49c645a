"""The review: people choose, blind, between replies of the candidate and of what it is compared with.

The terminal and the page show what is in here: which pairs, in which order, on which side, and what becomes of a vote.
Votes are written to the inbox at once and sealed into data/votes, for `compare`, while no pipeline runs.
"""

import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.common.dvc_files import add_to_dvc, pipeline_stands_still
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import EVALUATION, FORGOTTEN, PREPARED, VOTES
from fine_tuning.common.records import read_lines, read_object, replacing, updating, write_json
from fine_tuning.data_collection.conversation_logger import append_line, rename_log, rewrite_log
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.evaluation.records.champion_records import is_champion, without_learned
from fine_tuning.evaluation.records.record_types import Item, Reply, conversation_of
from fine_tuning.evaluation.records.settings import ADAPTER as ADAPTER_KIND
from fine_tuning.evaluation.suite.contenders import Contender, as_kind, find_champion
from fine_tuning.evaluation.suite.examples import Exchanges
from fine_tuning.evaluation.suite.items import after, read_items
from fine_tuning.evaluation.suite.prompting_baselines import context as context_before
from fine_tuning.evaluation.verdict.judge import JudgeCount
from fine_tuning.evaluation.verdict.votes import VoteCount
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import RenderError, encode_prompt, load_tokenizer
from fine_tuning.schema.conversation import now, short_hash
from fine_tuning.schema.votes import (
    NOBODY,
    Choice,
    JudgeVote,
    Side,
    Vote,
    read_all_votes,
    read_votes,
    scan_votes,
    vote_lines,
    votes_file,
)

if TYPE_CHECKING:
    from dvc.repo import Repo

LIVE, CLOSED = Path("inbox/votes.jsonl"), Path("inbox/votes.closed.jsonl")
TORN = Path("inbox/votes.jsonl.torn")  # lines that are no votes
TEST, TRAIN = PREPARED / "test", PREPARED / "train"
CHAMPION = Path("models/champion.json")
BASE = Contender("base", Path("models/base"), Path("models/base/base-Q8_0.gguf"))
CANDIDATE = Contender("candidate", Path("models/merged"), Path("models/package/model.gguf"))
ADAPTER = Path("models/adapter/adapter_model.safetensors")
REPLIES = Path(".whetstone/memo/review")
SEEN = Path(".whetstone/review.json")  # whose results were looked at, by person and pair
AHEAD = 10  # pairs whose replies are made before they are asked for

Engine = Callable[[Path], AbstractContextManager[LlamaEngine]]


def in_random_order(clusters: Iterable[str], models: Iterable[str]) -> list[str]:
    """The clusters in an order that a hash fixes before the first vote, another one for each pair of models.

    Votes prove something in random order only: with the most different pairs first, prompts that the candidate happens
    to win may come before those that it loses.
    """
    pair = " ".join(sorted(models))
    return sorted(clusters, key=lambda cluster: sha256(pair, cluster))


def sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()


class Pairs:
    """The held-out prompts of a checkout, one a cluster, and the replies of two models to them.

    Args:
        engine: starts llama.cpp with a GGUF.
        sampling: how a reply is drawn, arguments of LlamaEngine.complete_stream.
        context: tokens that prompt and reply may have together.

    Raises:
        UserError: there is no candidate, it is the champion, or there is no held-out prompt.
    """

    def __init__(self, engine: Engine, sampling: dict[str, Any], context: int) -> None:
        if not ADAPTER.is_file() or not CANDIDATE.gguf.is_file():
            raise UserError("there is no candidate to review: run `dvc repro`, or `dvc pull` if it was made elsewhere")
        kind = read_object(EVALUATION).get("suite", {}).get("kind", {"name": ADAPTER_KIND})
        if is_champion(CHAMPION, ADAPTER, CANDIDATE.gguf, kind):
            raise UserError("the candidate is the champion already: train another one, then review that")
        self.engine, self.sampling, self.context, self.folder = engine, sampling, context, REPLIES.absolute()
        self.candidate, self.against = as_kind(kind, BASE, CANDIDATE), find_champion(CHAMPION) or BASE
        both = self.candidate, self.against
        self.ggufs = {one.name: one.identity(TRAIN) for one in both}
        self.tokenizers = {one.name: load_tokenizer(one.folder) for one in both}
        shown = Exchanges.read(TRAIN) if any(one.examples for one in both) else None
        self.before = {one.name: context_before(one.system_prompt, shown, one.examples) for one in both}
        items, _ = without_learned(read_items(TEST, load_tokenizer(BASE.folder)), CHAMPION)
        fits = [item for item in items if len(item.prompt_ids(item.asked or 0)) < context]
        asked = [item for item in fits if item.question.strip() and self._can_be_asked(item)]
        self.items = {item.cluster: item for item in sorted(asked, key=lambda item: sha256(item.id))}  # one a cluster
        self.records = [
            {"contender": name, "id": item.id, "cluster": item.cluster} for name in self.ggufs for item in items
        ]
        self.order = in_random_order(self.items, self.ggufs.values())
        self.name = sha256(*sorted(self.ggufs.values()))
        self.problem: str | None = None
        self._wanted: list[str] = []
        self._lock = threading.Lock()
        self._maker: threading.Thread | None = None

    def replies(self, cluster: str) -> dict[str, Reply] | None:
        """Both models' replies by name; None while they are made. Raises UserError if they could not be made."""
        found = {one.name: self._kept(one, cluster) for one in (self.candidate, self.against)}
        if None in found.values():
            if self.problem:
                raise UserError(self.problem)
            return None
        return {name: reply for name, reply in found.items() if reply is not None}

    def make(self, clusters: Sequence[str], wait: bool = False) -> None:
        """Have the replies to these prompts made in the background, in this order, before any others."""
        with self._lock:
            self._wanted, self.problem = list(clusters), None
            if self._maker is None or not self._maker.is_alive():
                self._maker = threading.Thread(target=self._make, daemon=True, name="review")
                self._maker.start()
            maker = self._maker
        if wait:
            maker.join()

    def named(self, item: Item, names: Sequence[str], replies: Sequence[Reply]) -> dict[str, Any]:
        """What a vote on two replies by the models of these names is about, by content: fields of Vote."""
        both = zip(names, replies, strict=True)
        left, right = (Side(model=self.ggufs[name], reply=sha256(reply.text)) for name, reply in both)
        prompt = sha256(json.dumps(item.history, sort_keys=True))
        of = {"conversation_id": conversation_of(item.id), "item": item.id, "prompt": prompt}
        return of | {"left": left, "right": right}

    def _make(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._maker = None
                    return
                cluster = self._wanted.pop(0)
            try:
                for one in (self.candidate, self.against):
                    if self._kept(one, cluster) is None:
                        write_json(self._file(one, cluster), asdict(self._answer(one, cluster)))
            except (UserError, OSError) as error:
                with self._lock:
                    self.problem, self._wanted = str(error), []

    def _answer(self, model: Contender, cluster: str) -> Reply:
        prompt = self._prompt(model, self.items[cluster])
        most = min(self.sampling["max_tokens"], max(1, self.context - len(prompt)))
        with self.engine(model.gguf) as engine:
            pieces = list(engine.complete_stream(prompt, **self.sampling | {"max_tokens": most, "seed": 0}))
        return Reply("".join(pieces).strip(), len(pieces), len(pieces) < most)

    def _prompt(self, model: Contender, item: Item) -> list[int]:
        """What a model is asked, after what stands before a question to it: as many of the examples as fit beside the
        reply, the least similar left out first. A system prompt that was configured is among the messages already."""
        before = list(self.before[model.name](item.history))
        room = self.context - min(self.sampling["max_tokens"], self.context // 2)
        while True:
            prompt = encode_prompt(self.tokenizers[model.name], after(before, item.history))
            first = next((at for at, message in enumerate(before) if message["role"] == "user"), None)
            if len(prompt) <= room or first is None:
                return prompt
            del before[first : first + 2]

    def _can_be_asked(self, item: Item) -> bool:
        """Whether both chat templates take what stands before a question; without anything they did in `evaluate`."""
        try:
            return all([self._prompt(one, item) for one in (self.candidate, self.against) if one.kind != ADAPTER_KIND])
        except RenderError:
            return False

    def _file(self, model: Contender, cluster: str) -> Path:
        key = [self.ggufs[model.name], self.items[cluster].history, self.sampling, self.context]
        return self.folder / f"{sha256(json.dumps(key, sort_keys=True))}.json"

    def _kept(self, model: Contender, cluster: str) -> Reply | None:
        found = read_object(self._file(model, cluster))
        return Reply(**found) if found else None


@dataclass(frozen=True)
class Shown:
    """One pair as a person sees it: the messages before, and two replies whose models are not named."""

    item: Item
    left: Reply
    right: Reply
    sides: tuple[str, str]


class Review:
    """One person's way through the pairs."""

    def __init__(self, pairs: Pairs, person: str) -> None:
        self.pairs, self.person = pairs, person
        pairs.problem = None  # tried again
        votes = [*read_all_votes(VOTES), *scan_votes(CLOSED)[0], *scan_votes(LIVE)[0]]
        self.votes = sorted(votes, key=lambda vote: (vote.at, vote.id))
        self.skipped: list[str] = []
        self.last: Vote | None = None
        """The vote that may be taken back"""

    def queue(self) -> list[str]:
        """Clusters that this person has not voted on: those that nobody has first, skipped ones last."""
        counted = [vote for vote in self.votes if vote.models == set(self.pairs.ggufs.values())]
        clusters = {line["id"]: line["cluster"] for line in self.pairs.records}
        mine = {clusters.get(vote.item) for vote in counted if vote.by in (self.person, NOBODY)}
        anybody = {clusters.get(vote.item) for vote in counted}
        left = [cluster for cluster in self.pairs.order if cluster not in mine]
        return sorted(left, key=lambda cluster: (cluster in self.skipped, cluster in anybody))

    @property
    def done(self) -> int:
        """Prompts that this person has voted on, or where nobody needs to."""
        return len(self.pairs.order) - len(self.queue())

    def current(self) -> Shown | None:
        """The next pair; None while its replies are made, and where `queue` is empty. Equal replies are no question.
        Raises UserError if the replies could not be made, or the vote on equal ones not be written."""
        while queue := self.queue():
            replies = self.pairs.replies(queue[0])
            if replies is None:
                self.pairs.make(queue[:AHEAD])
                return None
            item, names = self.pairs.items[queue[0]], (self.pairs.candidate.name, self.pairs.against.name)
            sides = names if int(sha256(self.pairs.name, self.person, queue[0])[0], 16) % 2 else names[::-1]
            shown = Shown(item, *(replies[name] for name in sides), sides)
            if shown.left.text != shown.right.text:
                return shown
            self._write(shown, "equal", NOBODY)
        return None

    def vote(self, shown: Shown, answer: Choice) -> None:
        """Vote on a pair; a key that was pressed twice votes once. Raises UserError if it cannot be written."""
        if shown.item.cluster in self.queue():
            self.last = self._write(shown, answer, self.person)
            self.pairs.make(self.queue()[:AHEAD])

    def skip(self, shown: Shown) -> None:
        """Show a pair again after all others."""
        self.skipped.append(shown.item.cluster)

    def undo(self) -> bool:
        """Take the last vote back, unless it is sealed; the pair is shown again. Whether there was one."""
        vote, self.last = self.last, None
        if vote is None or not rewrite_log(LIVE, lambda _, event: event is None or event["id"] != vote.id):
            return False
        self.votes.remove(vote)
        return True

    def results(self) -> VoteCount:
        """What the votes say so far; votes after this are marked."""
        with updating(SEEN) as seen:
            seen[self._seen_key] = True
        return VoteCount.of(self.votes, self.pairs.records, self.pairs.ggufs)

    def result_lines(self) -> list[str]:
        """The results in words: of all, of each person, and what judges say beside."""
        people = self.results()
        judges = JudgeCount.of(read_all_votes(VOTES, JudgeVote), self.votes, people, self.pairs.ggufs)
        return [str(people), *(f"{person}: {rate}" for person, rate in people.people.items()), *map(str, judges)]

    @property
    def _seen_key(self) -> str:
        return short_hash([self.pairs.name, self.person])

    def _write(self, shown: Shown, choice: Choice, by: str) -> Vote:
        vote = Vote(
            id=uuid.uuid4().hex, at=now(), by=by, choice=choice,
            after_results=bool(read_object(SEEN).get(self._seen_key)),
            **self.pairs.named(shown.item, shown.sides, (shown.left, shown.right)),
        )  # fmt: skip
        try:
            append_line(LIVE, vote_lines([vote]))
        except OSError as error:
            raise UserError(f"the vote could not be written to {LIVE} ({error.strerror}): free some space") from None
        self.votes.append(vote)
        return vote


def seal_votes() -> int:
    """Move the votes of the inbox into data/votes, one file a person, tracked with DVC; returns how many.

    Killed and run again, it ends at the same place. Votes on forgotten conversations are left out. Lines that are no
    votes are kept in TORN. Raises UserError if a pipeline runs, or a file in data/votes is damaged.
    """
    if not LIVE.is_file() and not CLOSED.is_file():
        return 0
    count = 0
    with pipeline_stands_still() as repo:
        for _ in range(2):  # what an earlier run left, then what came since
            by_file: dict[Path, list[Vote]] = {}
            votes, damaged = scan_votes(CLOSED)
            for vote in votes:
                by_file.setdefault(VOTES / votes_file(vote.by), []).append(vote)
            _set_aside([line for line in damaged.values() if line.strip()])
            count += sum(keep_votes(repo, path, new) for path, new in by_file.items())
            CLOSED.unlink(missing_ok=True)
            rename_log(LIVE, CLOSED)
    return count


def _set_aside(lines: list[bytes]) -> None:
    """Keep damaged lines, each once, and say so."""
    known = {line for _, line in read_lines(TORN)} if TORN.is_file() else set()
    for line in lines:
        if line not in known:
            append_line(TORN, line + b"\n")
    if lines:
        print(f"{count_of(len(lines), 'line')} of {LIVE} set aside in {TORN}: no votes")


def keep_votes(repo: "Repo", path: Path, votes: Iterable[Vote], form: type[Vote] = Vote) -> int:
    """Add to a file, tracked with DVC, the votes that it lacks, without those on forgotten conversations; how many."""
    tombstones, known = Tombstones(FORGOTTEN), read_votes(path, form)
    ids = {vote.id for vote in known}
    new = [vote for vote in votes if vote.id not in ids and not tombstones.names(vote.conversation_id)]
    if new:
        with replacing(path) as file:
            file.write(vote_lines([*known, *new]))
    if known or new:
        add_to_dvc(repo, path)  # also what a killed run wrote
    return len(new)
