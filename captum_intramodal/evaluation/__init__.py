"""Is an explanation true? Explainers compared on a data set: a resumable run, its metrics and the resulting table."""

from captum_intramodal.evaluation.case import AnsweredSample, AnswerWord
from captum_intramodal.evaluation.leaderboard import Column, Leaderboard, make_leaderboard
from captum_intramodal.evaluation.measures import METRICS, Metric, MetricResult, make_metric
from captum_intramodal.evaluation.run import DEFAULT_EXPLAINERS, DEFAULT_METRICS, evaluate

__all__ = [
    "DEFAULT_EXPLAINERS",
    "DEFAULT_METRICS",
    "METRICS",
    "AnswerWord",
    "AnsweredSample",
    "Column",
    "Leaderboard",
    "Metric",
    "MetricResult",
    "evaluate",
    "make_leaderboard",
    "make_metric",
]
