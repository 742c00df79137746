"""Word types agree with tags given by hand, categories match up to number, and no foreign pickle is loaded."""

from __future__ import annotations

import builtins
import gzip
import os
import pickle
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.metrics import match_categories, word_types
from captum_intramodal.text import parts_of_speech

# Sentences typical of captions, tagged by hand: n(oun), f(unction word), o(ther).
CAPTIONS = """
The/f image/n shows/o a/f large/o brown/o dog/n sitting/o on/o a/f wooden/o bench/n in/o a/f park/n ./o
Two/o young/o women/n are/o riding/o horses/n along/o the/f beach/n ./o
There/f is/o a/f red/o stop/n sign/n next/o to/o the/f traffic/n light/n ./o
A/f man/n wearing/o a/f blue/o shirt/n is/o playing/o tennis/n ./o
He/f holds/o his/f racket/n while/o the/f crowd/n watches/o ./o
Several/o zebras/n graze/o in/o the/f grass/n near/o a/f giraffe/n ./o
A/f cat/n and/f a/f mouse/n ./o
The/f giraffe/n which/f stands/o behind/o the/f fence/n can/f see/o us/f ./o
A/f surfboard/n leans/o against/o the/f refrigerator/n ./o
The/f kitchen/n features/o a/f microwave/n ,/o a/f sink/n and/f three/o wine/n glasses/n ./o
a/f plate/n of/o donuts/n and/f a/f cup/n of/o coffee/n on/o the/f dining/o table/n
A/f skateboarder/n performs/o a/f trick/n at/o the/f skate/n park/n ./o
People/n walk/o across/o the/f street/n holding/o umbrellas/n ./o
Who/f is/o there/f ?/o
A/f teddy/n bear/n sits/o beside/o the/f laptop/n and/f the/f keyboard/n ./o
An/f owl/n ,/o a/f pumpkin/n ,/o and/f a/f toaster/n are/o visible/o ./o
The/f bus/n stops/o at/o the/f park/n where/f children/n play/o ./o
Overall/o ,/o the/f scene/n conveys/o a/f sense/n of/o calm/n ./o
"""
TYPES = {"n": "noun", "f": "function", "o": "other"}


def captions() -> list[tuple[list[str], list[str]]]:
    lines = [[pair.rsplit("/", 1) for pair in line.split()] for line in CAPTIONS.strip().splitlines()]
    return [([word for word, _ in line], [TYPES[letter] for _, letter in line]) for line in lines]


