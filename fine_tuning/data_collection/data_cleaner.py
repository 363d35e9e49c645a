"""Cleaning of one conversation, and of lists of them: repair, mask, filter, deduplicate, each drop with its reason.

Order: roles → characters, encoding, control tokens and white space → personal data → exchanges with an empty, too short
or too long message, which go alone → content → exact duplicates. `shard_cleaner` does the same over files, with
near-duplicates.
"""

import copy
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import parse_settings
from fine_tuning.data_collection.cleaning.filters import (
    FilterSettings,
    check_content,
    check_roles,
    check_turns,
    inappropriate,
    trim_end,
    without_unusable,
)
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS, TextRepair
from fine_tuning.data_collection.personal_data import finder as personal_data
from fine_tuning.data_collection.personal_data.finder import Hit, Masker, PersonalDataType, may_hold, without_overlaps
from fine_tuning.data_collection.personal_data.people import MODEL, PeopleSettings, people_finder
from fine_tuning.schema.conversation import (
    Problem,
    alternatives_of,
    as_conversation,
    carry_feedback,
    each_record,
    is_exchange,
    problem_of,
    short_hash,
    versions_of,
)

MESSAGE_KEYS = ("id", "role", "content", "model", "at", "version", "incomplete", "weight", "gap")
PRIVATE_METADATA = ("session_id", "user_id", "user", "users", "username", "email", "name", "ip", "title")


def _known_region(region: str) -> str:
    from phonenumbers import SUPPORTED_REGIONS

    if region not in SUPPORTED_REGIONS:
        raise ValueError("a country with phone numbers, in two capital letters (ISO 3166), such as DE")
    return region


class CleanSettings(PeopleSettings, extra="forbid"):
    """The section `clean` of params.yaml."""

    mask: list[PersonalDataType]
    phone_regions: list[Annotated[str, AfterValidator(_known_region)]]
    fix_encoding: bool
    filters: FilterSettings
    drop_near_duplicates: bool
    near_duplicate_threshold: float = Field(gt=0, le=1.1)
    max_same_reply: int = Field(ge=0)
    max_user_share: float = Field(gt=0, le=1)
    processes: int = Field(ge=0)
    engine: str | None


def default_settings(**filters: Any) -> CleanSettings:
    """The settings of a DataCleaner that is given none; `filters` replaces thresholds."""
    thresholds = {
        "min_length": 1,
        "max_length": 8000,
        "min_turns": 2,
        "max_turns": None,
        "max_repetition": 4.5,
        "max_special_characters": 0.4,
        "languages": [],
        "min_language_confidence": 0.6,
        "inappropriate": "off",
        "inappropriate_words": [],
        "max_echo": 0.9,
    }
    return CleanSettings(
        mask=list(personal_data.TYPES),
        phone_regions=list(personal_data.REGIONS),
        people="off",
        people_model=MODEL,
        fix_encoding=True,
        filters=FilterSettings(**(thresholds | filters)),
        drop_near_duplicates=False,
        near_duplicate_threshold=0.8,
        max_same_reply=0,
        max_user_share=1.0,
        processes=0,
        engine=None,
    )


class Cleaned(NamedTuple):
    """Result of cleaning one conversation: the cleaned record or the reason of the drop, and masked values by type.

    `flagged`: names, addresses and dates of birth that stay in its text, by type (clean.people: flag). `gone`: the
    number of exchanges that were taken out of it.
    """

    conversation: dict | None
    drop: Problem | None
    masked: dict[str, int]
    flagged: Mapping[str, int] = MappingProxyType({})
    gone: int = 0


