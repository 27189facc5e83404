"""Tiny random LLMs of many families with a tokenizer, made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

TEXTS = [
    "The river Elba flows past the old mill and the market square.",
    "A query asks: who founded the town? The answer is a short passage.",
    "Numbers such as 1984, 2024 and 3.14 appear in many documents.",
    "Bright copper kettles and warm woollen mittens, said the instructor.",
    "short",
]

# What a family calls its sizes, where the common names are not enough.
SIZES: dict[str, dict] = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi": {"resid_pdrop": 0.0},
}

FAMILIES = (
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
)


@cache
def make_tokenizer():
    """Byte-level BPE of about 300 tokens that begins a text with <s>, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_readable_tokenizer():
    """The same, and what it decodes is text."""
    from copy import deepcopy

    from tokenizers import decoders

    tokenizer = deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_llm(family: str, **sizes):
    """A random causal LM of two layers; weights are large enough for every effect to be visible."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 304,
            "max_position_embeddings": 128,
            "head_dim": 8,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **SIZES.get(family, {}),
            **sizes,
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_llm(folder: Path, family: str, **sizes) -> str:
    """A folder that from_pretrained loads."""
    make_llm(family, **sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def recomputes_layers(model: torch.nn.Module) -> bool:
    """Is gradient checkpointing on? The property of transformers that says so has changed its name."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def blank_batch(keys: torch.Tensor, row_ids: torch.Tensor | None = None, **fields):
    """A batch for losses, which look at no text of it.

    Args:
        keys: (B, C), of the passages.
        row_ids: (B,); from 0 if not given.
        fields: of :class:`ullme.batch.Batch`.
    """
    from ullme.batch import Batch
    from ullme.prompts import pad_rows

    rows = torch.arange(len(keys)) if row_ids is None else row_ids
    return Batch(pad_rows([[1]] * len(keys), 0), pad_rows([[1]] * keys.numel(), 0), keys, rows, **fields)
