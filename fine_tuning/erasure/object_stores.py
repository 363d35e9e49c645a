"""DVC's cache and remotes, object by object: search them, take objects out, know which of them hold a trained model."""

import json
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from fine_tuning.common.dvc_files import (
    cache_folder,
    cached,
    listing,
    md5_folder,
    open_repo,
    parse_lock,
    used_objects,
)
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import CONVERSATIONS, main_checkout, sha256_file
from fine_tuning.erasure.traces import Traces, is_weights
from fine_tuning.training import tracking

WEIGHTS = (".safetensors", ".gguf")
TRAIN_DATA = ("data/prepared/train", "data/prepared/train.parquet")  # and as it was once
CACHE = "cache"


@dataclass(frozen=True)
class Store:
    """The cache or a remote. `odb` is DVC's object database."""

    name: str
    odb: Any

    def objects(self) -> set[str]:
        """Names of all objects: their MD5, with `.dir` for listings of folders."""
        with suppress(FileNotFoundError):
            return {oid for oid in self.odb.all() if not oid.endswith(".unpacked")}
        return set()

    @contextmanager
    def local(self, oid: str) -> Iterator[Path | None]:
        """An object as a file here; None for weights of a remote, which hold no text and are not fetched."""
        address = self.odb.oid_to_path(oid)
        if self.name == CACHE:
            yield Path(address)
            return
        scratch = main_checkout() / ".whetstone"  # where `forget` finds what it leaves when it is killed
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            with self.odb.fs.open(address, "rb") as remote:
                if is_weights(remote.read(16)):
                    yield None
                    return
            target = Path(folder) / "object"
            self.odb.fs.get_file(address, str(target))
            yield target

    def remove(self, oids: Iterable[str]) -> int:
        """Remove objects; those that are gone already do not count."""
        from dvc_data.hashfile.db import get_index

        count = 0
        for oid in sorted(oids):
            if self.odb.exists(oid):
                self.odb.delete(oid)
                count += 1
        if count:
            with suppress(Exception):  # DVC's index of the store; without it DVC lists the store again
                get_index(self.odb).clear()
        return count


@dataclass(frozen=True)
class Unreachable:
    """A remote that cannot be searched or changed, and why."""

    name: str
    why: str
    read_only: bool


@contextmanager
def stores(checkout: Path) -> Iterator[tuple[list[Store], list[Unreachable]]]:
    """(the cache and every remote that answers, the remotes that do not)."""
    with open_repo(checkout) as repo:
        found, unreachable = [Store(CACHE, repo.cache.local)], []
        for name in sorted(repo.config["remote"]):
            try:
                odb = repo.cloud.get_remote_odb(name)
                if odb.fs.protocol in ("http", "https"):
                    why = "it is read-only: its files go with those of the server that it shows"
                    unreachable.append(Unreachable(name, why, read_only=True))
                    continue
                with suppress(FileNotFoundError):  # nothing was pushed yet
                    odb.fs.ls(odb.path, detail=False)
                found.append(Store(name, odb))
            except Exception as error:  # every kind of remote has its own
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                unreachable.append(Unreachable(name, why, read_only=False))
        yield found, unreachable


@dataclass
class Searched:
    """What a search of a store found: its objects, those that hold a trace, those with one of what only people write
    or of an id, those that could not be read, {listing: {path: object}}."""

    objects: set[str]
    holding: set[str] = field(default_factory=set)
    strict: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    listings: dict[str, dict[str, str]] = field(default_factory=dict)


def search(store: Store, traces: Traces, strict: Traces, known: dict[str, str]) -> Searched:
    """Look into every object of a store; `strict` are the traces that models do not write. `known` grows: {object or
    content: the field of `Searched` that it is in} of what was searched before."""
    result = Searched(store.objects())
    for oid in tqdm(sorted(result.objects), desc=store.name, unit="object", disable=None, leave=False):
        listing = oid.endswith(".dir")
        if oid not in known or (listing and store.name == CACHE):
            with suppress(FileNotFoundError), store.local(oid) as path:
                known[oid] = "" if path is None else kind_of(path, traces, strict, known)
                if listing and path is not None:
                    with suppress(ValueError, KeyError, TypeError):
                        result.listings[oid] = {e["relpath"]: e["md5"] for e in json.loads(path.read_bytes())}
        if kind := known.get(oid):
            getattr(result, kind).add(oid)
    result.holding |= result.strict
    return result


