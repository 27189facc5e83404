"""``ullme encode``, ``ullme index`` and ``ullme search`` on a tiny LLM, and their mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_helpers import save_sentence_transformer
from search_helpers import contents, encoded, write_corpus

from ullme.commands import encode, index, search
from ullme.models.checkpoint import save_adapter
from ullme.search.encode import EncodeSettings
from ullme.search.shards import Shards


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture
def command(place, llm_folder) -> list[str]:
    corpus = str(write_corpus(place / "corpus.jsonl"))
    common = ["--corpus", corpus, "--shard_rows=4", "--max_length=64", "--device=cpu", "--dtype=float32"]
    return [llm_folder("llama"), *common, "--progress=false"]


@pytest.fixture
def folder(place, command) -> Path:
    if not (place / "e").exists():
        assert encode.main([*command, "--to", str(place / "e")]) == 0
    return place / "e"


def test_encode_in_two_jobs(folder, command, place, capsys):
    assert encode.main([*command, "--to", str(place / "two"), "--shard=1/2"]) == 0
    assert "4 of 10 documents encoded by this command; other shards are still missing" in capsys.readouterr().out
    assert encode.main([*command, "--to", str(place / "two"), "--shard=0/2"]) == 0
    assert "6 of 10 documents encoded by this command; all shards are there" in capsys.readouterr().out
    assert contents(place / "two") == contents(folder)
    assert encode.main([*command, "--to", str(folder)]) == 0
    assert "0 of 10 documents encoded" in capsys.readouterr().out


def test_another_prompt_is_refused(folder, command, capsys):
    assert encode.main([*command, "--to", str(folder), "--passage_prompt=other: {text}"]) == 2
    error = capsys.readouterr().err
    assert "the prompts, field passage was '{text}' and is 'other: {text}' now; give another folder" in error
    assert error.count("\n") == 1


def test_a_folder_of_other_files_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "load_model", lambda *_: pytest.fail("too late"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    assert encode.main(["llm", "--corpus", corpus, "--to", str(tmp_path / "other")]) == 2
    assert "holds thesis.txt; name a new or an empty folder" in capsys.readouterr().err


def test_search_for_a_text(folder, capsys):
    assert search.main([str(folder), "title 3 text of document n3", "--k=2", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("text of document" in line for line in lines)
    assert search.main([str(folder), "title 3", "--k=1", "--json", "--device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"score", "id", "text"}


def test_index_and_search_for_queries(folder, place, capsys):
    pytest.importorskip("bm25s")
    assert index.main([str(folder), "--factory=none", "--bm25"]) == 0
    assert "BM25 of 10 documents" in capsys.readouterr().out
    (place / "q.tsv").write_text("q1\tdocument n3\nq2\tdocument n4\n")
    run = ["--queries", str(place / "q.tsv"), "--to", str(place / "run.trec"), "--k=1", "--device=cpu"]
    assert search.main([str(folder), "--method=bm25", *run]) == 0
    assert "2 documents for 2 queries, BM25" in capsys.readouterr().out
    rows = [line.split() for line in (place / "run.trec").read_text().splitlines()]
    assert [(row[0], row[2], row[3], row[5]) for row in rows] == [
        ("q1", "d3", "1", "ullme-bm25"),
        ("q2", "d4", "1", "ullme-bm25"),
    ]
    assert search.main([str(folder), "--method=fused", *run]) == 0
    assert "fusion of exact search and BM25" in capsys.readouterr().out


def test_judged_queries_choose_the_weight_of_fusion(place, command, capsys):
    pytest.importorskip("bm25s")
    folder = place / "judged"
    assert encode.main([*command, "--to", str(folder)]) == 0
    (place / "j.tsv").write_text("q1\tdocument n3\nq2\tdocument n4\n")
    (place / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t1\nq2\td4\t1\n")
    (place / "other.tsv").write_text("q1\tx\t1\n")
    for name, message in (
        ("none", "none.tsv: no such file; give lines of query id, document id and grade"),
        ("other", f"--qrels judges no document of {folder}, but such as ['x']"),
        ("qrels", f"{folder} has no BM25 index; build it with"),
    ):
        argv = [str(folder), "--factory=none", f"--queries={place}/j.tsv", f"--qrels={place}/{name}.tsv"]
        assert index.main(argv) == 2
        assert message in capsys.readouterr().err
    with (place / "qrels.tsv").open("a") as file:
        file.write("q1\tgone\t1\n")
    judged = [f"--queries={place}/j.tsv", f"--qrels={place}/qrels.tsv", "--device=cpu"]
    assert index.main([str(folder), "--factory=none", "--bm25", *judged]) == 0
    out, error = capsys.readouterr()
    assert "index: 1 judgements of" in error
    assert "are left out, and with them 0 queries" in error
    assert f"{folder}/fusion: by scores dense weight 0." in out
    assert "by nDCG@10 of 2 judged queries (0: 100.0, " in out
    weight = out.partition("by scores dense weight ")[2].partition(",")[0]
    run = [f"--queries={place}/j.tsv", f"--to={place}/j.trec", "--method=fused", "--k=1", "--device=cpu"]
    assert search.main([str(folder), *run]) == 0
    assert f"by scores, dense weight {weight}\n" in capsys.readouterr().out
    assert [line.split()[2] for line in (place / "j.trec").read_text().splitlines()] == ["d3", "d4"]
    assert search.main([str(folder), *run, "--dense_weight=0.9", "--fusion=rrf"]) == 0
    assert "by rrf, dense weight 0.9\n" in capsys.readouterr().out
    assert search.main([str(folder), "document n3", "--method=fused", "--device=cpu"]) == 0
    assert capsys.readouterr().err.endswith(f"dense weight {weight}\n")


def test_a_faiss_index_prints_its_recall(folder, place, capsys):
    pytest.importorskip("faiss")
    (place / "q.jsonl").write_text('{"_id": 1, "text": "document"}\n')
    for more, on in ([], "10 documents of the corpus"), (["--queries", str(place / "q.jsonl")], "1 queries"):
        assert index.main([str(folder), "--device=cpu", *more]) == 0
        assert f"Flat, recall@10 1.0000 of exact search, on {on}" in capsys.readouterr().out
    assert search.main([str(folder), "document", "--device=cpu"]) == 0


@pytest.mark.slow
def test_adapters_and_sentence_transformers(make_model, place, command, capsys):
    adapter = save_adapter(make_model(), place / "adapter")
    for model, more in ((adapter, []), (save_sentence_transformer(place), ["--truncate_dim=8"])):
        to = place / f"of-{model.name}"
        assert encode.main([str(model), *command[1:], *more, "--to", str(to)]) == 0, capsys.readouterr().err
        assert len(Shards(to)) == 10
        assert search.main([str(to), "title 3 text of document n3", "--k=1", "--device=cpu"]) == 0
        assert "text of document" in capsys.readouterr().out


def fails(capsys, *argv: str) -> str:
    """The one line that ``ullme search`` prints."""
    assert search.main([*argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_folders_and_queries_are_named_before_the_model_is_loaded(tmp_path, capsys):
    """The folder's model does not exist, so a search that came as far as to load it would say so."""
    pytest.importorskip("bm25s")
    folder = encoded(tmp_path / "e")
    assert index.main([str(folder), "--factory=none", "--bm25"]) == 0
    to = ["--to", str(tmp_path / "run.trec")]
    (tmp_path / "none.jsonl").write_text("\n")
    assert "none.jsonl holds no query; give at least one" in fails(
        capsys, str(folder), "--queries", str(tmp_path / "none.jsonl"), *to
    )
    (tmp_path / "tab.jsonl").write_text('{"_id": "a\\tb", "text": "c"}\n')
    error = fails(capsys, str(folder), "--queries", str(tmp_path / "tab.jsonl"), *to)
    assert r"the id 'a\tb' holds white space, which separates the fields of a TREC run" in error
    vectors = folder / "shard-00001.npy"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-1])
    error = fails(capsys, str(folder), "text", "--method=bm25")
    assert f"shard-00001.npy has {len(whole) - 1} bytes instead of {len(whole)}); the same `ullme encode`" in error
    vectors.write_bytes(whole)
    newer = encoded(tmp_path / "newer" / "e", settings=EncodeSettings(precision="float16"))
    (folder / "bm25").rename(newer / "bm25")
    error = fails(capsys, str(newer), "text", "--method=bm25")
    assert "is an index of other shards than are in" in error
    assert f"run `ullme index {newer}` again" in error


