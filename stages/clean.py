"""In: the manifest's shards. Out: data/clean (files of each shard, rejected and clusters.jsonl), metrics/clean.json."""

import json
from collections.abc import Iterable
from pathlib import Path

import orjson
from tqdm import tqdm

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import read_json, write_json
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.cleaning.shard_cleaner import clean_shards
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.data_collection.data_cleaner import CleanSettings
from fine_tuning.data_collection.storage.shards import bring_back

CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
TOKENIZER = Path("models/base/tokenizer.json")
CLEAN = Path("data/clean")
METRICS = Path("metrics/clean.json")
MEMO = Path(".whetstone/memo/clean")


def main() -> None:
    settings = read_params("clean", CleanSettings)
    shards = [(CONVERSATIONS / shard["name"], shard["sha256"]) for shard in read_json(MANIFEST)["shards"]]
    require_shards(path for path, _ in shards)
    with tqdm(desc="cleaning", unit="piece", mininterval=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = clean_shards(shards, CLEAN, main_checkout() / MEMO, settings, control_tokens(), show)
    if summary["kept"] == 0:
        raise UserError(
            f"no conversation passed the filters: see {CLEAN / 'rejected.jsonl'} and `clean` in params.yaml"
        )
    write_json(METRICS, summary)
    print(f"{summary['kept']} of {summary['seen']} kept; dropped: {json.dumps(summary['reasons'])}")


def require_shards(paths: Iterable[Path]) -> None:
    """Notice a shard that went between intake and here."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"the shard {path} is gone: {bring_back(path)}, then `dvc repro`")


def control_tokens() -> tuple[str, ...]:
    """What the base's tokenizer reads as commands, and ChatML's, which every template may use."""
    added = orjson.loads(TOKENIZER.read_bytes()).get("added_tokens", [])
    return tuple(sorted({token["content"] for token in added if token.get("special")} | set(CONTROL_TOKENS)))


if __name__ == "__main__":
    run_stage(main)