def kind_of(path: Path, traces: Traces, strict: Traces, known: dict[str, str] | None = None) -> str:
    """`strict` or `holding` of a file that holds some of them, `unread` of one that is damaged, else nothing. Raises
    FileNotFoundError if it is gone.

    A content that is in `known`, by its hash, is not searched again: a file is often an object of the cache too.
    """
    try:
        with open(path, "rb") as file:
            weights = is_weights(file.read(16))
        if known is None or weights:  # of weights the search reads little
            return _kind_of(path, traces, strict)
        content = f"{sha256_file(path)}{'.csv' * ('.csv' in path.suffixes)}"  # the only name that `streams` looks at
        if content not in known:
            known[content] = _kind_of(path, traces, strict)
        return known[content]
    except FileNotFoundError:
        raise
    except OSError:
        return "unread"


def _kind_of(path: Path, traces: Traces, strict: Traces) -> str:
    return ("strict" if strict.in_file(path) else "holding") if traces.in_file(path) else ""


# -----------------------------------------------------------------------------
# what was trained on what


def stage_records(checkout: Path) -> Iterator[dict]:
    """Every stage that dvc.lock describes, in the checkout and in every commit, and those of DVC's run-cache."""
    for lock in _versions_of(checkout, "dvc.lock"):
        with suppress(UserError):
            yield from parse_lock(lock).values()
    for path in sorted((cache_folder(checkout) / "runs").glob("*/*/*")):
        with suppress(yaml.YAMLError, OSError):
            yield yaml.safe_load(path.read_bytes()) or {}


def _versions_of(checkout: Path, name: str) -> Iterator[bytes]:
    """What a file holds in the checkout and in every commit."""
    if (checkout / name).is_file():
        yield (checkout / name).read_bytes()
    for blob in _git(checkout, "rev-list", "--all", "--objects", "--", name).splitlines():
        oid, _, path = blob.decode("utf-8", "replace").partition(" ")
        if path == name:
            yield _git(checkout, "cat-file", "blob", oid)


def earlier_shards(checkout: Path, records: list[dict], now: set[str]) -> list[Path]:
    """Shards in the cache that have none of the names `now`: another clone may have forgotten what they hold."""
    folders = folders_of_shards(records)
    for version in _versions_of(checkout, f"{CONVERSATIONS}.dvc"):
        with suppress(yaml.YAMLError, AttributeError):
            folders |= {out.get("md5") for out in (yaml.safe_load(version) or {}).get("outs") or []}
    objects: set[str] = set()
    for folder in folders - {None}:
        with suppress(ValueError, KeyError, TypeError):  # a damaged one
            files = listing(checkout, str(folder)) or {}
            objects |= {oid for name, oid in files.items() if name.endswith(".jsonl") and name not in now}
    return [path for oid in sorted(objects) if (path := cached(checkout, oid))]


def folders_of_shards(records: list[dict]) -> set[str | None]:
    """The listings of all shards that stages read."""
    deps = (dep for record in records for dep in record.get("deps") or [])
    return {dep.get("md5") for dep in deps if dep.get("path") == str(CONVERSATIONS)}


def made_from(records: list[dict], listings: dict[str, dict[str, str]], shards: set[str]) -> set[str]:
    """The objects of data and metrics that stages made from these shards, or of models that learned from them, and the
    shards.

    Where a stage reads a folder and writes one with files for each file that it read, as cleaning does, those of other
    shards are left out; so is what a stage made that read none of it. Of a folder that is written, the folders in it
    count too: others read them.
    """
    tainted = sources = shards | {oid for oid, files in listings.items() if shards & set(files.values())}
    while True:
        made, clean, models = set(), set(), set()
        for record in records:
            deps = {dep.get("md5") for dep in record.get("deps") or []} - {None}
            read: dict[str, set[str]] = defaultdict(set)
            for name, oid in (item for dep in deps for item in listings.get(dep, {}).items()):
                read[_shard(name)].add(oid)
            for out in record.get("outs") or []:
                files = listings.get(oid := out.get("md5"), {})
                if oid is None:
                    continue
                if str(out.get("path")).startswith("models/"):
                    models |= {oid, *files.values()}
                if deps & tainted:
                    of = {file for name, file in files.items() if read.get(_shard(name), tainted) & tainted}
                    made |= {oid} | of | {md5_folder(held) for held in _folders(files) if of & set(held.values())}
                else:
                    clean |= {oid, *files.values(), *map(md5_folder, _folders(files))}
        before, tainted = tainted, sources | (made - clean)
        if tainted == before:
            return shards | (made - clean - models)


