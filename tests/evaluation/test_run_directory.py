"""A run's directory: records, temporary files, and settings that must not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.evaluation import Leaderboard
from captum_intramodal.evaluation.run_directory import RunDirectory


def test_records_are_done_once_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", rank=0)
    directory.begin({"seed": 0})
    assert not directory.has(3) and directory.count_done() == 0
    directory.write_record(3, {"id": "a"})
    other = RunDirectory(tmp_path / "run", rank=1)
    other.begin({"seed": 0})
    assert other.has(3) and other.count_done() == 1


def test_settings_of_another_run_are_refused(tmp_path: Path) -> None:
    RunDirectory(tmp_path, rank=0).begin({"seed": 0, "fractions": (0, 1)})
    RunDirectory(tmp_path, rank=0).begin({"seed": 0, "fractions": [0, 1]})
    with pytest.raises(InvalidOptionError, match="belongs to another run: seed was 0, now 1"):
        RunDirectory(tmp_path, rank=0).begin({"seed": 1, "fractions": [0, 1]})


def test_leftovers_of_killed_processes_are_removed_but_not_those_of_running_ones(
    tmp_path: Path, board: Leaderboard
) -> None:
    directory = RunDirectory(tmp_path, rank=0)
    directory.begin({})
    directory.write_record(0, {"id": "a"})
    for name in ("samples/.000000.json.1.tmp", ".leaderboard.md.0.tmp", ".leaderboard.md.1.tmp"):
        (tmp_path / name).write_text("")
    directory.write_results(board, {"samples": 1}, 1)
    assert [file.name for file in tmp_path.rglob(".*")] == [".leaderboard.md.1.tmp"]
    assert json.loads((tmp_path / "manifest.json").read_text())["coverage"] == {"samples": 1}
