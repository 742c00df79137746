"""README, CI, benchmarks and package agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import captum_intramodal
from captum_intramodal.demo import CHECKPOINT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_calls_the_test_command_of_the_readme_word_for_word() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3.11 -m venv")]
    assert len(commands) == 2, "the README has to have exactly two set-up commands"
    assert commands[1].endswith("-m pytest")
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_files_that_the_readme_links_to_exist() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_tables_of_the_readme_are_those_of_the_benchmarks() -> None:
    for name in ("localization.md", "localization-other.md"):
        table = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
        for row in (line for line in table.splitlines() if line.startswith("| ")):
            assert row in README, f"{name}: {row}"


def test_the_model_card_has_figures() -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert "{accuracies}" not in card and "describe, 2 to 4 objects: object words" in card


def test_public_names_are_documented() -> None:
    for name in captum_intramodal.__all__:
        if not name.startswith("__") and not name.isupper():
            assert (getattr(captum_intramodal, name).__doc__ or "").strip(), name
