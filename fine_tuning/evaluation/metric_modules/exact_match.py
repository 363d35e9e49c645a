"""Share of replies equal to their reference, white space and case aside."""

from typing import ClassVar

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class ExactMatch(SummedMetric):
    """Useful where replies are short and have one right form."""

    ratios: ClassVar = {"exact_match": (0, 1)}
    shares = ("exact_match",)

    def statistics(self, predictions: list[str], references: list[str]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[float(_plain(prediction) == _plain(reference)), 1.0] for prediction, reference in pairs])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
