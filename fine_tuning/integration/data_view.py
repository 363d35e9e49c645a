"""What the page Data shows: where every conversation is on its way from the log to the tokens."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.common.project import MANIFEST, PREPARED
from fine_tuning.common.records import read_jsonl, read_lines, read_object, stamp, updating
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.data_collection.data_cleaner import Cleaned, CleanSettings, DataCleaner
from fine_tuning.data_collection.personal_data.finder import PLACEHOLDER
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.data_preparation.splits import Ledger
from fine_tuning.integration.conversation_index import REJECTED, Summary, cleaned_shards, conversation_index

if TYPE_CHECKING:
    import pandas as pd

CLEAN = Path("data/clean")
TAGS = Path(".whetstone/tags.json")
LEDGER = Path("data/splits.txt")
DAYS, FEWEST_RATED = 30, 5  # length of the periods that are compared, and ratings below which a share says nothing
SPLITS = ("train", "validation", "test")

Span = tuple[str, str | None]  # text, and what is special about it
Stamp = tuple[Path, object]


def stamps(paths: list[Path]) -> tuple[Stamp, ...]:
    """What changes when one of the files changes; the key of everything that is read from them."""
    return tuple((path, found) for path in paths if (found := stamp(path)))


def entries(checkout: Path, words: str = "") -> "pd.DataFrame":
    """Every conversation in whose id or messages all words occur, those with news since the last seal first.

    Columns: those of a `Summary`; `fate`: kept, new, not cleaned yet, or why it was dropped; `twin`: the id of the one
    that was kept instead of a duplicate, or ""; `split`: train, validation, test, or none; `masked`: the types of
    personal data that were masked in it; `tags`: what somebody called it.
    """
    index = conversation_index(checkout)
    files = [checkout / path for path in (REJECTED, LEDGER, MANIFEST, TAGS)]
    found = _entries(checkout, index.changes(), stamps([*files, *_clean_shards(checkout)]))
    return found[found["id"].isin(index.with_words(words))] if words.strip() else found


@lru_cache(maxsize=1)
def _entries(checkout: Path, _: int, __: tuple[Stamp, ...]) -> "pd.DataFrame":
    import pandas as pd

    found, cleaned, tags = conversation_index(checkout).all(), cleaned_shards(checkout), read_tags(checkout)
    fates = _fates(stamps([checkout / REJECTED]))
    masked = _masked(stamps(_clean_shards(checkout)))
    splits = dict(_ledger(stamps([checkout / LEDGER]), checkout).find(one.id for one in found))

    def about(one: Summary) -> tuple:
        drop = fates.get(one.id) if one.shard in cleaned else None
        fate = "new" if one.shard is None else "kept" if one.shard in cleaned else "not cleaned yet"
        twin = str(drop["value"]) if drop and drop["reason"] == "duplicate" else ""
        split = splits.get(one.id, "none") if fate == "kept" and not drop else "none"
        fate = drop["reason"] if drop else fate
        return *one, fate, twin, split, masked.get(one.id, ()), tags.get(one.id, ())

    return pd.DataFrame(map(about, found), columns=[*Summary._fields, "fate", "twin", "split", "masked", "tags"])


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


def read_tags(checkout: Path) -> dict[str, tuple[str, ...]]:
    return {key: tuple(map(str, tags)) for key, tags in read_object(checkout / TAGS).items() if isinstance(tags, list)}


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


@lru_cache(maxsize=2)
def _fates(rejected: tuple[Stamp, ...]) -> dict[str, dict]:
    drops = (drop for path, _ in rejected for drop in read_jsonl(path))
    return {drop["id"]: drop for drop in drops if drop.get("id") and drop["reason"] != "superseded"}


@lru_cache(maxsize=2)
def _masked(shards: tuple[Stamp, ...]) -> dict[str, tuple[str, ...]]:
    lines = (line for path, _ in shards for _, line in read_lines(path))
    found = ((line, sorted({match[1] for match in PLACEHOLDER.finditer(line.decode())})) for line in lines)
    return {json.loads(line)["id"]: tuple(types) for line, types in found if types}


@lru_cache(maxsize=2)
def _ledger(_: tuple[Stamp, ...], checkout: Path) -> Ledger:
    return Ledger(checkout / LEDGER, read_params("prepare", PrepareSettings, checkout / "params.yaml").salt)
