r"""What works on which model type of ``AutoModelForImageTextToText``? The table of families.

    python benchmarks/families.py --out benchmarks/results/families.md

Each type is a tiny random model of the real class with its real processor (tests/testing/families.py), in a process of
its own. Explained are one image, two images and a video, then :func:`captum_intramodal.check` runs.

Needs: the package with its ``test`` extra, and a Unix system; about 5 seconds on one core per type.

Prints: a summary and a table with a row per type, to standard error a line of JSON per type as soon as it is finished.
The README quotes the summary of ``results/families.md``.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from common import Report, markdown_table, write_report
from PIL import Image, ImageDraw

from captum_intramodal import check, explain

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.testing.families import FAMILIES, LEFT_OUT, build

SIZE = (640, 400)
METHODS = {
    "logit_lens": "logit lens",
    "layer_gradient_x_activation": "activation x gradient",
    "input_x_gradient": "pixels",
}
HEADER = (
    "type", "class", "explained by", "visual tokens", "oracle (chance)", "lens", "scales", "several images", "video",
    "Captum on pixels; notes",
)  # fmt: skip
# The table has a column for this end of a detail.
PIXELS_SUFFIX = re.compile(r"(;|\. The model is) explained by its pixels$")
QUESTION, ANSWER = "describe the picture", "a red cat"
EXPLANATION = """Printed by `python benchmarks/families.py`, on tiny random models of the real classes with their real
processors and an image of 640 x 400 pixels (video: four frames of 320 x 200). *Oracle*: how often the token that
reacts most to a small change of the image has a box around the change, in brackets with shuffled boxes. *Lens*:
`head(norm(h))` if that equals the model's own logits, else the model's own tail, replayed. *Scales*: those that
`scales="auto"` selects for that image. *Explained by*: the logit lens at visual tokens in the decoder's sequence;
activation x gradient at visual tokens elsewhere, in the named argument of the decoder's blocks; else input x gradient
at the pixels."""


def natural_image(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Draw a smooth random background with shapes on it."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(rng.integers(60, 200, (6, 9, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for index in range(8):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(30, width // 4)), int(rng.integers(30, height // 4))
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def survey(model_type: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Report what works for a type: after every step, the row with all figures so far."""
    row: dict[str, Any] = {"type": model_type}
    if model_type in LEFT_OUT:
        report(row | {"left_out": LEFT_OUT[model_type], "finished": True})
        return
    report(row | {"error": "building it did not finish"})
    image = natural_image()
    model, processor = build(model_type)
    row["class"] = type(model).__name__

    def step(name: str, run: Callable[[], dict[str, Any]]) -> None:
        report(row | {"error": f"{name} did not finish"})
        start = time.perf_counter()
        try:
            row.update(run())
        except Exception as error:
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 2)

    def explain_one() -> dict[str, Any]:
        settings = explain(model, processor, image, QUESTION, ANSWER).settings
        return {"method": settings["method"], "scales": settings["scales"]}

    def explain_two() -> dict[str, Any]:
        images = [image, natural_image((300, 300), seed=1)]
        maps = explain(model, processor, images, QUESTION, ANSWER, scales=(1.0,)).maps
        return {"several_images": len(maps) == 2 and all(bool(m.any()) for m in maps)}

    def explain_video() -> dict[str, Any]:
        frames = [natural_image((320, 200), seed) for seed in range(4)]
        maps = explain(model, processor, frames, QUESTION, ANSWER, scales=(1.0,), video=True).maps
        return {"video": len(maps) == 4 and all(bool(m.any()) for m in maps)}

    def check_it() -> dict[str, Any]:
        checks = check(model, processor, image, QUESTION).checks
        return {"checks": {c.name: {"passed": c.passed, "detail": c.detail, **c.figures} for c in checks}}

    step("explain", explain_one)
    step("several images", explain_two)
    if getattr(processor, "video_processor", None) is not None:
        step("video", explain_video)
    step("check", check_it)
    report(row | {"finished": True})


def run_apart(model_type: str, timeout: float) -> dict[str, Any]:
    """Survey a type in a process of its own, so that a crash or a hang affects no other type."""
    start = time.perf_counter()
    # Forked, because importing everything takes longer than most surveys.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=survey, args=(model_type, sender.send))
    process.start()
    sender.close()
    row: dict[str, Any] = {"type": model_type, "error": "the process did not start"}
    with suppress(EOFError):
        while not row.pop("finished", False) and receiver.poll(timeout + start - time.perf_counter()):
            row = receiver.recv()
    process.kill()
    process.join()
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return a type's cells of the table."""
    if "left_out" in row:
        return [row["type"], "", "left out", "", "", "", "", "", "", row["left_out"]]
    checks = row.get("checks", {})
    geometry, lens, pixels = (checks.get(name, {}) for name in ("geometry", "logit lens", "pixels"))
    notes = [
        f"{name}: {message}"
        for name, message in row.get("errors", {}).items()
        if name not in ("several images", "video")
    ]
    notes += [row["error"]] if "error" in row else []
    if geometry and geometry["passed"] is None:
        notes.append(PIXELS_SUFFIX.sub("", geometry["detail"]))
    notes += [f"{name}: {c['detail']}" for name, c in checks.items() if c["passed"] is False]
    kinds = geometry.get("tokens", {})
    method = METHODS.get(row.get("method", ""), "**fails**")
    return [
        row["type"],
        row.get("class", ""),
        method,
        ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        + (f" in `{geometry['argument']}`" if geometry.get("argument") else ""),
        f"{geometry['oracle']:.2f} ({geometry['chance']:.2f})" if "oracle" in geometry else "",
        lens.get("tail", ""),
        ", ".join(f"{scale:g}" for scale in row.get("scales", [])),
        "yes" if row.get("several_images") else "no",
        "yes" if row.get("video") else "no",
        ("yes" if pixels.get("passed") else "no") + (f"; {' '.join(notes)}" if notes else ""),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the summary and the table as Markdown."""
    ran = [row for row in rows if "method" in row]
    checks = [row.get("checks", {}) for row in ran]
    oracles = [c["geometry"]["oracle"] for c in checks if "oracle" in c.get("geometry", {})]
    passed = sum(rate >= 0.97 for rate in oracles)
    tails = [c["logit lens"].get("tail") for c in checks if c]
    by = {method: sum(row["method"] == method for row in ran) for method in METHODS}
    lines = [
        f"`explain` runs on {len(ran)} of {len(rows)} model types of transformers {transformers.__version__}; "
        f"{by['logit_lens']} by the logit lens at visual tokens, {by['layer_gradient_x_activation']} by activation x "
        f"gradient at visual tokens, {by['input_x_gradient']} by their pixels. Of {len(oracles)} types whose tokens "
        f"have a place, {passed} pass the oracle at 0.97. The lens is fast for {tails.count('fast')} and replayed for "
        f"{tails.count('replay')}. Several images: {sum(bool(row.get('several_images')) for row in ran)}; video: "
        f"{sum(bool(row.get('video')) for row in ran)}.",
        "",
        *markdown_table(HEADER, ([cell.replace("|", "/") for cell in cells(row)] for row in rows)),
    ]
    return "\n".join(lines)


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Model types; all by default.")] = None,
    out: Report = None,
    timeout: Annotated[float, typer.Option(help="Most seconds for one type.")] = 300,
) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for model_type in types or FAMILIES:
        rows.append(run_apart(model_type, timeout))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    write_report(out, f"# What works on which family\n\n{EXPLANATION}\n\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
