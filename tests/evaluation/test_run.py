from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.cli import app
from captum_intramodal.datasets import Sample, SceneDataset
from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import METRICS, AnsweredSample, MetricResult, evaluate, make_metric
from captum_intramodal.explainers import TextMaps, make_explainer
from captum_intramodal.metrics import (
    ImageRemoval,
    TokenRemoval,
    area_under_curve,
    average_precision,
    deletion_curve,
    insertion_curve,
    otsu_threshold,
    randomization_check,
    tam_scores,
)

CHEAP = ["logit_lens", "random"]
LOCAL = ["f1_iou", "pointing"]


@cache
def demo() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


@cache
def case(**options: Any) -> AnsweredSample:
    adapter = ModelAdapter(*demo())
    sample = SceneDataset(count=1, **options)[0]
    return AnsweredSample(adapter, sample, adapter.tokenize_answer(sample.answer or ""))


@dataclass
class Fixed:
    """An explainer with the same maps for every answer: the mask of a category for all of its tokens."""

    sample: Sample
    name: str = "fixed"
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Any, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        maps = torch.zeros(len(answer_ids), *self.sample.image.size[::-1])
        for word in AnsweredSample(adapter, self.sample, answer_ids).objects.values():
            maps[list(word.tokens)] = torch.from_numpy(self.sample.categories[word.category or ""]).float()
        return [maps]


def measure(spec: str, maps: Tensor, explainer: Any = None, of: AnsweredSample | None = None) -> MetricResult:
    found = MetricResult()
    make_metric(spec).measure(of or case(), explainer, maps, found)
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in (".md", ".csv", ".jsonl", ".json")}


# --- One answer ------------------------------------------------------------------------------------------------------


def test_words_of_an_answer() -> None:
    words = [(word.text, word.type, word.category) for word in case().words]
    sample = case().sample
    assert sample.answer == "the picture shows a lemon and a donut."
    assert words == [
        ("the", "function", None), ("picture", "noun", None), ("shows", "other", None), ("a", "function", None),
        ("lemon", "noun", "lemon"), ("and", "function", None), ("a", "function", None), ("donut", "noun", "donut"),
        (".", "other", None),
    ]  # fmt: skip
    assert set(case().shown) == {4, 7}
    alone = AnswerScorer(case().adapter, sample.prompt, sample.answer or "").log_probability([sample.image])[0]
    assert case().words[4].probability == pytest.approx(float(alone[4].exp()))


def test_adjacent_words_of_one_category_are_one_and_a_tagger_is_asked_for_the_rest() -> None:
    adapter, image = case().adapter, case().sample.image
    mask = np.ones(image.size[::-1], bool)
    sample = Sample(
        "1", image, "what do you see?", categories={"red book": mask, "dog": ~mask}, word_types={"a": "other"}
    )
    asked: list[list[str]] = []

    def tag(words: list[str]) -> list[tuple[str, str]]:
        asked.append(words)
        return [(word, "NN" if word == "dog" else "DT") for word in words]

    answer = AnsweredSample(adapter, sample, adapter.tokenize_answer("a red book and a dog"), tag)
    found = [(word.text, word.tokens, word.type, word.category) for word in answer.words]
    assert found == [
        ("a", (0,), "other", None), ("red book", (1, 2), "noun", "red book"), ("and", (3,), "function", None),
        ("a", (4,), "other", None), ("dog", (5,), "noun", "dog"),
    ]  # fmt: skip
    assert asked == [["a", "red", "book", "and", "a", "dog"]]
    assert set(answer.shown) == {1}  # There is no dog in the image.


