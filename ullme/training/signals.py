"""How a training run is told to leave: SIGTERM, Ctrl-C, and the warning that SLURM sends before its time is up."""

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
# A launcher hands Ctrl-C on to processes that the terminal has told already; nobody presses it twice as fast.
_SAME_CTRL_C = 1.0


class Notice:
    """Takes note of the signals, which may come in the midst of a step, until there is a moment to save and leave."""

    def __init__(self) -> None:
        self.given = False
        self.status = TERMINATED
        self._terminated = self._requeue = False
        self._requeue_signal: int | None = None
        self._interrupted_at: float | None = None

    def listen(self, trainer: L.Trainer) -> None:
        """From here on, in place of Python's and Lightning's own handlers, which leave without saving and speak to
        other ranks in the midst of a step. Lightning puts back what was there when training ends."""
        self.given = self._terminated = trainer.received_sigterm
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # nohup and its like
            signal.signal(signal.SIGINT, self._note_interrupt)
        cluster = trainer._accelerator_connector.cluster_environment
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            self._requeue_signal = cluster.requeue_signal or signal.SIGUSR1
            signal.signal(self._requeue_signal, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.given = self._terminated = True
        self._requeue |= number == self._requeue_signal

    def _note_interrupt(self, number: int, frame: Any) -> None:
        """The first Ctrl-C is noted, the second ends the process at once."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self.given, self._interrupted_at = True, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                text = "\nCtrl-C: saving as soon as this step is done; once more leaves at once\n"
                os.write(2, text.encode())  # print may be what the signal interrupted
        elif now - self._interrupted_at > _SAME_CTRL_C:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def agreed(self, trainer: L.Trainer) -> bool:
        """Whether any rank was told to leave, and so all do. All of them must ask at the same time."""
        leave = trainer.strategy.reduce_boolean_decision(self.given, all=False)
        if leave:
            terminated = trainer.strategy.reduce_boolean_decision(self._terminated, all=False)
            self.status = TERMINATED if terminated else INTERRUPTED
        return leave

    def say_goodbye(self, saved: str) -> None:
        """Tell the user how to go on, and SLURM where it is to go on."""
        name = "Ctrl-C" if self.status == INTERRUPTED else "SIGTERM"
        print(f"{name}: {saved}; the same command goes on from there", flush=True)
        if self._requeue:
            _ask_for_another_turn()


def _ask_for_another_turn() -> None:
    """Ask SLURM to run this job again."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        print(f"SLURM runs job {job} again", flush=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"SLURM did not take job {job} back ({error}); submit it again", flush=True)
