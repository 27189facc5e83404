"""Which written queries are kept."""

from __future__ import annotations

import pytest

from ullme.models.query_likelihood import mean_query_logps
from ullme.query_generation.round_trip import BM25Ranker, Kept, LikelihoodRanker, RoundTripSettings, Texts, rank_parts
from ullme.query_generation.writer import WrittenQuery

pytest.importorskip("bm25s")

TEXTS = {
    "fleas": "a flea lives for a hundred days on a dog",
    "dogs": "the dog is a domestic animal and a dog barks",
    "cats": "cats sleep",
    "copy": "cats sleep",
}


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(list(TEXTS), list(TEXTS.values()))


def query(document: str, text: str, number: int = 0) -> WrittenQuery:
    return WrittenQuery(document, number, text)


def test_bm25_ranks(texts):
    asked = [
        query("fleas", "how long does a flea live on a dog"),
        query("dogs", "dog"),
        query("fleas", "dog"),  # once in a longer text than the other
        query("copy", "do cats sleep"),  # a copy is no other document
        query("cats", "dog"),
        query("cats", "the of"),  # stop words only
    ]
    assert BM25Ranker(texts).ranks(asked) == [1, 1, 2, 1, None, None]


def test_likelihood_ranks(texts, make_model):
    """Among BM25's documents and the own one, by the likelihood itself."""
    model = make_model()
    asked = [query("fleas", "dog days"), query("dogs", "dog days"), query("cats", "dog days")]
    ranker = LikelihoodRanker(texts, model, RoundTripSettings("likelihood", 1, 3))
    among = [("fleas", "dogs"), ("fleas", "dogs"), ("fleas", "dogs", "cats")]
    logps = {key: mean_query_logps(model, [("dog days", TEXTS[key])])[0] for key in ("fleas", "dogs", "cats")}
    expected = [
        sorted(names, key=lambda n: -logps[n]).index(one.document) + 1 for one, names in zip(asked, among, strict=True)
    ]
    assert ranker.ranks(asked) == expected
    assert sorted(expected[:2]) == [1, 2]


def test_reasons():
    kept = Kept(k=2)
    queries = [
        query("a", "What is a flea?"),
        query("a", ""),
        query("b", "what  is a FLEA"),
        query("b", "three"),
        query("c", "four"),
        query("c", "five"),
    ]
    found = list(kept.filter(queries, [1, 1, 1, 2, 3, None]))
    assert found == [queries[0], queries[3]]
    assert kept.counts == {"kept": 2, "empty": 1, "repeated": 1, "inconsistent": 2}
    assert list(kept.filter([query("d", "Three ")], [1])) == []  # of an earlier part


class Counting:
    def __init__(self, ranks) -> None:
        self.asked, self.found = [], ranks

    def ranks(self, queries):
        self.asked += queries
        return self.found[: len(queries)]


def test_ranks_are_computed_once(tmp_path):
    parts = [[query("a", "x"), query("b", "")], [query("c", "y")]]
    first = Counting([2])
    settings = RoundTripSettings()
    expected = [(parts[0], [2, None]), (parts[1], [2])]
    assert list(rank_parts(parts, tmp_path, settings, first, lambda n: None)) == expected
    assert first.asked == [parts[0][0], parts[1][0]]
    again = Counting([9])
    assert list(rank_parts(parts, tmp_path, RoundTripSettings(k=3), again, lambda n: None)) == expected
    assert again.asked == []
    other = Counting([9])
    found = list(rank_parts(parts, tmp_path, RoundTripSettings(stopwords="de"), other, lambda n: None))
    assert [ranks for _, ranks in found] == [[9, None], [9]]
    assert next(rank_parts(parts, tmp_path, RoundTripSettings("none"), None, lambda n: None))[1] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RoundTripSettings("dense"), "--round_trip dense: choose bm25, likelihood, none"),
        (RoundTripSettings(k=0), "--k 0 must be at least 1"),
        (RoundTripSettings("likelihood", 10, 5), "--k 10 of --candidates 5 keeps every query"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.check()


def test_a_corpus_without_words():
    with pytest.raises(ValueError, match="no document has a word"):
        Texts(["a"], ["1 ."])
