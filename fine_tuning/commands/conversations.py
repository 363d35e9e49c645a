"""Commands that bring conversations in: import, seal, sample; and stats and export."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fine_tuning.common.dvc_files import pipeline_stands_still
from fine_tuning.common.errors import UserError, count_of, no_space
from fine_tuning.common.project import CONVERSATIONS, FOLLOWED, FORGOTTEN, LOG, MANIFEST, VOTES, main_checkout, root
from fine_tuning.common.records import read_object, updating
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.conversation_logger import ConversationLogger, conversation_stats
from fine_tuning.data_collection.data_export import JUDGED, file_of, read_clean, write_formats
from fine_tuning.data_collection.importers import Imported, Problem, files_in, import_file, state_of
from fine_tuning.data_collection.storage import shards
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import track
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.schema.conversation import (
    fold,
    is_by_a_model,
    is_feedback,
    message_ids,
    version_hash,
    with_feedback_of,
)

if TYPE_CHECKING:
    from dvc.repo import Repo


TRACKED = Path("data/conversations.dvc")
CLEAN = Path("data/clean")
INDEX = Path(".whetstone/memo/intake")
SHOWN_PROBLEMS = 10


def import_files(args: argparse.Namespace) -> None:
    """Import every file; conversations that are there already are not taken again.

    New conversations go into one shard; new versions of known ones into another, with the feedback that was known.
    With --follow, files that did not change since the last time are passed over. What they were is remembered when the
    shards are tracked: a run that was killed is done again, and takes nothing twice.
    """
    root()
    files = [file for path in args.files for file in files_in(path)]
    before = read_object(FOLLOWED) if args.follow else {}
    states = {str(file.resolve()): state_of(file) for file in files} if args.follow else {}
    files = [file for file in files if _changed(file, before, states)]
    tombstones = Tombstones(FORGOTTEN)
    with pipeline_stands_still() as repo:
        _seal_closed_logs(repo, tombstones)
        found = _Import(args.model, tombstones)
        written = found.write([(file, _since(file, before, states)) for file in files], revive=not args.follow)
        if written or (any(CONVERSATIONS.glob("*.jsonl")) and not _is_what_dvc_names()):  # killed before it tracked
            track(repo, CONVERSATIONS, MANIFEST)
        reports = found.reports
        if args.follow:
            with updating(FOLLOWED) as followed:
                followed |= states
            reports = [report for report in reports if report.counts["taken"] or report.problems]
            print(f"{count_of(len(files), 'file')} read, {len(states) - len(files)} unchanged since the last time")
        for report in reports:
            report.show()
        for shard, count in written:
            print(f"{count_of(count, 'conversation')} in {shard}")
        if written:
            _say_next(TRACKED)
        elif not args.follow and not any(report.counts["skipped"] + report.counts["forgotten"] for report in reports):
            problems = [(report.path, problem) for report in reports for problem in report.problems]
            raise UserError(_nothing_taken(files or args.files, problems))


class _Import:
    """What of some files is new, and which conversations in them are new versions of known ones. `reports` are for
    when the shards are written: until then nothing is taken."""

    def __init__(self, model: str | None, tombstones: Tombstones) -> None:
        self.model, self.tombstones = model, tombstones
        self.sealed = _index(tombstones)
        self.known: dict[str, str] = {}
        self.reports: list[_Report] = []
        self.changes: list[tuple[Imported, Counter[str]]] = []

    def write(self, files: list[tuple[Path, float]], revive: bool) -> list[tuple[Path, int]]:
        """Write what is new in files, each read from a time on, into shards: (shard, conversations) of each. `revive`:
        whether a conversation that was deleted here comes back."""
        new = (conversation for path, since in files for conversation in self._new(path, since))
        try:
            written = [shards.write_shard(CONVERSATIONS, f"{shards.next_stamp(CONVERSATIONS)}-import", new)]
        except UserError as error:
            if len(files) == 1:
                raise
            raise UserError(f"none of the {len(files)} files was taken: {error}") from None
        if self.changes:
            name = f"{shards.next_stamp(CONVERSATIONS)}-import"
            newer = _new_versions(self.changes, _index(self.tombstones), revive)
            written.append(shards.write_shard(CONVERSATIONS, name, newer))
        return [(shard, count) for shard, count in written if shard is not None]

    def _new(self, path: Path, since: float) -> Iterator[dict]:
        report = _Report(path)
        self.reports.append(report)
        for item in import_file(path, self.model, since):
            if not isinstance(item, Problem) and not all(map(is_feedback, item.conversation["feedback"])):
                item = Problem(item.line, f"{item.format}: `feedback` has a rating, edit or preference of a wrong type")
            if isinstance(item, Problem):
                report.problems.append(item)
                continue
            report.note(item)
            identity, version = item.conversation["id"], version_hash(item.conversation)
            if self.tombstones.cover(item.conversation):
                report.counts["forgotten"] += 1
            elif (known := self._known(identity)) == version:
                report.counts["skipped"] += 1
            elif known is not None:
                self.changes.append((item, report.counts))
            else:
                self.known[identity] = version
                report.counts["taken"] += 1
                yield item.conversation

    def _known(self, identity: str) -> str | None:
        """What tells the newest version of a conversation from others, None if there is none."""
        if identity not in self.known:
            self.known |= {name: version_hash(newest) for name, newest in self.sealed.newest({identity}).items()}
        return self.known.get(identity)


def _since(file: Path, before: dict[str, dict], states: dict[str, dict]) -> float:
    """From when on a database is read; all of it where an older copy is at its place."""
    since, now = (each.get(str(file.resolve()), {}).get("since", 0.0) for each in (before, states))
    return since if since <= now else 0.0


def _changed(file: Path, before: dict[str, dict], states: dict[str, dict]) -> bool:
    """Whether a file is to be read: it is not followed, a database, or another one than it was."""
    state = states.get(str(file.resolve()), {})
    return "modified" not in state or state != before.get(str(file.resolve()))


class _Report:
    def __init__(self, path: Path) -> None:
        self.path, self.problems = path, []
        self.counts, self.formats, self.left_out = Counter(), Counter(), Counter()

    def note(self, item: Imported) -> None:
        self.formats[item.format] += 1
        self.left_out.update(item.left_out)
        self.counts["a person's"] += sum(
            message["role"] == "assistant" and not is_by_a_model(item.conversation, index)
            for index, message in enumerate(item.conversation["messages"])
        )

    def show(self) -> None:
        counts = self.counts
        recognised = ", ".join(f"{name} ({count})" for name, count in self.formats.most_common()) or "nothing"
        print(f"{self.path}: recognised {recognised}")
        print(
            f"  {counts['taken']} taken, {counts['skipped']} skipped (there already), {len(self.problems)} quarantined"
            + (f", {counts['forgotten']} left out (forgotten: {FORGOTTEN})" if counts["forgotten"] else "")
        )
        for reason, count in self.left_out.most_common():
            print(f"  {count_of(count, 'time')} {reason}")
        if count := counts["a person's"]:
            replies = "reply names no model and counts" if count == 1 else "replies name no model and count"
            print(f"  {count} {replies} as a person's; if a model wrote them: --model NAME")
        for problem in self.problems[:SHOWN_PROBLEMS]:
            print(f"  line {problem.line}: {problem.reason}")
        if more := self.problems[SHOWN_PROBLEMS:]:
            print(f"  and {len(more)} more:")
            for reason, count in Counter(problem.reason for problem in more).most_common(SHOWN_PROBLEMS):
                print(f"  {count_of(count, 'time')} {reason}")


def _new_versions(changes: list[tuple[Imported, Counter[str]]], sealed: ShardIndex, revive: bool) -> Iterator[dict]:
    """New versions of known conversations, each with the feedback that is known of the same words.

    A judgement brings the chat as it was when somebody judged: it changes the known messages only if it continues
    them. `revive`: whether a conversation that was deleted here comes back.
    """
    names = {item.conversation["id"] for item, _ in changes}
    names |= {f"{item.conversation['id']}-{item.judges}" for item, _ in changes if item.judges}
    newest = sealed.newest(names)
    for item, counts in changes:
        newer, older = item.conversation, newest[item.conversation["id"]]
        if older.get("deleted") and not revive:
            counts["skipped"] += 1
            continue
        if item.judges in set(message_ids(older)) or (item.judges and older.get("deleted")):
            newer = older | {"feedback": newer["feedback"] if older["messages"] else []}
        elif item.judges and older["messages"][-1].get("id") not in set(message_ids(newer)):  # another branch
            newer = newer | {"id": f"{newer['id']}-{item.judges}"}
            older = newest.get(newer["id"], older | {"messages": []})
        merged = with_feedback_of(older, newer)
        if version_hash(merged) == version_hash(older):
            counts["skipped"] += 1
            continue
        newest[merged["id"]] = merged
        counts["taken"] += 1
        yield merged


def _nothing_taken(files: list[Path], problems: list[tuple[Path, Problem]]) -> str:
    """Why files gave no conversation, and what to do."""
    if problems:
        path, first = problems[0]
        return (
            f"nothing was taken, {len(problems)} quarantined (the first is line {first.line} of {path}: "
            f"{first.reason}): correct the file, or export it in one of the formats of "
            "`python -m fine_tuning import --help`"
        )
    named = f"{files[0]} holds" if len(files) == 1 else f"the {len(files)} files hold"
    return f"nothing was taken: {named} no records: check the export, then import it again"


def seal(args: argparse.Namespace) -> None:
    """Close the live log and make a shard of it. Interrupted and run again, it ends in the same conversations."""
    root()
    if written := seal_inbox():
        _say_next(*written)


def seal_inbox() -> list[Path]:
    """What `seal` does, votes included; what of it is for git. Raises UserError if a pipeline is running."""
    tombstones = Tombstones(FORGOTTEN)
    with pipeline_stands_still() as repo:
        close_log(LOG, CONVERSATIONS)
        found = _seal_closed_logs(repo, tombstones)
    votes = 0
    if any(LOG.parent.glob("votes*.jsonl")):
        from fine_tuning.evaluation.review import seal_votes  # imports numpy and transformers

        votes = seal_votes()
    if votes:
        print(f"{count_of(votes, 'vote')} handed over")
    elif not found:
        print(f"nothing to seal: {LOG} is empty")
    return [TRACKED] * found + [VOTES] * (votes > 0)


def bring_sample(args: argparse.Namespace) -> None:
    """Write the sample's shard if params.yaml wants it and it is not there; say so if other shards are missing."""
    root()
    if not read_params("intake", shards.IntakeSettings).sample:
        print("intake.sample is false: the sample is left out")
        return
    if any(CONVERSATIONS.glob("sample-*.jsonl")) and _is_what_dvc_names():
        print(f"{CONVERSATIONS} is complete")
        return
    missing = [
        shard["name"]
        for shard in shards.read_manifest(MANIFEST)["shards"]
        if shard["source"] != "sample" and not (CONVERSATIONS / shard["name"]).exists()
    ]
    if missing:
        raise UserError(
            f"not in this clone: {count_of(len(missing), 'shard')} of conversations (the first is {missing[0]}): "
            f"bring them with `dvc pull {TRACKED}`"
        )
    from fine_tuning.data_collection.storage.sample import write_sample

    with pipeline_stands_still() as repo:
        shard, count = write_sample(CONVERSATIONS)
        track(repo, CONVERSATIONS, MANIFEST)
    print(f"{count_of(count, 'sample conversation')} in {shard}")


