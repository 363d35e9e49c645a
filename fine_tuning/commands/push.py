"""`push hub REPO`: the champion, or the masked conversations, into a repository on the Hugging Face hub."""

import argparse
import re
import tempfile
from pathlib import Path

from fine_tuning.common.dvc_files import md5_path, read_dvc
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import root
from fine_tuning.common.records import read_object
from fine_tuning.evaluation.records.champion_records import KEPT
from fine_tuning.model_management import champion
from fine_tuning.runtime.base_model import hub_id, read_base_card

CLEAN = Path("data/clean")
BASE = Path("models/base")


def push(arguments: argparse.Namespace) -> None:
    """Upload what was asked for and print the commit's address."""
    root()
    repo, what = arguments.repo, arguments.what
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo[:80]!r} is not a repository: give OWNER/NAME")
    from fine_tuning.data_collection.data_export import read_clean, write_formats
    from fine_tuning.model_management.hub import champion_card, champion_files, dataset_card, upload

    readable = "everybody" if arguments.public else f"whoever may read {repo}"
    if what == "data":
        if not CLEAN.is_dir():
            raise UserError(f"{CLEAN} is missing: run `dvc repro clean`")
        print(f"warning: masking misses some personal data: {readable} will read these conversations", flush=True)
        # One file: what is forgotten leaves the newest commit of the repository with the next push.
        with tempfile.TemporaryDirectory(prefix="clean-") as folder:
            lines = Path(folder) / "conversations.jsonl"
            count = write_formats(read_clean(CLEAN), {"openai": lines})["openai"]["exported"]
            files = {lines.name: lines, "README.md": dataset_card(count)}
            print(upload(repo, files, "Add conversations", "dataset", arguments.public))
        return
    named, folder = champion.read_champion(), champion.FOLDER
    if not named["version"]:
        raise UserError("there is no champion to push: `python -m fine_tuning promote`")
    if md5_path(folder) != read_dvc(champion.TRACKED):
        raise UserError(f"{folder} is not what {champion.TRACKED} says: `dvc pull --force {champion.TRACKED}`")
    if named.get("kind") == "prompt" and what != "gguf":
        raise UserError("the champion is the base model after a system prompt: there is only a GGUF to push")
    own = folder / "adapter"  # champions of before had no base.json there
    base = read_base_card(own if (own / "base.json").is_file() else BASE)
    if what == "adapter" and not hub_id(base):
        print(f"warning: no hub has the base model {Path(base['model']).name}: push it merged as well", flush=True)
    print(f"the model may repeat what it learned from conversations: {readable} can ask it", flush=True)
    evaluation = read_object(folder / KEPT / "metrics/evaluation.json")
    card = champion_card(folder, what, base, evaluation)
    files = {**champion_files(folder, what), "README.md": card}
    print(upload(repo, files, f"Version {named['version']}: {what}", "model", arguments.public))
