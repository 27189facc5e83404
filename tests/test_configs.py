"""Every YAML in configs/ parses, and instantiates trainer, module, data and loss, alone or stacked on the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import strategies
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from ullme.callbacks import LossCallback
from ullme.commands import train

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY = sorted(CONFIGS.rglob("*.yaml"))
TABLES = [path for path in EVERY if "rows" in yaml.safe_load(path.read_text())]  # of `ullme reproduce`
FILES = [path for path in EVERY if path not in TABLES]
BELOW = {"loss", "strategy", "paper"}  # each file of these folders is instantiated in a stack, further below


def arguments(path: Path) -> list[str]:
    """Stack a fragment on what it needs; later files win."""
    content = yaml.safe_load(path.read_text())
    stack = [path]
    if not content.get("model", {}).get("backbone", {}).get("model_name_or_path"):
        stack.insert(0, CONFIGS / "model" / "phi-1.5.yaml")
    if path != CONFIGS / "base.yaml" and not (content.get("data", {}).get("train") or "").startswith("runs/"):
        stack.insert(0, CONFIGS / "base.yaml")
    return [f"--config={p}" for p in stack]


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Lightning refuses FSDP without a GPU before it looks at its options."""
    monkeypatch.setattr(_AcceleratorConnector, "_check_strategy_and_fallback", lambda self: None)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent.name not in BELOW or p.name == "base.yaml"],
    ids=lambda p: str(p.relative_to(CONFIGS)),
)
def test_instantiates(path, tmp_path, monkeypatch, no_gpu_needed):
    monkeypatch.chdir(tmp_path)
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    app = train.build([*arguments(path), *here], run=False)
    assert sum(isinstance(c, LossCallback) for c in app.trainer.callbacks) == 1
    assert app.model.backbone.model_name_or_path
    assert app.datamodule.batch_size > 0


def test_the_tables_are_those_there_are():
    assert [path.stem for path in TABLES] == ["columns", "mined", "miniature", "real", "small", "sweep", "table2"]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore:LightningCLI")
def test_every_stage_of_a_table_instantiates(path, tmp_path, monkeypatch, no_gpu_needed):
    from ullme.commands.reproduce.cells import Cell
    from ullme.commands.reproduce.cli import parser, read_table
    from ullme.commands.reproduce.spec import check, chosen, filled

    monkeypatch.chdir(tmp_path)
    table = filled(read_table(parser().parse_args([f"--config={path}", "--seeds=[3]"])), "an-llm", "data")
    check(table)
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false"]
    some = list(chosen(table, [f"{next(iter(table.models))}/*"]))
    for cell in [Cell(table, *one) for one in some]:
        assert len(cell.parsed) == len(cell.row.stages)
        for stage in cell.row.stages if path.stem == "miniature" else []:  # the others differ in what is parsed above
            app = train.build([*cell.configuration(stage), *here], run=False)
            assert app.model.backbone.attention == ("causal" if cell.row_id in CAUSAL else "bidirectional")
    assert len(some) == len(table.rows)


CAUSAL = ("base", "causal_cl", "echo")
PAPER_TERMS = {
    "causal_cl": {"info_nce": 1.0},
    "bi_cl": {"info_nce": 1.0},
    "bi_cl_sft": {"info_nce": 1.0, "sft": 0.5},
    "grl_sft": {"info_nce": 1.0, "sft": 0.5, "kl": 1.0},
    "grl": {"info_nce": 1.0, "dpo": 0.5, "kl": 1.0},
    "grl_query": {"info_nce": 1.0, "kl": 1.0},
    "art": {"kl": 1.0, "pseudo_label_info_nce": 1.0},
    "query_distillation": {"info_nce": 1.0, "kl": 1.0},
    "query_distillation_unlabelled": {"kl": 1.0},
    "echo": {"info_nce": 1.0},
    "llm2vec_mntp": {"mntp": 1.0},
    "llm2vec": {"info_nce": 1.0},
}


@pytest.mark.parametrize("name", PAPER_TERMS)
def test_each_row_of_the_paper_is_what_its_name_says(name, tmp_path, monkeypatch, no_gpu_needed):
    monkeypatch.chdir(tmp_path)
    files = ["base.yaml", "model/phi-1.5.yaml", f"paper/{name}.yaml", "strategy/fsdp_4xa100.yaml"]
    here = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    app = train.build([*(f"--config={CONFIGS / f}" for f in files), *here], run=False)
    (loss,) = (c for c in app.trainer.callbacks if isinstance(c, LossCallback))
    assert {term.name: term.weight for term in loss.objective.terms} == PAPER_TERMS[name]
    assert app.model.backbone.attention == ("causal" if name in CAUSAL else "bidirectional")
    assert app.trainer.world_size == 4


