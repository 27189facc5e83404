"""Loading the exported folder with sentence-transformers or PEFT alone, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.commands.export.contract import PROMPT_NAMES

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME


def need_sentence_transformers() -> None:
    """Check that sentence-transformers is installed. Raises: ValueError: it is not."""
    from importlib.util import find_spec

    if find_spec("sentence_transformers") is None:
        raise ValueError("an export is checked with sentence-transformers, which is not installed: pip install it")


def as_sentence_transformer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder as ``SentenceTransformer(folder)`` loads it, computing in ``dtype``."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(folder), device=str(device), model_kwargs={"dtype": dtype}, local_files_only=True, trust_remote_code=False
    ).eval()


def plain_embeddings(folder: Path, texts: Sequence[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, 2 R, D): the R texts as queries, then as documents; in batches of unequal lengths, then one by one.

    D is the folder's ``truncate_dim`` where it has one, and embeddings are normalised after truncation.

    A single text has no padding, without which some families ignore bidirectional attention.
    """
    loaded = as_sentence_transformer(folder, dtype, device)
    names = PROMPT_NAMES.values()
    options = {"convert_to_tensor": True, "show_progress_bar": False, "normalize_embeddings": True}
    ways = [
        torch.cat([loaded.encode(list(texts), prompt_name=name, batch_size=size, **options) for name in names])
        for size in (4, 1)
    ]
    return torch.stack(ways).cpu()


@torch.no_grad()
def causal_outputs(model: ULLME, texts: Sequence[str]) -> list[Tensor]:
    """(L, V) logits of each text, as the causal language model with its adapter gives them."""
    return [model(**_ids(model, text), is_generate=True).logits[0].float().cpu() for text in texts]


@torch.no_grad()
def peft_outputs(llm: nn.Module, adapter: Path, model: ULLME, texts: Sequence[str]) -> list[Tensor]:
    """(L, V) logits of each text, with the adapter folder loaded by PEFT onto the pre-trained LLM."""
    from peft import PeftModel

    from ullme.models.lora import without_deprecation_warning

    with without_deprecation_warning():
        loaded = PeftModel.from_pretrained(llm, str(adapter)).eval()
    return [loaded(**_ids(model, text)).logits[0].float().cpu() for text in texts]


def _ids(model: ULLME, text: str) -> dict[str, Tensor]:
    """Of as many tokens as the LLM has positions."""
    ids = model.tokenizer(text, return_tensors="pt")
    return {key: ids[key][:, : model.max_positions].to(model.device) for key in ("input_ids", "attention_mask")}
