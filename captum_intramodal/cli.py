r"""The command line: ``captum-intramodal demo``, ``explain``, ``check`` and ``evaluate``."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from captum_intramodal.evaluation import Leaderboard
    from captum_intramodal.explanation.explanation import Explanation

app = typer.Typer(
    help="Explain why a multimodal LLM said each word of its answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True, soft_wrap=True)

OutOption = Annotated[Path, typer.Option("--out", help="Directory for index.html, overview.png and the explanation.")]
ScalesOption = Annotated[
    str,
    typer.Option("--scales", help="Factors of the image's size, such as 1,1.5,2; auto takes what suits the model."),
]
ModelOption = Annotated[
    str, typer.Option("--model", help="Directory of a checkpoint, its id on the Hugging Face hub, or demo.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, ...; auto takes a GPU where there is one.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub checkpoint.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
NoArcOption = Annotated[bool, typer.Option("--no-arc", help="Keep the activation that irrelevant context causes.")]


class Method(str, Enum):
    """Of :data:`captum_intramodal.levels.METHODS`, whose module takes seconds to import."""

    auto = "auto"
    logit_lens = "logit_lens"
    layer_gradient_x_activation = "layer_gradient_x_activation"
    input_x_gradient = "input_x_gradient"


class Answers(str, Enum):
    """Of :func:`captum_intramodal.evaluation.evaluate`."""

    dataset = "dataset"
    model = "model"


def fail(message: str) -> NoReturn:
    """One clear line on standard error and exit code 2."""
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False)
    raise typer.Exit(2)


@app.command()
def demo(
    out: OutOption = Path("captum-intramodal-demo"),
    image: Annotated[int, typer.Option("--image", "--picture", help="Which of the example images, from 1.", min=1)] = 1,
    prompt: Annotated[str, typer.Option(help="What to ask about it.")] = "describe the picture.",
    scales: ScalesOption = "auto",
    no_arc: NoArcOption = False,
) -> None:
    """Explain an answer of the embedded demo model: no download, no GPU."""
    from captum_intramodal.demo import CHECKPOINT, IMAGES

    if image > len(IMAGES):
        fail(f"There are {len(IMAGES)} example images; --image {image} does not exist.")
    _explain(str(CHECKPOINT), [IMAGES[image - 1]], prompt, scales, out, arc=not no_arc)


@app.command()
def explain(
    model: ModelOption,
    image: Annotated[list[Path], typer.Option(help="The image; once more for every further one.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it.")],
    answer: Annotated[str | None, typer.Option(help="The answer to explain. Default: the model's own.")] = None,
    scales: ScalesOption = "auto",
    crops: Annotated[bool, typer.Option("--crops", help="Cut-outs where enlarging shows the model nothing.")] = False,
    interpolate_pos_encoding: Annotated[
        bool, typer.Option("--interpolate-pos-encoding", help="A larger input size where enlarging shows nothing.")
    ] = False,
    method: Annotated[Method, typer.Option(help="Maps at visual tokens, or over the pixels.")] = Method.auto,
    video: Annotated[bool, typer.Option("--video", help="The images are the frames of one video.")] = False,
    no_arc: NoArcOption = False,
    out: OutOption = Path("explanation"),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to generate.", min=1)] = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Explain an answer of an image-text-to-text model of transformers."""
    if crops and interpolate_pos_encoding:
        fail("--crops and --interpolate-pos-encoding are two ways to see more of an image; choose one.")
    _explain(
        model,
        image,
        prompt,
        scales,
        out,
        (dtype, device, revision, trust_remote_code),
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
    image: Annotated[Path | None, typer.Option(help="An image of the size that matters. Default: made up.")] = None,
    prompt: Annotated[str, typer.Option(help="A question about it.")] = "describe the picture.",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Test on a model what explanations build upon; exit code 1 if something does not hold."""
    opened = None if image is None else _open_image(image)
    with console.status("Loading torch and transformers") as status:
        import captum_intramodal

        status.update(f"Loading {model}")
        with _quiet():
            loaded, processor = _load(model, dtype, device, revision, trust_remote_code)
        with _one_line(), _quiet():
            report = captum_intramodal.check(loaded, processor, opened, prompt, progress=status.update)
    table = Table(title=escape(report.model), title_style="bold", title_justify="left", show_header=False)
    for entry in report.checks:
        mark = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "untested"}[entry.passed]
        table.add_row(mark, entry.name, escape(entry.detail))
    console.print(table)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: ModelOption,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A folder, or scenes:count=100,objects=[2,4], coco:annotation_file=...,image_folder=..."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory of this run; a killed run goes on there.")],
    explainers: Annotated[
        list[str] | None,
        typer.Option(
            help='Such as "logit_lens msea+arc:scales=[1,2] arc+grad_cam", the first is the reference; may be repeated.'
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help='Such as "f1_iou pointing deletion:imputation=mean road"; may be repeated.')
    ] = None,
    answers: Annotated[Answers, typer.Option(help="Explain the data set's answers, or always the model's.")] = (
        Answers.dataset
    ),
    reference: Annotated[
        str | None, typer.Option(help="The explainer that the table compares with. Default: the first.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to generate.", min=1)] = 64,
    tagger: Annotated[
        str | None, typer.Option(help="Dotted name of a tagger such as nltk.pos_tag. Default: HanTa.")
    ] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Measure seconds; explainers then share no passes.")] = False,
    fractions: Annotated[
        str | None,
        typer.Option(help="Where curves are measured, such as 0,0.01,0.02,0.05,0.1,0.2. Default: 0,0.1,...,1."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that metrics run together.", min=1)] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads the model over devices; needs the package accelerate.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare explainers on a data set; accelerate launch -m captum_intramodal evaluate ... shares the work."""
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; --out must be a directory.")
    with console.status("Loading torch and transformers"):
        from captum_intramodal.datasets import open_dataset
        from captum_intramodal.evaluation import DEFAULT_EXPLAINERS, DEFAULT_METRICS, make_metric
        from captum_intramodal.evaluation import evaluate as run
        from captum_intramodal.explainers import make_explainer
        from captum_intramodal.metrics import FRACTIONS
    chosen = _split(explainers) or DEFAULT_EXPLAINERS
    measured = _split(metrics) or DEFAULT_METRICS
    with _one_line():  # What can be checked without the model is checked before it is loaded.
        dataset = open_dataset(data)
        for spec in chosen:
            make_explainer(spec)
        for spec in measured:
            make_metric(spec)
        tag = None if tagger is None else _resolve(tagger)
        steps = FRACTIONS
        if fractions is not None:
            steps = _numbers(fractions, "--fractions", "numbers separated by commas such as 0,0.02,0.05,0.1")
    process = _Process()
    if device == "auto" and process.device is not None:
        device = process.device
    with console.status(f"Loading {model}"), _quiet():
        loaded, processor = _load(model, dtype, device, revision, trust_remote_code, device_map)
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar if process.rank == 0 else nullcontext(), _one_line(), _quiet():
        task = bar.add_task("Evaluating", total=len(dataset))
        board = run(
            loaded,
            processor,
            dataset,
            out,
            chosen,
            measured,
            answers=answers.value,
            max_new_tokens=max_new_tokens,
            tagger=tag,
            reference=reference,
            timing=timing,
            fractions=steps,
            batch_size=batch_size,
            rank=process.rank,
            world_size=process.world_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if board is not None:
        _print_board(board)
        console.print(f"\nIntervals, tests and plots: [bold]{escape(str(out / 'index.html'))}[/]; tables beside it.")


def _print_board(board: Leaderboard) -> None:
    table = Table(
        Column("explainer", overflow="fold", min_width=12),
        *(f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in board.columns),
        box=box.SIMPLE_HEAD,  # Eight metrics fit into 80 columns.
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for label, row in board.rows.items():
        cells = [f"{row[c.name].interval.estimate:.3f}" if c.name in row else "–" for c in board.columns]
        table.add_row(escape(label), *cells)
    console.print(table)
    for label, reasons in board.coverage.skipped.items():
        for reason, count in reasons.items():
            console.print(f"{escape(label)} left out {count} of {board.coverage.samples} samples: {escape(reason)}")


class _Process:
    """Which of the processes that ``accelerate launch`` started this is, and its device."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.device = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            state = PartialState()
            self.rank, self.world_size, self.device = state.process_index, state.num_processes, str(state.device)


def _split(specs: list[str] | None) -> list[str]:
    """Specs are separated by space; there is none in them."""
    return [spec for group in specs or () for spec in group.split()]


def _numbers(text: str, option: str, takes: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} takes {takes}; got {text!r}.")


def _resolve(name: str) -> Any:
    import pkgutil

    try:
        return pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        fail(f"--tagger {name} cannot be found: {error}")


def _explain(
    model_id: str,
    images: list[Path],
    prompt: str,
    scales: str,
    out: Path,
    loading: tuple[str, str, str | None, bool] = ("auto", "auto", None, False),
    **options: Any,
) -> None:
    """Runs :func:`captum_intramodal.explain` with these options and writes and prints what it returns."""
    # What can be checked without the model is checked before it is loaded.
    factors = _parse_scales(scales)
    if not prompt.strip():
        fail("The prompt is empty; ask the model something about the image.")
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; --out must be a directory.")
    opened = [_open_image(path) for path in images]
    with console.status("Loading torch and transformers") as status:
        import captum_intramodal
        from captum_intramodal.viz.overview import draw_overview

        status.update(f"Loading {model_id}")
        with _quiet():
            model, processor = _load(model_id, *loading)
        with _one_line(), _quiet():
            explanation = captum_intramodal.explain(
                model, processor, opened, prompt, scales=factors, progress=status.update, **options
            )
            status.update("Drawing")
            _write(out, explanation, draw_overview)
    if explanation.settings["dropped_scales"]:
        dropped = ", ".join(f"{scale:g}" for scale in explanation.settings["dropped_scales"])
        console.print(f"Left out scale {dropped}: the processor brings the image to the same size anyway.")
    _print_table(explanation)
    page, sheet = (escape(str(out / name)) for name in ("index.html", "overview.png"))
    console.print(f"\nOpen [bold]{page}[/] in a browser; all words on one sheet: {sheet}")


def _parse_scales(scales: str) -> tuple[float, ...] | Literal["auto"]:
    if scales == "auto":
        return "auto"
    factors = _numbers(scales, "--scales", "auto, or numbers separated by commas such as 1,1.5,2")
    if any(not 0 < factor <= 16 for factor in factors) or len(set(factors)) < len(factors):
        fail(f"--scales must be different numbers above 0 and at most 16, got {scales!r}.")
    return factors


def _open_image(path: Path) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        fail(f"There is no file {path}.")
    except UnidentifiedImageError:
        fail(f"{path} is not an image that can be read.")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        fail(f"{path} cannot be read as an image: {error}")


def _load(
    model_id: str,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    if model_id == "demo" and not os.path.exists(model_id):
        from captum_intramodal.demo import CHECKPOINT

        model_id = str(CHECKPOINT)
    if model_id.startswith((".", "/", "~")) or os.path.exists(model_id):
        path = Path(model_id).expanduser()
        if not (path / "config.json").is_file():
            fail(f"{model_id} is not a checkpoint directory: it has no config.json.")
        model_id = str(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = AutoProcessor.from_pretrained(model_id, **options)
        model = AutoModelForImageTextToText.from_pretrained(
            model_id, dtype=dtype, use_safetensors=True, device_map=device_map, **options
        )
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            fail(f"{model_id} is no image-text-to-text model: its processor is a {type(processor).__name__}.")
        # Quantized weights and those spread over devices stay where they are.
        placed = device_map is not None or getattr(model, "hf_quantizer", None) is not None
        return model.eval() if placed else model.eval().to(device), processor
    except ImportError as error:
        fail(f"{model_id} needs a package that is not installed ({error}); try: pip install torchvision")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        fail(f"{model_id} cannot be loaded as an image-text-to-text model: {_first_lines(error)}")


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:400]} ..."


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        fail(str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps other libraries' bars and notices out of the output."""
    from logging import CRITICAL

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def _write(out: Path, explanation: Explanation, draw_overview: Callable[..., Any]) -> None:
    """Writes everything into a directory beside ``out`` first, so that an interruption leaves nothing half-written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".captum-intramodal-") as partial:
        temporary = Path(partial)
        explanation.save(temporary)
        draw_overview(explanation, temporary / "overview.png")
        explanation.to_html(temporary / "index.html")
        out.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, out / file.name)


def _print_table(explanation: Explanation) -> None:
    table = Table(title=escape(explanation.answer), title_style="bold", title_justify="left")
    for heading, justify in (
        ("word", "left"),
        ("probability", "right"),
        ("where it looked", "left"),
        ("leans on", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for word in explanation.words:
        relevance = explanation.text_relevance(word)
        earlier = explanation.earlier_tokens(word)
        best = int(relevance.argmax()) if relevance.numel() and float(relevance.max()) > 0 else None
        table.add_row(
            escape(word.text),
            f"{word.probability:.2f}",
            _place(explanation, word),
            "" if best is None else escape(earlier[best]),
        )
    console.print(table)


def _place(explanation: Explanation, word: Any) -> str:
    """Where a word's map is strongest, in words; nothing for a word whose map is weak beside the others'."""
    import torch

    strength = [
        float(explanation.heatmap(word, image=i, normalize="answer").max()) for i in range(len(explanation.images))
    ]
    image = max(range(len(strength)), key=strength.__getitem__)
    if strength[image] < 0.15:
        return "[dim]nowhere in particular[/]"
    heat = explanation.heatmap(word, image=image)
    row, column = divmod(int(torch.argmax(heat)), heat.shape[1])
    vertical = ("top", "middle", "bottom")[min(2, 3 * row // heat.shape[0])]
    horizontal = ("left", "center", "right")[min(2, 3 * column // heat.shape[1])]
    place = "center" if (vertical, horizontal) == ("middle", "center") else f"{vertical} {horizontal}"
    where = f" of image {image + 1}" if len(strength) > 1 else ""
    return f"{place}{where} ({column}, {row})"


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
