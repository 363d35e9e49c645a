"""What the page Data shows: where every conversation is on its way from the log to the tokens."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fine_tuning.common.project import MANIFEST, PREPARED
from fine_tuning.common.records import read_jsonl, read_line, read_lines, read_object, stamp, updating
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.data_collection.data_cleaner import Cleaned, CleanSettings, DataCleaner
from fine_tuning.data_collection.personal_data.finder import PLACEHOLDER
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.data_preparation.splits import LEFT_OUT, NAMES, Ledger
from fine_tuning.integration.conversation_index import REJECTED, cleaned_shards, conversation_index
from fine_tuning.schema.conversation import from_line

if TYPE_CHECKING:
    import pandas as pd

CLEAN = Path("data/clean")
TAGS = Path(".whetstone/tags.json")
LEDGER = Path("data/splits.txt")
PARAMS = Path("params.yaml")
DAYS, FEWEST_RATED = 30, 5  # length of the periods that are compared, and ratings below which a share says nothing
SPLITS = ("train", "validation", "test")
LENGTHS = (0, 100, 300, 1000, 3000, 10_000)  # characters from which a conversation counts into the next bin
_LENGTH_NAMES = [f"{number} from {edge:,}" for number, edge in enumerate(LENGTHS)]
_LOCK = threading.Lock()  # of what is kept between two visits
_NOBODY = np.zeros(1, np.uint64)  # no conversation has the number 0
_PLACEHOLDER = re.compile(PLACEHOLDER.pattern.encode())

Span = tuple[str, str | None]  # text, and what is special about it
Stamp = tuple[Path, object]


def stamps(paths: list[Path]) -> tuple[Stamp, ...]:
    """What changes when one of the files changes; the key of everything that is read from them."""
    return tuple((path, found) for path in paths if (found := stamp(path)))


def entries(checkout: Path) -> "pd.DataFrame":
    """Every conversation by its number in the index, those with news since the last seal first.

    Columns, each a category whose names occur: `source`; `day` on which it started, or ""; `length`: the bin of LENGTHS
    that its characters are in; `rating`: -1, 0 or 1; `fate`: kept, new, not cleaned yet, or why it was dropped;
    `split`: train, validation, test, or none; `masked`: the types of personal data that were masked in it; `tags`: what
    somebody called it. Of masked and tags there is one a line.
    """
    files = [checkout / path for path in (REJECTED, LEDGER, MANIFEST, TAGS, PARAMS)]
    with _LOCK:
        return _entries(checkout, *conversation_index(checkout).state(), stamps([*files, *_clean_shards(checkout)]))


@lru_cache(maxsize=1)
def _entries(checkout: Path, _: int, numbered: int, __: tuple[Stamp, ...]) -> "pd.DataFrame":
    import pandas as pd

    rows, names = conversation_index(checkout).columns()
    outcomes, cleaned = _outcomes(checkout, numbered), cleaned_shards(checkout)
    numbers = np.flatnonzero(rows["there"])
    new = rows["shard"][numbers] == 0
    numbers = np.concatenate([numbers[new], numbers[~new]])
    found = rows[numbers]
    reasons, dropped = outcomes.drops(len(rows))
    in_cleaned = np.array([name in cleaned for name in names["shard"]])[found["shard"]]
    dropped = np.where(in_cleaned, dropped[numbers], 0)
    fate = np.select([found["shard"] == 0, ~in_cleaned], [1, 2], np.where(dropped, dropped + 2, 0))
    split = np.where(fate == 0, outcomes.splits(len(rows))[numbers], NAMES.index(LEFT_OUT))
    masked, tags = outcomes.masked(len(rows)), outcomes.tags(len(rows))
    return pd.DataFrame(
        {
            "source": _category(found["source"], names["source"]),
            "day": _category(found["day"], names["day"]),
            "length": _category(np.searchsorted(LENGTHS, found["characters"], "right") - 1, _LENGTH_NAMES),
            "rating": _category(found["rating"] + 1, ("-1", "0", "1")),
            "fate": _category(fate, ["kept", "new", "not cleaned yet", *reasons[1:]]),
            "split": _category(split, NAMES),
            "masked": _category(masked[1][numbers], masked[0]),
            "tags": _category(tags[1][numbers], tags[0]),
        },
        index=numbers,
    )


def _category(codes: np.ndarray, names: Sequence[str | None]) -> "pd.Categorical":
    """Numbers as the names that they stand for, those that occur, in the order of the names."""
    import pandas as pd

    present = np.flatnonzero(np.bincount(codes, minlength=len(names))).tolist()
    order = sorted(present, key=lambda code: str(names[code]))
    place = np.zeros(len(names), np.int32)
    place[order] = np.arange(len(order))
    return pd.Categorical.from_codes(place[codes], [names[code] for code in order])


def counted(rows: "pd.Series", columns: "pd.Series") -> "pd.DataFrame":
    """How many conversations have each two names of two columns of `entries`."""
    import pandas as pd

    names, others = rows.cat.categories, columns.cat.categories
    pairs = rows.cat.codes.to_numpy(np.int64) * len(others) + columns.cat.codes.to_numpy()
    counts = np.bincount(pairs, minlength=len(names) * len(others)).reshape(len(names), len(others))
    return pd.DataFrame(counts, names.astype(str), others.astype(str))


def _clean_shards(checkout: Path) -> list[Path]:
    return sorted((checkout / CLEAN).glob("*-*.jsonl"))


def liked(checkout: Path) -> str | None:
    """Which share of the rated conversations people like, and liked before, in words; None where few are rated."""
    now = datetime.now(UTC)
    ends = [(now - timedelta(days=days)).isoformat(timespec="seconds") for days in (0, DAYS, 2 * DAYS)]
    index = conversation_index(checkout)
    (new, new_rated), (old, old_rated) = index.ratings(ends[1], ends[0]), index.ratings(ends[2], ends[1])
    if new_rated < FEWEST_RATED:
        return None
    before = f"; in the {DAYS} days before {_share(old, old_rated)}" if old_rated >= FEWEST_RATED else ""
    return f"liked in the last {DAYS} days: {_share(new, new_rated)}{before}"


def _share(count: int, total: int) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    from scipy.stats import binomtest

    low, high = binomtest(count, total).proportion_ci(method="wilson")
    return f"{count} of {total} rated conversations ({count / total:.0%} [{low:.0%}, {high:.0%}])"


def _tags(path: Path) -> dict[str, list[str]]:
    return {key: list(map(str, tags)) for key, tags in read_object(path).items() if isinstance(tags, list)}


def write_tags(checkout: Path, identity: str, tags: Iterable[str]) -> None:
    with updating(checkout / TAGS) as kept:
        kept.pop(identity, None)
        if words := sorted({" ".join(tag.split()) for tag in tags} - {""}):
            kept[identity] = words


# ------------------------------------------------------------------------------------------------- one conversation


def cleaner(checkout: Path, settings: CleanSettings) -> DataCleaner:
    """The cleaner as the stage `clean` makes it."""
    path = checkout / "models/base/tokenizer.json"
    added = read_object(path).get("added_tokens", [])
    control = {token["content"] for token in added if token.get("special")}
    return DataCleaner(settings=settings, control_tokens=tuple(sorted(control | set(CONTROL_TOKENS))))


def before(cleaner: DataCleaner, text: str) -> list[Span]:
    """The text as it came, cut so that each piece of personal data is a span of its own, with its type."""
    return _spans(text, ((hit.start, hit.end, hit.type) for hit in cleaner.find_personal_data(text)))


def after(text: str) -> list[Span]:
    """The cleaned text, cut so that each placeholder is a span of its own, with its type."""
    return _spans(text, ((*match.span(), match[1]) for match in PLACEHOLDER.finditer(text)))


def _spans(text: str, marked: Iterable[tuple[int, int, str]]) -> list[Span]:
    spans: list[Span] = []
    position = 0
    for start, end, kind in marked:
        spans += [(text[position:start], None), (text[start:end], kind)]
        position = end
    return [*spans, (text[position:], None)]


def twin(checkout: Path, identity: str) -> str | None:
    """The id of the conversation that was kept instead of a duplicate."""
    drops = (read_line(line) for _, line in read_lines(checkout / REJECTED) if b'"reason":"duplicate"' in line)
    with suppress(FileNotFoundError):  # DVC removes what a stage makes anew
        return next((str(drop["value"]) for drop in drops if drop["id"] == identity), None)
    return None


def can_be_restored(cleaner: DataCleaner, conversation: dict, fate: str) -> bool:
    """Whether it was a filter that dropped it: of a duplicate the other one is kept, and what is malformed stays so."""
    return fate != "duplicate" and cleaner.clean_conversation(conversation | {"restored": True}).drop is None


def why_dropped(cleaned: Cleaned, fate: str) -> str | None:
    """The reason in words: of the last run where it knows one, else of the cleaner as it is set now."""
    if fate not in ("kept", "new", "not cleaned yet"):
        return fate.replace("_", " ")
    if cleaned.drop is None:
        return None
    value = cleaned.drop.value
    shown = f" ({value})" if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return cleaned.drop.reason.replace("_", " ") + shown


def tokens(checkout: Path, identity: str) -> tuple[str, list[Span]] | None:
    """(split, tokens) of a conversation in the prepared data, window by window; what is special is what is trained."""
    import pyarrow.parquet

    from fine_tuning.integration.chat_models import BASE, tokenizer_of
    from fine_tuning.schema.chat_format import NOT_TRAINED

    for split in SPLITS:
        folder = checkout / PREPARED / split
        if not folder.is_dir():
            continue
        table = pyarrow.parquet.read_table(folder, filters=[("id", "=", identity)])
        if table.num_rows:
            windows = [
                _pieces(tokenizer_of(checkout / BASE), row["input_ids"], row["labels"], NOT_TRAINED)
                for row in table.to_pylist()
            ]
            pieces = windows[0]
            for number, window in enumerate(windows[1:], 2):
                pieces += [(f"\n\n[window {number}: turns before the marked ones are context]\n", None), *window]
            return split, pieces
    return None


def _pieces(tokenizer, ids: list[int], labels: list[int], not_trained: int) -> list[Span]:
    """The text of each token. A character that several tokens spell is shown with the last of them."""
    pieces: list[Span] = []
    waiting: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and len(waiting) < 4:
            pieces.append(("", None))
            continue
        pieces.append((text, "trained" if label != not_trained else None))
        waiting = []
    return [piece for piece in pieces if piece[0]]


# ------------------------------------------------------------------------------------------------------------ reading

_Reader = Callable[[Path], Iterable[tuple[str, str]]]  # (id, name) of the conversations that a file names
Marks = tuple[list[str], np.ndarray]  # names, of which the first is "", and which of them each conversation has


class _Outcomes:
    """What the files of the pipeline say of conversations, by their numbers in the index. A file is read again when it
    changed."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, self.index = checkout, conversation_index(checkout)
        self._names: dict[_Reader, dict[str, int]] = {}
        self._read: dict[Path, tuple[object, np.ndarray, np.ndarray]] = {}  # path → stamp, numbers, codes
        self._ledger: Ledger | None = None
        self._salt, self._keys, self._splits = "", _NOBODY, np.zeros(1, np.int8)

    def drops(self, size: int) -> Marks:
        """Why conversations were dropped."""
        return self._marks([self.checkout / REJECTED], _drops_in, size)

    def masked(self, size: int) -> Marks:
        return self._marks(_clean_shards(self.checkout), _masked_in, size)

    def tags(self, size: int) -> Marks:
        return self._marks([self.checkout / TAGS], _tags_in, size)

    def splits(self, size: int) -> np.ndarray:
        """Numbers of NAMES."""
        salt = read_params("prepare", PrepareSettings, self.checkout / PARAMS).salt
        ledger = _ledger(self.checkout / LEDGER, stamp(self.checkout / LEDGER), salt)
        if salt != self._salt:
            self._salt, self._keys = salt, _NOBODY
        while identities := self.index.identities(len(self._keys)):
            self._keys = np.concatenate([self._keys, ledger.keys(identities)])
        known = self._splits if ledger is self._ledger else _NOBODY.astype(np.int8)
        new = ledger.splits_of(self._keys[len(known) :])
        self._ledger, self._splits = ledger, np.concatenate([known, np.where(new < 0, NAMES.index(LEFT_OUT), new)])
        return np.concatenate([self._splits, np.zeros(max(0, size - len(self._splits)), np.int8)])

    def _marks(self, paths: list[Path], read: _Reader, size: int) -> Marks:
        names, marks = self._names.setdefault(read, {"": 0}), np.zeros(size, np.int32)
        for path in paths:
            now, known = stamp(path), self._read.get(path)
            if now is not None and (known is None or known[0] != now):
                try:
                    pairs = list(read(path))
                except FileNotFoundError:  # DVC removes what a stage makes anew
                    continue
                numbers = np.array(self.index.numbers(identity for identity, _ in pairs), np.int64)
                codes = np.array([names.setdefault(name, len(names)) for _, name in pairs], np.int32)
                self._read[path] = known = now, numbers, codes
            if now is not None:
                _, numbers, codes = known
                marks[numbers[numbers < size]] = codes[numbers < size]
        return list(names), marks


@lru_cache(maxsize=1)
def _outcomes(checkout: Path, _: int) -> _Outcomes:
    return _Outcomes(checkout)


def _drops_in(path: Path) -> Iterator[tuple[str, str]]:
    for drop in read_jsonl(path):
        if drop.get("id") and drop["reason"] != "superseded":
            yield drop["id"], drop["reason"]


def _masked_in(path: Path) -> Iterator[tuple[str, str]]:
    content, types = path.read_bytes() + b"\n", dict[int, set[str]]()  # by where a line begins
    for match in _PLACEHOLDER.finditer(content):
        types.setdefault(content.rfind(b"\n", 0, match.start()) + 1, set()).add(match[1].decode())
    for start, found in types.items():
        yield from_line(content[start : content.index(b"\n", start)])["id"], "\n".join(sorted(found))


def _tags_in(path: Path) -> Iterator[tuple[str, str]]:
    return ((identity, "\n".join(tags)) for identity, tags in _tags(path).items())


@lru_cache(maxsize=1)
def _ledger(path: Path, _: object, salt: str) -> Ledger:
    return Ledger(path, salt)
