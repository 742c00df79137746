r"""What does explaining cost, beside answering?

    python benchmarks/cost.py --tam PATH_TO_TAM --out benchmarks/results/cost.md

One process, the same work: a Qwen2-VL-type model with random weights reads an image and answers. Times are medians
of several runs that take turns, with the smallest and largest. Peak memory is that of a separate run, beyond what is
held before it: on a CPU the live bytes of PyTorch's allocator, counted from its profiler's record of every allocation,
which depends neither on the C library's habit of keeping memory nor on when one looks; on a GPU
``max_memory_allocated``. What NumPy takes on its own is not in it. Long methods run on a part of their work and are
extrapolated, which the table says.

``--tam`` is the folder of a clone of Token Activation Map (its ``tam.py`` needs opencv and scipy); nothing of it is
part of this repository.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from captum.attr import FeatureAblation, IntegratedGradients
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from captum_intramodal import (
    ARC,
    ImageTextInput,
    ModelAdapter,
    MultimodalLLMAttribution,
    PixelForward,
    explain,
)
from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal.adapter import prefix_cache
from captum_intramodal.adapter.prefix_cache import visual_states
from captum_intramodal.adapter.text_tokens import TextTokens
from captum_intramodal.explanation.activations import Activations
from captum_intramodal.explanation.context import relate, suppress_together
from captum_intramodal.explanation.scale_maps import TokenScaleMaps
from captum_intramodal.explanation.scale_views import resize_images
from captum_intramodal.functional.aggregation import DEFAULT_SCALES, normalized_weights
from captum_intramodal.functional.rank_overlap import pairwise_rank_biased_overlap
from captum_intramodal.functional.rasterize import raster_grid, rasterize
from captum_intramodal.functional.tam import estimated_causal_inference, rank_gaussian_filter
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.logit_lens import LogitLens

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPT = "describe the picture ."
SPECIAL = (
    "<pad>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
    "<|im_end|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
TOKEN = 28  # Side of a visual token in pixels.
IG_STEPS, REGIONS = 50, (4, 4)
RATIO = ["median of ratios within a turn", "measured", "bound", "holds"]


@dataclass(frozen=True)
class Shape:
    """What a model is made of."""

    hidden: int = 1024
    layers: int = 8
    intermediate: int = 4096
    heads: int = 16
    key_value_heads: int = 4
    vocabulary: int = 151_936
    vision_width: int = 256
    vision_layers: int = 4


# The language model of a Qwen2-VL-7B, with its vision tower's width and depth.
SEVEN_BILLION = Shape(3584, 28, 18_944, 28, 4, 152_064, 1280, 32)


def build(shape: Shape, dtype: torch.dtype, device: str) -> ModelAdapter:
    """A model with random weights whose words are numbers; it never ends an answer by itself."""
    words = [*SPECIAL, *"user assistant describe the picture .".split()]
    words += [f"w{number}" for number in range(shape.vocabulary - len(words))]
    word_level = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[2:7]),
    )
    ids = {f"{name}_token_id": words.index(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{name}_token_id": words.index(f"<|vision_{name}|>") for name in ("start", "end")}
    eighth = shape.hidden // shape.heads // 8
    config = Qwen2VLConfig(
        text_config=dict(
            model_type="qwen2_vl_text",
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=32_768,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [eighth, 3 * eighth // 2, 4 * eighth - eighth - 3 * eighth // 2],
            },
            bos_token_id=None,
            eos_token_id=words.index("<|im_end|>"),
            pad_token_id=0,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            embed_dim=shape.vision_width,
            hidden_size=shape.hidden,
            num_heads=shape.vision_width // 64,
            depth=shape.vision_layers,
            patch_size=TOKEN // 2,
        ),
        tie_word_embeddings=True,
        **ids,
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=TOKEN // 2, size={"shortest_edge": 4 * TOKEN**2, "longest_edge": 2**15 * TOKEN**2}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=TOKEN // 2),
        chat_template=TEMPLATE,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return ModelAdapter(model, processor)


def noise_image(visual_tokens: int) -> Image.Image:
    """Noise, of so many visual tokens."""
    rows = 2 ** (visual_tokens.bit_length() // 2 - (visual_tokens.bit_length() % 2 == 0))
    while visual_tokens % rows:
        rows -= 1
    size = (TOKEN * rows, TOKEN * visual_tokens // rows, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Seconds of several runs, times ``factor`` where only a part of the work was run; peak extra bytes."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    note: str = ""
    factor: float = 1.0

    @property
    def median(self) -> float:
        return self.factor * float(np.median(self.seconds))

    def cells(self) -> list[str]:
        low, high = self.factor * min(self.seconds), self.factor * max(self.seconds)
        spread = f"{low:.3g} to {high:.3g}" if len(self.seconds) > 1 else "one run"
        peak = "" if self.peak is None else f"{self.peak / 1e6:,.1f}"
        return [f"{self.median:.3g}", spread, peak, self.note]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Most bytes that the work holds at a time, beyond those held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, int(np.cumsum(changes, dtype=np.int64).max(initial=0)))


def take_turns(works: dict[str, Callable[[], Any]], runs: int, warm_up: bool = True) -> dict[str, Cost]:
    """Every work once per turn, so that what the machine does meanwhile meets all alike."""
    costs = {name: Cost() for name in works}
    for turn in range(runs + warm_up):
        for name, work in works.items():
            took = seconds(work)
            if turn >= warm_up:
                costs[name].seconds.append(took)
    return costs


@contextmanager
def quiet(adapter: ModelAdapter) -> Iterator[None]:
    with evaluation_mode(adapter.model):
        yield


# --- Token Activation Map's own code ---------------------------------------------------------------------------------


class OwnTAM:
    """TAM's own code on a sequence that was read already, as its demo runs it: logits of all positions, then a map for
    each token of the prompt and the answer."""

    def __init__(self, folder: Path) -> None:
        # It is imported to draw text alone.
        sys.modules.setdefault("fitz", types.ModuleType("fitz"))
        spec = importlib.util.spec_from_file_location("tam", folder / "tam.py")
        if spec is None or spec.loader is None:
            raise ValueError(f"There is no tam.py in {folder}.")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def __call__(
        self, adapter: ModelAdapter, states: Tensor, ids: list[int], prompt: int, image: Image.Image
    ) -> list[np.ndarray]:
        """From the normed last states (positions, D); returns the maps before they become 8-bit images."""
        model, tokenizer = adapter.model, adapter.tokenizer
        logits = [model.lm_head(states[None, :prompt])]
        logits += [model.lm_head(states[None, i : i + 1]) for i in range(prompt, len(states))]
        vision, end, start = tokenizer.convert_tokens_to_ids(["<|vision_end|>", "<|im_end|>", "<|im_start|>"])
        special = {
            "img_id": [model.config.image_token_id],
            "prompt_id": [vision, end],
            "answer_id": [[start, tokenizer.convert_tokens_to_ids("assistant")], -1],
        }
        filtered: list[np.ndarray] = []
        original = self.module.rank_guassian_filter

        def kept(*args: Any) -> np.ndarray:
            filtered.append(original(*args))
            return filtered[-1]

        grid = image.height // TOKEN, image.width // TOKEN
        raw: list[np.ndarray] = []
        self.module.rank_guassian_filter = kept
        try:
            for target in range(len(logits)):
                self.module.TAM(ids, grid, logits, special, [image], adapter.processor, "", target, raw, eval_only=True)
        finally:
            self.module.rank_guassian_filter = original
        return filtered


def our_tam(
    lens: LogitLens, visual: Tensor, text: Tensor, classes: Tensor, words: Tensor, asked: int, grid: tuple[int, int]
) -> Tensor:
    """TAM of tokens with these ``classes``, whose strings are those of the ids ``words``, from hidden states; the first
    ``asked`` are the question's. As in TAM's code, a map begins at the smallest value that it or the text has."""
    maps = lens.activation(visual, classes).T.clamp_min(0).contiguous()
    activation = lens.activation(text, classes).T.clamp_min(0).contiguous()
    maps = estimated_causal_inference(maps, activation, words[:, None] == words)
    token = torch.arange(len(words), device=maps.device)
    unread = token >= token[:, None].clamp_min(asked)
    smallest = torch.minimum(maps.amin(1), activation.masked_fill(unread, torch.inf).amin(1))
    return rank_gaussian_filter((maps - smallest[:, None]).reshape(len(words), *grid)).flatten(1)


# --- The part after the model's pass ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What the last layer said of an image and an answer, and where its visual tokens are."""

    lens: LogitLens
    visual: Tensor
    text: Tensor  # At the T text tokens, then at the positions before them.
    ids: Tensor
    n_answer: int
    geometry: TokenGeometry

    @classmethod
    def random(cls, lens: LogitLens, visual_tokens: int, text_tokens: int, n_answer: int) -> Said:
        generator = torch.Generator().manual_seed(0)
        device, dtype = lens._weight.device, lens._weight.dtype
        image = noise_image(visual_tokens)
        rows, columns = image.height // TOKEN, image.width // TOKEN
        row, column = torch.arange(visual_tokens) // columns, torch.arange(visual_tokens) % columns
        boxes = TOKEN * torch.stack([column, row, column + 1, row + 1], dim=1).float()
        at_tokens = torch.randn(text_tokens + 1, lens.hidden_size, generator=generator)
        return cls(
            lens,
            torch.randn(rows * columns, lens.hidden_size, generator=generator).to(device, dtype),
            torch.cat([at_tokens[1:], at_tokens[:-1]]).to(device, dtype),
            torch.randint(20, lens.vocab_size, (text_tokens,), generator=generator),
            n_answer,
            TokenGeometry(boxes, ("local",) * len(boxes), torch.zeros(len(boxes), dtype=torch.int64), (image.size,)),
        )

    def reading(self) -> Activations:
        count = len(self.ids)
        positions = torch.arange(count)
        activation = self.lens.activation(self.visual, self.ids).T.clamp_min(0).cpu()
        return Activations(
            images=[Image.new("RGB", self.geometry.image_sizes[0])],
            text=TextTokens(positions, self.ids, positions[:, None], torch.ones(count, dtype=torch.bool), "", ""),
            levels=[TokenScaleMaps(1.0, activation, self.geometry)],
            method="logit_lens",
            dropped=[],
            ranking_states={-1: self.text},
            last=self.text,
            n_answer=self.n_answer,
            working_memory=self.lens.working_memory,
        )

    def maps(self) -> list[Tensor]:
        """Maps alone."""
        return self.reading().maps(normalized_weights((1.0,), None))

    def maps_and_arc(self) -> list[Tensor]:
        """Maps, rankings, probabilities and suppression."""
        arc, reading = ARC(model=self.lens), self.reading()
        maps = reading.maps(normalized_weights((1.0,), None))
        return suppress_together(arc, maps, relate(arc, reading)[0])


