"""The commands write what they promise, and end in one line if an option is wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from captum_intramodal import Explanation, explain
from captum_intramodal.cli import app
from captum_intramodal.demo import CHECKPOINT, IMAGES
from tests.testing.tiny import tiny

runner = CliRunner()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model, processor = tiny("qwen2_vl")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.effect_mandelbrot((120, 80), (-2, -1.5, 1, 1.5), 30).convert("RGB").save(path)
    return path


FILES = ["explanation.json", "explanation.safetensors", "image-0.png", "index.html", "overview.png"]


def test_demo(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--out", str(tmp_path / "out"), "--scales", "1"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert os.listdir(tmp_path) == ["out"], "temporary files are left"
    explanation = Explanation.load(tmp_path / "out")
    for word in explanation.words:
        assert word.text in result.output
    assert "probability" in result.output and "top earlier token" in result.output


def test_every_example_image_exists() -> None:
    assert len(IMAGES) == 4
    for path in IMAGES:
        with Image.open(path) as image:
            assert image.mode == "RGB"
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8 * 2**20


def test_explain_a_given_answer(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    arguments = ["explain", "--model", str(checkpoint), "--image", str(image), "--prompt", "describe the picture"]
    result = runner.invoke(
        app, [*arguments, "--answer", "a red dog", "--scales", "1,1.5", "--no-arc", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    explanation = Explanation.load(tmp_path)
    assert explanation.answer == "a red dog"
    assert explanation.settings["scales"] == [1.0, 1.5]
    assert explanation.settings["arc"] is None
    again = runner.invoke(app, [*arguments, "--answer", "a cat", "--out", str(tmp_path)])
    assert again.exit_code == 0 and Explanation.load(tmp_path).answer == "a cat"


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("text")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    tiny("qwen2_vl")[1].tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def unknown_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unknown")
    (path / "config.json").write_text('{"model_type": "nobody_knows_this"}')
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "nowhere.png"}, "There is no file nowhere.png"),
        ({"--image": __file__}, "is not an image"),
        ({"--image": "."}, "cannot be read as an image"),
        ({"--prompt": " "}, "prompt is empty"),
        ({"--answer": "a zebra"}, "cannot encode"),
        ({"--answer": " "}, "answer is empty"),
        ({"--scales": "0"}, "above 0"),
        ({"--method": "gradcam"}, "--method"),
        ({"--scales": "1,x"}, "numbers separated by commas"),
        ({"--scales": "1,1"}, "different"),
        ({"--scales": "nan"}, "above 0"),
        ({"--model": "./nowhere"}, "no config.json"),
        ({"--model": "TEXT_ONLY"}, "image-text-to-text"),
        ({"--model": "UNKNOWN"}, "cannot be loaded"),
        ({"--dtype": "int3"}, "--dtype must be"),
        ({"--device": "toaster"}, "cannot be loaded"),
        ({"--out": __file__}, "is a file"),
        ({"--max-new-tokens": "0"}, "max-new-tokens"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line(
    change: dict[str, str],
    message: str,
    checkpoint: Path,
    image: Path,
    text_only: Path,
    unknown_type: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    options = {"--model": str(checkpoint), "--image": str(image), "--prompt": "describe", "--out": str(out)} | change
    names = {"TEXT_ONLY": str(text_only), "UNKNOWN": str(unknown_type)}
    options["--model"] = names.get(options["--model"], options["--model"])
    result = runner.invoke(app, ["explain", *(part for option in options.items() for part in option)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    if message not in ("max-new-tokens", "--method"):  # Typer prints its own errors in a box
        assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "something is left on disk"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"scales": "auto", "crops": False, "interpolate_pos_encoding": False, "method": "auto", "video": False}),
        (["--scales", "auto", "--crops"], {"scales": "auto", "crops": True}),
        (["--interpolate-pos-encoding", "--scales", "1,2"], {"interpolate_pos_encoding": True, "scales": (1.0, 2.0)}),
        (["--method", "input_x_gradient", "--no-arc"], {"method": "input_x_gradient", "arc": False}),
    ],
    ids=str,
)
def test_options_are_passed_to_explain(
    options: list[str], expected: dict[str, Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(*arguments: Any, **options: Any) -> None:
        given.update(inspect.signature(explain).bind(*arguments, **options).arguments)
        raise ValueError("recorded")

    monkeypatch.setattr("captum_intramodal.cli.commands.load_model", lambda *arguments: (None, None))
    monkeypatch.setattr("captum_intramodal.explain", record)
    arguments = ["explain", "--model", "m", "--image", str(image), "--prompt", "describe", *options]
    assert "recorded" in runner.invoke(app, arguments).stderr
    assert {name: given[name] for name in expected} == expected


def test_crops_and_a_larger_input_size_cannot_be_combined(image: Path) -> None:
    arguments = ["explain", "--model", "m", "--image", str(image), "--prompt", "describe", "--crops"]
    result = runner.invoke(app, [*arguments, "--interpolate-pos-encoding"])
    assert result.exit_code == 2 and "choose one" in result.stderr


def test_explain_a_video(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    arguments = ["explain", "--model", str(checkpoint), *["--image", str(image)] * 2, "--prompt", "describe"]
    arguments += ["--answer", "a dog", "--no-arc", "--scales", "1", "--video", "--out", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    first, second = Explanation.load(tmp_path).maps
    assert (first == second).all()  # merged frames


def test_running_as_a_module_and_example_images_out_of_range() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "captum_intramodal", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "explain" in result.stdout and "demo" in result.stdout
    assert runner.invoke(app, ["demo", "--image", "9", "--out", "x"]).exit_code == 2
