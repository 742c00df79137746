from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from captum_intramodal import LayerLogitLens, LogitLens
from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.hooks import capture_outputs
from tests.testing.tiny import tiny

IDS = torch.tensor([[3, 9, 4, 12, 7], [8, 2, 2, 30, 5]])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen2_vl")[0]


def text_model(config_class: type, model_class: type, **more: Any) -> Any:
    torch.manual_seed(1)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return model_class(config_class(**sizes, **more)).eval()


SOFTCAPPED = lambda: text_model(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=0.05, query_pre_attn_scalar=8)  # noqa: E731
SCALED = lambda: text_model(GraniteConfig, GraniteForCausalLM, logits_scaling=8.0)  # noqa: E731
PLAIN = lambda: text_model(GemmaConfig, GemmaForCausalLM)  # noqa: E731


@pytest.mark.parametrize("make", [PLAIN, SOFTCAPPED, SCALED], ids=["plain", "softcapped", "scaled"])
def test_last_layer_gives_the_models_own_logits(make: Any) -> None:
    model = make()
    logits = model(IDS).logits
    lens = LayerLogitLens(model, model.model.layers[-1])
    for token in (0, 5, 96):
        actual = lens.attribute(IDS, target=token, relu_attributions=False)
        assert torch.allclose(actual, logits[..., token], atol=1e-5)
    several = lens.attribute(IDS, target=torch.tensor([[5, 96, 0]]))
    assert several.shape == (2, 3, 5)
    assert torch.allclose(several, logits[..., [5, 96, 0]].clamp_min(0).transpose(1, 2), atol=1e-5)


def test_softcapping_and_scaling_are_measured() -> None:
    assert LogitLens(SOFTCAPPED()).cap == 0.05
    assert LogitLens(SCALED()).factor == pytest.approx(1 / 8, rel=1e-4)
    model = PLAIN()
    model.config.final_logit_softcapping = 30.0  # in the config, but not applied by the model
    assert LogitLens(model).cap is None


def test_intermediate_layer_is_normed_once(model: Any) -> None:
    decoder = model.get_decoder()
    hidden = model(IDS, output_hidden_states=True).hidden_states
    lens = LayerLogitLens(model, [decoder.layers[0], decoder.layers[-1]])
    first, last = lens.attribute(IDS, target=torch.tensor([11, 12]), relu_attributions=False)
    weight = model.get_output_embeddings().weight
    expected = torch.einsum("btd,bd->bt", decoder.norm(hidden[1]), weight[[11, 12]])
    assert torch.allclose(first, expected, atol=1e-5)
    # transformers' last hidden state is normed already.
    assert torch.allclose(last, torch.einsum("btd,bd->bt", hidden[-1], weight[[11, 12]]), atol=1e-5)


def test_tuple_targets_name_the_token_last(model: Any) -> None:
    lens = LayerLogitLens(model, model.get_decoder().layers[-1])
    assert torch.equal(lens.attribute(IDS, target=(4, 17)), lens.attribute(IDS, target=17))
    assert torch.equal(lens.attribute(IDS, target=[(4, 17), (3, 18)]), lens.attribute(IDS, target=[17, 18]))


def test_the_head_does_not_run_over_all_positions(model: Any) -> None:
    calls: list[Any] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args))
    lens = LogitLens(model)
    calls.clear()
    LayerLogitLens(model, model.get_decoder().layers[-1], lens).attribute(IDS, target=3)
    handle.remove()
    assert not calls, "the head ran over all positions"


def test_topk_ranks_the_logits(model: Any) -> None:
    lens = LogitLens(model)
    hidden = torch.randn(7, lens.hidden_size)
    logits = lens.activation(hidden, torch.arange(lens.vocab_size))
    expected = logits.argsort(dim=1, descending=True, stable=True)
    for k, block in ((50, 16), (5, 1000), (3, 2), (10_000, 33)):
        assert torch.equal(lens.topk(hidden, k, block), expected[:, :k])


def test_ties_rank_by_token_id(model: Any) -> None:
    lens = LogitLens(model)
    ranking = lens.topk(torch.zeros(2, lens.hidden_size), k=20, block_size=7)
    assert torch.equal(ranking, torch.arange(20).expand(2, 20))


def test_log_probability_is_a_log_softmax(model: Any) -> None:
    lens = LogitLens(model)
    hidden, tokens = torch.randn(6, lens.hidden_size), torch.tensor([0, 3, 9, 9, 20, 50])
    logits = lens.activation(hidden, torch.arange(lens.vocab_size))
    expected = logits.log_softmax(1)[torch.arange(6), tokens]
    assert torch.allclose(lens.log_probability(hidden, tokens, block_size=13), expected, atol=1e-5)


def test_wrapped_forward_functions(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids).logits

    layer = model.get_decoder().layers[-1]
    expected = LayerLogitLens(model, layer).attribute(IDS, target=3)
    assert torch.equal(LayerLogitLens(Wrapper(model), layer).attribute(IDS, target=3), expected)
    function = LayerLogitLens(lambda ids: model(input_ids=ids), layer, lens=LogitLens(model))
    assert torch.equal(function.attribute(IDS, target=3), expected)
    with pytest.raises(TypeError, match="lens=LogitLens"):
        LayerLogitLens(lambda ids: model(input_ids=ids), layer)


