r"""What does an explanation cost, compared with the model's own answer?

    python benchmarks/cost.py --tam PATH_TO_TAM --out benchmarks/results/cost.md

A Qwen2-VL-type model with random weights takes an image and answers. All works run in one process, in turns, and times
are medians with the smallest and the largest. Peak memory is that of a separate run, beyond what is held before it: on
a CPU the live bytes of PyTorch's allocator, summed from its profiler's record of every allocation, so neither the C
library's caching nor the moment of measurement matters; on a GPU ``max_memory_allocated``. NumPy's own memory is not
included. Of long methods only a part is run and extrapolated, as their notes say.

Needs: the package only, and two cores that are otherwise idle. ``--tam`` is the folder of a clone of Token Activation
Map (its ``tam.py`` needs opencv and scipy), which is not part of this repository.

Prints: a table per part, ratios with their bounds, and a cost model of the work after the model's pass. ``--out``
writes them, with JSON and a plot beside them. The README's figures on cost are those of ``results/cost.md``.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from captum.attr import FeatureAblation, IntegratedGradients
from common import Report as Out
from common import write_report
from costs.after_pass import LastStates, report_growth, report_stages
from costs.measuring import Cost, Report, inference, peak_bytes, seconds, table, take_turns
from costs.model import PROMPT, SEVEN_BILLION, SPECIAL, TOKEN, Shape, build, noise_image
from costs.tam import OwnTAM, compute_tam
from PIL import Image
from torch import Tensor

from captum_intramodal import Explanation, ImageTextInput, ModelAdapter, MultimodalLLMAttribution, PixelForward, explain
from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal.adapter import prefix_cache
from captum_intramodal.adapter.prefix_cache import visual_states
from captum_intramodal.explanation.scale_views import resize_images
from captum_intramodal.functional.aggregation import DEFAULT_SCALES
from captum_intramodal.models.early_exit import run_layers

IG_STEPS, REGIONS = 50, (4, 4)
RATIO = ["median of ratios within a turn", "measured", "bound", "holds"]


class TAMArguments(NamedTuple):
    """What :func:`costs.tam.compute_tam` takes after the lens and the visual tokens' states."""

    text: Tensor
    classes: Tensor
    words: Tensor
    n_question: int
    grid: tuple[int, int]


