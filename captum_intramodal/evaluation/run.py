r"""How are explainers and metrics run over a data set? One record per sample, then the leaderboard.

Each sample's record is one file, written atomically. A run that was killed resumes with the samples that are missing,
and several processes can share the work without communicating. The process that writes the last record also writes
the leaderboard.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from transformers import PreTrainedModel

from captum_intramodal._utils.provenance import describe_model, versions
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.datasets import EvaluationDataset, Sample, open_dataset
from captum_intramodal.errors import (
    DatasetError,
    InvalidOptionError,
    NotApplicableError,
    SpecError,
    UnsupportedModelError,
)
from captum_intramodal.evaluation.example import AnsweredSample
from captum_intramodal.evaluation.leaderboard import Leaderboard, make_leaderboard
from captum_intramodal.evaluation.metric_base import Metric, MetricResult
from captum_intramodal.evaluation.metric_registry import make_metric
from captum_intramodal.evaluation.records import Column, describe_coverage
from captum_intramodal.evaluation.run_directory import RunDirectory
from captum_intramodal.explainers import Explainer, make_explainer, shared_passes
from captum_intramodal.metrics import FRACTIONS, area_under_curve, insertion_curve
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.parts_of_speech import Tagger

__all__ = ["DEFAULT_EXPLAINERS", "DEFAULT_METRICS", "evaluate"]

DEFAULT_EXPLAINERS = (
    "logit_lens", "tam", "tam:filter=false", "msea", "arc", "msea+arc", "attention", "random", "center_gaussian",
)  # fmt: skip
DEFAULT_METRICS = ("f1_iou", "pointing", "energy", "average_precision", "insertion", "deletion", "road")

# Packages that can change results; the manifest lists their versions.
_PACKAGES = ("captum", "torch", "torchvision", "transformers", "numpy", "pillow", "HanTa", "inflect")

T = TypeVar("T")


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    dataset: EvaluationDataset | str,
    out: str | os.PathLike[str],
    explainers: Mapping[str, Explainer] | Sequence[str] = DEFAULT_EXPLAINERS,
    metrics: Sequence[Metric | str] = DEFAULT_METRICS,
    *,
    answers: Literal["dataset", "model"] = "dataset",
    max_new_tokens: int = 64,
    tagger: Tagger | None = None,
    reference: str | None = None,
    timing: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Leaderboard | None:
    r"""
    Compare explainers of a model on a data set.

    The run writes into ``out``: ``manifest.json`` (everything that defines the run, and what it covered), one file per
    sample in ``samples``, and at the end ``samples.jsonl`` (one line per sample), ``leaderboard.md``,
    ``leaderboard.csv``, ``pairs.csv`` (paired bootstrap intervals and permutation tests of all pairs of explainers)
    and ``index.html``.

    A run that was killed resumes when it is called again with the same arguments; nothing is computed twice. The model
    keeps its devices and dtype, so it may be quantized or spread over several devices.

    An explainer or metric that does not apply to a sample or model (:class:`NotApplicableError`,
    :class:`UnsupportedModelError`) is recorded as skipped, with the reason. Any other error ends the run; a note on it
    names the sample, the explainer and the metric.

    Args:

        model (PreTrainedModel): The model, from ``AutoModelForImageTextToText.from_pretrained``.
        processor (ProcessorMixin): The processor, from ``AutoProcessor.from_pretrained``.
        dataset (EvaluationDataset or str): A data set, or what :func:`~captum_intramodal.datasets.open_dataset` takes.
        out (str or os.PathLike): Directory for this run only.
        explainers (Mapping or Sequence[str], optional): Explainers by their label in the tables, or specs for
                    :func:`~captum_intramodal.explainers.make_explainer`, which serve as labels.
                    Default: ``DEFAULT_EXPLAINERS``
        metrics (Sequence[Metric or str], optional): Metrics, or specs for
                    :func:`~captum_intramodal.evaluation.make_metric`.
                    Default: ``DEFAULT_METRICS``
        answers (str, optional): ``'dataset'``: explain the data set's answer of each sample that has one, else the
                    model's. ``'model'``: always explain the model's own greedy answer.
                    Default: ``'dataset'``
        max_new_tokens (int, optional): Maximum length of the model's answers.
                    Default: 64
        tagger (Callable, optional): See :func:`~captum_intramodal.metrics.word_types`.
                    Default: None, HanTa for words that the data set does not annotate
        reference (str, optional): Label of the explainer with which the tables compare the others.
                    Default: None, the first
        timing (bool, optional): Measure the seconds of each explainer. Explainers then do not share forward passes.
                    Default: False
        fractions (Sequence[float], optional): Fractions at which insertion, deletion and ROAD curves are evaluated. If
                    objects are small, maps differ mostly in the first few percent:
                    ``(0, 0.01, 0.02, 0.05, 0.1, 0.2)``.
                    Default: 0, 0.1, ..., 1
        batch_size (int, optional): Number of prompts per batch in metrics; memory grows with it.
                    Default: 16
        rank, world_size (int, optional): This process evaluates every ``world_size``-th sample, starting at ``rank``.
                    Default: 0, 1
        progress (Callable, optional): Called with the number of samples that all processes have done, and the number
                    of all samples.
                    Default: None

    Returns:
        **leaderboard** (*Leaderboard*):
            The results; None if other processes still have samples to do.

    Raises:
        TypeError: ``model``, ``processor`` or ``dataset`` has the wrong type; ``explainers`` or ``metrics`` is not a
            list.
        SpecError: An explainer, a metric or one of its options does not exist, or is given twice.
        InvalidOptionError: An option has a value that it does not take; ``out`` is a file, belongs to another run, or
            holds other files.
        DatasetError: The data set has no samples, or is damaged.
        ImportError: Packages of ``captum-intramodal[evaluate]`` are not installed.

    Examples::

        >>> from captum_intramodal.evaluation import evaluate
        >>> board = evaluate(model, processor, "scenes:count=1", "run", ["logit_lens", "random"], ["pointing"])
        >>> list(board.rows)
        ['logit_lens', 'random']
    """
    adapter = ModelAdapter(model, processor)
    dataset = open_dataset(dataset) if isinstance(dataset, str) else dataset
    if not isinstance(dataset, EvaluationDataset):
        raise TypeError(f"A data set has settings, a length and samples; got {type(dataset).__name__}.")
    if not len(dataset):
        raise DatasetError(f"The data set {dataset.settings} has no samples.")
    compared, measured = _resolve(explainers, metrics)
    columns = _columns(measured)
    reference = next(iter(compared)) if reference is None else reference
    if reference not in compared:
        raise InvalidOptionError(f"reference={reference!r} is none of the explainers {', '.join(compared)}.")
    _check_options(answers, fractions, rank, world_size)

    directory = RunDirectory(Path(out), rank)
    directory.begin(
        {
            "versions": versions(_PACKAGES),
            "model": describe_model(model, weights=True),
            "dataset": dataset.settings,
            "explainers": {label: explainer.settings for label, explainer in compared.items()},
            "metrics": [metric.settings for metric in measured],
            "answers": answers,
            "max_new_tokens": max_new_tokens,
            "tagger": None if tagger is None else f"{tagger.__module__}.{getattr(tagger, '__qualname__', tagger)}",
            "reference": reference,
            "timing": timing,
            "fractions": list(fractions),
        }
    )
    with nullcontext() if timing else shared_passes(compared.values()):
        for index in range(rank, len(dataset), world_size):
            if not directory.has(index):
                sample = dataset[index]
                with _note_on_error(f"Raised by the answer of sample {sample.id!r}."):
                    answer_ids = _answer(adapter, sample, answers, max_new_tokens)
                case = AnsweredSample(adapter, sample, answer_ids, tagger, batch_size, fractions)
                directory.write_record(index, _make_record(case, compared, measured, timing))
            if progress is not None:
                progress(directory.count_done(), len(dataset))
    if directory.count_done() < len(dataset):
        return None
    records = directory.read_records(len(dataset))
    board = make_leaderboard(records, columns, reference, fractions=fractions)
    directory.write_results(board, describe_coverage(records, board.coverage), len(dataset))
    return board


def _resolve(
    explainers: Mapping[str, Explainer] | Sequence[str], metrics: Sequence[Metric | str]
) -> tuple[dict[str, Explainer], list[Metric]]:
    """Make explainers, by label, and metrics from their specs."""
    if isinstance(explainers, str) or isinstance(metrics, str):
        raise TypeError("explainers and metrics must be lists, got a str; put a single spec into a list.")
    if wrong := [metric for metric in metrics if not isinstance(metric, str | Metric)]:
        raise TypeError(f"A metric must be a spec or a Metric, got {type(wrong[0]).__name__}.")
    compared = dict(explainers) if isinstance(explainers, Mapping) else _by_spec(explainers, make_explainer)
    measured = list(_by_spec([metric for metric in metrics if isinstance(metric, str)], make_metric).values())
    measured += [metric for metric in metrics if not isinstance(metric, str)]
    if not compared or not measured:
        raise InvalidOptionError(
            f"Got {len(compared)} explainers and {len(measured)} metrics: give at least one of each."
        )
    return compared, measured


def _by_spec(specs: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    made: dict[str, T] = {}
    for spec in (spec.strip() for spec in specs):
        if spec in made:
            raise SpecError(f"{spec!r} is given twice.")
        made[spec] = make(spec)
    return made


def _check_options(answers: str, fractions: Sequence[float], rank: int, world_size: int) -> None:
    """Raise errors for wrong options before anything runs."""
    if answers not in ("dataset", "model"):
        raise InvalidOptionError(f"answers must be 'dataset' or 'model', got {answers!r}.")
    if not 0 <= rank < world_size:
        raise InvalidOptionError(f"rank must be from 0 to {world_size - 1}, got {rank}.")
    # Curves check that fractions increase from 0 to 1.
    area_under_curve(insertion_curve(lambda kept: np.zeros(len(kept)), np.zeros(1), fractions), fractions)


def _columns(metrics: Iterable[Metric]) -> list[Column]:
    """Return all columns once; metrics of different classes may share one, as F1-IoU and Obj-IoU do."""
    columns: dict[str, Column] = {}
    owner: dict[str, Metric] = {}
    for metric in metrics:
        for column in metric.columns:
            if (other := owner.get(column.name)) is not None and type(other) is type(metric):
                raise InvalidOptionError(
                    f"Two metrics, {other.settings} and {metric.settings}, have one column {column.name!r}; put them "
                    "into separate runs."
                )
            columns.setdefault(column.name, column)
            owner.setdefault(column.name, metric)
    return list(columns.values())


def _answer(adapter: ModelAdapter, sample: Sample, answers: str, max_new_tokens: int) -> list[int]:
    """Return the tokens of the answer to explain."""
    if answers == "dataset" and sample.answer is not None:
        return adapter.tokenize_answer(sample.answer)
    with evaluation_mode(adapter.model):
        return adapter.generate(adapter.prepare([sample.image], sample.prompt), max_new_tokens)


def _make_record(
    case: AnsweredSample, explainers: Mapping[str, Explainer], metrics: Sequence[Metric], timing: bool
) -> dict[str, Any]:
    """Run all explainers and metrics on one sample."""
    record: dict[str, Any] = {
        "id": case.sample.id,
        "answer": case.answer,
        "words": [vars(word) for word in case.words] if case.answer_ids else [],
        "categories": [name for name, mask in case.sample.categories.items() if mask.any()],
        "scores": {},
        "curves": {},
        "seconds": {},
        "skipped": {},
        "skipped_metrics": {},
    }
    for label, explainer in explainers.items():
        if not case.answer_ids:
            record["skipped"][label] = "The answer is empty."
            continue
        start = time.perf_counter()
        try:
            with _note_on_error(f"Raised by explainer {label!r} on sample {case.sample.id!r}."):
                (maps,) = explainer(case.adapter, [case.sample.image], case.sample.prompt, case.answer_ids)
        except (NotApplicableError, UnsupportedModelError) as error:
            record["skipped"][label] = str(error)
            continue
        if timing:
            record["seconds"][label] = round(time.perf_counter() - start, 4)
        result = MetricResult()
        for metric in metrics:
            found = MetricResult()
            note = f"Raised by metric {metric.name!r} for explainer {label!r} on sample {case.sample.id!r}."
            try:
                with _note_on_error(note):
                    metric.measure(case, explainer, maps, found)
            except (NotApplicableError, UnsupportedModelError) as error:
                record["skipped_metrics"].setdefault(label, {})[metric.name] = str(error)
            else:
                result.update(found)
        record["scores"][label] = result.scores
        record["curves"][label] = result.curves
    return record


@contextmanager
def _note_on_error(note: str) -> Iterator[None]:
    """Add a note to any error; on Python 3.10, whose errors have no notes, warn instead."""
    try:
        yield
    except (NotApplicableError, UnsupportedModelError):
        raise
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(note)
        else:
            warnings.warn(note, stacklevel=3)
        raise
