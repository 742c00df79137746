r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Prompt"]

Prompt = str | Sequence[Mapping[str, Any]]