def test_no_image_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    score = AnswerScorer.log_probability
    monkeypatch.setattr(
        AnswerScorer, "log_probability", lambda self, images: counted.append(len(images)) or score(self, images)
    )
    answer = AnsweredSample(case().adapter, case().sample, case().answer_ids)
    black, white = (Image.new("RGB", (256, 192), color) for color in ("black", "white"))
    first = answer.log_probability([black, white])
    assert torch.equal(answer.log_probability([white, black, white]), first[[1, 0, 1]])
    assert counted == [2]


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_true_masks_are_found_by_every_metric_of_place() -> None:
    maps = Fixed(case().sample)(case().adapter, [], "", case().answer_ids)[0]
    found = measure("f1_iou", maps).scores
    assert found["obj_iou"] == {"4": 1.0, "7": 1.0}
    for name in ("pointing", "energy", "average_precision"):
        assert measure(name, maps).scores[name] == pytest.approx({"4": 1.0, "7": 1.0})
    assert measure("obj_iou", maps).scores == {"obj_iou": found["obj_iou"]}
    assert measure("func_iou", maps).scores == {"func_iou": found["func_iou"]}


def test_function_words_are_compared_with_the_thresholds_of_all_nouns() -> None:
    maps = torch.rand(len(case().answer_ids), 12, 16)
    thresholds = [otsu_threshold(maps[token]) for token in (1, 4, 7)]
    expected = {str(i): float((maps[i] < sum(thresholds) / 3).float().mean()) for i in (0, 3, 5, 6)}
    assert measure("f1_iou", maps).scores["func_iou"] == pytest.approx(expected)


def test_the_best_token_of_a_word_counts_for_obj_iou_and_their_mean_elsewhere() -> None:
    adapter, image = case().adapter, case().sample.image
    mask = np.zeros(image.size[::-1], bool)
    mask[:96] = True
    answer = AnsweredSample(
        adapter, Sample("1", image, "what?", categories={"red book": mask}), adapter.tokenize_answer("a red book")
    )
    maps = torch.zeros(3, 192, 256)
    maps[1, 96:], maps[2, :96] = 3.0, 1.0
    assert measure("obj_iou", maps, of=answer).scores["obj_iou"] == {"1": 1.0}
    assert measure("pointing", maps, of=answer).scores["pointing"] == {"1": 0.0}
    assert measure("average_precision", maps, of=answer).scores["average_precision"]["1"] == pytest.approx(
        average_precision(maps[1:].mean(0), mask)
    )


def test_compatible_scores_are_those_of_tams_arithmetic() -> None:
    sample = case().sample
    maps = torch.rand(len(case().answer_ids), 12, 16)
    labels = np.zeros((192, 256), np.int64)
    for number, name in ((1, "lemon"), (2, "donut")):
        labels[sample.categories[name]] = number
    kinds = [-2, -1, -3, -2, 1, -2, -2, 2, -3]
    levels = list((maps / maps.max() * 255).to(torch.uint8))
    expected = tam_scores(levels, [[i] for i in range(9)], kinds, labels)
    found = measure("tam_iou", maps).scores
    assert list(found["tam_obj_iou"].values()) == expected.object_iou
    assert list(found["tam_func_iou"].values()) == expected.function_iou


def test_removal_of_regions_is_that_of_the_metrics_by_hand() -> None:
    sample, maps = case().sample, torch.rand(len(case().answer_ids), 12, 16)
    scorer = AnswerScorer(case().adapter, sample.prompt, sample.answer or "")
    removal = ImageRemoval(lambda p: scorer.log_probability(p)[:, 4].exp(), sample.image, "mean")
    deletion = deletion_curve(removal, removal.importance(maps[4]))
    found = measure("deletion:imputation=mean", maps)
    assert found.scores["deletion"]["4"] == pytest.approx(area_under_curve(deletion), abs=1e-5)
    assert found.scores["aopc"]["4"] == pytest.approx(float((deletion[0] - deletion).mean()), abs=1e-5)
    assert found.curves["deletion"]["4"] == pytest.approx(deletion.tolist(), abs=1e-5)
    assert set(found.scores["deletion"]) == {"4", "7"}

    whole = ImageRemoval(lambda p: scorer.log_probability(p).sum(1).exp(), sample.image, "blur")
    curve = insertion_curve(whole, whole.importance(maps[[4, 7]].mean(0)))
    found = measure("insertion:of=answer", maps)
    assert found.scores == {"answer_insertion": {"answer": pytest.approx(area_under_curve(curve), abs=1e-5)}}