def show_stats(args: argparse.Namespace) -> None:
    found = conversation_stats(c for c in _everything(args.all) if c["messages"])
    print(json.dumps(found, ensure_ascii=False, indent=2))
    if not args.all and not found["total_conversations"] and (sealed := _index(Tombstones(FORGOTTEN)).count()):
        print(f"nothing was logged since the last seal; --all counts the {sealed:,} sealed ones", file=sys.stderr)


def _everything(sealed: bool) -> Iterator[dict]:
    """The conversations of the log as they are now, and of shards if `sealed`; those that the log names are in
    memory."""
    events, named = list(ConversationLogger(LOG).read_events()), {}
    ids = {event.get(key) for event in events for key in ("conversation_id", "id", "message_id")}
    for version in _index(Tombstones(FORGOTTEN)).all_newest() if sealed else ():
        if ids.isdisjoint((version["id"], *message_ids(version))):
            yield version
        else:
            named[version["id"]] = version
    fold(events, named)
    yield from named.values()


def export(args: argparse.Namespace) -> None:
    """Write the clean conversations in one format into one file; the stage `export` writes many."""
    root()
    if not CLEAN.is_dir():
        raise UserError(f"{CLEAN} is missing: run `dvc repro clean`")
    name = file_of(args.format)
    output = args.output or CLEAN.parent / name
    try:
        counts = write_formats(read_clean(CLEAN), {args.format: output})[args.format]
    except OSError as error:
        if no_space(error):
            raise
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another --output") from None
    if args.format in JUDGED and not counts["exported"]:
        missing = "prefer or edit replies" if args.format == "dpo" else "rate replies with a thumb"
        raise UserError(f"{output} is empty, as nobody judged a reply in this way: {missing}, then `dvc repro clean`")
    skipped = f", {counts['skipped']:,} skipped, for which {args.format} has no place" if counts["skipped"] else ""
    what = {"dpo": "pair", "kto": "thumb"}.get(args.format, "conversation")
    print(f"{count_of(counts['exported'], what)} in {output}{skipped}")


