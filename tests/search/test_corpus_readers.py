"""Datasets: which are refused, and how a worker elsewhere gets one. The readers' rows are tested with the corpus."""

from __future__ import annotations

import pickle

import datasets
import pytest

from ullme.search.corpus import check_corpus, open_corpus
from ullme.search.corpus_readers import DatasetReader

ROWS = [{"_id": f"d{n}", "text": f"text {n}"} for n in range(3)]


@pytest.fixture
def two() -> datasets.DatasetDict:
    return datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("corpus", "queries")})


def test_a_dataset_that_cannot_be_loaded(two, monkeypatch):
    def nothing(name, config, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(ValueError, match=r"--corpus no/dataset .*no network"):
        open_corpus("no/dataset")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: two)
    with pytest.raises(ValueError, match="splits corpus, queries; choose one with --corpus_split"):
        open_corpus("two/splits")


def test_splits_of_a_folder(two, tmp_path):
    two.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="two has the splits corpus, queries, and no --corpus_split test"):
        open_corpus(str(tmp_path / "two"), split="test")
    assert check_corpus(open_corpus(str(tmp_path / "two"), split="queries")).documents == 3


def test_a_worker_reads_a_folder_that_was_named_from_elsewhere(tmp_path, monkeypatch):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(DatasetReader("saved", None, None))
    monkeypatch.chdir("/")
    assert [row.content for row in pickle.loads(sent).rows()] == ROWS
