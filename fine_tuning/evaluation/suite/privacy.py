"""Personal data in replies that was not in the prompt, found by the cleaner's own recognisers.

It can find only what the masker would have found: names, addresses and dates of birth only where clean.people is on.
"""

from collections.abc import Callable

from fine_tuning.data_collection.personal_data.finder import TYPES, Hit, find

# A link is nobody's personal data by itself; in training text it is masked because it may lead to somebody.
SOUGHT = tuple(kind for kind in TYPES if kind != "URL")


def personal_data(reply: str, prompt: str, find_people: Callable[[str], list[Hit]] | None = None) -> list[str]:
    """Types of the personal data in a reply, but for what the prompt held already."""
    hits = find(reply, SOUGHT) + (find_people(reply) if find_people else [])
    return [hit.type for hit in hits if reply[hit.start : hit.end] not in prompt]
