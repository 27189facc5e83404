"""How fast a run goes, how well it uses its devices, what it waits for and when it ends."""

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
from ullme.planning.devices import peak_tflops
from ullme.planning.flops import model_cost, step_work
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from ullme.engine.objective import Objective
    from ullme.training.module import ULLMEModule

GIB = 2**30
# What there is room for in the progress bar.
TOTALS_FILE = "seen.json"  # in a run's folder, once it came to its end


class Throughput(L.Callback):
    """Logs, to the progress bar and the logger, over the steps since it last did (all ranks together):

    - ``tokens/s``: real tokens of queries and passages; ``queries/s``;
    - ``mfu``: model FLOPs utilisation (arXiv 2204.02311, appendix B), the share of the devices' peak that the model's
      own FLOPs on real tokens make. What is computed twice does not count: GradCache's first forward, checkpointing;
      nor does π_ref. Only where the peak is known;
    - ``padding``: the share of tokens in the LLM's linear layers that are padding; 0 with packed rows;
    - ``waiting``: the share of time in which the loader had no batch ready;
    - ``memory/peak_gib``: the most that tensors took on a device since the start, of the fullest one; on a CPU the
      process's peak resident set;
    - ``hours_left``: steps to go at the present speed.

    At the end of a run its folder holds ``seen.json``: queries, real tokens and seconds of training in all, of earlier
    starts too. Time in validation counts nowhere. A CUDA device is waited for only when there is something to log.

    Args:
        peak_tflops: a device's peak in TFLOP/s; null looks it up by name, for bfloat16.

    Raises:
        ValueError: peak_tflops is not positive.
    """

    fresh: Tensor | int  # (2,) queries and tokens since the last time they were summed

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"throughput.peak_tflops={peak_tflops}: must be positive, or null to look it up")
        self.peak_tflops = peak_tflops
        self.resumed = 0.0
        self.seen = {"queries": 0.0, "tokens": 0.0, "seconds": 0.0}

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        model = pl_module.model
        assert model is not None
        self.peak = self.peak_tflops or _known_peak(trainer, pl_module)
        self.cost = model_cost(model.causal_lm.config, model.options) if self.peak else None
        self.causal = model.options.attention == "causal"
        self._open_window(trainer)
        self._count_afresh()

    def _open_window(self, trainer: L.Trainer) -> None:
        self.started = time.perf_counter()
        self.waited = _waited(trainer)
        self.steps = 0
        self.counts: Tensor | float = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(self, "started"):  # not in validation before or without training
            took = time.perf_counter() - self.paused
            self.started, self.resumed = self.started + took, self.resumed + took

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ULLMEModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.steps += 1
        self.counts = self.counts + self._count(pl_module, batch)
        self.fresh = self.fresh + _seen(batch)
        if not trainer._logger_connector.should_update_logs:
            return
        if batch.row_ids.is_cuda:
            torch.cuda.synchronize()
        assert isinstance(self.counts, Tensor)
        for name, value in self._measure(trainer, self.counts).items():
            pl_module.log(name, value, prog_bar=True)
        self._open_window(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """On every rank, so that what all of them saw can be summed."""
        if hasattr(self, "started"):
            self._settle(trainer)
            checkpoint["callbacks"][self.state_key] = dict(self.seen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = {name: state_dict.get(name, 0.0) for name in self.seen}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            text = json.dumps({name: round(value, 1) for name, value in self.seen.items()})
            atomic_files.write_atomically(Path(trainer.default_root_dir, TOTALS_FILE), lambda f: f.write(text.encode()))

    def _count_afresh(self) -> None:
        self.resumed = time.perf_counter()
        self.fresh = 0

    def _settle(self, trainer: L.Trainer) -> None:
        """Add what was seen since the last time; every rank calls it."""
        if isinstance(self.fresh, Tensor):
            queries, tokens = trainer.strategy.reduce(self.fresh, reduce_op="sum").tolist()
            self.seen["queries"] += queries
            self.seen["tokens"] += tokens
        self.seen["seconds"] += time.perf_counter() - self.resumed
        self._count_afresh()

    def _count(self, module: ULLMEModule, batch: Batch) -> Tensor:
        """(5,) queries, tokens, tokens through the linear layers without and with padding, model FLOPs."""
        objective: Objective = module.loss.objective
        packed = module.model.attention_path == "packed"
        work = step_work(batch, objective, self.causal, packed and objective.share_prompts)
        real = work.embed.tokens + work.learned.tokens
        counts = (
            len(batch),
            batch.queries.attention_mask.sum() + batch.passages.attention_mask.sum(),
            real,
            real if packed else _padded_tokens(module, batch),
            self.cost.step(work) if self.cost else 0,
        )
        # a number becomes a tensor where the batch is without waiting for the device
        device = batch.row_ids.device
        return torch.stack(
            [c.float() if isinstance(c, Tensor) else torch.full((), c, device=device).float() for c in counts]
        )

    def _measure(self, trainer: L.Trainer, counts: Tensor) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        waiting = (_waited(trainer) - self.waited) / elapsed
        own = torch.cat([counts, counts.new_tensor([waiting])])
        total = trainer.strategy.reduce(own, reduce_op="sum")
        peak = trainer.strategy.reduce(own.new_tensor([_peak_memory(counts.device)]), reduce_op="max")
        queries, tokens, real, computed, flops, waiting = total.tolist()
        left = trainer.estimated_stepping_batches - trainer.global_step
        found = {
            "tokens/s": tokens / elapsed,
            "queries/s": queries / elapsed,
            "padding": 1 - real / computed,
            "waiting": waiting / trainer.world_size,
            "memory/peak_gib": peak.item() / GIB,
            "hours_left": left * elapsed / self.steps / 3600,
        }
        if self.peak:
            found["mfu"] = flops / elapsed / (self.peak * 1e12 * trainer.world_size)
        return found


def _seen(batch: Batch) -> Tensor:
    """(2,) queries and their and the passages' real tokens; whole numbers, for they are summed over a whole run."""
    tokens = batch.queries.attention_mask.sum() + batch.passages.attention_mask.sum()
    return torch.stack([torch.full_like(tokens, len(batch)), tokens])


def _known_peak(trainer: L.Trainer, module: ULLMEModule) -> float | None:
    """TFLOP/s in bfloat16, if that is what the model computes in and the device is known."""
    half = str(trainer.precision).startswith("bf16") or next(module.parameters()).dtype == torch.bfloat16
    device = module.device
    return peak_tflops(torch.cuda.get_device_name(device)) if half and device.type == "cuda" else None


def _waited(trainer: L.Trainer) -> float:
    """Seconds that training has waited for its loader; 0 for a loader that does not measure."""
    return getattr(trainer.train_dataloader, "waited", 0.0)


def _peak_memory(device: torch.device) -> float:
    """In bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _padded_tokens(module: ULLMEModule, batch: Batch) -> int:
    """Tokens that go through the linear layers in the forwards with gradient of a backbone that cannot be packed."""
    objective = module.loss.objective
    total = 0
    if objective.uses_reps:
        lengths = torch.cat([rows.attention_mask.sum(1) for rows in (batch.queries, batch.passages)]).cpu()
        total += sum(len(piece) * int(lengths[piece].max()) for piece in module.loss.pieces(batch))
    for part in module.loss.slices(batch):
        chunk = batch[part]
        if objective.masking is not None:
            widths = chunk.queries.attention_mask.sum(1).tolist()
            total += len(widths) * max(widths)
        if objective.needs_generation:
            assert chunk.generation is not None
            learned = torch.stack([term.candidates(chunk)[1] for term in objective.chunk_terms]).any(0)
            prompts = chunk.generation.prompts.attention_mask.sum(1)[:, None]
            bodies = chunk.generation.targets.attention_mask.sum(1).view(learned.shape) - 1
            widths = (prompts + bodies)[learned].tolist()
            total += len(widths) * max(widths, default=0)
    return total
