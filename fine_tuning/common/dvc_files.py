"""What dvc.lock says about files, read without starting DVC: hashes, listings of folders, objects in the cache."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import run_command

if TYPE_CHECKING:
    from dvc.repo import Repo


LOCK = Path("dvc.lock")
NO_REPOSITORY = "this folder is not a DVC repository: run `dvc init` in a clone of the project"


def read_lock(path: Path = LOCK) -> dict[str, dict[str, Any]]:
    """Stages of a dvc.lock by name. Raises UserError if there is none, or it is damaged."""
    try:
        return parse_lock(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`") from None


def parse_lock(data: bytes) -> dict[str, dict[str, Any]]:
    try:
        stages = yaml.safe_load(data)["stages"]
    except (yaml.YAMLError, TypeError, KeyError):
        raise UserError("dvc.lock is damaged: `git checkout dvc.lock`, then `dvc repro`") from None
    return stages or {}


def read_dvc(path: Path) -> str | None:
    """MD5 that a .dvc file records, None if it is missing or damaged."""
    try:
        return str(yaml.safe_load(path.read_bytes())["outs"][0]["md5"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, IndexError):
        return None


def locked_md5(stages: dict[str, dict[str, Any]], path: Path, side: str = "outs") -> str | None:
    """MD5 that some stage recorded for `path` among its outs (or deps); folders end in `.dir`."""
    for stage in stages.values():
        for entry in stage.get(side) or []:
            if entry.get("path") == path.as_posix():
                md5: str | None = entry.get("md5")
                return md5
    return None


def changed_since_lock(*stages: str) -> list[str]:
    """Paths of dependencies, parameter files and outs of these stages that are not what dvc.lock says, as `dvc status`
    finds them; dvc.yaml where a command is another."""
    with open_repo(what="dvc status") as repo:
        found = repo.status(targets=list(stages))
    changes = [change for stage in found.values() for change in stage]
    groups = [[["dvc.yaml"]] if change == "changed command" else change.values() for change in changes]
    return [path for group in groups for paths in group for path in paths]


def md5_file(path: Path) -> str:
    """Hex MD5 of a file: DVC's name for it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def md5_path(path: Path) -> str | None:
    """DVC's hash of a file or a folder on disk, None if it is not there."""
    if path.is_file():
        return md5_file(path)
    if not path.is_dir():
        return None
    return md5_folder({file.relative_to(path).as_posix(): md5_file(file) for file in files_below(path)})


def md5_folder(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder with these files: {path in it: MD5}."""
    entries = [{"md5": md5, "relpath": path} for path, md5 in files.items()]
    entries.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, links followed, sorted."""
    return sorted(Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)


@lru_cache(maxsize=8)
def cache_folder(checkout: Path) -> Path:
    """DVC's cache of this checkout, as `dvc cache dir` shows it. Raises UserError if it is not a DVC repository, or its
    configuration is damaged."""
    from dvc.config import Config, ConfigError

    folder = checkout / ".dvc"
    if not folder.is_dir():
        raise UserError(NO_REPOSITORY)
    try:
        return Path(Config(str(folder.resolve()))["cache"].get("dir") or folder / "cache").resolve()
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"DVC's configuration is damaged ({reason}): correct {folder}/config") from None


def cached(checkout: Path, md5: str) -> Path | None:
    """The cache object of an MD5, None if the cache does not hold it."""
    path = cache_folder(checkout) / "files" / "md5" / md5[:2] / md5[2:]
    return path if path.is_file() else None


def listing(checkout: Path, md5: str) -> dict[str, str] | None:
    """{path in the folder: MD5} of a folder's hash, None if the cache does not hold it."""
    path = cached(checkout, md5)
    if path is None:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_bytes())}


