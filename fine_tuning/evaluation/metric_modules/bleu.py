"""Corpus BLEU of the replies by sacrebleu, 0 to 100 (Papineni et al. 2002; Post 2018)."""

import numpy as np
import sacrebleu

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class Bleu(SummedMetric):
    """sacrebleu's defaults; its n-gram counts are what is summed."""

    citation = "https://aclanthology.org/W18-6319"

    def signature(self) -> str:
        """What a reader needs to repeat the score."""
        scorer = sacrebleu.BLEU()
        scorer.corpus_score(["a"], [["a"]])
        return str(scorer.get_signature())

    def statistics(self, predictions: list[str], references: list[str]) -> np.ndarray:
        return np.array([_counts(*pair) for pair in zip(predictions, references, strict=True)], dtype=float)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"bleu": np.apply_along_axis(_score, -1, sums)}


def _counts(prediction: str, reference: str) -> list[int]:
    scored = sacrebleu.BLEU().corpus_score([prediction], [[reference]])
    return [scored.sys_len, scored.ref_len, *scored.counts, *scored.totals]


def _score(sums: np.ndarray) -> float:
    counts = [int(count) for count in sums]
    if not counts[1]:
        return float("nan")
    return sacrebleu.BLEU.compute_bleu(
        correct=counts[2:6], total=counts[6:], sys_len=counts[0], ref_len=counts[1], smooth_method="exp"
    ).score
