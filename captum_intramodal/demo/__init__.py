r"""A small image-text-to-text model with its pictures: the tool's main job without a download.

``CHECKPOINT`` is a complete Hugging Face checkpoint directory (Qwen2-VL architecture, 3 M parameters, trained from
scratch by ``benchmarks/train_demo.py``); ``PICTURES`` are four example pictures; :func:`compose` makes any number of
others, with exact object masks.
"""

from __future__ import annotations

from pathlib import Path

from captum_intramodal.demo.scenes import Question, Scene, SceneObject, compose

__all__ = ["CHECKPOINT", "PICTURES", "Question", "Scene", "SceneObject", "compose"]

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
PICTURES: tuple[Path, ...] = tuple(Path(__file__).parent / "pictures" / f"{i}.png" for i in (1, 2, 3, 4))