def locate(checkout: Path, stages: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Files with the contents that dvc.lock records for a folder that lies in an out: the files themselves, or their
    objects in the cache. None where one is missing."""
    out = next((parent for parent in folder.parents if locked_md5(stages, parent)), folder)
    files = listing(checkout, locked_md5(stages, out) or "none") or {}
    found = []
    for path, md5 in ((out / name, md5) for name, md5 in files.items()):
        if path.is_relative_to(folder):
            here = checkout / path
            found.append(here if here.is_file() and md5_file(here) == md5 else cached(checkout, md5))
    return [] if None in found else [path for path in found if path]


def show_file(checkout: Path, commit: str, path: str) -> bytes | None:
    """A file as it is in a git commit, None if it or the commit is not there."""
    done = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=checkout, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def dvc_add(path: Path) -> None:
    """`dvc add`, in this process: it takes a second less than starting DVC. Raises UserError if a pipeline is running,
    or DVC refuses."""
    with open_repo(what=f"dvc add {path}") as repo:
        add_to_dvc(repo, path)


def add_to_dvc(repo: "Repo", path: Path, known: Container[str] = ()) -> None:
    """`dvc add` of a folder or a file, and see that DVC's cache holds every file: by its hash, or by its size if it is
    `known`.

    DVC logs a copy that failed, on a full disk say, and continues; the next `dvc add` finds the folder's listing in
    the cache and copies nothing again. So what is missing or damaged is put there here.

    Raises:
        OSError: the cache does not take a file.
    """
    logging.getLogger("dvc").setLevel(logging.ERROR)
    logging.getLogger("dvc_data").setLevel(logging.CRITICAL)  # a traceback for each copy that fails
    cache = repo.cache.local
    cache.cache_types = ["reflink", "copy"]  # whatever is configured: what cannot be made again is kept twice
    repo.add([path.as_posix()])
    added = str(read_dvc(Path(f"{path}.dvc")))
    listed = json.loads(Path(cache.oid_to_path(added)).read_bytes()) if added.endswith(".dir") else [{"md5": added}]
    for entry in listed:
        file, md5 = path / entry.get("relpath", ""), entry["md5"]
        kept = Path(cache.oid_to_path(md5))
        same_size = kept.is_file() and kept.stat().st_size == file.stat().st_size
        if not same_size or (file.name not in known and md5_file(kept) != md5):
            kept.unlink(missing_ok=True)
            cache.add(str(file), repo.fs, md5)


def reproduce(*words: str) -> bool:
    """`dvc repro`, with this environment's `python` for the stages; whether it succeeded."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "dvc", "repro", *words]
    with subprocess.Popen(command, env={**os.environ, "PATH": path}) as process:
        try:
            return process.wait() == 0
        except KeyboardInterrupt:
            process.wait()  # it was interrupted as well, and a stage saves a checkpoint before it obeys
            raise


def checkout_outputs() -> None:
    """Bring the outputs of the stages back as dvc.lock says; what the cache lacks, and the conversations, stay. Raises
    UserError if a pipeline is running, or DVC refuses."""
    with open_repo(what="dvc checkout dvc.yaml") as repo:
        repo.checkout(["dvc.yaml"], force=True, allow_missing=True)


def fetch_outputs(commit: str) -> bool:
    """Bring all that stages made, as a git commit has it, into the cache; whether it is there now."""
    checkout = Path.cwd()
    tracked = set(run_command("git", "ls-tree", "-r", "--name-only", commit, cwd=checkout).splitlines())
    stages = parse_lock(show_file(checkout, commit, LOCK.as_posix()) or b"")
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs") or []}
    hashes = [md5 for path, md5 in outs.items() if path not in tracked]
    if not fetch(hashes):
        return False
    folders = [listing(checkout, md5) or {} for md5 in hashes if md5.endswith(".dir")]
    return fetch({md5 for folder in folders for md5 in folder.values()})


def fetch(hashes: Iterable[str]) -> bool:
    """Bring the objects of these MD5s from the default remote into the cache; whether all are there now."""
    wanted = list(hashes)
    missing = [md5 for md5 in wanted if cached(Path.cwd(), md5) is None]
    if missing:
        from dvc.config import NoRemoteError
        from dvc_data.hashfile.hash_info import HashInfo

        with open_repo(what="dvc fetch") as repo, suppress(NoRemoteError):
            repo.cloud.pull([HashInfo("md5", md5) for md5 in missing])
    return all(cached(Path.cwd(), md5) is not None for md5 in wanted)


@contextmanager
def open_repo(checkout: Path = Path(), what: str = "dvc") -> Iterator["Repo"]:
    """The DVC repository of a checkout; its failures are one line that names the command `what`."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(str(checkout)) as repo:
            yield repo
    except LockError:
        raise UserError("a pipeline run holds the DVC lock: run the command again when it has ended") from None
    except DvcException as error:
        raise UserError(f"`{what}` failed ({' '.join(str(error).split())}): fix the cause, then run again") from None


def dvc_objects(checkout: Path) -> Iterator[Path]:
    root = cache_folder(checkout) / "files" / "md5"
    yield from (file for file in files_below(root) if len(file.parent.name) == 2 and not file.name.startswith("."))


@contextmanager
def pipeline_stands_still() -> Iterator["Repo"]:
    """Hold DVC's lock, so that no `dvc repro` of this checkout starts a stage meanwhile; refuse while one runs.

    DVC lets go of its lock while a stage's command runs, and notes in .dvc/tmp/rwlock which process reads and writes
    what. A process that is noted there and alive is a stage that is running.
    """
    import psutil
    from dvc.exceptions import NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    busy = "a pipeline run is using the conversations: run the command again when it has ended"
    try:
        with Repo() as repo, lock_repo(repo):
            noted = Path(repo.tmp_dir) / "rwlock"
            entries = json.loads(noted.read_text() or "{}") if noted.exists() else {}
            writers = list(entries.get("write", {}).values())
            readers = [info for infos in entries.get("read", {}).values() for info in infos]
            if any(psutil.pid_exists(int(info["pid"])) for info in writers + readers):
                raise UserError(busy)
            yield repo
    except LockError:
        raise UserError(busy) from None
    except NotDvcRepoError:
        raise UserError(NO_REPOSITORY) from None


def used_objects(repo: "Repo") -> Iterator[tuple[str, str]]:
    """(object, path) of everything that dvc.lock and the .dvc files name."""
    for out in repo.index.outs:
        if not out.use_cache or out.hash_info is None or not out.hash_info.value:
            continue
        name, path = out.hash_info.value, repo.fs.relpath(out.fspath, repo.root_dir)
        yield name, path
        listing = cached(Path(repo.root_dir), name) if name.endswith(".dir") else None
        if listing is not None:
            try:
                entries = json.loads(listing.read_bytes())
                yield from ((entry["md5"], f"{path}/{entry['relpath']}") for entry in entries)
            except (ValueError, TypeError, KeyError):
                continue  # a damaged listing is a finding of its own
