from __future__ import annotations

import gzip
import json

import pytest

from ullme.eval.local_files import read_table
from ullme.eval.local_tasks import retrieval_task

COLUMNS = ("sentence1", "sentence2", "score")
PAIRS = [("a, or b", "c", "4.5"), ("d", "e", "0")]


def rows(path):
    return [tuple(str(row[name]) for name in COLUMNS) for _, row in read_table(path, COLUMNS, "sts")]


def test_pairs_are_read_in_the_formats_of_training_rows(tmp_path):
    (tmp_path / "pairs.tsv").write_text("\t".join(COLUMNS) + "\n" + "".join("\t".join(p) + "\n" for p in PAIRS))
    (tmp_path / "pairs.csv").write_text(",".join(COLUMNS) + '\n"a, or b",c,4.5\nd,e,0\n')
    lines = "".join(json.dumps(dict(zip(COLUMNS, pair, strict=True))) + "\n" for pair in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(lines)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for kind in ("tsv", "csv", "jsonl", "jsonl.gz"):
        assert rows(tmp_path / f"pairs.{kind}") == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence1,sentence2,score\na, or b,c,4.5\n", r"pairs\.csv, line 2 has more cells than the header"),
        ("sentence1,sentence2\na,b\n", r"pairs\.csv, line 2 lacks 'score'"),
        ("", r"pairs\.csv holds no rows"),
    ],
)
def test_a_csv_file_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_bytes("sentence1\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"no CSV file in UTF-8.*save it as UTF-8"):
        rows(tmp_path / "pairs.csv")


def test_judgements_of_another_split(tmp_path):
    """evaluate.py has no option data.val_split."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "a"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
    (tmp_path / "qrels" / "dev.tsv").write_text("q\td\t1\n")
    with pytest.raises(
        ValueError, match=r"test\.tsv: no such file; qrels holds the splits \['dev'\].*copy it"
    ) as error:
        retrieval_task(tmp_path)
    assert "val_split" not in str(error.value)
