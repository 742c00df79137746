from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.hooks import (
    capture_outputs,
    evaluation_mode,
    preserve_requires_grad,
    register_hooks,
    replace_embeddings,
)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hooks_are_removed_however_the_block_ends(net: nn.Sequential) -> None:
    calls: list[str] = []
    with register_hooks(net, lambda *args: calls.append("after")):
        assert hooks(net) == 3
        net(torch.zeros(1, 4))
    assert calls == ["after"] * 3 and hooks(net) == 0

    def interrupted() -> None:
        with register_hooks(net, lambda *args: None, before=True):
            assert hooks(net) == 3
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert hooks(net) == 0


def test_hooks_registered_before_a_failed_registration_are_removed(net: nn.Sequential) -> None:
    with pytest.raises(AttributeError), register_hooks([net[0], None], lambda *args: None):  # type: ignore[list-item]
        pytest.fail("the block must not run")
    assert hooks(net) == 0


def test_hooks_may_change_keyword_arguments() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return x * factor

    def double(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "factor": 2.0}

    scale = Scale()
    with register_hooks([scale], double, before=True, with_kwargs=True):
        assert scale(torch.ones(1)).item() == 2
    assert scale(torch.ones(1)).item() == 1


def test_outputs_are_captured_and_the_rest_of_the_pass_is_skipped(net: nn.Sequential) -> None:
    x, after = torch.randn(2, 4), []
    net[2].register_forward_hook(lambda *args: after.append(True))
    with capture_outputs([net[1], net[0], net[0]], lambda hidden: hidden[:, :1], stop=True) as outputs:
        net(x)
        pytest.fail("the block must end with the last module")
    assert torch.equal(outputs[net[0]], net[0](x)[:, :1])
    assert torch.equal(outputs[net[1]], net[1](net[0](x))[:, :1])
    assert not after
    with capture_outputs([net[0]]) as outputs:
        net(x)
        net(2 * x)
    assert torch.equal(outputs[net[0]], net[0](2 * x)) and len(after) == 2


def test_errors_inside_a_capture_are_raised(net: nn.Sequential) -> None:
    with pytest.raises(RuntimeError, match="shapes"), capture_outputs([net[0]]):
        net(torch.zeros(1, 5))
    assert hooks(net) == 0


@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_mode_is_undone(gradients: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net[1].eval()
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()]
    seed = torch.random.get_rng_state()

    def interrupted() -> None:
        with evaluation_mode(net, gradients):
            assert not any(m.training for m in net.modules())
            x = torch.ones(1, 4, requires_grad=True)
            assert net(x).requires_grad == gradients
            assert not gradients or not any(p.requires_grad for p in net.parameters())
            torch.rand(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), seed) and torch.is_grad_enabled()


def test_embeddings_are_replaced_at_their_positions_only() -> None:
    embeddings = nn.Embedding(10, 3)
    ids, positions = torch.tensor([4, 6]), torch.tensor([1, 3])
    rows = torch.zeros(2, 3, requires_grad=True)
    sequence, other = torch.tensor([[1, 4, 2, 6, 9]]), torch.tensor([[1, 5, 2, 6, 9]])
    plain = embeddings(sequence).detach()
    with replace_embeddings(embeddings, ids, positions, rows):
        replaced, untouched = embeddings(sequence), embeddings(other)
        assert torch.equal(embeddings(input=sequence), replaced)
    assert torch.equal(replaced[0, [0, 2, 4]], plain[0, [0, 2, 4]]) and not replaced[0, [1, 3]].any()
    assert torch.equal(untouched, embeddings(other))
    replaced.sum().backward()
    assert torch.equal(rows.grad, torch.ones(2, 3))


def test_embeddings_that_are_never_looked_up_cannot_be_replaced() -> None:
    embeddings = nn.Embedding(10, 3)
    with (
        pytest.raises(UnsupportedModelError, match="did not embed the 1 tokens of the prompt with its Embedding"),
        replace_embeddings(embeddings, torch.tensor([4]), torch.tensor([1]), torch.zeros(1, 3)),
    ):
        embeddings(torch.tensor([[1]]))
    assert hooks(embeddings) == 0


def test_requires_grad_is_restored() -> None:
    leaf, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)

    def interrupted() -> None:
        with preserve_requires_grad(leaf, trained):
            leaf.requires_grad_()
            trained.requires_grad_(False)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert not leaf.requires_grad and trained.requires_grad
