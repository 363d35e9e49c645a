"""`forget`: a conversation, a session's or a user's, out of everything that can be reached; with a proof at the end.

`find` says where it is and changes nothing; `forget` removes it step by step. What was done is noted in a journal that
holds ids and keyed fingerprints only, so that `resume` takes up what is not finished.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from fine_tuning.common.dvc_files import cached, fetch, listing, read_dvc, show_file
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import CONVERSATIONS, FORGOTTEN, MANIFEST, VOTES, main_checkout, root
from fine_tuning.common.records import copy_file
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import about, expected_seconds
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.erasure import object_stores, records, steps
from fine_tuning.erasure.records import Found, Selection, collect, count_in_log, count_in_shard
from fine_tuning.erasure.traces import streams
from fine_tuning.integration.gateway.recorder import GatewaySettings
from fine_tuning.schema.conversation import time_stamp

REBUILT = "rebuilt by dvc repro"
# Text in these files is public. Not everything that git tracks is: a chat that was committed has to be found.
PUBLIC = ("fine_tuning", "stages", "tests", "benchmarks", "configs", "docs", "README.md", "params.yaml", "dvc.yaml")


def run_command(args: argparse.Namespace) -> int:
    """Find, show, ask, forget, prove. The exit status is 1 if something of it is left or could not be reached."""
    if root().resolve() != main_checkout():
        raise UserError("this is a temporary experiment's folder: run forget in the main checkout")
    try:
        return _run(args)
    except Timeout:
        raise UserError("another run of forget is at work: run it again when that has ended") from None


def _run(args: argparse.Namespace) -> int:
    if args.resume:
        return resume(withdraw=args.withdraw, hosts=args.host)
    tombstones = _tombstones() if args.again else None
    if args.again:
        steps.clear_encoded()  # what was made of shards that are gone from here, so that nothing names it
    deleted = records.deleted_ids(shard_paths(CONVERSATIONS, MANIFEST), steps.logs()) if args.deleted else None
    if args.expired:
        days = read_params("gateway", GatewaySettings).retention_days
        if days is None:
            raise UserError("gateway.retention_days is null: set for how many days to keep conversations")
        before = time_stamp(datetime.now(UTC) - timedelta(days=days))
        deleted = records.expired_ids(shard_paths(CONVERSATIONS, MANIFEST), steps.logs(), before)
        if not deleted:
            print(f"nothing that the gateway recorded is older than {count_of(days, 'day')}")
            return 0
    where = find(Selection(args.conversation, args.session, args.user, tombstones, deleted))
    print("\n".join(describe(where)))
    if not args.yes:
        question = f"Forget {count_of(len(where.found.ids), 'conversation')} in all these places? Type yes: "
        if not sys.stdin.isatty() or input(question).strip().lower() != "yes":
            raise UserError("nothing was changed: run it again with --yes to forget")
    return forget(where, withdraw=args.withdraw, hosts=args.host)


# ---------------------------------------------------------------------------------------------------------------- find


@dataclass
class Locations:
    """What `find` found. It holds the conversations themselves and is never written to a file."""

    found: Found
    tombstones: Tombstones
    places: list[tuple[str, str, str]] = field(default_factory=list)
    """(where something of it is, how much, what `forget` does there)"""
    learned: dict[str, list] = field(default_factory=dict)
    """{"versions": numbers, "adapters": SHA-256, "objects": DVC's names}: the models that learned from it; "made": the
    objects that were made from its shards"""
    searched: dict[str, str] = field(default_factory=dict)
    """What `search` knows: `forget` does not search it again"""
    pipeline: bool = False
    """Whether the pipeline has read it, and has to run again"""

    def say(self, place: str, how_much: str, then: str) -> None:
        self.places.append((place, how_much, then))


def find(selection: Selection) -> Locations:
    """Everywhere that the selected conversations are. Changes nothing; the current folder is the checkout.

    Reads the live and closed logs, shards, everything else below the checkout, DVC's cache and remotes, git's objects
    and MLflow: seconds for a small project, minutes a gigabyte in the cache. Raises UserError if there is no such
    conversation.
    """
    shards, tombstones = shard_paths(CONVERSATIONS, MANIFEST), _tombstones()
    stages = list(object_stores.stage_records(Path.cwd()))
    earlier = [] if selection.tombstones is None else _earlier_shards(stages, shards, tombstones)
    found = _selected(selection, [*shards, *earlier], tombstones)
    where, work = Locations(found, tombstones), steps.Work(found, {}, {"pipeline": False})
    where.pipeline = _say_records(where, shards) or any(count_in_shard(path, found) for path in earlier)
    if not where.pipeline:
        # No shard holds it: the pipeline has read it only if its files name its ids. Words that they have are others'.
        made = [path for path in work.files_holding() if (_group_of(path) or ("",))[-1] == REBUILT]
        where.pipeline = any(found.names.in_file(path) for path in made)
        if not where.pipeline:
            found.leave_out((found.people | found.models).all_in(_words_of(made)))
            work = steps.Work(found, {}, work.options)  # it was searched for other traces
    work.options["pipeline"] = where.pipeline
    there = steps.search_everywhere(work)
    where.pipeline |= _say_files(work, there.files, where)
    listings, tainted, made = _say_objects(work, there, stages, where)
    for name in there.git:
        where.say(f"git: {name}", "its words", "stays: git's history is yours to rewrite (git filter-repo)")
    where.learned = _say_models(work, stages, listings, tainted | made, where) | {"made": sorted(made)}
    if there.artifacts:
        held = count_of(len(there.artifacts), "file")
        where.say("MLflow's artifacts", held, "removed; lists of ids get hashes instead")
    _check_start(where.learned["adapters"])
    where.searched = work.known
    return where


def _earlier_shards(stages: list[dict], shards: list[Path], tombstones: Tombstones) -> list[Path]:
    """Shards of the cache that another clone has written anew: they hold something forgotten, and what else they hold
    is here. Raises UserError if something forgotten is only in those that hold what is nowhere else, as on another
    branch: their objects would go."""
    earlier = object_stores.earlier_shards(Path.cwd(), stages, {shard.name for shard in shards})
    if not earlier:
        return []
    here = records.ids_in(shards)
    held = {path: ids for path in earlier if any(map(tombstones.names, ids := records.ids_in([path])))}
    safe = [path for path, ids in held.items() if all(map(tombstones.names, ids - here))]
    if held and not safe and not any(map(tombstones.names, here)):
        raise UserError(
            "a shard of another branch or commit holds what was forgotten, beside conversations that are not here: "
            "check it out and run `python -m fine_tuning forget --again` there"
        )
    return safe


def _selected(selection: Selection, shards: list[Path], tombstones: Tombstones) -> Found:
    """The selected conversations, searched for by what nobody else and nothing public says."""
    found = collect(selection, shards, [*steps.logs(), *steps.vote_files()], tombstones, tombstones.key)
    if not found.ids and not found.messages and found.by is None:
        waiting = f"; an erasure that is not finished: {steps.AGAIN}" if steps.journals() else ""
        if selection.tombstones is not None:
            raise UserError(f"nothing that is in {FORGOTTEN} is left here{waiting}")
        if selection.deleted is not None:
            raise UserError(f"nothing that was deleted is left here{waiting}")
        raise UserError(
            f"no conversation here has that id: `python -m fine_tuning lineage ID` searches the models too{waiting}"
        )
    found.leave_out((found.people | found.models).all_in(_public_words()))
    return found


def _tombstones() -> Tombstones:
    """The tombstones. A key that another clone made is brought without its shards: those that are here may still hold
    what was forgotten there."""
    with suppress(UserError):
        return Tombstones(FORGOTTEN)
    tracked = CONVERSATIONS.with_suffix(".dvc")
    committed = yaml.safe_load(show_file(Path.cwd(), "HEAD", tracked.as_posix()) or b"") or {}
    # A `dvc repro` that was refused has written the shards that are here into the file, without the key.
    folders = {read_dvc(tracked), *(out["md5"] for out in committed.get("outs", ()))} - {None}
    for folder in filter(lambda folder: fetch([folder]), folders):
        keys = {name: md5 for name, md5 in (listing(Path.cwd(), folder) or {}).items() if name.endswith(".key")}
        fetch(keys.values())
        for name, md5 in keys.items():
            if key := cached(Path.cwd(), md5):
                copy_file(key, CONVERSATIONS / name)
    return Tombstones(FORGOTTEN)


def describe(where: Locations) -> Iterator[str]:
    yield f"{count_of(len(where.found.ids), 'conversation')}, found in {count_of(len(where.places), 'place')}:"
    for place, how_much, then in where.places:
        yield f"  {place}: {how_much} -> {then}"
    if where.pipeline:
        stages = expected_seconds(Path.cwd())
        stages.pop("base", None)
        yield f"  then: `dvc repro`, {', '.join(stages)}, {about(sum(stages.values()))}"
    else:
        yield "  then: no stage has to run, the pipeline has never read it"
    if not where.found.people and not where.found.models:
        yield "  (it says nothing that no other conversation says: only its ids can be searched for)"


def _public_words() -> Iterator[bytes | list[tuple[str | None, str]]]:
    """Public texts: this project's own, and the base model's files."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *PUBLIC], capture_output=True)
    tracked = [Path(name) for name in listed.stdout.decode("utf-8", "replace").split("\0") if name]
    own = [path for path in Path("models/base").glob("*") if path.suffix in (".json", ".jinja")]
    yield from _words_of(own)
    for path in tracked:
        yield from _words_of([path])
        with suppress(OSError):
            if path.suffix in (".py", ".yaml"):
                quoted = re.split(r"""["'\n]|^ *- |: """, path.read_text("utf-8", "replace"), flags=re.MULTILINE)
                yield [("text", text) for text in quoted]


def _words_of(paths: list[Path]) -> Iterator[bytes | list[tuple[str | None, str]]]:
    for path in paths:
        with suppress(OSError):
            for stream in streams(path):
                yield from stream


def _check_start(adapters: list[str]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_bytes()) or {}  # what else it says may be wrong
    start = (params.get("train") or {}).get("start_from")
    if start and any(sha256.startswith(str(start)) for sha256 in adapters):
        raise UserError("train.start_from continues a model that learned from it: set it to null in params.yaml")


def _say_records(where: Locations, shards: list[Path]) -> bool:
    """Name the logs, shards and votes that hold it; whether any of them is data that the pipeline reads."""
    holding = [(path, count_in_log(path, where.found), "event", "taken out") for path in steps.logs()]
    data = [(path, count_in_shard(path, where.found), "line", "rewritten without it") for path in shards]
    data += [(path, count_in_log(path, where.found), "vote", "taken out") for path in steps.vote_files()]
    for path, count, noun, then in holding + data:
        if count:
            where.say(str(path), count_of(count, noun), then)
    return any(count for _, count, _, _ in data)


def _say_files(work: steps.Work, files: list[Path], where: Locations) -> bool:
    """Name the files that hold it; whether the pipeline wrote some of them, not for a model's words alone."""
    groups = Counter(filter(None, map(_group_of, files)))
    for (place, then), count in groups.items():
        where.say(place, count_of(count, "file"), then)
    rebuilt = (path for path in files if (_group_of(path) or ("", ""))[1] == REBUILT)
    return any(work.strict.in_file(path) for path in rebuilt)


def _say_models(
    work: steps.Work, records: list[dict], listings: dict[str, dict[str, str]], tainted: set[str], where: Locations
) -> dict[str, list]:
    """Name the models that learned from it: {"versions", "adapters", "objects"} of `Locations.learned`."""
    models = work.models
    adapters = object_stores.adapters_here(Path.cwd(), listings)
    ids = where.found.ids.union(*map(where.tombstones.stand_ins, where.found.ids))  # forgotten before, and still in use
    hashes = {version.tags.get("adapter_sha256", "") for version in models.versions(ids, set())}
    objects, hashes = object_stores.learned_models(records, listings, tainted, adapters, hashes)
    if objects:
        where.say("DVC", f"{count_of(len(objects), 'object')} of models that learned", "removed but for what is in use")
    versions = models.versions(ids, hashes)
    hashes = models.continued(hashes | {version.tags.get("adapter_sha256", "") for version in versions} - {""})
    versions = models.versions(ids, hashes)
    for version in versions:
        names = f" ({', '.join(version.aliases)})" if version.aliases else ""
        where.say(f"model {version.tag}{names}", "learned from it", "marked; --withdraw takes it out of use")
    if runs := models.runs(hashes):
        what = f"{count_of(len(runs), 'run')} of unregistered models that learned"
        where.say("MLflow", what, "removed, then mlflow gc")
    numbers = [version.number for version in versions]
    return {"versions": numbers, "adapters": sorted(hashes), "objects": sorted(objects)}


def _group_of(path: Path) -> tuple[str, str] | None:
    """(place, what happens there) of a file that holds some of it; None for those that are listed one by one."""
    parts = path.parts
    if steps.is_leftover(path):
        return parts[0] if parts[0].startswith(".") else str(path.parent), "removed"
    if (
        parts[0] == "inbox"
        or path.is_relative_to(CONVERSATIONS)
        or path.is_relative_to(VOTES)
        or parts[0] in ("mlflow.db", "mlartifacts")
    ):
        return None
    if parts[0] in ("data", "metrics", "models"):
        return "/".join(parts[:2]), REBUILT
    return str(path), "stays: it is not the project's; remove it yourself"


def _say_objects(
    work: steps.Work, there: steps.Everywhere, records: list[dict], where: Locations
) -> tuple[dict[str, dict[str, str]], set[str], set[str]]:
    """(listings of folders, objects that hold it, objects that were made from shards that held it)."""
    listings = {oid: files for searched in there.stores.values() for oid, files in searched.listings.items()}
    folders = object_stores.folders_of_shards(records)
    shards = {oid for folder in folders for oid in listings.get(folder or "", {}).values()}
    holding = {oid for oid in shards if (path := cached(Path.cwd(), oid)) and count_in_shard(path, work.found)}
    strict = {oid for searched in there.stores.values() for oid in searched.strict}
    made = object_stores.made_from(records, listings, shards & strict | holding)
    for name, searched in there.stores.items():
        if tainted := searched.holding | (made & searched.objects):
            place = "DVC's cache" if name == object_stores.CACHE else f"remote {name}"
            where.say(place, f"{len(tainted)} of {count_of(len(searched.objects), 'object')}", "removed")
    for remote in there.unreachable:
        where.say(f"remote {remote.name}", "could not be searched", remote.why)
    return listings, {oid for searched in there.stores.values() for oid in searched.holding}, made


# -------------------------------------------------------------------------------------------------------------- forget


def forget(
    where: Locations, *, withdraw: bool = False, hosts: list[str] | None = None, say: Callable[[str], None] = print
) -> int:
    """Remove what `find` found, everywhere; the current folder is the checkout.

    Args:
        withdraw: take the models that learned from it out of aliases, registry and Ollama; otherwise they are marked.
        hosts: Ollama servers instead of those in params.yaml.
        say: gets one line for each step and for each part of the proof.

    Returns:
        0 if the proof found nothing and everything could be reached, else 1: `resume` continues.

    Raises:
        UserError: a step could not be done; `resume` continues.
    """
    with FileLock(steps.LOCK, timeout=0):
        upgraded = where.tombstones.add(where.found.versions)  # first of all: from here on nothing brings it back
        if upgraded:
            lines = count_of(upgraded, "line")
            say(f"{FORGOTTEN}: {lines} of an earlier version now keyed; git's history keeps the unkeyed ones")
        options = {"withdraw": withdraw, "hosts": hosts, "pipeline": where.pipeline}
        work = steps.Work(where.found, where.learned, options, say=say, known=where.searched)
        work.save()
        where.found.versions.clear()
        steps.run_steps(work)
        return steps.finish(work)


def resume(*, withdraw: bool = False, hosts: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Continue every erasure that did not finish; as `forget`, also for what was begun without `withdraw` or `hosts`.
    One that cannot continue does not stop the others. Raises UserError if there is none."""
    if not steps.journals():
        raise UserError("no run of forget was interrupted: `python -m fine_tuning forget ID`")
    status = 0
    with FileLock(steps.LOCK, timeout=0):
        for journal in steps.journals():
            try:
                work = steps.Work.load(journal, say)
                work.ask(withdraw, hosts)
                steps.run_steps(work)
                status |= steps.finish(work)
            except UserError as error:
                say(f"not done yet: {error}")
                status = 1
    return status
