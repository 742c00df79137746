r"""Which Captum methods run inside MSEA on which kinds of models?

    python benchmarks/captum_matrix.py --out benchmarks/results/captum_matrix.md

Each cell runs the method alone, then inside MSEA at scales 0.5, 1 and 1.5, on a small random model. It works if the
result has the method's own shape, is finite and not all zero. Otherwise, the table has the error that a user gets.

Needs: the package with its ``test`` extra (scikit-learn, for Lime); about a minute on one core.

Prints: the number of cells that work, a table of methods and models, and the reasons of failures. The README quotes
``results/captum_matrix.md``.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import captum.attr as ca
import torch
import typer
from captum._utils.models.linear_model import SkLearnLinearRegression
from common import Report, Threads, markdown_table, write_report
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from captum_intramodal import MSEA, LowPass, ModelAdapter, PixelForward, Pyramid, Resize, VisualTokenAttribution

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.testing.tiny import tiny

SCALES = (0.5, 1.0, 1.5)
# Per side of the image, the segments that methods perturb as groups of pixels.
SEGMENTS = 3
EXPLANATION = """Printed by `python benchmarks/captum_matrix.py`, on small random models. Each cell runs the method
alone, then inside `MSEA` at scales 0.5, 1 and 1.5. *works*: the result has the method's own shape, is finite and not
all zero. A number refers to the reasons below the table, with the error that a user gets; *Captum alone*: the method
itself does not run. Layer methods at a decoder of a multimodal model go through `VisualTokenAttribution`. Captum's
DeepLift, GuidedBackprop and Deconvolution have rules for ReLU-like modules; for other models (ViT, most multimodal
models) they are multiples of the gradient."""


@dataclass
class Column:
    """A kind of model, with an input for each kind of method.

    Attributes:
        name (str): heading of the column.
        forward (nn.Module): maps images (N, 3, height, width) to scores.
        image (Tensor): float (1, 3, height, width) in [0, 1].
        target: Captum's target.
        layer (nn.Module): for Layer* and Neuron* methods.
        neuron (tuple): a neuron of the layer.
        spatial (nn.Module, optional): a layer with outputs (N, C, height, width), for GradCAM.
        tokens (bool): whether the layer is one of a decoder, with values at visual tokens.
        pyramid (Pyramid): resizes images to a scale, and attributions back.
    """

    name: str
    forward: nn.Module
    image: Tensor
    target: Any
    layer: nn.Module
    neuron: tuple[int, ...]
    spatial: nn.Module | None
    tokens: bool = False
    pyramid: Pyramid = field(default_factory=Resize)

    def at_layer(self, method: type) -> ca.Attribution:
        """Make a layer method, whose values are drawn in the image if they are at visual tokens."""
        layer_method = method(self.forward, self.layer)
        return VisualTokenAttribution(layer_method) if self.tokens else layer_method

    @property
    def segments(self) -> Tensor:
        """Number the segments of the image, as a feature mask."""
        height, width = self.image.shape[2:]
        rows, columns = (torch.arange(n) * SEGMENTS // n for n in (height, width))
        return (rows[:, None] * SEGMENTS + columns)[None, None]

    @property
    def window(self) -> tuple[int, ...]:
        """Return the shape of a segment."""
        height, width = self.image.shape[2:]
        return (3, -(-height // SEGMENTS), -(-width // SEGMENTS))


@dataclass(frozen=True)
class Row:
    """A Captum method: how to make it for a column, and its arguments."""

    make: Callable[[Column], ca.Attribution]
    arguments: Callable[[Column], dict[str, Any]] = lambda column: {}
    needs_spatial: bool = False


def on_pixels(method: type, **arguments: Any) -> Row:
    """Attribute to pixels."""
    return Row(lambda c: method(c.forward), lambda c: {"target": c.target, **arguments})


def on_groups(method: type, **arguments: Any) -> Row:
    """Attribute to groups of pixels."""
    return Row(lambda c: method(c.forward), lambda c: {"target": c.target, "feature_mask": c.segments, **arguments})


def on_layer(method: type, **arguments: Any) -> Row:
    """Attribute to a layer."""
    return Row(lambda c: c.at_layer(method), lambda c: {"target": c.target, **arguments})


def on_neuron(method: type, **arguments: Any) -> Row:
    """Attribute a neuron to pixels."""
    return Row(lambda c: method(c.forward, c.layer), lambda c: {"neuron_selector": c.neuron, **arguments})


def with_distribution(method: type, **arguments: Any) -> Row:
    """Attribute to pixels against several baselines."""
    return Row(
        lambda c: method(c.forward),
        lambda c: {"target": c.target, "baselines": torch.rand(2, *c.image.shape[1:]), **arguments},
    )


def with_spatial(method: type) -> Row:
    """Attribute to pixels with the help of a spatial layer."""
    return Row(lambda c: method(c.forward, c.spatial), lambda c: {"target": c.target}, needs_spatial=True)


ROWS: dict[str, Row] = {
    "IntegratedGradients": on_pixels(ca.IntegratedGradients, n_steps=2),
    "Saliency": on_pixels(ca.Saliency),
    "InputXGradient": on_pixels(ca.InputXGradient),
    "GuidedBackprop": on_pixels(ca.GuidedBackprop),
    "Deconvolution": on_pixels(ca.Deconvolution),
    "DeepLift": on_pixels(ca.DeepLift),
    "DeepLiftShap": with_distribution(ca.DeepLiftShap),
    "GradientShap": with_distribution(ca.GradientShap, n_samples=2),
    "Occlusion": Row(
        lambda c: ca.Occlusion(c.forward),
        lambda c: {"target": c.target, "sliding_window_shapes": c.window, "strides": c.window},
    ),
    "FeatureAblation": on_groups(ca.FeatureAblation),
    "FeaturePermutation": on_groups(ca.FeaturePermutation),
    "ShapleyValueSampling": on_groups(ca.ShapleyValueSampling, n_samples=2),
    "KernelShap": on_groups(ca.KernelShap, n_samples=12),
    "Lime": Row(
        lambda c: ca.Lime(c.forward, interpretable_model=SkLearnLinearRegression()),
        lambda c: {"target": c.target, "feature_mask": c.segments, "n_samples": 12},
    ),
    "LRP": on_pixels(ca.LRP),
    "GuidedGradCam": with_spatial(ca.GuidedGradCam),
    "LayerGradCam": Row(
        lambda c: c.at_layer(ca.LayerGradCam) if c.tokens else ca.LayerGradCam(c.forward, c.spatial),
        lambda c: {"target": c.target},
    ),
    "LayerActivation": Row(lambda c: c.at_layer(ca.LayerActivation)),
    "LayerGradientXActivation": on_layer(ca.LayerGradientXActivation),
    "LayerIntegratedGradients": on_layer(ca.LayerIntegratedGradients, n_steps=2),
    "LayerConductance": on_layer(ca.LayerConductance, n_steps=2),
    "InternalInfluence": on_layer(ca.InternalInfluence, n_steps=2),
    "LayerDeepLift": on_layer(ca.LayerDeepLift),
    "NeuronGradient": on_neuron(ca.NeuronGradient),
    "NeuronIntegratedGradients": on_neuron(ca.NeuronIntegratedGradients, n_steps=2),
    "NeuronConductance": Row(
        lambda c: ca.NeuronConductance(c.forward, c.layer),
        lambda c: {"neuron_selector": c.neuron, "target": c.target, "n_steps": 2},
    ),
    "NoiseTunnel(Saliency)": Row(
        lambda c: ca.NoiseTunnel(ca.Saliency(c.forward)),
        lambda c: {"target": c.target, "nt_samples": 2, "stdevs": 0.05},
    ),
}


class ConvNet(nn.Module):
    """A small convolutional classifier with a module for every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        return self.head(self.pool2(self.relu2(self.conv2(x))).flatten(1))


