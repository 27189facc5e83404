"""Which document a text is."""

from __future__ import annotations

import numpy as np
from search_helpers import encoded

from ullme.mining import text_hashes
from ullme.mining.text_hashes import TextHashes, hashes_of, text_hash
from ullme.search.shards import Shards


def test_white_space_and_case_do_not_count():
    assert text_hash("A  text\n") == text_hash("a text") != text_hash("atext")
    assert 0 <= text_hash("") < 2**64


def test_find(tmp_path, monkeypatch):
    monkeypatch.setattr(text_hashes, "BLOCK", 3)
    shards = Shards(encoded(tmp_path / "e"))
    hashes = TextHashes(shards, tmp_path / "hashes")
    texts = [document.text for document in shards.all_documents()]
    assert hashes.find([texts[7], "none", texts[0].upper(), texts[7]]).tolist() == [7, -1, 0, 7]
    assert hashes.find([]).tolist() == []
    assert hashes[np.array([4, 2])].tolist() == hashes_of([texts[4], texts[2]]).tolist()
    before = (tmp_path / "hashes").stat().st_mtime_ns
    assert TextHashes(shards, tmp_path / "hashes").find(texts).tolist() == list(range(10))
    assert (tmp_path / "hashes").stat().st_mtime_ns == before


def test_the_first_of_equal_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_hashes, "BLOCK", 2)
    monkeypatch.setattr(Shards, "all_documents", lambda self: iter([_Text(n % 3) for n in range(10)]))
    hashes = TextHashes(Shards(encoded(tmp_path / "e")), tmp_path / "hashes")
    assert hashes.find(["2", "0", "1"]).tolist() == [2, 0, 1]


class _Text:
    def __init__(self, number: int) -> None:
        self.text = str(number)
