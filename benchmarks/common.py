"""What the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter


def load_model(checkpoint: Path, threads: int) -> tuple[Any, Any]:
    """A checkpoint in float32 and its processor, on a fixed number of threads: figures should not depend on the
    machine."""
    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


def load_adapter(checkpoint: Path, threads: int) -> ModelAdapter:
    return ModelAdapter(*load_model(checkpoint, threads))
