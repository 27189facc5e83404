"""The workload that every benchmark shares: a small random Llama, and token rows with MS MARCO's lengths."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from ullme.batch import Batch, GenerationRows, TokenRows
from ullme.models import ULLME
from ullme.prompts import pad_rows

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 256, 4, 4, 688


def save_tokenizer(folder: str) -> None:
    """The smallest tokenizer that loads; the benchmarks make token ids themselves."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def make_model(vocabulary: int = 4096, **options: object) -> ULLME:
    """A Llama of random weights with LoRA r 16 on all linear layers, in float32."""
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
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        save_tokenizer(folder)
        return ULLME(
            folder, **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "dtype": "float32", **options}
        ).train()


def make_batch(queries: int, negatives: int = 8, vocabulary: int = 4096, seed: int = 0) -> Batch:
    """Queries of 8 to 12 tokens, passages lognormal with mean 75 and sigma 0.40, clipped to 8 to 200."""
    rng = np.random.default_rng(seed)

    def rows(lengths: np.ndarray) -> TokenRows:
        return pad_rows([rng.integers(3, vocabulary, n).tolist() for n in lengths], 0)

    count = queries * (1 + negatives)
    query_lengths = rng.integers(8, 13, queries)
    passage_lengths = np.clip(rng.lognormal(np.log(75) - 0.4**2 / 2, 0.4, count), 8, 200).astype(int)
    return Batch(
        rows(query_lengths),
        rows(passage_lengths),
        torch.arange(count).view(queries, -1),
        torch.arange(queries),
        GenerationRows(rows(query_lengths + 20), rows(passage_lengths)),
    )
