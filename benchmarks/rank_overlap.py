r"""How much do the rankings of different tokens overlap? ARC weights a context token by 1 - rank-biased overlap.

    python benchmarks/rank_overlap.py                                        # the demo model
    python benchmarks/rank_overlap.py --model LLAVA --data "scenes:size=[112,112],sprites=...,classes=[...]"

Needs: the package only, or a checkpoint of ``train_llava.py`` and its sprites; about a minute on one core.

Prints: the number of pairs (a token of the answer, a token of its context), their mean rank-biased overlap and four
quantiles. The README quotes the LLaVA's median.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from common import Checkpoint, Threads, load_adapter
from rich.progress import track

from captum_intramodal import ARC
from captum_intramodal.datasets import open_dataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.models.hooks import evaluation_mode


def main(
    model: Checkpoint = CHECKPOINT,
    data: Annotated[str, typer.Option(help="Data set, as in captum-intramodal evaluate.")] = "scenes",
    samples: Annotated[int, typer.Option(min=1, help="Most samples to process.")] = 20,
    threads: Threads = 1,
) -> None:
    adapter, dataset = load_adapter(model, threads), open_dataset(data)
    arc, overlaps = ARC(model=adapter.lens), []
    for index in track(range(min(samples, len(dataset))), description="Comparing"):
        sample = dataset[index]
        with evaluation_mode(adapter.model):
            captured = collect_answer_activations(adapter, [sample.image], sample.prompt, sample.answer, (1.0,))
            context = arc.compare(list(captured.ranking_states.values()), captured.last, captured.text.ids)
        answer = slice(-captured.n_answer, None)
        overlaps.append(context.relevance[answer][context.context[answer]].cpu())
    overlap = torch.cat(overlaps)
    print(f"{len(overlap)} pairs, mean rank-biased overlap {float(overlap.mean()):.3f}")
    for share in (0.1, 0.5, 0.9, 0.99):
        print(f"{share:.0%} of them are at most {float(overlap.quantile(share)):.3f}")


if __name__ == "__main__":
    typer.run(main)
