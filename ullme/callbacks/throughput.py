"""How fast a run goes, counted in real tokens."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from ullme.batch import Batch


class Throughput(L.Callback):
    """Logs ``tokens/s`` (real tokens of queries and passages, of all ranks) to the progress bar and the logger."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch.row_ids.is_cuda:
            torch.cuda.synchronize()
        rate = batch.num_tokens * trainer.world_size / (time.perf_counter() - self.start)
        pl_module.log("tokens/s", rate, prog_bar=True)
