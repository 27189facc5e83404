"""What BM25 takes for a word, in any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import regex

# Chinese and Japanese are written without spaces: each of their characters is a word, as of most in Lucene's
# StandardTokenizer. Elsewhere a word is a run of two or more letters, digits and combining marks (Hindi's vowel signs
# are marks); `regex` counts marks as \w, which `re` does not.
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
WORDS = rf"[{_ALONE}]|[^\W{_ALONE}]{{2,}}"
# Thai, Lao, Khmer and Burmese have no spaces between words either, and an alphabet, whose letters tell little alone.
_UNSPACED = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_LETTER = regex.compile(r"\P{M}\p{M}*")


def words(texts: list[str], pattern: str = WORDS) -> Iterator[list[str]]:
    """The words of each text: of Chinese and Japanese the characters, and of Thai, Lao, Khmer and Burmese all pairs of
    neighbouring letters with their marks. Characters that Unicode calls compatible (NFKC) are the same.

    Args:
        texts: any.
        pattern: regular expression of a word; an index keeps the one it was made with.
    """
    find = _compiled(pattern).findall
    for text in texts:
        yield find(_UNSPACED.sub(_pairs, unicodedata.normalize("NFKC", text)))


@lru_cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _pairs(run: regex.Match[str]) -> str:
    """A run of letters as pairs of neighbours, with spaces between and around them."""
    letters = _LETTER.findall(run[0])
    pairs = ["".join(two) for two in pairwise(letters)]
    return f" {' '.join(pairs or letters)} "
