"""Prepared splits on disk: files for each file of clean conversations, so that what arrives leaves the others alone."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fine_tuning.common.results import Memo, link
from fine_tuning.data_preparation.catalogue import Catalogue, ConversationFiles
from fine_tuning.data_preparation.encoded_memo import EncodedMemo, stretches
from fine_tuning.data_preparation.encodings import Chosen
from fine_tuning.data_preparation.tally import Tally
from fine_tuning.schema.prepared import write_batches

FILE_ROWS = 2048  # at most, about: what a deletion or a newer version makes be written again
ROWS = "rows.parquet"  # in the memo


def write_split(
    folder: Path,
    chosen: Chosen,
    clean: ConversationFiles,
    catalogue: Catalogue,
    encoded: EncodedMemo,
    memo: Memo,
    made_by: Sequence[Any],
) -> Tally:
    """Write the rows of a split as FOLDER/SHARD.PART.parquet, and count them; a file that was written before is linked.

    Args:
        made_by: what rows depend on besides the conversations, their clusters and which of their windows there are.
    """
    tally, stale = Tally(), set(folder.glob("*"))
    shards = clean.files_of(chosen.rows)
    # A power of two and bits of a hash: where some rows come or go, the others stay in their part.
    parts = 1 << np.ceil(np.log2(np.maximum(np.bincount(shards) / FILE_ROWS, 1))).astype(np.int64)
    files = shards << 32 | chosen.orders >> 24 & parts[shards] - 1
    order = np.argsort(files, kind="stable")
    for start, end in zip(*stretches(files[order]), strict=True):
        own = chosen.part(order[start:end])

        def write(place: Path, _: Path | None, own: Chosen = own) -> dict[str, Any]:
            counts = Tally()
            # No fsync for each file: a file that a power cut leaves short is made again.
            with open(place / ROWS, "wb") as file:
                write_batches(file, counts.watch(encoded.take(own)))
            return counts.as_json()

        columns = (catalogue.facts["line"][own.rows], catalogue.cluster[own.rows], own.windows)
        digest = sha256(b"".join(column.tobytes() for column in columns)).hexdigest()
        made, counts = memo.files([*made_by, digest], write)
        shard, part = divmod(int(files[order[start]]), 1 << 32)
        target = folder / f"{clean.paths[shard].stem}.{part}.parquet"
        link(made / ROWS, target)
        stale.discard(target)
        tally.add(counts)
    for path in stale:
        path.unlink()
    return tally
