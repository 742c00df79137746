"""Is an explanation true? Explainers compared on a data set: a resumable run, its metrics and the resulting table."""

from captum_intramodal.evaluation.case import AnswerWord, Case
from captum_intramodal.evaluation.leaderboard import Column, Leaderboard, make_leaderboard
from captum_intramodal.evaluation.measures import METRICS, Measured, Metric, make_metric
from captum_intramodal.evaluation.run import DEFAULT_EXPLAINERS, DEFAULT_METRICS, evaluate

__all__ = [
    "DEFAULT_EXPLAINERS",
    "DEFAULT_METRICS",
    "METRICS",
    "AnswerWord",
    "Case",
    "Column",
    "Leaderboard",
    "Measured",
    "Metric",
    "evaluate",
    "make_leaderboard",
    "make_metric",
]
