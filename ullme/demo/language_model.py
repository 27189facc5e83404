"""Train a tokenizer and pre-train a tiny Llama on the texts of the synthetic dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def build_backbone(
    folder: str | Path,
    texts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 200,
    hidden_size: int = 128,
    num_layers: int = 2,
    vocab_size: int = 1024,
    batch_size: int = 16,
    block_length: int = 128,
    learning_rate: float = 4e-3,
    progress: bool = True,
) -> list[float]:
    """Train a tokenizer and pre-train a causal Llama on ``texts``; save both as a transformers folder.

    On the same machine, the same arguments give the same weights.

    Args:
        folder: created if it does not exist.
        texts: training texts of the tokenizer and the LLM; in the quickstart ``World.pretrain_file``, which has no
            entity of the test queries.
        seed: of the initial weights and the order of the texts.
        steps: optimizer steps, of ``batch_size * block_length`` tokens each.
        hidden_size: D, a multiple of the head dimension 32.
        num_layers: number of decoder layers.
        vocab_size: V, at least 260 (the bytes and the special tokens).
        batch_size: blocks per step.
        block_length: L, tokens per block.
        learning_rate: peak learning rate, reached after a tenth of the steps.
        progress: show a progress bar.

    Returns:
        The loss of every step, in nats per token.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    model = new_llama(tokenizer, seed=seed, hidden_size=hidden_size, num_layers=num_layers)
    blocks = pack(tokenizer, texts, block_length, seed)
    losses = pretrain(model, blocks, steps, batch_size, learning_rate, seed, progress)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return losses


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``<pad>``, ``<s>`` and ``</s>``; like Llama's, it adds ``<s>`` in front.

    The vocabulary is small, so that names are split into syllables that other names share.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_llama(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, hidden_size: int = 128, num_layers: int = 2
) -> LlamaForCausalLM:
    """A randomly initialised Llama with grouped-query attention and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden_size // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * math.ceil(hidden_size / 3),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], block_length: int, seed: int) -> Tensor:
    """Concatenate the texts in random order, each between ``<s>`` and ``</s>``, and split them into blocks.

    An incomplete last block is dropped.

    Returns:
        (blocks, block_length) token ids.

    Raises:
        ValueError: the texts do not fill one block.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    rows: list[list[int]] = tokenizer([texts[n] for n in order.tolist()])["input_ids"]
    stream = [token for row in rows for token in [*row, tokenizer.eos_token_id]]
    blocks = len(stream) // block_length
    if not blocks:
        raise ValueError(f"block_length={block_length} is more than the {len(stream)} tokens of all texts; shorten it")
    return torch.tensor(stream[: blocks * block_length]).view(blocks, block_length)


def pretrain(
    model: LlamaForCausalLM,
    blocks: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> list[float]:
    """Train by next-token prediction, with AdamW, warm-up over a tenth of the steps and cosine decay to zero.

    Args:
        model: trained in place.
        blocks: (blocks, L) token ids; each step draws a batch with replacement.
        steps: optimizer steps.
        batch_size: blocks per step.
        learning_rate: peak learning rate.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        The loss of every step, in nats per token.
    """
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 10)

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    losses: list[float] = []
    model.train()
    bar = tqdm(range(steps), desc="pre-training", unit="step", disable=not progress)
    for _ in bar:
        batch = blocks[torch.randint(len(blocks), (batch_size,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model.eval()
    return losses
