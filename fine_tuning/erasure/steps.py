"""The steps of `forget`, their journal, and the proof. Each step may be repeated; a kill between two costs nothing."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fine_tuning.common import dvc_files
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.names import host_key
from fine_tuning.common.project import CONVERSATIONS, FORGOTTEN, LOG, MANIFEST, VOTES, sha256_file
from fine_tuning.common.records import read_json, read_object, updating, write_json
from fine_tuning.common.results import keep_made_of, remove
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.cleaning.shard_cleaner import KEPT as MERGED
from fine_tuning.data_collection.cleaning.shard_cleaner import PIECES
from fine_tuning.data_collection.cleaning.shard_merger import KEPT
from fine_tuning.data_collection.storage.shards import track
from fine_tuning.data_collection.storage.tombstones import Tombstones, key_name
from fine_tuning.data_preparation.catalogue import FACTS, lines_of
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.data_preparation.encoded_memo import ENCODED, keep_rows_of
from fine_tuning.data_preparation.split_writer import WRITTEN
from fine_tuning.data_preparation.splits import Ledger
from fine_tuning.erasure.models import ForgottenModels
from fine_tuning.erasure.object_stores import Searched, Unreachable, git_objects_with, in_use, kind_of, search, stores
from fine_tuning.erasure.records import Found, clear_lines, clear_log, clear_shards, clear_votes
from fine_tuning.erasure.traces import Traces
from fine_tuning.integration.ollama_client import open_servers
from fine_tuning.model_management import champion
from fine_tuning.model_management.model_deployer import LIVE, DeploySettings
from fine_tuning.model_management.model_registry import open_registry, registry_locks
from fine_tuning.model_management.model_switcher import deployments

LEDGER = Path("data/splits.txt")
OLD_LEDGER = Path("data/splits/ledger.jsonl")  # where it was before it came into git, until `prepare` takes it over
SCRATCH = Path(".whetstone")
LOCK = SCRATCH / "forget.lock"  # one run at a time
JOURNALS = "forget*.json"  # in SCRATCH: one for each erasure that is not finished
TEMPORARY = ("promote-????????", "clean-????????", "rebuild-????????")  # folders that a killed command leaves behind
# What the app keeps by conversation id.
BY_CONVERSATION = tuple(SCRATCH / name for name in ("titles.json", "tags.json", "chat_settings.json", "questions.json"))
MEMO = SCRATCH / "memo"
INDEX = MEMO / "intake"  # of the shards, by hashes of ids
ENCODED_ROWS = MEMO / "prepare" / ENCODED
DROPPED = ("memo/review", "memo/judge", "checkpoints", "references", "start")  # made again when they are needed
WRITTEN_BY_MODELS = ("data/evaluation/", "metrics/", ".whetstone/memo/evaluate/")
LEFT_OUT = {".git", ".venv", "__pycache__", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
AGAIN = "`python -m fine_tuning forget --resume`"


@dataclass
class Work:
    """What the steps share; all of it but `say` and caches is in the journal."""

    found: Found
    learned: dict[str, list]
    options: dict[str, Any]
    done: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print
    known: dict[str, str] = field(default_factory=dict)  # what was searched for these traces: see `search`
    unread: set[str] = field(default_factory=set)
    journal: Path = field(default_factory=lambda: SCRATCH / f"forget-{uuid.uuid4().hex[:8]}.json")

    @cached_property
    def strict(self) -> Traces:
        """What only a person can have written, and ids."""
        return self.found.people | self.found.names

    @cached_property
    def everything(self) -> Traces:
        return self.strict | self.found.models

    @cached_property
    def models(self) -> ForgottenModels:
        return ForgottenModels(open_registry(read_params("deploy", DeploySettings).name), registry_locks())

    def files_holding(self) -> list[Path]:
        """Files below the checkout, and those that killed commands left in the system's temporary folder, that hold
        some of it. Where models write, their words prove nothing."""
        everything, people = self.everything, self.strict
        kept = () if self.options["pipeline"] else ("models/champion/evaluation/",)
        found = []
        for path in [*files_of_checkout(), *temporary_files()]:
            with suppress(FileNotFoundError):
                kind = kind_of(path, everything, people, self.known)
                if kind == "unread":
                    self.unread.add(str(path))
                elif kind == "strict" or (kind and not path.as_posix().startswith(WRITTEN_BY_MODELS + kept)):
                    found.append(path)
        return found

    def holds(self, path: Path, name: str) -> bool:
        """Whether a file holds some of it; `name` is what the proof calls it if it cannot be read."""
        kind = kind_of(path, self.everything, self.strict, self.known)
        if kind == "unread":
            self.unread.add(name)
        return kind in ("holding", "strict")

    def to_go(self, searched: Searched, used: set[str]) -> set[str]:
        """The objects of a store that hold it, were made from what held it or learned from it, and are not in use.

        Words of a model alone count if the pipeline has read them. What is kept for a version goes if it holds what
        people wrote or an id, and its records of an evaluation also for a model's words.
        """
        holding = searched.holding if self.options["pipeline"] else searched.strict
        names = champion.names_conversations
        kept = {oid for _, oid, path in self.files_of_versions() if not (names(path) and oid in holding)}
        found = (holding | {*self.learned["made"], *self.learned["objects"]}) & searched.objects
        return found - used - (kept - searched.strict)

    def files_of_versions(self) -> Iterator[tuple[str, str, str]]:
        """(tag of a version, object, path) of what deploying it, or making it champion again, needs."""
        for version in self.models.registry.versions():
            yield version.tag, version.tags.get("gguf_md5", ""), "package/model.gguf"
            if folder := version.tags.get(champion.FILES_TAG):
                yield version.tag, folder, "its list of files"
                files = dvc_files.listing(Path.cwd(), folder) or {}
                yield from ((version.tag, oid, path) for path, oid in files.items())

    def save(self) -> None:
        """Write the journal: ids and keyed fingerprints, no text."""
        found = self.found
        kept = {"ids": sorted(found.ids), "messages": sorted(found.messages), "by": found.by, "texts": found.texts}
        traces = {kind: getattr(found, kind).known for kind in ("people", "models", "names")}
        own = {"learned": self.learned, "options": self.options, "done": self.done}
        write_json(self.journal, {"key": key_name(found.people.key)} | kept | traces | own)
        os.chmod(self.journal, 0o600)

    @classmethod
    def load(cls, journal: Path, say: Callable[[str], None]) -> "Work":
        """The work of a journal. Raises UserError if it is of an earlier version of this project, or its key is
        gone."""
        kept, keys = read_json(journal), Tombstones(FORGOTTEN).keys
        if kept.get("key") not in keys:
            raise UserError(
                f"{journal} cannot be continued: its key is not in {CONVERSATIONS}: `dvc checkout {CONVERSATIONS}`, "
                "or remove the journal and forget again"
            )
        people, models, names = (Traces(kept[kind], keys[kept["key"]]) for kind in ("people", "models", "names"))
        found = Found(set(kept["ids"]), set(kept["messages"]), [], kept["by"], people, models, names, kept["texts"])
        return cls(found, kept["learned"], kept["options"], kept["done"], say, journal=journal)

    def ask(self, withdraw: bool, hosts: list[str] | None) -> None:
        """What `--resume` asks for besides what was asked for before."""
        asked = {key: value for key, value in (("withdraw", withdraw), ("hosts", hosts)) if value}
        if any(self.options[key] != value for key, value in asked.items()):
            self.options |= asked
            self.done.clear()  # each step may be repeated


def journals() -> list[Path]:
    """Of erasures that are not finished, the oldest first."""
    return sorted(SCRATCH.glob(JOURNALS), key=lambda path: path.stat().st_mtime)


def is_leftover(path: Path) -> bool:
    """Whether a file was left by a command that was killed, or is made again when it is needed."""
    return (
        (path.name.startswith(".") and path.name.endswith(".tmp"))
        or path.is_relative_to(champion.STAGED)
        or path.is_absolute()
        or path.parts[0] == ".whetstone"
        or path.parts[:2] == (".dvc", "tmp")
    )


def temporary_files() -> Iterator[Path]:
    """Files in folders that our commands make in the system's temporary folder and a killed one leaves there."""
    place = Path(tempfile.gettempdir())
    for folder in (folder for pattern in TEMPORARY for folder in place.glob(pattern)):
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink():
                yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def files_of_checkout() -> Iterator[Path]:
    """Everything below the checkout but git's and DVC's objects, environments, caches of tools and journals."""
    cache = dvc_files.cache_folder(Path.cwd())
    for place, folders, names in os.walk("."):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if name not in LEFT_OUT and (here / name).resolve() != cache and not (here / name / "pyvenv.cfg").exists()
        )
        files = (here / name for name in sorted(names))
        yield from (path for path in files if path.is_file() and not (here == SCRATCH and path.match(JOURNALS)))


