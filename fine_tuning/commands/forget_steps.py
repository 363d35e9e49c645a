"""The steps of `forget`, their journal, and the proof. Each step may be repeated; a kill between two costs nothing."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.errors import count_of
from fine_tuning.records import read_json, write_json

if TYPE_CHECKING:
    from fine_tuning.commands.object_stores import Silent
    from fine_tuning.data_collection.erasure import Found
    from fine_tuning.data_collection.traces import Traces
    from fine_tuning.model_management.forgotten_models import ForgottenModels

INBOX = Path("inbox")
CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
FORGOTTEN = Path("data/forgotten.jsonl")
LEDGER = Path("data/splits.txt")
OLD_LEDGER = Path("data/splits/ledger.jsonl")  # where it was before it came into git, until `prepare` takes it over
SCRATCH = Path(".whetstone")
JOURNAL = SCRATCH / "forget.json"
TITLES = SCRATCH / "titles.json"
DROPPED = ("memo/clean", "checkpoints", "start")  # of SCRATCH: made anew when they are needed
CHAMPION_JSON = Path("models/champion.json")
CHAMPION_FILES = Path("models/champion")
WRITTEN_BY_MODELS = ("data/evaluation/", "metrics/", ".whetstone/memo/evaluate/")
LEFT_OUT = {".git", ".venv", "__pycache__", ".hypothesis", ".ruff_cache", ".pytest_cache"}
AGAIN = "`python -m fine_tuning forget --resume`"


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
                "by": self.found.by,
                "people": self.found.people.known,
                "models": self.found.models.known,
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
        people, models = Traces(kept["people"]), Traces(kept["models"])
        found = Found(set(kept["ids"]), set(kept["messages"]), [], kept["by"], people, models)
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


def logs() -> list[Path]:
    """The live log, closed logs, and the lines that were set aside from them."""
    return sorted(path for path in INBOX.rglob("*.jsonl*") if path.is_file()) if INBOX.is_dir() else []


# --------------------------------------------------------------------------------------------------------------- steps


def clear_logs(work: Work) -> None:
    """Live log, closed logs, lines set aside, titles."""
    from fine_tuning.data_collection.erasure import clear_log

    count = sum(clear_log(log, work.found) for log in logs())
    if TITLES.is_file():
        titles = read_json(TITLES)
        write_json(TITLES, {key: value for key, value in titles.items() if key not in work.found.ids})
    work.say(f"logs: {count_of(count, 'event')} taken out")


def clear_data(work: Work) -> None:
    """Shards, manifest and ledger, while no pipeline runs."""
    from fine_tuning.commands.conversations import pipeline_stands_still, track
    from fine_tuning.data_collection.erasure import clear_lines, clear_shards
    from fine_tuning.data_preparation.dataset_builder import PrepareSettings
    from fine_tuning.data_preparation.splits import Ledger
    from fine_tuning.settings import read_params

    with pipeline_stands_still() as repo:
        shards = clear_shards(CONVERSATIONS, MANIFEST, work.found)
        if CONVERSATIONS.is_dir():
            track(repo)
        clear_lines(OLD_LEDGER, work.found)
        Ledger(LEDGER, read_params("prepare", PrepareSettings).salt).forget(work.found.ids)
    work.say(f"shards: {shards} written anew without it")


def clear_scratch(work: Work) -> None:
    """Memoised results, checkpoints, copies of temporary experiments: whatever is made anew when it is needed."""
    for name in DROPPED:
        shutil.rmtree(SCRATCH / name, ignore_errors=True)
    own = [path for path in work.files_holding(strict=False) if path.parts[0] in (".whetstone", ".dvc")]
    for path in own:
        path.unlink(missing_ok=True)
    work.say(f"memoised results and checkpoints: removed, {count_of(len(own), 'other file')} with words of it too")


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


def clear_champion(work: Work) -> None:
    """The evaluation that the champion keeps beside its weights, if it holds some of it, and its list of ids."""
    from fine_tuning.commands.champion import KEPT, MEMBERS
    from fine_tuning.commands.dvc_files import dvc_add, files_below
    from fine_tuning.data_collection.erasure import clear_lines

    members, evaluation = CHAMPION_FILES / MEMBERS, CHAMPION_FILES / KEPT
    cleared = clear_lines(members, work.found)
    holding = [path for path in files_below(evaluation) if work.everything.in_file(path)]
    if holding:
        shutil.rmtree(evaluation)
    if cleared or holding:
        dvc_add(CHAMPION_FILES)
        work.say("the champion's files: " + ("its evaluation removed" if holding else "its list of ids written anew"))


def run_pipeline(work: Work) -> None:
    """`dvc repro`, if the pipeline has ever run here. If it fails, what it would have replaced is removed."""
    from fine_tuning.commands.dvc_files import reproduce

    if not Path("dvc.lock").is_file():
        return
    work.options["reproduced"] = reproduce()
    if not work.options["reproduced"]:
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
    kept = used | set(_files_of_versions(work))
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
            work.say(f"{store.name}: {count_of(count, 'object')} removed")
    for entry in (cache_folder(Path.cwd()) / "runs").glob("*/*/*"):
        if any(oid in entry.read_text() for oid in removed | set(work.learned["objects"])):
            entry.unlink()


def _files_of_versions(work: Work) -> Iterator[str]:
    """Objects that deploying a version, or making it champion again, needs."""
    from fine_tuning.commands.champion import FILES_TAG
    from fine_tuning.commands.dvc_files import listing

    for version in work.models.registry.versions():
        yield version.tags.get("gguf_md5", "")
        if folder := version.tags.get(FILES_TAG):
            yield from (folder, *(listing(Path.cwd(), folder) or {}).values())


def clear_runs(work: Work) -> None:
    """MLflow: artifacts that hold it, ids in lists, runs of unregistered models that learned, then its own gc."""
    from fine_tuning.data_collection.tombstones import id_hash

    work.models.hide(work.found.ids, id_hash)
    artifacts, _ = work.models.artifacts_holding(work.everything.in_file, remove=True)
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


def prove(work: Work) -> tuple[list[str], list[str], list["Silent"]]:
    """Search everything that can be reached once more.

    Returns:
        (places that still hold some of it, what was searched, remotes that could not be searched)
    """
    from fine_tuning.commands import object_stores

    left = [str(path) for path in work.files_holding()]
    searched = [count_of(sum(1 for _ in files_of_checkout()), "file")]
    used = object_stores.in_use(Path.cwd())
    with object_stores.stores(Path.cwd()) as (reachable, silent):
        for store in reachable:
            result = object_stores.search(store, work.everything, work.known)
            for oid in sorted(result.holding):
                with store.local(oid) as path:
                    if oid not in used or (path is not None and work.strict.in_file(path)):
                        left.append(f"{store.name}: {oid}")
            searched.append(f"{count_of(result.count, 'object')} of {store.name}")
    git, count = object_stores.git_objects_with(Path.cwd(), work.everything)
    left += [f"git: {name}" for name in git]
    searched.append(f"{count_of(count, 'object')} of git")
    artifacts, count = work.models.artifacts_holding(work.everything.in_file)
    left += [f"MLflow: {name}" for name in artifacts]
    searched.append(f"{count_of(count, 'artifact')} of MLflow")
    return left, searched, silent


def unreachable(work: Work, silent: list["Silent"]) -> Iterator[str]:
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
