r"""Which measure of text relevance identifies the earlier words that the model needs?

    python benchmarks/text_relevance.py

For each content word of a true answer (description, relation, existence), each earlier text token is replaced by the
unknown token, one at a time. The drop of the word's log-probability is the ground truth. A measure is good if its
ranking of the earlier tokens agrees with the drops (Spearman's correlation) and if its first token is the one with the
largest drop (top 1).

Needs: the package only; about a minute on one core for 60 scenes.

Prints: one table of both figures per measure. The README quotes it where it describes ARC's rankings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
import typer
from common import TEXT_RELEVANCE_SEED, Checkpoint, Threads, load_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from captum_intramodal import ARC, ModelAdapter
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, Question, Scene, compose
from captum_intramodal.demo.scenes import CLASSES, COLORS
from captum_intramodal.explanation.activations import collect_answer_activations

CONTENT = {*CLASSES, *COLORS, "yes", "no", "nothing"}
# A word depends on earlier words only if some drop of its log-probability exceeds this.
MIN_DROP = 0.01


def spearman(a: Tensor, b: Tensor) -> float:
    """Compute the correlation of ranks."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def log_probability_drops(adapter: ModelAdapter, scene: Scene, question: Question, positions: Tensor) -> Tensor:
    """Measure by how much the log-probability of each answer token (row) drops if a text token (column) is replaced."""
    scorer = AnswerScorer(adapter, question.prompt, question.answer)
    changed = scorer.without_tokens(scene.image, positions, torch.eye(len(positions), dtype=torch.bool))
    return scorer.log_probability([scene.image])[0][:, None] - changed.T


def agreements(adapter: ModelAdapter, scene: Scene, question: Question) -> Iterator[tuple[str, float, float]]:
    """Yield per content word and measure the measure's name, its correlation with the drops, and if it finds the
    largest."""
    captured = collect_answer_activations(adapter, [scene.image], question.prompt, question.answer, (1.0,))
    ids, states = captured.text.ids, list(captured.ranking_states.values())
    drops = log_probability_drops(adapter, scene, question, captured.text.positions)
    token, prediction = (
        ARC(model=adapter.lens, ranking_position=at).compare(states, captured.last, ids)  # type: ignore[arg-type]
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
    first_answered = len(ids) - captured.n_answer
    for t in range(first_answered, len(ids)):
        drop = drops[t - first_answered, :t]
        if adapter.tokenizer.decode([int(ids[t])]) in CONTENT and float(drop.max()) > MIN_DROP:
            for name, values in measures.items():
                yield name, spearman(values[t, :t], drop), float(values[t, :t].argmax() == drop.argmax())


def main(
    model: Checkpoint = CHECKPOINT,
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 60,
    threads: Threads = 1,
) -> None:
    adapter = load_adapter(model, threads)
    agreement: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in track(range(scenes), description="Replacing words"):
        scene, rng = compose(TEXT_RELEVANCE_SEED + index), np.random.default_rng(index)
        for question in (scene.describe_question(rng), scene.relation_question(rng), scene.exists_question(rng)):
            if question is not None:
                for name, rank, first in agreements(adapter, scene, question):
                    agreement[name].append((rank, first))
    count = len(next(iter(agreement.values())))
    table = Table("measure", "Spearman", "top 1", title=f"{count} words of {scenes} held-out scenes")
    for name, values in agreement.items():
        rank, first = np.nanmean(np.array(values), axis=0)
        table.add_row(name, f"{rank:.3f}", f"{first:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
