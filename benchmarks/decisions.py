r"""Does MSEA explain the decision at the original size? How often the model would say the same word at another scale.

    python benchmarks/decisions.py                       # the demo model, 100 scenes
    python benchmarks/decisions.py --data "scenes:count=100,objects=[3,5],overlap=0.4,same_class=2,scale=0.8"

The model's own answer is teacher-forced at each scale. A token's decision is the same where it is still the most likely
one. What follows for the maps when scales of another decision are left out or weigh less, an evaluation tells:

    captum-intramodal evaluate --model demo --data ... --out RUN --answers model --metrics "f1_iou pointing deletion" \
        --explainers "msea+arc msea+arc:changed_decisions=drop msea+arc:changed_decisions=weigh"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import load_adapter
from rich.progress import track

from captum_intramodal.datasets import open_dataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import AnsweredSample
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.metrics import bootstrap_interval
from captum_intramodal.models.hooks import evaluation_mode


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    data: str = "scenes:count=100",
    scales: str = "1,0.5,0.75,1.25,1.5,2,3",
    interpolate_pos_encoding: bool = False,
    out: Annotated[Path | None, typer.Option(help="Markdown to write.")] = None,
    threads: int = 1,
) -> None:
    adapter, dataset = load_adapter(model, threads), open_dataset(data)
    factors = tuple(float(part) for part in scales.split(","))
    # Per kind of token and scale a row per sample: tokens with the same decision, probability, tokens.
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for index in track(range(len(dataset)), description="Deciding"):
        sample = dataset[index]
        with evaluation_mode(adapter.model):
            ids = adapter.generate(adapter.prepare([sample.image], sample.prompt))
            reading = collect_answer_activations(
                adapter, [sample.image], sample.prompt, ids, factors, decisions=True,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )  # fmt: skip
        decisions = reading.decisions or {}
        objects = [token for word in AnsweredSample(adapter, sample, ids).objects.values() for token in word.tokens]
        for kind, tokens in (("object words", objects), ("all tokens", list(range(len(ids))))):
            for scale, decision in decisions.items():
                same = (decision.likeliest == decisions[1.0].likeliest)[tokens].float()
                found.setdefault((kind, scale), []).append(
                    (float(same.sum()), float(decision.log_probability[tokens].exp().sum()), len(tokens))
                )

    def share(part: np.ndarray, total: np.ndarray, axis: int = -1) -> np.ndarray:
        quotient: np.ndarray = part.sum(axis) / total.sum(axis).clip(1e-9)
        return quotient

    lines = [f"{data}, {len(dataset)} samples; 95 % bootstrap intervals over samples.", ""]
    lines += ["| tokens | scale | same decision | probability |", "|---|---:|---|---|"]
    for (kind, scale), rows in sorted(found.items(), key=lambda item: (item[0][0] != "object words", item[0][1])):
        same, probability, count = np.array(rows).T
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap_interval(np.stack([part, count], 1), share))
                 for part in (same, probability)]  # fmt: skip
        lines.append(f"| {kind} ({int(count.sum())}) | {scale:g} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
