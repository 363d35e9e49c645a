"""`verify`: read again what is trusted unread. DVC never hashes an object twice, so a flipped byte spreads."""

import argparse
import hashlib
import json
import os
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fine_tuning.commands.bundle import kept_gguf
from fine_tuning.commands.rebuild import rebuild
from fine_tuning.common.dvc_files import cache_folder, dvc_objects, files_below, md5_file, open_repo, used_objects
from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores
from fine_tuning.common.project import CONVERSATIONS, MANIFEST, VOTES, root, sha256_file
from fine_tuning.common.protection import FOLDERS, OTHERS, open_to_others
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.storage.shards import bring_back, read_manifest
from fine_tuning.evaluation.records.champion_records import KEPT, kept_files
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError, open_servers
from fine_tuning.model_management import champion
from fine_tuning.model_management.answer_check import AnswersDiffer, compare_answers
from fine_tuning.model_management.model_deployer import DeploySettings, Probe, heal
from fine_tuning.model_management.model_registry import CHAMPION, CONTENT_TAG, ModelRegistry, open_registry
from fine_tuning.model_management.model_switcher import ModelSwitcher, live_history
from fine_tuning.model_management.sqlite_registry import ModelVersion
from fine_tuning.runtime.ollama_store import damaged_blobs

DAMAGED, OPEN, NOTE = "damaged", "open", "note"


@dataclass(frozen=True)
class Finding:
    """What is wrong and the command that repairs it. `open`: other users of this machine may read or replace it. A note
    is not damage: something is not here or could not be read."""

    kind: str
    what: str
    remedy: str


@dataclass
class Checked:
    """One place that was read, and what is wrong there."""

    place: str
    files: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, what: str, remedy: str) -> None:
        self.findings.append(Finding(kind, what, remedy))

    def count(self, file: Path) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + file.stat().st_size


def verify(arguments: argparse.Namespace) -> int:
    """Read everything and report. Returns the exit status: 1 if something is damaged or open to other users."""
    if arguments.rebuild:
        return rebuild()
    checkout, settings = root(), read_params("deploy", DeploySettings)
    parts = [check_privacy(checkout), check_shards(), check_cache(checkout)]
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


def check_privacy(checkout: Path) -> Checked:
    """See that other users can neither read the folders nor plant pickles for DVC to load."""
    from dvc.dirs import site_cache_dir

    with open_repo(checkout) as repo:
        site_cache = Path(site_cache_dir(repo.config["core"].get("site_cache_dir")))
    found = [f"{path.relative_to(checkout)} may be read by" for path in open_to_others(checkout)]
    if site_cache.stat().st_mode & OTHERS or site_cache.stat().st_uid not in (0, os.geteuid()):
        found.append(f"{site_cache} holds pickles that DVC loads, and is open to")
    findings = [Finding(OPEN, f"{what} other users of this machine", "make install") for what in found]
    return Checked("access by other users", len(FOLDERS), findings=findings)


# ----------------------------------------------------------------------------------------------------------------- DVC


NO_OUTPUT = (CONVERSATIONS, VOTES, champion.FOLDER)  # in DVC's cache, but of no stage


def check_shards() -> Checked:
    """Hash the conversations: intake reads no shard again whose size and time are as they were."""
    checked = Checked("the conversations' shards")
    for entry in read_manifest(MANIFEST)["shards"]:
        path = CONVERSATIONS / entry["name"]
        if not path.is_file():
            checked.add(NOTE, f"{path} is not here", f"dvc pull {CONVERSATIONS}")
            continue
        checked.count(path)
        if sha256_file(path) != entry["sha256"]:
            checked.add(DAMAGED, str(path), bring_back(path))
    return checked


def check_cache(checkout: Path) -> Checked:
    """Hash every object of DVC's cache: its name is its MD5. An output, and the memo's file, may be links to it."""
    checked, damaged = Checked(f"DVC's cache {cache_folder(checkout)}"), []
    objects = list(dvc_objects(checkout))
    with ThreadPoolExecutor(cores()) as pool:  # hashing lets other threads run
        hashes = tqdm(pool.map(md5_file, objects), "cache", len(objects), unit="file", disable=None, leave=False)
        for path, md5 in zip(objects, hashes, strict=True):
            checked.count(path)
            if md5 != (path.parent.name + path.name).removesuffix(".dir"):
                damaged.append(path)
    if not damaged:  # reading all of DVC's files takes a second
        return checked
    used: dict[str, set[str]] = {}
    with open_repo(checkout) as repo:
        for name, path in used_objects(repo):
            used.setdefault(name, set()).add(path)
    for path in damaged:
        users = sorted(used.get(path.parent.name + path.name, ()))
        place = shlex.quote(str(path))
        remedy = f"find {place} . -samefile {place} -delete && dvc fetch && dvc checkout"
        if users and all(any(Path(user).is_relative_to(own) for own in NO_OUTPUT) for user in users):
            kept = f".whetstone/damaged-{path.name}"
            remedy = f"cp {place} {kept} && {remedy} (no stage makes it again: keep {kept} where no remote has it)"
        else:
            remedy += (
                " (or `dvc repro` in place of both where no remote has it); if a stage has run since it was damaged, "
                "`dvc repro -f` afterwards: what was made of it is not known"
            )
        checked.add(DAMAGED, f"{path} (used by {', '.join(users) or 'nothing here'})", remedy)
    return checked


