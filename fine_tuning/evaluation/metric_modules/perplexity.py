"""Perplexity of the reference tokens: exp of the mean negative log-likelihood a token. Needs one tokenizer for all."""

from typing import ClassVar

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class Perplexity(SummedMetric):
    """Sums, not means of batch means: a long reply counts for as many tokens as it has."""

    higher_is_better = False
    ratios: ClassVar = {"perplexity": (0, 1)}
    exponential = True

    def statistics(self, nll: list[float], tokens: list[int]) -> np.ndarray:
        return np.column_stack([nll, tokens]).astype(float)
