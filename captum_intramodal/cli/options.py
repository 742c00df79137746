r"""Define the options of the commands, and parse those that are lists in one text."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from captum_intramodal.cli.terminal import fail

__all__ = ["Answers", "Method", "parse_numbers", "parse_scales", "resolve_tagger", "split_specs"]


class Method(str, Enum):
    """The choices of ``--method``: :func:`captum_intramodal.explain` has the same, but takes seconds to import."""

    auto = "auto"
    logit_lens = "logit_lens"
    direct_contribution = "direct_contribution"
    lens_x_contribution = "lens_x_contribution"
    layer_gradient_x_activation = "layer_gradient_x_activation"
    input_x_gradient = "input_x_gradient"


class Answers(str, Enum):
    """The choices of ``--answers``: :func:`captum_intramodal.evaluation.evaluate` has the same."""

    dataset = "dataset"
    model = "model"


# For commands that load a model
ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint directory, Hugging Face Hub id, or demo.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, ...; auto uses a GPU if one is available.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub checkpoint.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the checkpoint.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", help="Maximum length of a generated answer, in tokens.", min=1)
]

# For demo, explain and check
PromptOption = Annotated[str, typer.Option("--prompt", help="Question about the image.")]
DemoImageOption = Annotated[int, typer.Option("--image", "--picture", help="Number of the example image.", min=1)]
ImagesOption = Annotated[list[Path], typer.Option("--image", help="Image file; repeat the option for more images.")]
TrialImageOption = Annotated[
    Path | None, typer.Option("--image", help="Image file of a typical size. Default: a random image.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Directory for index.html, overview.png and the saved explanation.")
]
AnswerOption = Annotated[
    str | None, typer.Option("--answer", help="Answer to explain. Default: the model's own answer.")
]
ScalesOption = Annotated[
    str, typer.Option("--scales", help="Scale factors for the image, such as 1,1.5,2; auto chooses them for the model.")
]
CropsOption = Annotated[
    bool, typer.Option("--crops", help="If the model's input size is fixed, use crops of the image at larger scales.")
]
InterpolateOption = Annotated[
    bool,
    typer.Option(
        "--interpolate-pos-encoding",
        help="If the model's input size is fixed, enlarge it by interpolating position embeddings.",
    ),
]
MethodOption = Annotated[Method, typer.Option("--method", help="How maps are computed; auto chooses for the model.")]
VideoOption = Annotated[bool, typer.Option("--video", help="Treat the images as the frames of one video.")]
NoArcOption = Annotated[bool, typer.Option("--no-arc", help="Do not suppress interference from irrelevant context.")]

# For evaluate
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="A folder, or scenes:count=100,objects=[2,4], coco:annotation_file=...,image_folder=..."
    ),
]
RunOption = Annotated[
    Path, typer.Option("--out", help="Directory of this run; repeat the command to resume an interrupted run.")
]
ExplainersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--explainers",
        help='Such as "logit_lens msea+arc:scales=[1,2] arc+grad_cam"; the first is the reference. May be repeated.',
    ),
]
MetricsOption = Annotated[
    list[str] | None,
    typer.Option("--metrics", help='Such as "f1_iou pointing deletion:imputation=mean road". May be repeated.'),
]
AnswersOption = Annotated[
    Answers,
    typer.Option("--answers", help="Explain the data set's answers if it has any, or always the model's own."),
]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", help="Explainer to compare the others with. Default: the first.")
]
TaggerOption = Annotated[
    str | None,
    typer.Option("--tagger", help="Dotted name of a part-of-speech tagger, such as nltk.pos_tag. Default: HanTa."),
]
TimingOption = Annotated[
    bool, typer.Option("--timing", help="Measure seconds; explainers then do not share forward passes.")
]
FractionsOption = Annotated[
    str | None,
    typer.Option(
        "--fractions",
        help="Fractions of the image at which curves are measured, such as 0,0.01,0.02,0.05,0.1,0.2. "
        "Default: 0,0.1,...,1.",
    ),
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", help="Number of prompts that metrics run in one batch.", min=1)
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="auto spreads the model over devices; needs the package accelerate."),
]


def split_specs(groups: list[str] | None) -> list[str]:
    """Return the specifications in texts that separate them by spaces."""
    return [spec for group in groups or () for spec in group.split()]


def parse_numbers(text: str, option: str, expected: str) -> tuple[float, ...]:
    """Return numbers that are separated by commas; exit if the text is anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} takes {expected}; got {text!r}.")


def parse_scales(scales: str) -> tuple[float, ...] | Literal["auto"]:
    """Return the value of ``--scales``; exit if factors repeat or are out of range."""
    if scales == "auto":
        return "auto"
    factors = parse_numbers(scales, "--scales", "auto, or numbers separated by commas such as 1,1.5,2")
    if any(not 0 < factor <= 16 for factor in factors) or len(set(factors)) < len(factors):
        fail(f"--scales must be different numbers above 0 and at most 16, got {scales!r}.")
    return factors


def resolve_tagger(name: str) -> Callable[..., Any]:
    """Return the function of a dotted name; exit if there is none."""
    try:
        tagger: Callable[..., Any] = pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        fail(f"--tagger {name} cannot be found", error)
    return tagger
