r"""Provenance of a result: versions of packages, and the identity of a model."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel

from captum_intramodal._version import __version__

__all__ = ["describe_model", "versions"]

# Values of each parameter that enter a fingerprint.
_FINGERPRINTED = 64


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    r"""
    Return the versions of this package, of Python, and of other packages.

    Args:

        packages (Iterable[str]): Names of distributions.

    Returns:
        **versions** (*dict[str, str or None]*): by name; None for a package that is not installed.

    Examples::

        >>> from captum_intramodal._utils.provenance import versions
        >>> list(versions(["torch"]))
        ['captum_intramodal', 'python', 'torch']
        >>> versions(["no-such-package"])["no-such-package"] is None
        True
    """
    found: dict[str, str | None] = {"captum_intramodal": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_model(model: PreTrainedModel, weights: bool = False) -> dict[str, Any]:
    r"""
    Describe a model such that another one can be told from it.

    Args:

        model (transformers.PreTrainedModel): The model.
        weights (bool, optional): Whether to add its attention implementation and a fingerprint of its weights, which
                    fine-tuning changes.
                    Default: False

    Returns:
        **description** (*dict*): JSON-able: ``id``, ``revision``, ``class``, ``dtype``; with ``weights`` also
        ``attention`` and ``weights_crc32``.

    Examples::

        >>> from captum_intramodal._utils.provenance import describe_model
        >>> describe_model(model)["dtype"]
        'float32'
        >>> len(describe_model(model, weights=True)["weights_crc32"])
        8
    """
    description = {
        "id": str(getattr(model.config, "_name_or_path", "")),
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if weights:
        description["attention"] = getattr(model.config, "_attn_implementation", None)
        description["weights_crc32"] = _fingerprint(model)
    return description


@torch.no_grad()
def _fingerprint(model: PreTrainedModel) -> str:
    """Compute the CRC-32 of the names and first values of all parameters."""
    crc = 0
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.flatten()[:_FINGERPRINTED]
        values = b"" if parameter.is_meta else first.cpu().view(torch.uint8).numpy().tobytes()
        crc = zlib.crc32(name.encode() + values, crc)
    return f"{crc:08x}"
