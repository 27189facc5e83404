"""``ullme encode`` as processes: started by torchrun, and killed again and again. The bytes are those of one process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import PATIENCE, start_process, wait_until
from search_helpers import contents, write_corpus

from ullme.commands import encode

ROOT = Path(__file__).parents[2]
DOCUMENTS, SHARD_ROWS = 4000, 100


@pytest.fixture
def arguments(tmp_path, llm_folder) -> list[str]:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS))
    settings = ["--max_length=64", "--device=cpu", "--dtype=float32", f"--shard_rows={SHARD_ROWS}", "--progress=false"]
    return [llm_folder("llama"), "--corpus", corpus, *settings]


@pytest.fixture
def whole(arguments, tmp_path) -> dict[str, bytes]:
    """What one process writes that nobody disturbs."""
    assert encode.main([*arguments, "--to", str(tmp_path / "whole")]) == 0
    return contents(tmp_path / "whole")


def start(arguments: list[str], *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "ullme", "encode", *arguments]
    return start_process(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("shard-?????.json")))


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_writes_the_same_bytes(arguments, whole, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*arguments, "--to", str(tmp_path / "e")], *torchrun)
    assert process.wait(PATIENCE) == 0, process.stderr.read().decode()
    assert contents(tmp_path / "e") == whole


@pytest.mark.slow
def test_killed_five_times_at_random_moments(arguments, whole, tmp_path):
    """Once before the first shard is there, then some time after some more shards."""
    draw, folder = random.Random(0), tmp_path / "e"
    arguments = [*arguments, "--to", str(folder)]
    waits, found = [0, *(draw.randint(1, 6) for _ in range(4))], []
    for shards in waits:
        before, process = shards_in(folder), start(arguments)
        wait_until(lambda p=process, n=before + shards: shards_in(folder) >= n or p.poll() is not None, "shards")
        time.sleep(draw.uniform(0, 0.05) if shards else draw.uniform(0, 5))
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
        found.append(shards_in(folder))
    assert 0 < found[1] < found[-1] < DOCUMENTS // SHARD_ROWS, "no process was killed in the middle of the work"
    process = start(arguments)
    assert process.wait(PATIENCE) == 0, process.stderr.read().decode()
    assert contents(folder) == whole
