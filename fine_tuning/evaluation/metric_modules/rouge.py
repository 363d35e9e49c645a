"""ROUGE-1, ROUGE-2 and ROUGE-L of the replies by rouge-score: mean F1, 0 to 1 (Lin 2004)."""

from types import SimpleNamespace

import numpy as np
from rouge_score import rouge_scorer

from fine_tuning.common.writing_systems import words_of
from fine_tuning.evaluation.metric_modules.loading import SummedMetric, ratio

TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(SummedMetric):
    """The means of the three F1 values; no stemming."""

    citation = "https://aclanthology.org/W04-1013"

    def statistics(self, predictions: list[str], references: list[str]) -> np.ndarray:
        # Words of any script. The scorer's own tokenizer keeps a-z and 0-9 alone, and finds nothing in Greek.
        scorer = rouge_scorer.RougeScorer(list(TYPES), tokenizer=SimpleNamespace(tokenize=words_of))
        rows = []
        for prediction, reference in zip(predictions, references, strict=True):
            scores = scorer.score(reference, prediction)
            rows.append([*(scores[kind].fmeasure for kind in TYPES), 1.0])
        return np.array(rows)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {kind: ratio(sums[..., i], sums[..., -1]) for i, kind in enumerate(TYPES)}
