"""train.py from the outside: a run, its checkpoints, resuming, its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ullme.commands import train
from ullme.models.checkpoint import load_ullme
from ullme.models.trained_weights import find_checkpoint

NOUNS = [
    "river",
    "mill",
    "market",
    "town",
    "kettle",
    "mitten",
    "passage",
    "square",
    "number",
    "document",
    "harp",
    "oak",
]


def write_rows(folder: Path, count: int = 24) -> tuple[str, str]:
    """Training rows, and a BEIR folder, about small made-up things."""
    lines = []
    for n in range(count):
        noun = NOUNS[n % len(NOUNS)]
        negatives = [f"the {other} of {n + k}" for k, other in enumerate(NOUNS) if other != noun]
        lines.append({"query": f"which {noun} is {n}", "pos": [f"the {noun} number {n}"], "neg": negatives})
    train = folder / "train.jsonl"
    train.write_text("\n".join(json.dumps(line) for line in lines))
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": "", "text": f"the {noun} stands here"} for n, noun in enumerate(NOUNS)]
    queries = [{"_id": f"q{n}", "text": f"where is the {noun}"} for n, noun in enumerate(NOUNS)]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (beir / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    qrels = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(NOUNS)))]
    (beir / "qrels" / "test.tsv").write_text("\n".join(qrels))
    return str(train), str(beir)


@pytest.fixture
def arguments(tmp_path, llm_folder):
    """Command line of a small run in a folder of its own; later options win."""
    train, beir = write_rows(tmp_path)

    def make(run: str, *extra: str) -> list[str]:
        return [
            "fit",
            "--seed_everything=3",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.log_every_n_steps=1",
            f"--trainer.default_root_dir={tmp_path / run}",
            "--trainer.logger=CSVLogger",
            f"--trainer.logger.save_dir={tmp_path / run}",
            "--trainer.logger.name=",
            "--trainer.logger.version=",
            f"--model.backbone.model_name_or_path={llm_folder()}",
            "--model.backbone.lora_r=4",
            "--model.optimizer.lr=0.01",
            f"--data.train={train}",
            f"--data.val={beir}",
            "--model.prompts.query=Q: {text}",
            "--model.prompts.generation=Q: {text} A:",
            "--data.query_max_length=40",
            "--data.passage_max_length=60",
            "--data.batch_size=4",
            "--data.num_hard_negatives=2",
            "--data.num_workers=0",
            "--loss.chunk_size=3",
            *extra,
        ]

    return make


def logged(folder: Path, column: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def test_validate_writes_no_configuration(tmp_path):
    callback = train.SaveConfig.__new__(train.SaveConfig)  # without a parser, which writing needs
    callback.save_config(SimpleNamespace(default_root_dir=tmp_path, loggers=[]), None, "validate")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_validating_a_checkpoint_changes_nothing_in_the_run_folder(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(arguments("run", "--trainer.max_steps=1"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "metrics.csv" in before
    capsys.readouterr()
    options = [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--data.val_batch_size=8"]
    train.main(["validate", f"--config={run / 'config.yaml'}", *options])
    assert "val/ndcg@10" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit):
        train.main(["validate", f"--config={run / 'config.yaml'}", "--data.val=null"])
    assert "data.val is not set" in capsys.readouterr().err


def test_fast_dev_run(arguments):
    train.main(arguments("run", "--trainer.fast_dev_run=2"))


def test_a_run_learns_validates_and_saves_only_what_it_trained(arguments, tmp_path):
    train.main(arguments("run", "--trainer.max_epochs=4", "--trainer.max_steps=24"))
    losses = logged(tmp_path / "run", "train/loss")
    assert len(losses) == 24
    assert np.mean(list(losses.values())[-4:]) < 0.8 * np.mean(list(losses.values())[:4])
    for column in ("val/ndcg@10", "val/mrr@10", "val/recall@100", "tokens/s", "lr", "train/grad_norm"):
        assert logged(tmp_path / "run", column), column
    assert (tmp_path / "run" / "config.yaml").is_file()

    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    assert all("lora_" in name for name in stored["state_dict"])
    assert stored["ullme"]["prompts"]["query"] == "Q: {text}"
    assert find_checkpoint(tmp_path / "run").stem.startswith("best-")
    model = load_ullme(last)
    assert not model.training
    # the checkpoint gives what the run ended with: its last validation, computed through encode
    beir = [f"the {noun} stands here" for noun in NOUNS], [f"where is the {noun}" for noun in NOUNS]
    scores = model.encode(beir[1], role="query") @ model.encode(beir[0], role="passage").T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    mrr = np.mean([1 / (r + 1) if r < 10 else 0 for r in ranks])
    final = list(logged(tmp_path / "run", "val/mrr@10").values())[-1]
    assert final == pytest.approx(mrr, abs=1e-6)


@pytest.mark.parametrize(
    "interrupted_at", [pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), 8]
)
def test_resume_gives_the_same_losses(arguments, tmp_path, interrupted_at):
    """With dropout on, mid-epoch (3, 8) and between epochs (6 steps each)."""
    common = ("--trainer.max_epochs=2", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1")
    train.main(arguments("whole", *common))
    whole = logged(tmp_path / "whole", "train/loss")
    assert len(whole) == 12
    start = tmp_path / "whole" / "checkpoints" / f"step{interrupted_at}.ckpt"
    train.main(arguments("resumed", *common, f"--ckpt_path={start}"))
    resumed = logged(tmp_path / "resumed", "train/loss")
    assert sorted(resumed) == list(range(interrupted_at, 12))
    assert resumed == {step: whole[step] for step in resumed}
    a = torch.load(tmp_path / "whole" / "checkpoints" / "step12.ckpt", weights_only=True)["state_dict"]
    b = torch.load(tmp_path / "resumed" / "checkpoints" / "step12.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ckpt_path_last_goes_on(arguments, tmp_path):
    train.main(arguments("run", "--trainer.max_epochs=1"))
    train.main(arguments("run", "--trainer.max_epochs=2", "--ckpt_path=last"))
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 12


def test_the_loss_and_its_chunks_do_not_change_the_run(arguments, tmp_path):
    """GradCache with any chunks and FullBatch give the same losses, step after step (no dropout)."""
    runs = {
        "one": ("--loss.chunk_size=1",),
        "tokens": ("--loss=GradCache", "--loss.chunk_tokens=70"),
        "full": ("--loss=FullBatch",),
    }
    losses = {}
    for name, extra in runs.items():
        dropped = [a for a in arguments(name) if "chunk_size" not in a]
        train.main([*dropped, "--trainer.max_steps=4", "--model.backbone.lora_dropout=0", *extra])
        losses[name] = list(logged(tmp_path / name, "train/loss").values())
    assert len(losses["full"]) == 4
    assert losses["full"][0] != losses["full"][3]
    np.testing.assert_allclose(losses["one"], losses["full"], rtol=1e-4)
    np.testing.assert_allclose(losses["tokens"], losses["full"], rtol=1e-4)


def test_bfloat16_mixed_precision_trains(arguments, tmp_path):
    train.main(arguments("run", "--trainer.precision=bf16-mixed", "--trainer.max_epochs=3"))
    losses = list(logged(tmp_path / "run", "train/loss").values())
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


@pytest.mark.parametrize("lora_name", ["a", "null"])
def test_trained_weights_in_bfloat16_are_warned_of(arguments, caplog, lora_name):
    train.main(
        arguments(
            "run", f"--model.backbone.lora_name={lora_name}", "--model.backbone.dtype=bfloat16", "--trainer.max_steps=1"
        )
    )
    assert ("model.backbone.dtype=float32" in caplog.text) == (lora_name == "null")


def test_full_fine_tuning_saves_all_weights(arguments, tmp_path):
    train.main(arguments("run", "--model.backbone.lora_name=null", "--trainer.max_steps=2"))
    model = load_ullme(tmp_path / "run")
    stored = torch.load(find_checkpoint(tmp_path / "run"), weights_only=True)
    assert {n.removeprefix("model.") for n in stored["state_dict"]} == {n for n, _ in model.named_parameters()}


def test_wandb_offline(arguments, tmp_path):
    dropped = [a for a in arguments("run", "--trainer.max_steps=2") if "logger" not in a]
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", f"--trainer.logger.save_dir={tmp_path}"]
    train.main([*dropped, *logger])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.backbone.lora_r=0"], "lora_r=0"),
        (["--model.backbone.lora_rank=8"], "lora_rank"),
        (["--data.train=missing.jsonl"], "missing.jsonl"),
        (["--data.batch_size=512"], "data.batch_size=512"),
        (["--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["--trainer.gradient_clip_val=1.0"], "model.optimizer.gradient_clip_val"),
        (["--data.passage_max_length=999"], "data.passage_max_length=999, but the LLM has 128 positions"),
        (["--data.query_max_length=4"], "raise query_max_length"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(arguments, tmp_path, capsys, extra, message):
    """More of them stand in test_bad_input.py, where every second one is slow; these are not among its quick ones."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments("run", *extra))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_checkpoint_of_another_rank_backbone_or_prompt_is_refused(arguments, tmp_path, llm_folder, capsys):
    train.main(arguments("run", "--trainer.max_steps=1"))
    last = f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    for extra, message in (
        ("--model.backbone.lora_r=8", "trained with lora_r=4, but this model has lora_r=8"),
        (f"--model.backbone.model_name_or_path={llm_folder('mistral')}", "trained with model_type='llama'"),
        ("--model.prompts.query=other: {text}", "trained with model.prompts="),
        ("--model.backbone.lora_alpha=99", "trained with lora_alpha=32"),
        ("--model.backbone.pooling=last", "trained with pooling='mean'"),
        ("--model.backbone.attention=causal", "trained with attention='bidirectional'"),
        (f"--model.backbone.model_name_or_path={llm_folder('llama', initializer_range=0.1)}", "holds other weights"),
    ):
        with pytest.raises(SystemExit):
            train.main(arguments("again", last, extra))
        assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_with_its_rows(arguments, monkeypatch, capsys):
    from ullme.losses import InfoNCE

    monkeypatch.setattr(InfoNCE, "forward", lambda self, reps: reps.queries.sum() * float("nan"))
    with pytest.raises(SystemExit):
        train.main(arguments("run"))
    assert "step 0: info_nce is nan (training rows [" in capsys.readouterr().err