class Bench:
    """The measurements on one model."""

    def __init__(self, adapter: ModelAdapter, image: Image.Image, n_answer: int, report: Report) -> None:
        self.adapter, self.image, self.report = adapter, image, report
        self.device = adapter.device.type
        self.n_answer = n_answer
        with inference(adapter):
            self.inputs = adapter.prepare([image], PROMPT)
            # An answer of different words, because a model with random weights would repeat itself.
            first = len(SPECIAL) + 6
            ids = torch.randperm(len(adapter.tokenizer) - first, generator=torch.Generator().manual_seed(1))[:n_answer]
            self.answer = (ids + first).tolist()
            self.encoding = adapter.encode(self.inputs, self.answer)

    def explain(self, **options: Any) -> Explanation:
        """Explain the image."""
        return explain(self.adapter.model, self.adapter.processor, self.image, PROMPT, **options)

    def forward(self) -> None:
        """Run a forward pass over prompt and answer."""
        with inference(self.adapter):
            self.adapter.run(self.encoding.inputs)

    def generate(self) -> None:
        """Generate an answer."""
        with inference(self.adapter):
            self.adapter.generate(self.inputs, self.n_answer)

    def answering(self, runs: int) -> Cost:
        """Compare the explanation of a given answer with the model's forward pass."""
        one = {"answer": self.answer, "scales": (1.0,)}
        works: dict[str, Callable[[], Any]] = {
            "(a) forward over prompt + answer, all logits": self.forward,
            "(c) maps, teacher-forced pass included": lambda: self.explain(**one, arc=None),
            "(c) maps + ARC, teacher-forced pass included": lambda: self.explain(**one),
        }
        self.forward()  # PyTorch's first call is slower.
        first = seconds(lambda: self.explain(**one))
        costs = self.compare(works, runs)
        costs["(c) maps + ARC, first call (where the tokens are is found out)"] = Cost([first])
        self.report.costs("## A given answer", costs)
        forward, _, arc, once = costs.values()
        rows = [
            self.report.ratio_of_turns("maps + ARC : forward", arc, forward, 1.0),
            self.report.ratio_of_turns("maps + ARC, first call : forward", once, forward, 1.0),
        ]
        self.report.add(*table(RATIO, rows))
        return forward

    def generating(self, runs: int) -> None:
        """Compare the explanation of the model's own answer, captured during generation, with generation alone."""
        self.explain(answer=self.answer, scales=(1.0,))  # Measures the geometry.
        works: dict[str, Callable[[], Any]] = {
            "(b) greedy generation": self.generate,
            "(c) generation, maps + ARC": lambda: self.explain(scales=(1.0,), max_new_tokens=self.n_answer),
        }
        costs = self.compare(works, runs)
        self.report.costs("## The model's own answer", costs)
        generation, explained = costs.values()
        rows = [self.report.ratio_of_turns("maps + ARC while generating : generation", explained, generation, 1.05)]
        self.report.add(*table(RATIO, rows))

    def compare(self, works: dict[str, Callable[[], Any]], runs: int) -> dict[str, Cost]:
        """Measure time and peak memory of works that are warm."""
        costs = take_turns(works, runs, warm_up=False)
        for name, work in works.items():
            costs[name].peak = peak_bytes(work, self.device)
        return costs

    def scales(self, runs: int) -> None:
        """Compare MSEA with the passes that it cannot avoid."""
        adapter, layer = self.adapter, self.adapter.lens.layers[-1]
        sizes = [[(round(self.image.width * s), round(self.image.height * s))] for s in DEFAULT_SCALES]
        resized = [resize_images([self.image], size) for size in sizes]

        def unavoidable() -> None:
            """Run the original images with the answer, and the others up to the end of the images."""
            with inference(adapter):
                run_layers(lambda: adapter.run(self.encoding.inputs), [layer], lambda hidden: hidden[:, :1])
                for images in resized[1:]:
                    visual_states(adapter, adapter.prepare(images, PROMPT), layer)

        works = {
            "vision + visual prefix at 3 scales, answer": unavoidable,
            "(c) MSEA at 3 scales + ARC": lambda: self.explain(answer=self.answer, scales=DEFAULT_SCALES),
        }
        costs = self.compare(works, runs)
        self.report.costs("## Several scales", costs)
        passes, msea = costs.values()
        self.report.add(*table(RATIO, [self.report.ratio_of_turns("MSEA + ARC : its passes", msea, passes, 1.1)]))

    def behind_text(self, runs: int, tokens: int = 1024, visual_tokens: int = 256) -> None:
        """Compare reusing a long text before the image with running it at every scale."""
        image = noise_image(visual_tokens)
        content = [{"type": "text", "text": " ".join([PROMPT] * (tokens // 4))}, {"type": "image"}]

        def explain_with(least: int) -> None:
            before, prefix_cache.MIN_TOKENS = prefix_cache.MIN_TOKENS, least
            try:
                explain(
                    self.adapter.model, self.adapter.processor, image, [{"role": "user", "content": content}],
                    self.answer, scales=DEFAULT_SCALES,
                )  # fmt: skip
            finally:
                prefix_cache.MIN_TOKENS = before

        works: dict[str, Callable[[], Any]] = {
            "(c) the text read at every scale": lambda: explain_with(sys.maxsize),
            "(c) the text read once": lambda: explain_with(1),
        }
        for work in works.values():
            work()  # Measures the geometry.
        costs = self.compare(works, runs)
        self.report.costs(
            f"### {tokens} tokens of text before an image of {visual_tokens} visual tokens, MSEA at 3 scales + ARC",
            costs,
        )
        apart, once = costs.values()
        self.report.add(
            *table(RATIO, [self.report.ratio_of_turns("read once : read at every scale", once, apart, 1.0)])
        )

    def after(self, tam: Path | None, runs: int) -> None:
        """Measure the work after the model's pass, on the same hidden states."""
        lens, encoding = self.adapter.lens, self.encoding
        with inference(self.adapter):
            (hidden,) = run_layers(lambda: self.adapter.run(encoding.inputs), [lens.layers[-1]])
            hidden = hidden[0]
        ids = encoding.input_ids
        text = torch.tensor([i for i, token in enumerate(ids.tolist()) if token >= len(SPECIAL)])
        states = LastStates(
            lens,
            hidden[encoding.visual_positions],
            torch.cat([hidden[text], hidden[text - 1]]),
            ids[text],
            self.n_answer,
            self.adapter.geometry([self.image.size]),
        )
        arguments = self.tam_arguments(hidden)

        def our_tam() -> Tensor:
            return compute_tam(lens, states.visual, *arguments)

        works: dict[str, Callable[[], Any]] = {
            "(c) maps": states.maps,
            "(c) maps + ARC": states.maps_and_arc,
            "(d) TAM, our implementation": our_tam,
        }
        costs = take_turns(works, max(runs, 3))
        maps: list[list[np.ndarray]] = []
        if tam is not None:
            own, normalized = OwnTAM(tam), lens.normalize(hidden)[:-1]

            def own_tam() -> list[np.ndarray]:
                return own(self.adapter, normalized, ids.tolist(), encoding.prompt_length, self.image)

            name = "(d) TAM's own code"
            works[name] = own_tam
            costs[name] = Cost([seconds(lambda: maps.append(own_tam())) for _ in range(runs)])
        for name, work in works.items():
            costs[name].peak = peak_bytes(work, self.device)
        title = f"## After the pass: all {len(arguments.words)} tokens of question and answer"
        self.report.costs(title, costs)
        if maps:
            self.report.add(*table(["", "measured", "bound", "holds"], self.tam_rows(costs, our_tam(), maps[0])))
        report_stages(states, self.device, self.report)

    def tam_arguments(self, hidden: Tensor) -> TAMArguments:
        """Select states and classes as TAM's own code does.

        They are those of the question, whose first token counts by the model's most likely next token; then the
        prompt's last token, in whose row the answer's first word is, and the answer without its first word.
        """
        ids, prompt = self.encoding.input_ids, self.encoding.prompt_length
        first, last = (
            (ids[:prompt] == SPECIAL.index(token)).nonzero()[-1] for token in ("<|vision_end|>", "<|im_end|>")
        )
        question = torch.arange(int(first) + 1, int(last))
        places = torch.cat([question, torch.arange(prompt - 1, len(ids) - 1)])
        words = torch.cat([ids[question], ids[prompt:]])
        likeliest = self.adapter.lens.topk(hidden[question[:1]], 1)[0]
        classes = torch.cat([likeliest, ids[question[1:]], ids[prompt - 1 : prompt], ids[prompt + 1 :]])
        grid = self.image.height // TOKEN, self.image.width // TOKEN
        return TAMArguments(hidden[places], classes, words, len(question), grid)

    def tam_rows(self, costs: dict[str, Cost], ours: Tensor, theirs: list[np.ndarray]) -> list[list[str]]:
        """Return the rows that compare our maps and TAM's own code."""
        maps_cost, arc, our_cost, own_cost = costs.values()
        gap = max(
            float((mine / mine.max() - torch.from_numpy(other / other.max()).to(mine).flatten()).abs().max())
            for mine, other in zip(ours, theirs, strict=True)
        )
        at_least, at_most = self.report.at_least, self.report.at_most
        own_peak = own_cost.peak or 1
        return [
            at_least("TAM's own code : our TAM, seconds", own_cost.median / our_cost.median, 50),
            at_least("TAM's own code : maps alone, seconds", own_cost.median / maps_cost.median, 50),
            ["TAM's own code : maps + ARC, seconds", f"{own_cost.median / arc.median:.3g}", "TAM ranks nothing", ""],
            at_most("maps + ARC : TAM's own code, peak extra memory", (arc.peak or 0) / own_peak, 0.05),
            at_most("our TAM : TAM's own code, peak extra memory", (our_cost.peak or 0) / own_peak, 0.05),
            at_most("largest difference of TAM's maps, of their maximum", gap, 1e-5),
        ]

    def others(self, forward: Cost) -> None:
        """Time methods that run a pass per perturbation or step: a part of each, extrapolated."""
        costs: dict[str, Cost] = {}
        with inference(self.adapter):
            few = ImageTextInput(self.adapter, self.image, PROMPT, grid=(1, 2))
            words = few.n_itp_features - 2
            total, run = REGIONS[0] * REGIONS[1] + words + 1, few.n_itp_features + 1
            ablation = MultimodalLLMAttribution(FeatureAblation(self.adapter.model), self.adapter)
            took = seconds(lambda: ablation.attribute(few, self.answer))
        costs["(d) FeatureAblation of regions and words (MultimodalLLMAttribution)"] = Cost(
            [took], None, f"extrapolated from {run} of {total} passes", total / run
        )
        forward_function = PixelForward(self.adapter, PROMPT, self.answer)
        pixels = image_to_tensor(self.image).to(self.adapter.device)
        method = IntegratedGradients(forward_function)
        forward_function(pixels)  # Prepares the prompt.
        took = seconds(lambda: method.attribute(pixels, target=forward_function.targets[0], n_steps=2))
        costs[f"(d) IntegratedGradients for each token, {IG_STEPS} steps"] = Cost(
            [took], None, f"extrapolated from 1 token, 2 steps: x {self.n_answer} x {IG_STEPS // 2}",
            self.n_answer * IG_STEPS / 2,
        )  # fmt: skip
        self.report.costs("## Other methods", costs)
        rows = [[name, f"{cost.median / forward.median:,.0f}"] for name, cost in costs.items()]
        self.report.add(*table(["", "times the forward pass"], rows))


PARTS = ("answering", "generating", "scales", "after", "others", "growth")


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    tam: Annotated[Path | None, typer.Option(help="Folder of a clone of Token Activation Map.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = "",
    seven_billion: Annotated[bool, typer.Option(help="Sizes of a model with 7 billion parameters.")] = False,
    visual_tokens: Annotated[int, typer.Option(min=4)] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=1)] = 64,
    parts: Annotated[str, typer.Option(help=f"Parts, of {', '.join(PARTS)}, separated by commas.")] = ",".join(PARTS),
    out: Out = None,
) -> None:
    # Wrong options fail before anything runs for minutes.
    chosen = parts.split(",")
    if unknown := sorted({*chosen} - {*PARTS}):
        raise typer.BadParameter(f"--parts has {', '.join(unknown)}; choose from {', '.join(PARTS)}.")
    if tam is not None and not (tam / "tam.py").is_file():
        raise typer.BadParameter(f"There is no tam.py in --tam {tam}.")
    torch_dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise typer.BadParameter(f"PyTorch has no dtype {dtype!r}; pass --dtype bfloat16, float16 or float32.")
    torch.set_num_threads(threads)
    shape = SEVEN_BILLION if seven_billion else Shape()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    report = Report()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    report.add(
        "# What explaining costs",
        "",
        f"Printed by `python benchmarks/cost.py`. {machine}, PyTorch {torch.__version__}, {torch_dtype}. A "
        f"Qwen2-VL-type model with random weights: {shape}. {visual_tokens} visual tokens, {answer_tokens} tokens of "
        f"answer. Medians of {runs} runs that take turns, {3 * runs} of generation.",
        "",
    )
    if set(chosen) - {"growth"}:
        adapter = build(shape, torch_dtype, device)
        bench = Bench(adapter, noise_image(visual_tokens), answer_tokens, report)
        forward = bench.answering(runs) if "answering" in chosen else None
        if "generating" in chosen:
            bench.generating(3 * runs)  # The difference is as small as the spread.
        if "scales" in chosen:
            bench.scales(runs)
            bench.behind_text(runs)
        if "after" in chosen:
            with inference(adapter):
                bench.after(tam, runs)
        if "others" in chosen:
            bench.others(forward or take_turns({"forward": bench.forward}, runs)["forward"])
        del adapter, bench
    if "growth" in chosen:
        report.add("## Growth of the part after the pass", "")
        plot = None if out is None else out.with_suffix(".png")
        report_growth(shape, torch_dtype, device, tam, report, plot, runs)
    write_report(out, "\n".join(report.lines), report.figures)


if __name__ == "__main__":
    typer.run(main)
