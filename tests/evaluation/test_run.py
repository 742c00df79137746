"""A run: its records and results, interruptions, several processes, skipped explainers, and the command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from captum_intramodal import ModelAdapter
from captum_intramodal.cli import app
from captum_intramodal.datasets import Sample, SceneDataset
from captum_intramodal.errors import NotApplicableError, UnsupportedModelError
from captum_intramodal.evaluation import AnsweredSample, Column, Metric, MetricResult, evaluate
from captum_intramodal.explainers import make_explainer
from tests.evaluation.helpers import (
    CHEAP,
    LOCAL,
    MaskExplainer,
    demo_case,
    demo_model,
    read_results,
)


def test_a_run_writes_one_line_per_sample_and_the_tables(tmp_path: Path) -> None:
    board = evaluate(*demo_model(), "scenes:count=3", tmp_path / "run", CHEAP, LOCAL)
    assert board is not None
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2]
    values = [v for r in records for v in r["scores"]["logit_lens"]["pointing"].values()]
    assert board.rows["logit_lens"]["pointing"].interval.estimate == pytest.approx(np.mean(values))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["explainers"]["random"] == {"name": "random", "cells": 16, "seed": 0}
    assert manifest["settings"]["dataset"]["count"] == 3
    assert manifest["settings"]["versions"]["torch"] == torch.__version__.split("+")[0]
    shown = sum(len(r["categories"]) for r in records)
    assert manifest["coverage"]["categories_shown_and_named"] == shown == manifest["coverage"]["categories_shown"]
    assert not list((tmp_path / "run").glob("**/.*"))
    for name in ("leaderboard.md", "leaderboard.csv", "pairs.csv", "index.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_the_models_own_answers_can_be_explained(tmp_path: Path) -> None:
    for name, answers in (("given", "dataset"), ("own", "model")):
        data = "scenes:count=1,task=hallucination"
        evaluate(*demo_model(), data, tmp_path / name, ["random"], ["func_iou"], answers=answers)
    given, own = (json.loads((tmp_path / name / "samples.jsonl").read_text()) for name in ("given", "own"))
    sample = SceneDataset(count=1, task="hallucination")[0]
    assert given["answer"] == sample.answer and own["answer"] == sample.captions[0]
    coverage = json.loads((tmp_path / "given" / "manifest.json").read_text())["coverage"]
    assert coverage["categories_named_but_not_shown"] == 1


def test_a_stopped_run_resumes_and_computes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(*demo_model(), "scenes:count=4", tmp_path / "whole", CHEAP, LOCAL)
    opened: list[int] = []
    original = SceneDataset.__getitem__

    def stop(self: SceneDataset, index: int) -> Sample:
        opened.append(index)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(SceneDataset, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*demo_model(), "scenes:count=4", tmp_path / "stopped", CHEAP, LOCAL)
    assert not (tmp_path / "stopped" / "leaderboard.md").exists()
    done: list[tuple[int, int]] = []
    evaluate(*demo_model(), "scenes:count=4", tmp_path / "stopped", CHEAP, LOCAL, progress=lambda *d: done.append(d))
    assert opened == [0, 1, 2, 2, 3] and done[-1] == (4, 4)
    assert read_results(tmp_path / "stopped") == read_results(tmp_path / "whole")


def test_two_processes_produce_the_results_of_one(tmp_path: Path) -> None:
    evaluate(*demo_model(), "scenes:count=3", tmp_path / "one", CHEAP, LOCAL)
    assert evaluate(*demo_model(), "scenes:count=3", tmp_path / "two", CHEAP, LOCAL, rank=1, world_size=2) is None
    assert evaluate(*demo_model(), "scenes:count=3", tmp_path / "two", CHEAP, LOCAL, rank=0, world_size=2) is not None
    assert read_results(tmp_path / "one") == read_results(tmp_path / "two")


def test_an_explainer_that_does_not_apply_is_recorded_as_skipped(tmp_path: Path) -> None:
    class CatsOnly(MaskExplainer):
        def __call__(self, *args: Any) -> list[Tensor]:
            raise NotApplicableError("cats only")

    compared = {"random": make_explainer("random"), "cats": CatsOnly(demo_case().sample)}
    board = evaluate(*demo_model(), "scenes:count=2", tmp_path / "run", compared, ["pointing"])
    assert board is not None and board.coverage.skipped == {"cats": {"cats only": 2}}
    coverage = json.loads((tmp_path / "run" / "manifest.json").read_text())["coverage"]
    assert coverage["skipped"] == {"cats": {"cats only": 2}}


def test_other_errors_name_sample_explainer_and_metric(tmp_path: Path) -> None:
    class Broken(MaskExplainer):
        def __call__(self, *args: Any) -> list[Tensor]:
            return [torch.full((9, 2, 2), torch.nan)]

    class Crashing(MaskExplainer):
        def __call__(self, *args: Any) -> list[Tensor]:
            raise ValueError("a bug")

    def run(explainer: MaskExplainer) -> None:
        evaluate(*demo_model(), "scenes:count=1", tmp_path / "run", {"mine": explainer}, ["pointing"])

    with pytest.raises(ValueError, match="NaN") as raised:
        run(Broken(demo_case().sample))
    assert raised.value.__notes__ == ["Raised by metric 'pointing' for explainer 'mine' on sample '2000000'."]
    with pytest.raises(ValueError, match="a bug") as raised:
        run(Crashing(demo_case().sample))
    assert raised.value.__notes__ == ["Raised by explainer 'mine' on sample '2000000'."]


def test_a_metric_that_does_not_apply_is_recorded_as_skipped(tmp_path: Path) -> None:
    compared = {"random": make_explainer("random"), "masks": MaskExplainer(demo_case().sample)}
    board = evaluate(*demo_model(), "scenes:count=1", tmp_path, compared, ["text_removal", "pointing"])
    assert board is not None and board.coverage.skipped == {}
    assert "text_deletion" in board.rows["random"] and set(board.rows["masks"]) == {"pointing"}
    record = json.loads((tmp_path / "samples.jsonl").read_text())
    assert record["skipped_metrics"] == {"masks": {"text_removal": "masks does not explain text."}}
    coverage = json.loads((tmp_path / "manifest.json").read_text())["coverage"]
    assert coverage["skipped_metrics"] == {"masks": {"text_removal": {"masks does not explain text.": 1}}}


def test_a_metric_that_stops_halfway_leaves_no_values(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Halfway(Metric):
        name = "halfway"
        columns = (Column("halfway", "halfway", True),)

        def measure(self, case: AnsweredSample, explainer: Any, maps: Tensor, found: MetricResult) -> None:
            found.add("halfway", 1, 0.5)
            raise UnsupportedModelError("no more")

    evaluate(*demo_model(), "scenes:count=1", tmp_path, ["random"], [Halfway()])
    record = json.loads((tmp_path / "samples.jsonl").read_text())
    assert record["scores"] == {"random": {}}
    assert record["skipped_metrics"] == {"random": {"halfway": "no more"}}


def test_empty_answers_of_the_model_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelAdapter, "generate", lambda *args: [])
    board = evaluate(*demo_model(), "scenes:count=1", tmp_path, ["random"], ["insertion"], answers="model")
    assert board is not None and board.coverage.skipped == {"random": {"The answer is empty.": 1}}


def test_seconds_are_measured_only_if_passes_are_not_shared(tmp_path: Path) -> None:
    for timing in (False, True):
        evaluate(*demo_model(), "scenes:count=1", tmp_path / str(timing), CHEAP, ["pointing"], timing=timing)
        record = json.loads((tmp_path / str(timing) / "samples.jsonl").read_text())
        assert set(record["seconds"]) == (set(CHEAP) if timing else set())
        assert ("| seconds |" in (tmp_path / str(timing) / "leaderboard.md").read_text()) == timing


def test_impossible_runs_are_refused(tmp_path: Path) -> None:
    evaluate(*demo_model(), "scenes:count=1", tmp_path / "run", ["random"], ["pointing"])
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for out, explainers, options, message in (
        ("run", ["random:seed=1"], {}, r"belongs to another run: explainers was .*seed"),
        ("file", ["random"], {}, "is a file"),
        ("other", ["random"], {}, "holds other files"),
        ("new", ["random", "random"], {}, "given twice"),
        ("new", [], {}, "at least one of each"),
        ("new", ["random"], {"reference": "tam"}, "reference='tam' is none of the explainers random"),
        ("new", ["random"], {"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ("new", ["random"], {"answers": "mine"}, "'mine'"),
        ("new", ["random"], {"fractions": (0, 0.5, 0.1)}, "must increase"),
        ("new", ["random"], {"fractions": (0.5,)}, "at least 2"),
        ("new", ["random"], {"metrics": ["deletion", "deletion:seed=1"]}, "one column 'deletion'"),
    ):
        chosen = {"metrics": ["pointing"]} | options
        with pytest.raises(ValueError, match=message):
            evaluate(*demo_model(), "scenes:count=1", tmp_path / out, explainers, **chosen)
    for arguments, error, message in (
        ((3, ["random"], ["pointing"]), TypeError, "a length and samples; got int"),
        (("scenes:count=1", "random", ["pointing"]), TypeError, "must be lists"),
        (("scenes:count=1", ["random"], [None]), TypeError, "got NoneType"),
        ((str(tmp_path / "nothing"), ["random"], ["pointing"]), ValueError, "has no samples"),
    ):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        (tmp_path / "nothing" / "annotations.jsonl").write_text("")
        with pytest.raises(error, match=message):
            evaluate(*demo_model(), arguments[0], tmp_path / "new", *arguments[1:])
    assert not (tmp_path / "new").exists()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest of a run"):
        evaluate(*demo_model(), "scenes:count=1", tmp_path / "run", ["random"], ["pointing"])


def test_the_evaluate_command(tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", "demo", "--data", "scenes:count=2", "--out", str(tmp_path / "run")]
    arguments += ["--explainers", "random center_gaussian", "--metrics", "pointing", "--metrics", "energy"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "center_gaussian" in result.stdout and "2/2" in result.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [metric["name"] for metric in manifest["settings"]["metrics"]] == ["pointing", "energy"]
    for change, message in (
        (["--explainers", "nobody"], "no explainer 'nobody'"),
        (["--metrics", "luck"], "no metric 'luck'"),
        (["--data", "nowhere"], "'nowhere' is neither a folder"),
        (["--tagger", "no.such"], "--tagger no.such"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *change])
        assert refused.exit_code == 2 and message in refused.stderr and "Traceback" not in refused.output


@pytest.mark.slow
def test_a_run_killed_twenty_times_produces_the_results_of_an_uninterrupted_run(tmp_path: Path) -> None:
    arguments = (*demo_model(), "scenes:count=40", tmp_path / "killed", ["logit_lens", "msea+arc", "random"], LOCAL)
    moments = random.Random(0)
    kills = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                evaluate(*arguments)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.05, 1.0))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kills >= 15  # The last processes may have nothing left to do.
    evaluate(*arguments)
    evaluate(*arguments[:3], tmp_path / "whole", *arguments[4:])
    assert read_results(tmp_path / "killed") == read_results(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("**/.*"))


@pytest.mark.slow
def test_accelerate_shares_the_work(tmp_path: Path) -> None:
    options = ["--model", "demo", "--dtype", "float32", "--data", "scenes:count=4"]
    options += ["--explainers", "logit_lens random", "--metrics", "f1_iou pointing", "--out"]
    evaluate(*demo_model(), "scenes:count=4", tmp_path / "one", CHEAP, LOCAL)
    launcher = "import sys; from accelerate.commands.accelerate_cli import main; main()"
    command = ["launch", "--cpu", "--num_processes", "2", "-m", "captum_intramodal", "evaluate"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", launcher, *command, *options, str(tmp_path / "two")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_results(tmp_path / "two") == read_results(tmp_path / "one")
