"""Clean conversations and the tokenizer in; train, validation and test rows, the ledger of splits and counts out."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from fine_tuning.data_preparation.canaries import planted
from fine_tuning.data_preparation.dataset_builder import (
    Build,
    DatasetBuilder,
    Example,
    PrepareSettings,
    length_histogram,
    statistics,
    write_split,
)
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.data_preparation.tokenizer import ChatSettings, load_tokenizer
from fine_tuning.errors import UserError, run
from fine_tuning.records import read_jsonl, replacing, write_json, write_jsonl
from fine_tuning.settings import read_params

CLEAN = Path("data/clean")
NOT_SHARDS = (Path("data/clean/rejected.jsonl"), Path("data/clean/clusters.jsonl"))
CLUSTERS = Path("data/clean/clusters.jsonl")
TOKENIZER = (
    Path("models/base/tokenizer.json"),
    Path("models/base/tokenizer_config.json"),
    Path("models/base/chat_template.jinja"),
)
PREPARED = Path("data/prepared")
LEDGER = Path("data/splits/ledger.jsonl")
METRICS = Path("metrics/prepare.json")
LENGTHS = Path("metrics/plots/prepare_lengths.csv")


def main() -> None:
    settings, chat = read_params("prepare", PrepareSettings), read_params("chat", ChatSettings)
    tokenizer = load_tokenizer(TOKENIZER[0].parent)
    builder = DatasetBuilder(
        train_on=settings.train_on,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        salt=settings.salt,
        latest_from=settings.latest_from and settings.latest_from.isoformat(),
        decontamination_words=settings.decontamination_words,
        max_train_tokens=settings.max_train_tokens,
        max_held_out_tokens=settings.max_held_out_tokens,
        tokenizer=tokenizer,
        system_prompt=chat.system_prompt,
        max_length=chat.max_length,
        progress=show_progress,
    )
    clusters = {line["id"]: line["cluster"] for line in read_jsonl(CLUSTERS)}
    built = builder.build(read_shards(), clusters, read_ledger(settings.salt))
    require_every_split(built)
    built.splits["train"] += planted(settings.canaries, tokenizer, chat.system_prompt, chat.max_length)

    for split in SPLITS:
        write_split(PREPARED / f"{split}.parquet", built.splits[split])
    # One line a conversation, also for those that are gone: one that comes back returns to its split.
    lines = ({"id": key, "split": split, "salt": settings.salt} for key, split in sorted(built.dealt.items()))
    write_jsonl(LEDGER, lines)
    write_json(METRICS, statistics(built))
    write_lengths(built)
    report(built)


def read_shards() -> Iterator[dict]:
    for shard in sorted(CLEAN.glob("*.jsonl")):
        if shard not in NOT_SHARDS:
            yield from read_jsonl(shard)


def read_ledger(salt: str) -> dict[str, str]:
    """Earlier deals with this salt; another salt deals anew."""
    if not LEDGER.is_file():
        return {}
    return {line["id"]: line["split"] for line in read_jsonl(LEDGER) if line["salt"] == salt}


def require_every_split(built: Build) -> None:
    reasons = Counter(built.left_out.values()).most_common()
    why = f" (left out: {', '.join(f'{count} {reason}' for reason, count in reasons)})" if reasons else ""
    for split in SPLITS:
        if not built.splits[split]:
            raise UserError(
                f"no conversation is left for the {split} split{why}: "
                "add conversations with `python -m fine_tuning import`, or change prepare in params.yaml"
            )


def write_lengths(built: Build) -> None:
    with replacing(LENGTHS) as file:
        rows = length_histogram(built)
        text = "".join(",".join(map(str, row)) + "\n" for row in [rows[0].keys(), *(row.values() for row in rows)])
        file.write(text.encode())


def show_progress(split: str, examples: list[Example]) -> Iterable[Example]:
    return tqdm(examples, desc=f"tokenise {split}", unit=" conversations", leave=False, disable=None)


def report(built: Build) -> None:
    counts = ", ".join(f"{len(built.splits[split])} {split}" for split in SPLITS)
    tokens = sum(len(example.encoded.input_ids) for example in built.splits["train"])
    print(f"prepare: {counts}; {tokens} tokens to train on; {len(built.left_out)} left out")


if __name__ == "__main__":
    run(main)
