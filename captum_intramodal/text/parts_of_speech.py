r"""What the words of an answer are: nouns, function words or others, and which category of a data set they name.

The tagger is HanTa (Wartena, "The Hanover Tagger", 2023), the number of a noun is inflect's business; both ship what
they know inside their wheels, so that nothing is downloaded: ``pip install "captum-intramodal[evaluate]"``. Another
tagger, such as ``nltk.pos_tag``, or the annotation of a data set takes its place as a function that gives tags of the
Penn Treebank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Literal

__all__ = ["Tagger", "WordType", "match_categories", "word_types"]

WordType = Literal["noun", "function", "other"]


# Words in their order -> each word with its Penn Treebank tag.
Tagger = Callable[[list[str]], Sequence[tuple[str, str]]]


# The classes of Token Activation Map's evaluation.
_TYPES: dict[str, WordType] = dict.fromkeys(("NN", "NNS", "NNP", "NNPS"), "noun")


_TYPES |= dict.fromkeys("CC DT EX MD POS PRP PRP$ UH WDT WP WP$ WRB".split(), "function")


# HanTa has the British National Corpus's C5 tags. Those that decide a type, or mean something else in the Penn
# Treebank, as its tags name them; a word without a class is a noun, as it is to other taggers.
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


def word_types(words: Sequence[str], tagger: Tagger | None = None, in_context: bool = True) -> list[WordType]:
    r"""The type of each word of an answer, by its part of speech.

    The classes are those of Token Activation Map's evaluation (Li et al., ICCV 2025). Nouns: NN, NNS, NNP, NNPS.
    Function words: CC, DT, EX, MD, POS, PRP, PRP$, UH, WDT, WP, WP$, WRB, so that neither prepositions nor numbers are
    among them. Signs without a letter or digit are ``'other'``, whatever the tagger says of them.

    Args:

        words (Sequence[str]): The answer's words in their order, such as the texts of
                    :attr:`Explanation.words <captum_intramodal.Explanation.words>`.
        tagger (Callable, optional): From a list of words to as many pairs of a word and its Penn Treebank tag, such as
                    ``nltk.pos_tag``, or a function that looks up a data set's own annotation.
                    Default: ``None``, HanTa's English model.
        in_context (bool): Tag the words as the sentence that they are. ``False`` tags each on its own, as TAM does:
                    then "stands" in "a dog stands" is the plural of a noun.
                    Default: ``True``

    Returns:
        **types** (*list[str]*):
            ``'noun'``, ``'function'`` or ``'other'`` for each word.

    Raises:
        ImportError: HanTa is not installed and no tagger is given.
        ValueError: the tagger does not return one pair for each word.

    Examples::

        >>> word_types(["a", "dog", "stands", "on", "the", "beach", "."])
        ['function', 'noun', 'other', 'other', 'function', 'noun', 'other']
    """
    sentences = [list(words)] if in_context else [[word] for word in words]
    pairs = [pair for sentence in sentences for pair in (tagger or _hanta)(sentence)]
    if len(pairs) != len(words):
        raise ValueError(f"The tagger must return a tag for each of {len(words)} words, but it returned {len(pairs)}.")
    return [
        _TYPES.get(tag, "other") if any(sign.isalnum() for sign in word) else "other"
        for word, (_, tag) in zip(words, pairs, strict=True)
    ]


def match_categories(words: Sequence[str], categories: Sequence[str]) -> list[str | None]:
    r"""The category that each word names.

    Words and names agree up to case, number and a possessive's ending: "Buses" names "bus", "people" names "person",
    "dog's" names "dog". A name of several words ("traffic light", "dining_table") is matched by as many adjacent words,
    longer names before shorter ones: in "hot dogs" neither word names "dog". Nothing is known of synonyms, nor of parts
    of speech: ask :func:`word_types` for the nouns.

    Args:

        words (Sequence[str]): The answer's words in their order.
        categories (Sequence[str]): Names of categories, their words apart by spaces or underscores.

    Returns:
        **names** (*list[str or None]*):
            For each word the category that it, or the words that it belongs to, names; the first of equally long ones.

    Raises:
        ImportError: inflect is not installed.
        ValueError: a category without a name.

    Examples::

        >>> match_categories(["two", "Buses", "at", "a", "traffic", "light"], ["light", "traffic light", "bus"])
        [None, 'bus', None, None, 'traffic light', 'traffic light']
    """
    names = [(category, [_numbers(part) for part in re.findall(r"[^\s_]+", category)]) for category in categories]
    if nameless := [category for category, parts in names if not parts]:
        raise ValueError(f"Categories must have a name, got {nameless[0]!r}.")
    names.sort(key=lambda name: -len(name[1]))
    forms = [_numbers(word) for word in words]
    found: list[str | None] = []
    while len(found) < len(forms):
        ahead = forms[len(found) :]
        for category, parts in names:
            if len(parts) <= len(ahead) and all(a & b for a, b in zip(parts, ahead, strict=False)):
                found += [category] * len(parts)
                break
        else:
            found.append(None)
    return found


def _hanta(words: list[str]) -> list[tuple[str, str]]:
    # Capitals, which begin every sentence of an answer, would make names of nouns.
    tagged = _hanta_model().tag_sent(words, casesensitive=False)
    return [(word, _PENN.get(tag, tag)) for word, _, tag in tagged]


@cache
def _hanta_model() -> Any:
    return _library("HanTa.HanoverTagger").HanoverTagger("morphmodel_en.pgz")


@cache
def _inflect_engine() -> Any:
    return _library("inflect").engine()


@cache
def _numbers(word: str) -> frozenset[str]:
    """A word without a possessive's ending and, in case it is a plural, its singular."""
    plain = re.sub(r"['’]s$", "", word.casefold())
    singular = _inflect_engine().singular_noun(plain) if plain else ""
    return frozenset((plain, singular or plain))


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"Types of words need {package}, which is not installed: pip install 'captum-intramodal[evaluate]'."
        ) from error
