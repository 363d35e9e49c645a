"""Clean conversations and the tokenizer in; rows, pairs and thumbs of each split, the ledger and counts out."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from fine_tuning.common.columns import release_memory
from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import open_engine
from fine_tuning.common.project import main_checkout, sha256_file
from fine_tuning.common.records import replacing, write_csv, write_json
from fine_tuning.common.results import Memo
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_preparation.catalogue import FACTS, Catalogue, ConversationFiles
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder, PrepareSettings, loaded
from fine_tuning.data_preparation.encoded_memo import ENCODED, EncodedMemo
from fine_tuning.data_preparation.preferences import find_preferences
from fine_tuning.data_preparation.split_writer import WRITTEN, write_splits
from fine_tuning.data_preparation.splits import SPLITS, open_ledger
from fine_tuning.data_preparation.tally import length_histogram, report, statistics, tokens_by_source
from fine_tuning.schema.canaries import planted
from fine_tuning.schema.chat_format import ChatSettings, load_tokenizer
from fine_tuning.schema.prepared import row_batch, write_batches

CLEAN = Path("data/clean")
CLUSTERS = CLEAN / "clusters.jsonl"
REJECTED = CLEAN / "rejected.jsonl"
TOKENIZER = (
    Path("models/base/tokenizer.json"),
    Path("models/base/tokenizer_config.json"),
    Path("models/base/chat_template.jinja"),
)
PREPARED, CANARIES = Path("data/prepared"), Path("train/canaries.parquet")
PREFERENCES, THUMBS = Path("data/preferences"), Path("data/thumbs")
LEDGER = Path("data/splits.txt")
MEMO = Path(".whetstone/memo/prepare")
METRICS = Path("metrics/prepare.json")
LENGTHS = Path("metrics/plots/prepare_lengths.csv")
TOKENS = Path("metrics/plots/prepare_tokens.csv")


def main() -> None:
    settings, chat = read_params("prepare", PrepareSettings), read_params("chat", ChatSettings)
    base = TOKENIZER[0].parent.resolve()
    if not all(path.is_file() for path in TOKENIZER):
        load_tokenizer(base)  # which says what is missing
    dealing = settings.model_dump(mode="json", exclude={"engine", "canaries"})
    builder = DatasetBuilder(**dealing, tokenizer=base, **chat.model_dump())
    memo, made_by = main_checkout() / MEMO, [[sha256_file(path) for path in TOKENIZER], chat.model_dump()]
    shards = [path for path in sorted(CLEAN.glob("*.jsonl")) if path not in (CLUSTERS, REJECTED)]
    clean = ConversationFiles(shards, Memo(memo / FACTS, "prepare"))
    ledger, written = open_ledger(LEDGER, settings.salt), Memo(memo / WRITTEN, "prepare")
    with (
        open_engine(settings.engine, "prepare", packages=("orjson", "pyarrow")) as engine,
        EncodedMemo(memo / ENCODED, made_by) as encoded,
        tqdm(desc="tokenise", unit=" conversations", leave=False, disable=None) as bar,
    ):
        catalogue = builder.catalogue(clean, clusters(), ledger, engine, dropped_duplicates())
        release_memory()
        chosen = dict(builder.choose(clean, catalogue, encoded, engine, bar.update))
        release_memory()
        key = [*made_by, settings.salt, settings.train_on]
        tallies = write_splits(PREPARED, chosen, clean, catalogue, encoded, written, key, engine)
    written.remove_unused()
    if settings.canaries:
        secrets = row_batch(planted(settings.canaries, loaded(base), chat.system_prompt, chat.max_length))
        with replacing(PREPARED / CANARIES) as file:
            write_batches(file, tallies["train"].watch([secrets]))
    left_out = catalogue.count_left_out()
    require_every_split(catalogue)
    new = catalogue.remember(ledger)
    metrics = statistics(tallies, left_out, catalogue.all_characters, catalogue.characters())
    preferred = find_preferences(clean, catalogue, builder)
    preferred.write(PREFERENCES, THUMBS)
    metrics["preferences"] = preferred.statistics()
    write_json(METRICS, metrics)
    for path, rows in ((LENGTHS, length_histogram(tallies)), (TOKENS, tokens_by_source(tallies))):
        write_csv(path, rows[0], map(dict.values, rows))
    for said in chain(report(tallies, left_out, new), preferred.report()):
        print(f"prepare: {said}")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        while block := file.readlines(1 << 20):
            yield from orjson.loads(b"[%b]" % b",".join(block))


def clusters() -> Iterator[tuple[str, str]]:
    """(conversation id, cluster id) of those whose cluster has another's name."""
    return ((line["id"], line["cluster"]) for line in lines(CLUSTERS))


def dropped_duplicates() -> Iterator[tuple[str, str]]:
    """(id of a duplicate that cleaning dropped, id of the conversation that stays for it)."""
    for line in lines(REJECTED):
        if line["reason"] in ("duplicate", "near_duplicate"):
            yield line["id"], line["value"]


def require_every_split(catalogue: Catalogue) -> None:
    reasons = catalogue.count_left_out().most_common()
    why = f" (left out: {', '.join(f'{count} {reason}' for reason, count in reasons)})" if reasons else ""
    for split in SPLITS:
        if not catalogue.count(split):
            raise UserError(
                f"no conversation is left for the {split} split{why}: "
                "add conversations with `python -m fine_tuning import`, or change prepare in params.yaml"
            )


if __name__ == "__main__":
    run_stage(main)