@dataclass(frozen=True)
class Stage:
    """A stage of the work after the pass: what it takes at least, and how to run it."""

    operations: float
    bytes_moved: float
    work: Callable[[], Any]


def stages(said: Said) -> dict[str, Stage]:
    """The cost model: operations (a multiplication and an addition are two) and bytes that must be read or written
    once, float32 where the work is accumulated so."""
    lens, arc = said.lens, ARC(model=said.lens)
    v, d = said.visual.shape
    t, vocabulary, k = len(said.ids), lens.vocab_size, arc.k
    width = said.visual.element_size()
    size = said.geometry.image_sizes[0]
    grid = raster_grid(said.geometry.boxes, size)
    cells = grid[0] * grid[1]
    tokens = said.text[:t]
    values = lens.activation(said.visual, said.ids).T.clamp_min(0)
    ranking = lens.topk(tokens, k)
    maps = rasterize(values.cpu(), said.geometry.boxes, size, grid)
    context = arc.relate([ranking], said.text, said.ids)
    return {
        "maps: lens at the visual tokens": Stage(
            2.0 * v * d * t, width * (v + t) * d + 4 * v * t, lambda: lens.activation(said.visual, said.ids)
        ),
        "drawing: V values to C cells": Stage(
            8.0 * cells * t, 4 * t * (v + cells), lambda: rasterize(values.cpu(), said.geometry.boxes, size, grid)
        ),
        "rankings: top-k over the vocabulary": Stage(
            2.0 * t * d * vocabulary, width * d * vocabulary + 8 * t * k, lambda: lens.rank(tokens, k)
        ),
        "relevance: rank-biased overlap of pairs": Stage(
            2.0 * t * t * k, 8 * t * k + 4 * t * t, lambda: pairwise_rank_biased_overlap(ranking, ranking)
        ),
        "text activation": Stage(
            2.0 * t * t * d, 2 * width * t * d + 4 * t * t, lambda: lens.activation(tokens, said.ids)
        ),
        "suppression": Stage(2.0 * t * t * cells, 8 * t * cells, lambda: arc.suppress(maps, context)),
    }


