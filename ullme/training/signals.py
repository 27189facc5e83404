"""Signals that end a training run: SIGTERM, Ctrl-C, and the one that SLURM sends before the time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
# Seconds within which a second SIGINT is the same Ctrl-C: terminal and launcher both send it to every process.
_SAME_CTRL_C = 1.0


class ShutdownSignal:
    """Remembers a signal that came during a step, until the run can save a checkpoint and stop.

    Attributes:
        received: whether this process received a signal.
        status: the exit status: 143 after SIGTERM, 130 after Ctrl-C.
        name: what stopped the run, where it was no signal.
    """

    def __init__(self) -> None:
        self.received = False
        self.status = TERMINATED
        self.name: str | None = None
        self._terminated = self._requeue = False
        self._requeue_signal: int | None = None
        self._interrupted_at: float | None = None

    def install_handlers(self, trainer: L.Trainer) -> None:
        """Replace Python's and Lightning's signal handlers, which stop without saving and communicate with other ranks
        in the middle of a step. Lightning restores the earlier handlers when training ends."""
        self.received = self._terminated = trainer.received_sigterm
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored under nohup, for example
            signal.signal(signal.SIGINT, self._on_interrupt)
        cluster = trainer._accelerator_connector.cluster_environment
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            self._requeue_signal = cluster.requeue_signal or signal.SIGUSR1
            signal.signal(self._requeue_signal, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = self._terminated = True
        self._requeue |= number == self._requeue_signal

    def _on_interrupt(self, number: int, frame: Any) -> None:
        """The first Ctrl-C is remembered, the second ends the process at once."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self.received, self._interrupted_at = True, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                text = "\nCtrl-C: saving as soon as this step is done; press it again to stop at once\n"
                os.write(2, text.encode())  # print may be what the signal interrupted
        elif now - self._interrupted_at > _SAME_CTRL_C:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def received_by_any_rank(self, trainer: L.Trainer) -> bool:
        """Whether any rank received a signal, so that all stop together; a collective, which every rank must call."""
        stop = trainer.strategy.reduce_boolean_decision(self.received, all=False)
        if stop:
            terminated = trainer.strategy.reduce_boolean_decision(self._terminated, all=False)
            self.status = TERMINATED if terminated else INTERRUPTED
        return stop

    def announce(self, saved: str) -> None:
        """Print how to resume, and requeue a SLURM job whose time limit is near."""
        name = self.name or ("Ctrl-C" if self.status == INTERRUPTED else "SIGTERM")
        print(f"{name}: {saved}; the same command goes on from there", flush=True)
        if self._requeue:
            requeue_slurm_job()


def requeue_slurm_job() -> None:
    """Put this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        print(f"SLURM requeued job {job}", flush=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"SLURM did not requeue job {job} ({error}); submit it again", flush=True)
