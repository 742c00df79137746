r"""Which of the model types of ``AutoModelForImageTextToText`` the package explains, and what stops it for the others.

    python benchmarks/families.py --out benchmarks/results/families.json

Each type is a tiny random model with its real processor (tests/families.py), in a process of its own. The stages:
build; processor; a teacher-forced pass that agrees with ``generate``; the adapter's inputs; logit lens; geometry, with
the oracle's rate and what it is by chance; an explanation end to end.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from PIL import Image, ImageDraw
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.geometry import geometry_oracle

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.families import LEFT_OUT, answer_logits, build, prepare

SIZE = (640, 400)
QUESTION, ANSWER = "describe the picture", "a red cat"
STAGES = ("build", "processor", "forward", "generate", "adapter", "lens", "geometry", "oracle", "explain")


def natural_picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """A smooth random background with shapes on it."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(rng.integers(60, 200, (6, 9, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for index in range(8):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(30, width // 4)), int(rng.integers(30, height // 4))
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def agreement(model: Any, inputs: dict[str, Any]) -> tuple[list[int], float]:
    """A generated answer, and how far its teacher-forced logits are from those that chose it."""
    model.generation_config.update(min_new_tokens=4)
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    stepwise = torch.cat([logits.float() for logits in output.logits])
    ids = output.sequences[0, -len(stepwise) :].tolist()
    forced = answer_logits(model, inputs, ids).float()
    width = min(forced.shape[1], stepwise.shape[1])
    forced, stepwise = forced[:, :width], stepwise[:, :width]
    return ids, float((forced - stepwise)[stepwise > -1e30].abs().max())


