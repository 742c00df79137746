r"""Measure seconds and peak memory, and collect them in a report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import markdown_table
from torch.profiler import ProfilerActivity, profile

from captum_intramodal import ModelAdapter
from captum_intramodal.models.hooks import evaluation_mode


@dataclass
class Cost:
    """Seconds of several runs, and peak bytes beyond those before; ``factor`` is not 1 if only a part was run."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    note: str = ""
    factor: float = 1.0

    @property
    def median(self) -> float:
        """Return the median seconds of the whole work."""
        return self.factor * float(np.median(self.seconds))

    def cells(self) -> list[str]:
        """Return the cells of a table: median, spread, peak memory and note."""
        low, high = self.factor * min(self.seconds), self.factor * max(self.seconds)
        spread = f"{low:.3g} to {high:.3g}" if len(self.seconds) > 1 else "one run"
        peak = "" if self.peak is None else f"{self.peak / 1e6:,.1f}"
        return [f"{self.median:.3g}", spread, peak, self.note]


def synchronize() -> None:
    """Wait until the GPU is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Time one run."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Measure the most bytes that the work holds at a time, beyond those held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, int(np.cumsum(changes, dtype=np.int64).max(initial=0)))


def take_turns(works: dict[str, Callable[[], Any]], runs: int, warm_up: bool = True) -> dict[str, Cost]:
    """Time all works once per turn, so that other load on the machine affects all of them alike."""
    costs = {name: Cost() for name in works}
    for turn in range(runs + warm_up):
        for name, work in works.items():
            took = seconds(work)
            if turn >= warm_up:
                costs[name].seconds.append(took)
    return costs


@contextmanager
def inference(adapter: ModelAdapter) -> Iterator[None]:
    """Keep a model in evaluation mode, without gradients."""
    with evaluation_mode(adapter.model):
        yield


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty line."""
    return [*markdown_table(header, rows, rule=f"| {' | '.join(['---'] * len(header))} |"), ""]


@dataclass
class Report:
    """Lines of Markdown, which are printed as they are added, and the figures for JSON."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        """Add and print lines."""
        self.lines += lines
        print("\n".join(lines), flush=True)

    def costs(self, title: str, costs: dict[str, Cost]) -> None:
        """Add a table of costs."""
        rows = [[name, *cost.cells()] for name, cost in costs.items()]
        self.add(title, "", *table(["work", "seconds", "spread", "peak extra MB", ""], rows))
        self.figures[title] = {
            name: {"seconds": c.seconds, "factor": c.factor, "peak": c.peak, "note": c.note}
            for name, c in costs.items()
        }

    def at_least(self, name: str, value: float, bound: float) -> list[str]:
        """Return a row that compares a ratio with its lower bound."""
        return self._ratio_row(name, value, f"at least {bound:g}", value >= bound)

    def at_most(self, name: str, value: float, bound: float) -> list[str]:
        """Return a row that compares a ratio with its upper bound."""
        return self._ratio_row(name, value, f"at most {bound:g}", value <= bound)

    def ratio_of_turns(self, name: str, first: Cost, second: Cost, bound: float) -> list[str]:
        """Return a row with the median of the ratios within a turn, or, if turns differ, the ratio of medians."""
        if len(first.seconds) == len(second.seconds):
            value = float(np.median(np.divide(first.seconds, second.seconds)))
        else:
            value = first.median / second.median
        return self.at_most(name, value, bound)

    def _ratio_row(self, name: str, value: float, bound: str, holds: bool) -> list[str]:
        self.figures.setdefault("ratios", {})[name] = value
        return [name, f"{value:.3g}", bound, "yes" if holds else "**no**"]