MISTAKES = [
    (encode, [], "nothing to encode with: name a run folder"),
    (encode, ["model"], "give --corpus FILE, FOLDER or DATASET, and --to FOLDER"),
    (encode, ["model", "--corpus=no.jsonl", "--to=x"], "--corpus no.jsonl: no such file"),
    (encode, ["model", "--corpus=no.jsonl", "--to=x", "--precision=int4"], "--precision int4: choose"),
    (encode, ["model", "--corpus=no.jsonl", "--to=x", "--shard=2/2"], "--shard 2/2: give I/N"),
    (index, [], "name a folder that `ullme encode --to` wrote"),
    (index, ["x", "--factory=none"], "--factory none builds no index"),
    (index, ["x", "--qrels=q.tsv"], "--qrels q.tsv judges queries; name their file with --queries"),
    (index, ["x", "--sample=0"], "--sample 0 must be at least 1"),
    (search, [], "name a folder that `ullme encode --to` wrote"),
    (search, ["x"], "give a text to search for, or --queries FILE --to FILE"),
    (search, ["x", "y", "--queries=q"], "give a text to search for, or --queries FILE --to FILE"),
    (search, ["x", "--queries=q"], "--queries FILE and --to FILE belong together"),
    (search, ["x", " "], "the text to search for is empty"),
    (search, ["x", "y", "--k=0"], "--k 0 must be at least 1"),
    (search, ["x", "y", "--fusion=z"], "--fusion z: choose scores, rrf"),
    (search, ["x", "y", "--method=z"], "--method z: choose dense, bm25, fused"),
    (search, ["x", "y"], "x has no manifest.json; give a folder that `ullme encode --to` wrote"),
]


@pytest.mark.parametrize(("module", "argv", "message"), MISTAKES)
def test_mistakes_are_one_line(module, argv, message, capsys):
    assert module.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", [encode, index, search])
def test_help_explains_every_option(module):
    for action in module.parser()._actions:
        assert action.help, action.dest