def test_grl_logs_every_term_its_weight_and_its_metrics_at_every_step(arguments, tmp_path):
    given = arguments("run", "--loss=GRL", "--trainer.max_steps=2")
    dropped = [a for a in given if "chunk_size" not in a and "log_every_n_steps" not in a]
    train.main([*dropped, "--loss.chunk_size=3", f"--loss.cache_reference={tmp_path / 'cache'}"])
    for name in ("info_nce", "dpo", "kl", "reward_margin", "reward_accuracy", "rank_agreement", "grad_norm"):
        assert len(logged(tmp_path / "run", f"train/{name}")) == 2, name
    assert set(logged(tmp_path / "run", "train/weight/dpo").values()) == {0.5}
    assert logged(tmp_path / "run", "train/dpo")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert list((tmp_path / "cache").glob("*.sqlite"))


@pytest.mark.parametrize("part", ["limit_val_batches=1", "overfit_batches=1"])
def test_a_part_of_a_validation_gives_no_score(arguments, tmp_path, part):
    """Texts that were not embedded would rank by a similarity of 0."""
    with pytest.warns(UserWarning, match="only a part of data.val was embedded"):
        train.main(
            arguments(
                "run",
                "--trainer.max_steps=1",
                "--trainer.val_check_interval=1",
                "--data.val_batch_size=4",
                f"--trainer.{part}",
            )
        )
    assert not logged(tmp_path / "run", "val/ndcg@10")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_generation_terms_learn_alone(arguments, tmp_path):
    """SFT without any embedding loss: the likelihood of the positives rises."""
    dropped = [a for a in arguments("run", "--trainer.max_epochs=4", "--trainer.max_steps=24") if "chunk" not in a]
    terms = '[{"class_path": "ullme.losses.SFT"}]'
    train.main([*dropped, "--loss=GradCache", "--loss.chunk_size=3", f"--loss.terms={terms}"])
    losses = list(logged(tmp_path / "run", "train/sft").values())
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


