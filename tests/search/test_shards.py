"""Shards hold what was written, are there whole or not at all, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from search_helpers import StubEmbedder, corpus_of, encoded

from ullme.search import shards
from ullme.search.corpus import Document
from ullme.search.encode import EncodeSettings, encode_corpus
from ullme.search.shards import Shards, quantized
from ullme.utils.atomic_files import StorageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return encoded(tmp_path_factory.mktemp("shards") / "e")


def expected(number: int = 10) -> np.ndarray:
    return StubEmbedder().embed([f"title {n} text of document n{n}" for n in range(number)], "passage", max_length=1)


def test_what_is_read_is_what_was_embedded(folder):
    opened = Shards(folder, check_hashes=True)
    assert (len(opened), opened.dimensions, opened.sizes) == (10, 16, [4, 4, 2])
    for size, firsts in ((3, [0, 3, 4, 7, 8]), (100, [0, 4, 8])):
        blocks = list(opened.blocks(size))
        assert [first for first, _ in blocks] == firsts
        assert np.array_equal(np.concatenate([block for _, block in blocks]), expected())
    assert list(opened.all_ids()) == [f"d{n}" for n in range(10)]
    assert [d.id for d in opened.all_documents()] == [f"d{n}" for n in range(10)]
    rows = [9, 0, 4, 4, 3]
    assert opened.ids(rows) == ["d9", "d0", "d4", "d4", "d3"]
    assert opened.documents(rows) == [Document(f"d{n}", f"title {n} text of document n{n}") for n in rows]
    assert np.array_equal(opened.vectors(rows), expected()[rows])
    assert opened.ids([]) == []
    with pytest.raises(IndexError, match="0 to 9"):
        opened.ids([10])


def test_the_manifest_says_what_the_embeddings_are(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == {"name": "stub", "kind": "stub", "revision": "1", "options": {}}
    assert (manifest["role"], manifest["max_length"], manifest["precision"]) == ("passage", 512, "float32")
    assert (manifest["similarity"], manifest["dimensions"], manifest["truncate_dim"]) == ("cosine", 16, None)
    assert manifest["corpus"]["documents"] == 10
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert set(manifest["shards"][2]["files"]) == {f"shard-00002.{kind}" for kind in ("npy", "ids.npy", "jsonl")}


@pytest.mark.parametrize(("precision", "error"), [("float16", 2.0**-12), ("int8", 0.5 / 127)])
def test_precisions(precision, error, tmp_path):
    opened = Shards(encoded(tmp_path / "e", settings=EncodeSettings(precision=precision)))
    read = opened.vectors(range(10))
    assert read.dtype == np.float32
    assert 0 < np.abs(read - expected()).max() <= error
    assert np.array_equal(np.concatenate([block for _, block in opened.blocks()]), read)
    assert np.load(opened.folder / "shard-00000.npy").dtype == precision


def test_int8_by_hand():
    codes, scales = quantized(np.array([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [0.0, 254.0, 3.1]], np.float32))
    assert codes.tolist() == [[127, -64, 32], [0, 0, 0], [0, 127, 2]]  # 63.5 is rounded to the even number
    assert scales.tolist() == [np.float32(1 / 127), 0.0, 2.0]


def test_truncated_vectors_are_normalised_again(tmp_path):
    found = Shards(encoded(tmp_path / "e", settings=EncodeSettings(truncate_dim=5)))
    assert found.dimensions == 5
    cut = expected()[:, :5]
    assert np.allclose(found.vectors(range(10)), cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match="--truncate_dim 17: the model has 16 dimensions"):
        encoded(tmp_path / "more", settings=EncodeSettings(truncate_dim=17))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_a_vector_that_is_not_finite(bad, tmp_path):
    class Broken(StubEmbedder):
        def embed(self, texts, role, **options):
            out = super().embed(texts, role, **options)
            out[1, 2] = bad
            return out

    corpus = corpus_of(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="the embedding of document 'd1' is not finite in float16"):
        encode_corpus(Broken(), corpus, tmp_path / "e", EncodeSettings(precision="float16"))
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["manifest.json"]


def damage_truncate(folder: Path) -> None:
    (folder / "shard-00001.npy").write_bytes((folder / "shard-00001.npy").read_bytes()[:-1])


def damage_remove(folder: Path) -> None:
    (folder / "shard-00001.ids.npy").unlink()


def damage_record(folder: Path) -> None:
    (folder / "shard-00001.json").write_text("{")


def damage_change(folder: Path) -> None:
    content = bytearray((folder / "shard-00001.npy").read_bytes())
    content[-1] ^= 1
    (folder / "shard-00001.npy").write_bytes(content)


DAMAGES = {
    damage_truncate: r"shard-00001.npy has \d+ bytes instead of \d+",
    damage_remove: "shard-00001.ids.npy is missing",
    damage_record: "shard-00001.json is damaged",
    damage_change: r"shard-00001.npy has other content .*SHA-256",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_written_anew(damage, tmp_path):
    folder = encoded(tmp_path / "e")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    damage(folder)
    with pytest.raises(ValueError, match=rf"1 of 3 shards .*{DAMAGES[damage]}.*same `ullme encode` command"):
        Shards(folder, check_hashes=True)
    if damage is not damage_change:  # found by its hash alone, which a resumed command does not compute
        encoded(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest.json; give a folder that `ullme encode --to` wrote"):
        Shards(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        Shards(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, and this version of ullme reads 1; update"):
        Shards(tmp_path)


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    inner = shards._HashingFile.write

    def full(self, data):
        if self.file.name.endswith("shard-00001.jsonl") and self.bytes > 0:
            raise OSError(28, "No space left on device")
        return inner(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(shards._HashingFile, "write", full)
        with pytest.raises(
            StorageError, match=r"shard-00001.jsonl' cannot be written \(No space left on device\).*--to"
        ):
            encoded(tmp_path / "e")
    assert shards.missing_shards(tmp_path / "e", range(3)) == [1, 2]
    assert not list((tmp_path / "e").glob(".*"))
    encoded(tmp_path / "e")
    whole = encoded(tmp_path / "other" / "e")
    assert {p.name: p.read_bytes() for p in whole.iterdir()}.keys() == {p.name for p in (tmp_path / "e").iterdir()}
    assert len(Shards(tmp_path / "e", check_hashes=True)) == 10