class DataCleaner:
    """Cleans texts and conversations.

    Args:
        min_length, max_length: characters that every user and assistant message must have; see `without_unusable`.
        settings: everything else; the two lengths win over it where they are given.
        control_tokens: what the base model's tokenizer reads as commands.

    Raises:
        UserError: a length is no whole number, or no text has both; `people` is on and its model is missing.
    """

    def __init__(
        self,
        min_length: int | None = None,
        max_length: int | None = None,
        *,
        settings: CleanSettings | None = None,
        control_tokens: tuple[str, ...] = CONTROL_TOKENS,
    ) -> None:
        lengths = {"min_length": min_length, "max_length": max_length}
        given = {name: value for name, value in lengths.items() if value is not None}
        settings = settings or default_settings()
        filters = parse_settings("filters", settings.filters.model_dump() | given, FilterSettings, "DataCleaner")
        if filters.min_length > filters.max_length:
            raise UserError(f"min_length {filters.min_length} is above max_length {filters.max_length}: lower it")
        self.settings = settings.model_copy(update={"filters": filters})
        self._regions = tuple(self.settings.phone_regions)
        self._types = tuple(self.settings.mask)
        self._find_people = people_finder(self.settings)
        self._repair = TextRepair(control_tokens, self.settings.fix_encoding)

    def clean_text(self, text: str) -> str:
        """The repaired text with its personal data masked. Cleaning it again changes nothing."""
        _require_text(text)
        masker = Masker(self._types, self._regions)
        text = self._repair(text)
        masker.reserve(text)
        masker.find_people = self._find_people if self.settings.people == "mask" else None
        return masker.mask(text)

    def find_personal_data(self, text: str) -> list[Hit]:
        """The personal data in a text as (type, start, end), in its order; people too, where they are not off."""
        _require_text(text)
        hits = personal_data.find(text, self._types, self._regions)
        return without_overlaps(hits + self._find_people(text)) if self._find_people else hits

    def clean_conversation(self, record: dict) -> Cleaned:
        """Clean one logged exchange or conversation. The record is not changed.

        One that a person restored passes all filters but those of form; its personal data is masked as any other's.
        """
        if record.get("deleted"):
            return Cleaned(None, Problem("deleted", True), {})
        conversation = as_conversation(record)
        if problem := problem_of(conversation):
            return Cleaned(None, problem, {})
        messages = trim_end(conversation["messages"])
        if drop := check_roles(messages):
            return Cleaned(None, drop, {})
        masker = Masker(self._types, self._regions)
        whole = "\n".join([message["content"] for message in messages])
        repair = str.strip if self._repair.only_strips(whole) else self._repair
        messages = [self._repaired_message(message, repair) for message in messages]
        messages = [m for m in messages if m["content"] or m["role"] != "tool"]
        feedback = [self._repaired(entry) for entry in conversation["feedback"]]
        texts = "\n".join(self._texts(messages, feedback))
        masker.reserve(texts)
        if may_hold(texts):
            _mask(messages, feedback, masker)
        filters, restored = self.settings.filters, record.get("restored")
        limits = (1, math.inf) if restored else (filters.min_length, filters.max_length)
        messages, drop, gone = without_unusable(messages, *limits)
        if any(message["role"] == "assistant" for message in messages):
            drop = None if restored else check_turns(messages, filters) or check_content(messages, filters)
        if drop:
            return Cleaned(None, drop, masker.counts)
        flagged: dict[str, int] = {}
        if self.settings.people == "flag":
            flagged = Counter(hit.type for text in self._texts(messages, feedback) for hit in self._find_people(text))
        elif self._find_people:
            masker.find_people = self._find_people
            _mask(messages, feedback, masker)
        metadata = self._clean_metadata(conversation["metadata"], masker)
        if flagged:
            metadata["people"] = dict(sorted(flagged.items()))
        if filters.inappropriate == "flag" and inappropriate(messages, filters.inappropriate_words):
            metadata["inappropriate"] = True
        if feedback:
            ids = {version.get("id") for message in messages for version in versions_of(message)}
            feedback = [entry for entry in feedback if entry.get("message_id") in ids]
        conversation |= {"messages": messages, "feedback": feedback, "metadata": metadata}
        return Cleaned(conversation, None, masker.counts, flagged, gone)

    def filter_conversations(self, conversations: Iterable[dict]) -> list[dict]:
        """Clean conversations and drop what the filters reject and exact duplicates; exchanges stay exchanges."""
        passed = []
        best: dict[str, tuple[int, int]] = {}
        judged: dict[str, list[tuple[int, dict]]] = defaultdict(list)
        for record in each_record(conversations):
            cleaned = self.clean_conversation(record).conversation
            if cleaned is None:
                continue
            for key in duplicate_keys(cleaned):
                best[key] = max(best.get(key, (-9, 0)), (standing(cleaned), -len(passed)))
            if said := judgements(cleaned):
                judged[duplicate_keys(cleaned)[-1]].append((len(passed), said))
            passed.append((record, cleaned))
        kept = []
        for index, (record, cleaned) in enumerate(passed):
            if best[duplicate_keys(cleaned)[0]][1] != -index:
                continue
            others = [said for place, said in judged.get(duplicate_keys(cleaned)[-1], ()) if place != index]
            cleaned = add_judgements(cleaned, others) if others else cleaned
            if is_exchange(record):
                user, assistant = (message["content"] for message in cleaned["messages"])
                said = {"feedback": cleaned["feedback"]} if others else {}
                cleaned = record | {"user_message": user, "assistant_response": assistant} | said
            kept.append(cleaned)
        return kept

    def _repaired_message(self, message: dict, repair: Callable[[str], str]) -> dict:
        kept = {key: message[key] for key in _kept_keys(tuple(message)) if message[key] is not None}
        kept["content"] = repair(message["content"])
        if isinstance(message.get("alternatives"), list):
            kept["alternatives"] = [self._repaired_message(one, self._repair) for one in alternatives_of(message)]
        return kept

    def _repaired(self, entry: dict) -> dict:
        texts = {key: self._repair(entry[key]) for key in ("comment", "edited") if isinstance(entry.get(key), str)}
        rest = {key: value for key, value in entry.items() if key not in ("comment", "edited", "by")}
        if entry.get("by"):  # preparation has to know whose judgements are one person's, and not whose they are
            rest["by"] = _pseudonym(str(entry["by"]))
        return rest | {key: text for key, text in texts.items() if text}

    @staticmethod
    def _texts(messages: list[dict], feedback: list[dict]) -> list[str]:
        said = [entry[key] for entry in feedback for key in ("comment", "edited") if key in entry]
        return [version["content"] for message in messages for version in versions_of(message)] + said

    def _clean_metadata(self, metadata: dict, masker: Masker) -> dict:
        """Flat values that say nothing about the person."""
        return {
            key: masker.mask(self._repair(value)) if isinstance(value, str) else value
            for key, value in metadata.items()
            if key not in PRIVATE_METADATA and isinstance(value, (str, int, float, bool))
        }


