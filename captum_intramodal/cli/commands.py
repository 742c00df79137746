r"""Run the commands ``demo``, ``explain``, ``check`` and ``evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from captum_intramodal._utils.io import replace_files
from captum_intramodal.cli.loading import Checkpoint, current_process, load_model, open_image, quiet_libraries
from captum_intramodal.cli.options import (
    AnswerOption,
    Answers,
    AnswersOption,
    BatchSizeOption,
    CropsOption,
    DataOption,
    DemoImageOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ExplainersOption,
    FractionsOption,
    ImagesOption,
    InterpolateOption,
    MaxNewTokensOption,
    Method,
    MethodOption,
    MetricsOption,
    ModelOption,
    NoArcOption,
    OutOption,
    PromptOption,
    ReferenceOption,
    RevisionOption,
    RunOption,
    ScalesOption,
    TaggerOption,
    TimingOption,
    TrialImageOption,
    TrustOption,
    VideoOption,
    parse_numbers,
    parse_scales,
    resolve_tagger,
    split_specs,
)
from captum_intramodal.cli.tables import print_explanation, print_leaderboard, print_report
from captum_intramodal.cli.terminal import console, fail, one_line_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from captum_intramodal.cli.loading import Process
    from captum_intramodal.datasets import EvaluationDataset
    from captum_intramodal.evaluation import Leaderboard
    from captum_intramodal.explanation.explanation import Explanation

__all__ = ["app", "main"]

app = typer.Typer(
    help="Explain each word of a multimodal LLM's answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: OutOption = Path("captum-intramodal-demo"),
    image: DemoImageOption = 1,
    prompt: PromptOption = "describe the picture.",
    scales: ScalesOption = "auto",
    no_arc: NoArcOption = False,
) -> None:
    """Explain an answer of the embedded demo model: no download, no GPU."""
    from captum_intramodal.demo import CHECKPOINT, IMAGES

    if image > len(IMAGES):
        fail(f"There are {len(IMAGES)} example images; --image {image} does not exist.")
    _explain(Checkpoint(str(CHECKPOINT)), [IMAGES[image - 1]], prompt, scales, out, arc=not no_arc)


@app.command()
def explain(
    model: ModelOption,
    image: ImagesOption,
    prompt: PromptOption,
    answer: AnswerOption = None,
    scales: ScalesOption = "auto",
    crops: CropsOption = False,
    interpolate_pos_encoding: InterpolateOption = False,
    method: MethodOption = Method.auto,
    video: VideoOption = False,
    no_arc: NoArcOption = False,
    out: OutOption = Path("explanation"),
    max_new_tokens: MaxNewTokensOption = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Explain an answer of an image-text-to-text model from transformers."""
    if crops and interpolate_pos_encoding:
        fail("--crops and --interpolate-pos-encoding cannot be combined; choose one.")
    _explain(
        Checkpoint(model, dtype, device, revision, trust_remote_code),
        image,
        prompt,
        scales,
        out,
        answer=answer,
        arc=not no_arc,
        crops=crops,
        interpolate_pos_encoding=interpolate_pos_encoding,
        method=method.value,
        video=video,
        max_new_tokens=max_new_tokens,
    )


