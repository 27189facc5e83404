"""LLMs of the published shapes with random weights, for benchmarks on an accelerator."""

from __future__ import annotations

import tempfile
from typing import Any
from unittest.mock import patch

import torch
from workload import save_tokenizer

from ullme.batch import Batch
from ullme.commands.plan import SHAPES
from ullme.engine.reference import Reference
from ullme.models import ULLME, loading

MODELS = {
    "phi-1.5": "microsoft/phi-1_5",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
}


class Sizes:
    """How much of everything; ``--tiny`` is for the code and not for the clock."""

    def __init__(self, tiny: bool) -> None:
        self.batch = 4 if tiny else 512
        self.batches = (2, 4) if tiny else (64, 128, 256, 512)
        self.passages = 24 if tiny else 8192
        self.product = 64 if tiny else 8192
        self.small_batch = 2 if tiny else 64
        self.shape = (
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            | {"vocab_size": 512, "max_position_embeddings": 512, "num_key_value_heads": 2}
            if tiny
            else {}
        )


class Given(Reference):
    """log π_ref that is known beforehand."""

    def prepare(self, model: ULLME, precision: str, likelihoods: Any = ()) -> None: ...

    def logps(self, model: ULLME, batch: Batch, mask: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(mask.shape, -600.0, device=model.device)


def build(name: str, device: torch.device, sizes: Sizes, **options: Any) -> ULLME:
    """An ULLME of a published shape with random weights, made on the device: nothing is read but a toy tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = SHAPES[MODELS[name]]
    config = AutoConfig.for_model(kind, **{**shape, **sizes.shape, "dtype": "bfloat16"})

    def random_weights(*_: Any) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(loading, "load_config", lambda _: config),
        patch.object(loading, "load_backbone", random_weights),
    ):
        save_tokenizer(folder, config.vocab_size)
        settings = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.2, "dtype": "bfloat16"}
        settings["gradient_checkpointing"] = "auto"
        model = ULLME(folder, **{**settings, **options})
    return model.to(device).train()