def test_the_config_lies_in_the_runs_own_folder(arguments, tmp_path):
    import yaml

    for run in ("a", "b"):
        train.main([*arguments(run, "--trainer.max_steps=1"), f"--trainer.logger.save_dir={tmp_path}"])
        saved = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert saved["trainer"]["default_root_dir"] == str(tmp_path / run)


@pytest.mark.distributed
def test_two_processes_train_and_validate_as_one(arguments, tmp_path):
    """GRL under DDP with GradCache chunks: the same losses, weights and validation scores as a single process."""
    common = ("--trainer.max_steps=3", "--trainer.val_check_interval=3", "--model.backbone.lora_dropout=0")
    for run, ranks in (("one", ()), ("two", ("--trainer.devices=2", "--trainer.strategy=ddp_fork"))):
        dropped = [a for a in arguments(run, *common, *ranks, "--loss=GRL") if "chunk_size" not in a]
        train.main([*dropped, "--loss.chunk_size=1"])
    for column in ("train/loss", "train/dpo", "train/kl", "train/grad_norm", "val/ndcg@10", "val/mrr@10"):
        one, two = (logged(tmp_path / run, column) for run in ("one", "two"))
        assert one, column
        assert two == {step: pytest.approx(value, rel=1e-4) for step, value in one.items()}, column
    one, two = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_limited_epochs_have_their_first_batches_and_the_schedule_ends(arguments, tmp_path):
    """2 of an epoch's 6 batches, 3 epochs: 6 steps down to a rate of 0, and a resumed run goes on in its place."""
    common = ("--trainer.limit_train_batches=2", "--trainer.max_epochs=3", "--data.val=null")
    train.main(arguments("run", *common, "--checkpoint.save_top_k=-1", "--checkpoint.every_n_train_steps=3"))
    losses, rates = logged(tmp_path / "run", "train/loss"), logged(tmp_path / "run", "lr")
    assert sorted(losses) == list(range(6))
    assert 0 < rates[5] < rates[4] < rates[1]
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["_last_lr"] == [0.0]
    start = f"--ckpt_path={tmp_path / 'run/checkpoints/step3.ckpt'}"  # in the middle of the second epoch
    train.main(arguments("again", *common, start))
    assert logged(tmp_path / "again", "train/loss") == {step: losses[step] for step in (3, 4, 5)}


