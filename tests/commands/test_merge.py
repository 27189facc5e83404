"""ullme merge on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from export_helpers import write_run
from tiny import TEXTS

from ullme.commands.merge import main
from ullme.models.checkpoint import load_ullme
from ullme.models.trained_weights import trainable_state


@pytest.fixture
def runs(make_model, tmp_path) -> list[str]:
    made = []
    for seed in (1, 2):
        model = make_model(lora_target_modules=["q_proj"])
        torch.manual_seed(seed)
        for weight in trainable_state(model).values():
            weight.add_(torch.randn_like(weight) * 0.1)
        made.append(str(write_run(model, tmp_path / f"run{seed}")))
    return made


def test_two_runs_to_a_folder(runs, tmp_path, capsys):
    folder = tmp_path / "merged"
    assert main([*runs, "--weights", "3", "1", "--to", str(folder)]) == 0
    assert f"{folder}: an adapter of rank 8, average of 0.75 {runs[0]}, 0.25 {runs[1]}" in capsys.readouterr().out
    assert json.loads((folder / "merge.json").read_text()) == {
        "method": "average",
        "runs": {runs[0]: 0.75, runs[1]: 0.25},
    }
    merged, first = (load_ullme(place).encode(TEXTS) for place in (folder, runs[0]))
    assert merged.shape == first.shape
    assert abs(merged - first).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", "{1}"], "--to FOLDER is missing"),
        (["{0}", "{tmp}/none", "--to", "{tmp}/out"], "/none: no such run"),
        (["{0}", "--to", "{tmp}/out"], "runs: 1 given"),
        (["{0}", "{1}", "--to", "{0}"], "is not empty"),
        (["{0}", "{1}", "--to", "{tmp}/out", "--method", "mean"], "method='mean': choose one of average"),
        (["{0}", "{1}", "--to", "{tmp}/out", "--weights", "1", "2", "3"], "give one for each of the 2 runs"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, runs, tmp_path, capsys):
    assert main([part.format(*runs, tmp=tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
