"""The README's Python runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    width, height = names["explanation"].images[0].size
    assert names["heat"].shape == (height, width)
    assert (tmp_path / "page.html").exists()
    tokens = len(names["targets"])
    assert names["attribution"].shape == (1, 3, height, width)
    assert names["suppressed"].shape == (tokens, height, width)
    assert names["every"].shape[0] == tokens
    assert all(torch.isfinite(names[name]).all() for name in ("heat", "attribution", "suppressed", "every"))
