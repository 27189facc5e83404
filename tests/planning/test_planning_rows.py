from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest

from ullme.data.mixture import TrainSet
from ullme.planning.rows import DatasetShare, dataset_shares, epoch_rows, most_passages

LINE = json.dumps({"query": "q", "pos": ["p"]}) + "\n"


def data(train=None, datasets=None, max_rows=None, **options):
    options = {"batch_size": 4, "num_hard_negatives": 3, "num_positives": 1, "mixture_alpha": 1.0} | options
    return SimpleNamespace(train=train, train_split="train", datasets=datasets, max_rows=max_rows, **options)


def test_rows_of_each_kind_of_file(tmp_path):
    from pyarrow import Table, ipc, parquet

    (tmp_path / "rows.jsonl").write_text(LINE * 3 + "\n")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(LINE * 500)  # a few lines, as bytes
    table = Table.from_pylist([{"query": "q"}] * 40)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table.slice(0, 25))
    (tmp_path / "rows.csv").write_text("anchor,positive\na,b\nc,d\n")
    expected = {"jsonl": 3, "jsonl.gz": 500, "parquet": 40, "arrow": 25, "csv": 2}
    assert {kind: epoch_rows(data(str(tmp_path / f"rows.{kind}"))) for kind in expected} == expected
    assert epoch_rows(data([str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl.gz")])) == 503


def test_no_more_rows_than_there_are(tmp_path):
    """configs/base.yaml has max_rows: 279040, which a small file does not have."""
    file = tmp_path / "rows.jsonl"
    file.write_text(LINE * 8)
    assert [epoch_rows(data(str(file), max_rows=most)) for most in (None, 5, 279040)] == [8, 5, 8]
    assert epoch_rows(data("owner/set", max_rows=100)) == 100
    with pytest.raises(ValueError, match=r"data\.train='owner/set' is not a local file.*--rows"):
        epoch_rows(data("owner/set"))


def test_each_dataset_of_a_mixture_has_its_share_of_an_epoch(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(LINE * 10)
    sets = [
        TrainSet(str(file), terms=["info_nce"]),  # two batches of 4; two rows are left over
        TrainSet(str(file), max_rows=4, weight=3.0, num_hard_negatives=0),
        TrainSet(["owner/set", str(file)], max_rows=16, weight=0.5, num_positives=2),
    ]
    options = data(datasets=sets, max_rows=279040)
    assert dataset_shares(options) == [
        DatasetShare(str(file), 8, 3, 1, ("info_nce",)),
        DatasetShare(str(file), 12, 0, 1, None),
        DatasetShare(f"owner/set, {file}", 8, 3, 2, None),
    ]
    assert epoch_rows(options) == 8 + 12 + 8
    assert [share.rows for share in dataset_shares(data(datasets=sets[:1] + sets[2:], mixture_alpha=0.0))] == [12, 4]
    assert dataset_shares(data(str(file))) == []
    with pytest.raises(ValueError, match=r"4 rows, fewer than a batch of data\.batch_size=5"):
        dataset_shares(data(datasets=sets, batch_size=5))
    with pytest.raises(ValueError, match=r"data\.datasets: train='owner/set' is not a local file.*give it max_rows"):
        dataset_shares(data(datasets=[TrainSet("owner/set")]))


def test_the_dataset_with_the_most_passages_decides(tmp_path):
    """Its chunks must fit, whatever the numbers of the others and of ``data``."""

    def own(negatives, positives):
        return SimpleNamespace(num_hard_negatives=negatives, num_positives=positives)

    options = SimpleNamespace(num_hard_negatives=4, num_positives=2, datasets=None)
    assert most_passages(options) == (4, 2)
    assert most_passages(None) == (8, 1)
    options.datasets = [own(0, None), own(None, 5), own(7, None)]
    assert most_passages(options) == (4, 5)  # (0, 2), (4, 5), (7, 2); the first of equal ones
    options.datasets = [own(0, 1), own(1, 1)]
    assert most_passages(options) == (1, 1)
