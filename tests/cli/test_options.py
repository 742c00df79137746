"""The options are those of the library, and importing them is cheap."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import typer

from captum_intramodal.cli.options import Method, parse_scales, resolve_tagger, split_specs
from captum_intramodal.explanation.options import METHODS


def test_methods_are_those_of_explain() -> None:
    assert tuple(method.value for method in Method) == METHODS


def test_specs_are_separated_by_spaces() -> None:
    assert split_specs(None) == [] and split_specs(["a b:x=1", "c"]) == ["a", "b:x=1", "c"]


def test_scales_are_auto_or_different_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_scales("auto") == "auto" and parse_scales("1,1.5") == (1.0, 1.5)
    for text, message in (("1,x", "numbers separated by commas"), ("17", "at most 16"), ("2,2", "different")):
        with pytest.raises(typer.Exit):
            parse_scales(text)
        assert message in " ".join(capsys.readouterr().err.split())


def test_taggers_are_dotted_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_tagger("inspect.signature") is inspect.signature
    with pytest.raises(typer.Exit):
        resolve_tagger("no.such")
    assert "--tagger no.such cannot be found: No module named" in " ".join(capsys.readouterr().err.split())


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
