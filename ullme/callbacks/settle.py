"""What a config leaves to ``auto``, chosen for the run at hand before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from ullme.distributed import most
from ullme.engine import fsdp
from ullme.planning.auto_chunk import Chunking, choose, try_out
from ullme.planning.devices import free_memory
from ullme.planning.memory import GIB

if TYPE_CHECKING:
    from ullme.callbacks.base import LossCallback
    from ullme.training.module import ULLMEModule


def settle(trainer: L.Trainer, module: ULLMEModule, loss: LossCallback) -> Chunking:
    """The largest chunk that fits every rank's device, and whether layers have to be recomputed; tried out on CUDA.

    Raises:
        ValueError: not even the smallest chunk fits, or not the one that the options say.
    """
    model, data = module.model, trainer.datamodule  # type: ignore[attr-defined]
    assert model is not None
    passages = 1 + getattr(data, "num_hard_negatives", 8)
    passage_tokens = getattr(data, "passage_max_length", 256)
    own_tokens = getattr(data, "query_max_length", 64)
    query_tokens = own_tokens + passages * passage_tokens
    least = query_tokens if loss.objective.needs_generation else max(own_tokens, passage_tokens)
    queries = max(1, getattr(data, "batch_size", 512) // trainer.world_size)
    free = -most(-int(free_memory(model.device)), model.device)
    half = trainer.precision == "bf16-mixed"
    settled = loss.settled_tokens(query_tokens, queries)
    chunking = choose(model, half, least, settled, free)
    if model.device.type == "cuda" and fsdp.split_by(model) is None:
        context = trainer.precision_plugin.forward_context
        chunking = try_out(model, loss.objective, chunking, passages, passage_tokens, context, queries)
    if settled is not None and chunking.chunk_tokens < settled:
        raise ValueError(
            f"out of memory on {model.device} with as many tokens at once as loss says ({settled}); "
            f"{chunking.chunk_tokens} fit: give loss.chunk_tokens=auto to have that"
        )
    layers = "are recomputed in backward" if chunking.checkpointing else "keep their activations"
    rank_zero_info(
        f"auto: {free / GIB:.1f} GiB are free on {model.device}, so chunks have {chunking.chunk_tokens} tokens, the "
        f"graphs of {chunking.held_tokens} more are held, and layers {layers}"
    )
    return chunking
