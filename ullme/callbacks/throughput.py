"""Logs throughput, model FLOPs utilisation, padding, data-loading time, peak memory and remaining time."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from ullme.batch import Batch
from ullme.callbacks.gradcache import GradCache
from ullme.engine.gradcache import chunk_rows
from ullme.planning.devices import peak_tflops
from ullme.planning.flops import model_cost, step_work
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from ullme.engine.objective import Objective
    from ullme.training.module import ULLMEModule

GIB = 2**30
TOTALS_FILE = "seen.json"  # in the run folder, written at the end of training


class Throughput(L.Callback):
    """Logs, to the progress bar and the logger, over the steps since the last log and over all ranks:

    - ``tokens/s``: real tokens of queries and passages; ``queries/s``;
    - ``mfu``: model FLOPs utilisation (arXiv 2204.02311, appendix B), model FLOPs per second on real tokens as a
      fraction of the devices' peak. Recomputation (GradCache's first forward, gradient checkpointing) and π_ref do not
      count. Logged only if the peak is known;
    - ``padding``: fraction of the tokens in the LLM's linear layers that are padding; 0 with packed rows;
    - ``waiting``: fraction of the time spent waiting for the dataloader;
    - ``memory/peak_gib``: peak memory of tensors since the start, on the device with the most; on a CPU, the process's
      peak resident set;
    - ``hours_left``: remaining steps at the current speed.

    At the end of training, ``seen.json`` in the run folder has the total queries, real tokens and seconds of training,
    earlier starts of a resumed run included. Time in validation is not counted. CUDA devices are synchronised only when
    values are logged.

    Args:
        peak_tflops: a device's peak in TFLOP/s; null looks it up by name, for bfloat16.

    Raises:
        ValueError: peak_tflops is not positive.
    """

    new_counts: Tensor | int  # (2,) this rank's queries and tokens that are not in the totals yet

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"throughput.peak_tflops={peak_tflops}: must be positive, or null to look it up")
        self.peak_tflops = peak_tflops
        self.counted_since = 0.0
        self.totals = {"queries": 0.0, "tokens": 0.0, "seconds": 0.0}

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        model = pl_module.model
        assert model is not None
        self.peak = self.peak_tflops or _find_peak(trainer, pl_module)
        self.cost = model_cost(model.causal_lm.config, model.options) if self.peak else None
        self.causal = model.options.attention == "causal"
        self._start_window(trainer)
        self._reset_new_counts()

    def _start_window(self, trainer: L.Trainer) -> None:
        self.started = time.perf_counter()
        self.waited = _loader_wait(trainer)
        self.steps = 0
        self.counts: Tensor | float = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(self, "started"):  # not in validation before or without training
            took = time.perf_counter() - self.paused
            self.started, self.counted_since = self.started + took, self.counted_since + took

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ULLMEModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.steps += 1
        self.counts = self.counts + self._count(pl_module, batch)
        self.new_counts = self.new_counts + _queries_and_tokens(batch)
        if not trainer._logger_connector.should_update_logs:
            return
        if batch.row_ids.is_cuda:
            torch.cuda.synchronize()
        assert isinstance(self.counts, Tensor)
        for name, value in self._window_metrics(trainer, self.counts).items():
            pl_module.log(name, value, prog_bar=True)
        self._start_window(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the totals of all ranks; called on every rank."""
        if hasattr(self, "started"):
            self._add_to_totals(trainer)
            checkpoint["callbacks"][self.state_key] = dict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = {name: state_dict.get(name, 0.0) for name in self.totals}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add_to_totals(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            text = json.dumps({name: round(value, 1) for name, value in self.totals.items()})
            atomic_files.write_text(Path(trainer.default_root_dir, TOTALS_FILE), text)

    def _reset_new_counts(self) -> None:
        self.counted_since = time.perf_counter()
        self.new_counts = 0

    def _add_to_totals(self, trainer: L.Trainer) -> None:
        """Add the new counts of all ranks to the totals; a collective, which every rank must call."""
        if isinstance(self.new_counts, Tensor):
            queries, tokens = trainer.strategy.reduce(self.new_counts, reduce_op="sum").tolist()
            self.totals["queries"] += queries
            self.totals["tokens"] += tokens
        self.totals["seconds"] += time.perf_counter() - self.counted_since
        self._reset_new_counts()

    def _count(self, module: ULLMEModule, batch: Batch) -> Tensor:
        """(5,) queries, real tokens, tokens in the linear layers without and with padding, model FLOPs of a batch."""
        objective: Objective = module.loss.objective
        packed = module.model.attention_path == "packed"
        work = step_work(batch, objective, self.causal, packed and objective.share_prompts)
        real = work.embed.tokens + work.learned.tokens
        counts = (
            len(batch),
            batch.num_tokens,
            real,
            real if packed else _padded_tokens(module, batch),
            self.cost.step(work) if self.cost else 0,
        )
        # torch.full makes a tensor on the device without waiting for it
        device = batch.row_ids.device
        return torch.stack([torch.full((), float(c), device=device) for c in counts])

    def _window_metrics(self, trainer: L.Trainer, counts: Tensor) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        waiting = (_loader_wait(trainer) - self.waited) / elapsed
        local = torch.cat([counts, counts.new_tensor([waiting])])
        total = trainer.strategy.reduce(local, reduce_op="sum")
        peak = trainer.strategy.reduce(local.new_tensor([_peak_memory(counts.device)]), reduce_op="max")
        queries, tokens, real, computed, flops, waiting = total.tolist()
        remaining = trainer.estimated_stepping_batches - trainer.global_step
        metrics = {
            "tokens/s": tokens / elapsed,
            "queries/s": queries / elapsed,
            "padding": 1 - real / computed,
            "waiting": waiting / trainer.world_size,
            "memory/peak_gib": peak.item() / GIB,
            "hours_left": remaining * elapsed / self.steps / 3600,
        }
        if self.peak:
            metrics["mfu"] = flops / elapsed / (self.peak * 1e12 * trainer.world_size)
        return metrics


def _queries_and_tokens(batch: Batch) -> Tensor:
    """(2,) queries, and real tokens of queries and passages; integers, since they are summed over a whole run."""
    device = batch.row_ids.device
    counts = len(batch), batch.num_tokens
    return torch.stack([torch.full((), count, dtype=torch.long, device=device) for count in counts])


def _find_peak(trainer: L.Trainer, module: ULLMEModule) -> float | None:
    """Peak TFLOP/s of the device, if it is known and the model computes in bfloat16."""
    half = str(trainer.precision).startswith("bf16") or next(module.parameters()).dtype == torch.bfloat16
    device = module.device
    return peak_tflops(torch.cuda.get_device_name(device)) if half and device.type == "cuda" else None


def _loader_wait(trainer: L.Trainer) -> float:
    """Seconds that training has waited for its dataloader; 0 for a dataloader that does not measure it."""
    return getattr(trainer.train_dataloader, "waited", 0.0)


def _peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of tensors on CUDA, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _padded_tokens(module: ULLMEModule, batch: Batch) -> int:
    """Tokens, padding included, in the linear layers in forwards with gradient, for a backbone that is not packed."""
    loss, whole = module.loss, slice(0, len(batch))
    chunks = loss.chunks(batch) if isinstance(loss, GradCache) else [whole]
    microbatches = loss.microbatches(batch) if isinstance(loss, GradCache) else [chunk_rows(batch, whole)]
    objective = loss.objective.of_terms(batch.terms)
    total = 0
    if objective.uses_reps:
        lengths = batch.embedded_lengths
        total += sum(len(rows) * int(lengths[rows].max()) for rows in microbatches)
    scoring = objective.scoring(batch)
    for part in chunks:
        chunk = batch[part]
        if objective.masking is not None:
            widths = chunk.queries.host_lengths.tolist()
            total += len(widths) * max(widths)
        for kind, scored in scoring.items():
            rows = chunk.generation_rows(kind)
            prompts = rows.prompts.host_lengths.view(len(chunk), -1)
            learned = scored[part].learned
            widths = (prompts + rows.host_lengths(learned.shape) - 1)[learned].tolist()
            total += len(widths) * max(widths, default=0)
    return total
