"""In: data/conversations. Out: data/manifest.json, which lists its shards; a lost or changed one fails the stage."""

from pathlib import Path

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import write_json
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.storage.shard_index import ShardIndex, shard_state
from fine_tuning.data_collection.storage.shards import (
    IntakeSettings,
    check_append_only,
    keep_twice,
    wanted_shards,
)
from fine_tuning.data_collection.storage.tombstones import Tombstones

CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
FORGOTTEN = Path("data/forgotten.jsonl")
MEMO = Path(".whetstone/memo/intake")


def main() -> None:
    sample = read_params("intake", IntakeSettings).sample
    tombstones = Tombstones(FORGOTTEN)
    if main_checkout() == Path.cwd():  # not in the copy that an experiment runs in
        keep_twice(CONVERSATIONS)
    before = states(sample)
    index = ShardIndex.read(list(before), main_checkout() / MEMO, tombstones)
    shards = [shard.entry for shard in index.shards.values()]
    new = check_append_only(MANIFEST, CONVERSATIONS, shards, sample)
    if not shards:
        raise UserError("there are no conversations: `python -m fine_tuning import FILE`, or chat and then seal")
    if any(shard.forgotten for shard in index.shards.values()):  # another clone's shard may bring it back
        raise UserError("a forgotten conversation came back with a shard: `python -m fine_tuning forget --again`")
    # DVC hashes dependencies after the stage: a shard that arrived meanwhile would count as seen without being read.
    if states(sample) != before:
        raise UserError(f"{CONVERSATIONS} changed while it was being read: run `dvc repro` again")
    count = index.count()
    lines = sum(shard["lines"] for shard in shards)
    write_json(MANIFEST, {"shards": shards, "total_conversations": count, "total_lines": lines})
    print(f"{count_of(len(shards), 'shard')}, {len(new)} of them new, {count_of(count, 'conversation')}")


def states(sample: bool) -> dict[Path, list[int] | None]:
    """The shards in their order, with what changes when one changes."""
    return {path: shard_state(path) for path in wanted_shards(CONVERSATIONS, MANIFEST, sample)}


if __name__ == "__main__":
    run_stage(main)