@lru_cache(maxsize=1024)
def _kept_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in MESSAGE_KEYS if key in keys)


def _pseudonym(name: str) -> str:
    """The same for the same name, and for itself."""
    return name if re.fullmatch("person-[0-9a-f]{8}", name) else f"person-{short_hash(['by', name])[:8]}"


def _mask(messages: list[dict], feedback: list[dict], masker: Masker) -> None:
    for message in messages:
        for version in versions_of(message):
            version["content"] = masker.mask(version["content"])
    for entry in feedback:
        entry |= {key: masker.mask(entry[key]) for key in ("comment", "edited") if key in entry}


def _require_text(text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"a {type(text).__name__} is no text: give a str")


# -----------------------------------------------------------------------------
# exact duplicates


def duplicate_keys(conversation: dict) -> list[str]:
    """What a conversation shares with its exact duplicates: roles and contents, and before that a person's edits.

    Of those with the same first key one stays. So an edited conversation takes the place of its unedited duplicates,
    and of two that were edited differently both stay.
    """
    texts = [(m["role"].encode(), m["content"].encode()) for m in conversation["messages"]]
    digest = hashlib.blake2b(b"".join([b"%b %d %b" % (role, len(text), text) for role, text in texts]), digest_size=16)
    keys = [digest.hexdigest()]
    if edited := [entry["edited"] for entry in _of_what_is_shown(conversation) if entry.get("edited")]:
        digest.update("\0edited ".join(["", *edited]).encode())
        keys.insert(0, digest.hexdigest())
    return keys


def standing(conversation: dict) -> int:
    """Which of several exact duplicates stays, the highest: 3 edited, 2 liked, 0 neither, -1 and -2 disliked.

    An edit stands in place of the reply that was disliked. Of several people's thumbs one down outweighs any up.
    """
    if not conversation["feedback"]:
        return 0
    ratings: dict[Any, int] = {}
    edited = set()
    for entry in _of_what_is_shown(conversation):
        target = entry.get("message_id")
        if entry.get("edited"):
            edited.add(target)
        if rating := entry.get("rating") or (1 if entry.get("over") else 0):
            ratings[target] = min(rating, ratings.get(target, rating))
    ratings |= dict.fromkeys(edited, 1)
    return (min(ratings.values()) > 0) * 4 - 2 + bool(edited) if ratings else 0


def _of_what_is_shown(conversation: dict) -> list[dict]:
    """The feedback on messages and not on their alternatives."""
    ids = {message.get("id") for message in conversation["messages"]}
    return [entry for entry in conversation["feedback"] if entry.get("message_id") in ids]


def judgements(conversation: dict) -> dict | None:
    """What people said of a conversation, for an exact duplicate that stays in its stead; None for nothing.

    Edits stay behind: of two that were edited differently both stay.
    """
    kept = ("message_id", "rating", "over", "comment", "by")
    feedback = [{key: e[key] for key in kept if e.get(key)} for e in conversation["feedback"]]
    messages = [{key: m[key] for key in ("id", "alternatives") if key in m} for m in conversation["messages"]]
    said = [entry | {"rating": entry.get("rating")} for entry in feedback if entry.keys() - {"message_id", "by"}]
    return {"messages": messages, "feedback": said} if said else None


def add_judgements(conversation: dict, others: Iterable[dict]) -> dict:
    """A copy of a conversation with the judgements of exact duplicates of it."""
    conversation = copy.deepcopy(conversation)
    for other in others:
        carry_feedback(other["feedback"], conversation, zip(other["messages"], conversation["messages"], strict=True))
    return conversation


def feedback_counts(conversation: dict) -> dict[str, int]:
    """Counts of feedback by kind, for the record of a dropped conversation."""
    feedback = conversation["feedback"]
    counts = {
        "liked": sum((entry.get("rating") or 0) > 0 for entry in feedback),
        "disliked": sum((entry.get("rating") or 0) < 0 for entry in feedback),
        "edited": sum(bool(entry.get("edited")) for entry in feedback),
        "commented": sum(bool(entry.get("comment")) for entry in feedback),
        "preferred": sum(bool(entry.get("over")) for entry in feedback),
    }
    return {name: count for name, count in counts.items() if count}
