"""Clean conversations and the tokenizer in; train, validation and test rows, the ledger of splits and counts out."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from fine_tuning.data_preparation.canaries import planted
from fine_tuning.data_preparation.catalogue import Catalogue, ConversationFiles
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder, Example, PrepareSettings, write_split
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.data_preparation.tally import Tally, length_histogram, statistics, tokens_by_source
from fine_tuning.data_preparation.tokenizer import ChatSettings, load_tokenizer
from fine_tuning.engine import open_engine
from fine_tuning.errors import UserError, run
from fine_tuning.records import read_jsonl, replacing, write_json, write_jsonl
from fine_tuning.settings import read_params

CLEAN = Path("data/clean")
CLUSTERS = CLEAN / "clusters.jsonl"
REJECTED = CLEAN / "rejected.jsonl"
TOKENIZER = (
    Path("models/base/tokenizer.json"),
    Path("models/base/tokenizer_config.json"),
    Path("models/base/chat_template.jinja"),
)
PREPARED = Path("data/prepared")
LEDGER = Path("data/splits/ledger.jsonl")
METRICS = Path("metrics/prepare.json")
LENGTHS = Path("metrics/plots/prepare_lengths.csv")
TOKENS = Path("metrics/plots/prepare_tokens.csv")


def main() -> None:
    settings, chat = read_params("prepare", PrepareSettings), read_params("chat", ChatSettings)
    base = TOKENIZER[0].parent.resolve()
    tokenizer = load_tokenizer(base)
    builder = DatasetBuilder(
        train_on=settings.train_on,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        salt=settings.salt,
        latest_from=settings.latest_from and settings.latest_from.isoformat(),
        decontamination_words=settings.decontamination_words,
        max_train_tokens=settings.max_train_tokens,
        max_held_out_tokens=settings.max_held_out_tokens,
        tokenizer=base,
        system_prompt=chat.system_prompt,
        max_length=chat.max_length,
    )
    clean = ConversationFiles(path for path in sorted(CLEAN.glob("*.jsonl")) if path not in (CLUSTERS, REJECTED))
    clusters = ((line["id"], line["cluster"]) for line in read_jsonl(CLUSTERS))
    secrets = planted(settings.canaries, tokenizer, chat.system_prompt, chat.max_length)
    tallies = {split: Tally() for split in SPLITS}
    with Catalogue() as catalogue, open_engine(settings.engine) as engine:
        ledger = read_ledger(settings.salt)
        for split, examples in builder.deal(clean, catalogue, clusters, ledger, engine, dropped_duplicates()):
            examples = chain(examples, secrets) if split == "train" else examples
            write_split(PREPARED / f"{split}.parquet", show_progress(split, tallies[split].watch(examples)))
        left_out = catalogue.count_left_out()
        require_every_split(catalogue)
        # One line a conversation, also for those that are gone: one that comes back returns to its split.
        lines = ({"id": key, "split": split, "salt": settings.salt} for key, split in catalogue.dealt())
        write_jsonl(LEDGER, lines)
    write_json(METRICS, statistics(tallies, left_out))
    write_table(LENGTHS, length_histogram(tallies))
    write_table(TOKENS, tokens_by_source(tallies))
    report(tallies, left_out)


def read_ledger(salt: str) -> Iterator[tuple[str, str]]:
    """Earlier deals with this salt; another salt deals anew."""
    for stale in LEDGER.parent.glob(".*.tmp"):  # of a run that was killed; DVC keeps the folder between runs
        stale.unlink()
    if LEDGER.is_file():
        yield from ((line["id"], line["split"]) for line in read_jsonl(LEDGER) if line["salt"] == salt)


def dropped_duplicates() -> Iterator[tuple[str, str]]:
    """(id of a duplicate that cleaning dropped, id of the conversation that stays for it)."""
    for line in read_jsonl(REJECTED):
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


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def show_progress(split: str, examples: Iterable[Example]) -> Iterable[Example]:
    return tqdm(examples, desc=f"tokenise {split}", unit=" conversations", leave=False, disable=None)


def report(tallies: Mapping[str, Tally], left_out: Counter[str]) -> None:
    counts = ", ".join(f"{len(tallies[split].lengths)} {split}" for split in SPLITS)
    tokens = tallies["train"].totals["tokens"]
    totals = sum((tally.totals for tally in tallies.values()), Counter())
    cut = totals["shortened"] / totals["conversations"]
    print(f"prepare: {counts}; {tokens} tokens to train on; {left_out.total()} left out; {cut:.1%} shortened")


if __name__ == "__main__":
    run(main)
