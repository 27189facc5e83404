"""What BM25 takes for a word."""

from __future__ import annotations

import json

import pytest

from ullme.mining.corpus import bm25_folder
from ullme.search import bm25, index_files
from ullme.search.corpus import open_corpus

bm25s = pytest.importorskip("bm25s")

POEM = ["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡"]
CITIES = ["東京タワーは高い", "京都の寺 ABC12", "a tower in Paris", "서울 타워"]


@pytest.fixture
def shards(tmp_path):
    def build(texts: list[str], name: str = "corpus"):
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"_id": str(n), "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
        file.write_text("\n".join(lines), encoding="utf-8")
        return bm25_folder(open_corpus(str(file)), tmp_path / name, "none")

    return build


@pytest.mark.parametrize(
    ("texts", "query", "best"),
    [
        (POEM, "故乡", 3),
        (POEM, "望明月", 2),
        (CITIES, "タワー", 0),
        (CITIES, "寺", 1),
        (CITIES, "abc12", 1),
        (CITIES, "타워", 3),
    ],
)
def test_texts_without_spaces_are_found(shards, texts, query, best):
    """llama_index's issue 13866: a line of Chinese was one word, which no query has."""
    scores, rows = bm25.open_index(shards(texts)).search([query], 4)
    assert rows[0, 0] == best
    assert scores[0, 0] > max(scores[0, 1], 0)


def test_words_of_other_scripts_are_those_of_bm25s():
    texts = ["Don't split U.S. e-mail_2 naïve", "Где находится башня?", "서울 타워 x", "ab-c d", ""]
    theirs = bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
    assert bm25.tokenized(texts, "none") == theirs
    assert theirs[1] == ["где", "находится", "башня"]


def test_an_index_of_an_earlier_release_is_asked_as_it_was_made(shards):
    built = shards(POEM)
    description = index_files.read_description(built, bm25.FOLDER)
    assert bm25.BM25Index(built, description).tokens == bm25.WORDS
    del description["tokens"]
    assert next(bm25.BM25Index(built, description).all_scores(["故乡"])).max() == 0  # one word of two characters


def test_the_same_documents_give_the_same_files_in_every_process(shards, monkeypatch):
    """Python's set of words has another order in each process, which a set in reverse order stands for here."""
    texts = ["one two three", "three four", "five six seven eight"]
    first = shards(texts, "first")

    class Reversed(set):
        def __iter__(self):
            return iter(sorted(super().__iter__(), reverse=True))

    monkeypatch.setattr("bm25s.set", Reversed, raising=False)
    second = shards(texts, "second")
    found = [{p.name: p.read_bytes() for p in (one.folder / bm25.FOLDER).iterdir()} for one in (first, second)]
    assert found[0] == found[1]
    assert json.loads(found[0]["vocab.index.json"])["one"] == 0
