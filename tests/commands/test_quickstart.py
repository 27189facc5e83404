from __future__ import annotations

import json
import math

import pytest

from ullme.commands import quickstart
from ullme.commands.quickstart import Scores, bm25_scores, main, table, training_terms
from ullme.demo.world import build_world

SMALL = ["--entities=120", "--pretrain_steps=30", "--hidden_size=64", "--num_layers=1"]
SHORT = ["--trainer.max_steps=30", "--data.batch_size=16", "--data.num_workers=0", "--model.optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"), train_entities=40, val_entities=12, distractors=30)


def write_beir(folder, corpus, queries, qrels):
    (folder / "qrels").mkdir()
    for name, texts in [("corpus", corpus), ("queries", queries)]:
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in texts.items())
        )
    lines = [f"{query}\t{doc}\t1\n" for query, doc in qrels.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def test_bm25_scores_by_hand(tmp_path):
    pytest.importorskip("bm25s")
    # "alpha" ranks a (alone) before b (diluted); the second query wants b, the third a document it shares no word with
    corpus = {"a": "alpha", "b": "alpha beta gamma delta", **{f"x{n}": f"word{n}" for n in range(150)}, "z": "zeta"}
    write_beir(tmp_path, corpus, {"1": "alpha", "2": "alpha", "3": "alpha"}, {"1": "a", "2": "b", "3": "z"})
    scores = bm25_scores(tmp_path)
    assert scores.ndcg_at_10 == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert scores.mrr_at_10 == pytest.approx((1 + 1 / 2) / 3)
    assert scores.recall_at_100 == pytest.approx(2 / 3)


def test_bm25_alone_does_not_solve_the_world(world):
    pytest.importorskip("bm25s")
    assert 0.4 < bm25_scores(world.dev_folder).ndcg_at_10 < 0.75


def test_table():
    lines = table({"untrained": Scores(0.0312, 0.02, 0.5), "trained": Scores(0.9, 0.85, 1.0)}).splitlines()
    assert [line.split() for line in lines] == [
        ["nDCG@10", "MRR@10", "Recall@100"],
        ["untrained", "3.1", "2.0", "50.0"],
        ["trained", "90.0", "85.0", "100.0"],
    ]


def test_training_terms_skips_rows_without_it(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("step,train/loss,train/kl,val/ndcg\n0,3.5,1,\n1,,,0.5\n2,1.5,,\n")
    assert training_terms(tmp_path) == {"total": [(0, 3.5), (2, 1.5)], "KL": [(0, 1.0)]}


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main([f"--output={tmp_path}"]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_config_is_explained(tmp_path, capsys):
    assert main([f"--output={tmp_path / 'out'}", f"--config={tmp_path / 'none.yaml'}"]) == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--hidden_size=48", "--hidden_size 48 must be a multiple of 32"),
        ("--pretrain_steps=0", "--pretrain_steps 0 must be at least 1"),
        ("--entites=20", "entites"),
        ("--output=README", "--output"),
    ],
)
def test_a_mistake_ends_before_anything_is_computed(option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").touch()
    monkeypatch.setattr("ullme.demo.world.build_world", lambda *_, **__: pytest.fail("too late"))
    assert main([option]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_an_earlier_quickstart_is_replaced(tmp_path):
    build_world(tmp_path / "run" / "world", train_entities=12, val_entities=12, dev_entities=12)
    (tmp_path / "run" / "old.txt").write_text("old")
    quickstart._clear_output(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_training_wins(tmp_path, capsys):
    """The whole quickstart, smaller: the trained embedder beats the untrained one on entities neither has seen."""
    output = tmp_path / "run"
    assert main([f"--output={output}", *SMALL, *SHORT]) == 0
    scores = json.loads((output / "scores.json").read_text())
    assert scores["trained"]["ndcg_at_10"] > 2 * scores["untrained"]["ndcg_at_10"]
    assert scores["trained"]["ndcg_at_10"] > scores["untrained"]["ndcg_at_10"] + 0.15
    losses = [loss for _, loss in training_terms(output / "train")["total"]]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1
    assert (output / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "Recall@100" in capsys.readouterr().out