def survey(model_type: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Reports what works for a type, after every stage: a row with the stages passed and the errors of the others."""
    row: dict[str, Any] = {"type": model_type, "passed": [], "errors": {}}
    if model_type in LEFT_OUT:
        report(row | {"errors": {"build": f"left out: {LEFT_OUT[model_type]}"}})
        return
    found: dict[str, Any] = {}

    def stage(name: str, needs: tuple[str, ...], run: Any) -> None:
        if any(need not in row["passed"] for need in needs):
            return
        report(row | {"errors": {**row["errors"], name: "the process did not come back"}})
        start = time.perf_counter()
        try:
            if message := run():
                row["errors"][name] = message
            else:
                row["passed"].append(name)
        except Exception as error:
            text = " ".join(str(error).split())
            row["errors"][name] = f"{type(error).__name__}: {text[:300]}"
        row[f"{name}_seconds"] = round(time.perf_counter() - start, 2)

    picture = natural_picture()

    def build_it() -> None:
        found["model"], found["processor"] = build(model_type)

    def process() -> None:
        found["inputs"] = prepare(found["model"], found["processor"], [picture], QUESTION)
        row["keys"] = {
            key: list(value.shape) if hasattr(value, "shape") else type(value).__name__
            for key, value in found["inputs"].items()
        }

    def forward() -> str | None:
        tokenizer = found["processor"].tokenizer
        ids = [i for i in (tokenizer.convert_tokens_to_ids(w) for w in ANSWER.split()) if i is not None]
        blank = prepare(found["model"], found["processor"], [natural_picture(seed=1)], QUESTION)
        logits, other = (answer_logits(found["model"], inputs, ids) for inputs in (found["inputs"], blank))
        # Some models forbid a part of the vocabulary.
        allowed = logits.isfinite() & (logits > -1e30)
        row["picture_matters"] = round(float((logits - other)[allowed].abs().max() / logits[allowed].std()), 4)
        return None if row["picture_matters"] > 1e-3 else "the picture does not change the logits"

    def generate() -> str | None:
        ids, gap = agreement(found["model"], found["inputs"])
        row["generated"] = found["processor"].tokenizer.decode(ids)
        row["gap"] = float(f"{gap:.2g}")
        return None if gap < 1e-3 else f"generate and the teacher-forced pass differ by {gap:.2g}"

    def adapt() -> None:
        found["adapter"] = adapter = ModelAdapter(found["model"], found["processor"])
        encoding = adapter.encode(adapter.prepare([picture], QUESTION), adapter.tokenize_answer(ANSWER))
        row["visual_tokens"] = len(encoding.visual_positions)
        adapter.run(encoding.inputs)

    def lens() -> None:
        lens = found["adapter"].lens
        row["lens"] = dict(factor=round(lens.factor, 4), cap=lens.cap, norm=type(lens.norm).__name__)

    def geometry() -> None:
        found["geometry"] = found["adapter"].geometry([SIZE])
        row["kinds"] = dict(Counter(found["geometry"].kinds))
        row["token_size"] = [round(side, 1) for side in found["geometry"].token_size]

    def oracle() -> str | None:
        right = found["geometry"]
        order = torch.randperm(len(right.boxes), generator=torch.Generator().manual_seed(0))
        local = right.is_local.nonzero().flatten()
        boxes = right.boxes.clone()
        boxes[local] = right.boxes[local[order[order < len(local)]]]
        rates = {}
        for name, geometry in (("oracle", right), ("chance", replace(right, boxes=boxes))):
            prepare_for = lambda images: found["adapter"].prepare(images, QUESTION)  # noqa: E731
            rates[name] = geometry_oracle(found["model"], prepare_for, [picture], geometry, bypass=True)
        row.update(rates)
        return None if rates["oracle"] >= 0.9 else f"oracle {rates['oracle']:.2f}"

    def explain_it() -> None:
        explanation = explain(found["model"], found["processor"], picture, QUESTION, answer=ANSWER)
        row["scales"] = explanation.settings.get("scales")
        row["map_maximum"] = round(float(explanation.maps[0].max()), 4)

    stage("build", (), build_it)
    stage("processor", ("build",), process)
    stage("forward", ("processor",), forward)
    stage("generate", ("processor",), generate)
    stage("adapter", ("build",), adapt)
    if "adapter" in found:
        stage("lens", (), lens)
        stage("geometry", (), geometry)
        stage("oracle", ("geometry",), oracle)
    stage("explain", ("build",), explain_it)
    report(row | {"finished": True})


def run_apart(model_type: str, timeout: float) -> dict[str, Any]:
    """The survey of a type in a process of its own, so that a crash or a hang stops nothing else."""
    start = time.perf_counter()
    # Forked, as importing everything takes longer than most surveys.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=survey, args=(model_type, sender.send))
    process.start()
    sender.close()
    row: dict[str, Any] = {"type": model_type, "passed": [], "errors": {"build": "the process did not come back"}}
    with suppress(EOFError):
        while not row.pop("finished", False) and receiver.poll(timeout + start - time.perf_counter()):
            row = receiver.recv()
    process.kill()
    process.join()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| type | {' | '.join(STAGES)} | visual tokens | kinds | oracle | chance | s |",
        f"|---|{'---|' * (len(STAGES) + 5)}",
    ]
    for row in rows:
        marks = ["✓" if s in row["passed"] else "✗" if s in row["errors"] else "" for s in STAGES]
        kinds = ", ".join(f"{count} {kind}" for kind, count in row.get("kinds", {}).items())
        rates = [f"{row[name]:.2f}" if name in row else "" for name in ("oracle", "chance")]
        cells = [row["type"], *marks, row.get("visual_tokens", ""), kinds, *rates, row.get("seconds", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    totals = ", ".join(f"{stage} {sum(stage in row['passed'] for row in rows)}" for stage in STAGES)
    errors = [f"- {row['type']}, {stage}: {message}" for row in rows for stage, message in row["errors"].items()]
    return "\n".join([*lines, "", f"Of {len(rows)} types: {totals}.", "", *errors])


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Model types; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows, one per type.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one type.")] = 90,
) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for model_type in types or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        rows.append(run_apart(model_type, timeout))
        print(model_type, rows[-1]["passed"][-1:], rows[-1]["errors"], file=sys.stderr, flush=True)
        if out:
            out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
