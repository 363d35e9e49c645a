"""Conversations out, in the formats that other tools read. What is exported can be imported again as it was.

All formats are written in one pass over the conversations, each into a temporary file that replaces the old one at
the end. A person's edit stands in the place of the reply, except in the `json` format, which keeps both.
"""

import csv
import gzip
import io
import mmap
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from fine_tuning.common.errors import UserError, no_space
from fine_tuning.common.parallel import cores, open_engine
from fine_tuning.common.records import replacing
from fine_tuning.common.results import Memo, link
from fine_tuning.common.settings import Settings
from fine_tuning.schema.conversation import (
    as_conversation,
    each_record,
    edits,
    from_line,
    is_by_a_model,
    problem_of,
    to_line,
)
from fine_tuning.schema.judgements import PERSON, Judgement, Reply, judgements_of

ExportFormat = Literal["json", "csv", "chatml", "alpaca", "instruction", "openai", "sharegpt", "dpo", "kto"]
FILES: dict[str, str] = {
    "json": "conversations.json",
    "csv": "conversations.csv",
    "chatml": "chatml.jsonl",
    "alpaca": "alpaca.json",
    "instruction": "instruction.jsonl",
    "openai": "openai.jsonl",
    "sharegpt": "sharegpt.json",
}
JUDGED: dict[str, str] = {"dpo": "dpo.jsonl", "kto": "kto.jsonl"}  # what people preferred, not conversations
SUFFIXES = {"none": "", "gzip": ".gz", "zstd": ".zst"}
CSV_COLUMNS = (
    "conversation_id", "turn", "started_at", "source", "model", "system", "user_message", "assistant_response", "rating"
)  # fmt: skip
LINES = "lines"  # in the memo
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_FORMULA_STARTS = frozenset("'=+-@\t\r")


class ExportSettings(Settings):
    """The section `export` of params.yaml."""

    formats: list[ExportFormat]
    compression: Literal["none", "gzip", "zstd"]
    engine: str | None


class DataExporter:
    """Writes conversations into files of one folder, which is made if it is not there. Raises UserError if the
    compression is unknown."""

    def __init__(self, folder: str | Path, compression: Literal["none", "gzip", "zstd"] = "none") -> None:
        if compression not in SUFFIXES:
            raise UserError(f"unknown compression {compression!r}: choose one of {', '.join(SUFFIXES)}")
        self.folder = Path(folder)
        self.compression = compression
        self.counts: dict[str, dict[str, int]] = {}

    def export_all_formats(
        self, conversations: Iterable[dict], formats: Iterable[ExportFormat] | ExportFormat = tuple(FILES)
    ) -> dict[str, Path]:
        """Write every format, or those given, and return its file. `counts` says how many conversations each took.

        Conversations that a format has no place for (tool messages in question-answer formats, ChatML's own marks
        within a message in ChatML) are left out of that format and counted as skipped; so is what is no conversation.

        Raises:
            UserError: a format is unknown, the folder cannot be made, or these are no conversations.
        """
        formats = (formats,) if isinstance(formats, str) else tuple(formats)
        paths = {name: self.folder / file_of(name, self.compression) for name in formats}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if no_space(error):
                raise
            raise UserError(f"{self.folder} cannot be made ({error.strerror}): choose another folder") from None
        self.counts = write_formats(conversations, paths)
        return paths

    def export(self, conversations: Iterable[dict], format: ExportFormat) -> Path:
        """Write one format and return its file."""
        return self.export_all_formats(conversations, [format])[format]


def file_of(name: str, compression: str = "none") -> str:
    """The name of the file of a format. Raises UserError if the format is unknown."""
    files = FILES | JUDGED
    if name not in files:
        raise UserError(f"unknown export format {name!r}: choose from {', '.join(files)}")
    return files[name] + SUFFIXES[compression]