def accuracy(**options: Any) -> float:
    pairs = [(a, b) for line, types in captions() for a, b in zip(word_types(line, **options), types, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_word_types_of_captions_agree_with_tags_given_by_hand() -> None:
    pytest.importorskip("HanTa")
    in_context, alone = accuracy(), accuracy(in_context=False)
    assert in_context > 0.97 and alone < in_context - 0.05


@pytest.mark.parametrize("in_context", [True, False])
def test_a_custom_tagger_replaces_hanta(in_context: bool) -> None:
    calls: list[list[str]] = []
    tags = {"A": "DT", "cat": "NN", "can": "MD", "sleep": "VB", "in": "IN", "Rome": "NNP", "!": "NN"}

    def tagger(sentence: list[str]) -> list[tuple[str, str]]:
        calls.append(sentence)
        return [(word, tags[word]) for word in sentence]

    types = word_types(list(tags), tagger, in_context)
    assert types == ["function", "noun", "function", "other", "other", "noun", "other"]
    assert calls == ([list(tags)] if in_context else [[word] for word in tags])
    assert word_types([], tagger) == []
    with pytest.raises(InvalidInputError, match="each of 2 words, but it returned 1"):
        word_types(["a", "cat"], lambda sentence: [("a", "DT")])


def test_every_c5_tag_has_the_type_of_its_penn_tag() -> None:
    pytest.importorskip("HanTa")
    known = parts_of_speech._load_hanta().tag2int
    tags = {tag.removeprefix("END_") for tag in known if tag.startswith("END_")}
    assert set(parts_of_speech._PENN) <= tags

    def tags_of(type: str) -> set[str]:
        return {tag for tag in tags if parts_of_speech._TYPES.get(parts_of_speech._PENN.get(tag, tag)) == type}

    assert tags_of("noun") == set("NN NN0 NN1 NN2 NP0 PNI UNC".split())
    assert tags_of("function") == set("AT0 AVQ CJC DPS DT0 DTQ EX0 ITJ PNP PNQ POS VM0".split())


def test_categories_match_regardless_of_case_and_number() -> None:
    pytest.importorskip("inflect")
    plurals = {"person": "People", "bus": "buses", "sheep": "sheep", "knife": "knives", "mouse": "mice", "skis": "skis"}
    plurals |= {"wine glass": "wine glasses", "couch": "couches", "tennis racket": "tennis rackets", "cat": "CATS"}
    plurals |= {"dining_table": "Dining tables", "scissors": "scissors", "teddy bear": "teddy bears", "leaf": "leaves"}
    for name, plural in plurals.items():
        words = plural.split()
        assert match_categories(["two", *words, "and"], list(plurals)) == [None, *[name] * len(words), None]
    assert match_categories(["the", "cat's", "mouse’s", "'s"], list(plurals)) == [None, "cat", "mouse", None]
    assert match_categories(["the", "grass", "was", "his"], list(plurals)) == [None] * 4


def test_longer_names_take_precedence() -> None:
    pytest.importorskip("inflect")
    words = "a hot dog , a dog , a hot".split()
    dog = ["dog", "hot dog"]
    assert match_categories(words, dog) == [None, "hot dog", "hot dog", None, None, "dog", None, None, None]
    assert match_categories([], dog) == [] and match_categories(words, []) == [None] * 9
    with pytest.raises(InvalidInputError, match="have a name"):
        match_categories(words, ["dog", " "])


def test_a_missing_library_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_load_hanta", "_inflect_engine", "_number_forms"):
        getattr(parts_of_speech, name).cache_clear()
    for module in [m for m in sys.modules if m.partition(".")[0] in ("HanTa", "inflect")]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("HanTa", "inflect"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(parts_of_speech, "import_module", refuse)
    with pytest.raises(ImportError, match=r"need HanTa.*captum-intramodal\[evaluate\]"):
        word_types(["cat"])
    with pytest.raises(ImportError, match=r"need inflect.*captum-intramodal\[evaluate\]"):
        match_categories(["cat"], ["cat"])


class Malicious:
    """Create a folder when unpickled, as proof that its code ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def attack(tmp_path: Path) -> tuple[bytes, Path]:
    """Return a malicious model, and the folder that exists once it has been unpickled."""
    pytest.importorskip("HanTa.HanoverTagger")
    parts_of_speech._load_hanta.cache_clear()
    proof = tmp_path / "proof"
    return gzip.compress(pickle.dumps(Malicious(proof))), proof


def test_a_model_planted_in_the_current_directory_is_not_loaded(
    attack: tuple[bytes, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proof = attack
    monkeypatch.chdir(tmp_path)
    Path("morphmodel_en.pgz").write_bytes(model)
    with pytest.raises(AttributeError):  # HanTa itself unpickles the file.
        sys.modules["HanTa.HanoverTagger"].HanoverTagger("morphmodel_en.pgz")
    assert proof.exists()
    proof.rmdir()
    assert word_types(["a", "dog"]) == ["function", "noun"]
    assert not proof.exists()


@pytest.mark.parametrize("planted", [True, False])
def test_a_model_with_another_digest_is_not_loaded(
    attack: tuple[bytes, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    model, proof = attack
    package = tmp_path / "HanTa"
    package.mkdir()
    for name in ("__init__.py", "HanoverTagger.py"):
        shutil.copy(Path(str(sys.modules["HanTa"].__file__)).with_name(name), package)
    found = "no such file"
    if planted:
        (package / "morphmodel_en.pgz").write_bytes(model)
        found = sha256(model).hexdigest()
    for name in ("HanTa", "HanTa.HanoverTagger"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = parts_of_speech._HANTA_SHA256
    with pytest.raises(ImportError, match=rf"expected SHA-256 {expected}, found {found}\. .*HanTa==1\.2\.1"):
        word_types(["dog"])
    assert not proof.exists()


def test_the_checked_version_of_hanta_is_the_pinned_one() -> None:
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"HanTa=={parts_of_speech._HANTA_VERSION}" in pinned
