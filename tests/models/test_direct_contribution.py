"""Direct contributions: complete, equal to a reference with eager attention, and without anything S x S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from captum_intramodal import LogitLens, ModelAdapter
from captum_intramodal.adapter.contribution import direct_contribution as visual_contribution
from captum_intramodal.adapter.contribution import position_contribution
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.direct_contribution import DirectContribution, direct_contribution
from captum_intramodal.models.hooks import register_hooks
from tests.testing.families import FAMILIES, LEFT_OUT, answer_logits, build, prepare
from tests.testing.tiny import random_image, tiny

PROMPT, ANSWER = "describe the picture", "a red dog"

# Types whose logits are no sum of contributions of positions, and a part of the message that says why.
REFUSED = {
    "blip": "does not use transformers' attention interface",
    "git": "does not use transformers' attention interface",
    "gemma3n": "several residual streams",
    "glm5_next": "several residual streams",
    "inkling2": "several residual streams",
    "inkling_mm_model": "as by a convolution",
    "qwen4_exp": "neither a root-mean-square nor a layer norm",
}
# Types with layers that have no attention rows: linear attention, convolutions, MLPs apart.
PARTLY = {
    *("lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe"),
}


def encoded(model_type: str) -> tuple[ModelAdapter, Any, Tensor, Tensor]:
    """Return a model, its inputs with an answer, the positions that predict the answer, and its tokens."""
    adapter = ModelAdapter(*build(model_type))
    encoding = adapter.encode(adapter.prepare([random_image(160, 120)], PROMPT), adapter.tokenize_answer(ANSWER))
    tokens = torch.tensor(encoding.answer_ids)
    return adapter, encoding, torch.arange(-len(tokens) - 1, -1), tokens


def trace(adapter: ModelAdapter, encoding: Any, queries: Tensor, tokens: Tensor, **options: Any) -> DirectContribution:
    return direct_contribution(
        adapter.model, lambda: adapter.run(encoding.inputs), queries, tokens, lens=adapter.lens, **options
    )


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "llava", "smolvlm", "gemma3", "internvl", "mllama", "florence2", "idefics", "qwen3_5"]
)
def test_terms_sum_to_the_logits(model_type: str) -> None:
    adapter, encoding, queries, tokens = encoded(model_type)
    with torch.no_grad():
        logits = adapter.run(encoding.inputs).logits[0, queries].gather(1, tokens[:, None])[:, 0]
    result = trace(adapter, encoding, queries, tokens)
    torch.testing.assert_close(result.total, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=1e-5)
    positions = result.positions.sum(1) + result.states.sum(1)
    torch.testing.assert_close(positions, result.attention.sum(0), atol=1e-5, rtol=1e-5)
    assert result.attention.abs().sum() > 1e-2 and result.other.abs().sum() > 1e-2
    assert result.unattributed == ((0,) if model_type in PARTLY else ())
    assert (result.states.shape[1] > 0) == (model_type in ("mllama", "florence2", "idefics"))
    length = len(encoding.input_ids)
    for row, query in zip(result.positions, queries.tolist(), strict=True):
        assert not row[length + query + 1 :].any(), "later positions contribute nothing"


def eager_reference(adapter: ModelAdapter, encoding: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return contributions of positions and of cross-attention's states: eager attention, parts by their names."""
    model: Any = adapter.model
    layers = decoder_layers(model)
    weights: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    attentions = [getattr(layer, "self_attn", None) or layer.cross_attn for layer in layers]
    posts = [layer.post_attention_layernorm for layer in layers if hasattr(layer, "pre_feedforward_layernorm")]
    norms_in: dict[nn.Module, Tensor] = {}

    def keep_weights(module: nn.Module, args: Any, output: Any) -> None:
        weights[module] = output[1].float()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = output.float()
        norms_in[module] = args[0].float()

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    values = [attention.v_proj for attention in attentions]
    with (
        torch.no_grad(),
        register_hooks(attentions, keep_weights),
        register_hooks([*values, *posts, adapter.lens.norm], keep),
    ):
        adapter.run(encoding.inputs)
    model.set_attn_implementation(before)
    norm: Any = adapter.lens.norm
    gemma = "Gemma" in type(norm).__name__

    def gain(module: Any) -> Tensor:
        return module.weight.float() + (1 if gemma else 0)

    def inverse_rms(x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    rows = model.get_output_embeddings().weight[tokens].float()
    u = rows * gain(norm) * inverse_rms(norms_in[norm][0, queries])
    parts: list[Tensor] = []
    for layer, attention in zip(layers, attentions, strict=True):
        row = weights[attention][0][:, queries]  # (H, T, K)
        value = outputs[attention.v_proj].flatten(0, -2)  # Cross-attention has tiles in the batch dimension.
        width = attention.head_dim
        value = value.unflatten(-1, (-1, width)).repeat_interleave(len(row) // (value.shape[-1] // width), 1)
        toward = u
        if hasattr(layer, "pre_feedforward_layernorm"):
            post = layer.post_attention_layernorm
            toward = u * gain(post) * inverse_rms(norms_in[post][0, queries])
        if hasattr(layer, "cross_attn_attn_gate"):
            toward = u * layer.cross_attn_attn_gate.tanh()
        projection = attention.o_proj.weight.float().unflatten(1, (-1, width))
        parts.append(torch.einsum("td,dhk,shk,hts->ts", toward, projection, value, row))
    cross = [part for part, attention in zip(parts, attentions, strict=True) if "Cross" in type(attention).__name__]
    own = [part for part, attention in zip(parts, attentions, strict=True) if "Cross" not in type(attention).__name__]
    return torch.stack(own).sum(0), torch.stack(cross).sum(0) if cross else torch.zeros(len(tokens), 0)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm", "gemma3", "internvl", "mllama"])
def test_contributions_equal_an_eager_reference(model_type: str) -> None:
    adapter, encoding, queries, tokens = encoded(model_type)
    positions, states = eager_reference(adapter, encoding, queries, tokens)
    result = trace(adapter, encoding, queries, tokens)
    scale = float(torch.cat([positions, states], dim=1).abs().max())
    torch.testing.assert_close(result.positions, positions, atol=1e-4 * scale, rtol=1e-4)
    torch.testing.assert_close(result.states, states, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("working_memory", [1, 2**24])
def test_layers_and_heads_sum_to_the_whole(working_memory: int) -> None:
    adapter, encoding, queries, tokens = encoded("qwen2_vl")
    whole = trace(adapter, encoding, queries, tokens)
    layers = trace(adapter, encoding, queries, tokens, detail="layer", working_memory=working_memory)
    heads = trace(adapter, encoding, queries, tokens, detail="head", working_memory=working_memory)
    assert heads.positions.shape[:3] == (
        len(layers.blocks),
        adapter.model.config.get_text_config().num_attention_heads,
        3,
    )
    torch.testing.assert_close(heads.positions.sum(1), layers.positions, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(layers.positions.sum(0), whole.positions, atol=1e-6, rtol=1e-4)
    one = trace(adapter, encoding, queries, tokens, layers=[layers.blocks[1]])
    torch.testing.assert_close(one.positions, layers.positions[1], atol=1e-6, rtol=1e-4)


def test_masks_soft_caps_windows_and_sinks() -> None:
    common: dict[str, Any] = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    common |= dict(num_key_value_heads=2, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    capped = Gemma2Config(**common, attn_logit_softcapping=0.5, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    sinks = GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    ids = torch.randint(3, 50, (1, 14))
    for config, architecture in ((capped, Gemma2ForCausalLM), (sinks, GptOssForCausalLM)):
        model = architecture._from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        result = direct_contribution(model, lambda m=model: m(input_ids=ids), torch.tensor([-1]), torch.tensor([7]))
        torch.testing.assert_close(result.total, result.logits, atol=1e-4, rtol=1e-4)
        logit = model(input_ids=ids).logits[0, -1, 7].detach()
        expected = logit if config is sinks else 3 * torch.atanh(logit / 3)
        torch.testing.assert_close(result.total[0], expected, atol=1e-3, rtol=1e-3)
        (windowed, whole) = direct_contribution(
            model, lambda m=model: m(input_ids=ids), torch.tensor([-1]), torch.tensor([7]), detail="layer"
        ).positions
        assert not windowed[0, :10].any() and bool(windowed[0, 10:].all()) and bool(whole.all())


def test_residual_norms_take_two_passes_and_others_one() -> None:
    for model_type, passes in (("llava", 1), ("florence2", 2)):
        adapter, encoding, queries, tokens = encoded(model_type)
        runs: list[int] = []

        def run(adapter: ModelAdapter = adapter, encoding: Any = encoding, runs: list[int] = runs) -> Any:
            runs.append(1)
            return adapter.run(encoding.inputs)

        direct_contribution(adapter.model, run, queries, tokens, lens=adapter.lens)
        assert len(runs) == passes


def test_examples_of_a_padded_batch_are_as_alone() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    image, prompts = random_image(), ["describe the picture", "describe the red dog in the picture"]
    answers = [adapter.tokenize_answer("a dog"), adapter.tokenize_answer("a red dog")]
    batch = adapter.encode_batch(adapter.prepare_batch([[image], [image]], prompts), answers)
    for encoding, prompt, answer in zip(batch, prompts, answers, strict=True):
        alone = adapter.encode(adapter.prepare([image], prompt), answer)
        positions = torch.arange(alone.prompt_length, len(alone.input_ids))
        expected = position_contribution(adapter, alone, positions)
        torch.testing.assert_close(position_contribution(adapter, encoding, positions), expected, atol=1e-5, rtol=1e-3)


def test_low_precision_and_the_models_own_state() -> None:
    adapter, encoding, queries, tokens = encoded("llava")
    with torch.inference_mode():
        exact = trace(adapter, encoding, queries, tokens)
    adapter.model.to(torch.bfloat16)
    adapter.model.train()
    result = trace(adapter, encoding, queries, tokens)
    assert result.positions.dtype == torch.float32
    torch.testing.assert_close(result.total, result.logits, atol=0.05, rtol=0.05)
    torch.testing.assert_close(result.positions, exact.positions, atol=0.02, rtol=0.2)
    assert all(module.training for module in adapter.model.modules())


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_restored_on_exceptions(implementation: str) -> None:
    adapter, encoding, queries, tokens = encoded("llava")
    adapter.model.set_attn_implementation(implementation)
    before = adapter.run(encoding.inputs).logits
    hooks = count_hooks(adapter.model)

    def fail(*args: Any) -> None:
        raise KeyError("from the model")

    last = decoder_layers(adapter.model)[-1]
    with pytest.raises(KeyError, match="from the model"), register_hooks([last], fail, before=True):
        trace(adapter, encoding, queries, tokens)
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert adapter.model.config.get_text_config()._attn_implementation == implementation
    assert count_hooks(adapter.model) == hooks
    assert torch.equal(adapter.run(encoding.inputs).logits, before)
    result = trace(adapter, encoding, queries, tokens)
    torch.testing.assert_close(result.total, result.logits, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_nothing_is_as_large_as_all_attention_rows() -> None:
    model, _ = tiny("llava")
    model.set_attn_implementation("sdpa")
    length, lens = 1500, LogitLens(model)
    ids = torch.randint(3, 40, (1, length))
    run = lambda: model(input_ids=ids, use_cache=False, logits_to_keep=4)  # noqa: E731
    with LargestTensor() as largest:
        result = direct_contribution(
            model, run, torch.tensor([-3, -2]), torch.tensor([5, 6]), lens=lens, working_memory=2**18
        )
    assert result.positions.shape == (2, length)
    assert largest.elements < length**2 / 4


def test_models_and_arguments_that_are_refused() -> None:
    adapter, encoding, queries, tokens = encoded("blip")
    with pytest.raises(UnsupportedModelError, match=REFUSED["blip"]):
        trace(adapter, encoding, queries, tokens)
    adapter, encoding, queries, tokens = encoded("llava")
    with pytest.raises(InvalidOptionError, match="'sum', 'layer', 'head'"):
        trace(adapter, encoding, queries, tokens, detail="heads")
    with pytest.raises(InvalidInputError, match="one query per token"):
        trace(adapter, encoding, queries, tokens[:1])
    with pytest.raises(InvalidInputError, match="do not exist"):
        trace(adapter, encoding, queries - 10_000, tokens)
    with pytest.raises(InvalidInputError, match="1 of 1 layers did not run"):
        trace(adapter, encoding, queries, tokens, layers=[adapter.lens.norm])
    with pytest.raises(InvalidOptionError, match="Layer 7 does not exist"):
        visual_contribution(adapter, encoding, torch.tensor([3]), layer=7)


@pytest.mark.parametrize(
    ("model_type", "argument"),
    [("llava", None), ("mllama", "cross_attention_states"), ("pix2struct", "encoder_hidden_states")],
)
def test_visual_tokens_of_an_encoding(model_type: str, argument: str | None) -> None:
    adapter, encoding, queries, tokens = encoded(model_type)
    n = len(encoding.input_ids)
    positions = torch.cat([torch.tensor([0]), queries + n + 1])
    values = visual_contribution(adapter, encoding, positions, argument)
    result = trace(adapter, encoding, queries, tokens)
    assert not values[0].any(), "nothing predicts the first token"
    if argument is None:
        expected = result.positions[:, encoding.visual_positions]
    else:
        expected = result.states[:, : values.shape[1]]
    torch.testing.assert_close(values[1:], expected, atol=1e-6, rtol=1e-4)
    assert values[1:].abs().sum() > 0
    assert position_contribution(adapter, encoding, positions).shape == (len(positions), n)


def test_reasons() -> None:
    assert set(REFUSED) | PARTLY <= set(FAMILIES) and not set(REFUSED) & PARTLY
    assert len(FAMILIES) - len(LEFT_OUT) - len(REFUSED) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in LEFT_OUT])
def test_every_type_is_complete_or_refused(model_type: str) -> None:
    model, processor = build(model_type)
    answer = processor.tokenizer.convert_tokens_to_ids(["a", "red", "dog"])
    calls: list[dict[str, Any]] = []
    with register_hooks([model], lambda m, args, kwargs: calls.append(kwargs), before=True, with_kwargs=True):
        before = answer_logits(model, prepare(model, processor, [random_image(160, 120)], PROMPT), answer)
    tokens, queries = torch.tensor(answer), torch.arange(-len(answer) - 1, -1)
    logits: list[Tensor] = []

    def run() -> None:
        logits.append(model(**calls[0]).logits[0, queries].gather(1, tokens[:, None])[:, 0])

    lens = LogitLens(model, calls[0])
    if model_type in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            direct_contribution(model, run, queries, tokens, lens=lens)
        return
    result = direct_contribution(model, run, queries, tokens, lens=lens)
    torch.testing.assert_close(result.total, result.logits, atol=1e-5, rtol=1e-5)
    capped = result.logits if lens.cap is None else lens.cap * torch.tanh(result.logits / lens.cap)
    # Of a weak soft cap or a factor, a lens knows as much as its calibration shows.
    torch.testing.assert_close(capped, logits[-1], atol=2e-3, rtol=1e-3)
    positions = result.positions.sum(1) + result.states.sum(1)
    torch.testing.assert_close(positions, result.attention.sum(0), atol=1e-5, rtol=1e-4)
    assert result.attention.abs().sum() > 1e-3
    assert bool(result.unattributed) == (model_type in PARTLY)
    if model_type != "diffusion_gemma":  # It draws random numbers.
        torch.testing.assert_close(logits[-1], before.gather(1, tokens[:, None])[:, 0])
