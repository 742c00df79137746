"""A demo answer, an explainer with known maps, and records of an evaluation for the tests of this package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.datasets import Sample, SceneDataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import (
    AnsweredSample,
    Column,
    Leaderboard,
    MetricResult,
    make_metric,
)
from captum_intramodal.evaluation.records import Comparison
from captum_intramodal.metrics import (
    FRACTIONS,
)

CHEAP = ["logit_lens", "random"]
LOCAL = ["f1_iou", "pointing"]
OBJ = Column("obj_iou", "Obj-IoU", True)
FUNC = Column("func_iou", "Func-IoU", True)
F1 = Column("f1_iou", "F1-IoU", True, of=("obj_iou", "func_iou"))
DELETION = Column("deletion", "deletion", False)
COLUMNS = (F1, OBJ, FUNC, DELETION)
N = 400


@cache
def demo_model() -> tuple[Any, Any]:
    """Load the demo model and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


@cache
def demo_case(**options: Any) -> AnsweredSample:
    """Return the first scene with its annotated answer: "the picture shows a lemon and a donut."."""
    adapter = ModelAdapter(*demo_model())
    sample = SceneDataset(count=1, **options)[0]
    return AnsweredSample(adapter, sample, adapter.tokenize_answer(sample.answer or ""))


@dataclass
class MaskExplainer:
    """An explainer whose map of each token is the mask of the category that its word names."""

    sample: Sample
    name: str = "masks"
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Any, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        maps = torch.zeros(len(answer_ids), *self.sample.image.size[::-1])
        for word in AnsweredSample(adapter, self.sample, answer_ids).objects.values():
            maps[list(word.tokens)] = torch.from_numpy(self.sample.categories[word.category or ""]).float()
        return [maps]


def measure(spec: str, maps: Tensor, explainer: Any = None, of: AnsweredSample | None = None) -> MetricResult:
    """Measure maps with the metric of a spec."""
    found = MetricResult()
    make_metric(spec).measure(of or demo_case(), explainer, maps, found)
    return found


def read_results(directory: Path) -> dict[str, bytes]:
    """Read the results of a run that are reproducible to the byte."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in (".md", ".csv", ".jsonl", ".json")}


def make_record(index: int, scores: dict[str, dict[str, dict[str, float]]], **more: Any) -> dict[str, Any]:
    """Make the record of one sample."""
    words = [{"text": "dog", "tokens": [1], "type": "noun", "category": "dog", "probability": 0.9}]
    return {"index": index, "id": f"id {index}", "answer": "a dog", "words": words, "scores": scores, **more}


def make_records(samples: int = 25, labels: tuple[str, ...] = ("lens", "TAM", "MSEA"), seed: int = 0) -> list[Any]:
    """Make records with samples that TAM skips, samples without nouns and samples without function words."""
    rng = np.random.default_rng(seed)

    def values(words: list[str], mean: float) -> dict[str, float]:
        return {word: float(np.clip(mean + rng.normal(0, 0.05), 0, 1)) for word in words}

    records = []
    for index in range(samples):
        nouns = [str(word) for word in range(1, 1 + (index + 1) % 4)]
        functions = ["0", "5", "6"][: (index + 2) % 4]
        hard = rng.normal(0.4, 0.1)
        scores: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        skipped = {"TAM": "tiles"} if "TAM" in labels and index % 8 == 3 else {}
        for quality, label in enumerate(labels):
            if label in skipped:
                continue
            columns = {
                "obj_iou": values(nouns, hard + 0.05 * quality),
                "func_iou": values(functions, hard + 0.03 * quality),
                "deletion": values(nouns, hard - 0.02 * quality),
            }
            scores[label] = {name: entries for name, entries in columns.items() if entries}
            curves[label] = {"insertion": {word: rng.random(len(FRACTIONS)).tolist() for word in nouns}}
        seconds = {label: float(rng.random()) for label in scores}
        records.append(make_record(index, scores, curves=curves, seconds=seconds, skipped=skipped))
    return records


def find_pair(board: Leaderboard, first: str, second: str, column: str) -> Comparison:
    """Find a comparison by its labels and column."""
    return next(p for p in board.pairs if (p.first, p.second, p.column) == (first, second, column))


def parse_tables(markdown: str) -> list[dict[str, list[str]]]:
    """Parse Markdown tables: the cells of each line by its first cell."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    lines = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [{cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in block} for block in lines]
