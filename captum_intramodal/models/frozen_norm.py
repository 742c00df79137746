r"""Norm layers as linear maps: every norm is a gain on a (centered) input, times a statistic that can be frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_intramodal.errors import UnsupportedModelError

__all__ = ["FrozenNorm", "is_norm"]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


@dataclass(frozen=True)
class FrozenNorm:
    r"""
    A norm as ``bias + statistic * gain * center(x)``, where the statistic is one number per row.

    Root-mean-square norms, layer norms and the identity are of this form. Gain, bias and centering are measured.

    Attributes:
        gain (Tensor): float32 (D,).
        bias (Tensor): float32 (D,).
        centered (bool): whether the mean of a row is subtracted, as in a layer norm.

    Examples::

        >>> from captum_intramodal.models.frozen_norm import FrozenNorm
        >>> norm = torch.nn.LayerNorm(8)
        >>> frozen, x = FrozenNorm.from_module(norm, 8), torch.randn(2, 8)
        >>> torch.allclose(frozen.apply(x, frozen.statistic(x, norm(x))), norm(x), atol=1e-5)
        True
    """

    gain: Tensor
    bias: Tensor
    centered: bool

    @classmethod
    @torch.no_grad()
    def from_module(
        cls, module: nn.Module, width: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> FrozenNorm:
        """Measure a norm.

        Raises:
            UnsupportedModelError: the module is not of this form.
        """
        # Rows of one size and of mean zero: the norm of each is a multiple of its gain.
        signs = torch.ones(width, device=device)
        signs[1::2] = -1
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 2, width, generator=generator).to(signs) + 0.5
        # Called without the hooks of a running trace.
        probe = torch.stack([64 * signs, -64 * signs])[None]
        plus, minus = module.forward(probe.to(dtype))[0].float()
        gain, bias = signs * (plus - minus) / 2, (plus + minus) / 2
        actual = module.forward(sample.to(dtype)).float()
        rounding = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
        for centered in (False, True):
            form = cls(gain, bias, centered)
            gap = form.apply(sample, form.statistic(sample, actual)) - actual
            if bool(gap.abs().max() <= rounding * actual.abs().max()):
                return form
        raise UnsupportedModelError(
            f"A {type(module).__name__} is neither a root-mean-square nor a layer norm over {width} features, so it "
            "cannot be made linear by freezing its statistic."
        )

    def scaled(self, x: Tensor) -> Tensor:
        """Return ``gain * center(x)``, float32."""
        x = x.float()
        return self.gain.to(x.device) * (x - x.mean(-1, keepdim=True) if self.centered else x)

    def statistic(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the statistic of each row, (..., 1), from the norm's input and output."""
        scaled = self.scaled(x)
        change = output.float() - self.bias.to(x.device)
        return (scaled * change).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp_min(1e-30)

    def apply(self, x: Tensor, statistic: Tensor) -> Tensor:
        """Apply the norm with a given statistic, float32."""
        return self.bias.to(x.device) + statistic * self.scaled(x)

    def pull_back(self, direction: Tensor) -> Tensor:
        """Return the vector v with ``direction . (gain * center(x)) = v . x`` for every x."""
        direction = direction.float() * self.gain.to(direction.device)
        return direction - direction.mean(-1, keepdim=True) if self.centered else direction