def test_a_limited_epoch_begins_where_a_whole_one_does(arguments):
    """The second epoch of 2 batches has the rows of the second whole epoch's first 2."""
    seen = []
    for limit in ("2", "1.0"):
        cli = train.build(
            arguments("run", f"--trainer.limit_train_batches={limit}", "--trainer.max_epochs=2", "--data.val=null")[1:],
            run=False,
        )
        rows = []
        step = type(cli.model).training_step
        cli.model.training_step = lambda batch, n, rows=rows, cli=cli, step=step: (
            rows.append(batch.row_ids.tolist()),
            step(cli.model, batch, n),
        )[1]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        seen.append(rows)
    limited, whole = seen
    assert limited == [*whole[:2], *whole[6:8]]
    assert whole[6] != whole[2]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["--data.batch_size=1"], "data.batch_size=1"),
        (["--data.batch_size=1", "--data.schema=text"], "data.batch_size=1"),
        (["--loss.terms=[{class_path: InfoNCE, init_args: {in_batch_negatives: false}}]"], "in_batch_negatives=false"),
        (
            ["--data.train=null", "--data.datasets=[{train: FILE, in_batch_negatives: false}]"],
            "in_batch_negatives=false of '",
        ),
    ],
)
def test_a_contrastive_loss_without_negatives_is_refused_before_the_llm_is_loaded(
    arguments, tmp_path, capsys, monkeypatch, options, missing
):
    monkeypatch.setattr(train.ULLMEModule, "configure_model", lambda _: pytest.fail("the LLM was loaded"))
    options = [option.replace("FILE", str(tmp_path / "train.jsonl")) for option in options]
    with pytest.raises(SystemExit) as end:
        train.main(arguments("run", "--data.num_hard_negatives=0", "--data.val=null", *options))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert f"data.num_hard_negatives=0 and {missing}" in message
    assert "there is no negative" in message