def vote_files() -> list[Path]:
    return sorted(VOTES.glob("*.jsonl"))


def logs() -> list[Path]:
    """The live log, closed logs, and the lines that were set aside from them."""
    return sorted(path for path in LOG.parent.rglob("*.jsonl*") if path.is_file())


# --------------------------------------------------------------------------------------------------------------- steps


def clear_logs(work: Work) -> None:
    """Live log, closed logs, lines set aside, titles, settings."""
    count = sum(clear_log(log, work.found) for log in logs())
    for path in filter(Path.is_file, BY_CONVERSATION):
        with updating(path) as kept:
            for key in (*work.found.ids, f"default of {work.found.by}"):
                kept.pop(key, None)
    work.say(f"logs: {count_of(count, 'event')} taken out")


def clear_data(work: Work) -> None:
    """Shards, manifest, votes and ledger, while no pipeline runs."""
    with dvc_files.pipeline_stands_still() as repo:
        shards = clear_shards(CONVERSATIONS, MANIFEST, work.found)
        if CONVERSATIONS.is_dir():
            track(repo, CONVERSATIONS, MANIFEST)
        for path in vote_files():
            if clear_votes(path, work.found) and path.is_file():
                dvc_files.add_to_dvc(repo, path)
        clear_lines(OLD_LEDGER, work.found)
        Ledger(LEDGER, read_params("prepare", PrepareSettings).salt).forget(work.found.ids)
    work.say(f"shards: {shards} rewritten without it")


