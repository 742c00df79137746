from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ARC, ModelAdapter, PixelForward, VisualTokenAttribution, draw_positions, explain
from captum_intramodal import explainers as module
from captum_intramodal.demo import CHECKPOINT, IMAGES
from captum_intramodal.explainers import EXPLAINERS, eager_attention, greedy_inclusion, make_explainer, shared_passes
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

PROMPT = "describe the picture"
SMALL = {
    "integrated_gradients": "n_steps=2",
    "llava_cam": "samples=2",
    "occlusion": "window=1,stride=1",
    "greedy": "cells=2,steps=1",
}


@cache
def model(model_type: str) -> ModelAdapter:
    return ModelAdapter(*tiny(model_type))


@cache
def demo() -> ModelAdapter:
    loaded = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return ModelAdapter(loaded, AutoProcessor.from_pretrained(CHECKPOINT))


def answer(adapter: ModelAdapter, text: str = "a red dog") -> list[int]:
    return adapter.tokenize_answer(text)


def eager_pass(adapter: ModelAdapter, shown: Image.Image) -> tuple[Any, Any]:
    """The answer's encoding, and the output of a copy of the model that was made eager from the start."""
    encoding = adapter.encode(adapter.prepare([shown], PROMPT), answer(adapter))
    copy = type(adapter.model)._from_config(adapter.model.config, attn_implementation="eager")
    copy.load_state_dict(adapter.model.state_dict())
    return encoding, copy.eval()(**encoding.inputs, output_attentions=True, use_cache=False)


def drawn(adapter: ModelAdapter, encoding: Any, rows: list[Tensor], shown: Image.Image) -> Tensor:
    (maps,) = draw_positions(torch.stack(rows).detach(), adapter, encoding.input_ids, [shown.size])
    return maps


@pytest.mark.parametrize("name", EXPLAINERS)
def test_maps_of_each_explainer(name: str) -> None:
    adapter, shown = model("qwen2_vl"), random_image(112, 84)
    explainer = make_explainer(f"{name}:{SMALL.get(name, '')}")
    ids = answer(adapter)
    (maps,) = explainer(adapter, [shown], PROMPT, ids)
    (again,) = explainer(adapter, [shown], PROMPT, ids)
    assert maps.shape[0] == len(ids) and maps.dtype == torch.float32 and not maps.requires_grad
    assert bool(maps.isfinite().all()) and float(maps.min()) >= 0 and float(maps.max()) > 0
    assert torch.equal(maps, again)
    assert explainer.name == name
    assert json.loads(json.dumps(explainer.settings)) == explainer.settings
    options = {key: value for key, value in explainer.settings.items() if key != "name"}
    assert EXPLAINERS[name](**options).settings == explainer.settings


@pytest.mark.parametrize(
    "spec", ["logit_lens", "msea:scales=[1,1.5,2]", "arc", "msea+arc", "msea+arc:k=5,strength=0.5"]
)
def test_lens_maps_are_those_of_explain(spec: str) -> None:
    adapter, shown = demo(), Image.open(IMAGES[0]).convert("RGB")
    ids = adapter.generate(adapter.prepare([shown], "describe the picture."))
    options = {"k": 5, "strength": 0.5} if "k=5" in spec else "arc" in spec
    scales = "auto" if "msea" in spec else (1.0,)
    expected = explain(
        adapter.model, adapter.processor, shown, "describe the picture.", ids, scales=scales, arc=options or None
    )
    (maps,) = make_explainer(spec)(adapter, [shown], "describe the picture.", ids)
    assert torch.allclose(maps, expected.maps[0][-len(ids) :], atol=1e-6)


def test_two_images() -> None:
    adapter, shown = model("qwen2_vl"), [random_image(112, 84), random_image(84, 112, 1)]
    for spec in ("msea+arc", "attention", "greedy:cells=4,steps=1", "random", "msea+attention:scales=[1,2]"):
        maps = make_explainer(spec)(adapter, shown, PROMPT, answer(adapter))
        assert [m.shape[0] for m in maps] == [3, 3]
        assert maps[0].shape[1] < maps[0].shape[2] and maps[1].shape[1] > maps[1].shape[2]
    with pytest.raises(ValueError, match="one image, got 2"):
        make_explainer("grad_cam")(adapter, shown, PROMPT, answer(adapter))


