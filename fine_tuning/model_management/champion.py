"""The champion's files: models/champion under DVC, and models/champion.json under git, which says what they are."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fine_tuning.common.dvc_files import cached, dvc_add, fetch, files_below, listing, md5_path
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import files_sha256, sha256_file
from fine_tuning.common.records import copy_file, read_json, write_json, write_jsonl
from fine_tuning.evaluation.records.champion_records import KEPT
from fine_tuning.evaluation.records.data_changes import MEMBERS, training_members
from fine_tuning.model_management.model_deployer import Probe
from fine_tuning.model_management.model_registry import ModelRegistry
from fine_tuning.model_management.sqlite_registry import ModelVersion

RECORD = Path("models/champion.json")
FOLDER = Path("models/champion")
TRACKED = Path("models/champion.dvc")
STAGED = Path("models/.champion.new")
PROBES = "probes.json"
WEIGHTS, GGUF, CREATE = "adapter/adapter_model.safetensors", "package/model.gguf", "package/create.json"
MERGED = "merged/model.safetensors"
KIND = "package/kind.json"  # of versions that are more than an adapter: kind, system prompt, number of examples
# What makes a version another version; cards, reports and time stamps do not.
CONTENT = (WEIGHTS, "adapter/adapter_config.json", GGUF, CREATE)
VERDICT_TAGS = ("verdict", "forced_reason", "eval_set_sha256")
FILES_TAG = "champion_md5"  # DVC's hash of models/champion as it was with a version


def read_champion() -> dict[str, Any]:
    """The content of models/champion.json. Raises UserError if it is missing or damaged."""
    try:
        return dict(read_json(RECORD))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{RECORD} is missing or damaged: `git checkout {RECORD}`") from None


def content_of(hashes: dict[str, str]) -> str:
    """SHA-256 of what a version is, from the SHA-256 of its files by their paths in it."""
    wanted = {path: hashes.get(path) for path in CONTENT} | ({KIND: hashes[KIND]} if KIND in hashes else {})
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def keep_files(folders: Sequence[tuple[str, Path]], probes: list[Probe], train: Sequence[Path]) -> None:
    """Copy folders or files, each under its name, the probes and the list of what was in the files of the prepared
    split train to models/champion, and give them to DVC."""
    shutil.rmtree(STAGED, ignore_errors=True)
    for place, folder in folders:
        for file in files_below(folder) if folder.is_dir() else [folder]:
            copy_file(file, STAGED / place / file.relative_to(folder))
    write_json(STAGED / PROBES, [asdict(probe) for probe in probes])
    write_jsonl(STAGED / MEMBERS, training_members(train))
    _take_staged()


def _take_staged() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    STAGED.rename(FOLDER)
    dvc_add(FOLDER)


def names_conversations(path: str) -> bool:
    """Whether a file of models/champion, by its path in there, holds ids or words, which `forget` may have removed."""
    return path == MEMBERS or path.startswith(f"{KEPT}/")


def fetch_files(version: ModelVersion) -> None:
    """Bring the files that were kept when the version was champion into DVC's cache, from a remote if need be. Raises
    UserError if the version never was champion, or its files are neither here nor in the remote."""
    md5 = version.tags.get(FILES_TAG)
    if not md5:
        raise UserError(
            f"version {version.number} was never champion: `git checkout {version.tags.get('git_commit')}`, "
            "`dvc checkout` and promote there"
        )
    files = (listing(Path.cwd(), md5) or {}) if fetch([md5]) else {}
    fetch(files.values())
    if not files or not fetch(md5 for path, md5 in files.items() if not names_conversations(path)):
        raise UserError(
            f"the files of version {version.number} are neither in DVC's cache nor in its remote: `dvc push` at the "
            "commit that promoted it, in a checkout that has them, then run again"
        )


def restore_files(version: ModelVersion) -> None:
    shutil.rmtree(STAGED, ignore_errors=True)
    files = listing(Path.cwd(), version.tags[FILES_TAG]) or {}
    sources = {path: cached(Path.cwd(), md5) for path, md5 in files.items()}
    whole = all(source for path, source in sources.items() if path.startswith(f"{KEPT}/"))
    for path, source in sources.items():
        if source and (whole or not path.startswith(f"{KEPT}/")):  # what is left of an evaluation gives no verdict
            copy_file(source, STAGED / path)
    _take_staged()


def name_champion(registry: ModelRegistry, version: ModelVersion, tags: dict[str, str], who: str) -> None:
    """Write models/champion.json, and the verdict among `tags` to the version's tags: it may be another than the one
    that it was registered with. Who promoted, when and by what verdict stays when the command is repeated."""
    known, merged, kept = read_champion(), FOLDER / MERGED, FOLDER / KEPT
    adapter_sha256 = sha256_file(FOLDER / WEIGHTS)
    if known.get("version") != version.number or known.get("adapter_sha256") != adapter_sha256:
        known = {"promoted_at": datetime.now(UTC).isoformat(timespec="seconds"), "promoted_by": who}
        known |= {key: tags[key] for key in VERDICT_TAGS if key in tags}
        registry.delete_tags(version.number, [key for key in VERDICT_TAGS if key in version.tags and key not in tags])
        registry.set_tags(version.number, {**known, FILES_TAG: str(md5_path(FOLDER))})
    described = {
        "version": version.number,
        "name": version.name,
        "adapter_sha256": adapter_sha256,
        **({"merged_sha256": sha256_file(merged)} if merged.is_file() else {}),
        "gguf_sha256": sha256_file(FOLDER / GGUF),
        **({"evaluation_sha256": files_sha256(files_below(kept), kept)} if kept.is_dir() else {}),
        **(read_json(FOLDER / KIND) if (FOLDER / KIND).is_file() else {}),
        "git_commit": version.tags.get("git_commit"),
        **{key: known[key] for key in ("promoted_at", "promoted_by", *VERDICT_TAGS) if key in known},
    }
    write_json(RECORD, described)
