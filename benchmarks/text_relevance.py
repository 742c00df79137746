r"""Which measure of text relevance tells the earlier words that the model really needs?

    python benchmarks/text_relevance.py

For each content word of a right answer (describe, relation, exists), every earlier text token is replaced by the
unknown token, one at a time, and the drop of the word's log-probability is taken as the truth. A measure is good if its
ranking of the earlier tokens agrees with it (Spearman) and its first token is the one that matters most (top 1).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import load_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from captum_intramodal import ARC, ModelAdapter
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, Question, Scene, compose
from captum_intramodal.demo.scenes import CLASSES, COLORS
from captum_intramodal.explanation.activations import collect_answer_activations

HELD_OUT = 3_000_000
CONTENT = {*CLASSES, *COLORS, "yes", "no", "nothing"}
NEEDED = 0.01  # smallest largest drop of log-probability at which a word depends on earlier words at all


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def log_probability_drops(adapter: ModelAdapter, scene: Scene, question: Question, positions: Tensor) -> Tensor:
    """How much the log-probability of each answer token (row) falls when a text token (column) is replaced."""
    scorer = AnswerScorer(adapter, question.prompt, question.answer)
    changed = scorer.without_tokens(scene.image, positions, torch.eye(len(positions), dtype=torch.bool))
    return scorer.log_probability([scene.image])[0][:, None] - changed.T


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    scenes: int = 60,
    threads: int = 1,
) -> None:
    adapter = load_adapter(model, threads)
    agreement: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in track(range(scenes), description="Replacing words"):
        scene, rng = compose(HELD_OUT + index), np.random.default_rng(index)
        for question in (scene.describe_question(rng), scene.relation_question(rng), scene.exists_question(rng)):
            if question is None:
                continue
            reading = collect_answer_activations(adapter, [scene.image], question.prompt, question.answer, (1.0,))
            ids, states = reading.text.ids, list(reading.ranking_states.values())
            drops = log_probability_drops(adapter, scene, question, reading.text.positions)
            token, prediction = (
                ARC(model=adapter.lens, ranking_position=at).compare(states, reading.last, ids)  # type: ignore[arg-type]
                for at in ("token", "prediction")
            )
            measures = {
                "text activation": token.text_activation,
                "relevance (RBO at the token)": token.relevance,
                "relevance (RBO at the prediction)": prediction.relevance,
                "text activation x RBO at the token": token.text_activation * token.relevance,
                "text activation x RBO at the prediction": token.text_activation * prediction.relevance,
                "how recent the token is": torch.arange(len(ids)).float().expand(len(ids), -1),
            }
            first_answered = len(ids) - reading.n_answer
            for t in range(first_answered, len(ids)):
                drop = drops[t - first_answered, :t]
                if adapter.tokenizer.decode([int(ids[t])]) in CONTENT and float(drop.max()) > NEEDED:
                    for name, values in measures.items():
                        first = float(values[t, :t].argmax() == drop.argmax())
                        agreement[name].append((spearman(values[t, :t], drop), first))
    count = len(next(iter(agreement.values())))
    table = Table("measure", "Spearman", "top 1", title=f"{count} words of {scenes} held-out scenes")
    for name, values in agreement.items():
        rank, first = np.nanmean(np.array(values), axis=0)
        table.add_row(name, f"{rank:.3f}", f"{first:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
