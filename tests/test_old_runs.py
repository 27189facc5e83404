"""What version 0.1 saved and how its modules were called: both must work as long as there are such runs."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from ullme.commands import train
from ullme.models.checkpoint import load_ullme
from ullme.utils.moved_modules import MOVED, successors

SAVED = Path(__file__).parent / "fixtures" / "version_0.1"


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """A copy of the saved run, as the current folder: its configuration names files by relative paths."""
    folder = Path(shutil.copytree(SAVED, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("source", ["step2.ckpt", "adapter"])
def test_saved_weights_embed_as_they_did(old_run, source):
    expected = json.loads((old_run / "embeddings.json").read_text())
    model = load_ullme(source)
    for role in ("query", "passage"):
        found = model.encode(expected["texts"], role=role)
        np.testing.assert_allclose(found, expected[role], atol=1e-5)
    untrained = load_ullme(source)
    for name, parameter in untrained.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert np.abs(untrained.encode(expected["texts"], role="query") - expected["query"]).max() > 1e-2


def test_a_saved_run_goes_on_as_it_would_have(old_run):
    """Steps 3 and 4 from the checkpoint of step 2 log the losses of the uninterrupted run of version 0.1."""
    train.main(["fit", "--config=run/config.yaml", "--ckpt_path=step2.ckpt", "--trainer.default_root_dir=again"])
    (log,) = old_run.glob("run/logs/version_*/metrics.csv")
    found = {row["step"]: row for row in csv.DictReader(log.open())}
    expected = {row["step"]: row for row in csv.DictReader((old_run / "metrics.csv").open())}
    assert sorted(found) == ["2", "3"]
    for step in found:
        for name in ("train/loss", "train/info_nce", "train/dpo", "train/kl", "train/grad_norm", "lr"):
            assert float(found[step][name]) == pytest.approx(float(expected[step][name]), rel=1e-4), (step, name)


@pytest.mark.parametrize("old", [*MOVED, "ullme.export.job", "ullme.doctor.checks", "ullme.reproduce.tables"])
def test_old_module_names_are_found_with_a_warning(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = successors(old)
    with pytest.warns(FutureWarning, match=f"{old} has moved to {new[0]}"):
        module = import_module(old)
    named = {name: value for name, value in vars(import_module(new[0])).items() if not name.startswith("__")}
    assert named
    assert all(getattr(module, name) is value for name, value in named.items())


def test_an_old_module_has_only_what_it_had(monkeypatch):
    monkeypatch.delitem(sys.modules, "ullme.models.backbone", raising=False)
    with pytest.warns(FutureWarning):
        module = import_module("ullme.models.backbone")
    assert module.BackboneConfig is import_module("ullme.models.config").BackboneConfig
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        _ = module.Missing
    with pytest.raises(ModuleNotFoundError):
        import_module("ullme.never_was")
