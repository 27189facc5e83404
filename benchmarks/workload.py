"""The workload that every benchmark shares: a small random Llama, and token rows with MS MARCO's lengths."""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ullme.batch import Batch, GenerationRows
from ullme.data.sampler import Draw
from ullme.models import ULLME
from ullme.prompts import pad_rows
from ullme.token_rows import TokenRows

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 256, 4, 4, 688


def save_tokenizer(folder: str, vocabulary: int) -> None:
    """A tokenizer of one token a word; its words are w3, w4 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def read_rows(path: Path, count: int, negatives: int) -> list[Draw]:
    """The first rows of a JSONL file of query, pos and neg that have as many negatives; each with its first of them.

    Args:
        path: the file.
        count: of rows, at most.
        negatives: of each.

    Raises:
        ValueError: no row has as many.
    """
    with path.open() as lines:
        rows = (row for row in map(json.loads, lines) if len(row["neg"]) >= negatives)
        found = [Draw(row["query"], row["pos"][0], row["neg"][:negatives], None) for row in islice(rows, count)]
    if not found:
        raise ValueError(f"--rows={path}: no row has --negatives={negatives} negatives")
    return found


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
    torch.manual_seed(1)  # of lora_A
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


def make_batch(
    queries: int, negatives: int = 8, vocabulary: int = 4096, seed: int = 0, passage_tokens: int | None = None
) -> Batch:
    """Queries of 8 to 12 tokens, passages lognormal with mean 75 and sigma 0.40, clipped to 8 to 200, or all alike."""
    rng = np.random.default_rng(seed)

    def rows(lengths: np.ndarray) -> TokenRows:
        return pad_rows([rng.integers(3, vocabulary, n).tolist() for n in lengths], 0)

    count = queries * (1 + negatives)
    query_lengths = rng.integers(8, 13, queries)
    lengths = passage_lengths(count, rng) if passage_tokens is None else np.full(count, passage_tokens)
    query_rows, passages = rows(query_lengths), rows(lengths)
    return Batch(
        query_rows,
        passages,
        torch.arange(count).view(queries, -1),
        torch.arange(queries),
        GenerationRows(query_rows, passages),
    )


def peak_allocated(step: Callable[[], object]) -> float:
    """The most MB that PyTorch's CPU allocator held at once during ``step``, above what it held before.

    The process's resident set would also count what malloc keeps of freed blocks, which depends on their order.
    """
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        tempfile.TemporaryDirectory() as out,
    ):
        step()
        record.stop()
        record.export_chrome_trace(f"{out}/trace.json")
        events = json.loads(Path(out, "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        if event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak / 2**20


def resident() -> float:
    """MB of memory that this process has (Linux)."""
    return _status("VmRSS")


def peak_resident() -> float:
    """The most MB since :func:`reset_peak` (Linux)."""
    return _status("VmHWM")


def return_freed_memory() -> None:
    """Let malloc give back what it keeps of freed blocks (glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024
