r"""How do the files of a run survive interruptions and several processes? Each is written atomically, under one
directory that belongs to the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_intramodal._utils.io import replace_atomically
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.evaluation.leaderboard import Leaderboard
from captum_intramodal.evaluation.records import Record

__all__ = ["RunDirectory"]


class RunDirectory:
    r"""
    The directory of a run: a manifest, one file per sample, and finally the results.

    Args:

        out (Path): The directory; it is created if it does not exist.
        rank (int): Number of this process, which marks its temporary files.

    Raises:
        InvalidOptionError: ``out`` is a file.
    """

    def __init__(self, out: Path, rank: int) -> None:
        if out.exists() and not out.is_dir():
            raise InvalidOptionError(f"{out} is a file; the results need a directory.")
        self.out = out
        self.rank = rank
        self.samples = out / "samples"
        self.settings: dict[str, Any] = {}

    def begin(self, settings: Mapping[str, Any]) -> None:
        r"""
        Begin or resume the run that is defined by these settings.

        Raises:
            InvalidOptionError: The directory belongs to another run, or holds other files.
        """
        self.settings = json.loads(json.dumps(settings))
        manifest = self.out / "manifest.json"
        if manifest.is_file():
            self._check_same_run(manifest)
        elif self.out.is_dir() and any(self.out.iterdir()) and not self.samples.is_dir():
            raise InvalidOptionError(f"{self.out} holds other files; choose an empty or a new directory.")
        self.samples.mkdir(parents=True, exist_ok=True)
        if not manifest.is_file():
            self._write(manifest, self._manifest({}))

    def _check_same_run(self, manifest: Path) -> None:
        try:
            begun = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise InvalidOptionError(f"{manifest} is not the manifest of a run; choose another directory.") from error
        if different := [key for key in self.settings if begun.get(key) != self.settings[key]]:
            raise InvalidOptionError(
                f"{self.out} belongs to another run: "
                + "; ".join(f"{key} was {begun.get(key)}, now {self.settings[key]}" for key in different)
                + ". Choose another directory for this one."
            )

    def has(self, index: int) -> bool:
        """Return True if a sample is done."""
        return self._sample_file(index).is_file()

    def count_done(self) -> int:
        """Count the samples that are done, by all processes."""
        return sum(1 for _ in self.samples.glob("*.json"))

    def write_record(self, index: int, record: Record) -> None:
        """Write the record of a sample, which is then done."""
        self._write(self._sample_file(index), json.dumps({"index": index, **record}, ensure_ascii=False) + "\n")

    def read_records(self, count: int) -> list[dict[str, Any]]:
        """Read the records of all samples."""
        return [json.loads(self._sample_file(index).read_text(encoding="utf-8")) for index in range(count)]

    def write_results(self, board: Leaderboard, coverage: Mapping[str, Any], count: int) -> None:
        """Write the leaderboard and all records, and remove temporary files of killed processes."""
        manifest = self._manifest(coverage)
        lines = [self._sample_file(index).read_text(encoding="utf-8") for index in range(count)]
        self._write(self.out / "samples.jsonl", "".join(lines))
        self._write(self.out / "manifest.json", manifest)
        self._write(self.out / "leaderboard.md", board.to_markdown())
        for name, write in (("leaderboard.csv", board.to_csv), ("pairs.csv", board.pairs_to_csv)):
            with replace_atomically(self.out / name, tag=str(self.rank)) as temporary:
                write(temporary)
        with replace_atomically(self.out / "index.html", tag=str(self.rank)) as temporary:
            board.to_html(temporary, json.loads(manifest))
        # Of the results' temporary files only this process's own, as another one may be writing them right now.
        for leftover in (*self.samples.glob(".*.tmp"), *self.out.glob(f".*.{self.rank}.tmp*")):
            leftover.unlink(missing_ok=True)

    def _sample_file(self, index: int) -> Path:
        return self.samples / f"{index:06d}.json"

    def _manifest(self, coverage: Mapping[str, Any]) -> str:
        return json.dumps({"format": 1, "settings": self.settings, "coverage": coverage}, indent=1) + "\n"

    def _write(self, file: Path, text: str) -> None:
        with replace_atomically(file, tag=str(self.rank)) as temporary:
            temporary.write_text(text, encoding="utf-8")
