"""`forget`: a conversation, a session's or a user's, out of everything that can be reached; with a proof at the end.

`find` says where it is and changes nothing; `forget` removes it step by step. What was done is noted in a journal that
holds ids and one-way fingerprints only, so that `resume` takes up an interrupted run where it stopped.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.errors import UserError
from fine_tuning.records import read_json, write_json

if TYPE_CHECKING:
    from fine_tuning.data_collection.erasure import Found, Selection
    from fine_tuning.data_collection.traces import Traces
    from fine_tuning.model_management.forgotten_models import ForgottenModels

INBOX = Path("inbox")
LOG = Path("inbox/conversations.jsonl")
CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
FORGOTTEN = Path("data/forgotten.jsonl")
LEDGER = Path("data/splits/ledger.jsonl")
SCRATCH = Path(".whetstone")
JOURNAL = SCRATCH / "forget.json"
TITLES = SCRATCH / "titles.json"
DROPPED = ("memo/clean", "checkpoints", "start")  # of SCRATCH: made anew when they are needed
CHAMPION_JSON = Path("models/champion.json")
CHAMPION_FILES = Path("models/champion")
PUBLIC = ("data/", "metrics/", "models/", "inbox/")  # what git tracks elsewhere is code and texts about it
WRITTEN_BY_MODELS = ("data/evaluation/", "metrics/", ".whetstone/memo/evaluate/")
LEFT_OUT = {".git", ".venv", "__pycache__", ".hypothesis", ".ruff_cache", ".pytest_cache"}
AGAIN = "`python -m fine_tuning forget --resume`"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Add forget to the command line."""
    command = subparsers.add_parser(
        "forget",
        help="take a conversation, or all of a session or a user, out of everything that can be reached",
        description="Says first where it is. Without --yes it asks; where nobody can answer, nothing is changed.",
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("conversation", nargs="?", help="a conversation's id")
    which.add_argument("--session", metavar="S", help="all conversations of a session")
    which.add_argument("--user", metavar="U", help="all conversations of a user (metadata.user_id or metadata.user)")
    which.add_argument("--again", action="store_true", help="what another clone forgot, or what came back")
    which.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.add_argument(
        "--withdraw", action="store_true", help="take models that learned from it out of aliases, registry and Ollama"
    )
    command.add_argument("--host", action="append", help="an Ollama other than deploy.host; may be repeated")
    command.set_defaults(func=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Find, show, ask, forget, prove. The exit status is 1 if something of it is left or could not be reached."""
    from fine_tuning.data_collection.erasure import Selection
    from fine_tuning.data_collection.tombstones import Tombstones
    from fine_tuning.project import root

    root()
    if args.resume:
        return resume()
    tombstones = Tombstones(FORGOTTEN) if args.again else None
    where = find(Selection(args.conversation, args.session, args.user, tombstones))
    print("\n".join(describe(where)))
    if not args.yes:
        question = f"Forget {_count(len(where.found.ids), 'conversation')} in all these places? Type yes: "
        if not sys.stdin.isatty() or input(question).strip().lower() != "yes":
            raise UserError("nothing was changed: run it again with --yes to forget")
    return forget(where, withdraw=args.withdraw, hosts=args.host)


# ---------------------------------------------------------------------------------------------------------------- find


@dataclass(frozen=True)
class Place:
    """Where something of it is, how much, and what `forget` does there."""

    where: str
    how_much: str
    then: str


@dataclass
class Whereabouts:
    """What `find` found. It holds the conversations themselves and is never written to a file."""

    found: "Found"
    places: list[Place] = field(default_factory=list)
    learned: dict[str, list] = field(default_factory=dict)
    """{"versions": numbers, "adapters": SHA-256, "objects": DVC's names}: the models that learned from it"""


def find(selection: "Selection") -> Whereabouts:
    """Everywhere that the selected conversations are. Changes nothing; the current folder is the checkout.

    Reads the live and closed logs, shards, everything else below the checkout, DVC's cache and remotes, git's objects
    and MLflow: seconds for a small project, minutes a gigabyte in the cache.

    Raises:
        UserError: no such conversation, or a run was interrupted and has to be resumed first.
    """
    from fine_tuning.commands import object_stores
    from fine_tuning.data_collection.erasure import collect, count_in_log, count_in_shard
    from fine_tuning.data_collection.shards import shard_paths

    if JOURNAL.exists():
        raise UserError(f"a run of forget was interrupted: {AGAIN} first")
    shards = shard_paths(CONVERSATIONS, MANIFEST)
    found = collect(selection, shards, logs())
    if not found.ids:
        raise UserError("no conversation here is of that name: `python -m fine_tuning lineage ID` looks in models too")
    public = found.people.all_in(_public_words()) | found.models.all_in(_public_words())
    found.people, found.models = found.people.without(public), found.models.without(public)
    where, work = Whereabouts(found), Work.start(found)
    say = where.places.append
    for log in logs():
        if count := count_in_log(log, found):
            say(Place(str(log), _count(count, "event"), "taken out"))
    for shard in shards:
        if count := count_in_shard(shard, found):
            say(Place(str(shard), _count(count, "version"), "written anew without it"))
    _say_files(work, say)
    listings, tainted = _say_objects(work, say)
    git, _ = object_stores.git_objects_with(Path.cwd(), work.everything)
    for name in git:
        say(Place(f"git: {name}", "its words", "stays: git's history is yours to rewrite (git filter-repo)"))
    adapters = object_stores.adapters_here(Path.cwd(), listings)
    records = list(object_stores.stage_records(Path.cwd()))
    objects, hashes = object_stores.learned_models(records, listings, tainted, adapters)
    versions = work.models.versions(found.ids, hashes)
    hashes = work.models.continued(hashes | {version.tags.get("adapter_sha256", "") for version in versions} - {""})
    versions = work.models.versions(found.ids, hashes)
    for version in versions:
        names = f" ({', '.join(version.aliases)})" if version.aliases else ""
        say(Place(f"model {version.tag}{names}", "learned from it", "marked; --withdraw takes it out of use"))
    if runs := work.models.runs(hashes):
        say(
            Place(
                "MLflow", _count(len(runs), "run") + " of unregistered models that learned", "removed, then mlflow gc"
            )
        )
    held, _ = work.models.artifacts_holding(work.everything.in_file)
    if held:
        say(Place("MLflow's artifacts", _count(len(held), "file"), "removed; lists of ids get hashes instead"))
    _check_start(hashes)
    where.learned = {
        "versions": [version.number for version in versions],
        "adapters": sorted(hashes),
        "objects": sorted(objects),
    }
    return where


def describe(where: Whereabouts) -> Iterator[str]:
    """The places as text."""
    yield f"{_count(len(where.found.ids), 'conversation')}, found in {_count(len(where.places), 'place')}:"
    for place in where.places:
        yield f"  {place.where}: {place.how_much} -> {place.then}"
    if not where.found.people and not where.found.models:
        yield "  (it says nothing that no other conversation says: only its ids can be searched for)"


def logs() -> list[Path]:
    """The live log, closed logs, and the lines that were set aside from them."""
    return sorted(path for path in INBOX.rglob("*.jsonl*") if path.is_file()) if INBOX.is_dir() else []


def _public_words() -> Iterator[bytes]:
    """Texts that are nobody's: the code and pages that git tracks, and the base model's own files."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True).stdout.decode("utf-8", "replace")
    tracked = [Path(name) for name in listed.split("\0") if name and not name.startswith(PUBLIC)]
    own = [path for path in Path("models/base").glob("*") if path.suffix in (".json", ".jinja")]
    for path in [*tracked, *own]:
        with suppress(OSError):
            yield path.read_bytes() + b"\n"


def _check_start(adapters: set[str]) -> None:
    import yaml

    params = yaml.safe_load(Path("params.yaml").read_bytes()) or {}
    start = (params.get("train") or {}).get("start_from")
    if start and any(sha256.startswith(str(start)) for sha256 in adapters):
        raise UserError("train.start_from goes on from a model that learned from it: set it to null in params.yaml")


def _say_files(work: "Work", say: Callable[[Place], None]) -> None:
    groups: dict[tuple[str, str], int] = {}
    for path in work.files_holding(strict=False):
        group = _group_of(path)
        if group:
            groups[group] = groups.get(group, 0) + 1
    for (where, then), count in groups.items():
        say(Place(where, _count(count, "file"), then))


def _group_of(path: Path) -> tuple[str, str] | None:
    """(place, what happens there) of a file that holds some of it; None for those that are listed one by one."""
    parts = path.parts
    if parts[0] == "inbox" or path.is_relative_to(CONVERSATIONS) or parts[0] in ("mlflow.db", "mlartifacts"):
        return None
    if parts[0] in ("data", "metrics", "models"):
        return "/".join(parts[:2]), "made anew by dvc repro"
    if parts[0] in (".whetstone", ".dvc"):
        return parts[0], "removed"
    return str(path), "stays: it is not the project's; remove it yourself"


def _say_objects(work: "Work", say: Callable[[Place], None]) -> tuple[dict[str, dict[str, str]], set[str]]:
    from fine_tuning.commands.object_stores import search, stores

    listings: dict[str, dict[str, str]] = {}
    tainted: set[str] = set()
    with stores(Path.cwd()) as (reachable, silent):
        for store in reachable:
            searched = search(store, work.everything, work.known)
            listings |= searched.listings
            tainted |= searched.holding
            if searched.holding:
                name = "DVC's cache" if store.name == "cache" else f"remote {store.name}"
                say(Place(name, f"{len(searched.holding)} of {_count(searched.count, 'object')}", "removed"))
        for remote in silent:
            say(Place(f"remote {remote.name}", "could not be looked into", remote.why))
    return listings, tainted


# -------------------------------------------------------------------------------------------------------------- forget


@dataclass
class Work:
    """What the steps share; all of it but `say` and caches is in the journal."""

    found: "Found"
    learned: dict[str, list]
    options: dict[str, Any]
    done: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print
    known: dict[str, bool] = field(default_factory=dict)
    _models: "ForgottenModels | None" = None

    @classmethod
    def start(cls, found: "Found") -> "Work":
        return cls(found, {"versions": [], "adapters": [], "objects": []}, {})

    @property
    def names(self) -> "Traces":
        """Traces of the ids that are long enough to be nobody else's."""
        from fine_tuning.data_collection.traces import Traces

        return Traces.exactly(self.found.ids)

    @property
    def strict(self) -> "Traces":
        """What only a person can have written, and ids."""
        return self.found.people | self.names

    @property
    def everything(self) -> "Traces":
        return self.strict | self.found.models

    @property
    def models(self) -> "ForgottenModels":
        """MLflow's side."""
        if self._models is None:
            from fine_tuning.commands.promote import open_registry, registry_locks
            from fine_tuning.model_management.forgotten_models import ForgottenModels
            from fine_tuning.model_management.model_deployer import DeploySettings
            from fine_tuning.project import artifact_root
            from fine_tuning.settings import read_params

            registry = open_registry(read_params("deploy", DeploySettings).name)
            self._models = ForgottenModels(registry, artifact_root(), registry_locks())
        return self._models

    def files_holding(self, strict: bool = True) -> list[Path]:
        """Files below the checkout that hold some of it. Where models write, their words are no proof of anything."""
        everything, people = self.everything, self.strict
        found = []
        for path in files_of_checkout():
            traces = people if strict and path.as_posix().startswith(WRITTEN_BY_MODELS) else everything
            with suppress(OSError):
                if traces.in_file(path):
                    found.append(path)
        return found

    def save(self) -> None:
        """Write the journal: ids and fingerprints, no text."""
        write_json(
            JOURNAL,
            {
                "ids": sorted(self.found.ids),
                "messages": sorted(self.found.messages),
                "people": self.found.people.as_json(),
                "models": self.found.models.as_json(),
                "learned": self.learned,
                "options": self.options,
                "done": self.done,
            },
        )
        os.chmod(JOURNAL, 0o600)

    @classmethod
    def load(cls) -> "Work":
        from fine_tuning.data_collection.erasure import Found
        from fine_tuning.data_collection.traces import Traces

        kept = read_json(JOURNAL)
        people, models = Traces.from_json(kept["people"]), Traces.from_json(kept["models"])
        found = Found(set(kept["ids"]), set(kept["messages"]), [], people, models)
        return cls(found, kept["learned"], kept["options"], kept["done"])


def files_of_checkout() -> Iterator[Path]:
    """Everything below the checkout but git's and DVC's objects, environments, caches of tools and the journal."""
    from fine_tuning.commands.dvc_files import cache_folder

    cache = cache_folder(Path.cwd())
    for place, folders, names in os.walk("."):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if name not in LEFT_OUT and (here / name).resolve() != cache and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(names) if here / name != JOURNAL and (here / name).is_file())


def forget(
    where: Whereabouts,
    *,
    withdraw: bool = False,
    hosts: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Remove what `find` found, everywhere; the current folder is the checkout.

    Args:
        withdraw: take the models that learned from it out of aliases, registry and Ollama; otherwise they are marked.
        hosts: Ollama servers instead of those in params.yaml.
        say: gets one line for each step and for each part of the proof.

    Returns:
        0 if the proof found nothing and everything could be reached, else 1: `resume` goes on.

    Raises:
        UserError: a step could not be done; `resume` goes on with it.
    """
    from fine_tuning.data_collection.tombstones import Tombstones

    Tombstones(FORGOTTEN).add(where.found.versions)  # first of all: from here on nothing brings it back
    work = Work(where.found, where.learned, {"withdraw": withdraw, "hosts": hosts}, say=say)
    work.save()
    where.found.versions.clear()
    return _go_on(work)


def resume(say: Callable[[str], None] = print) -> int:
    """Go on with an interrupted run of `forget`; as `forget`.

    Raises:
        UserError: there is none, or a step could not be done.
    """
    if not JOURNAL.exists():
        raise UserError("no run of forget was interrupted: `python -m fine_tuning forget ID`")
    work = Work.load()
    work.say = say
    return _go_on(work)


def _go_on(work: Work) -> int:
    for name, step in STEPS:
        if name not in work.done:
            step(work)
            work.done.append(name)
            work.save()
    return finish(work)


def clear_logs(work: Work) -> None:
    """Live log, closed logs, lines set aside, titles."""
    from fine_tuning.data_collection.erasure import clear_log

    count = sum(clear_log(log, work.found) for log in logs())
    if TITLES.is_file():
        titles = read_json(TITLES)
        write_json(TITLES, {key: value for key, value in titles.items() if key not in work.found.ids})
    work.say(f"logs: {_count(count, 'event')} taken out")


def clear_data(work: Work) -> None:
    """Shards, manifest and ledger, while no pipeline runs."""
    from fine_tuning.commands.conversations import pipeline_stands_still, track
    from fine_tuning.data_collection.erasure import clear_lines, clear_shards

    with pipeline_stands_still() as repo:
        shards = clear_shards(CONVERSATIONS, MANIFEST, work.found)
        if CONVERSATIONS.is_dir():
            track(repo)
        clear_lines(LEDGER, work.found)
    work.say(f"shards: {shards} written anew without it")


def clear_scratch(work: Work) -> None:
    """Memoised results, checkpoints, copies of temporary experiments: whatever is made anew when it is needed."""
    for name in DROPPED:
        shutil.rmtree(SCRATCH / name, ignore_errors=True)
    own = [path for path in work.files_holding(strict=False) if path.parts[0] in (".whetstone", ".dvc")]
    for path in own:
        path.unlink(missing_ok=True)
    work.say(f"memoised results and checkpoints: removed, {_count(len(own), 'other file')} with words of it too")


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
    if versions:
        _leave_servers(work, [version.tag for version in versions])
    champion = read_json(CHAMPION_JSON) if CHAMPION_JSON.is_file() else {}
    if (
        champion.get("version") in work.learned["versions"]
        or champion.get("adapter_sha256") in work.learned["adapters"]
    ):
        write_json(CHAMPION_JSON, {"version": None})
        shutil.rmtree(CHAMPION_FILES, ignore_errors=True)
        CHAMPION_FILES.with_suffix(".dvc").unlink(missing_ok=True)
    for version in versions:
        work.models.withdraw(version.number)
    work.say(f"models that learned from it: {', '.join(v.tag for v in versions) or 'none registered'} withdrawn")


def _leave_servers(work: Work, tags: list[str]) -> None:
    from fine_tuning.commands.models import open_servers
    from fine_tuning.model_management.model_deployer import LIVE, DeploySettings
    from fine_tuning.settings import read_params

    settings = read_params("deploy", DeploySettings)
    live = f"{settings.name}:{LIVE}"
    with open_servers(settings, work.options["hosts"]) as servers:
        for server in servers:
            digests = server.digests()
            gone = {digests[tag] for tag in tags if tag in digests}
            for tag in [tag for tag in (live, *tags) if digests.get(tag) in gone]:
                server.delete(tag)
                work.say(f"{server.host}: {tag} removed")


def reproduce(work: Work) -> None:
    """`dvc repro`, if the pipeline has ever run here. If it fails, what it would have replaced is removed."""
    if not Path("dvc.lock").is_file():
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], env={**os.environ, "PATH": path})
    work.options["reproduced"] = done.returncode == 0
    if done.returncode != 0:
        for file in work.files_holding():
            if file.parts[0] in ("data", "metrics", "models"):
                file.unlink()


def clear_objects(work: Work) -> None:
    """Objects of DVC's cache and remotes that hold it, and the weights that learned from it and nobody uses.

    Not `dvc gc`: that would throw away the data and models of every other commit as well.
    """
    from fine_tuning.commands.dvc_files import cache_folder
    from fine_tuning.commands.object_stores import in_use, search, stores

    used = in_use(Path.cwd()) if work.options.get("reproduced", True) else set()
    kept = used | {version.tags.get("gguf_md5", "") for version in work.models.registry.versions()}
    removed: set[str] = set()
    with stores(Path.cwd()) as (reachable, _):
        for store in reachable:
            holding = search(store, work.everything, work.known).holding
            for oid in holding & used:  # of today's: only what people wrote counts
                with store.local(oid) as path:
                    if path is None or not work.strict.in_file(path):
                        holding.discard(oid)
            count = store.remove(holding | set(work.learned["objects"]) - kept)
            removed |= holding
            work.say(f"{store.name}: {_count(count, 'object')} removed")
    for entry in (cache_folder(Path.cwd()) / "runs").glob("*/*/*"):
        if any(oid in entry.read_text() for oid in removed | set(work.learned["objects"])):
            entry.unlink()


def clear_runs(work: Work) -> None:
    """MLflow: artifacts that hold it, ids in lists, runs of unregistered models that learned, then its own gc."""
    from fine_tuning.data_collection.tombstones import id_hash

    work.models.hide(work.found.ids, id_hash)
    artifacts, _ = work.models.artifacts_holding(work.everything.in_file, remove=True)
    runs = work.models.runs(set(work.learned["adapters"]))
    work.models.remove_runs(runs)
    work.say(f"MLflow: {_count(len(artifacts), 'artifact')} and {_count(len(runs), 'run')} removed")


STEPS: tuple[tuple[str, Callable[[Work], None]], ...] = (
    ("logs", clear_logs),
    ("data", clear_data),
    ("scratch", clear_scratch),
    ("models", mark_models),
    ("reproduce", reproduce),
    ("objects", clear_objects),
    ("runs", clear_runs),
)


# --------------------------------------------------------------------------------------------------------------- proof


def finish(work: Work) -> int:
    """The proof, what cannot be reached, and what to type next; the journal goes when there is nothing left to do."""
    left, searched, silent = prove(work)
    work.say(f"proof: searched {', '.join(searched)}")
    for place in left:
        work.say(f"  STILL THERE: {place}")
    failed = not work.options.get("reproduced", True)
    if failed:
        work.say("  the pipeline failed: mend what it says, then " + AGAIN)
        work.done = [name for name in work.done if name not in ("reproduce", "objects")]
        work.save()
    if not left:
        work.say("  nothing of it is left there")
    work.say("cannot be reached from here:")
    for line in unreachable(work, silent):
        work.say(f"  {line}")
    if left or failed or any(not remote.read_only for remote in silent):
        work.say(f"not done yet: when the above is mended, {AGAIN}")
        return 1
    JOURNAL.unlink(missing_ok=True)
    work.say("next: git add -A data models metrics dvc.lock && git commit -m 'Forget', then dvc push && git push")
    return 0


def prove(work: Work) -> tuple[list[str], list[str], list[Any]]:
    """Search everything that can be reached once more.

    Returns:
        (places that still hold some of it, what was searched, remotes that could not be searched)
    """
    from fine_tuning.commands import object_stores

    left = [str(path) for path in work.files_holding()]
    searched = [_count(sum(1 for _ in files_of_checkout()), "file")]
    used = object_stores.in_use(Path.cwd())
    with object_stores.stores(Path.cwd()) as (reachable, silent):
        for store in reachable:
            result = object_stores.search(store, work.everything, work.known)
            for oid in sorted(result.holding):
                with store.local(oid) as path:
                    if oid not in used or (path is not None and work.strict.in_file(path)):
                        left.append(f"{store.name}: {oid}")
            searched.append(f"{_count(result.count, 'object')} of {store.name}")
    git, count = object_stores.git_objects_with(Path.cwd(), work.everything)
    left += [f"git: {name}" for name in git]
    searched.append(f"{_count(count, 'object')} of git")
    artifacts, count = work.models.artifacts_holding(work.everything.in_file)
    left += [f"MLflow: {name}" for name in artifacts]
    searched.append(f"{_count(count, 'artifact')} of MLflow")
    return left, searched, silent


def unreachable(work: Work, silent: list[Any]) -> Iterator[str]:
    """What this command has no hands for, as plain lines."""
    for remote in silent:
        yield f"remote {remote.name}: {remote.why}"
    for version in work.models.registry.versions():
        if version.number in work.learned["versions"]:
            yield f"model {version.tag}, which learned from it and is marked: --withdraw takes it out of use"
    if work.models.registry.uri.startswith(("http://", "https://")):
        yield "deleted runs in the MLflow server: its owner runs `mlflow gc`"
    yield "other clones: there `git pull`, then `python -m fine_tuning forget --again`, then `dvc pull`"
    yield "backups, snapshots and old versions in buckets that keep versions"
    yield "files that people exported or copied elsewhere, models on servers that are not in params.yaml"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
