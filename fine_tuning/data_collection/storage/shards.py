"""Shards: immutable files of conversations, one JSON object a line. The newest version of a conversation wins.

A shard is written beside the folder, made read-only, renamed in whole, and never changed again. Its order among the
shards is that of the manifest: the shards that it names, then newcomers by name, and names begin with the time.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import copy_file, dump_line, read_json, read_line, sync
from fine_tuning.common.settings import Settings
from fine_tuning.schema.conversation import SCHEMA_VERSION, can_be_folded, from_line

if TYPE_CHECKING:
    from dvc.repo import Repo

_STAMP = re.compile(r"(\d{8})T(\d{9})")
_OURS = re.compile(
    rb'\{"id":"([^"\\]{1,512})",(?:"source":"[^"\\]*",)?(?:"started_at":(?:null|"[^"\\]*"),)?"messages":'
)


class IntakeSettings(Settings):
    """The section `intake` of params.yaml."""

    sample: bool


def shard_paths(folder: str | Path, manifest: str | Path | None = None) -> list[Path]:
    """The shards of a folder in their order."""
    present = {path.name: path for path in Path(folder).glob("*.jsonl")}
    known = [shard["name"] for shard in read_manifest(manifest)["shards"]] if manifest else []
    return [present.pop(name) for name in known if name in present] + [present[name] for name in sorted(present)]


def write_shard(folder: str | Path, prefix: str, conversations: Iterable[dict]) -> tuple[Path | None, int]:
    """Write conversations as `<prefix>-<content hash>.jsonl`; (None, 0) if there are none. Returns (path, lines).

    A shard that is there already under that name is left as it is: it has the same bytes.
    """
    return write_lines(folder, prefix, (dump_line(c | {"schema_version": SCHEMA_VERSION}) for c in conversations))


def write_lines(folder: str | Path, prefix: str, lines: Iterable[bytes]) -> tuple[Path | None, int]:
    """`write_shard` for lines that are bytes already, newlines included."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{prefix}.{os.getpid()}.tmp"  # not in the folder: nobody may see half a shard there
    digest, count = hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as file:
            for line in lines:
                digest.update(line)
                file.write(line)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        if count == 0:
            return None, 0
        path = folder / f"{prefix}-{digest.hexdigest()[:12]}.jsonl"
        if not path.exists():
            os.chmod(temporary, 0o444)
            os.rename(temporary, path)
            sync(folder)
        return path, count
    finally:
        temporary.unlink(missing_ok=True)


def versions(paths: Iterable[Path]) -> Iterator[dict]:
    """Every version of every conversation in shard order; lines that are no conversation are passed over."""
    return (version for *_, version in located_versions(paths))


def located_versions(paths: Iterable[Path]) -> Iterator[tuple[Path, int, int, dict]]:
    """(shard, first byte, bytes, version) of the versions that `versions` yields. Raises UserError if another version
    of this project wrote a shard, in a form that this one does not know."""
    for path in paths:
        end = 0
        with open(path, "rb") as file:
            for line in file:
                begin, end = end, end + len(line)
                if (record := version_in(line)) is not None:
                    yield path, begin, len(line), of_this_version(path, record)


def plain_id(line: bytes) -> bytes | None:
    """The id of a line in the form of `write_shard`, a tenth of its parsing; None of any other line, such as one that
    may have the key twice: then the last counts."""
    if not (ours := _OURS.match(line)) or (b"\\" in line and b"\\u006" in line):  # an escaped i or d
        return None
    return ours[1] if line.count(b'"id"') == line.count(b'{"id"') else None


def record_in(line: bytes) -> Any:
    """The JSON of a shard's line, also as Python writes it; None if it is none."""
    for read in (from_line, read_line):
        with suppress(ValueError, RecursionError):
            return read(line)
    return None


def version_in(line: bytes) -> dict | None:
    """The version of a conversation in a shard's line; None if it is none."""
    return record if can_be_folded(record := record_in(line)) else None


def of_this_version(path: Path, record: dict) -> dict:
    """The same record. Raises UserError if another version of this project wrote it."""
    if record.get("schema_version", 1) != SCHEMA_VERSION:
        raise UserError(f"{path} was written by another version of this project: update this one")
    return record


