"""Negative log-likelihood in nats a UTF-8 byte of the reference: compares models with different tokenizers."""

from typing import ClassVar

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class NllPerByte(SummedMetric):
    """The end-of-turn token counts in the likelihood and adds no byte."""

    higher_is_better = False
    ratios: ClassVar = {"nll_per_byte": (0, 1)}

    def statistics(self, nll: list[float], bytes: list[int]) -> np.ndarray:
        return np.column_stack([nll, bytes]).astype(float)