def test_a_loss_without_in_batch_negatives_borrows_none_either(arguments, capsys, monkeypatch):
    monkeypatch.setattr(train.ULLMEModule, "configure_model", lambda _: pytest.fail("the LLM was loaded"))
    loss = "--loss.terms=[{class_path: InfoNCE, init_args: {in_batch_negatives: false}}]"
    with pytest.raises(SystemExit):
        train.main(arguments("run", f"--data.num_hard_negatives={len(NOUNS) + 2}", "--data.val=null", loss))
    message = capsys.readouterr().err
    assert "loss term info_nce has in_batch_negatives=false" in message
    assert "data.short_rows=borrow would borrow" in message


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("model: {prompts: {query: }}", "model.prompts.query"),
        ("model: {optimizer: {lr: }}", "model.optimizer.lr"),
        ("data: {batch_size: }", "data.batch_size"),
        ("checkpoint: {save_top_k: }", "checkpoint.save_top_k"),
        ("seed_everything: null\ndata: {seed: 1}", "seed_everything"),
        ("loss: {class_path: GradCache, init_args: {on_oom: }}", "loss.init_args.on_oom"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/mrr@10, patience: }}]}",
            "trainer.callbacks[0].init_args.patience",
        ),
    ],
)
def test_an_option_left_empty_is_named(arguments, tmp_path, capsys, option, name):
    (tmp_path / "own.yaml").write_text(option)
    given = [one for one in arguments("run") if not one.startswith(f"--{name}=") and "chunk_size" not in one]
    with pytest.raises(SystemExit) as end:
        train.main([given[0], *given[1:], f"--config={tmp_path / 'own.yaml'}"])
    assert end.value.code == 2
    assert f"error: {name} is empty; give it a value, or leave it out for its default" in capsys.readouterr().err


def test_an_option_that_may_be_empty_is_taken(arguments, tmp_path):
    (tmp_path / "own.yaml").write_text("model: {optimizer: {gradient_clip_val: }}\ncheckpoint: {monitor: }")
    cli = train.build([*arguments("run")[1:], f"--config={tmp_path / 'own.yaml'}"], run=False)
    assert cli.model.optimizer_config.gradient_clip_val is None


def test_a_folder_in_use_is_refused_until_its_run_ends(arguments, tmp_path, capsys):
    """Another process holds the folder; killed, it holds it no more."""
    import multiprocessing

    from ullme.training.resume import lock_run_folder

    root = tmp_path / "run"
    root.mkdir()
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=lambda: (lock_run_folder(root), held.set(), context.Event().wait()))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(SystemExit) as end:
            train.main(arguments("run"))
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert "trainer.default_root_dir=" in message
        assert f"is in use by a run that still goes on (process {other.pid} on " in message
    finally:
        other.kill()
        other.join()
    train.main(arguments("run", "--trainer.max_steps=1", "--data.val=null"))


def test_a_folder_that_cannot_be_written_is_one_line(arguments, capsys, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "/home/nobody/.cache")

    monkeypatch.setattr(train.ULLMEModule, "configure_model", refuse)
    with pytest.raises(SystemExit) as end:
        train.main(arguments("run"))
    assert end.value.code == 2
    assert "error: /home/nobody/.cache cannot be written or read (Permission denied); fix" in capsys.readouterr().err
