"""Words of scripts that Python's \\w cuts or that have no spaces."""

from __future__ import annotations

import unicodedata

import pytest

from ullme.search.words import words

THAI = ["แมวนอนบนเตียง", "น้ำตกอยู่ไกล", "นกบินสูง"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("שָׁלוֹם עֲלֵיכֶם", ["שָׁלוֹם", "עֲלֵיכֶם"]),
        ("นกบิน", ["นก", "กบิ", "บิน"]),
        ("ดี iPhoneรุ่น15", ["ดี", "iPhone", "รุ่น", "15"]),
        ("မြန်မာ", ["မြန်", "န်မာ"]),
        ("東京 naïve x_1", ["東", "京", "naïve", "x_1"]),
        ("ﬂow １２", ["flow", "12"]),
        ("", []),
    ],
)
def test_by_hand(text, expected):
    for form in ("NFC", "NFD"):
        found = next(words([unicodedata.normalize(form, text)]))
        assert found == [unicodedata.normalize("NFKC", word) for word in expected]


@pytest.mark.parametrize(("query", "best"), [("แมว", 0), ("น้ำตก", 1), ("นก", 2)])
def test_a_word_within_a_thai_text_is_found(query, best):
    (asked,) = words([query])
    shared = [len({*asked} & {*own}) for own in words(THAI)]
    assert shared[best] == len(asked) > 0
    assert sum(count == len(asked) for count in shared) == 1
