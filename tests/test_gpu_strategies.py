"""Strategies on a real GPU, one process: the same losses and scores as without. Needs lightning beside test_gpu's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from strategy_runs import Recorder, make_data, write_data

from ullme.callbacks import GRL
from ullme.models.config import BackboneConfig
from ullme.prompts import Prompts
from ullme.training.module import OptimizerConfig, ULLMEModule

DEVICE = "gpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# as configs/strategy has them
STRATEGIES = {
    "ddp": DDPStrategy,
    "fsdp": lambda: FSDPStrategy(sharding_strategy="FULL_SHARD", state_dict_type="full"),
    "fsdp2": lambda: ModelParallelStrategy(1, 1, save_distributed_checkpoint=False),
}


def train(folder: Path, llm: str, strategy: Any, dtype: str) -> tuple[list[float], dict[str, float]]:
    """The losses of five steps of GRL in chunks of one query, and the validation scores after them."""
    recorder = Recorder(None)
    trainer = L.Trainer(
        accelerator=DEVICE,
        devices=1,
        strategy=strategy,
        precision="32-true" if dtype == "float32" else "bf16-mixed",
        max_steps=5,
        callbacks=[GRL(chunk_size=1), recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    backbone = BackboneConfig(llm, dtype=dtype, lora_name="a", lora_r=4, lora_dropout=0.0)
    torch.manual_seed(0)
    prompts, optimizer = Prompts(query="{text}", generation="{text} "), OptimizerConfig(lr=1e-2, gradient_clip_val=0.3)
    trainer.fit(ULLMEModule(backbone, prompts, optimizer), make_data(str(folder)))
    assert recorder.gradients
    return recorder.losses, {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val/")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_changes_no_loss(name, dtype, llm_folder, tmp_path):
    """In bfloat16 the adapter stays in float32 beside the LLM, which one FSDP group could not hold."""
    write_data(tmp_path)
    losses, scores = train(tmp_path, llm_folder(), "auto", dtype)
    found, same = train(tmp_path, llm_folder(), STRATEGIES[name](), dtype)
    assert len(losses) == 5
    assert max(losses) > min(losses) + 1e-3
    near = 1e-4 if dtype == "float32" else 0.1
    assert found == pytest.approx(losses, rel=near)
    assert scores["val/mrr@10"] > 0
    assert same == pytest.approx(scores, rel=near)
