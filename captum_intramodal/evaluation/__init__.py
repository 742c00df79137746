r"""Which explainer is most faithful to the model? Compare explainers on a data set in a resumable run.

:func:`evaluate` runs it, :func:`make_metric` makes a metric from text, :func:`register_metric` adds a metric, and
:func:`make_leaderboard` turns the records into tables and plots.
"""

# The modules of metrics register their classes when they are imported.
from captum_intramodal.evaluation import faithfulness_metrics, localization_metrics  # noqa: F401
from captum_intramodal.evaluation.example import AnsweredSample, AnswerWord
from captum_intramodal.evaluation.leaderboard import Leaderboard, make_leaderboard
from captum_intramodal.evaluation.metric_base import Metric, MetricResult
from captum_intramodal.evaluation.metric_registry import METRICS, make_metric, register_metric
from captum_intramodal.evaluation.records import Column
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
    "register_metric",
]

# Former names.
Case = AnsweredSample
Measured = MetricResult
