from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from tiny import save_llm

torch.set_num_threads(1)  # tiny models lose more to thread start-up than they win
os.environ["ULLME_CPU_GFLOPS"] = "float32=50,bfloat16=1"  # no test depends on how fast this processor is


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` only the files with such tests are imported: others need packages that a GPU machine may lack."""
    if config.option.markexpr.strip() != "gpu" or collection_path.suffix != ".py":
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """family -> folder of a tiny LLM, saved once."""
    saved: dict[tuple, str] = {}

    def folder(family: str = "llama", **sizes) -> str:
        key = (family, *sorted(sizes.items()))
        if key not in saved:
            saved[key] = save_llm(tmp_path_factory.mktemp("llm"), family, **sizes)
        return saved[key]

    return folder


@pytest.fixture
def make_model(llm_folder):
    """ULLME on a tiny LLM, LoRA weights away from zero so that the adapter matters."""
    from ullme.models import ULLME

    def make(family: str = "llama", sizes: dict | None = None, **options):
        options = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **options}
        folder = llm_folder(family, **(sizes or {}))
        torch.manual_seed(0)
        model = ULLME(folder, **options)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model

    return make
