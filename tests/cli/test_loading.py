"""Models load with their processor, or the command ends with one line that names the problem."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from captum_intramodal.cli.loading import Checkpoint, Process, current_process, load_model, open_image
from captum_intramodal.demo import IMAGES
from tests.testing.tiny import tiny


def test_a_tokenizer_in_place_of_a_processor_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    monkeypatch.setattr(AutoProcessor, "from_pretrained", AutoTokenizer.from_pretrained)
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        load_model(Checkpoint("demo"))
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1 and "is not an image-text-to-text model: its processor is a" in errors


def test_images_are_rgb_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.open(IMAGES[0]).convert("L").save(tmp_path / "rotated.jpg", exif=exif)
    image, original = open_image(tmp_path / "rotated.jpg"), open_image(IMAGES[0])
    assert image.mode == original.mode == "RGB" and image.size == original.size[::-1]


def test_a_process_alone_evaluates_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_process() == Process(rank=0, world_size=1, device=None)


WITHOUT_TORCHVISION = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else find(name, *rest)
sys.modules["torchvision"] = None
from captum_intramodal.cli import main
main()
"""


@pytest.mark.parametrize(("family", "works"), [("llava", True), ("qwen2_vl", False)])
def test_without_torchvision(family: str, works: bool, tmp_path: Path) -> None:
    model, processor = tiny(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--image", str(IMAGES[0]), "--prompt", "describe the picture"]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_TORCHVISION,
            "explain",
            *arguments,
            "--scales",
            "1",
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if works:
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "out" / "index.html").exists()
    else:
        assert result.returncode == 2, result.stderr
        assert "pip install torchvision" in " ".join(result.stderr.split())
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
