"""The champion's folder beside its weights: its training conversations and the evaluation it was promoted by.

A candidate that is the champion is not compared with itself. The records of the evaluation that made it the champion
are restored byte for byte, so that the verdict behind the promotion stands and can be computed again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import code_sha256, files_sha256, main_checkout, sha256_file
from fine_tuning.common.records import copy_file, read_json, read_jsonl
from fine_tuning.common.settings import Settings
from fine_tuning.evaluation.records.data_changes import MEMBERS
from fine_tuning.evaluation.records.record_types import Item, conversation_of
from fine_tuning.evaluation.records.settings import ADAPTER, PROMPT

LEARNED = "left out: the champion was trained on the same or on near-duplicates"
KEPT = "evaluation"  # in the champion's folder: the files of its evaluation, each at its path in the checkout


def is_champion(record: Path, adapter: Path, gguf: Path, kind: Mapping[str, Any]) -> bool:
    """Whether adapter, GGUF and kind of version are those of the champion that the JSON file `record` names. A kind has
    "name" and, where it is no adapter, "system_prompt" and "examples"."""
    champion = read_json(record)
    own = {"name": champion.get("kind", ADAPTER), "system_prompt": champion.get("system_prompt")}
    own["examples"] = champion.get("examples", 0)
    # The GGUF of a prompt version is the base's, which the adapter was made for.
    pairs = (("adapter_sha256", adapter), *([] if own["name"] == PROMPT else [("gguf_sha256", gguf)]))
    same = champion.get("version") is not None and all(own[key] == kind[key] for key in own if key in kind)
    return same and all(sha256_file(path) == champion.get(key) for key, path in pairs)


def method_sha256(*settings: Settings) -> str:
    """Identity of how an evaluation is done: the code that dvc.yaml names as the evaluate stage's dependencies, and the
    stage's parameters. Code that only other stages run, such as that of the verdict, changes no record."""
    values = json.dumps([code_sha256("evaluate"), *(section.model_dump() for section in settings)], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def restore_records(record: Path, metrics: Path, method: str) -> bool:
    """Copy the files of the champion's evaluation to where they were written; False if there are none, or if they were
    made in another way than `method`.

    Args:
        record: the JSON file that names the champion.
        metrics: path of the evaluation's metrics in the checkout; their suite names the method.
    """
    folder, files = champion_folder(record) / KEPT, kept_files(record)
    if folder / metrics not in files or read_json(folder / metrics)["suite"].get("method_sha256") != method:
        return False
    for file in files:
        copy_file(file, file.relative_to(folder))
    return True


def kept_files(record: Path) -> list[Path]:
    """The files of the champion's evaluation; none where the JSON file `record`, which names it, has no digest of them.
    Raises UserError if they are not those that were kept at the promotion."""
    folder, digest = champion_folder(record), read_json(record).get("evaluation_sha256")
    files = sorted(path for path in (folder / KEPT).rglob("*") if path.is_file()) if digest else []
    if files and files_sha256(files, folder / KEPT) != digest:
        mend = f"`git checkout {folder}.dvc && dvc checkout --force {folder}`, then `dvc repro`"
        raise UserError(f"{folder / KEPT} is not what was kept at the promotion: run {mend}")
    return files


def without_learned(items: Sequence[Item], record: Path) -> tuple[list[Item], int]:
    """The items that the champion was not trained on, nor on a near-duplicate; and how many conversations are left out.

    Another salt, or the ledgers of two branches, may have dealt its training conversations into the test split. Raises
    UserError if none is left.
    """
    members = champion_folder(record) / MEMBERS
    if read_json(record).get("version") is None or not members.is_file():
        return list(items), 0
    learned = {member["id"] for member in read_jsonl(members)}
    clusters = {item.cluster for item in items if conversation_of(item.id) in learned}
    kept = [item for item in items if item.cluster not in clusters]
    if not kept:
        raise UserError("the champion was trained on the whole test split: collect more, or set prepare.salt back")
    left_out = {conversation_of(item.id) for item in items if item.cluster in clusters}
    return kept, len(left_out)


def called_champion(verdict: dict[str, Any], champion: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics/comparison.json for a candidate that is the champion: it says so, and how it became it."""
    said, forced = champion.get("verdict") or "none", champion.get("forced_reason")
    how = f"over the verdict {said} by force ({forced})" if forced else f"by the verdict {said}"
    reason = f"the candidate is the champion, version {champion['version']}, promoted {how}"
    named = {"version": champion["version"], "verdict": said, "forced_reason": forced}
    return verdict | {"champion": named, "reasons": [reason, *verdict["reasons"]]}


def champion_folder(record: Path) -> Path:
    """Where the files of the champion lie that the JSON file `record` names, such as models/champion.json.

    A temporary experiment's folder has no files that no stage depends on: there it is the main checkout's.
    """
    folder = record.with_suffix("")
    return folder if folder.is_dir() else main_checkout() / folder
