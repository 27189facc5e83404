"""Every YAML in configs/ parses, and instantiates trainer, module, data and loss, alone or stacked on the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import strategies
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from ullme import cli
from ullme.callbacks import LossCallback

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def arguments(path: Path) -> list[str]:
    """Stack a fragment on what it needs; later files win."""
    content = yaml.safe_load(path.read_text())
    stack = [path]
    if not content.get("model", {}).get("backbone", {}).get("model_name_or_path"):
        stack.insert(0, CONFIGS / "model" / "phi-1.5.yaml")
    if path.name != "base.yaml" and not (content.get("data", {}).get("train") or "").startswith("runs/"):
        stack.insert(0, CONFIGS / "base.yaml")
    return [f"--config={p}" for p in stack]


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Lightning refuses FSDP without a GPU before it looks at its options."""
    monkeypatch.setattr(_AcceleratorConnector, "_check_strategy_and_fallback", lambda self: None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_instantiates(path, tmp_path, monkeypatch, no_gpu_needed):
    monkeypatch.chdir(tmp_path)
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    app = cli.build([*arguments(path), *here], run=False)
    assert sum(isinstance(c, LossCallback) for c in app.trainer.callbacks) == 1
    assert app.model.backbone.model_name_or_path
    assert app.datamodule.batch_size > 0


TERMS = {
    "contrastive": {"info_nce": 1.0},
    "causal": {"info_nce": 1.0},
    "full_batch": {"info_nce": 1.0},
    "sft": {"sft": 1.0},
    "dpo": {"dpo": 1.0},
    "kto": {"kto": 1.0},
    "cpo": {"cpo": 1.0},
    "cl_sft": {"info_nce": 1.0, "sft": 0.5},
    "grl_sft": {"info_nce": 1.0, "sft": 0.5, "kl": 1.0},
    "grl": {"info_nce": 1.0, "dpo": 0.5, "kl": 1.0},
}


@pytest.mark.parametrize("name", TERMS)
def test_each_loss_config_is_what_its_name_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the strategy and the size of the run come last here: they must not put another loss in its place
    files = ["base.yaml", "model/phi-1.5.yaml", f"loss/{name}.yaml", "strategy/cpu.yaml", "small.yaml"]
    app = cli.build([f"--config={CONFIGS / f}" for f in files], run=False)
    (loss,) = (c for c in app.trainer.callbacks if isinstance(c, LossCallback))
    assert {term.name: term.weight for term in loss.objective.terms} == TERMS[name]
    assert app.model.backbone.attention == ("causal" if name == "causal" else "bidirectional")


def test_every_loss_config_has_its_terms_checked():
    assert {path.stem for path in (CONFIGS / "loss").glob("*.yaml")} == set(TERMS)


STRATEGIES = {
    "single": strategies.SingleDeviceStrategy,
    "cpu": strategies.SingleDeviceStrategy,
    "ddp": strategies.DDPStrategy,
    "cpu_2proc": strategies.DDPStrategy,
    "fsdp": strategies.FSDPStrategy,
    "fsdp_multinode": strategies.FSDPStrategy,
    "fsdp2": strategies.ModelParallelStrategy,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_config_is_what_its_name_says(name, tmp_path, monkeypatch, no_gpu_needed):
    monkeypatch.chdir(tmp_path)
    files = ["base.yaml", "model/phi-1.5.yaml", f"strategy/{name}.yaml"]
    here = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    content = yaml.safe_load((CONFIGS / f"strategy/{name}.yaml").read_text())["trainer"]
    devices = [] if isinstance(content["devices"], int) else ["--trainer.devices=2"]  # as many as there are: GPUs
    app = cli.build([*(f"--config={CONFIGS / f}" for f in files), *here, *devices], run=False)
    assert type(app.trainer.strategy) is STRATEGIES[name]
    assert app.trainer.world_size == {"single": 1, "cpu": 1, "fsdp": 4, "fsdp2": 4, "fsdp_multinode": 8}.get(name, 2)


def test_every_strategy_config_has_its_class_checked():
    assert {path.stem for path in (CONFIGS / "strategy").glob("*.yaml")} == set(STRATEGIES)


def test_there_are_configs():
    assert {"base.yaml", "quickstart.yaml"} <= {p.name for p in FILES}


def test_stacking_merges_deeply(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["base.yaml", "model/mistral-7b.yaml", "strategy/cpu.yaml"]
    app = cli.build([*(f"--config={CONFIGS / f}" for f in files), "--model.optimizer.lr=0.5"], run=False)
    assert app.model.backbone.model_backbone_type == "mistral"
    assert app.model.backbone.lora_alpha == 32  # from the base
    assert app.model.backbone.dtype == "float32"  # from the strategy
    assert app.model.optimizer_config.lr == 0.5
