"""A run that is killed and started again with the same command ends as one that never was."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import PATIENCE, start_process, wait_until
from interrupted import (  # start, ended and end_of_whole_run are fixtures
    RUN,
    after,
    assert_same,
    before_naming,
    before_step,
    end,
    end_of_whole_run,  # noqa: F401
    ended,  # noqa: F401
    in_save,
    in_validation,
    interrupt_twice_in_step,
    only_rank,
    start,  # noqa: F401
    terminate_in_step,
    terminate_in_validation,
)
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.commands import train
from ullme.models.checkpoint import load_ullme
from ullme.training.resume import name_wandb_run
from ullme.utils import atomic_files

QUICK = ("before step 5", "in the validation in mid-epoch", "in the sixth save")
KILLS = {
    "before step 1": lambda: before_step(1),
    "before step 5": lambda: before_step(5),
    "before the first step of an epoch": lambda: before_step(6),
    "in the validation in mid-epoch": lambda: in_validation(1),
    "in the validation at an epoch's end": lambda: in_validation(2),
    "in the very first save": lambda: in_save(1),
    "in the sixth save": lambda: in_save(6),
    "before the ninth checkpoint has its name": lambda: before_naming(9),
}


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in KILLS])
def test_killed_and_started_again_it_ends_the_same(moment, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    assert start("run", "first", then=KILLS[moment]) == -signal.SIGKILL
    assert start("run", "second") == 0, (tmp_path / "second.err").read_text()
    found = end(tmp_path, "run", ["first", "second"])
    assert_same(found, expected)
    assert sorted(found["logged"]["train/loss"]) == list(range(12))
    left = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"last.ckpt", "finished", *found["best"]}


@pytest.mark.slow
def test_killed_twice_with_workers(start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    workers = "--data.num_workers=2"
    assert start("run", "first", workers, then=lambda: before_step(4)) == -signal.SIGKILL
    assert start("run", "second", workers, then=lambda: in_save(4)) == -signal.SIGKILL
    assert start("run", "third", workers) == 0, (tmp_path / "third.err").read_text()
    assert_same(end(tmp_path, "run", ["first", "second", "third"]), expected)


@pytest.mark.slow
def test_killed_in_a_validation_and_again_behind_it(start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    assert start("run", "first", then=lambda: in_validation(2)) == -signal.SIGKILL
    assert start("run", "second", then=lambda: before_step(6)) == -signal.SIGKILL
    assert start("run", "third") == 0, (tmp_path / "third.err").read_text()
    assert_same(end(tmp_path, "run", ["first", "second", "third"]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(seed, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    draw, logs, kills = random.Random(seed), [f"start{n}" for n in range(6)], 0
    for log in logs[:-1]:
        seconds = draw.uniform(0.1, 0.8)
        kills += start("run", log, then=lambda s=seconds: after(s)) == -signal.SIGPROF
        if (tmp_path / "run" / "checkpoints" / "finished").exists():
            break
    else:
        assert start("run", logs[-1]) == 0, (tmp_path / f"{logs[-1]}.err").read_text()
    assert kills
    assert_same(end(tmp_path, "run", logs), expected)


FSDP2 = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
    "--trainer.strategy.save_distributed_checkpoint=false",
    "--trainer.strategy.process_group_backend=gloo",
)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [("--trainer.strategy=ddp",), FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_killed_and_terminated(strategy, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run(*strategy, ranks=2)
    assert start("run", "first", *strategy, ranks=2, then=lambda: before_step(5)) == -signal.SIGKILL
    told = only_rank(1, lambda: terminate_in_step(6))
    assert start("run", "second", *strategy, ranks=2, then=told) == 143, (tmp_path / "second.err").read_text()
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    assert start("run", "third", *strategy, ranks=2) == 0, (tmp_path / "third.err").read_text()
    assert_same(end(tmp_path, "run", ["first", "second", "third"]), expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_strategy_goes_on_from_every_other(start, tmp_path):
    """One process, DDP, FSDP2, one process: the same losses as one process all along (without dropout, which ranks
    draw each for themselves)."""
    common = (
        "--model.backbone.lora_dropout=0",
        "--ckpt_path=last",
        "--data.val=null",
        "--model.optimizer.schedule=constant",
    )
    assert start("whole", "whole", *common) == 0, (tmp_path / "whole.err").read_text()
    expected = logged(tmp_path / "whole", "train/loss")
    strategies = [((), 1), (("--trainer.strategy=ddp",), 2), (FSDP2, 2), ((), 1)]
    for n, (strategy, ranks) in enumerate(strategies):
        steps = f"--trainer.max_steps={3 * (n + 1)}"
        code = start("run", f"log{n}", *common, *strategy, steps, ranks=ranks)
        assert code == 0, (tmp_path / f"log{n}.err").read_text()
        found = logged(tmp_path / f"log{n}", "train/loss")
        assert found == {step: pytest.approx(expected[step], rel=1e-4) for step in range(3 * n, 3 * n + 3)}
    stored = atomic_files.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    whole = atomic_files.read(tmp_path / "whole" / "checkpoints" / "last.ckpt")["state_dict"]
    assert stored.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(stored[name], weight, rtol=1e-3, atol=1e-4)
    assert not load_ullme(tmp_path / "run").training


@pytest.mark.parametrize(
    ("moment", "step"),
    [(lambda: terminate_in_step(4), 5), pytest.param(terminate_in_validation, 3, marks=pytest.mark.slow)],
    ids=["in a step", "in the validation"],
)
def test_sigterm_saves_and_leaves_with_143(moment, step, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    assert start("run", "first", then=moment) == 143
    said = [line for line in (tmp_path / "first.out").read_text().splitlines() if line.startswith("SIGTERM")]
    assert said == [
        f"SIGTERM: saved {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'} after step {step}; the same command goes on "
        "from there"
    ]
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == step
    assert start("run", "second") == 0, (tmp_path / "second.err").read_text()
    assert min(logged(tmp_path / "second", "train/loss")) == step
    assert_same(end(tmp_path, "run", ["first", "second"]), expected)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (lambda: terminate_in_step(4, signal.SIGINT), 5),
        pytest.param(lambda: terminate_in_validation(signal.SIGINT), 3, marks=pytest.mark.slow),
    ],
    ids=["in a step", "in the validation"],
)
def test_ctrl_c_saves_and_leaves_with_130(moment, step, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    assert start("run", "first", then=moment) == 130
    said = [line for line in (tmp_path / "first.out").read_text().splitlines() if line.startswith("Ctrl-C")]
    assert said == [
        f"Ctrl-C: saved {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'} after step {step}; the same command goes on "
        "from there"
    ]
    assert "Traceback" not in (tmp_path / "first.err").read_text()
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert start("run", "second") == 0, (tmp_path / "second.err").read_text()
    assert min(logged(tmp_path / "second", "train/loss")) == step
    assert_same(end(tmp_path, "run", ["first", "second"]), expected)


def test_a_second_ctrl_c_leaves_at_once(start, tmp_path):
    assert start("run", "first", then=lambda: interrupt_twice_in_step(4)) == -signal.SIGINT
    said = (tmp_path / "first.err").read_text()
    assert "press it again to stop at once" in said
    assert "Traceback" not in said
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("told", "status", "says"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0)])
def test_a_signal_that_reaches_the_workers_too(told, status, says, tmp_path, arguments, start, end_of_whole_run):
    """The whole process group of a real train.py is told, as terminals and schedulers do it."""
    expected = end_of_whole_run()
    argv = arguments(
        "run", *RUN, "--data.num_workers=2", f"--trainer.logger.save_dir={tmp_path / 'first'}", "--trainer.max_epochs=2"
    )
    # steps of this run are over in no time: it is told as soon as the first checkpoint is there
    code = "import time, ullme.training.module as m; f = m.ULLMEModule.training_step\n"
    code += "m.ULLMEModule.training_step = lambda *a: (time.sleep(0.5), f(*a))[1]\nfrom ullme.commands.train import main; main()"
    process = start_process(
        [sys.executable, "-c", code, *argv],
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "run" / "checkpoints" / "last.ckpt").exists, "the first checkpoint")
    os.killpg(process.pid, told)
    said, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, complaints
    assert "the same command goes on from there" in said
    assert "Traceback" not in complaints
    assert complaints.count("press it again to stop at once") == says  # workers have nothing to say
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 2 <= step < 12
    assert start("run", "second", "--data.num_workers=2") == 0, (tmp_path / "second.err").read_text()
    assert_same(end(tmp_path, "run", ["first", "second"]), expected)


@pytest.mark.parametrize("lightnings", [False, True])
def test_ctrl_c_before_the_first_step_is_one_line(lightnings, monkeypatch, capsys):
    def build(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if lightnings:
                sys.exit(1)  # what its trainer does
            raise

    monkeypatch.setattr(train, "build", build)
    with pytest.raises(SystemExit) as stop:
        train.main(["fit"])
    assert stop.value.code == 130
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("Ctrl-C: ")
    assert "the same command goes on" in said


def test_other_exits_keep_their_status(monkeypatch):
    monkeypatch.setattr(train, "build", lambda argv: sys.exit(3))
    with pytest.raises(SystemExit) as stop:
        train.main(["fit"])
    assert stop.value.code == 3


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_slurms_warning_saves_and_asks_for_another_turn(works, start, end_of_whole_run, tmp_path):
    expected = end_of_whole_run()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path / 'asked'}\nexit {0 if works else 1}\n")
    scontrol.chmod(0o755)

    def in_slurm(then: Callable[[], None] = lambda: None) -> Callable[[], None]:
        def begin() -> None:
            os.environ |= {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "ullme", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}
            os.environ |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
            os.environ["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
            then()

        return begin

    assert start("run", "first", then=in_slurm(lambda: terminate_in_step(4, signal.SIGUSR1))) == 143
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert ("SLURM requeued job 77" if works else "submit it again") in (tmp_path / "first.out").read_text()
    assert start("run", "second", then=in_slurm()) == 0, (tmp_path / "second.err").read_text()
    assert_same(end(tmp_path, "run", ["first", "second"]), expected)


def refused(capsys, argv: list[str]) -> str:
    """What a refused command says, in one line."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return said


