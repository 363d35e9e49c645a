"""Prepared splits on disk: files for each file of clean conversations, so that what arrives leaves the others alone."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fine_tuning.common.columns import stretches
from fine_tuning.common.parallel import Map
from fine_tuning.common.results import Memo, link
from fine_tuning.data_preparation.catalogue import Catalogue, ConversationFiles
from fine_tuning.data_preparation.encoded_memo import EncodedMemo, TakenRows
from fine_tuning.data_preparation.encodings import Chosen
from fine_tuning.data_preparation.tally import Tally
from fine_tuning.schema.prepared import write_batches

FILE_ROWS = 2048  # at most, about: what a deletion or a newer version makes be written again
WRITTEN, ROWS = "written", "rows.parquet"  # the folder of the memo, the file in its entries


class _Part(NamedTuple):
    """The rows of one file of a split."""

    split: str
    name: str
    key: list[Any]  # in the memo
    of: list[str]  # the file of conversations
    at: np.ndarray  # which of the split's rows


def write_splits(
    folder: Path,
    chosen: Mapping[str, Chosen],
    clean: ConversationFiles,
    catalogue: Catalogue,
    encoded: EncodedMemo,
    memo: Memo,
    made_by: Sequence[Any],
    run: Map = map,
) -> dict[str, Tally]:
    """Write the rows of splits as FOLDER/SPLIT/SHARD.PART.parquet, and count them; a file that was written before is
    linked.

    Args:
        made_by: what rows depend on besides the conversations, their clusters and which of their windows there are.
        run: what maps a function over files: `map`, or an engine's.
    """
    encoded.flush()
    parts = [
        part for split, rows in chosen.items() for part in _parts(split, rows, clean, catalogue, [*made_by, split])
    ]

    def rows_of(part: _Part) -> TakenRows:
        return encoded.take(chosen[part.split].ordered(catalogue, part.at))

    new = (part for part in parts if part.key not in memo)
    deque(run(partial(_make, memo=memo), ((part.key, part.of, rows_of(part)) for part in new)), 0)
    tallies = {split: Tally() for split in chosen}
    stale = {path for split in chosen for path in (folder / split).glob("*")}
    for part in parts:
        made, counts = memo.files(part.key, lambda place, _, part=part: _write(place, rows_of(part)), of=part.of)
        target = folder / part.split / part.name
        link(made / ROWS, target)
        stale.discard(target)
        tallies[part.split].add(counts)
    for path in stale:
        path.unlink()
    return tallies


def _parts(
    split: str, chosen: Chosen, clean: ConversationFiles, catalogue: Catalogue, made_by: list[Any]
) -> Iterator[_Part]:
    ends = np.searchsorted(chosen.rows, catalogue.facts.starts).tolist()
    for path, of, (first, last) in zip(clean.paths, clean.hashes, pairwise(ends), strict=True):
        rows = chosen.rows[first:last]
        # A power of two and bits of a hash: where some rows come or go, the others stay in their part.
        parts = 1 << max(0, math.ceil(math.log2(max(1, len(rows)) / FILE_ROWS)))
        orders = catalogue.orders(rows)
        numbers = orders >> 24 & parts - 1
        order = np.lexsort((orders, numbers))
        for start, end in zip(*stretches(numbers[order]), strict=True):
            here = order[start:end]
            at = first + here
            columns = (catalogue.facts.column("line", rows[here]), catalogue.cluster[rows[here]], chosen.windows[at])
            digest = sha256(b"".join(column.tobytes() for column in columns)).hexdigest()
            name = f"{path.stem}.{numbers[here[0]]}.parquet"
            yield _Part(split, name, [*made_by, digest], [of], np.sort(at).astype(np.int32))


def _make(part: tuple[list[Any], list[str], TakenRows], memo: Memo) -> Path:
    key, of, rows = part
    return memo.files(key, lambda place, _: _write(place, rows), of=of)[0]


def _write(place: Path, rows: TakenRows) -> dict[str, Any]:
    counts = Tally()
    # No fsync for each file: a file that a power cut leaves short is made again.
    with open(place / ROWS, "wb") as file:
        write_batches(file, counts.watch(rows))
    return counts.as_json()
