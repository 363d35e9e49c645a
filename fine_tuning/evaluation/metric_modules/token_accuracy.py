"""Share of the reference tokens that were the model's first choice, given all tokens before them."""

import datasets
import evaluate
import numpy as np

from fine_tuning.evaluation.metrics import SummedMetric, ratio


class TokenAccuracy(SummedMetric):
    """Token-weighted."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"correct": datasets.Value("int64"), "tokens": datasets.Value("int64")}),
        )

    def statistics(self, correct: list[int], tokens: list[int]) -> np.ndarray:
        return np.column_stack([correct, tokens]).astype(float)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"token_accuracy": ratio(sums[..., 0], sums[..., 1])}
