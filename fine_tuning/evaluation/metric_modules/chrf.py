"""Corpus chrF of the replies by sacrebleu, 0 to 100: character n-grams, for text in any script (Popović 2015)."""

import numpy as np
import sacrebleu

from fine_tuning.evaluation.metric_modules.loading import SummedMetric


class Chrf(SummedMetric):
    """sacrebleu's defaults (chrF2); its n-gram counts are what is summed."""

    citation = "https://aclanthology.org/W15-3049"

    def signature(self) -> str:
        """What a reader needs to repeat the score."""
        scorer = sacrebleu.CHRF()
        scorer.corpus_score(["a"], [["a"]])
        return str(scorer.get_signature())

    def statistics(self, predictions: list[str], references: list[str]) -> np.ndarray:
        # No public function gives these counts; sacrebleu's own significance tests take them the same way.
        rows = sacrebleu.CHRF()._extract_corpus_statistics(predictions, [references])
        return np.array(rows, dtype=float)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        scorer = sacrebleu.CHRF()
        score = np.apply_along_axis(lambda counts: scorer._compute_score_from_stats(list(counts)).score, -1, sums)
        return {"chrf": np.where(sums[..., 1] > 0, score, np.nan)}
