r"""How much do rankings of different tokens overlap? ARC's weights are 1 less their rank-biased overlap.

    python benchmarks/rank_overlap.py                                        # the demo model
    python benchmarks/rank_overlap.py --model LLAVA --data "scenes:size=[112,112],sprites=...,classes=[...]"

Of the context tokens of each of the answers' tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import load_adapter
from rich.progress import track

from captum_intramodal import ARC
from captum_intramodal.datasets import open_dataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.models.hooks import evaluation_mode


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    data: str = "scenes",
    samples: int = 20,
    threads: int = 1,
) -> None:
    adapter, dataset = load_adapter(model, threads), open_dataset(data)
    arc, overlaps = ARC(model=adapter.lens), []
    for index in track(range(min(samples, len(dataset))), description="Comparing"):
        sample = dataset[index]
        with evaluation_mode(adapter.model):
            reading = collect_answer_activations(adapter, [sample.image], sample.prompt, sample.answer, (1.0,))
            context = arc.compare(list(reading.ranking_states.values()), reading.last, reading.text.ids)
        answer = slice(-reading.n_answer, None)
        overlaps.append(context.relevance[answer][context.context[answer]].cpu())
    overlap = torch.cat(overlaps)
    print(f"{len(overlap)} pairs, mean rank-biased overlap {float(overlap.mean()):.3f}")
    for share in (0.1, 0.5, 0.9, 0.99):
        print(f"{share:.0%} of them are at most {float(overlap.quantile(share)):.3f}")


if __name__ == "__main__":
    typer.run(main)