@app.command()
def check(
    model: ModelOption,
    image: TrialImageOption = None,
    prompt: PromptOption = "describe the picture.",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Test the assumptions of explanations on a model; exit with code 1 if one fails."""
    opened = None if image is None else open_image(image)
    with console.status("Loading torch and transformers") as status:
        import captum_intramodal

        status.update(f"Loading {model}")
        with quiet_libraries():
            loaded, processor = load_model(Checkpoint(model, dtype, device, revision, trust_remote_code))
        with one_line_errors(), quiet_libraries():
            report = captum_intramodal.check(loaded, processor, opened, prompt, progress=status.update)
    print_report(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: ModelOption,
    data: DataOption,
    out: RunOption,
    explainers: ExplainersOption = None,
    metrics: MetricsOption = None,
    answers: AnswersOption = Answers.dataset,
    reference: ReferenceOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    tagger: TaggerOption = None,
    timing: TimingOption = False,
    fractions: FractionsOption = None,
    batch_size: BatchSizeOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare explainers on a data set.

    To share the samples between processes, run accelerate launch -m captum_intramodal evaluate ...
    """
    _check_directory(out)
    with console.status("Loading torch and transformers"):
        from captum_intramodal.datasets import open_dataset
        from captum_intramodal.evaluation import DEFAULT_EXPLAINERS, DEFAULT_METRICS, make_metric
        from captum_intramodal.explainers import make_explainer
    # Everything that does not need the model is checked before it is loaded.
    with one_line_errors():
        dataset = open_dataset(data)
        options: dict[str, Any] = {
            "explainers": _checked_specs(explainers, DEFAULT_EXPLAINERS, make_explainer),
            "metrics": _checked_specs(metrics, DEFAULT_METRICS, make_metric),
            "answers": answers.value,
            "reference": reference,
            "max_new_tokens": max_new_tokens,
            "timing": timing,
            "batch_size": batch_size,
        }
        if tagger is not None:
            options["tagger"] = resolve_tagger(tagger)
        if fractions is not None:
            options["fractions"] = parse_numbers(fractions, "--fractions", "numbers such as 0,0.02,0.05,0.1")
    process = current_process()
    if device == "auto" and process.device is not None:
        device = process.device
    with console.status(f"Loading {model}"), quiet_libraries():
        loaded = load_model(Checkpoint(model, dtype, device, revision, trust_remote_code, device_map))
    board = _evaluate(loaded, dataset, out, process, options)
    if board is not None:
        print_leaderboard(board)
        page = escape(str(out / "index.html"))
        console.print(f"\nIntervals, tests and plots: [bold]{page}[/]; tables are in the same directory.")


def _checked_specs(groups: list[str] | None, default: Sequence[str], make: Callable[[str], Any]) -> Sequence[str]:
    """Return the given specifications, or the default, after making each once to find errors."""
    specs = split_specs(groups) or default
    for spec in specs:
        make(spec)
    return specs


def _evaluate(
    loaded: tuple[PreTrainedModel, Any],
    dataset: EvaluationDataset,
    out: Path,
    process: Process,
    options: dict[str, Any],
) -> Leaderboard | None:
    """Run :func:`captum_intramodal.evaluation.evaluate` with a progress bar in the first process."""
    from captum_intramodal.evaluation import evaluate

    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar if process.rank == 0 else nullcontext(), one_line_errors(), quiet_libraries():
        task = bar.add_task("Evaluating", total=len(dataset))
        return evaluate(
            *loaded,
            dataset,
            out,
            rank=process.rank,
            world_size=process.world_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )


def _explain(checkpoint: Checkpoint, images: list[Path], prompt: str, scales: str, out: Path, **options: Any) -> None:
    """Run :func:`captum_intramodal.explain` with these options, and save and print its result."""
    # Everything that does not need the model is checked before it is loaded.
    factors = parse_scales(scales)
    if not prompt.strip():
        fail("The prompt is empty; ask the model a question about the image.")
    _check_directory(out)
    opened = [open_image(path) for path in images]
    with console.status("Loading torch and transformers") as status:
        import captum_intramodal

        status.update(f"Loading {checkpoint.name}")
        with quiet_libraries():
            model, processor = load_model(checkpoint)
        with one_line_errors(), quiet_libraries():
            explanation = captum_intramodal.explain(
                model, processor, opened, prompt, scales=factors, progress=status.update, **options
            )
            status.update("Drawing")
            _save(explanation, out)
    if explanation.settings["dropped_scales"]:
        dropped = ", ".join(f"{scale:g}" for scale in explanation.settings["dropped_scales"])
        console.print(f"Dropped scale {dropped}: the processor resizes the image to the same size.")
    print_explanation(explanation)
    page, overview = (escape(str(out / name)) for name in ("index.html", "overview.png"))
    console.print(f"\nOpen [bold]{page}[/] in a browser; the overview of all words is {overview}")


def _check_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; --out must be a directory.")


def _save(explanation: Explanation, out: Path) -> None:
    """Save an explanation, its overview and its page; an interruption leaves no unfinished file in the directory."""
    from captum_intramodal.viz.overview import draw_overview

    with replace_files(out) as temporary:
        explanation.save(temporary)
        draw_overview(explanation, temporary / "overview.png")
        explanation.to_html(temporary / "index.html")


def main() -> None:
    """Run the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
