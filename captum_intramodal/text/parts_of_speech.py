r"""Classify the words of an answer: which are nouns, which function words, and which category does each name?

The default tagger is HanTa (Wartena, "The Hanover Tagger", 2023); inflect finds the singular of plurals. Both ship
their data inside their wheels, so that nothing is downloaded: ``pip install "captum-intramodal[evaluate]"``. Any
function that returns Penn Treebank tags, such as ``nltk.pos_tag`` or a lookup in a data set's annotations, can replace
HanTa.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from captum_intramodal.errors import InvalidInputError

__all__ = ["Tagger", "WordType", "match_categories", "word_types"]

WordType = Literal["noun", "function", "other"]

# From the words of a sentence to one pair (word, Penn Treebank tag) per word.
Tagger = Callable[[list[str]], Sequence[tuple[str, str]]]

# The classes of Token Activation Map's evaluation.
_TYPES: dict[str, WordType] = dict.fromkeys(("NN", "NNS", "NNP", "NNPS"), "noun")
_TYPES |= dict.fromkeys("CC DT EX MD POS PRP PRP$ UH WDT WP WP$ WRB".split(), "function")

# HanTa uses the C5 tags of the British National Corpus. This maps the tags that decide a type, or mean something else
# in the Penn Treebank; unclassified words (UNC) are nouns, as in other taggers.
_PENN: dict[str, str] = {
    "AT0": "DT",
    "AVQ": "WRB",
    "CJC": "CC",
    "DPS": "PRP$",
    "DT0": "DT",
    "DTQ": "WDT",
    "EX0": "EX",
    "ITJ": "UH",
    "NN0": "NN",
    "NN1": "NN",
    "NN2": "NNS",
    "NP0": "NNP",
    "PNI": "NN",
    "PNP": "PRP",
    "PNQ": "WP",
    "PRP": "IN",
    "UNC": "NN",
    "VM0": "MD",
}

# HanTa's English model is a pickle, and unpickling runs code: only this file, which HanTa 1.2.1 ships, is loaded.
_HANTA_VERSION = "1.2.1"
_HANTA_MODEL = "morphmodel_en.pgz"
_HANTA_SHA256 = "99ddc9b14b3fe604b245e2d7a3aef59ab1bdd06b1bae4f4ce74738902e2a0265"


def word_types(words: Sequence[str], tagger: Tagger | None = None, in_context: bool = True) -> list[WordType]:
    r"""Classify each word of an answer by its part of speech.

    The classes are those of Token Activation Map's evaluation (TAM; Li et al., ICCV 2025). Nouns: NN, NNS, NNP, NNPS.
    Function words: CC, DT, EX, MD, POS, PRP, PRP$, UH, WDT, WP, WP$, WRB; this excludes prepositions and numbers.
    Strings without a letter or digit are ``'other'``, regardless of their tag.

    Args:

        words (Sequence[str]): The answer's words in order, such as the texts of
                    :attr:`Explanation.words <captum_intramodal.Explanation.words>`.
        tagger (Callable, optional): Function from a list of words to one pair (word, Penn Treebank tag) per word, such
                    as ``nltk.pos_tag``, or a lookup in a data set's annotations.
                    Default: ``None``, HanTa's English model
        in_context (bool): Tag the words as a sentence. If ``False``, tag each word alone, as TAM does: "stands" in "a
                    dog stands" is then tagged as a plural noun.
                    Default: ``True``

    Returns:
        **types** (*list[str]*):
            ``'noun'``, ``'function'`` or ``'other'`` for each word.

    Raises:
        ImportError: No tagger is given, and HanTa is not installed or ships a model that is not known to be safe.
        InvalidInputError: The tagger does not return one pair per word.

    Examples::

        >>> from captum_intramodal.metrics import word_types
        >>> word_types(["a", "dog", "stands", "on", "the", "beach", "."])
        ['function', 'noun', 'other', 'other', 'function', 'noun', 'other']
    """
    sentences = [list(words)] if in_context else [[word] for word in words]
    pairs = [pair for sentence in sentences for pair in (tagger or _tag_with_hanta)(sentence)]
    if len(pairs) != len(words):
        raise InvalidInputError(
            f"The tagger must return a tag for each of {len(words)} words, but it returned {len(pairs)}."
        )
    return [
        _TYPES.get(tag, "other") if any(char.isalnum() for char in word) else "other"
        for word, (_, tag) in zip(words, pairs, strict=True)
    ]


def match_categories(words: Sequence[str], categories: Sequence[str]) -> list[str | None]:
    r"""Find the category that each word names.

    Words match names regardless of case, number and possessive endings: "Buses" names "bus", "people" names "person",
    "dog's" names "dog". A name of several words ("traffic light", "dining_table") matches the same number of adjacent
    words. Longer names take precedence: in "hot dogs" neither word names "dog". Synonyms and parts of speech are not
    considered; use :func:`word_types` to find nouns.

    Args:

        words (Sequence[str]): The answer's words in order.
        categories (Sequence[str]): Names of categories, with words separated by spaces or underscores.

    Returns:
        **names** (*list[str or None]*):
            For each word the category that it, or the phrase that it belongs to, names; the first of equally long
            ones.

    Raises:
        ImportError: inflect is not installed.
        InvalidInputError: A category's name is empty.

    Examples::

        >>> from captum_intramodal.metrics import match_categories
        >>> match_categories(["two", "Buses", "at", "a", "traffic", "light"], ["light", "traffic light", "bus"])
        [None, 'bus', None, None, 'traffic light', 'traffic light']
    """
    names = [(category, [_number_forms(part) for part in re.findall(r"[^\s_]+", category)]) for category in categories]
    if unnamed := [category for category, parts in names if not parts]:
        raise InvalidInputError(f"Categories must have a name, got {unnamed[0]!r}.")
    names.sort(key=lambda name: -len(name[1]))
    forms = [_number_forms(word) for word in words]
    matches: list[str | None] = []
    while len(matches) < len(forms):
        remaining = forms[len(matches) :]
        for category, parts in names:
            if len(parts) <= len(remaining) and all(a & b for a, b in zip(parts, remaining, strict=False)):
                matches += [category] * len(parts)
                break
        else:
            matches.append(None)
    return matches


def _tag_with_hanta(words: list[str]) -> list[tuple[str, str]]:
    """Tag the words of a sentence with Penn Treebank tags."""
    # Case is ignored because HanTa would tag capitalized nouns, as at the start of an answer, as names.
    tagged = _load_hanta().tag_sent(words, casesensitive=False)
    return [(word, _PENN.get(tag, tag)) for word, _, tag in tagged]


@cache
def _load_hanta() -> Any:
    """Load HanTa's English model from its package, after checking the file's digest."""
    module = _import_optional("HanTa.HanoverTagger")
    # HanTa would load a file of this name in the current directory first; an absolute path prevents that.
    path = Path(str(module.__file__)).resolve().with_name(_HANTA_MODEL)
    digest = sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if digest != _HANTA_SHA256:
        raise ImportError(
            f"HanTa's English model was not loaded, because it is not the one that HanTa {_HANTA_VERSION} ships: "
            f"expected SHA-256 {_HANTA_SHA256}, found {digest}. Upgrade or downgrade HanTa: "
            f"pip install --force-reinstall HanTa=={_HANTA_VERSION}; or pass a tagger."
        )
    return module.HanoverTagger(str(path))


@cache
def _inflect_engine() -> Any:
    """Create inflect's engine."""
    return _import_optional("inflect").engine()


@cache
def _number_forms(word: str) -> frozenset[str]:
    """Return a word without its possessive ending, and its singular if it is a plural."""
    plain = re.sub(r"['’]s$", "", word.casefold())
    singular = _inflect_engine().singular_noun(plain) if plain else ""
    return frozenset((plain, singular or plain))


def _import_optional(name: str) -> ModuleType:
    """Import a module of an optional dependency; explain how to install it if it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"Types of words need {package}, which is not installed: pip install 'captum-intramodal[evaluate]'."
        ) from error
