"""Why a conversation was left out, in words."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fine_tuning.common.errors import count_of


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence on what is trained on, then one a reason for what is not, by metrics/prepare.json; {} gives none."""
    if not metrics:
        return []
    train, characters = metrics["splits"]["train"], metrics.get("characters")  # None in metrics of earlier versions
    said = [f"{count_of(train['conversations'], 'conversation')} with {count_of(train['tokens'], 'token')} to train on"]
    for reason, count in Counter(metrics["left_out"]).most_common():
        share = f" ({metrics['characters_left_out'].get(reason, 0) / characters:.1%} of the text)" if characters else ""
        said.append(f"{count:,} left out{share}: {reason_in_words(reason)}")
    if lost := sum(split.get("lost_reply_tokens", 0) for split in metrics["splits"].values()):
        said.append(f"{count_of(lost, 'token')} of replies not used: their turns alone exceed chat.max_length")
    return said


def reason_in_words(reason: str) -> str:
    """Why conversations were left out; where a cap did it, the parameter."""
    return f"prepare.{reason}" if reason.startswith("max_") else reason.replace("_", " ")
