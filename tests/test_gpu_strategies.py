"""The strategies of configs/strategy on a real GPU, one process: the same losses as without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme import cli

CONFIGS = Path(__file__).parents[1] / "configs" / "strategy"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STRATEGIES = {
    "ddp": [],
    "fsdp": [],
    "fsdp2": ["--trainer.strategy.init_args.data_parallel_size=1"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_changes_no_loss(name, dtype, arguments, tmp_path):  # noqa: F811
    """In bfloat16 the adapter stays in float32 beside the LLM, which one FSDP group could not hold."""
    precision = "32-true" if dtype == "float32" else "bf16-mixed"
    common = [f"--trainer.precision={precision}", f"--model.backbone.dtype={dtype}", "--model.backbone.lora_dropout=0"]
    common += ["--loss=GRL", "--loss.chunk_size=1", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    for run, config, extra in (("one", "single", []), ("other", name, STRATEGIES[name])):
        given = [a for a in arguments(run) if not a.startswith(("--trainer.accelerator", "--loss"))]
        cli.main([*given, *common, f"--config={CONFIGS / config}.yaml", "--trainer.devices=1", *extra])
    for column in ("train/loss", "val/mrr@10"):
        one, other = (logged(tmp_path / run, column) for run in ("one", "other"))
        assert one
        assert other == {
            step: pytest.approx(value, rel=1e-4 if dtype == "float32" else 0.1) for step, value in one.items()
        }
