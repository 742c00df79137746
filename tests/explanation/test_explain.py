from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from captum_intramodal import ARC, Explanation, ModelAdapter, explain
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.explanation.context import relate
from captum_intramodal.models.layer_io import first_tensor, replace_first_tensor
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "llava", "smolvlm", "idefics3", "internvl"]


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return tiny("qwen2_vl")


@pytest.mark.filterwarnings("ignore:Scales")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_end_to_end(family: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    result = explain(model, processor, random_image(), "describe the picture", "a red dog and a blue cat")
    assert result.tokens == ["a", "red", "dog", "and", "a", "blue", "cat"]
    assert result.prompt_tokens == ["describe", "the", "picture"]
    assert [word.text for word in result.words] == result.tokens
    heat = result.heatmap("dog", size=(50, 70))
    assert heat.shape == (50, 70) and heat.dtype == torch.float32
    assert float(heat.min()) >= 0 and float(heat.max()) <= 1
    assert result.heatmap(2).shape == (136, 200)
    relevance = result.text_relevance("cat")
    assert len(relevance) == len(result.earlier_tokens("cat")) == 3 + 6
    assert result.heatmap("picture", part="prompt").shape == (136, 200)
    assert result.to_html(tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:Scales")
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_answers_are_what_generate_says(family: str) -> None:
    model, processor = tiny(family)
    result = explain(
        model, processor, random_image(), "what is in the picture", scales=(1.0,), arc=None, max_new_tokens=4
    )
    adapter = ModelAdapter(model, processor)
    inputs = adapter.prepare([random_image()], "what is in the picture")
    with torch.no_grad():
        # One step of greedy decoding by hand, without a cache.
        logits = model(**inputs).logits[0, -1]
    assert int(result.token_ids[len(result.prompt_tokens)]) == int(logits.argmax())
    probability = logits.float().softmax(0).max()
    assert float(result.probabilities[0]) == pytest.approx(float(probability), rel=1e-3)


def test_plain_lens_equals_the_models_hidden_states(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    image = random_image(224, 168)  # 8 x 6 tokens of 28 pixels: no resizing, a plain raster
    result = explain(model, processor, image, "describe the picture", "a red dog", scales=(1.0,), arc=None)
    adapter = ModelAdapter(model, processor)
    encoding = adapter.encode(adapter.prepare([image], "describe the picture"), adapter.tokenize_answer("a red dog"))
    with torch.no_grad():
        output = model(**encoding.inputs, output_hidden_states=True)
    hidden = output.hidden_states[-1][0, encoding.visual_positions]
    weight = model.get_output_embeddings().weight[encoding.answer_ids]
    expected = (hidden @ weight.T).clamp_min(0).T.reshape(3, 6, 8)
    # Two cells per token and side: bilinear interpolation of the raster.
    drawn = F.interpolate(expected[None], size=(12, 16), mode="bilinear", align_corners=False)[0]
    assert result.maps[0].shape == (6, 12, 16)
    assert torch.allclose(result.maps[0][3:], drawn, atol=0.03 * float(drawn.max()))
    log_probability = output.logits[0, encoding.prompt_length - 1 : -1].log_softmax(-1)
    picked = log_probability.gather(1, torch.tensor(encoding.answer_ids)[:, None])[:, 0].exp()
    assert torch.allclose(result.probabilities, picked, atol=1e-5)


def test_scales_are_averaged_in_the_pictures_frame(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    image = random_image(224, 168)
    both = explain(model, processor, image, "describe the picture", "a dog", scales=(1.0, 2.0), arc=None)
    large = explain(model, processor, image, "describe the picture", "a dog", scales=(2.0,), arc=None)
    small = explain(model, processor, image, "describe the picture", "a dog", scales=(1.0,), arc=None)
    assert both.maps[0].shape == large.maps[0].shape
    enlarged = F.interpolate(small.maps[0][None], size=large.maps[0].shape[1:], mode="bilinear")[0]
    expected = (large.maps[0] + enlarged) / 2
    assert torch.corrcoef(torch.stack([both.maps[0].flatten(), expected.flatten()]))[0, 1] > 0.995
    weighted = explain(
        model, processor, image, "describe the picture", "a dog", scales=(1.0, 2.0), scale_weights=(0, 1), arc=None
    )
    assert torch.allclose(weighted.maps[0], large.maps[0], atol=1e-6)


def test_arc_lowers_and_never_raises(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    arguments = (model, processor, random_image(), "describe the picture", "a red dog and a blue cat")
    plain = explain(*arguments, scales=(1.0,), arc=None)
    suppressed = explain(*arguments, scales=(1.0,), arc={"weighting": "irrelevance"})
    assert (suppressed.maps[0] <= plain.maps[0] + 1e-6).all()
    assert suppressed.maps[0].sum() < plain.maps[0].sum()
    assert plain.settings["arc"] is None and suppressed.settings["arc"]["weighting"] == "irrelevance"
    assert torch.equal(explain(*arguments, scales=(1.0,), arc={"strength": 0.0}).maps[0], plain.maps[0])


def test_a_fixed_size_model_drops_enlargements() -> None:
    model, processor = tiny("llava")
    with pytest.warns(UserWarning, match=r"\[1\.5, 2\.0\] give the model nothing new"):
        result = explain(model, processor, random_image(), "describe the picture", "a dog", scales=(0.5, 1.0, 1.5, 2.0))
    assert result.settings["scales"] == [0.5, 1.0]
    assert result.settings["dropped_scales"] == [1.5, 2.0]


def test_weights_of_scales_that_are_left() -> None:
    model, processor = tiny("llava")
    arguments = (model, processor, random_image(), "describe the picture", "a dog")
    with pytest.warns(UserWarning, match="nothing new"):
        result = explain(*arguments, scales=(0.5, 1.0, 2.0), scale_weights=(1, 3, 4))
    assert result.settings["scale_weights"] == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"\[0\.5, 1\.0\], have weight 0, and \[2\.0\]"):
        explain(*arguments, scales=(0.5, 1.0, 2.0), scale_weights=(0, 0, 1))


def test_a_large_image_is_not_enlarged_where_the_processor_shrinks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_vl")
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    with pytest.warns(UserWarning, match=r"\[2\.0\] give the model nothing new"):
        result = explain(
            model, processor, random_image(1500, 1200), "describe the picture", "a dog", scales=(0.5, 1.0, 2.0)
        )
    assert result.settings["scales"] == [0.5, 1.0]
    assert largest <= 1500 * 1200


def test_several_images(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    images = [random_image(224, 168), random_image(112, 112, seed=1)]
    result = explain(model, processor, images, "what is in the picture", "a dog", scales=(1.0,))
    assert [tuple(m.shape[1:]) for m in result.maps] == [(12, 16), (8, 8)]
    assert result.heatmap("dog", image=1).shape == (112, 112)
    swapped = explain(model, processor, images[::-1], "what is in the picture", "a dog", scales=(1.0,))
    assert [tuple(m.shape[1:]) for m in swapped.maps] == [(8, 8), (12, 16)]
    with pytest.raises(IndexError, match="there are 2"):
        result.heatmap("dog", image=2)


def test_bfloat16(qwen: tuple[Any, Any]) -> None:
    model, processor = tiny("qwen2_vl")
    expected = explain(model, processor, random_image(), "describe the picture", "a dog", scales=(1.0,), arc=None)
    actual = explain(
        model.to(torch.bfloat16), processor, random_image(), "describe the picture", "a dog", scales=(1.0,), arc=None
    )
    assert actual.maps[0].dtype == torch.float32 and actual.settings["model"]["dtype"] == "bfloat16"
    assert torch.corrcoef(torch.stack([actual.maps[0].flatten(), expected.maps[0].flatten()]))[0, 1] > 0.98


def test_messages_as_prompt(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    content = [{"type": "image"}, {"type": "text", "text": "describe the picture"}]
    as_messages = explain(
        model, processor, random_image(), [{"role": "user", "content": content}], "a dog", scales=(1.0,)
    )
    as_text = explain(model, processor, random_image(), "describe the picture", "a dog", scales=(1.0,))
    assert torch.equal(as_messages.maps[0], as_text.maps[0])
    assert as_messages.prompt == "describe the picture"


def test_a_system_prompt_and_several_turns(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "the user is a person"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat ."}]},
        {"role": "user", "content": [{"type": "text", "text": "describe the cat"}]},
    ]
    result = explain(model, processor, random_image(), messages, "a red cat", scales=(1.0,))
    # Shown is the last question; all that was read is context.
    assert result.prompt == "describe the cat" and result.answer == "a red cat"
    assert [word.text for word in result.words] == ["a", "red", "cat"]
    adapter = ModelAdapter(model, processor)
    encoding = adapter.encode(adapter.prepare([random_image()], messages), adapter.tokenize_answer("a red cat"))
    with torch.no_grad():
        probabilities = model(**encoding.inputs).logits[0, -4:-1].softmax(-1)
    expected = probabilities.gather(1, encoding.input_ids[-3:, None])[:, 0]
    torch.testing.assert_close(result.probabilities, expected, atol=1e-5, rtol=1e-4)


def test_answer_as_ids(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    ids = processor.tokenizer("a dog", add_special_tokens=False)["input_ids"]
    as_ids = explain(model, processor, random_image(), "describe the picture", ids, scales=(1.0,))
    assert as_ids.answer == "a dog"


def test_a_model_in_training_mode_is_explained_without_dropout(qwen: tuple[Any, Any]) -> None:
    model, processor = tiny("qwen2_vl")
    arguments = (processor, random_image(), "describe the picture", "a red dog")
    expected = explain(model, *arguments, scales=(1.0,))

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        return replace_first_tensor(output, F.dropout(first_tensor(output), 0.5, module.training))

    handle = model.get_decoder().layers[0].register_forward_hook(drop)
    actual = explain(model.train(), *arguments, scales=(1.0,))
    handle.remove()
    assert model.training
    assert torch.equal(actual.maps[0], expected.maps[0])


@pytest.mark.parametrize("training", [True, False])
def test_borrowed_state_comes_back(training: bool) -> None:
    model, processor = tiny("internvl")
    model.train(training)

    def state() -> tuple[Any, ...]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        replaced = [name for name, m in model.named_modules() if "forward" in m.__dict__]
        flags = [m.training for m in model.modules()]
        return hooks, replaced, flags, [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist()

    explain(model, processor, random_image(), "describe the picture", "a dog", scales=(1.0,))  # transformers' own hooks
    before = state()
    explain(model, processor, random_image(160, 96), "describe the picture", "a dog", scales=(1.0,))
    assert state() == before

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[-1].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        explain(model, processor, random_image(96, 160), "describe the picture", "a dog", scales=(1.0,))
    handle.remove()
    assert state() == before


def test_errors(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    good = (model, processor, random_image(), "describe the picture", "a dog")
    with pytest.raises(ValueError, match="prompt is empty"):
        explain(*good[:3], "  ", "a dog")
    with pytest.raises(ValueError, match="cannot encode 'zebra'"):
        explain(*good[:4], "a zebra")
    with pytest.raises(ValueError, match="answer is empty"):
        explain(*good[:4], "")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        explain(*good[:4], [10**6])
    with pytest.raises(ValueError, match="positive"):
        explain(*good, scales=(0.0,))
    with pytest.raises(TypeError, match="PIL images"):
        explain(model, processor, np.zeros((4, 4, 3)), "describe")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PIL images"):
        explain(model, processor, [], "describe")
    with pytest.raises(TypeError, match="needs a tokenizer"):
        explain(model, processor.tokenizer, *good[2:])
    with pytest.raises(TypeError, match="generates text"):
        explain(torch.nn.Linear(2, 2), processor, *good[2:])  # type: ignore[arg-type]
    result = explain(*good, scales=(1.0,))
    with pytest.raises(IndexError, match="has 2 tokens"):
        result.heatmap(2)
    with pytest.raises(ValueError, match="no word 'cat'"):
        result.heatmap("cat")
    with pytest.raises(ValueError, match="size must be"):
        result.heatmap(0, size=(0, 4))


def test_save_and_load(qwen: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = qwen
    result = explain(model, processor, random_image(), "describe the picture", "a red dog", scales=(1.0,))
    loaded = Explanation.load(result.save(tmp_path / "deep" / "saved"))
    assert sorted(path.name for path in (tmp_path / "deep" / "saved").iterdir()) == [
        "explanation.json",
        "explanation.safetensors",
        "image-0.png",
    ]
    for name in ("token_ids", "spans", "relevance", "probabilities"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    assert torch.equal(loaded.maps[0], result.maps[0])
    assert (loaded.prompt, loaded.answer, loaded.words) == (result.prompt, result.answer, result.words)
    assert loaded.settings == json.loads(json.dumps(result.settings))
    assert np.array_equal(np.asarray(loaded.images[0]), np.asarray(result.images[0]))
    (tmp_path / "deep" / "saved" / "explanation.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no complete explanation"):
        Explanation.load(tmp_path / "deep" / "saved")
    with pytest.raises(ValueError, match="no complete explanation"):
        Explanation.load(tmp_path / "nowhere")


def test_words_and_normalization_by_hand() -> None:
    maps = torch.zeros(4, 2, 2)
    maps[1] = torch.tensor([[4.0, 0], [0, 0]])
    maps[2] = torch.tensor([[0.0, 2], [0, 0]])
    relevance = torch.tensor([[0.0, 0, 0, 0], [3, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    result = Explanation(
        images=[Image.new("RGB", (4, 4))],
        prompt="hi",
        answer="umbrella.",
        token_ids=torch.arange(4),
        spans=torch.tensor([[0, 2], [0, 3], [3, 8], [8, 9]]),
        maps=[maps],
        relevance=relevance,
        probabilities=torch.tensor([0.5, 0.4, 0.9]),
    )
    word = result.words[0]
    assert (word.text, word.tokens) == ("umbrella", (0, 1))
    assert word.probability == pytest.approx(0.2)
    assert torch.equal(result.heatmap(word, size=(2, 2)), torch.tensor([[1.0, 0.5], [0, 0]]))
    assert torch.equal(result.heatmap(word, size=(2, 2), normalize="answer"), torch.tensor([[0.5, 0.25], [0, 0]]))
    assert torch.equal(result.heatmap(2, size=(2, 2)), torch.zeros(2, 2))
    # The word's own first token is not among its earlier ones.
    assert torch.equal(result.text_relevance(word), torch.tensor([1.0]))
    assert torch.equal(result.text_relevance(1), torch.tensor([0.5, 1.0]))
    assert result.earlier_tokens(1) == ["hi", "umb"]
    assert result.word_relevance("answer").tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3", "git", "mllama", "t5gemma2"])
def test_an_answer_read_while_it_is_generated_is_one_read_afterwards(model_type: str) -> None:
    model, processor = build(model_type)
    options = dict(scales=(1.0,), max_new_tokens=4, arc=dict(layers=(0, -1)))
    lines: list[str] = []
    said = explain(model, processor, random_image(), "what is this", progress=lines.append, **options)
    assert not any("Reading the answer" in line for line in lines)
    answer = said.token_ids[-len(said.probabilities) :].tolist()
    read = explain(model, processor, random_image(), "what is this", answer, progress=lines.append, **options)
    assert any("Reading the answer" in line for line in lines)
    assert len(answer) == 4
    for actual, expected in ((said.maps[0], read.maps[0]), (said.relevance, read.relevance)):
        torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.max()), rtol=1e-4)
    torch.testing.assert_close(said.probabilities, read.probabilities, atol=1e-6, rtol=1e-4)


def test_the_answer_is_not_read_again(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    lengths: list[int] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    try:
        result = explain(model, processor, random_image(), "what is this", scales=(1.0,), max_new_tokens=5)
        again = explain(model, processor, random_image(), "what is this", scales=(1.0,), max_new_tokens=5)
    finally:
        handle.remove()
    assert len(result.probabilities) == 5
    # Of the second call, which has nothing to find out about the model: the prompt, and each token of the answer.
    assert lengths[-5:] == [1] * 5 and lengths[-6] > 20
    assert sum(length > 20 for length in lengths) == 2
    assert torch.equal(again.maps[0], result.maps[0])


@pytest.mark.parametrize("model_type", ["blip", pytest.param("diffusion_gemma", marks=pytest.mark.slow)])
def test_a_model_that_does_not_read_token_by_token_reads_its_answer_afterwards(model_type: str) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)
    inputs = adapter.prepare([random_image()], "what is this")
    layers, kept = [adapter.lens.layers[-1]], [torch.arange(2)]
    answers, states, rankings = adapter.generate_with_states(inputs, 4, layers, kept, 5)
    assert states is None and rankings is None
    assert 1 <= len(answers[0]) <= 4


def test_little_working_memory_changes_nothing(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    arguments = (model, processor, random_image(), "what is this", "a red dog")
    little, much = (explain(*arguments, working_memory=memory) for memory in (2**15, 2**30))
    torch.testing.assert_close(little.maps[0], much.maps[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(little.relevance, much.relevance, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(little.probabilities, much.probabilities)
    with pytest.raises(ValueError, match="working_memory must be at least 1 byte"):
        explain(*arguments, working_memory=0)


@pytest.mark.parametrize("position", ["token", "prediction"])
@pytest.mark.parametrize("layers", [(-1,), (0,), (0, -1)])
def test_rankings_and_probabilities_from_one_sweep(
    qwen: tuple[Any, Any], position: str, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ModelAdapter(*qwen)
    reading = collect_answer_activations(
        adapter, [random_image()], "what is this", "a red dog", (1.0,), ranking_layers=layers
    )
    arc = ARC(model=adapter.lens, layers=layers, ranking_position=position, k=5)
    sweeps: list[int] = []
    rank = adapter.lens.rank
    monkeypatch.setattr(adapter.lens, "rank", lambda hidden, *args: sweeps.append(len(hidden)) or rank(hidden, *args))
    context, probabilities = relate(arc, reading)
    # One per layer, and one for the probabilities if the last is not among them.
    assert len(sweeps) == len({-1, *layers})
    expected = arc.compare(list(reading.ranking_states.values()), reading.last, reading.text.ids)
    torch.testing.assert_close(context.relevance, expected.relevance)
    torch.testing.assert_close(context.text_activation, expected.text_activation)
    ids = reading.text.ids[-3:]
    torch.testing.assert_close(probabilities, adapter.lens.log_probability(reading.last[-3:], ids).exp())


@pytest.mark.parametrize("position", ["token", "prediction"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "aya_vision", "idefics3"])
def test_what_is_said_while_generating_is_ranked_then(model_type: str, position: str) -> None:
    adapter = ModelAdapter(*build(model_type))
    options = dict(answer=None, scales=(1.0,), max_new_tokens=4)
    reading = collect_answer_activations(adapter, [random_image()], "what is this", ranking_k=7, **options)
    known = reading.answer_rankings
    assert known is not None and known.ids.shape == (5, 7) and known.log_normalizer.shape == (5,)
    n = reading.n_answer
    expected = adapter.lens.rank(torch.cat([reading.last[-n:][:1], reading.last[: len(reading.text.ids)][-n:]]), 7)
    torch.testing.assert_close(known.log_normalizer, expected.log_normalizer, atol=1e-4, rtol=1e-5)
    # Neighbors of equal logits may change places.
    assert (known.ids == expected.ids).float().mean() > 0.9
    arc = ARC(model=adapter.lens, k=7, ranking_position=position)
    context, probabilities = relate(arc, reading)
    afterwards, probabilities_afterwards = relate(arc, replace(reading, answer_rankings=None))
    torch.testing.assert_close(context.relevance, afterwards.relevance, atol=0.05, rtol=0)
    torch.testing.assert_close(probabilities, probabilities_afterwards, atol=1e-6, rtol=1e-4)


def test_logits_of_low_precision_are_not_ranked() -> None:
    model, processor = tiny("qwen2_vl")
    adapter = ModelAdapter(model.to(torch.bfloat16), processor)
    options = dict(answer=None, scales=(1.0,), max_new_tokens=4, ranking_k=7)
    assert collect_answer_activations(adapter, [random_image()], "what is this", **options).answer_rankings is None
    model.float()
    reading = collect_answer_activations(ModelAdapter(model, processor), [random_image()], "what is this", **options)
    assert reading.answer_rankings is not None
    with torch.autocast("cpu", torch.bfloat16):
        reading = collect_answer_activations(
            ModelAdapter(model, processor), [random_image()], "what is this", **options
        )
    assert reading.answer_rankings is None


def test_a_head_that_reads_scaled_states_is_not_taken_at_its_word() -> None:
    """What it says has been scaled already; the lens scales the product with the states before."""
    model, processor = tiny("qwen2_vl")
    handle = model.lm_head.register_forward_pre_hook(lambda head, args: (args[0] / 4,))
    try:
        adapter = ModelAdapter(model, processor)
        assert adapter.lens.tail == "fast" and adapter.lens.factor == pytest.approx(0.25, rel=1e-3)
        options = dict(answer=None, scales=(1.0,), max_new_tokens=4, ranking_k=7)
        assert collect_answer_activations(adapter, [random_image()], "what is this", **options).answer_rankings is None
    finally:
        handle.remove()


def test_what_is_found_out_about_a_model_is_found_out_once() -> None:
    model, processor = tiny("qwen2_vl")
    calls: list[Any] = []
    handle = model.register_forward_hook(lambda *args: calls.append(args))
    try:
        ModelAdapter(model, processor).lens  # noqa: B018
        lens = ModelAdapter(model, processor, working_memory=12345).lens
        assert len(calls) == 1 and lens.working_memory == 12345
        model.set_output_embeddings(torch.nn.Linear(64, model.config.text_config.vocab_size, bias=False))
        assert ModelAdapter(model, processor).lens.head is model.get_output_embeddings()
        assert len(calls) == 2
    finally:
        handle.remove()