def cnn() -> Column:
    """Build a convolutional network; the neuron is its most active one."""
    net = ConvNet().eval()
    image = torch.rand(1, 3, 32, 24)
    activation = net.conv2(net.pool1(net.relu1(net.conv1(image))))[0]
    active = tuple(int(i) for i in torch.unravel_index(activation.argmax(), activation.shape))
    return Column("CNN", net, image, 1, net.conv2, active, net.conv2)


class Logits(nn.Module):
    """The logits of a transformers image classifier, as a function of its pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def vit() -> Column:
    """Build a vision transformer, which takes one image size only."""
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = ViTForImageClassification(config).eval()
    (projection,) = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    return Column("ViT", Logits(model), torch.rand(1, 3, 32, 32), 1, blocks[0], (3, 5), projection, pyramid=LowPass())


def multimodal(model_type: str, heading: str) -> Callable[[], Column]:
    """Return a function that builds a multimodal LLM of a type."""

    def make() -> Column:
        model, processor = tiny(model_type)
        forward = PixelForward(ModelAdapter(model, processor), "describe the picture .", "a red cat")
        towers = [m for m in model.modules() if isinstance(m, nn.Conv2d)] if model_type == "llava" else []
        layer = model.get_decoder().layers[0]
        target = (1, forward.answer_ids[1])
        return Column(
            heading, forward, torch.rand(1, 3, 84, 112), target, layer, (-3, 5), towers[0] if towers else None, True
        )

    return make


COLUMNS: tuple[Callable[[], Column], ...] = (
    cnn,
    vit,
    multimodal("qwen2_vl", "Qwen2-VL (dynamic grid)"),
    multimodal("llava", "LLaVA (fixed size)"),
    multimodal("idefics3", "Idefics3 (tiles)"),
)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of an attribution, which may be one or a tuple."""
    yield from [result] if isinstance(result, Tensor) else result