def export_shards(
    shards: Sequence[Path],
    folder: Path,
    memo: Memo,
    settings: ExportSettings,
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[ExportFormat, Counter[str]]:
    """Write FOLDER/FORMAT/SHARD for each clean shard and format; where a format takes nothing there is no file.

    Shards that were exported before come from the memo.

    Args:
        progress: is told how many shards were exported.

    Returns:
        Format → conversations `exported` and `skipped`, and `bytes` written.
    """
    # Sorted: a memo's key does not tell their order, and LINES has a column for each.
    counts = {name: Counter(exported=0, skipped=0, bytes=0) for name in sorted(settings.formats)}
    files = {name: file_of(name, settings.compression) for name in counts}
    stale = {path for path in folder.rglob("*") if path.is_file()}
    known = list(zip([shard.resolve() for shard in shards], memo.hashes(shards), strict=True))
    export = partial(_export_shard, files=files, memo=memo)
    new = [(shard, digest) for shard, digest in known if [digest, files] not in memo]
    processes = min(cores(), len(new))
    with open_engine(settings.engine if new else None, "export", processes, ("orjson", "zstandard")) as engine:
        for _ in engine(export, new):
            progress(1)
    for shard, (made, found) in zip(shards, map(export, known), strict=True):
        for name, file in files.items():
            counts[name].update(found[name])
            if found[name]["exported"]:
                source, target = made / file, folder / name / (shard.stem + file[file.index(".") :])
                counts[name]["bytes"] += source.stat().st_size
                link(source, target)
                stale.discard(target)
    for path in stale:
        path.unlink()
    memo.remove_unused()
    return counts


def write_formats(conversations: Iterable[dict], paths: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Write each format into its file, compressed as its name ends; how many conversations each took and skipped."""
    with _writers(paths, replacing) as writers:
        for record in each_record(conversations):
            for writer, entry in zip(writers, entries_of(record, paths), strict=True):
                writer.add(entry, exported=int(bool(entry)))
    return {writer.name: writer.counts for writer in writers}


def _export_shard(shard: tuple[Path, str], files: dict[str, str], memo: Memo) -> tuple[Path, dict[str, dict[str, int]]]:
    """`memo.files` of a clean shard, (path, SHA-256)."""
    path, digest = shard

    def export(folder: Path, earlier: Path | None) -> dict[str, dict[str, int]]:
        return _write_shard(path, files, folder, earlier)

    return memo.files([digest, files], export, [path.name, files], [digest])


def _write_shard(
    shard: Path, files: Mapping[str, str], folder: Path, earlier: Path | None
) -> dict[str, dict[str, int]]:
    """`write_formats` of a clean shard; what was written of its lines before is copied from the folder `earlier`.

    LINES in such a folder has of each line of the shard a hash, and where it ends in each file. Compressed files are
    not copied from.
    """
    import numpy as np

    plain = not any(file.endswith((SUFFIXES["gzip"], SUFFIXES["zstd"])) for file in files.values())
    known = earlier and plain
    old = np.fromfile(earlier / LINES, np.int64) if known else np.empty(0, np.int64)
    old = old.reshape(-1, 1 + len(files))
    # No fsync for each file: a file that a power cut leaves short is made again.
    paths = {name: folder / file for name, file in files.items()}
    with _writers(paths, partial(open, mode="wb")) as writers, open(shard, "rb") as lines, ExitStack() as stack:
        sources = [stack.enter_context(_mapped(earlier / file)) for file in files.values()] if known else []
        ends = np.concatenate([[[0, *(len(writer.container.head) for writer in writers)]], old])
        table = array("q")
        for place, count, line in _stretches(lines, old[:, 0].tolist()):
            if place is None:
                for writer, entry in zip(writers, entries_of(from_line(line), files), strict=True):
                    writer.add(entry, exported=int(bool(entry)))
                table.extend((count, *(writer.end for writer in writers)))
                continue
            rows = ends[place : place + count + 1].copy()
            exported = np.count_nonzero(np.diff(rows, axis=0), axis=0).tolist()
            for column, (writer, source) in enumerate(zip(writers, sources, strict=True), start=1):
                writer.add(source[rows[0, column] : rows[-1, column]], exported[column], count)
                rows[:, column] += writer.end - rows[-1, column]
            table.frombytes(rows[1:].tobytes())
    if plain:
        (folder / LINES).write_bytes(table.tobytes())
    return {writer.name: writer.counts for writer in writers}


def _stretches(lines: Iterable[bytes], known: Iterable[int]) -> Iterator[tuple[int | None, int, bytes]]:
    """(None, hash, line) of a line that is not known; (place of the first, how many, b"") of known ones in a row."""
    place_of = {digest: place for place, digest in enumerate(known)}
    start, count = 0, 0
    for line in lines:
        digest = int.from_bytes(blake2b(line, digest_size=8).digest(), signed=True)
        place = place_of.get(digest)
        if count and place != start + count:
            yield start, count, b""
            count = 0
        if place is None:
            yield None, digest, line
        else:
            start, count = place - count, count + 1
    if count:
        yield start, count, b""


def _mapped(path: Path) -> AbstractContextManager[Any]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else nullcontext(b"")


def entries_of(record: dict, names: Iterable[str]) -> list[bytes]:
    """What the file of each format has of a conversation, nothing where the format cannot say it."""
    conversation = as_conversation(record)
    if problem_of(conversation) is not None:
        return [b"" for _ in names]
    final = unbroken(with_edits(conversation))
    parts = {name: [conversation] if name == "json" or name in JUDGED else final for name in names}
    return [b"".join(map(_CONTAINERS[name].entry, parts[name])) for name in parts]


def unbroken(conversation: dict) -> list[dict]:
    """The parts between gaps as conversations of their own, ID, ID#1 and so on: only the json format tells of gaps."""
    messages = conversation["messages"]
    gaps = [number for number, message in enumerate(messages) if message.get("gap")]
    if not gaps:
        return [conversation]
    head = messages[:1] if messages[0]["role"] == "system" else []
    ends = [len(head), *gaps, len(messages)]
    parts = [messages[start:end] for start, end in pairwise(ends) if start < end]
    names = [f"{conversation['id']}#{number}" if number else conversation["id"] for number in range(len(parts))]
    return [conversation | {"id": name, "messages": head + part} for name, part in zip(names, parts, strict=True)]


def with_edits(conversation: dict) -> dict:
    """The conversation with a person's edits in the place of the replies."""
    edited = edits(conversation)
    if not edited:
        return conversation
    messages = [
        message | {"content": edited[message["id"]]} if message.get("id") in edited else message
        for message in conversation["messages"]
    ]
    return conversation | {"messages": messages}


def _compressed(raw: BinaryIO, ending: str) -> AbstractContextManager[BinaryIO]:
    if ending == SUFFIXES["gzip"]:
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
    if ending == SUFFIXES["zstd"]:
        import zstandard

        return zstandard.ZstdCompressor(level=10).stream_writer(raw, closefd=False)
    return nullcontext(raw)


# -----------------------------------------------------------------------------
# containers


class _Container(NamedTuple):
    """How conversations stand in a file: each as an entry, after a head; those of an array begin with a comma."""

    entry: Callable[[dict], bytes]
    array: bool = False
    head: bytes = b""


class _Writer:
    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self._file, self.container = name, file, _CONTAINERS[name]
        self.counts = {"exported": 0, "skipped": 0}
        self.end = file.write(self.container.head)

    def add(self, entries: bytes, exported: int, of: int = 1) -> None:
        """Write the entries of some conversations, `exported` of them."""
        self.counts["exported"] += exported
        self.counts["skipped"] += of - exported
        if self.container.array and entries:
            entries = (b"," if self.end else b"[") + entries[1:]
        self._file.write(entries)
        self.end += len(entries)

    def close(self) -> None:
        if self.container.array:
            self._file.write(b"\n]\n" if self.end else b"[]\n")


@contextmanager
def _writers(
    paths: Mapping[str, Path], opened: Callable[[Path], AbstractContextManager[BinaryIO]]
) -> Iterator[list[_Writer]]:
    with ExitStack() as stack:
        files = {name: stack.enter_context(opened(path)) for name, path in paths.items()}
        writers = [
            _Writer(name, stack.enter_context(_compressed(file, paths[name].suffix))) for name, file in files.items()
        ]
        yield writers
        for writer in writers:
            writer.close()


def _json(records: Callable[[dict], Iterable[dict]], array: bool = False) -> _Container:
    """JSON Lines, or one array of all."""
    if array:
        return _Container(lambda talk: b"".join(b",\n" + to_line(record)[:-1] for record in records(talk)), True)
    return _Container(lambda talk: b"".join(map(to_line, records(talk))))


def _one(convert: Callable[[dict], dict | None]) -> Callable[[dict], Iterable[dict]]:
    return lambda conversation: filter(None, [convert(conversation)])


def _each_judgement(convert: Callable[[Judgement], dict | None]) -> Callable[[dict], Iterable[dict]]:
    return lambda conversation: filter(None, map(convert, judgements_of(conversation)))


def _csv(conversation: dict) -> bytes:
    """One row an exchange; consecutive rows with one conversation_id are one conversation."""
    parts = split_turns(conversation)
    if parts is None:
        return b""
    system, exchanges = parts
    ratings = {e.get("message_id"): e["rating"] for e in conversation["feedback"] if e.get("rating") is not None}
    rows = []
    for turn, (question, reply) in enumerate(exchanges, start=1):
        row = (
            conversation["id"],
            turn,
            conversation["started_at"] or "",
            conversation["source"],
            reply.get("model") or "",
            _system_cell(system) if turn == 1 else "",
            question["content"],
            reply["content"],
            ratings.get(reply.get("id"), ""),
        )
        rows.append([neutralise(cell) if isinstance(cell, str) else cell for cell in row])
    return _csv_rows(rows)


def _csv_rows(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)  # RFC 4180; a bare \r within a cell is quoted only so
    return text.getvalue().encode("utf-8", "replace")


def _system_cell(system: str | None) -> str:
    """An empty system prompt is another thing than none: an apostrophe more before one that has nothing else."""
    return "" if system is None else system if system.strip("'") else f"'{system}"


def neutralise(cell: str) -> str:
    """A cell that no spreadsheet runs as a formula (OWASP, CSV injection); the importers take the apostrophe off."""
    return f"'{cell}" if cell[:1] in _FORMULA_STARTS and _FORMULA.match(cell) else cell


# -----------------------------------------------------------------------------
# records


def split_turns(conversation: dict) -> tuple[str | None, list[tuple[dict, dict]]] | None:
    """(system prompt, exchanges) of a conversation that is nothing but exchanges, all trained on; otherwise None."""
    messages = conversation["messages"]
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages[system is not None :]
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    plain = all(q["role"] == "user" and a["role"] == "assistant" and a.get("weight") != 0 for q, a in pairs)
    return (system, pairs) if pairs and plain and len(turns) == 2 * len(pairs) else None


def to_chatml(conversation: dict) -> dict:
    """{"id", "text", "models"?}: turns between <|im_start|> and <|im_end|>, as OpenAI's ChatML document has them."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation["messages"]]
    return {"id": conversation["id"], "text": "".join(turns)} | _models(conversation)


def _chatml_line(conversation: dict) -> dict | None:
    """None for what ChatML cannot say: its own marks, weights, and system turns that begin no conversation."""
    messages = conversation["messages"]
    odd = (m.get("weight") == 0 or (m["role"] == "system" and i) for i, m in enumerate(messages))
    if any(odd) or any("<|im_" in m["content"] for m in messages):
        return None
    return to_chatml(conversation)


def to_alpaca(conversation: dict) -> dict | None:
    """{"instruction", "input", "output"} of the last exchange; earlier ones as LLaMA-Factory's `history`."""
    record = _last_exchange(conversation, "instruction", "output")
    return record and {**record, "input": ""}


def to_instruction(conversation: dict) -> dict | None:
    """{"instruction", "response"} of the last exchange, with "history" and "system" where there are any."""
    return _last_exchange(conversation, "instruction", "response")


def _last_exchange(conversation: dict, question_key: str, answer_key: str) -> dict | None:
    parts = split_turns(conversation)
    if parts is None:
        return None
    system, exchanges = parts
    question, answer = exchanges[-1]
    record = {"id": conversation["id"], question_key: question["content"], answer_key: answer["content"]}
    if system is not None:
        record["system"] = system
    if len(exchanges) > 1:
        record["history"] = [[q["content"], a["content"]] for q, a in exchanges[:-1]]
    return record | _models(conversation)


def _models(conversation: dict) -> dict[str, list[str | None]]:
    """{"models": [who wrote each reply]}, None for a person; {} where no model wrote any. The importers read it."""
    models = [
        message.get("model") or ("unknown" if is_by_a_model(conversation, index) else None)
        for index, message in enumerate(conversation["messages"])
        if message["role"] == "assistant"
    ]
    return {"models": models} if any(models) else {}


def to_openai(conversation: dict) -> dict:
    """{"id", "messages": [{"role", "content", "weight"?}], "models"?}, the form of chat completions and of TRL."""
    keys = ("role", "content", "weight")
    messages = [{key: m[key] for key in keys if key in m} for m in conversation["messages"]]
    return {"id": conversation["id"], "messages": messages} | _models(conversation)


def to_sharegpt(conversation: dict) -> dict:
    """{"id", "conversations": [{"from", "value", "weight"?}], "models"?}."""
    turns = [
        {"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} | ({"weight": 0} if m.get("weight") == 0 else {})
        for m in conversation["messages"]
    ]
    return {"id": conversation["id"], "conversations": turns} | _models(conversation)


def to_dpo(judgement: Judgement) -> dict | None:
    """{"prompt", "chosen", "rejected", "models"}, TRL's conversational preferences; None for a thumb alone.

    The rejected message has its own `model`. `by` and `started_at` say whose judgement it is, and which is newer.
    """
    if judgement.worse is None:
        return None
    rejected = {"role": "assistant", "content": judgement.worse.text}
    rejected |= {"model": author} if (author := _author(judgement.worse)) else {}
    return _judged(judgement, "chosen") | {"rejected": [rejected]}


def to_kto(judgement: Judgement) -> dict | None:
    """{"prompt", "completion", "label", "models"}, TRL's conversational unpaired preferences; None for a pair."""
    return None if judgement.worse else _judged(judgement, "completion") | {"label": judgement.liked}


def _judged(judgement: Judgement, name: str) -> dict:
    replies = [message for message in judgement.prompt if message["role"] == "assistant"]
    models = [*["unknown"] * len(replies), _author(judgement.better)]
    reply = {"role": "assistant", "content": judgement.better.text}
    said = {key: value for key, value in (("by", judgement.by), ("started_at", judgement.at)) if value}
    return {"prompt": judgement.prompt, name: [reply], "models": models} | said


def _author(reply: Reply) -> str | None:
    return None if reply.author == PERSON else reply.author or "unknown"


_CONTAINERS: dict[str, _Container] = {
    "json": _json(lambda conversation: [conversation], array=True),
    "csv": _Container(_csv, head=_csv_rows([CSV_COLUMNS])),
    "chatml": _json(_one(_chatml_line)),
    "alpaca": _json(_one(to_alpaca), array=True),
    "instruction": _json(_one(to_instruction)),
    "openai": _json(_one(to_openai)),
    "sharegpt": _json(_one(to_sharegpt), array=True),
    "dpo": _json(_each_judgement(to_dpo)),
    "kto": _json(_each_judgement(to_kto)),
}


def clean_files(folder: str | Path) -> list[Path]:
    """The files of a folder of clean conversations that hold conversations."""
    return sorted(p for p in Path(folder).glob("*.jsonl") if p.name not in ("rejected.jsonl", "clusters.jsonl"))


def read_clean(folder: str | Path) -> Iterator[dict]:
    for path in clean_files(folder):
        with open(path, "rb") as file:
            yield from map(from_line, file)
