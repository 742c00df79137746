from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from captum_intramodal._utils.io import replace_atomically, replace_files, write_atomically


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "answer.txt"
    assert write_atomically(str(file), b"a dog") == file and file.read_bytes() == b"a dog"
    write_atomically(file, b"a cat")
    assert file.read_bytes() == b"a cat" and os.listdir(tmp_path) == ["answer.txt"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "answer.txt"
    file.write_text("old")
    with replace_atomically(file) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["answer.txt"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "answer.txt"
    file.write_text("old")

    def interrupted() -> None:
        with replace_atomically(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileNotFoundError), replace_atomically(file):
        pass  # Nothing was written.
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["answer.txt"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "answer.txt", b"a dog")


def test_a_tag_names_the_writer(tmp_path: Path) -> None:
    with replace_atomically(tmp_path / "table.csv", tag="3") as temporary:
        assert temporary.name == ".table.csv.3.tmp"
        temporary.touch()


def test_new_files_have_the_permissions_of_an_ordinary_open(tmp_path: Path, umask: int) -> None:
    write_atomically(tmp_path / "a", b"")
    with replace_files(tmp_path / "saved") as temporary:
        (temporary / "b").touch()
    (tmp_path / "ordinary").touch()
    (tmp_path / "directory").mkdir()
    expected = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "saved" / "b").stat().st_mode == expected
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "directory").stat().st_mode


def test_files_move_together_into_a_new_directory_with_its_parents(tmp_path: Path) -> None:
    saved = tmp_path / "runs" / "saved"
    with replace_files(saved) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "b").write_text("2")
        assert not saved.exists()
    assert sorted(os.listdir(saved)) == ["a", "b"] and os.listdir(saved.parent) == ["saved"]


def test_other_files_of_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a").write_text("old")
    with replace_files(tmp_path) as temporary:
        (temporary / "a").write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"mine": "mine", "a": "new"}


def test_the_last_file_moves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: moved.append(self.name) or replace(self, target))
    with replace_files(tmp_path / "saved", last="index.json") as temporary:
        for name in ("index.json", "z", "a"):
            (temporary / name).touch()
    assert moved == ["a", "z", "index.json"]


def test_an_exception_creates_no_directory_and_replaces_no_file(tmp_path: Path) -> None:
    def interrupted(directory: Path) -> None:
        with replace_files(directory) as temporary:
            (temporary / "a").write_text("new")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted(tmp_path / "saved")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="inside"):
        interrupted(tmp_path)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_file_in_the_place_of_the_directory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; a directory is needed"), replace_files(tmp_path / "saved"):
        pytest.fail("the block must not run")
    assert (tmp_path / "saved").read_text() == "mine"
