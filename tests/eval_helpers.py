"""Texts, writers and tiny models that the tests of evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, save_llm

DOCUMENTS = [
    "the cat sleeps on the warm mat",
    "a dog barks at the red car",
    "stars shine over the quiet sea",
    "bread is baked in a hot oven",
    "the train leaves the old station",
    "rain falls on the green hills",
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tiny_llm(folder: Path) -> Path:
    """A random Llama; the last part of the folder's name is what its results are filed under."""
    return Path(save_llm(folder / "tiny-llm", "llama", max_position_embeddings=512))


def save_sentence_transformer(folder: Path) -> Path:
    """A sentence-transformers model around a random Bert, with different prompts for the two sides."""
    from transformers import BertConfig, BertModel

    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    bert = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(bert.get_embedding_dimension())
    prompts = {"query": "find: ", "document": "text: "}
    model = sentence_transformers.SentenceTransformer(
        modules=[bert, pooling, modules.Normalize()], prompts=prompts, device="cpu"
    )
    model.save(str(folder / "tiny-st"))
    return folder / "tiny-st"