def test_curves_are_measured_where_the_run_asks(tmp_path: Path) -> None:
    steps = (0, 0.02, 0.1)
    evaluate(*demo(), "scenes:count=1", tmp_path, ["centre_gaussian"], ["deletion", "road"], fractions=steps)
    record = json.loads((tmp_path / "samples.jsonl").read_text())
    curves = record["curves"]["centre_gaussian"]["deletion"]
    assert {len(curve) for curve in curves.values()} == {3}
    expected = {i: ((a + b) / 2 * 0.02 + (b + c) / 2 * 0.08) / 0.1 for i, (a, b, c) in curves.items()}
    assert record["scores"]["centre_gaussian"]["deletion"] == pytest.approx(expected, abs=1e-5)


def test_road_is_high_for_the_masks_and_its_negative_for_their_opposite() -> None:
    masks = Fixed(case().sample)(case().adapter, [], "", case().answer_ids)[0]
    order = masks + torch.rand_like(masks) / 2  # Without ties.
    good = measure("road", order).scores["road"]
    bad = measure("road", 1.5 - order).scores["road"]
    assert min(good.values()) > 0.1
    assert bad == pytest.approx({i: -value for i, value in good.items()}, abs=1e-6)


def test_removal_of_words_by_hand() -> None:
    class Text:
        def explain_text(self, adapter: Any, images: Any, prompt: Any, answer_ids: Any) -> TextMaps:
            return TextMaps(positions, values)

    sample, ids = case().sample, case().answer_ids
    positions = make_explainer("random").explain_text(case().adapter, [sample.image], sample.prompt, ids).positions
    values = torch.rand(len(ids), len(positions))
    found = measure("text_removal", torch.zeros(len(ids), 2, 2), Text())
    earlier = len(positions) - len(ids) + 7
    scorer = AnswerScorer(case().adapter, sample.prompt, ids)
    removal = TokenRemoval(scorer, sample.image, positions[:earlier], token=7)
    expected = area_under_curve(deletion_curve(removal, values[7, :earlier]))
    assert found.scores["text_deletion"]["7"] == pytest.approx(expected, abs=1e-5)
    assert measure("text_removal", torch.zeros(9, 2, 2), Fixed(sample)).scores == {}


def test_infidelity_is_zero_only_for_a_map_of_what_squares_are_worth() -> None:
    masks = Fixed(case().sample)(case().adapter, [], "", case().answer_ids)[0]
    good = measure("infidelity", masks).scores["infidelity"]
    turned = measure("infidelity", masks.flip(1, 2)).scores["infidelity"]
    larger = measure("infidelity", 7 * masks).scores["infidelity"]
    assert set(good) == {"4", "7"} and all(good[i] < turned[i] for i in good)
    assert larger == pytest.approx(good, rel=1e-4)  # A map's scale is free.


def test_sensitivity_is_zero_for_maps_that_noise_does_not_change() -> None:
    class Still:
        def __call__(self, adapter: Any, images: Any, prompt: Any, answer_ids: Any) -> list[Tensor]:
            return [torch.ones(9, 3, 4)]

    assert measure("sensitivity", torch.ones(9, 3, 4), Still()).scores == {"sensitivity": {"answer": 0.0}}
    lens = make_explainer("logit_lens")
    (maps,) = lens(case().adapter, [case().sample.image], case().sample.prompt, case().answer_ids)
    before = torch.get_rng_state()
    moved = measure("sensitivity:samples=1", maps, lens).scores["sensitivity"]["answer"]
    assert 0 < moved < 1 and torch.equal(torch.get_rng_state(), before)