def test_a_used_folder_is_neither_continued_nor_written_over_by_mistake(arguments, tmp_path, capsys):
    common = ("--trainer.max_steps=2", "--trainer.val_check_interval=2")
    train.main(arguments("run", *common))
    folder = tmp_path / "run" / "checkpoints"
    before = {p: p.read_bytes() for p in (*folder.iterdir(), tmp_path / "run" / "config.yaml")}
    said = refused(capsys, arguments("run", *common))
    assert (
        "holds a finished run (2 steps); give another trainer.default_root_dir, or resume with --ckpt_path last" in said
    )

    (folder / "finished").unlink()  # as if it had been killed
    said = refused(capsys, arguments("run", *common, "--model.optimizer.lr=0.5", "--loss.chunk_size=1"))
    assert "holds a run of another configuration: model.optimizer.lr=0.01 (now 0.5); give another" in said
    said = refused(capsys, arguments("run", *common, "--data.columns={score: teacher}"))
    assert "another configuration: data.columns=None (now {'score': 'teacher'}); give another" in said
    last, best = folder / "last.ckpt", next(folder.glob("best-*"))
    last.write_bytes(before[last][:-200])
    for extra in ([], ["--ckpt_path=last"], [f"--ckpt_path={last}"]):
        said = refused(capsys, arguments("run", *common, *extra))
        assert f"{str(last)!r} is damaged" in said
        assert f"the last good checkpoint is {str(best)!r}" in said
    last.write_bytes(before[last])
    assert {p: p.read_bytes() for p in before if p.exists()} == {
        p: b for p, b in before.items() if p.name != "finished"
    }

    (tmp_path / "run" / "config.yaml").unlink()
    assert "holds checkpoints without the config.yaml" in refused(capsys, arguments("run", *common))