def check_remote(name: str | None) -> Checked:
    """Read and hash what the remote holds of this checkout's data."""
    from dvc.config import NoRemoteError, RemoteNotFoundError
    from dvc.exceptions import DvcException

    checked = Checked("DVC's remote")
    with open_repo() as repo:
        try:
            odb = repo.cloud.get_remote_odb(name)
        except RemoteNotFoundError:
            raise UserError(f"there is no remote {name}: `dvc remote list` shows them") from None
        except NoRemoteError:
            if names := list(repo.config["remote"]):
                checked.add(NOTE, f"no remote is the default of {', '.join(names)}", f"dvc remote default {names[0]}")
            else:
                checked.add(NOTE, "no remote is set", "dvc remote add -d NAME ADDRESS")
            return checked
        checked.place += f" {odb.path}"
        wanted = dict(used_objects(repo))
        try:
            for oid in tqdm(sorted(wanted), desc="remote", unit="file", disable=None, leave=False):
                digest, size = _hash_remote(odb, oid)
                if digest is None:
                    checked.add(NOTE, f"{wanted[oid]} is not in the remote", "dvc push")
                    continue
                checked.files, checked.bytes = checked.files + 1, checked.bytes + size
                if digest != oid.removesuffix(".dir"):
                    remedy = f"remove {odb.oid_to_path(oid)} from the remote, then dvc push"
                    checked.add(DAMAGED, f"{wanted[oid]} in the remote", remedy)
        except (DvcException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            checked.add(NOTE, f"the remote cannot be read: {reason}", "dvc remote list")
    return checked


def _hash_remote(odb: Any, oid: str) -> tuple[str | None, int]:
    """(MD5, bytes) of a remote object; (None, 0) if it is not there. Raises OSError if the remote refuses or does not
    answer."""
    from aiohttp import ClientError

    digest, size = hashlib.md5(), 0
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size
    except FileNotFoundError as error:
        # fsspec raises it over HTTP for a server that refuses or is down, too.
        if isinstance(error.__cause__, ClientError):
            raise OSError(str(error.__cause__)) from None
        return None, 0


# ------------------------------------------------------------------------------------------------------------ registry


def check_registry(registry: ModelRegistry) -> Checked:
    """Hash the artifacts of every version and its GGUF; see that there is a champion where there are promotions."""
    checked, versions = Checked(f"the registry {registry.uri}"), registry.versions()
    for version in versions:
        _check_artifacts(checked, registry, version)
    if champion.read_champion().get("version") and versions and registry.by_alias(CHAMPION) is None:
        checked.add(DAMAGED, "the registry has no champion", "python -m fine_tuning promote")
    return checked


def _check_artifacts(checked: Checked, registry: ModelRegistry, version: ModelVersion) -> None:
    label = f"version {version.number}"
    with tempfile.TemporaryDirectory() as name:
        try:
            folder = registry.download(version, "", Path(name))
            wanted = json.loads((folder / "files.json").read_bytes())
        except (UserError, OSError, ValueError):
            rebuilt = "dvc repro, then python -m fine_tuning promote"
            checked.add(DAMAGED, f"the artifacts of {label} are gone from {version.artifacts}", rebuilt)
            return
        remedy = (
            f"restore {version.artifacts} from a copy, or `git checkout {version.tags.get('git_commit')}` and repro"
        )
        wanted = {path: entry["sha256"] for path, entry in wanted.items()}
        if champion.content_of(wanted) != version.tags.get(CONTENT_TAG):
            checked.add(DAMAGED, f"files.json of {label} does not fit its tags", remedy)
        wanted["provenance/dvc.lock"] = version.tags.get("dvc_lock_sha256", "")
        for path, sha256 in sorted(wanted.items()):
            file = folder / path
            if path == champion.GGUF:
                continue  # it stays with DVC
            if not file.is_file():
                checked.add(DAMAGED, f"{path} of {label} is gone", remedy)
                continue
            checked.count(file)
            if sha256_file(file) != sha256:
                checked.add(DAMAGED, f"{path} of {label}", remedy)
    kept, fetched = kept_gguf(version), f"python -m fine_tuning deploy {version.number}"
    if kept is None:
        checked.add(NOTE, f"the GGUF of {label} is not in DVC's cache", f"{fetched} (fetches it)")
    elif sha256_file(kept) != version.tags.get("gguf_sha256"):
        checked.add(DAMAGED, f"the GGUF of {label}, {kept}", f"rm -f {kept} && {fetched} (fetches it)")
    else:
        checked.count(kept)


def check_champion(registry: ModelRegistry) -> Checked:
    """See that models/champion holds what models/champion.json says, and that the registry says the same."""
    described, folder = champion.read_champion(), champion.FOLDER
    checked = Checked("the champion's files")
    if not described.get("version"):
        return checked
    for file in files_below(folder):
        checked.count(file)
    if not checked.files:
        checked.add(NOTE, f"{folder} is not here", "dvc pull models/champion.dvc")
    else:
        restore = f"rm -r {folder} && dvc checkout models/champion.dvc"
        hashes = {"adapter": champion.WEIGHTS, "gguf": champion.GGUF, "merged": champion.MERGED}
        for key, path in hashes.items():
            wanted, file = described.get(f"{key}_sha256"), folder / path
            if wanted and (not file.is_file() or sha256_file(file) != wanted):
                checked.add(DAMAGED, str(file), restore)
        try:
            kept_files(champion.RECORD)
        except UserError:
            checked.add(DAMAGED, str(folder / KEPT), f"git checkout {folder}.dvc && {restore}")
    known = registry.by_alias(CHAMPION)
    if known is not None and known.tags.get("adapter_sha256") != described.get("adapter_sha256"):
        what = f"the registry's champion is version {known.number}, models/champion.json names another"
        checked.add(DAMAGED, what, "git pull, or python -m fine_tuning promote")
    return checked


# -------------------------------------------------------------------------------------------------------------- Ollama


def check_server(registry: ModelRegistry, server: OllamaClient) -> Checked:
    """Compare the manifests that were recorded at deployment with those that the server has now."""
    checked, switcher = Checked(f"Ollama at {server.host}"), ModelSwitcher(server, registry)
    try:
        digests = server.digests()
    except OllamaError as error:
        checked.add(NOTE, str(error), "ollama serve")
        return checked
    recorded = {}
    for version in registry.versions():
        digest = switcher.recorded_digest(version)
        if digest is None:
            continue
        recorded[digest] = version
        again = f"python -m fine_tuning deploy {version.number}"
        if version.tag not in digests:
            checked.add(NOTE, f"{version.tag} was deployed and is gone", again)
        elif digests[version.tag] != digest:
            checked.add(DAMAGED, f"{version.tag} is not what was deployed", f"ollama rm {version.tag}, then {again}")
        else:
            checked.files += 1
            _check_weights(checked, registry, server, version, digest, again)
    live = digests.get(switcher.live_name)
    if live is None and live_history(registry.versions(), switcher.key):
        checked.add(DAMAGED, f"{switcher.live_name} is gone", "python -m fine_tuning deploy")
    elif live is not None and live not in recorded:
        what = f"{switcher.live_name} is none of the versions that were deployed from here"
        checked.add(DAMAGED if recorded else NOTE, what, "python -m fine_tuning deploy")
    return checked


def _check_weights(
    checked: Checked, registry: ModelRegistry, server: OllamaClient, version: ModelVersion, digest: str, again: str
) -> None:
    """Hash what Ollama keeps of a version: it serves its files without hashing them. Where they cannot be read, compare
    its answers with the GGUF's."""
    if read := damaged_blobs(server.host, digest, version.tags.get("gguf_sha256", "")):
        checked.bytes += read[1]
        for blob in read[0]:
            checked.add(DAMAGED, f"{version.tag}: Ollama's {blob}", f"{heal(version.tag, [blob])}; {again}")
        return
    what = f"{version.tag}: Ollama's files cannot be read from here"
    elsewhere = "verify on the server's machine as a user who may read OLLAMA_MODELS"
    gguf = kept_gguf(version)
    if gguf is None:
        checked.add(NOTE, f"{what}, so only its manifest was compared", elsewhere)
        return
    try:
        probes = [Probe(**probe) for probe in json.loads(registry.read(version, champion.PROBES) or b"")]
        agreed = compare_answers(server, version.tag, gguf, probes)
    except AnswersDiffer as error:
        checked.add(DAMAGED, str(error), f"{heal(version.tag)}; {again}")
    except (UserError, ValueError, TypeError) as error:
        checked.add(NOTE, f"{what}, and its answers could not be compared: {error}", elsewhere)
    else:
        checked.add(NOTE, f"{what}; {agreed} tokens of its answers are those of the GGUF", elsewhere)


def _print(part: Checked) -> None:
    kinds = {finding.kind for finding in part.findings}
    state = next((kind.upper() for kind in (DAMAGED, OPEN) if kind in kinds), "ok")
    size = f", {part.bytes / 1e6:.1f} MB" if part.bytes else ""
    print(f"{state:7} {part.place}: {part.files} read{size}")
    for line in dict.fromkeys(f"  {f.kind}: {f.what}\n    fix: {f.remedy}" for f in part.findings):
        print(line)