def ceilings(device: str) -> tuple[float, float]:
    """Operations per second of a float32 matrix product, and bytes per second of a copy (read and written)."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    cost = take_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5)
    return 2 * 2048**3 / min(cost["product"].seconds), 8 * 2**26 / min(cost["copy"].seconds)


# --- Tables ----------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


@dataclass
class Report:
    """Lines of Markdown, and the figures behind them."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def costs(self, title: str, costs: dict[str, Cost]) -> None:
        rows = [[name, *cost.cells()] for name, cost in costs.items()]
        self.add(title, "", *table(["work", "seconds", "spread", "peak extra MB", ""], rows))
        self.figures[title] = {
            name: {"seconds": c.seconds, "factor": c.factor, "peak": c.peak, "note": c.note}
            for name, c in costs.items()
        }

    def ratio(self, name: str, value: float, bound: str, holds: bool) -> list[str]:
        self.figures.setdefault("ratios", {})[name] = value
        return [name, f"{value:.3g}", bound, "yes" if holds else "**no**"]


class Bench:
    """The measurements on one model."""

    def __init__(self, adapter: ModelAdapter, image: Image.Image, n_answer: int, report: Report) -> None:
        self.adapter, self.image, self.report = adapter, image, report
        self.device = adapter.device.type
        self.n_answer = n_answer
        with quiet(adapter):
            self.inputs = adapter.prepare([image], PROMPT)
            # An answer of different words, as those of random weights repeat themselves.
            first = len(SPECIAL) + 6
            ids = torch.randperm(len(adapter.tokenizer) - first, generator=torch.Generator().manual_seed(1))[:n_answer]
            self.answer = (ids + first).tolist()
            self.encoding = adapter.encode(self.inputs, self.answer)

    def explain(self, **options: Any) -> Any:
        return explain(self.adapter.model, self.adapter.processor, self.image, PROMPT, **options)

    def forward(self) -> None:
        with quiet(self.adapter):
            self.adapter.run(self.encoding.inputs)

    def generate(self) -> None:
        with quiet(self.adapter):
            self.adapter.generate(self.inputs, self.n_answer)

    def answering(self, runs: int) -> Cost:
        """A given answer: the model's forward alone, and explaining."""
        one = {"answer": self.answer, "scales": (1.0,)}
        works: dict[str, Callable[[], Any]] = {
            "(a) forward over prompt + answer, all logits": self.forward,
            "(c) maps, teacher-forced pass included": lambda: self.explain(**one, arc=None),
            "(c) maps + ARC, teacher-forced pass included": lambda: self.explain(**one),
        }
        self.forward()  # What PyTorch finds out once.
        first = seconds(lambda: self.explain(**one))
        costs = self.compare(works, runs)
        costs["(c) maps + ARC, first call (where the tokens are is found out)"] = Cost([first])
        self.report.costs("## A given answer", costs)
        forward, _, arc, once = costs.values()
        rows = [
            self._ratio("maps + ARC : forward", arc, forward, 1.0),
            self._ratio("maps + ARC, first call : forward", once, forward, 1.0),
        ]
        self.report.add(*table(RATIO, rows))
        return forward

    def generating(self, runs: int) -> None:
        """The model's own answer: generation alone, and explaining what is read meanwhile."""
        self.explain(answer=self.answer, scales=(1.0,))  # What is found out once.
        works: dict[str, Callable[[], Any]] = {
            "(b) greedy generation": self.generate,
            "(c) generation, maps + ARC": lambda: self.explain(scales=(1.0,), max_new_tokens=self.n_answer),
        }
        costs = self.compare(works, runs)
        self.report.costs("## The model's own answer", costs)
        generation, said = costs.values()
        rows = [self._ratio("maps + ARC while generating : generation", said, generation, 1.05)]
        self.report.add(*table(RATIO, rows))

    def compare(self, works: dict[str, Callable[[], Any]], runs: int) -> dict[str, Cost]:
        costs = take_turns(works, runs, warm_up=False)
        for name, work in works.items():
            costs[name].peak = peak_bytes(work, self.device)
        return costs

    def _ratio(self, name: str, first: Cost, second: Cost, bound: float) -> list[str]:
        """Of the same turn, if there are as many."""
        if len(first.seconds) == len(second.seconds):
            value = float(np.median(np.divide(first.seconds, second.seconds)))
        else:
            value = first.median / second.median
        return self._at_most(name, value, bound)

    def scales(self, runs: int) -> None:
        """MSEA against the passes that it cannot avoid."""
        adapter, layer = self.adapter, self.adapter.lens.layers[-1]
        sizes = [[(round(self.image.width * s), round(self.image.height * s))] for s in DEFAULT_SCALES]
        shown = [resize_images([self.image], size) for size in sizes]

        def unavoidable() -> None:
            """The originals with the answer, and images at the other scales as far as they reach."""
            with quiet(adapter):
                run_layers(lambda: adapter.run(self.encoding.inputs), [layer], lambda hidden: hidden[:, :1])
                for images in shown[1:]:
                    visual_states(adapter, adapter.prepare(images, PROMPT), layer)

        works = {
            "vision + visual prefix at 3 scales, answer": unavoidable,
            "(c) MSEA at 3 scales + ARC": lambda: self.explain(answer=self.answer, scales=DEFAULT_SCALES),
        }
        costs = self.compare(works, runs)
        self.report.costs("## Several scales", costs)
        passes, msea = costs.values()
        self.report.add(*table(RATIO, [self._ratio("MSEA + ARC : its passes", msea, passes, 1.1)]))

    def behind_text(self, runs: int, tokens: int = 1024, visual_tokens: int = 256) -> None:
        """An image that comes after a long text, which is read once instead of once per scale."""
        image = noise_image(visual_tokens)
        content = [{"type": "text", "text": " ".join([PROMPT] * (tokens // 4))}, {"type": "image"}]

        def read(least: int) -> None:
            before, prefix_cache.MIN_TOKENS = prefix_cache.MIN_TOKENS, least
            try:
                explain(
                    self.adapter.model, self.adapter.processor, image, [{"role": "user", "content": content}],
                    self.answer, scales=DEFAULT_SCALES,
                )  # fmt: skip
            finally:
                prefix_cache.MIN_TOKENS = before

        works: dict[str, Callable[[], Any]] = {
            "(c) the text read at every scale": lambda: read(sys.maxsize),
            "(c) the text read once": lambda: read(1),
        }
        for work in works.values():
            work()  # What is found out once.
        costs = self.compare(works, runs)
        self.report.costs(
            f"### {tokens} tokens of text before an image of {visual_tokens} visual tokens, MSEA at 3 scales + ARC",
            costs,
        )
        apart, once = costs.values()
        self.report.add(*table(RATIO, [self._ratio("read once : read at every scale", once, apart, 1.0)]))

    def after(self, tam: Path | None, runs: int) -> None:
        """The part after the model's pass, on the same states."""
        adapter, lens = self.adapter, self.adapter.lens
        encoding, prompt = self.encoding, self.encoding.prompt_length
        with quiet(adapter):
            (hidden,) = run_layers(lambda: adapter.run(encoding.inputs), [lens.layers[-1]])
            hidden = hidden[0]
        ids = encoding.input_ids
        text = torch.tensor([i for i, token in enumerate(ids.tolist()) if token >= len(SPECIAL)])
        said = Said(
            lens,
            hidden[encoding.visual_positions],
            torch.cat([hidden[text], hidden[text - 1]]),
            ids[text],
            self.n_answer,
            adapter.geometry([self.image.size]),
        )
        # TAM's definition, as its code has it: the question, its first token by what most likely follows it; then the
        # last token of the prompt, in whose row the answer's first word is found, and the answer but for that word.
        first, last = (
            (ids[:prompt] == SPECIAL.index(token)).nonzero()[-1] for token in ("<|vision_end|>", "<|im_end|>")
        )
        asked = torch.arange(int(first) + 1, int(last))
        places = torch.cat([asked, torch.arange(prompt - 1, len(ids) - 1)])
        words = torch.cat([ids[asked], ids[prompt:]])
        classes = torch.cat(
            [lens.topk(hidden[asked[:1]], 1)[0], ids[asked[1:]], ids[prompt - 1 : prompt], ids[prompt + 1 :]]
        )
        grid = self.image.height // TOKEN, self.image.width // TOKEN

        def ours() -> Tensor:
            return our_tam(lens, said.visual, hidden[places], classes, words, len(asked), grid)

        works: dict[str, Callable[[], Any]] = {
            "(c) maps": said.maps,
            "(c) maps + ARC": said.maps_and_arc,
            "(d) TAM, our implementation": ours,
        }
        costs = take_turns(works, max(runs, 3))
        rows = []
        if tam is not None:
            own, states = OwnTAM(tam), lens.normalize(hidden)

            def theirs() -> list[np.ndarray]:
                return own(adapter, states[:-1], ids.tolist(), prompt, self.image)

            name = "(d) TAM's own code"
            works[name] = theirs
            maps: list[list[np.ndarray]] = []
            costs[name] = Cost([seconds(lambda: maps.append(theirs())) for _ in range(runs)])
        for name, work in works.items():
            costs[name].peak = peak_bytes(work, self.device)
        self.report.costs(f"## After the pass: all {len(words)} tokens of question and answer", costs)
        if tam is not None:
            maps_cost, arc, ours_cost, theirs_cost = costs.values()
            gap = max(
                float((mine / mine.max() - torch.from_numpy(other / other.max()).to(mine).flatten()).abs().max())
                for mine, other in zip(ours(), maps[0], strict=True)
            )
            rows += [
                self._at_least("TAM's own code : our TAM, seconds", theirs_cost.median / ours_cost.median, 50),
                self._at_least("TAM's own code : maps alone, seconds", theirs_cost.median / maps_cost.median, 50),
                [
                    "TAM's own code : maps + ARC, seconds",
                    f"{theirs_cost.median / arc.median:.3g}",
                    "TAM ranks nothing",
                    "",
                ],
                self._at_most("maps + ARC : TAM's own code, peak extra memory", arc.peak / theirs_cost.peak, 0.05),
                self._at_most("our TAM : TAM's own code, peak extra memory", ours_cost.peak / theirs_cost.peak, 0.05),
                self._at_most("largest difference of TAM's maps, of their maximum", gap, 1e-5),
            ]
            self.report.add(*table(["", "measured", "bound", "holds"], rows))
        self.stages(said)

    def _at_least(self, name: str, value: float, bound: float) -> list[str]:
        return self.report.ratio(name, value, f"at least {bound:g}", value >= bound)

    def _at_most(self, name: str, value: float, bound: float) -> list[str]:
        return self.report.ratio(name, value, f"at most {bound:g}", value <= bound)

    def stages(self, said: Said) -> None:
        """Where the time goes, and what the machine would take at least."""
        flops, bandwidth = ceilings(self.device)
        each = stages(said)
        costs = take_turns({name: stage.work for name, stage in each.items()}, 5)
        rows = []
        for name, stage in each.items():
            least = max(stage.operations / flops, stage.bytes_moved / bandwidth)
            took = costs[name].median
            rows.append(
                [
                    name,
                    f"{stage.operations / 1e9:.3g}",
                    f"{stage.bytes_moved / 1e6:.3g}",
                    f"{1e3 * least:.3g}",
                    f"{1e3 * took:.3g}",
                    f"{least / took:.0%}",
                ]
            )
        title = (
            f"## Cost model of the part after the pass\n\nThis machine: {flops / 1e9:.0f} GFLOP/s (float32 product), "
            f"{bandwidth / 1e9:.1f} GB/s (copy)."
        )
        header = ["stage", "GFLOP", "MB", "least ms", "ms", "of the ceiling"]
        self.report.add(title, "", *table(header, rows))
        self.report.figures["stages"] = {"flops": flops, "bandwidth": bandwidth, "rows": rows}

    def others(self, forward: Cost) -> None:
        """Methods that take a pass per perturbation or step: a part of each, extrapolated."""
        costs: dict[str, Cost] = {}
        with quiet(self.adapter):
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
        forward_function(pixels)  # What it finds out once.
        took = seconds(lambda: method.attribute(pixels, target=forward_function.targets[0], n_steps=2))
        costs[f"(d) IntegratedGradients for each token, {IG_STEPS} steps"] = Cost(
            [took], None, f"extrapolated from 1 token, 2 steps: x {self.n_answer} x {IG_STEPS // 2}",
            self.n_answer * IG_STEPS / 2,
        )  # fmt: skip
        self.report.costs("## Other methods", costs)
        rows = [[name, f"{cost.median / forward.median:,.0f}"] for name, cost in costs.items()]
        self.report.add(*table(["", "times the forward pass"], rows))


def growth(
    shape: Shape, dtype: torch.dtype, device: str, tam: Path | None, report: Report, out: Path | None, runs: int
) -> None:
    """Time and memory of the part after the pass against each size, the others as in the benchmark."""
    base = {"visual tokens": 1024, "answer tokens": 64, "vocabulary": shape.vocabulary, "hidden size": shape.hidden}
    sizes = {
        "visual tokens": [64, 256, 1024, 4096],
        "answer tokens": [8, 32, 128, 512],
        "vocabulary": [1024, 8192, 38_912, shape.vocabulary],
        "hidden size": [256, 512, 1024, 2048],
    }
    own = None if tam is None else OwnTAM(tam)
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    shown: Shape | None = None
    for name, values in sizes.items():
        curves[name] = {}
        for value in values:
            wanted = base | {name: value}
            hidden, n = wanted["hidden size"], wanted["answer tokens"]
            one_layer = Shape(hidden, 1, 64, hidden // 64, max(1, hidden // 256), wanted["vocabulary"], 64, 1)
            if one_layer != shown:
                shown, adapter = one_layer, build(one_layer, dtype, device)
            with quiet(adapter):
                said = Said.random(adapter.lens, wanted["visual tokens"], n + 6, n)
                grid = tuple(side // TOKEN for side in said.geometry.image_sizes[0][::-1])
                works: dict[str, Callable[[], Any]] = {
                    "maps + ARC": said.maps_and_arc,
                    "our TAM": lambda said=said, grid=grid: our_tam(
                        said.lens, said.visual, said.text[: len(said.ids)], said.ids, said.ids, 4, grid
                    ),
                }
                # TAM's own code takes minutes on the larger ones.
                if own is not None and name == "visual tokens" and value < 4096:
                    image = noise_image(wanted["visual tokens"])
                    inputs = adapter.prepare([image], PROMPT)
                    encoding = adapter.encode(inputs, said.ids[-n:].tolist())
                    states = torch.randn(len(encoding.input_ids) - 1, hidden, device=device).to(dtype)
                    works["TAM's own code"] = lambda a=adapter, s=states, e=encoding, i=image: own(
                        a, s, e.input_ids.tolist(), e.prompt_length, i
                    )
                for method, work in works.items():
                    slow = method == "TAM's own code"
                    cost = take_turns({method: work}, 1 if slow else runs, warm_up=not slow)[method]
                    point = (float(value), cost.median, peak_bytes(work, device) / 1e6)
                    curves[name].setdefault(method, []).append(point)
        rows = [
            [method, *(f"{took:.3g} s, {peak:.3g} MB" for _, took, peak in points), *[""] * (len(values) - len(points))]
            for method, points in curves[name].items()
        ]
        report.add(f"Against {name}:", "", *table(["after the pass", *map(str, values)], rows))
    report.figures["growth"] = curves
    if out is not None:
        draw(curves, out.with_suffix(".png"))


def draw(curves: dict[str, dict[str, list[tuple[float, float, float]]]], path: Path) -> None:
    figure, axes = plt.subplots(2, len(curves), figsize=(14, 6), sharex="col", sharey="row", layout="constrained")
    for column, (name, methods) in enumerate(curves.items()):
        for row, label in enumerate(("seconds", "peak extra MB")):
            axis = axes[row][column]
            for method, points in methods.items():
                axis.plot([p[0] for p in points], [p[row + 1] for p in points], "o-", label=method)
            axis.set(xscale="log", yscale="log")
            values = [int(p[0]) for p in max(methods.values(), key=len)]
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(name)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("After the model's pass: time and memory against each size")
    figure.savefig(path, dpi=120)
    plt.close(figure)


PARTS = ("answering", "generating", "scales", "after", "others", "growth")


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    tam: Annotated[Path | None, typer.Option(help="Folder of a clone of Token Activation Map, for its tam.py.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = "",
    seven_billion: Annotated[bool, typer.Option(help="The shapes of a model of 7 billion parameters.")] = False,
    visual_tokens: Annotated[int, typer.Option(min=4)] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=1)] = 64,
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}.")] = ",".join(PARTS),
    out: Annotated[Path | None, typer.Option(help="Write Markdown here, with JSON and the plot beside it.")] = None,
) -> None:
    # What is wrong is told before anything runs for minutes.
    chosen = parts.split(",")
    if unknown := sorted({*chosen} - {*PARTS}):
        raise typer.BadParameter(f"--parts has {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if tam is not None and not (tam / "tam.py").is_file():
        raise typer.BadParameter(f"There is no tam.py in --tam {tam}.")
    torch_dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise typer.BadParameter(f"--dtype {dtype} is none of PyTorch's.")
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
            bench.generating(3 * runs)  # What is to be seen is as small as the spread.
        if "scales" in chosen:
            bench.scales(runs)
            bench.behind_text(runs)
        if "after" in chosen:
            with quiet(adapter):
                bench.after(tam, runs)
        if "others" in chosen:
            bench.others(forward or take_turns({"forward": bench.forward}, runs)["forward"])
        del adapter, bench
    if "growth" in chosen:
        report.add("## Growth of the part after the pass", "")
        growth(shape, torch_dtype, device, tam, report, out, runs)
    if out is not None:
        out.write_text("\n".join(report.lines), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(report.figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
