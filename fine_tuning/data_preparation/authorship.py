"""Who wrote a reply: a person, or a model that may or may not be named."""

from collections.abc import Iterable, Sequence

from fine_tuning.common.writing_systems import words_of
from fine_tuning.schema.conversation import is_by_a_model, versions_of

# An edit of which more than one word in five stands in the model's reply, in the same order, is still the model's: it
# makes that model's likelihood higher than an equal one's (`python -m benchmarks.verdict own-words` measures it).
MOST_KEPT = 0.2
MOST_WORDS = 20_000  # of each text are compared: a tenth of a second


def is_by_a_person(conversation: dict, index: int, edited: str | None = None) -> bool:
    """Whether a person wrote the reply `messages[index]`, or the text `edited` that stands in its place.

    A reply is a person's where no model is named and it comes neither from a chat's export nor from the log, which has
    replies of models alone. An edit is a person's where at least four fifths of its words are: those outside the
    longest common subsequence with the reply, and with each of its alternatives.
    """
    if not is_by_a_model(conversation, index):
        return True
    if not edited:
        return False
    reply = conversation["messages"][index]
    words = words_of(edited)[:MOST_WORDS]
    return bool(words) and all(
        common_words(words, words_of(original["content"])[:MOST_WORDS]) <= MOST_KEPT * len(words)
        for original in versions_of(reply)
    )


def common_words(first: Iterable[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit of an integer for each word of `second`.

    The recurrence is that of Hyyrö 2004, "Bit-parallel LCS-length computation revisited": two texts of 1,500 words take
    a millisecond.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << index
    every = row = (1 << len(second)) - 1
    for word in first:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(second) - row.bit_count()