def _index(tombstones: Tombstones) -> ShardIndex:
    """The index of the shards, which intake keeps too; where it cannot be kept, they are read."""
    found = shards.shard_paths(CONVERSATIONS, MANIFEST)
    try:
        return ShardIndex.read(found, main_checkout() / INDEX, tombstones)
    except OSError:  # another user's checkout, or a disk that is read-only
        return ShardIndex.read(found, None, tombstones)


# -----------------------------------------------------------------------------
# DVC


def _seal_closed_logs(repo: "Repo", tombstones: Tombstones) -> bool:
    """Make a shard of each closed log, track it, and only then remove the log. False if there was none."""
    logs = sorted((LOG.parent / "closed").glob("*.jsonl"))
    for log in logs:
        done = seal_log(log, CONVERSATIONS, MANIFEST, tombstones, main_checkout() / INDEX)
        if any(CONVERSATIONS.glob("*.jsonl")):
            track(repo, CONVERSATIONS, MANIFEST)
        log.unlink()
        changed = count_of(done["conversations"], "conversation")
        known = done["events"] and not any(done[name] for name in ("conversations", "forgotten", "unmatched"))
        before = ": the shards have them already" if known else ""  # an earlier run was interrupted after it wrote them
        print(f"{count_of(done['events'], 'event')} sealed, {changed} new or changed{before}")
        if done["forgotten"]:
            print(f"{count_of(done['forgotten'], 'conversation')} left out: forgotten ({FORGOTTEN})")
        for kind in ("torn", "unmatched"):
            if done[kind]:
                print(f"{count_of(done[kind], f'{kind} line')} set aside in {LOG.parent / log.name}.{kind}")
    return bool(logs)


def _is_what_dvc_names() -> bool:
    """Whether the folder has as many files and bytes as data/conversations.dvc says. `dvc repro` compares hashes."""
    if not TRACKED.exists():
        return False
    out = yaml.safe_load(TRACKED.read_bytes())["outs"][0]
    files = [path for path in CONVERSATIONS.rglob("*") if path.is_file()]
    return len(files) == out.get("nfiles") and sum(path.stat().st_size for path in files) == out.get("size")


def _say_next(*written: Path) -> None:
    print(f"next: `git add {' '.join(map(str, written))}`, then `dvc repro`")