def test_a_shared_reading_changes_nothing_and_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, shown, ids = model("qwen2_vl"), random_image(112, 84), answer(model("qwen2_vl"))
    specs = ("logit_lens", "tam", "msea:scales=[1,2]", "msea:scales=[1.5,2]", "msea+arc:scales=[1,1.5],layers=[0,-1]")
    explainers = [make_explainer(spec) for spec in specs]
    alone = [e(adapter, [shown], PROMPT, ids)[0] for e in explainers]
    calls = []
    collect_answer_activations = module.collect_answer_activations

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[4])
        return collect_answer_activations(*args, **options)

    monkeypatch.setattr(module, "collect_answer_activations", counted)
    with shared_passes(explainers):
        together = [e(adapter, [shown], PROMPT, ids)[0] for e in explainers]
        assert calls == [(1.0, 1.5, 2.0)]
        explainers[0](adapter, [random_image(112, 84, 1)], PROMPT, ids)
        assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    explainers[0](adapter, [shown], PROMPT, ids)
    assert len(calls) == 3


def test_a_shared_reading_where_scales_show_nothing_new() -> None:
    adapter, shown, ids = model("llava"), random_image(112, 112), answer(model("llava"))
    explainers = [make_explainer(s) for s in ("logit_lens", "msea:scales=[1,2]", "msea:scales=[0.5,1]", "msea", "tam")]
    alone = [e(adapter, [shown], PROMPT, ids)[0] for e in explainers]
    with shared_passes(explainers):
        together = [e(adapter, [shown], PROMPT, ids)[0] for e in explainers]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_attention_is_that_of_an_eager_pass(model_type: str) -> None:
    adapter, shown = model(model_type), random_image(112, 112)
    encoding, output = eager_pass(adapter, shown)
    start = encoding.prompt_length
    rows = [output.attentions[1][0, :, start + t - 1].mean(0) for t in range(3)]
    (maps,) = make_explainer("attention:layer=1")(adapter, [shown], PROMPT, answer(adapter))
    assert torch.allclose(maps, drawn(adapter, encoding, rows, shown), atol=1e-6)


def test_rollout_by_a_slow_loop() -> None:
    adapter, shown = model("qwen2_vl"), random_image(112, 84)
    encoding, output = eager_pass(adapter, shown)
    joint = torch.eye(len(encoding.input_ids))
    for attention in output.attentions:
        joint = (0.7 * attention[0].mean(0) + 0.3 * torch.eye(len(joint))) @ joint
    rows = [joint[encoding.prompt_length + t - 1] for t in range(3)]
    (maps,) = make_explainer("attention_rollout:residual=0.3")(adapter, [shown], PROMPT, answer(adapter))
    assert torch.allclose(maps, drawn(adapter, encoding, rows, shown), atol=1e-6)


def test_attention_x_gradient_by_a_slow_loop() -> None:
    adapter, shown = model("qwen2_vl"), random_image(112, 84)
    for parameter in adapter.model.parameters():
        parameter.requires_grad_()
    encoding, output = eager_pass(adapter, shown)
    rows = []
    for t, token in enumerate(answer(adapter)):
        position = encoding.prompt_length + t - 1
        relevance = torch.eye(len(encoding.input_ids))
        gradients = torch.autograd.grad(output.logits[0, position, token], output.attentions, retain_graph=True)
        for attention, gradient in zip(output.attentions, gradients, strict=True):
            relevance = relevance + (attention * gradient)[0].clamp(min=0).mean(0) @ relevance
        rows.append(relevance[position])
    adapter.model.requires_grad_(False)
    (maps,) = make_explainer("attention_x_gradient")(adapter, [shown], PROMPT, answer(adapter))
    expected = drawn(adapter, encoding, rows, shown)
    assert torch.allclose(maps, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_attention_implementations_are_given_back() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    tower = adapter.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), eager_attention(adapter.model):
        assert adapter.model.config._attn_implementation == "eager" and 1 / 0
    assert adapter.model.config._attn_implementation == "sdpa"
    assert adapter.model.get_decoder().config._attn_implementation == "sdpa"
    assert tower.config._attn_implementation == "eager"


def test_layers_without_attention_weights() -> None:
    hybrid = ModelAdapter(*build("qwen3_5")[:2])
    (maps,) = make_explainer("attention")(hybrid, [random_image(112, 84)], PROMPT, answer(hybrid))
    assert float(maps.max()) > 0
    with pytest.raises(ValueError, match="of 1 of its 2 layers"):
        make_explainer("attention_rollout")(hybrid, [random_image(112, 84)], PROMPT, answer(hybrid))


def test_a_part_that_refuses_the_implementation_it_had() -> None:
    adapter = ModelAdapter(*build("fast_vlm")[:2])
    before = [part.config._attn_implementation for part in adapter.model.modules() if hasattr(part, "config")]
    (maps,) = make_explainer("attention")(adapter, [random_image(112, 84)], PROMPT, answer(adapter))
    after = [part.config._attn_implementation for part in adapter.model.modules() if hasattr(part, "config")]
    assert float(maps.max()) > 0 and after == before and "sdpa" in after


