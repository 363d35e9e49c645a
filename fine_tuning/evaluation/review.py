"""The review: which pairs of replies people vote on, in which order, and how votes become data."""

import hashlib
from collections.abc import Iterable


def in_random_order(clusters: Iterable[str], models: Iterable[str]) -> list[str]:
    """The clusters in an order that a hash fixes before the first vote, another one for each pair of models.

    Votes prove something in random order only: with the most different pairs first, prompts that the candidate happens
    to win may come before those that it loses.
    """
    pair = " ".join(sorted(models))
    return sorted(clusters, key=lambda cluster: hashlib.sha256(f"{pair} {cluster}".encode("utf-8", "replace")).digest())
