"""``chunk_tokens: auto`` and ``gradient_checkpointing: auto``, decided for a run before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from ullme.distributed import all_reduce_max
from ullme.engine import fsdp
from ullme.planning.auto_chunk import Chunking, fit_by_measurement, largest_chunk, shrink_until_it_fits
from ullme.planning.devices import free_memory
from ullme.planning.memory import GIB
from ullme.planning.rows import most_passages
from ullme.training.rows import kinds_of_batches

if TYPE_CHECKING:
    from ullme.engine.objective import Objective
    from ullme.training.module import ULLMEModule


def choose_chunking(
    trainer: L.Trainer,
    module: ULLMEModule,
    objective: Objective,
    fixed_chunk_tokens: Callable[[int, int], int | None],
) -> Chunking:
    """The largest chunk that fits every rank's device, and whether layers must be recomputed; on CUDA it is tried.

    Args:
        trainer: of the run; its data module says how long texts and how large batches are.
        module: of the run.
        objective: of the run.
        fixed_chunk_tokens: the most tokens of a query with its candidates, and the queries of a rank's batch -> the
            tokens in memory at once where the options say it, or None to choose.

    Raises:
        ValueError: not even the smallest chunk fits, or not the one that the options say.
    """
    model, data = module.model, trainer.datamodule  # type: ignore[attr-defined]
    assert model is not None
    passages = sum(most_passages(data))
    passage_tokens = getattr(data, "passage_max_length", 256)
    own_tokens = getattr(data, "query_max_length", 64)
    query_tokens = own_tokens + passages * passage_tokens
    least = query_tokens if objective.runs_generation else max(own_tokens, passage_tokens)
    queries = max(1, getattr(data, "batch_size", 512) // trainer.world_size)
    free = -all_reduce_max(-int(free_memory(model.device)), model.device)
    half = trainer.precision == "bf16-mixed"
    fixed = fixed_chunk_tokens(query_tokens, queries)
    chunking = largest_chunk(model, half, least, fixed, free)
    if model.device.type == "cuda":
        context = trainer.precision_plugin.forward_context
        datasets = kinds_of_batches(getattr(data, "source", None))
        step = (model, objective, chunking, passages, passage_tokens, context)
        if fsdp.split_by(model) is not None:
            chunking = fit_by_measurement(*step, free, datasets=datasets)
        else:
            planned = chunking
            chunking = shrink_until_it_fits(*step, queries, datasets)
            if chunking != planned:
                rank_zero_info(
                    "auto: the planned chunks did not fit; the environment variable "
                    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may make room for larger ones"
                )
    if fixed is not None and chunking.chunk_tokens < fixed:
        raise ValueError(
            f"out of memory on {model.device} with as many tokens at once as loss says ({fixed}); "
            f"{chunking.chunk_tokens} fit: give loss.chunk_tokens=auto to have that"
        )
    layers = "are recomputed in backward" if chunking.checkpointing else "keep their activations"
    rank_zero_info(
        f"auto: {free / GIB:.1f} GiB are free on {model.device}, so chunks have {chunking.chunk_tokens} tokens, the "
        f"graphs of {chunking.retained_tokens} more are retained, and layers {layers}"
    )
    return chunking
