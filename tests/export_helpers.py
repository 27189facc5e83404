"""Texts, a run folder and comparisons that the tests of export share."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from ullme.models.trained_weights import CONTRACT_KEY, STATE_PREFIX, contract, trainable_state
from ullme.prompts import Prompts
from ullme.utils import atomic_files

# Other texts than those on which an export compares by itself.
SEEN = [
    "What grows in the shade?",
    "Ferns, mosses and a few patient orchids do; most grasses do not, and give way to them within a few wet years.",
    "x",
    "Größe: 12 m² \n\t(ungefähr)",
]
PROMPTS = Prompts(query="find: {text}", passage="{text}")


def embed(model) -> torch.Tensor:
    """(2 n, D): SEEN as queries and as passages, as ullme embeds them."""
    return torch.cat([model.encode(SEEN, role=role, convert_to_tensor=True) for role in ("query", "passage")])


def embed_elsewhere(folder: Path, batch_size: int = 3) -> torch.Tensor:
    """The same as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(folder), device="cpu")
    options = {"convert_to_tensor": True, "batch_size": batch_size, "show_progress_bar": False}
    return torch.cat([loaded.encode_query(SEEN, **options), loaded.encode_document(SEEN, **options)])


def write_run(model, folder: Path, **config) -> Path:
    """A run folder as training leaves it, without the training."""
    values = {
        "seed_everything": 3,
        "trainer": {"precision": "32-true", "logger": {"init_args": {"api_key": "sesame-open"}}},
        "model": {
            "backbone": {"lora_name": "ullme", "lora_r": 4, "lora_alpha": 8},
            "optimizer": {"lr": 1e-3, "schedule": "linear"},
        },
        "data": {"train": "Tevatron/msmarco-passage", "batch_size": 16, "num_hard_negatives": 2},
        "loss": {
            "class_path": "ullme.callbacks.GradCache",
            "init_args": {"terms": [{"class_path": "ullme.losses.InfoNCE", "init_args": {"temperature": 0.05}}]},
        },
        **config,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    state = {STATE_PREFIX + name: value for name, value in trainable_state(model).items()}
    content = {CONTRACT_KEY: contract(model), "global_step": 12, "state_dict": state}
    atomic_files.save(content, folder / "checkpoints" / "last.ckpt")
    return folder
