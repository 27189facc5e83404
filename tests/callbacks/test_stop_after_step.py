"""A run that is told to stop after a step, and goes on without that option as if it never had stopped."""

from __future__ import annotations

import json

import pytest
import torch
from interrupted import assert_same
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.callbacks import Checkpoint
from ullme.commands import train


def start(argv: list[str]) -> int:
    try:
        train.main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_stops_after_the_validation_and_goes_on(arguments, tmp_path, capsys):  # noqa: F811
    """Four steps with a linear schedule and a validation after every other."""
    short = ("--trainer.max_steps=4", "--trainer.val_check_interval=2")
    assert start(arguments("whole", *short)) == 0
    stopping = arguments("run", *short, "--checkpoint.stop_after_step=1", f"--trainer.logger.save_dir={tmp_path / 'a'}")
    assert start(stopping) == 143
    assert "checkpoint.stop_after_step=1: saved" in capsys.readouterr().out
    note = json.loads((tmp_path / "run" / "stopped_after_step1.json").read_text())
    validated = logged(tmp_path / "whole", "val/ndcg@10")
    assert len(set(validated.values())) == 2  # so that it matters at which step
    assert note == {"step": 2, "monitor": "val/ndcg@10", "value": pytest.approx(min(validated.items())[1], abs=1e-6)}
    assert not (tmp_path / "run" / "checkpoints" / "finished").exists()
    assert start(arguments("run", *short)) == 0
    found, expected = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("run", "whole")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(found[part], expected[part])


def test_without_a_validation_it_stops_after_the_step(arguments, tmp_path):  # noqa: F811
    stopping = arguments("run", "--trainer.max_steps=4", "--data.val=null", "--checkpoint.stop_after_step=1")
    assert start(stopping) == 143
    note = json.loads((tmp_path / "run" / "stopped_after_step1.json").read_text())
    assert note == {"step": 1, "monitor": None, "value": None}
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_step_below_one_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.stop_after_step=0 must be at least 1"):
        Checkpoint(stop_after_step=0)
