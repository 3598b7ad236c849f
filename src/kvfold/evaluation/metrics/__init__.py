"""How answers are scored: one file for each benchmark's rules, under names such as "longbench/rouge"."""

from kvfold.evaluation.metrics.base import Metric, Scores, get_metric, mean_score, metric

__all__ = ["Metric", "Scores", "get_metric", "mean_score", "metric"]
