"""The README's Python blocks run unchanged, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    width, height = names["explanation"].images[0].size
    assert names["heat"].shape == (height, width)
    assert (tmp_path / "page.html").exists()
    tokens = len(names["forward"].targets)
    shapes = {name: tuple(names[name].shape) for name in ("attribution", "over_image", "every", "suppressed", "values")}
    positions = names["forward"].inputs(names["image"][0])["input_ids"].shape[1]
    assert shapes == {
        "attribution": (1, 3, height, width),
        "over_image": (1, 1, height, width),
        "every": (tokens, 1, height, width),
        "suppressed": (tokens, height, width),
        "values": (tokens, positions),
    }
    assert names["result"].token_attr.shape == (tokens, 3 * 4 + 4) and bool(names["result"].token_attr[:, :12].any())
    assert all(bool(torch.isfinite(names[name]).all()) for name in shapes)
