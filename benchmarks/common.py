"""What the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter


def load_adapter(checkpoint: Path, threads: int) -> ModelAdapter:
    """A checkpoint in float32, on a fixed number of threads: figures should not depend on the machine."""
    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return ModelAdapter(model, AutoProcessor.from_pretrained(checkpoint))