def attempt(run: Callable[[], Any]) -> tuple[list[Tensor], str | None]:
    """Return the result's tensors, or no tensors and the start of the error."""
    try:
        torch.manual_seed(0)
        return list(tensors_of(run())), None
    except Exception as error:
        return [], f"{type(error).__name__}: {' '.join(str(error).split())[:260]}"


def cell(row: Row, column: Column) -> str:
    """Return ``'works'``, or the reason why it does not."""
    if row.needs_spatial and column.spatial is None:
        return "GradCAM needs a layer with outputs (N, C, height, width); this model has tokens."
    method, arguments = row.make(column), row.arguments(column)
    image = column.image
    if isinstance(method, ca.FeaturePermutation):
        image = torch.cat([image, image.flip(3), image.flip(2)])  # This method permutes examples.
    own, error = attempt(lambda: method.attribute(image, **arguments))
    if error:
        return f"Captum alone: {error}"

    result, error = attempt(lambda: MSEA(method, SCALES, pyramid=column.pyramid).attribute(image, **arguments))
    if error:
        return error
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (result, own)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} instead of {shapes[1]}"
    if not all(bool(tensor.isfinite().all()) for tensor in result):
        return "not finite"
    return "works" if any(bool(tensor.any()) for tensor in result) else "all zero"


def main(out: Report = None, threads: Threads = 1) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    start = time.process_time()
    reasons: dict[str, int] = {}
    cells: dict[str, list[str]] = {name: [] for name in ROWS}
    headings = []
    for make in COLUMNS:
        torch.manual_seed(0)
        column = make()
        headings.append(column.name)
        for name, row in ROWS.items():
            result = cell(row, column)
            if result != "works":
                result = str(reasons.setdefault(result, len(reasons) + 1))
            cells[name].append(result)
            typer.echo(f"{column.name}: {name}: {result}", err=True)
    lines = [
        EXPLANATION,
        "",
        *markdown_table(["method", *headings], ([name, *row] for name, row in cells.items())),
        "",
        *(f"{number}. {reason}" for reason, number in reasons.items()),
    ]
    every = [result for row in cells.values() for result in row]
    lines.insert(1, f"\n{every.count('works')} of {len(every)} cells work.")
    text = "\n".join(lines) + "\n"
    typer.echo(text)
    typer.echo(f"{time.process_time() - start:.0f} s of processor time", err=True)
    write_report(out, text)


if __name__ == "__main__":
    typer.run(main)
