"""``data.mixture_alpha`` over the entries of one ``data.train`` list."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ullme.data.datamodule import ULLMEDataModule
from ullme.data.mixture import Mixture, TrainSet
from ullme.data.train_rows import datasets_of_entries


def write(path: Path, rows: int) -> str:
    lines = [{"query": f"{path.stem} {n}", "pos": [f"to {path.stem} {n}"], "grade": n} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def batches(data: ULLMEDataModule) -> list[list[int]]:
    data.setup("fit")
    return [[row for row, _ in batch] for batch in data._sampler(0, 1)]


def test_entries_of_a_list_are_weighed_by_rows_to_the_power_alpha(tmp_path, caplog):
    """32 and 8 rows, 8 and 2 batches of 4. α = 0.5: the roots of 8 and 2 are as 2 to 1, of 10 batches 7 and 3."""
    folder = tmp_path / "en"
    folder.mkdir()
    write(folder / "train-0.jsonl", 20), write(folder / "train-1.jsonl", 12)  # an entry may be several files
    train = [str(folder), write(tmp_path / "vi.jsonl", 8)]
    options = {"batch_size": 4, "num_hard_negatives": 0, "num_workers": 0, "columns": ["grade"]}
    plain = ULLMEDataModule(train, **options)
    found = batches(plain)
    assert not isinstance(plain.source, Mixture)
    assert "mixture_alpha" not in plain.state_dict()
    assert any(len({row < 32 for row in batch}) == 2 for batch in found)  # without α a batch is of any file
    weighed = ULLMEDataModule(train, mixture_alpha=0.5, **options)
    with caplog.at_level("INFO"):
        found = batches(weighed)
    assert all(len({row < 32 for row in batch}) == 1 for batch in found)
    assert Counter(batch[0] < 32 for batch in found) == {True: 7, False: 3}
    assert weighed.state_dict()["mixture_alpha"] == 0.5
    assert "vi.jsonl: 3 of 10 batches of an epoch, 1.50 passes over its rows" in caplog.text
    assert weighed.source.columns == {"grade": "query"}


def test_a_row_is_in_the_same_place_with_and_without_alpha(tmp_path):
    train = [write(tmp_path / "a.jsonl", 8), write(tmp_path / "b.jsonl", 8)]
    sources = []
    for alpha in (1.0, 0.5):
        data = ULLMEDataModule(train, mixture_alpha=alpha, batch_size=4, num_hard_negatives=0)
        data.setup("fit")
        sources.append([data.source[row].query for row in range(16)])
    assert sources[0] == sources[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "a.jsonl"}, r"data\.train='a\.jsonl' is one dataset; list its files"),
        ({"train": ["a.jsonl"]}, r"data\.train=\['a\.jsonl'\] is one dataset"),
        ({"max_rows": 5}, r"data\.max_rows='5' is of all rows together; give each entry its own in data\.datasets"),
        ({"columns": {"score": "teacher.jsonl"}}, r"data\.columns='teacher\.jsonl' is of all rows together"),
    ],
)
def test_what_cannot_be_weighed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        datasets_of_entries(TrainSet(**{"train": ["a.jsonl", "b.jsonl"], **options}), 0.5)
    assert len(datasets_of_entries(TrainSet(["a.jsonl", "b.jsonl"], columns=["grade"]), 0.5)) == 2
