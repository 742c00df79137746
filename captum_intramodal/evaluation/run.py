r"""An evaluation: explainers and metrics over a data set, one record per sample, and what it all comes to.

Every sample is one file, written in one step: a run that was killed goes on with the samples that are missing, and
several processes can share the work without speaking to each other. Whoever writes the last sample makes the table.
"""

from __future__ import annotations

import json
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from captum_intramodal._version import __version__
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.datasets import EvaluationDataset, Sample, open_dataset
from captum_intramodal.evaluation.case import AnsweredSample
from captum_intramodal.evaluation.leaderboard import Column, Leaderboard, make_leaderboard
from captum_intramodal.evaluation.measures import Metric, MetricResult, make_metric
from captum_intramodal.explainers import Explainer, make_explainer, shared_passes
from captum_intramodal.metrics import FRACTIONS, area_under_curve, insertion_curve
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.parts_of_speech import Tagger

__all__ = ["DEFAULT_EXPLAINERS", "DEFAULT_METRICS", "evaluate"]

DEFAULT_EXPLAINERS = (
    "logit_lens", "tam", "tam:filter=false", "msea", "arc", "msea+arc", "attention", "random", "centre_gaussian",
)  # fmt: skip
DEFAULT_METRICS = ("f1_iou", "pointing", "energy", "average_precision", "insertion", "deletion", "road")

