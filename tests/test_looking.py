"""What a user can watch: W&B's offline files of a training and of an evaluation, read back."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json

import pytest
from test_training import arguments, write_rows  # noqa: F401 - arguments is a fixture
from wandb_file import Run

from ullme.commands import train
from ullme.commands.evaluate import main as evaluate
from ullme.eval.table import Row
from ullme.eval.wandb import training_run, wandb_run

GRL = ("--loss=GRL", "--loss.generation=dpo", "--loss.chunk_size=3")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_a_training_run_in_wandb(arguments, tmp_path, offline, monkeypatch):
    """Every number that one wants to see, its picture, the config, and then the scores of the evaluation."""
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    argv = [a for a in arguments("run", *GRL) if not a.startswith(("--trainer.logger", "--loss.chunk"))]
    maps = json.dumps([{"class_path": "ullme.callbacks.SimilarityMap", "init_args": {"validations": True}}])
    argv += [
        "--trainer.logger=WandbLogger",
        "--trainer.logger.project=trial",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--throughput.peak_tflops=2",
        f"--trainer.callbacks={maps}",
    ]
    train.main(argv)
    import wandb

    wandb.finish()
    run = Run(tmp_path / "wandb")
    assert run.project == "trial"
    assert run.id == (tmp_path / "run" / "wandb_run_id").read_text()
    for key in ("loss", "info_nce", "dpo", "kl", "weight/info_nce", "weight/dpo", "weight/kl", "grad_norm"):
        assert len(run.history[f"train/{key}"]) == 4, key
    for key in ("margin", "accuracy"):
        assert any(name.startswith("train/") and name.endswith(key) for name in run.history), run.history.keys()
    for key in ("lr", "tokens/s", "queries/s", "mfu", "padding", "waiting", "memory/peak_gib", "hours_left"):
        assert len(run.history[key]) == 4, key
    for key in ("val/ndcg@10", "val/mrr@10", "val/recall@100"):
        assert len(run.history[key]) == 2, key
    weights = [run.history[f"train/weight/{term}"][0] for term in ("info_nce", "dpo", "kl")]
    terms = [run.history[f"train/{term}"][0] for term in ("info_nce", "dpo", "kl")]
    assert weights == pytest.approx([1, 0.5, 1])
    assert run.history["train/loss"][0] == pytest.approx(sum(w * t for w, t in zip(weights, terms, strict=True)))
    for name, files in (("before", ["before"]), ("validation", ["step2", "step4"]), ("after", ["after"])):
        for image, file in zip(run.history[f"similarity/{name}"], files, strict=True):
            stored = run.folder / "files" / image["filenames"][0]
            assert stored.read_bytes() == (tmp_path / "run" / "similarity" / f"{file}.png").read_bytes()
            assert stored.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = run.config
    assert config["model"]["optimizer"]["lr"] == 0.01
    assert config["data"]["batch_size"] == 4
    assert config["loss"]["class_path"].endswith("GRL")
    assert "hf_averysecrettoken" not in json.dumps(config)

    folder = tmp_path / "results"
    corpus = str(tmp_path / "beir")
    run_folder = str(tmp_path / "run")
    assert not evaluate(
        [
            "--checkpoint",
            run_folder,
            "--corpus",
            corpus,
            "--output",
            str(folder),
            "--wandb",
            "trial",
            "--progress=false",
        ]
    )
    scores = Run(folder / "wandb")
    (name,) = {key.split("/")[1] for key in scores.summary if key.startswith("eval/") and key.count("/") == 2}
    (key,) = [key for key in scores.summary if key.startswith(f"eval/{name}/")]
    assert 0 <= scores.summary[key] <= 100
    assert scores.summary["eval/mean"] == scores.summary[key]
    (table,) = scores.history["eval/scores"]
    stored = json.loads((scores.folder / "files" / table["path"]).read_text())
    assert stored["columns"] == ["Task", "Type", "Main score", "Score"]
    assert stored["data"] == [[name, "Retrieval", key.split("/")[-1], pytest.approx(scores.summary[key])]]
    assert scores.config["training_run"] == run.id
    assert scores.id != run.id
    assert scores.config["evaluation"]["checkpoint"] == run_folder


class Stub:
    """In the place of a W&B run."""

    def __init__(self) -> None:
        self.config, self.summary, self.logged, self.ended = self, {}, {}, None

    def update(self, values, allow_val_change):
        self.kept = values

    def log(self, values):
        self.logged |= values

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb_stub(monkeypatch):
    import wandb

    stub = Stub()

    def init(**options):
        stub.options = options
        return stub

    monkeypatch.setattr(wandb, "init", init)
    return stub


def test_online_the_table_goes_to_the_run_of_the_training(wandb_stub, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "wandb_run_id").write_text("abc")
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    with wandb_run("trial", checkpoint, {"api_key": "secret"}, str(tmp_path)) as log:
        assert wandb_stub.options["id"] == "abc"  # begun before anything is computed
        log([Row("A", "STS", "cosine", 50.0), Row("B", "STS", "cosine", None, "no data")])
    assert wandb_stub.summary == {"eval/A/cosine": 50.0, "eval/mean": 50.0}
    assert wandb_stub.logged["eval/scores"].data == [["A", "STS", "cosine", 50.0], ["B", "STS", "cosine", None]]
    assert wandb_stub.ended == 0
    assert "secret" not in str(wandb_stub.kept)
    assert training_run(str(tmp_path / "elsewhere" / "a" / "b" / "c")) is None


def test_a_failed_evaluation_is_a_failed_run(wandb_stub, tmp_path):
    with pytest.raises(RuntimeError), wandb_run("trial", None, {}, str(tmp_path)):
        raise RuntimeError
    assert wandb_stub.ended == 1
    assert wandb_stub.options["job_type"] == "evaluation"


def test_nobody_logged_in_is_known_before_anything_is_computed(monkeypatch, tmp_path):
    import wandb

    def init(**options):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"--wandb trial: No API key configured; wandb login"):
        wandb_run("trial", None, {}, str(tmp_path)).__enter__()