def clear_scratch(work: Work) -> None:
    """Memoised results, checkpoints, copies of temporary experiments, leftovers of killed commands."""
    shutil.rmtree(INDEX, ignore_errors=True)
    if work.options["pipeline"]:
        clear_memos()
        for name in DROPPED:
            shutil.rmtree(SCRATCH / name, ignore_errors=True)
    own = [path for path in work.files_holding() if is_leftover(path)]
    if work.options["pipeline"]:
        own = [path for path in own if not path.is_relative_to(ENCODED_ROWS)]  # see `clear_encoded`
    for path in own:
        path.unlink(missing_ok=True)
    work.say(
        f"memoised results of its shards and checkpoints: removed, {count_of(len(own), 'other file')} with its text"
    )


def clear_memos() -> set[str]:
    """Remove what the data stages memoised, but what they made of nothing else than the shards as they are now; returns
    the hashes of the clean files that it was made of. Encoded rows stay: see `clear_encoded`."""
    clean, prepare = MEMO / "clean", MEMO / "prepare"
    for folder, kept in ((clean, (PIECES, MERGED)), (prepare, (FACTS, WRITTEN, ENCODED))):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in kept:
                remove(path)
    pieces = keep_made_of(clean / PIECES, {sha256_file(shard) for shard in CONVERSATIONS.glob("*.jsonl")})
    merged = keep_made_of(clean / MERGED, {path.name for path in pieces})
    files = {sha256_file(path / KEPT) for path in merged}
    for folder in (MEMO / "export", prepare / FACTS, prepare / WRITTEN):
        keep_made_of(folder, files)
    return files


def clear_encoded() -> None:
    """Remove encoded rows of other lines than those of clean files that were made of the shards as they are now. After
    `dvc repro`, which takes the others of a rewritten shard from there."""
    facts = keep_made_of(MEMO / "prepare" / FACTS, clear_memos())
    keep_rows_of(ENCODED_ROWS, lines_of(facts))


def mark_models(work: Work) -> None:
    """Tag the versions that learned from it; on request take them out of Ollama, aliases and registry."""
    day = datetime.now(UTC).date().isoformat()
    known = {version.number: version for version in work.models.registry.versions()}
    versions = [known[number] for number in work.learned["versions"] if number in known]
    for version in versions:
        work.models.mark(version.number, len(work.found.ids), day)
    if not work.options["withdraw"]:
        if versions:
            work.say(f"models that learned from it: {', '.join(v.tag for v in versions)} marked, still in use")
        return
    deployed = {host for version in versions for host, _ in deployments(version)}
    work.learned["deployed"] = sorted(deployed | set(work.learned.get("deployed", ())))
    work.save()  # before the registry forgets it
    _leave_servers(work, [f"{work.models.registry.name}:{number}" for number in work.learned["versions"]])
    named, learned = read_object(champion.RECORD), work.learned
    if named.get("version") in learned["versions"] or named.get("adapter_sha256") in learned["adapters"]:
        write_json(champion.RECORD, {"version": None})
        shutil.rmtree(champion.FOLDER, ignore_errors=True)
        champion.FOLDER.with_suffix(".dvc").unlink(missing_ok=True)
        work.options["pipeline"] = True  # evaluate and compare read who is champion
    for version in versions:
        work.models.withdraw(version.number)
    work.say(f"models that learned from it: {', '.join(v.tag for v in versions) or 'none registered'} withdrawn")