def test_grad_cam_is_captums() -> None:
    adapter, shown, ids = model("qwen2_vl"), random_image(112, 84), answer(model("qwen2_vl"))
    forward = PixelForward(adapter, PROMPT, ids, "log_probs")
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
    method = VisualTokenAttribution(LayerGradCam(forward, adapter.model.get_decoder().layers[1]))
    expected = torch.cat([method.attribute(pixels, target=target)[0] for target in forward.targets])
    (maps,) = make_explainer("grad_cam:layer=1")(adapter, [shown], PROMPT, ids)
    assert torch.allclose(maps, expected.clamp_min(0), atol=1e-6)
    (quiet,) = make_explainer("llava_cam:layer=1,noise=0,samples=2")(adapter, [shown], PROMPT, ids)
    assert torch.allclose(quiet, maps, atol=1e-5)


def test_pixel_methods_are_captums() -> None:
    adapter, shown, ids = model("llava"), random_image(112, 112), answer(model("llava"))
    forward = PixelForward(adapter, PROMPT, ids, "log_probs")
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
    mean = torch.from_numpy(np.rint(np.array(shown).mean((0, 1)))).float().reshape(1, 3, 1, 1) / 255
    target = forward.targets[2]
    gradients = IntegratedGradients(forward).attribute(pixels, target=target, n_steps=3, internal_batch_size=1)
    (maps,) = make_explainer("integrated_gradients:n_steps=3,cells=8")(adapter, [shown], PROMPT, ids)
    assert torch.allclose(maps[2], F.avg_pool2d(gradients.detach().sum(1), 14)[0].clamp_min(0), atol=1e-6)
    hidden = Occlusion(forward).attribute(
        pixels, (3, 56, 56), strides=(3, 28, 28), target=target, baselines=mean.expand_as(pixels)
    )
    (maps,) = make_explainer("occlusion:window=0.5,cells=8")(adapter, [shown], PROMPT, ids)
    assert torch.allclose(maps[2], F.avg_pool2d(hidden.sum(1), 14)[0].clamp_min(0), atol=1e-4)


def test_greedy_search_finds_the_only_region_that_matters() -> None:
    important = torch.tensor([3, 0])

    def score(kept: Tensor) -> Tensor:
        return 0.1 + 0.8 * kept[:, important].float()

    values = greedy_inclusion(score, 6)
    assert values.argmax(1).tolist() == important.tolist()
    assert torch.allclose(values.max(1).values, torch.tensor(1.6), atol=1e-5)
    assert float(values.sort(1).values[:, -2].max()) < 1e-5


def test_greedy_search_by_a_slow_loop() -> None:
    weights, pair = torch.tensor([0.2, 0.05, 0.3, -0.1, 0.15]), torch.tensor([1, 4])
    asked: list[tuple[bool, ...]] = []

    def probability(kept: Tensor) -> float:
        return float(0.2 + (weights * kept).sum() + 0.25 * kept[pair].all())

    def score(kept: Tensor) -> Tensor:
        asked.extend(tuple(row.tolist()) for row in kept)
        return torch.tensor([[probability(row)] for row in kept])

    values = greedy_inclusion(score, 5)[0]
    assert len(set(asked)) == len(asked)  # No set is scored twice.
    chosen: list[int] = []
    gains = []

    def objective(regions: list[int]) -> float:
        kept = torch.tensor([i in regions for i in range(5)])
        return probability(kept) - probability(~kept)

    while len(chosen) < 5:
        best = max(set(range(5)) - set(chosen), key=lambda i: objective([*chosen, i]))
        gains.append(objective([*chosen, best]) - objective(chosen))
        chosen.append(best)
    assert values.argsort(descending=True).tolist() == chosen
    expected = [sum(max(g, 0) for g in gains[rank:]) for rank in range(5)]
    assert torch.allclose(values[chosen], torch.tensor(expected), atol=1e-5)
    first = greedy_inclusion(score, 5, steps=2)[0]
    assert set(first.nonzero().flatten().tolist()) == set(chosen[:2])


def test_greedy_search_on_a_model_by_hand() -> None:
    adapter, shown, ids = model("llava"), random_image(112, 112), answer(model("llava"))
    (maps,) = make_explainer("greedy:cells=2,steps=1,imputation=mean")(adapter, [shown], PROMPT, ids)
    forward = PixelForward(adapter, PROMPT, ids, "token_log_probs")
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
    fill = torch.from_numpy(np.rint(np.array(shown).mean((0, 1)))).float().reshape(1, 3, 1, 1) / 255

    def objective(kept: Tensor) -> Tensor:
        mask = kept.repeat_interleave(56, 0).repeat_interleave(56, 1)
        inserted, deleted = (forward(torch.where(m, pixels, fill))[0].exp() for m in (mask, ~mask))
        return inserted - deleted

    cells = torch.eye(4, dtype=torch.bool).reshape(4, 2, 2)
    values = torch.stack([objective(cell) for cell in cells])
    gains = values.max(0).values - objective(torch.zeros(2, 2, dtype=torch.bool))
    assert maps.flatten(1).argmax(1).tolist() == values.argmax(0).tolist()
    assert torch.allclose(maps.flatten(1).max(1).values, gains.clamp_min(0), atol=1e-5)