def test_every_row_of_the_paper_has_its_terms_checked():
    rows = {path.stem for path in (CONFIGS / "paper").glob("*.yaml")} - {path.stem for path in TABLES}
    assert rows == {"base", *PAPER_TERMS}


TERMS = {
    "contrastive": {"info_nce": 1.0},
    "causal": {"info_nce": 1.0},
    "matryoshka": {"matryoshka_info_nce": 1.0},
    "full_batch": {"info_nce": 1.0},
    "sft": {"sft": 1.0},
    "dpo": {"dpo": 1.0},
    "kto": {"kto": 1.0},
    "cpo": {"cpo": 1.0},
    "cl_sft": {"info_nce": 1.0, "sft": 0.5},
    "grl_sft": {"info_nce": 1.0, "sft": 0.5, "kl": 1.0},
    "grl": {"info_nce": 1.0, "dpo": 0.5, "kl": 1.0},
    "grl_query": {"info_nce": 1.0, "kl": 1.0},
    "distillation": {"info_nce": 1.0, "distillation_kl": 400.0},
    "margin_mse": {"margin_mse": 1.0},
    "false_negatives": {"info_nce": 1.0},
    "several_positives": {"info_nce": 1.0},
    "cosent": {"cosent": 1.0},
    "cosine_regression": {"cosine_regression": 1.0},
}


@pytest.mark.parametrize("name", TERMS)
def test_each_loss_config_is_what_its_name_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the strategy and the size of the run come last here: they must not put another loss in its place
    files = ["base.yaml", "model/phi-1.5.yaml", f"loss/{name}.yaml", "strategy/cpu.yaml", "small.yaml"]
    app = train.build([f"--config={CONFIGS / f}" for f in files], run=False)
    (loss,) = (c for c in app.trainer.callbacks if isinstance(c, LossCallback))
    assert {term.name: term.weight for term in loss.objective.terms} == TERMS[name]
    assert app.model.backbone.attention == ("causal" if name == "causal" else "bidirectional")


def test_every_loss_config_has_its_terms_checked():
    assert {path.stem for path in (CONFIGS / "loss").glob("*.yaml")} == set(TERMS)


FOUR = {"fsdp": 4, "fsdp_4xa100": 4, "fsdp2": 4}
STRATEGIES = {
    "single": strategies.SingleDeviceStrategy,
    "cpu": strategies.SingleDeviceStrategy,
    "ddp": strategies.DDPStrategy,
    "cpu_2proc": strategies.DDPStrategy,
    "fsdp": strategies.FSDPStrategy,
    "fsdp_4xa100": strategies.FSDPStrategy,
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
    app = train.build([*(f"--config={CONFIGS / f}" for f in files), *here, *devices], run=False)
    assert type(app.trainer.strategy) is STRATEGIES[name]
    assert app.trainer.world_size == {"single": 1, "cpu": 1, **FOUR, "fsdp_multinode": 8}.get(name, 2)


def test_every_strategy_config_has_its_class_checked():
    assert {path.stem for path in (CONFIGS / "strategy").glob("*.yaml")} == set(STRATEGIES)


def test_there_are_configs():
    assert {"base.yaml", "quickstart.yaml"} <= {p.name for p in FILES}


def test_stacking_merges_deeply(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["base.yaml", "model/mistral-7b.yaml", "strategy/cpu.yaml"]
    app = train.build([*(f"--config={CONFIGS / f}" for f in files), "--model.optimizer.lr=0.5"], run=False)
    assert app.model.backbone.model_backbone_type == "mistral"
    assert app.model.backbone.lora_alpha == 32  # from the base
    assert app.model.backbone.dtype == "float32"  # from the strategy
    assert app.model.optimizer_config.lr == 0.5


def test_an_interval_of_validation_stops_no_training_without_validation():
    """configs/base.yaml validates every 109 steps, and a small data set has fewer."""
    options = [f"--config={CONFIGS / 'base.yaml'}", "--model.backbone.model_name_or_path=x"]
    assert train.build(options, run=False).trainer.val_check_interval == 1.0
    assert train.build([*options, "--data.val=folder"], run=False).trainer.val_check_interval == 109