def _shard(path: str) -> str:
    """What names a file's shard in any folder."""
    return path.rpartition("/")[2].partition(".")[0]


def _folders(files: dict[str, str]) -> list[dict[str, str]]:
    """The listings of the folders in a folder."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path, md5 in files.items():
        folder, _, name = path.partition("/")
        if name:
            found[folder][name] = md5
    return list(found.values())


def learned_models(
    records: list[dict],
    listings: dict[str, dict[str, str]],
    tainted: set[str],
    adapters: dict[str, str],
    hashes: set[str],
) -> tuple[set[str], set[str]]:
    """What was trained on the data in `tainted`, or made from or continued such a model.

    Args:
        tainted: objects that hold the conversations.
        adapters: {object: SHA-256} of the adapters that are here.
        hashes: SHA-256 of adapters that are known to have learned from it.

    Returns:
        (objects of weights and listings of their folders, SHA-256 of the adapters)
    """
    folders: set[str] = set()
    hashes = set(hashes)
    weights = {md5 for md5, sha256 in adapters.items() if sha256 in hashes}
    while True:
        before = len(folders) + len(weights)
        for record in records:
            outs = {out.get("md5") for out in record.get("outs") or [] if str(out.get("path")).startswith("models/")}
            if outs and _learned(record, tainted, folders, hashes):
                folders |= outs - {None}
        folders |= {oid for oid, files in listings.items() if weights & set(files.values())}
        weights |= {md5 for oid in folders for name, md5 in listings.get(oid, {}).items() if name.endswith(WEIGHTS)}
        hashes |= {adapters[md5] for md5 in weights if md5 in adapters}
        if len(folders) + len(weights) == before:
            return folders | weights, hashes


def _learned(record: dict, tainted: set[str], folders: set[str], hashes: set[str]) -> bool:
    train = ((record.get("params") or {}).get("params.yaml") or {}).get("train")
    start = train.get("start_from") if isinstance(train, dict) else None
    if start and any(sha256.startswith(str(start)) for sha256 in hashes):
        return True
    for dep in record.get("deps") or []:
        if dep.get("path") in TRAIN_DATA and dep.get("md5") in tainted:
            return True
        if str(dep.get("path")).startswith("models/") and dep.get("md5") in folders:
            return True
    return False


def adapters_here(checkout: Path, listings: dict[str, dict[str, str]]) -> dict[str, str]:
    """{object: SHA-256} of the adapters in the cache."""
    objects = {md5 for files in listings.values() for name, md5 in files.items() if Path(name).name == tracking.WEIGHTS}
    paths = {md5: cache_folder(checkout) / "files" / "md5" / md5[:2] / md5[2:] for md5 in objects}
    return {md5: sha256_file(path) for md5, path in paths.items() if path.is_file()}


def in_use(checkout: Path) -> set[str]:
    """Objects that dvc.lock and the .dvc files of the checkout name."""
    with open_repo(checkout) as repo:
        return {oid for oid, _ in used_objects(repo)}


# -----------------------------------------------------------------------------
# git


def git_objects_with(checkout: Path, traces: Traces) -> tuple[list[str], int]:
    """(paths or names of git's objects that hold a trace, how many objects were searched)."""
    process = subprocess.Popen(
        ["git", "cat-file", "--batch-all-objects", "--batch", "--unordered"], cwd=checkout, stdout=subprocess.PIPE
    )
    found, count = [], 0
    assert process.stdout is not None
    while header := process.stdout.readline().split():
        data = process.stdout.read(int(header[2]) + 1)
        count += 1
        if header[1] != b"tree" and traces.in_bytes(data):
            found.append(header[0].decode())
    process.wait()
    listed = _git(checkout, "rev-list", "--all", "--objects").decode("utf-8", "replace") if found else ""
    names = {oid: path for oid, _, path in (line.partition(" ") for line in listed.splitlines())}
    return [f"{names[oid]} ({oid[:9]})" if names.get(oid) else oid for oid in found], count


def _git(checkout: Path, *words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=checkout, capture_output=True)
    return done.stdout if done.returncode == 0 else b""