def test_randomization_is_the_check_of_the_metrics() -> None:
    lens, sample = make_explainer("logit_lens"), case().sample

    def explain() -> Tensor:
        (maps,) = lens(case().adapter, [sample.image], sample.prompt, case().answer_ids)
        return maps[[4, 7]]

    steps = randomization_check(case().adapter.model, explain)
    (maps,) = lens(case().adapter, [sample.image], sample.prompt, case().answer_ids)
    found = measure("randomization", maps, lens).scores["randomization"]["answer"]
    assert found == pytest.approx(float(np.mean([abs(step.rank_correlation) for step in steps])), abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("iou", "There is no metric 'iou'"),
        ("deletion:imputation=black", "'black'"),
        ("deletion:of=tokens", "'words' or 'answer'"),
        ("pointing:seed=1", "options seed that do not exist"),
    ],
)
def test_metrics_that_do_not_exist(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_metric(spec)


def test_every_metric_has_settings_and_columns() -> None:
    for name in METRICS:
        metric = make_metric(name)
        assert metric.settings["name"] == name and metric.columns


# --- A run -----------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_line_per_sample_and_tables(tmp_path: Path) -> None:
    board = evaluate(*demo(), "scenes:count=3", tmp_path / "run", CHEAP, LOCAL)
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


def test_models_answer_themselves(tmp_path: Path) -> None:
    evaluate(*demo(), "scenes:count=1,task=hallucination", tmp_path / "given", ["random"], ["func_iou"])
    evaluate(*demo(), "scenes:count=1,task=hallucination", tmp_path / "own", ["random"], ["func_iou"], answers="model")
    given, own = (json.loads((tmp_path / name / "samples.jsonl").read_text()) for name in ("given", "own"))
    sample = SceneDataset(count=1, task="hallucination")[0]
    assert given["answer"] == sample.answer and own["answer"] == sample.captions[0]
    assert (
        json.loads((tmp_path / "given" / "manifest.json").read_text())["coverage"]["categories_named_but_not_shown"]
        == 1
    )


def test_a_run_that_was_stopped_goes_on_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(*demo(), "scenes:count=4", tmp_path / "whole", CHEAP, LOCAL)
    seen: list[str] = []
    original = SceneDataset.__getitem__

    def stop(self: SceneDataset, index: int) -> Sample:
        seen.append(str(index))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(SceneDataset, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*demo(), "scenes:count=4", tmp_path / "stopped", CHEAP, LOCAL)
    assert not (tmp_path / "stopped" / "leaderboard.md").exists()
    done: list[tuple[int, int]] = []
    evaluate(*demo(), "scenes:count=4", tmp_path / "stopped", CHEAP, LOCAL, progress=lambda *d: done.append(d))
    assert seen == ["0", "1", "2", "2", "3"] and done[-1] == (4, 4)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_two_processes_make_the_table_of_one(tmp_path: Path) -> None:
    evaluate(*demo(), "scenes:count=3", tmp_path / "one", CHEAP, LOCAL)
    assert evaluate(*demo(), "scenes:count=3", tmp_path / "two", CHEAP, LOCAL, rank=1, world_size=2) is None
    assert evaluate(*demo(), "scenes:count=3", tmp_path / "two", CHEAP, LOCAL, rank=0, world_size=2) is not None
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_what_an_explainer_cannot_do_is_noted_and_stops_nobody(tmp_path: Path) -> None:
    class Never(Fixed):
        def __call__(self, *args: Any) -> list[Tensor]:
            raise ValueError("only of cats")

    compared = {"random": make_explainer("random"), "never": Never(case().sample)}
    board = evaluate(*demo(), "scenes:count=2", tmp_path / "run", compared, ["pointing"])
    assert board is not None and board.coverage.skipped == {"never": {"only of cats": 2}}
    coverage = json.loads((tmp_path / "run" / "manifest.json").read_text())["coverage"]
    assert coverage["skipped"] == {"never": {"only of cats": 2}}


def test_maps_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    class Broken(Fixed):
        def __call__(self, *args: Any) -> list[Tensor]:
            return [torch.full((9, 2, 2), torch.nan)]

    with pytest.raises(ValueError, match=r"pointing of broken on sample 2000000: .*NaN"):
        evaluate(*demo(), "scenes:count=1", tmp_path, {"broken": Broken(case().sample)}, ["pointing"])


def test_seconds_are_measured_only_where_passes_are_not_shared(tmp_path: Path) -> None:
    for timing in (False, True):
        evaluate(*demo(), "scenes:count=1", tmp_path / str(timing), CHEAP, ["pointing"], timing=timing)
        record = json.loads((tmp_path / str(timing) / "samples.jsonl").read_text())
        assert set(record["seconds"]) == (set(CHEAP) if timing else set())
        assert ("| seconds |" in (tmp_path / str(timing) / "leaderboard.md").read_text()) == timing


def test_runs_that_cannot_be(tmp_path: Path) -> None:
    evaluate(*demo(), "scenes:count=1", tmp_path / "run", ["random"], ["pointing"])
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for out, explainers, options, said in (
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
        with pytest.raises(ValueError, match=said):
            evaluate(*demo(), "scenes:count=1", tmp_path / out, explainers, **({"metrics": ["pointing"]} | options))
    for arguments, error, said in (
        ((3, ["random"], ["pointing"]), TypeError, "a length and samples; got int"),
        (("scenes:count=1", "random", ["pointing"]), TypeError, "are lists"),
        (("scenes:count=1", ["random"], [None]), TypeError, "got NoneType"),
        ((str(tmp_path / "nothing"), ["random"], ["pointing"]), ValueError, "has no samples"),
    ):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        (tmp_path / "nothing" / "annotations.jsonl").write_text("")
        with pytest.raises(error, match=said):
            evaluate(*demo(), arguments[0], tmp_path / "new", *arguments[1:])
    assert not (tmp_path / "new").exists()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest of a run"):
        evaluate(*demo(), "scenes:count=1", tmp_path / "run", ["random"], ["pointing"])


def test_the_command(tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", "demo", "--data", "scenes:count=2", "--out", str(tmp_path / "run")]
    arguments += ["--explainers", "random center_gaussian", "--metrics", "pointing", "--metrics", "energy"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "centre_gaussian" in result.stdout and "2/2" in result.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [metric["name"] for metric in manifest["settings"]["metrics"]] == ["pointing", "energy"]
    for change, said in (
        (["--explainers", "nobody"], "no explainer 'nobody'"),
        (["--metrics", "luck"], "no metric 'luck'"),
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--tagger", "no.such"], "--tagger no.such"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *change])
        assert refused.exit_code == 2 and said in refused.stderr and "Traceback" not in refused.output


@pytest.mark.slow
def test_killed_twenty_times_the_table_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    arguments = (*demo(), "scenes:count=40", tmp_path / "killed", ["logit_lens", "msea+arc", "random"], LOCAL)
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
    assert kills >= 15  # The last ones may find nothing left to do.
    evaluate(*arguments)
    evaluate(*arguments[:3], tmp_path / "whole", *arguments[4:])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("**/.*"))


@pytest.mark.slow
def test_accelerate_shares_the_work(tmp_path: Path) -> None:
    options = ["--model", "demo", "--dtype", "float32", "--data", "scenes:count=4"]
    options += ["--explainers", "logit_lens random", "--metrics", "f1_iou pointing", "--out"]
    evaluate(*demo(), "scenes:count=4", tmp_path / "one", CHEAP, LOCAL)
    launcher = "import sys; from accelerate.commands.accelerate_cli import main; main()"
    command = ["launch", "--cpu", "--num_processes", "2", "-m", "captum_intramodal", "evaluate"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", launcher, *command, *options, str(tmp_path / "two")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")