def _leave_servers(work: Work, tags: list[str]) -> None:
    """Remove tags from Ollama. A server that does not answer is named at the end, if the user named it or something
    was deployed there: it is asked again when the run continues."""
    settings = read_params("deploy", DeploySettings)
    live = f"{settings.name}:{LIVE}"
    work.options["servers"] = []
    with open_servers(settings, work.options["hosts"]) as servers:
        for server in servers if tags else ():
            try:
                digests = server.digests()
                gone = {digests[tag] for tag in tags if tag in digests}
                for tag in [tag for tag in (live, *tags) if digests.get(tag) in gone]:
                    server.delete(tag)
                    work.say(f"{server.host}: {tag} removed")
            except UserError:
                if work.options["hosts"] or host_key(server.host) in work.learned["deployed"]:
                    work.options["servers"].append(server.host)


def clear_champion(work: Work) -> None:
    """The evaluation that the champion keeps beside its weights, if it holds some of it, and its list of ids."""
    before = dvc_files.md5_path(champion.FOLDER)
    members, evaluation = champion.FOLDER / champion.MEMBERS, champion.FOLDER / champion.KEPT
    cleared = clear_lines(members, work.found)
    traces = work.everything if work.options["pipeline"] else work.strict
    holding = [path for path in dvc_files.files_below(evaluation) if kind_of(path, traces, traces) == "strict"]
    if holding:
        shutil.rmtree(evaluation)
    if cleared or holding:
        dvc_files.dvc_add(champion.FOLDER)
        now = {champion.FILES_TAG: str(dvc_files.md5_path(champion.FOLDER))}
        for version in work.models.registry.versions():
            if version.tags.get(champion.FILES_TAG) == before:
                work.models.registry.set_tags(version.number, now)
        work.say("the champion's files: " + ("its evaluation removed" if holding else "its list of ids rewritten"))


def run_pipeline(work: Work) -> None:
    """`dvc repro`, if the pipeline has read it. If it fails, what it would have replaced is removed."""
    if not work.options["pipeline"]:
        work.say("pipeline: not run, it has never read it")
        return
    if Path("dvc.lock").is_file():
        work.options["reproduced"] = dvc_files.reproduce()
    clear_encoded()
    if not work.options.get("reproduced", True):
        for file in work.files_holding():
            if file.parts[0] in ("data", "metrics", "models"):
                file.unlink()


def clear_objects(work: Work) -> None:
    """Objects of DVC's cache and remotes that hold it, and unused weights that learned from it. Not `dvc gc`: that
    would throw away the data and models of every other commit as well."""
    used = in_use(Path.cwd()) if work.options.get("reproduced", True) else set()
    removed: set[str] = set()
    with stores(Path.cwd()) as (reachable, _):
        for store in reachable:
            gone = work.to_go(search(store, work.everything, work.strict, work.known), used)
            work.say(f"{store.name}: {count_of(store.remove(gone), 'object')} removed")
            removed |= gone
    lost = [f"{tag} without {path}" for tag, oid, path in work.files_of_versions() if oid in removed]
    if lost:
        work.say(f"from now on models are promoted again as: {', '.join(lost)}")
    for entry in (dvc_files.cache_folder(Path.cwd()) / "runs").glob("*/*/*"):
        if any(oid in entry.read_text() for oid in removed | set(work.learned["objects"])):
            entry.unlink()


def clear_runs(work: Work) -> None:
    """MLflow: artifacts that hold it, ids in lists, runs of unregistered models that learned, then its own gc."""
    work.models.hide(work.found.names, Tombstones(FORGOTTEN).stand_in)
    artifacts, _ = work.models.artifacts_holding(work.holds, remove=True)
    runs = work.models.runs(set(work.learned["adapters"]))
    work.models.remove_runs(runs)
    work.say(f"MLflow: {count_of(len(artifacts), 'artifact')} and {count_of(len(runs), 'run')} removed")


STEPS: tuple[tuple[str, Callable[[Work], None]], ...] = (
    ("logs", clear_logs),
    ("data", clear_data),
    ("scratch", clear_scratch),
    ("models", mark_models),
    ("champion", clear_champion),
    ("reproduce", run_pipeline),
    ("objects", clear_objects),
    ("runs", clear_runs),
)


