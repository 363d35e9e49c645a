"""`verify`: read again what is trusted unread. DVC never hashes an object twice, so a flipped byte spreads."""

import argparse
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fine_tuning.commands.bundle import kept_gguf
from fine_tuning.commands.promote import content_of
from fine_tuning.commands.rebuild import rebuild
from fine_tuning.common.dvc_files import cache_folder, dvc_objects, files_below, md5_file, used_objects
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import root, sha256_file
from fine_tuning.common.protection import FOLDERS, OTHERS, open_to_others
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.champion_records import KEPT, kept_files
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError, open_servers
from fine_tuning.model_management.answer_check import AnswersDiffer, compare_answers
from fine_tuning.model_management.champion import (
    CHAMPION_FILES,
    CHAMPION_JSON,
    GGUF,
    MERGED,
    PROBES,
    WEIGHTS,
    read_champion,
)
from fine_tuning.model_management.model_deployer import LIVE, DeploySettings, Probe, heal
from fine_tuning.model_management.model_registry import (
    CHAMPION,
    CONTENT_TAG,
    ModelRegistry,
    ModelVersion,
    open_registry,
)
from fine_tuning.model_management.model_switcher import ModelSwitcher, live_history
from fine_tuning.model_management.ollama_store import damaged_blobs

CHUNK_BYTES = 1 << 20
DAMAGED, OPEN, NOTE = "damaged", "open", "note"


@dataclass(frozen=True)
class Finding:
    """What is wrong and the command that repairs it. `open`: other users of this machine may read or replace it. A note
    is not damage: something is not here or could not be read."""

    kind: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Checked:
    """One place that was read."""

    place: str
    files: int
    bytes: int
    findings: list[Finding]


def verify(arguments: argparse.Namespace) -> int:
    """Read everything and report. Returns the exit status: 1 if something is damaged or open to other users."""
    if arguments.rebuild:
        return rebuild()
    checkout, settings = root(), read_params("deploy", DeploySettings)
    parts = [check_privacy(checkout), check_cache(checkout)]
    if not arguments.local:
        parts.append(check_remote(arguments.remote))
    registry = open_registry(settings.name)
    parts += [check_registry(registry), check_champion(registry)]
    if not arguments.local:
        with open_servers(settings, arguments.host) as servers:
            parts += [check_server(registry, server) for server in servers]
    if arguments.json:
        print(json.dumps([asdict(part) for part in parts], indent=2))
    else:
        for part in parts:
            _print(part)
    return int(any(finding.kind != NOTE for part in parts for finding in part.findings))


# --------------------------------------------------------------------------------------------------------- other users


def check_privacy(checkout: Path) -> Checked:
    """See that other users can neither read the folders nor plant pickles for DVC to load."""
    from dvc.dirs import site_cache_dir
    from dvc.repo import Repo

    with Repo(str(checkout)) as repo:
        site_cache = Path(site_cache_dir(repo.config["core"].get("site_cache_dir")))
    found = [f"{path.relative_to(checkout)} may be read by" for path in open_to_others(checkout)]
    if site_cache.stat().st_mode & OTHERS or site_cache.stat().st_uid not in (0, os.geteuid()):
        found.append(f"{site_cache} holds pickles that DVC loads, and is open to")
    findings = [Finding(OPEN, f"{what} other users of this machine", "make install") for what in found]
    return Checked("access by other users", len(FOLDERS), 0, findings)


# ----------------------------------------------------------------------------------------------------------------- DVC


def check_cache(checkout: Path) -> Checked:
    """Hash every object of DVC's cache: its name is its MD5."""
    objects, damaged = list(dvc_objects(checkout)), []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing lets other threads run
        hashes = pool.map(md5_file, objects)
        for path, md5 in zip(
            objects, tqdm(hashes, "cache", len(objects), unit="file", disable=None, leave=False), strict=True
        ):
            if md5 != (path.parent.name + path.name).removesuffix(".dir"):
                damaged.append(path)
    findings, used = [], _users(checkout) if damaged else {}  # reading all of DVC's files takes a second
    for path in damaged:
        users = ", ".join(sorted(used.get(path.parent.name + path.name, ()))) or "nothing here"
        remedy = f"rm -f {path} && dvc fetch (or `dvc repro` where no remote has it)"
        findings.append(Finding(DAMAGED, f"{path} (used by {users})", remedy))
    size = sum(path.stat().st_size for path in objects)
    return Checked(f"DVC's cache {cache_folder(checkout)}", len(objects), size, findings)


def _users(checkout: Path) -> dict[str, set[str]]:
    """{object: paths in the workspace with its content}."""
    from dvc.repo import Repo

    used: dict[str, set[str]] = {}
    with Repo(str(checkout)) as repo:
        for name, path in used_objects(repo):
            used.setdefault(name, set()).add(path)
    return used


