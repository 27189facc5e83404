"""The workload that every benchmark shares: a small random Llama, and token rows with MS MARCO's lengths."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from ullme.batch import Batch, GenerationRows, TokenRows
from ullme.models import ULLME
from ullme.prompts import pad_rows

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 256, 4, 4, 688


def save_tokenizer(folder: str, vocabulary: int) -> None:
    """A tokenizer of one token a word; its words are w3, w4 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def passage_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """MS MARCO's passages, in tokens."""
    return np.clip(rng.lognormal(np.log(75) - 0.4**2 / 2, 0.4, count), 8, 200).astype(int)


def make_passages(count: int, vocabulary: int = 4096, seed: int = 0) -> list[str]:
    """Texts of MS MARCO's lengths."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{n}" for n in rng.integers(3, vocabulary, k)) for k in passage_lengths(count, rng)]


def save_backbone(folder: str, vocabulary: int = 4096) -> None:
    """A Llama of random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, vocabulary)


def load_model(folder: str, **options: object) -> ULLME:
    """The LLM with LoRA r 16 on all linear layers, in float32. Its adapter is not the identity."""
    model = ULLME(folder, **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "dtype": "float32", **options})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.train()


def make_model(vocabulary: int = 4096, **options: object) -> ULLME:
    """:func:`save_backbone` and :func:`load_model` in one."""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder, vocabulary)
        return load_model(folder, **options)


def make_batch(queries: int, negatives: int = 8, vocabulary: int = 4096, seed: int = 0) -> Batch:
    """Queries of 8 to 12 tokens, passages lognormal with mean 75 and sigma 0.40, clipped to 8 to 200."""
    rng = np.random.default_rng(seed)

    def rows(lengths: np.ndarray) -> TokenRows:
        return pad_rows([rng.integers(3, vocabulary, n).tolist() for n in lengths], 0)

    count = queries * (1 + negatives)
    query_lengths = rng.integers(8, 13, queries)
    lengths = passage_lengths(count, rng)
    query_rows, passages = rows(query_lengths), rows(lengths)
    return Batch(
        query_rows,
        passages,
        torch.arange(count).view(queries, -1),
        torch.arange(queries),
        GenerationRows(query_rows, passages),
    )