def test_lower_marks() -> None:
    adapter, ids = model("qwen2_vl"), answer(model("qwen2_vl"))
    shown, other = [random_image(112, 84)], [random_image(112, 84, 1)]
    noise, more = (make_explainer(f"random:seed={seed}") for seed in (0, 1))
    (first,) = noise(adapter, shown, PROMPT, ids)
    assert not torch.equal(first, noise(adapter, other, PROMPT, ids)[0])
    assert not torch.equal(first, more(adapter, shown, PROMPT, ids)[0])
    assert not torch.equal(first[0], first[1])
    (center,) = make_explainer("center_gaussian:sigma=0.5,cells=4")(adapter, shown, PROMPT, ids)
    assert center.shape == (3, 3, 4)
    assert torch.allclose(center[0], center[0].flip(0, 1)) and torch.equal(center[0], center[2])
    assert float(center[0, 1, 0] / center[0, 1, 1]) == pytest.approx(np.exp((0.125**2 - 0.375**2) / 0.5))


def test_msea_around_another_explainer_by_hand() -> None:
    adapter, shown, ids = model("qwen2_vl"), random_image(112, 84), answer(model("qwen2_vl"))
    (maps,) = make_explainer("msea+attention:scales=[1,2],scale_weights=[3,1],layer=0")(adapter, [shown], PROMPT, ids)
    base = make_explainer("attention:layer=0")
    (small,) = base(adapter, [shown], PROMPT, ids)
    (large,) = base(adapter, [shown.resize((224, 168), Image.Resampling.BICUBIC)], PROMPT, ids)
    expected = 0.75 * F.interpolate(small[None], large.shape[1:], mode="bilinear")[0] + 0.25 * large
    assert torch.allclose(maps, expected, atol=1e-6)


def test_arc_around_another_explainer_by_hand() -> None:
    adapter, shown, ids = model("qwen2_vl"), random_image(112, 84), answer(model("qwen2_vl"))
    explainer = make_explainer("arc+random:k=7,layers=[0],seed=3")
    (maps,) = explainer(adapter, [shown], PROMPT, ids)
    encoding = adapter.encode(adapter.prepare([shown], PROMPT), ids)
    arc = ARC(model=adapter.model, k=7, layers=[0])
    start = encoding.prompt_length
    context = arc.context(encoding.inputs, torch.arange(start, start + len(ids)))
    (base,) = make_explainer("random:seed=3")(adapter, [shown], PROMPT, ids)
    assert torch.allclose(maps, arc.suppress(base, context), atol=1e-6)
    assert make_explainer("msea+arc+random").name == "msea+arc+random"
    assert make_explainer("msea+arc+random:k=3,scales=[1,2],seed=4").settings["base"]["base"]["seed"] == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lens", "There is no explainer 'lens'. There are logit_lens, msea"),
        ("arc+msea+tam", "no explainer"),
        ("tam:filtre=false", "no option filtre; its options are filter, layer"),
        ("tam:filter", "name=value"),
        ("msea:scales=[1,-2]", "-2"),
        ("msea+arc:k=0", "k"),
        ("greedy:imputation=black", "imputation must be one of"),
        ("msea+attention:cells=3", "cells"),
    ],
)
def test_errors_in_a_spec(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_explainer(spec)


def test_errors_of_models_and_answers() -> None:
    adapter, shown = model("qwen2_vl"), [random_image(112, 84)]
    ids = answer(adapter)
    with pytest.raises(ValueError, match="no layer 7"):
        make_explainer("attention:layer=7")(adapter, shown, PROMPT, ids)
    with pytest.raises(ValueError, match="The last 1 of 4 answer_ids"):
        make_explainer("random")(adapter, shown, PROMPT, [*ids, adapter.tokenizer.eos_token_id])
    for name in ("attention", "grad_cam"):
        encoder_decoder = ModelAdapter(*build("pix2struct")[:2])
        with pytest.raises(ValueError, match="its decoder's sequence"):
            make_explainer(name)(encoder_decoder, shown, PROMPT, answer(encoder_decoder))
    with pytest.raises(ValueError, match="one raster"):
        make_explainer("tam")(model("smolvlm"), [random_image(200, 136)], PROMPT, answer(model("smolvlm")))