def check_remote(name: str | None) -> Checked:
    """Read and hash what the remote holds of this checkout's data."""
    from dvc.config import NoRemoteError, RemoteNotFoundError
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    findings, files, size = [], 0, 0
    with Repo() as repo:
        try:
            odb = repo.cloud.get_remote_odb(name)
        except RemoteNotFoundError:
            raise UserError(f"there is no remote {name}: `dvc remote list` shows them") from None
        except NoRemoteError:
            note = Finding(NOTE, "no remote is set", "dvc remote add -d NAME ADDRESS")
            if names := list(repo.config["remote"]):
                note = Finding(
                    NOTE, f"no remote is the default of {', '.join(names)}", f"dvc remote default {names[0]}"
                )
            return Checked("DVC's remote", 0, 0, [note])
        wanted = dict(used_objects(repo))
        try:
            for oid in tqdm(sorted(wanted), desc="remote", unit="file", disable=None, leave=False):
                digest, read = _hash_remote(odb, oid)
                if digest is None:
                    findings.append(Finding(NOTE, f"{wanted[oid]} is not in the remote", "dvc push"))
                    continue
                files, size = files + 1, size + read
                if digest != oid.removesuffix(".dir"):
                    remedy = f"remove {odb.oid_to_path(oid)} from the remote, then dvc push"
                    findings.append(Finding(DAMAGED, f"{wanted[oid]} in the remote", remedy))
        except (DvcException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            findings.append(Finding(NOTE, f"the remote cannot be read: {reason}", "dvc remote list"))
        return Checked(f"DVC's remote {odb.path}", files, size, findings)


def _hash_remote(odb: Any, oid: str) -> tuple[str | None, int]:
    """(MD5, bytes) of a remote object; (None, 0) if it is not there.

    Raises:
        OSError: the remote refuses or does not answer.
    """
    from aiohttp import ClientError

    digest, size = hashlib.md5(), 0
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError as error:
        # fsspec raises it over HTTP for a server that refuses or is down, too.
        if isinstance(error.__cause__, ClientError):
            raise OSError(str(error.__cause__)) from None
        return None, 0
    return digest.hexdigest(), size


# ------------------------------------------------------------------------------------------------------------ registry


def check_registry(registry: ModelRegistry) -> Checked:
    """Hash the artifacts of every version and its GGUF; see that there is a champion where there are promotions."""
    findings: list[Finding] = []
    files = size = 0
    versions = registry.versions()
    for version in versions:
        found, count, read = _check_version(registry, version)
        findings, files, size = findings + found, files + count, size + read
    if read_champion().get("version") and versions and registry.by_alias(CHAMPION) is None:
        findings.append(Finding(DAMAGED, "the registry has no champion", "python -m fine_tuning promote"))
    return Checked(f"the registry {registry.uri}", files, size, findings)


def _check_version(registry: ModelRegistry, version: ModelVersion) -> tuple[list[Finding], int, int]:
    label = f"version {version.number}"
    rebuilt = "dvc repro, then python -m fine_tuning promote"
    findings, files, size = [], 0, 0
    with tempfile.TemporaryDirectory() as name:
        try:
            folder = registry.download(version, "", Path(name))
            wanted = json.loads((folder / "files.json").read_bytes())
        except (UserError, OSError, ValueError):
            return [Finding(DAMAGED, f"the artifacts of {label} are gone from {version.artifacts}", rebuilt)], 0, 0
        remedy = (
            f"restore {version.artifacts} from a copy, or `git checkout {version.tags.get('git_commit')}` and repro"
        )
        wanted = {path: entry["sha256"] for path, entry in wanted.items()}
        if content_of(wanted) != version.tags.get(CONTENT_TAG):
            findings.append(Finding(DAMAGED, f"files.json of {label} does not fit its tags", remedy))
        wanted["provenance/dvc.lock"] = version.tags.get("dvc_lock_sha256", "")
        for path, sha256 in sorted(wanted.items()):
            if path == GGUF:
                continue  # it stays with DVC
            file = folder / path
            if not file.is_file():
                findings.append(Finding(DAMAGED, f"{path} of {label} is gone", remedy))
                continue
            files, size = files + 1, size + file.stat().st_size
            if sha256_file(file) != sha256:
                findings.append(Finding(DAMAGED, f"{path} of {label}", remedy))
    kept, fetched = kept_gguf(version), f"python -m fine_tuning deploy {version.number}"
    if kept is None:
        findings.append(Finding(NOTE, f"the GGUF of {label} is not in DVC's cache", f"{fetched} (fetches it)"))
    elif sha256_file(kept) != version.tags.get("gguf_sha256"):
        findings.append(Finding(DAMAGED, f"the GGUF of {label}, {kept}", f"rm -f {kept} && {fetched} (fetches it)"))
    else:
        files, size = files + 1, size + kept.stat().st_size
    return findings, files, size


def check_champion(registry: ModelRegistry) -> Checked:
    """See that models/champion holds what models/champion.json says, and that the registry says the same."""
    champion, findings = read_champion(), []
    if not champion.get("version"):
        return Checked("the champion's files", 0, 0, [])
    files = files_below(CHAMPION_FILES) if CHAMPION_FILES.is_dir() else []
    if not files:
        findings.append(Finding(NOTE, f"{CHAMPION_FILES} is not here", "dvc pull models/champion.dvc"))
    else:
        restore = f"rm -r {CHAMPION_FILES} && dvc checkout models/champion.dvc"
        for key, path in (("adapter_sha256", WEIGHTS), ("gguf_sha256", GGUF), ("merged_sha256", MERGED)):
            file = CHAMPION_FILES / path
            if key in champion and (not file.is_file() or sha256_file(file) != champion[key]):
                findings.append(Finding(DAMAGED, str(file), restore))
        try:
            kept_files(CHAMPION_JSON)
        except UserError:
            restore = f"git checkout {CHAMPION_FILES}.dvc && {restore}"
            findings.append(Finding(DAMAGED, str(CHAMPION_FILES / KEPT), restore))
    known = registry.by_alias(CHAMPION)
    if known is not None and known.tags.get("adapter_sha256") != champion.get("adapter_sha256"):
        what = f"the registry's champion is version {known.number}, models/champion.json names another"
        findings.append(Finding(DAMAGED, what, "git pull, or python -m fine_tuning promote"))
    return Checked("the champion's files", len(files), sum(file.stat().st_size for file in files), findings)


# -------------------------------------------------------------------------------------------------------------- Ollama


def check_server(registry: ModelRegistry, server: OllamaClient) -> Checked:
    """Compare the manifests that were recorded at deployment with those that the server has now."""
    switcher, findings, seen, size = ModelSwitcher(server, registry), [], 0, 0
    try:
        digests = server.digests()
    except OllamaError as error:
        return Checked(f"Ollama at {server.host}", 0, 0, [Finding(NOTE, str(error), "ollama serve")])
    recorded = {}
    for version in registry.versions():
        digest = switcher.recorded_digest(version)
        if digest is None:
            continue
        recorded[digest] = version
        redo = f"ollama rm {version.tag}, then python -m fine_tuning deploy {version.number}"
        if version.tag not in digests:
            findings.append(Finding(NOTE, f"{version.tag} was deployed and is gone", redo.partition(", then ")[2]))
        elif digests[version.tag] != digest:
            findings.append(Finding(DAMAGED, f"{version.tag} is not what was deployed", redo))
        else:
            found, read = _check_weights(registry, server, version, digest)
            findings, seen, size = findings + found, seen + 1, size + read
    live = digests.get(f"{registry.name}:{LIVE}")
    if live is None and live_history(registry.versions(), switcher.key):
        findings.append(Finding(DAMAGED, f"{registry.name}:{LIVE} is gone", "python -m fine_tuning deploy"))
    elif live is not None and live not in recorded:
        what = f"{registry.name}:{LIVE} is none of the versions that were deployed from here"
        findings.append(Finding(DAMAGED if recorded else NOTE, what, "python -m fine_tuning deploy"))
    return Checked(f"Ollama at {server.host}", seen, size, findings)


def _check_weights(
    registry: ModelRegistry, server: OllamaClient, version: ModelVersion, digest: str
) -> tuple[list[Finding], int]:
    """Hash what Ollama keeps of a version: it serves its files without hashing them. Where they cannot be read, compare
    its answers with the GGUF's. Returns the bytes read, too."""
    again = f"python -m fine_tuning deploy {version.number}"
    if read := damaged_blobs(server.host, digest, version.tags.get("gguf_sha256", "")):
        found = [
            Finding(DAMAGED, f"{version.tag}: Ollama's {blob}", f"{heal(version.tag, [blob])}; {again}")
            for blob in read[0]
        ]
        return found, read[1]
    what = f"{version.tag}: Ollama's files cannot be read from here"
    elsewhere = "verify on the server's machine as a user who may read OLLAMA_MODELS"
    gguf = kept_gguf(version)
    if gguf is None:
        return [Finding(NOTE, f"{what}, so only its manifest was compared", elsewhere)], 0
    try:
        probes = [Probe(**probe) for probe in json.loads(registry.read(version, PROBES) or b"")]
        agreed = compare_answers(server, version.tag, gguf, probes)
    except AnswersDiffer as error:
        return [Finding(DAMAGED, str(error), f"{heal(version.tag)}; {again}")], 0
    except (UserError, ValueError, TypeError) as error:
        return [Finding(NOTE, f"{what}, and its answers could not be compared: {error}", elsewhere)], 0
    return [Finding(NOTE, f"{what}; {agreed} tokens of its answers are those of the GGUF", elsewhere)], 0


# -------------------------------------------------------------------------------------------------------------- report


def _print(part: Checked) -> None:
    kinds = {finding.kind for finding in part.findings}
    state = next((kind.upper() for kind in (DAMAGED, OPEN) if kind in kinds), "ok")
    size = f", {part.bytes / 1e6:.1f} MB" if part.bytes else ""
    print(f"{state:7} {part.place}: {part.files} read{size}")
    for line in dict.fromkeys(f"  {f.kind}: {f.what}\n    fix: {f.remedy}" for f in part.findings):
        print(line)
