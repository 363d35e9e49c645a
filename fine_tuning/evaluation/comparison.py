"""The comparison of base, champion and candidate: see `fine_tuning.evaluation.verdict.comparison`."""

from fine_tuning.evaluation.verdict.comparison import CompareSettings, Evidence

__all__ = ["CompareSettings", "Evidence"]