def test_a_checkpoint_holds_the_adapter_and_its_moments_and_little_else(arguments, tmp_path):
    train.main(arguments("run", "--trainer.max_steps=1", "--model.backbone.lora_r=64"))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = atomic_files.read(path)
    adapter = sum(t.numel() * t.element_size() for t in stored["state_dict"].values())
    assert adapter > 200_000
    assert 3 * adapter < path.stat().st_size < 3.1 * adapter + 30_000


def test_a_disk_that_fills_up_ends_the_run_in_one_line(arguments, tmp_path, capsys, monkeypatch):
    inner = os.fsync

    def fsync(handle: int) -> None:
        if (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(handle)

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)
    said = refused(capsys, arguments("run", "--checkpoint.every_n_train_steps=1"))
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert f"{last!r} cannot be written (No space left on device); free space" in said
    assert f"the last good checkpoint is {last!r}" in said
    monkeypatch.undo()
    train.main(arguments("run", "--checkpoint.every_n_train_steps=1"))  # room was made


def test_what_was_logged_before_is_kept(arguments, tmp_path):
    train.main(arguments("run", "--trainer.max_steps=2"))
    train.main(arguments("run", "--trainer.max_steps=4", "--ckpt_path=last"))
    assert sorted(logged(tmp_path / "run", "train/loss")) == [2, 3]
    (tmp_path / "run" / "metrics-1.csv").rename(tmp_path / "run" / "metrics.csv")
    assert sorted(logged(tmp_path / "run", "train/loss")) == [0, 1]


def test_a_run_that_goes_on_is_one_run_for_wandb(tmp_path):
    class Logger:
        class_path = "lightning.pytorch.loggers.WandbLogger"

        def __init__(self, **options) -> None:
            self.init_args = options

    first, again, named = Logger(id=None), Logger(id=None), Logger(id="mine")
    for logger in (first, [again, named], True):
        name_wandb_run(logger, tmp_path)
    assert len(first.init_args["id"]) == 12
    assert again.init_args == first.init_args
    assert named.init_args["id"] == "mine"
    other = Logger(id=None)
    name_wandb_run(other, tmp_path / "other")
    assert other.init_args != first.init_args
