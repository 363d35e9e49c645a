"""Share of the reference tokens that were the model's first choice, given all tokens before them."""

from typing import ClassVar

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class TokenAccuracy(SummedMetric):
    """Token-weighted."""

    ratios: ClassVar = {"token_accuracy": (0, 1)}
    shares = ("token_accuracy",)

    def statistics(self, correct: list[int], tokens: list[int]) -> np.ndarray:
        return np.column_stack([correct, tokens]).astype(float)
