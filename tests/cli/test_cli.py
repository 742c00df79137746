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
from captum_intramodal.cli import Method, app
from captum_intramodal.demo import CHECKPOINT, IMAGES
from captum_intramodal.explanation.scale_views import METHODS
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
    path = tmp_path_factory.mktemp("picture") / "image.png"
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
    assert "probability" in result.output and "leans on" in result.output


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
        ({"--answer": "a zebra"}, "cannot encode 'zebra'"),
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
    options["--model"] = {"TEXT_ONLY": str(text_only), "UNKNOWN": str(unknown_type)}.get(
        options["--model"], options["--model"]
    )
    result = runner.invoke(app, ["explain", *(part for option in options.items() for part in option)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    if message not in ("max-new-tokens", "--method"):  # typer's own message is a box
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
def test_options_are_those_of_explain(
    options: list[str], expected: dict[str, Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(*arguments: Any, **options: Any) -> None:
        given.update(inspect.signature(explain).bind(*arguments, **options).arguments)
        raise ValueError("recorded")

    monkeypatch.setattr("captum_intramodal.cli._load", lambda *arguments: (None, None))
    monkeypatch.setattr("captum_intramodal.explain", record)
    arguments = ["explain", "--model", "m", "--image", str(image), "--prompt", "describe", *options]
    assert "recorded" in runner.invoke(app, arguments).stderr
    assert {name: given[name] for name in expected} == expected


def test_crops_or_a_larger_input_size(image: Path) -> None:
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


def test_methods_are_those_of_explain() -> None:
    assert tuple(method.value for method in Method) == METHODS


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["demo", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom captum_intramodal.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'captum', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_as_a_module_and_without_arguments() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "captum_intramodal", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "explain" in result.stdout and "demo" in result.stdout
    assert runner.invoke(app, ["demo", "--image", "9", "--out", "x"]).exit_code == 2


WITHOUT_TORCHVISION = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else find(name, *rest)
sys.modules["torchvision"] = None
from captum_intramodal.cli import main
main()
"""


@pytest.mark.parametrize(("family", "works"), [("llava", True), ("qwen2_vl", False)])
def test_without_torchvision(family: str, works: bool, image: Path, tmp_path: Path) -> None:
    model, processor = tiny(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--image", str(image), "--prompt", "describe the picture"]
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