def next_stamp(*folders: Path) -> str:
    """The current time for the name of a new shard, moved behind every stamp in `folders` if the clock went back."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:18]
    taken = [m for folder in folders if folder.is_dir() for p in folder.iterdir() if (m := _STAMP.match(p.name))]
    latest = max((m.group(0) for m in taken), default="")
    if stamp > latest:
        return stamp
    digits = str(int(latest.replace("T", "")) + 1)
    return f"{digits[:8]}T{digits[8:]}"


# -----------------------------------------------------------------------------
# the manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest, or an empty one."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {"shards": []}
    except ValueError:
        raise UserError(f"{path} is not JSON: restore it with `git checkout {path}`") from None


def describe_shard(path: Path, see: Callable[[bytes], None] = lambda line: None) -> dict[str, Any]:
    """{"name", "sha256", "bytes", "lines", "source"} of a shard, which is read once; `see` gets each of its lines.
    Raises UserError if it is gone."""
    digest, size, lines = hashlib.sha256(), 0, 0
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                size += len(line)
                lines += 1
                see(line)
    except FileNotFoundError:
        raise UserError(f"the shard {path} is gone: {bring_back(path)}, then `dvc repro`") from None
    return {"name": path.name, "sha256": digest.hexdigest(), "bytes": size, "lines": lines, "source": _source(path)}


def _source(path: Path) -> str:
    """What a shard's name says it is."""
    return next((kind for kind in ("chat", "import", "sample") if kind in path.stem.split("-")), "other")


def wanted_shards(folder: str | Path, manifest: str | Path, sample: bool) -> list[Path]:
    """The shards of a folder in their order, the sample's only if it is wanted."""
    return [path for path in shard_paths(folder, manifest) if sample or _source(path) != "sample"]


def keep_twice(folder: Path) -> None:
    """Make shards, and the keys beside them, that are hard links to DVC's cache, after a `dvc checkout` say, files of
    their own: what damages one leaves the other."""
    for path in folder.glob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            copy_file(path, path)
            path.chmod(0o444)


def bring_back(shard: str | Path) -> str:
    """What mends a shard that is gone or was changed.

    `dvc checkout` alone does not: `dvc repro` has written the damage into the folder's .dvc file by then. And `dvc get
    --force` puts no link in the place of a file.
    """
    tracked = f"{Path(shard).parent}.dvc"
    return (
        f"bring it back with `rm -f {shard} && dvc get . {shard} --rev HEAD -o {shard}`, or all shards of the last "
        f"commit, and none that came later, with `git checkout HEAD {tracked} && dvc checkout {tracked}` (or `dvc pull "
        f"{tracked}`)"
    )


def check_append_only(manifest: str | Path, folder: str | Path, current: list[dict], sample: bool) -> list[dict]:
    """Refuse shards that lack one of the previous manifest's, or change one; returns the new ones. Raises UserError,
    which names the shard and what brings it back."""
    present = {shard["name"]: shard for shard in current}
    previous = read_manifest(manifest)["shards"]
    for shard in previous:
        name, path = shard["name"], f"{folder}/{shard['name']}"
        if shard["source"] == "sample" and not sample:
            continue
        if name not in present:
            raise UserError(
                f"the shard {path} is gone: {bring_back(path)}; if it is meant to be gone, "
                f"delete its entry from {manifest}"
            )
        if present[name]["sha256"] != shard["sha256"]:
            raise UserError(f"the shard {path} was changed, and shards never change: {bring_back(path)}")
    known = {shard["name"] for shard in previous}
    return [shard for shard in current if shard["name"] not in known]


def track(repo: "Repo", folder: Path, manifest: Path) -> None:
    """`dvc add` of the folder of shards; one that no run has taken in yet is hashed in DVC's cache. Raises OSError if
    the cache does not take a shard."""
    from fine_tuning.common.dvc_files import add_to_dvc

    add_to_dvc(repo, folder, {shard["name"] for shard in read_manifest(manifest)["shards"]})
