"""In: data/conversations. Out: data/manifest.json, which lists its shards; a lost or changed one fails the stage."""

from pathlib import Path

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.records import write_json
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.storage.shards import (
    IntakeSettings,
    check_append_only,
    count_conversations,
    describe_shards,
    versions,
)
from fine_tuning.data_collection.storage.tombstones import Tombstones

CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
FORGOTTEN = Path("data/forgotten.jsonl")


def main() -> None:
    sample = read_params("intake", IntakeSettings).sample
    shards = describe_shards(CONVERSATIONS, MANIFEST, sample)
    new = check_append_only(MANIFEST, CONVERSATIONS, shards, sample)
    if not shards:
        raise UserError("there are no conversations: `python -m fine_tuning import FILE`, or chat and then seal")
    refuse_forgotten([CONVERSATIONS / shard["name"] for shard in shards])
    total = count_conversations(CONVERSATIONS / shard["name"] for shard in shards)
    # DVC hashes dependencies after the stage: a shard that arrived meanwhile would count as seen without being read.
    if describe_shards(CONVERSATIONS, MANIFEST, sample) != shards:
        raise UserError(f"{CONVERSATIONS} changed while it was being read: run `dvc repro` again")
    lines = sum(shard["lines"] for shard in shards)
    write_json(MANIFEST, {"shards": shards, "total_conversations": total, "total_lines": lines})
    print(f"{count_of(len(shards), 'shard')}, {len(new)} of them new, {count_of(total, 'conversation')}")


def refuse_forgotten(paths: list[Path]) -> None:
    """A shard of another clone may bring back what was forgotten here."""
    tombstones = Tombstones(FORGOTTEN)
    returned = next(versions(paths, tombstones.names), None) if len(tombstones) else None
    if returned is not None:
        raise UserError("a forgotten conversation came back with a shard: `python -m fine_tuning forget --again`")


if __name__ == "__main__":
    run_stage(main)
