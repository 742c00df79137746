r"""Try the package without a download: a small vision-language model, example images, and generated scenes.

``CHECKPOINT`` is a complete Hugging Face checkpoint folder (Qwen2-VL architecture, 3 M parameters, trained from scratch
by ``benchmarks/train_demo.py``). ``IMAGES`` are four example images. :func:`compose` generates any number of others,
with exact object masks.
"""

from __future__ import annotations

from pathlib import Path

from captum_intramodal.demo.scenes import Question, Scene, SceneObject, compose

__all__ = ["CHECKPOINT", "IMAGES", "PICTURES", "Question", "Scene", "SceneObject", "compose"]

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
IMAGES: tuple[Path, ...] = tuple(Path(__file__).parent / "images" / f"{i}.png" for i in (1, 2, 3, 4))
# The name of IMAGES before 0.2.
PICTURES = IMAGES
