"""Shape of the replies: shares that end by themselves, are empty or loop; length and diversity."""

import re
from typing import ClassVar

import numpy as np

from fine_tuning.common.writing_systems import words_of
from fine_tuning.evaluation.metric_modules.loading import SummedMetric

CONTROL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
LOOP_REPEATS = 4  # a phrase said four times running; three can be rhetoric


class Replies(SummedMetric):
    """Shares of replies, the length against the reference, and distinct-1 to -3 (Li et al. 2016) within a reply."""

    citation = "https://aclanthology.org/N16-1014"
    higher_is_better: ClassVar = {
        "self_ended": True,
        "empty": False,
        "loops": False,
        "control_tokens": False,
        "length_ratio": None,
        "distinct_1": True,
        "distinct_2": True,
        "distinct_3": True,
    }
    ratios: ClassVar = {
        "self_ended": (1, 0),
        "empty": (2, 0),
        "loops": (3, 0),
        "control_tokens": (4, 0),
        "length_ratio": (5, 6),
        **{f"distinct_{size}": (5 + 2 * size, 6 + 2 * size) for size in (1, 2, 3)},
    }
    shares = tuple(name for name in ratios if name != "length_ratio")

    def statistics(self, predictions: list[str], references: list[str], finished: list[bool]) -> np.ndarray:
        rows = []
        for prediction, reference, ended in zip(predictions, references, finished, strict=True):
            said = words_of(prediction) or list("".join(prediction.split()))  # of punctuation alone: its characters
            rows.append(
                [
                    1.0,
                    ended,
                    not prediction.strip(),
                    loops(said),
                    bool(CONTROL.search(prediction)),
                    len(prediction),
                    len(reference),
                    *(number for size in (1, 2, 3) for number in distinct(said, size)),
                ]
            )
        return np.array(rows, dtype=float)


def distinct(said: list[str], size: int) -> tuple[int, int]:
    """How many runs of so many words differ, of how many."""
    runs = list(zip(*(said[start:] for start in range(size)), strict=False))
    return len(set(runs)), len(runs)


def loops(said: list[str]) -> bool:
    """Whether some phrase of up to twelve words stands LOOP_REPEATS times in a row."""
    for size in range(1, 13):
        run = 0
        for index in range(size, len(said)):
            run = run + 1 if said[index] == said[index - size] else 0
            if run >= size * (LOOP_REPEATS - 1):
                return True
    return False
