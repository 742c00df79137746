r"""Load models, processors and images, and find this process's device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_intramodal.cli.terminal import fail

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

__all__ = ["Checkpoint", "Process", "current_process", "load_model", "open_image", "quiet_libraries"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and how to load it.

    Attributes:
        name (str): directory, Hugging Face Hub id, or ``'demo'``.
        dtype (str): ``'auto'``, ``'float32'``, ``'bfloat16'`` or ``'float16'``.
        device (str): a PyTorch device, or ``'auto'`` for a GPU if one is available.
        revision (str, optional): branch, tag or commit of a Hub checkpoint.
        trust_remote_code (bool): run the code that comes with the checkpoint.
        device_map (str, optional): see ``from_pretrained``; replaces ``device``.
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None


def load_model(checkpoint: Checkpoint) -> tuple[PreTrainedModel, Any]:
    """Return the model, in evaluation mode on its device, and its processor; exit if they cannot be loaded."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if checkpoint.dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"--dtype must be auto, float32, bfloat16 or float16, got {checkpoint.dtype!r}.")
    name = _resolve_checkpoint(checkpoint.name)
    options = {"revision": checkpoint.revision, "trust_remote_code": checkpoint.trust_remote_code}
    try:
        device = checkpoint.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = AutoProcessor.from_pretrained(name, **options)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=checkpoint.dtype, use_safetensors=True, device_map=checkpoint.device_map, **options
        )
        # Quantized models and models spread over devices must not be moved.
        placed = checkpoint.device_map is not None or getattr(model, "hf_quantizer", None) is not None
        model = model.eval() if placed else model.eval().to(device)
    except ImportError as error:
        fail(f"{name} needs a package that is not installed (try pip install torchvision)", error)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        fail(f"{name} cannot be loaded as an image-text-to-text model", error)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        fail(f"{name} is not an image-text-to-text model: its processor is a {type(processor).__name__}.")
    return model, processor


def _resolve_checkpoint(name: str) -> str:
    """Return a name that ``from_pretrained`` takes; exit if a directory is not a checkpoint."""
    if name == "demo" and not os.path.exists(name):
        from captum_intramodal.demo import CHECKPOINT

        return str(CHECKPOINT)
    if name.startswith((".", "/", "~")) or os.path.exists(name):
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            fail(f"{name} is not a checkpoint directory: it has no config.json.")
        return str(path)
    return name


def open_image(path: Path) -> Image.Image:
    """Return an image file in RGB, upright; exit if it cannot be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        fail(f"There is no file {path}.")
    except UnidentifiedImageError:
        fail(f"{path} is not an image of a known format.")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        fail(f"{path} cannot be read as an image", error)


@dataclass(frozen=True)
class Process:
    """One of the processes that share an evaluation."""

    rank: int = 0
    world_size: int = 1
    device: str | None = None


def current_process() -> Process:
    """Return this process's place among those that ``accelerate launch`` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Process()
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState()
    return Process(state.process_index, state.num_processes, str(state.device))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the progress bars, warnings and notices of other libraries out of the output."""
    from logging import CRITICAL

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
