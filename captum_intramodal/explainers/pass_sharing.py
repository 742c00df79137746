r"""How do several explainers share the forward passes of one example? The first one collects what all of them need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol, runtime_checkable

from captum_intramodal.explainers.base import Example, Explainer
from captum_intramodal.explanation.activations import Activations, collect_activations
from captum_intramodal.explanation.options import ExplainOptions

__all__ = ["PassRequest", "SharedPasses", "collect", "shared_passes"]


@dataclass(frozen=True)
class PassRequest:
    r"""
    What an explainer needs from the forward passes of an example.

    Args:

        options (ExplainOptions): Scales, layer, method, crops and interpolation of position embeddings; its other
                    options do not affect the passes and have their defaults.
        ranking_layers (tuple[int, ...], optional): Decoder layers whose states ARC ranks.
                    Default: none
        decisions (bool, optional): Whether the model also predicts the answer's tokens at every scale.
                    Default: False
    """

    options: ExplainOptions
    ranking_layers: tuple[int, ...] = ()
    decisions: bool = False

    def combines_with(self, other: PassRequest) -> bool:
        """Return whether two requests differ at most in scales and ranking layers."""
        return self.decisions == other.decisions and replace(self.options, scales="auto") == replace(
            other.options, scales="auto"
        )

    @property
    def scales_are_independent(self) -> bool:
        """Whether the maps at a scale do not depend on the other scales, as long as none is dropped."""
        return self.options.scales != "auto" and not self.options.crops and not self.options.interpolate_pos_encoding

    def union(self, other: PassRequest) -> PassRequest:
        """Return a request that serves both; without the other's scales if scales depend on each other."""
        options = self.options
        if self.scales_are_independent and other.scales_are_independent:
            options = replace(options, scales=sorted({*self.options.scales, *other.options.scales}))
        layers = tuple(sorted({*self.ranking_layers, *other.ranking_layers}))
        return replace(self, options=options, ranking_layers=layers)

    def select(self, other: PassRequest, activations: Activations) -> Activations | None:
        """Select this request's activations from those of another; return None if they may not contain them."""
        if not self.combines_with(other) or not set(self.ranking_layers) <= set(other.ranking_layers):
            return None
        scales, known = self.options.scales, other.options.scales
        if scales == known:
            return activations
        independent = self.scales_are_independent and other.scales_are_independent
        if not independent or activations.dropped or not set(scales) <= set(known):
            return None
        return replace(activations, scale_maps=[maps for maps in activations.scale_maps if maps.scale in scales])

    def collect(self, example: Example) -> Activations:
        """Run the model."""
        adapter, images, prompt, answer_ids = example
        (activations,) = collect_activations(
            adapter,
            [list(images)],
            [prompt],
            [answer_ids],
            self.options,
            ranking_layers=self.ranking_layers,
            decisions=self.decisions,
        )
        return activations


@runtime_checkable
class _RequestsPasses(Protocol):
    """An explainer whose passes can be shared."""

    @property
    def pass_request(self) -> PassRequest: ...


@dataclass
class SharedPasses:
    r"""
    Activations of the last example.

    Args:

        requests (list[PassRequest]): Requests that are expected.
        example (Example, optional): The last example.
                    Default: None
        collected (list[tuple[PassRequest, Activations]], optional): Its activations, by request.
                    Default: empty
    """

    requests: list[PassRequest]
    example: Example | None = None
    collected: list[tuple[PassRequest, Activations]] = field(default_factory=list)

    def collect(self, example: Example, request: PassRequest) -> Activations:
        """Return the requested activations of an example, from passes that also serve the expected requests."""
        if self.example is None or not _is_same(example, self.example):
            self.example, self.collected = example, []
        union = reduce(PassRequest.union, (r for r in self.requests if r.combines_with(request)), request)
        found = self._find(request)
        if found is None and all(known != union for known, _ in self.collected):
            self.collected.append((union, union.collect(example)))
            found = self._find(request)
        if found is None:  # A scale was dropped, or depends on the others.
            found = request.collect(example)
            self.collected.append((request, found))
        return found

    def _find(self, request: PassRequest) -> Activations | None:
        """Return activations that were collected before; None if they do not contain the requested ones."""
        selected = (request.select(known, activations) for known, activations in self.collected)
        return next((activations for activations in selected if activations is not None), None)


_SHARED: ContextVar[SharedPasses | None] = ContextVar("shared_passes", default=None)


@contextmanager
def shared_passes(explainers: Iterable[Explainer] = ()) -> Iterator[None]:
    r"""
    Share forward passes between explainers based on the logit lens.

    Within the ``with`` statement the model runs once per example for all of them, as long as they are called on one
    example after the other. Results are the same as without.

    The activations of the last example (same adapter, same image objects, prompt and answer) are kept. Neither the
    weights of the model nor the images may change meanwhile.

    Args:

        explainers (Iterable[Explainer], optional): The explainers that will be called: the passes of the first one
                    then serve all, with the scales and ranking layers of all.
                    Default: none

    Examples::

        >>> from captum_intramodal.explainers import make_explainer, shared_passes
        >>> explainers = [make_explainer(spec) for spec in ("logit_lens", "msea+arc:scales=[1,1.5]", "tam")]
        >>> answer_ids = adapter.tokenize_answer("a dog")
        >>> with shared_passes(explainers):
        ...     maps = [explainer(adapter, [image], "describe the picture.", answer_ids) for explainer in explainers]
        >>> [len(of_first_image) for of_first_image, in maps]
        [2, 2, 2]
    """
    token = _SHARED.set(SharedPasses([e.pass_request for e in explainers if isinstance(e, _RequestsPasses)]))
    try:
        yield
    finally:
        _SHARED.reset(token)


def collect(example: Example, request: PassRequest) -> Activations:
    """Return the requested activations of an example, from shared passes if there are any."""
    shared = _SHARED.get()
    return request.collect(example) if shared is None else shared.collect(example, request)


def _is_same(one: Example, other: Example) -> bool:
    """Return whether two examples have the same adapter and image objects, and equal prompts and answers."""
    return (
        one.adapter is other.adapter
        and len(one.images) == len(other.images)
        and all(a is b for a, b in zip(one.images, other.images, strict=True))
        and (one.prompt, one.answer_ids) == (other.prompt, other.answer_ids)
    )
