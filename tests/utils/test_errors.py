"""What is refused on machines that are not this one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser

from ullme.utils.errors import check_accelerator, run_command


@pytest.mark.parametrize(
    ("accelerator", "apple", "cuda", "refused"),
    [
        ("auto", True, False, True),
        ("gpu", True, False, True),
        ("mps", True, False, True),
        ("auto", True, True, False),
        ("auto", False, False, False),
        ("gpu", False, True, False),
        ("cpu", True, False, False),
    ],
)
def test_apple_gpus(monkeypatch, accelerator, apple, cuda, refused):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    trainer = SimpleNamespace(accelerator=accelerator)
    if refused:
        with pytest.raises(ValueError, match=f"trainer.accelerator={accelerator} is an Apple GPU.*accelerator=cpu"):
            check_accelerator(trainer)
    else:
        check_accelerator(trainer)


def test_ctrl_c_says_what_stays(capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    parser = ArgumentParser(exit_on_error=False)
    assert run_command(parser, interrupted, [], "the parts stay") == 130
    assert capsys.readouterr().err == "\nCtrl-C: the parts stay\n"
    assert run_command(parser, lambda options: 7, [], "the parts stay") == 7