def test_errors_of_targets_layers_and_models(model: Any) -> None:
    layer = model.get_decoder().layers[-1]
    lens = LayerLogitLens(model, layer)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        lens.attribute(IDS, target=10_000)
    with pytest.raises(ValueError, match="3 targets for 2 examples"):
        lens.attribute(IDS, target=[1, 2, 3])
    with pytest.raises(ValueError, match="did not run"):
        LayerLogitLens(model, nn.Linear(2, 2)).attribute(IDS, target=1)
    with pytest.raises(TypeError, match="transformers model"):
        LogitLens(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        lens.lens.topk(torch.zeros(1, lens.lens.hidden_size), k=0)


def unusual_model(kind: str) -> Any:
    """Return a model whose logits are not head(norm(h)), in one of several ways."""
    model = PLAIN()

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if kind == "masked":
            return output.index_fill(-1, torch.tensor([4, 50]), float("-inf"))
        if kind == "nonlinear":
            return output + 3 * output.square()
        return output.roll(1, dims=-2)  # "neighbors": those of another position

    model.lm_head.register_forward_hook(change)
    return model


@pytest.mark.parametrize("kind", ["masked", "nonlinear"])
def test_logits_that_are_not_head_of_norm_are_replayed(kind: str) -> None:
    model = unusual_model(kind)
    lens = LogitLens(model)
    assert lens.tail == "replay" and (lens.hidden_size, lens.vocab_size) == (32, 97)
    ids = torch.randint(3, 97, (1, 75))  # more than fit into one pass
    expected = model(ids).logits[0]
    before = [len(module._forward_hooks) for module in model.modules()]
    with torch.no_grad(), capture_outputs([lens.layers[-1]], lambda h: h[0]) as outputs:
        model(ids)
    hidden = outputs[lens.layers[-1]]
    torch.testing.assert_close(lens.activation(hidden, torch.arange(97)), expected, atol=1e-5, rtol=0)
    assert torch.equal(lens.topk(hidden, 9), expected.argsort(dim=1, descending=True, stable=True)[:, :9])
    tokens = torch.randint(0, 97, (75,))
    probabilities = expected.log_softmax(1)[torch.arange(75), tokens]
    torch.testing.assert_close(lens.log_probability(hidden, tokens), probabilities, atol=1e-5, rtol=0)
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_replay_with_given_inputs() -> None:
    model = unusual_model("nonlinear")
    inputs = {"input_ids": torch.tensor([[3, 5, 7, 9, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    with torch.no_grad():
        captured = model(**inputs, output_hidden_states=True)
    lens = LogitLens(model, inputs)
    with capture_outputs([lens.layers[-1]], lambda h: h[0]) as outputs:
        model(**inputs)
    hidden = outputs[lens.layers[-1]].detach().repeat(3, 1)[:13]
    expected = captured.logits[0].repeat(3, 1)[:13]
    torch.testing.assert_close(lens.activation(hidden, torch.arange(97)), expected, atol=1e-5, rtol=0)


def test_a_model_whose_logits_depend_on_other_positions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="lens would be wrong"):
        LogitLens(unusual_model("neighbors"))


def test_hooks_are_removed(model: Any) -> None:
    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    layer = model.get_decoder().layers[0]
    model(IDS)
    before = count()
    LayerLogitLens(model, layer).attribute(IDS, target=1)
    assert count() == before
    with pytest.raises(RuntimeError, match="inside"), capture_outputs([layer]):
        raise RuntimeError("inside")
    assert count() == before


def test_a_streamed_ranking_equals_topk_of_all_logits() -> None:
    lens = LogitLens(PLAIN().bfloat16(), working_memory=3000)
    hidden = torch.randn(9, lens.hidden_size).bfloat16()
    logits = lens.normalize(hidden).float() @ lens.head.weight.float().T
    widths: list[int] = []
    product = lens._product
    lens._product = lambda normed, rows: widths.append(rows.stop - rows.start) or product(normed, rows)
    ranked = lens.rank(hidden, 5)
    # A row of the unembedding in float32, and 32 bytes for each state.
    assert set(widths[:-1]) == {3000 // (4 * 32 + 9 * 32)} and sum(widths) == 97
    assert torch.equal(ranked.ids, logits.topk(5).indices)
    torch.testing.assert_close(ranked.log_normalizer, logits.logsumexp(1))
    tokens = torch.arange(9)
    widths.clear()
    actual = lens.log_probability(hidden, tokens, log_normalizer=ranked.log_normalizer)
    assert not widths
    torch.testing.assert_close(actual, logits.log_softmax(1)[tokens, tokens])


def test_activation_in_chunks_of_states(model: Any) -> None:
    lens, small = LogitLens(model), LogitLens(model, working_memory=4000)
    hidden, tokens = torch.randn(2, 9, lens.hidden_size), torch.tensor([3, 1, 5])
    torch.testing.assert_close(small.activation(hidden, tokens), lens.activation(hidden, tokens))
    assert small.activation(hidden[:, :0], tokens).shape == (2, 0, 3)
