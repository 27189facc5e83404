"""What people use now, on the same weights: sentence-transformers, and a plain padded GradCache step for GRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize

from ullme.batch import Batch
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ullme.models import ULLME


def peft_llm(folder: str, model: ULLME) -> nn.Module:
    """The same LLM with PEFT's own LoRA layers around it, for :func:`plain_grl_step`."""
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    _add_adapter(llm, model)
    return llm.train()


def sentence_transformer(folder: str, model: ULLME) -> SentenceTransformer:
    """The same LLM and adapter in sentence-transformers: bidirectional attention, mean pooling, normalised.

    Args:
        folder: where ``model``'s backbone was saved.
        model: whose adapter is copied.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(folder, model_kwargs={"dtype": "float32"})
    transformer.auto_model.config.is_causal = False
    _add_adapter(transformer.auto_model, model)
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    ).train()


def _add_adapter(llm: nn.Module, model: ULLME) -> None:
    """Put LoRA into ``llm`` in place, with the values of ``model``'s adapter."""
    from peft import LoraConfig, get_peft_model

    options = model.options
    targets = "all-linear"
    lora = LoraConfig(r=options.lora_r, lora_alpha=int(options.lora_alpha), lora_dropout=0.0, target_modules=targets)
    theirs = get_peft_model(llm, lora)
    ours = {short_name(name): parameter for name, parameter in adapter(model)}
    for name, parameter in adapter(theirs):
        parameter.data.copy_(ours[short_name(name)])


def short_name(name: str) -> str:
    """A LoRA weight's name without what stands around the layers and without the adapter's name."""
    layer, kind = name.split("layers.", 1)[1].split(".lora_", 1)
    return f"{layer}.lora_{kind[0]}"


def adapter(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def features(batch: Batch) -> list[dict[str, Tensor]]:
    """A batch as sentence-transformers wants it: queries, then one column for each place among the candidates."""
    candidates = len(batch.passages) // len(batch)
    columns = [TokenRows(*(x[n::candidates] for x in _pair(batch.passages))) for n in range(candidates)]
    return [dict(zip(("input_ids", "attention_mask"), _pair(rows), strict=True)) for rows in [batch.queries, *columns]]


def _pair(rows: TokenRows) -> tuple[Tensor, Tensor]:
    return rows.input_ids, rows.attention_mask


def plain_grl_step(
    llm: nn.Module, batch: Batch, reference_logps: Tensor, chunk_size: int = 8, temperature: float = 0.05
) -> Tensor:
    """InfoNCE + 0.5 DPO + KL as GradCache is usually written: padded blocks, whole logits, a graph a chunk.

    It is spared what it need not do: rows are padded to the longest of their chunk only, embedding runs the decoder
    without its LM head, queries and passages run apart, and the reference is given.

    Args:
        llm: transformers' causal LM with adapters.
        batch: B queries with C candidates.
        reference_logps: (B, C) log π_ref, in nats.
        chunk_size: queries in a chunk.

    Returns:
        The loss; gradients are added to the parameters.
    """
    chunks = [batch[n : n + chunk_size] for n in range(0, len(batch), chunk_size)]
    with torch.no_grad():
        parts = [_embed_chunk(llm, chunk) for chunk in chunks]
    queries = torch.cat([q for q, _ in parts]).requires_grad_()
    passages = torch.cat([p for _, p in parts]).requires_grad_()
    scores = queries @ passages.flatten(0, 1).T / temperature
    positives = torch.arange(len(batch)) * passages.shape[1]
    loss = cross_entropy(scores, positives)
    loss.backward()
    total = loss.detach()
    for n, chunk in enumerate(chunks):
        part = slice(n * chunk_size, n * chunk_size + len(chunk))
        q, p = _embed_chunk(llm, chunk)
        surrogate = (q * queries.grad[part]).sum() + (p * passages.grad[part]).sum()
        logps, lengths = _whole_logit_logps(llm, chunk, p.shape[1])
        margin = logps - reference_logps[part]
        dpo = -logsigmoid(0.1 * (margin[:, :1] - margin[:, 1:])).mean(1)
        retrieval = log_softmax(torch.einsum("bd,bcd->bc", q, p), -1)
        generation = log_softmax(logps / lengths, -1)
        kl = (retrieval.exp() * (retrieval - generation)).sum(-1)
        own = (0.5 * dpo + kl).sum() / len(batch)
        (surrogate + own).backward()
        total = total + own.detach()
    return total


def _embed_chunk(llm: nn.Module, chunk: Batch) -> tuple[Tensor, Tensor]:
    """(b, D) and (b, C, D)."""
    queries, passages = _embed(llm, chunk.queries), _embed(llm, chunk.passages)
    return queries, passages.view(len(queries), -1, passages.shape[-1])


def _embed(llm: nn.Module, rows: TokenRows) -> Tensor:
    """(R, D), padded to the longest row, bidirectional."""
    width = int(rows.attention_mask.sum(1).max())
    ids, mask = rows.input_ids[:, :width], rows.attention_mask[:, :width]
    hidden = llm.base_model(input_ids=ids, attention_mask=mask, is_causal=False, use_cache=False).last_hidden_state
    return normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def _whole_logit_logps(llm: nn.Module, chunk: Batch, candidates: int) -> tuple[Tensor, Tensor]:
    """(b, C) log π(p|q) from the logits of whole padded rows, and token counts."""
    assert chunk.generation is not None
    prompts, targets = chunk.generation.prompts, chunk.generation.targets
    prompt_lengths = prompts.attention_mask.sum(1).repeat_interleave(candidates).tolist()
    lengths = targets.attention_mask.sum(1)
    rows = [
        torch.cat([prompts.input_ids[n // candidates, :front], targets.input_ids[n, :length]])
        for n, (front, length) in enumerate(zip(prompt_lengths, lengths.tolist(), strict=True))
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    logits = llm(input_ids=ids, attention_mask=mask.long(), is_causal=True, use_cache=False).logits[:, :-1]
    place = torch.arange(1, ids.shape[1])
    scored = mask[:, 1:] & (place >= torch.tensor(prompt_lengths)[:, None])
    tokens = -cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    logps = (tokens * scored).sum(1)
    return logps.view(-1, candidates), lengths.view(-1, candidates)