_PACKAGES = ("captum", "torch", "torchvision", "transformers", "numpy", "pillow", "HanTa", "inflect")


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
    Compares explainers of a model on a data set.

    Into ``out`` go ``manifest.json`` (everything that defines the run, and what it covered), one file per sample in
    ``samples``, and in the end ``samples.jsonl`` (one line per sample), ``leaderboard.md``, ``leaderboard.csv``,
    ``pairs.csv`` (paired bootstrap intervals and permutation tests of all pairs of explainers) and ``index.html``.

    A run that was killed goes on when it is called again with the same arguments; nothing is computed twice. The model
    stays on its devices and in its dtype, so it may be spread over several or quantized.

    Args:

        model (PreTrainedModel): From ``AutoModelForImageTextToText.from_pretrained``.
        processor: From ``AutoProcessor.from_pretrained``.
        dataset (EvaluationDataset or str): What :func:`~captum_intramodal.datasets.open_dataset` takes, or returns.
        out (str or os.PathLike): Directory of this run alone.
        explainers (Mapping or Sequence[str], optional): Explainers by the label that the table gives them, or specs
                    of :func:`~captum_intramodal.explainers.make_explainer`, which are their labels.
                    Default: ``DEFAULT_EXPLAINERS``
        metrics (Sequence[Metric or str], optional): Metrics or specs of
                    :func:`~captum_intramodal.evaluation.make_metric`.
                    Default: ``DEFAULT_METRICS``
        answers (str, optional): ``'dataset'``: explain the data set's answers where it has some, else the model's own.
                    ``'model'``: always the model's own greedy answers.
                    Default: ``'dataset'``
        max_new_tokens (int, optional): Where the model's own answers end at the latest.
                    Default: 64
        tagger (Callable, optional): See :func:`~captum_intramodal.metrics.word_types`.
                    Default: None, HanTa for words that the data set does not annotate
        reference (str, optional): Label of the explainer that the table compares all others with.
                    Default: None, the first
        timing (bool, optional): Measure the seconds of each explainer; then they do not share passes of the model.
                    Default: False
        fractions (Sequence[float], optional): Where the curves of insertion, deletion and ROAD are measured. Where
                    objects are small, maps differ in the first few percent: ``(0, 0.01, 0.02, 0.05, 0.1, 0.2)``.
                    Default: 0, 0.1, ..., 1
        batch_size (int, optional): Prompts that metrics run together; memory grows with it.
                    Default: 16
        rank, world_size (int, optional): This process takes each ``world_size``-th of the samples, from ``rank`` on.
                    Default: 0, 1
        progress (Callable, optional): Called with the number of samples that are done, of all processes, and of all
                    samples.
                    Default: None

    Returns:
        Leaderboard: The table; None if other processes have samples left.

    Raises:
        TypeError: not a model, processor or data set; explainers or metrics that are no lists.
        ValueError: unknown explainers or metrics, options that they do not have, two with one label; ``out`` is a file
            or belongs to another run; broken annotations, or none.
        ImportError: packages of ``captum-intramodal[evaluate]`` are not installed.

    Examples::

        >>> board = evaluate(model, processor, "scenes:count=50", "run", ["logit_lens", "msea+arc"], ["f1_iou", "road"])
        >>> print(board.to_markdown())
    """
    adapter = ModelAdapter(model, processor)
    dataset = open_dataset(dataset) if isinstance(dataset, str) else dataset
    if not isinstance(dataset, EvaluationDataset):
        raise TypeError(f"A data set has settings, a length and samples; got {type(dataset).__name__}.")
    if not len(dataset):
        raise ValueError(f"The data set {dataset.settings} has no samples.")
    if isinstance(explainers, str) or isinstance(metrics, str):
        raise TypeError("explainers and metrics are lists, also of one.")
    if wrong := [m for m in metrics if not isinstance(m, str | Metric)]:
        raise TypeError(f"A metric is a spec or a Metric, got {type(wrong[0]).__name__}.")
    compared = dict(explainers) if isinstance(explainers, Mapping) else _by_spec(explainers, make_explainer)
    measured = list(_by_spec([m for m in metrics if isinstance(m, str)], make_metric).values())
    measured += [m for m in metrics if not isinstance(m, str)]
    columns = _columns(measured)
    if not compared or not measured:
        raise ValueError(f"{len(compared)} explainers and {len(measured)} metrics: give at least one of each.")
    if reference is not None and reference not in compared:
        raise ValueError(f"reference={reference!r} is none of the explainers {', '.join(compared)}.")
    reference = reference or next(iter(compared))
    if answers not in ("dataset", "model"):
        raise ValueError(f"answers must be 'dataset' or 'model', got {answers!r}.")
    # What does not increase from 0 to 1 is told before anything runs.
    area_under_curve(insertion_curve(lambda kept: np.zeros(len(kept)), np.zeros(1), fractions), fractions)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}.")

    run = _Run(Path(out), len(dataset), rank)
    run.begin(
        {
            "versions": {"captum_intramodal": __version__, "python": platform.python_version()} | _versions(),
            "model": _describe(adapter),
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
            if not run.has(index):
                sample = dataset[index]
                case = AnsweredSample(
                    adapter, sample, _answer(adapter, sample, answers, max_new_tokens), tagger, batch_size, fractions
                )
                run.write(index, _record(case, compared, measured, timing))
            if progress is not None:
                progress(run.done(), len(dataset))
    return run.finish(columns, reference, fractions) if run.done() == len(dataset) else None


def _by_spec(specs: Iterable[str], make: Callable[[str], Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for spec in (spec.strip() for spec in specs):
        if spec in made:
            raise ValueError(f"{spec!r} is given twice.")
        made[spec] = make(spec)
    return made


def _columns(metrics: Iterable[Metric]) -> list[Column]:
    """Each once: F1-IoU has those of Obj-IoU and Func-IoU."""
    columns: dict[str, Column] = {}
    owner: dict[str, Metric] = {}
    for metric in metrics:
        for column in metric.columns:
            if (other := owner.get(column.name)) is not None and type(other) is type(metric):
                raise ValueError(
                    f"Two metrics, {other.settings} and {metric.settings}, have one column {column.name!r}; put them "
                    "into two runs."
                )
            columns.setdefault(column.name, column)
            owner.setdefault(column.name, metric)
    return list(columns.values())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _describe(adapter: ModelAdapter) -> dict[str, Any]:
    model = adapter.model
    return {
        "id": str(getattr(model.config, "_name_or_path", "")),
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "weights_crc32": _fingerprint(model),
    }


@torch.no_grad()
def _fingerprint(model: PreTrainedModel) -> str:
    """Of the first values of every parameter: weights that were trained on have another one."""
    crc = 0
    for name, parameter in sorted(model.named_parameters()):
        values = b"" if parameter.is_meta else parameter.flatten()[:64].cpu().view(torch.uint8).numpy().tobytes()
        crc = zlib.crc32(name.encode() + values, crc)
    return f"{crc:08x}"


def _answer(adapter: ModelAdapter, sample: Sample, answers: str, max_new_tokens: int) -> list[int]:
    if answers == "dataset" and sample.answer is not None:
        return adapter.tokenize_answer(sample.answer)
    with evaluation_mode(adapter.model):
        return adapter.generate(adapter.prepare([sample.image], sample.prompt), max_new_tokens)


def _record(
    case: AnsweredSample, explainers: Mapping[str, Explainer], metrics: Sequence[Metric], timing: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": case.sample.id,
        "answer": case.answer,
        "words": [vars(word) for word in case.words] if case.answer_ids else [],
        "categories": [name for name, mask in case.sample.categories.items() if mask.any()],
        "scores": {},
        "curves": {},
        "seconds": {},
        "skipped": {},
    }
    for label, explainer in explainers.items():
        start = time.perf_counter()
        try:
            if not case.answer_ids:
                raise ValueError("The model answered nothing.")
            (maps,) = explainer(case.adapter, [case.sample.image], case.sample.prompt, case.answer_ids)
        except ValueError as error:  # What this explainer cannot do is no reason to stop the others.
            record["skipped"][label] = str(error)
            continue
        if timing:
            record["seconds"][label] = round(time.perf_counter() - start, 4)
        found = MetricResult()
        for metric in metrics:
            try:
                metric.measure(case, explainer, maps, found)
            except ValueError as error:
                raise ValueError(f"{metric.name} of {label} on sample {case.sample.id}: {error}") from error
        record["scores"][label] = found.scores
        record["curves"][label] = found.curves
    return record


class _Run:
    """The files of a run."""

    def __init__(self, out: Path, count: int, rank: int) -> None:
        self.out, self.count, self.rank = out, count, rank
        self.samples = out / "samples"
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; the results need a directory.")

    def begin(self, settings: dict[str, Any]) -> None:
        """Notes what defines the run, or that it is the one which was begun here."""
        settings = json.loads(json.dumps(settings))
        manifest = self.out / "manifest.json"
        if manifest.is_file():
            try:
                begun = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{manifest} is not the manifest of a run; choose another directory.") from error
            if different := [key for key in settings if begun.get(key) != settings[key]]:
                raise ValueError(
                    f"{self.out} belongs to another run: "
                    + "; ".join(f"{key} was {begun.get(key)}, now {settings[key]}" for key in different)
                    + ". Give this one a directory of its own."
                )
        elif self.out.is_dir() and any(self.out.iterdir()) and not self.samples.is_dir():
            raise ValueError(f"{self.out} holds other files; give the results a directory of their own.")
        self.samples.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        if not manifest.is_file():
            self._replace(manifest, self._manifest({}))

    def _manifest(self, coverage: Mapping[str, Any]) -> str:
        return json.dumps({"format": 1, "settings": self.settings, "coverage": coverage}, indent=1) + "\n"

    def _file(self, index: int) -> Path:
        return self.samples / f"{index:06d}.json"

    def has(self, index: int) -> bool:
        return self._file(index).is_file()

    def done(self) -> int:
        return sum(1 for _ in self.samples.glob("*.json"))

    def write(self, index: int, record: Mapping[str, Any]) -> None:
        self._replace(self._file(index), json.dumps({"index": index, **record}, ensure_ascii=False) + "\n")

    def finish(self, columns: Sequence[Column], reference: str, fractions: Sequence[float]) -> Leaderboard:
        lines = [self._file(index).read_text(encoding="utf-8") for index in range(self.count)]
        records = [json.loads(line) for line in lines]
        board = make_leaderboard(records, columns, reference, fractions=fractions)
        manifest = self._manifest(coverage(records, board))
        self._replace(self.out / "samples.jsonl", "".join(lines))
        self._replace(self.out / "manifest.json", manifest)
        self._replace(self.out / "leaderboard.md", board.to_markdown())
        self._make(self.out / "leaderboard.csv", board.to_csv)
        self._make(self.out / "pairs.csv", board.pairs_to_csv)
        self._make(self.out / "index.html", lambda path: board.to_html(path, json.loads(manifest)))
        # Of processes that were killed while they wrote; another one may be making the table at this moment.
        for left in (*self.samples.glob(".*.tmp"), *self.out.glob(f".*.{self.rank}.tmp")):
            left.unlink(missing_ok=True)
        return board

    def _replace(self, file: Path, text: str) -> None:
        self._make(file, lambda path: path.write_text(text, encoding="utf-8"))

    def _make(self, file: Path, write: Callable[[Path], Any]) -> None:
        """Writes a file beside its place first: nobody sees half of it."""
        temporary = file.with_name(f".{file.name}.{self.rank}.tmp")
        write(temporary)
        os.replace(temporary, file)


def coverage(records: Sequence[Mapping[str, Any]], board: Leaderboard) -> dict[str, Any]:
    r"""How much of a data set a run could say something about.

    Args:

        records (Sequence[Mapping]): One per sample.
        board (Leaderboard): What they come to.

    Returns:
        *dict*: numbers of samples, words, nouns, function words and object words with a mask; of the categories that
        the images show, how many the answers name; per explainer the reasons for which samples were skipped.
    """
    types = board.coverage.words
    named = [{w["category"] for w in record["words"]} - {None} for record in records]
    shown = [set(record["categories"]) for record in records]
    return {
        "samples": len(records),
        "answers": sum(bool(record["words"]) for record in records),
        "words": sum(types.values()),
        "nouns": types.get("noun", 0),
        "function_words": types.get("function", 0),
        "categories_shown": sum(map(len, shown)),
        "categories_shown_and_named": sum(len(a & b) for a, b in zip(shown, named, strict=True)),
        "categories_named_but_not_shown": sum(len(b - a) for a, b in zip(shown, named, strict=True)),
        "skipped": {label: dict(reasons) for label, reasons in board.coverage.skipped.items()},
    }