def run_steps(work: Work) -> None:
    """Do what the journal does not call done."""
    for name, step in STEPS:
        if name not in work.done:
            step(work)
            work.done.append(name)
            work.save()


# --------------------------------------------------------------------------------------------------------------- proof


def finish(work: Work) -> int:
    """The proof, what cannot be reached, and what to type next; the journal goes when there is nothing left to do."""
    work.unread.clear()
    there = search_everywhere(work)
    left, unreachable = still_there(work, there), there.unreachable
    lacking, short = work.found.not_searched()
    work.say(f"proof: searched {', '.join(there.read)}")
    for place in left:
        work.say(f"  STILL THERE: {place}")
    failed = not work.options.get("reproduced", True)
    if failed:
        work.say(f"  the pipeline failed, and until it has run `dvc push` does, too: fix what it reports, then {AGAIN}")
    counts = (
        (lacking, "message", "that others say as well (its id and what was made from it were)"),
        (short, "short message", "within other texts (whole values of records were)"),
    )
    not_searched = [f"{count_of(count, noun)} {why}" for count, noun, why in counts if count]
    not_searched += [f"{place}: it cannot be read" for place in sorted(work.unread)]
    for line in not_searched:
        work.say(f"  could not be searched for: {line}")
    if not left:
        work.say(f"  nothing {'that can be searched for' if not_searched else 'of it'} is left there")
    work.say("cannot be reached from here:")
    for line in out_of_reach(work, unreachable):
        work.say(f"  {line}")
    servers = work.options.get("servers", []) if work.options["withdraw"] else []
    if left or failed or servers or any(not remote.read_only for remote in unreachable):
        work.done.clear()  # each step may be repeated
        work.save()
        start = f"start Ollama at {', '.join(servers)}, where models that learned from it may be"
        work.say(f"not done yet: {start if servers else 'fix the above'}, then {AGAIN}")
        return 1
    work.journal.unlink(missing_ok=True)
    work.say("next: git add -A data models metrics dvc.lock && git commit -m 'Forget', then dvc push && git push")
    return 0


@dataclass
class Everywhere:
    """Where a search of everything that can be reached found some of it, and what was read."""

    files: list[Path]
    stores: dict[str, Searched]
    unreachable: list[Unreachable]
    git: list[str]
    artifacts: list[str]
    read: tuple[str, ...]


def search_everywhere(work: Work) -> Everywhere:
    """Look into the checkout's files, DVC's cache and remotes, git's objects and MLflow's artifacts."""
    with stores(Path.cwd()) as (reachable, unreachable):
        searched = {store.name: search(store, work.everything, work.strict, work.known) for store in reachable}
    git, objects = git_objects_with(Path.cwd(), work.everything)
    artifacts, count = work.models.artifacts_holding(work.holds)
    read = (
        count_of(sum(1 for _ in files_of_checkout()), "file"),
        *(f"{count_of(len(result.objects), 'object')} of {name}" for name, result in searched.items()),
        f"{count_of(objects, 'object')} of git",
        f"{count_of(count, 'artifact')} of MLflow",
    )
    return Everywhere(work.files_holding(), searched, unreachable, git, artifacts, read)


def still_there(work: Work, there: Everywhere) -> list[str]:
    left, used = [str(path) for path in there.files], in_use(Path.cwd())
    for name, result in there.stores.items():
        left += [f"{name}: {oid}" for oid in sorted(work.to_go(result, used) | result.strict)]
        work.unread |= {f"{name}: {oid}" for oid in result.unread}
    return left + [f"git: {name}" for name in there.git] + [f"MLflow: {name}" for name in there.artifacts]


def out_of_reach(work: Work, unreachable: list[Unreachable]) -> Iterator[str]:
    """What this command cannot reach, one line each."""
    for remote in unreachable:
        yield f"remote {remote.name}: {remote.why}"
    for version in work.models.registry.versions():
        if version.number in work.learned["versions"]:
            yield f"model {version.tag}, which learned from it and is marked: --withdraw takes it out of use"
    if work.models.registry.uri.startswith(("http://", "https://")):
        yield "deleted runs in the MLflow server: its owner runs `mlflow gc`"
    yield "other clones: there `git pull`, then `python -m fine_tuning forget --again`, then `dvc pull`"
    yield "backups, snapshots and old versions in buckets that keep versions"
    yield "files that people exported or copied elsewhere, models on servers that are not in params.yaml"
