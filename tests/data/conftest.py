from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, so that every text has tokens of its own and the text can be read back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def write_jsonl(tmp_path: Path):
    def write(rows, name="train.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def rows():
    """41 rows; row i has i % 5 negatives of its own and 1 or 2 positives."""
    return [
        {
            "query": f"query {i}",
            "pos": [f"positive {i}.{k}" for k in range(1 + i % 2)],
            "neg": [f"negative {i}.{k}" for k in range(i % 5)],
        }
        for i in range(41)
    ]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    root = os.environ.get("ULLME_SHARED")
    if not root or not (Path(root) / "data").is_dir():
        pytest.skip("ULLME_SHARED does not name the folder with the real data")
    return Path(root) / "data"


@pytest.fixture
def no_file_is_too_small(monkeypatch):
    """Rows of the smallest file have an index in the cache, too."""
    monkeypatch.setattr("ullme.data.row_index.SMALLEST", 0)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def checked(monkeypatch):
    """Counts the rows that are checked."""
    from ullme.data import checked_rows

    count = [0]
    add = checked_rows.CheckedRows.add

    def counting(self, *args):
        count[0] += 1
        return add(self, *args)

    monkeypatch.setattr(checked_rows.CheckedRows, "add", counting)
    return count
