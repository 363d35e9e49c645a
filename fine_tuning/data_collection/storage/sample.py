"""The sample: the English conversations of the PyPI package chatterbot-corpus (BSD-3), to the same bytes every time."""

from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml

from fine_tuning.common.records import dump_line
from fine_tuning.data_collection.importers import Imported, import_records
from fine_tuning.data_collection.storage.shards import write_lines

PACKAGE = "chatterbot-corpus"
STARTED_AT = "2017-01-01T00:00:00.000Z"  # the corpus has no times; one that is older than any user's own


def sample_conversations() -> Iterator[dict]:
    """The conversations of the sample, read by the code that imports a user's own."""
    numbered = enumerate(_records(), start=1)
    for item in import_records(numbered, "sample", STARTED_AT):
        assert isinstance(item, Imported), "every row of the pinned package is a conversation"
        yield item.conversation


def _records() -> Iterator[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = [file for file in distribution(PACKAGE).files or [] if file.parent.name == "english"]
    for file in sorted(files, key=str):
        rows = yaml.load(file.locate().read_bytes(), Loader=loader)["conversations"]
        for row in rows:
            texts = row if isinstance(row, list) else [row]  # one row of trivia.yml is a question without its answer
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
            yield {"messages": turns, "metadata": {"category": file.name.removesuffix(".yml")}}


def write_sample(folder: Path) -> tuple[Path | None, int]:
    """The sample's shard and its number of lines. Its name, a hash of its bytes, stands in the manifest of every clone;
    so its lines stay as they always were, without a schema version: they are of version 1."""
    return write_lines(folder, "sample", map(dump_line, sample_conversations()))
