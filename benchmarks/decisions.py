r"""Does the model predict the same words at other scales? If not, MSEA aggregates maps of different decisions.

    python benchmarks/decisions.py --data "scenes:count=40"
    python benchmarks/decisions.py \
        --data "scenes:count=40,seed=2100000,objects=[3,5],overlap=0.4,same_class=2,scale=0.8"

The model's own answer is teacher-forced at each scale. The decision for a token is the same if the token is still the
most likely one. To measure the effect on the maps of dropping or down-weighting scales with another decision, evaluate:

    captum-intramodal evaluate --model demo --data ... --out RUN --answers model --metrics "f1_iou pointing deletion" \
        --explainers "msea+arc msea+arc:changed_decisions=drop msea+arc:changed_decisions=weigh"

Needs: the package only; about a minute on one core for 40 scenes.

Prints: per scale, for object words and for all tokens, the share of equal decisions and the mean probability, with 95 %
bootstrap intervals over samples. ``results/decisions.md`` holds the output of both commands; the README quotes it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from common import (
    Checkpoint,
    Report,
    Threads,
    format_interval,
    load_adapter,
    markdown_table,
    ratio_interval,
    write_report,
)
from rich.progress import track

from captum_intramodal import ModelAdapter
from captum_intramodal.datasets import EvaluationDataset, open_dataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import AnsweredSample
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.metrics import Interval
from captum_intramodal.models.hooks import evaluation_mode

# By kind of token and scale, a row per sample: tokens with the same decision, sum of probabilities, number of tokens.
Counts = dict[tuple[str, float], list[tuple[float, float, float]]]


def count_decisions(
    adapter: ModelAdapter, dataset: EvaluationDataset, scales: tuple[float, ...], interpolate_pos_encoding: bool
) -> Counts:
    """Compare the most likely tokens at each scale with those at the original size."""
    counts: Counts = {}
    for index in track(range(len(dataset)), description="Deciding"):
        sample = dataset[index]
        with evaluation_mode(adapter.model):
            ids = adapter.generate(adapter.prepare([sample.image], sample.prompt))
            captured = collect_answer_activations(
                adapter, [sample.image], sample.prompt, ids, scales, decisions=True,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )  # fmt: skip
        decisions = captured.decisions or {}
        objects = [token for word in AnsweredSample(adapter, sample, ids).objects.values() for token in word.tokens]
        for kind, tokens in (("object words", objects), ("all tokens", list(range(len(ids))))):
            for scale, decision in decisions.items():
                same = (decision.likeliest == decisions[1.0].likeliest)[tokens].float()
                probability = decision.log_probability[tokens].exp()
                counts.setdefault((kind, scale), []).append(
                    (float(same.sum()), float(probability.sum()), float(len(tokens)))
                )
    return counts


def table_row(kind: str, scale: float, samples: list[tuple[float, float, float]]) -> list[str]:
    """Return the cells of one kind of token at one scale."""
    same, probability, number = np.array(samples).T
    intervals: list[Interval] = [ratio_interval(part, number) for part in (same, probability)]
    return [f"{kind} ({int(number.sum())})", f"{scale:g}", *map(format_interval, intervals)]


def main(
    model: Checkpoint = CHECKPOINT,
    data: Annotated[str, typer.Option(help="Data set, as in captum-intramodal evaluate.")] = "scenes:count=100",
    scales: Annotated[str, typer.Option(help="Scales, separated by commas.")] = "1,0.5,0.75,1.25,1.5,2,3",
    interpolate_pos_encoding: Annotated[bool, typer.Option(help="As in captum_intramodal.explain.")] = False,
    out: Report = None,
    threads: Threads = 1,
) -> None:
    adapter, dataset = load_adapter(model, threads), open_dataset(data)
    factors = tuple(float(part) for part in scales.split(","))
    counts = count_decisions(adapter, dataset, factors, interpolate_pos_encoding)
    ordered = sorted(counts.items(), key=lambda item: (item[0][0] != "object words", item[0][1]))
    rows = [table_row(kind, scale, samples) for (kind, scale), samples in ordered]
    lines = [f"{data}, {len(dataset)} samples; 95 % bootstrap intervals over samples.", ""]
    lines += markdown_table(("tokens", "scale", "same decision", "probability"), rows, "|---|---:|---|---|")
    print("\n".join(lines))
    write_report(out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
