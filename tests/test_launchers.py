"""train.py from the outside, on two processes: started by torchrun, by SLURM's srun, and by Lightning itself."""

from __future__ import annotations

import csv
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from children import PATIENCE, start_process
from test_training import write_rows

from ullme.commands import train

ROOT = Path(__file__).parents[1]
TWO = f"--config={ROOT / 'configs' / 'strategy' / 'cpu_2proc.yaml'}"


def test_the_cli_of_one_subcommand_can_be_pickled_for_spawned_ranks(monkeypatch):
    built: list[type[train.ULLMECLI]] = []
    monkeypatch.setattr(train.ULLMECLI, "__init__", lambda self, *args, **kwargs: built.append(type(self)))
    for word in ("fit", "validate"):
        train.build([word])
    assert [set(kind.subcommands()) for kind in built] == [{"fit"}, {"validate"}]
    assert [pickle.loads(pickle.dumps(kind)) for kind in built] == built


@pytest.fixture
def arguments(tmp_path, llm_folder):
    train, beir = write_rows(tmp_path)

    def make(run: str) -> list[str]:
        return [
            "fit",
            f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / run}",
            f"--trainer.logger.init_args.save_dir={tmp_path / run}",
            f"--model.backbone.model_name_or_path={llm_folder()}",
            f"--data.train={train}",
            f"--data.val={beir}",
            "--data.batch_size=4",
            "--data.num_hard_negatives=2",
            "--data.num_workers=0",
            "--loss.chunk_size=1",
        ]

    return make


def start(launcher: str, arguments: list[str]) -> list[subprocess.Popen]:
    script, names = [str(ROOT / "train.py"), *arguments, TWO], {"OMP_NUM_THREADS": "1"}
    commands: list[tuple[list[str], dict[str, str]]] = []
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        commands = [([*torchrun, *script], names)]
    elif launcher == "lightning":
        commands = [([sys.executable, *script], names)]
    elif launcher == "slurm":  # what srun sets for each of two tasks on one node
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for rank in range(2):
            task = {"JOB_ID": 1, "JOB_NAME": "ullme", "NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0}
            task |= {"PROCID": rank, "LOCALID": rank, "NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1"}
            slurm = {f"SLURM_{name}": str(value) for name, value in task.items()}
            commands.append(([sys.executable, *script], {**names, **slurm, "MASTER_PORT": port}))
    return [
        start_process(
            command,
            cwd=ROOT,
            env={**os.environ, **more},
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, more in commands
    ]


def logged(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("train/loss", "train/dpo", "train/grad_norm", "val/ndcg@10", "val/mrr@10")
    return [{name: float(row[name]) for name in names if row.get(name)} for row in rows]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("torchrun", marks=[pytest.mark.distributed, pytest.mark.slow]),
        pytest.param("slurm", marks=[pytest.mark.distributed, pytest.mark.slow]),
        pytest.param("lightning", marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_two_processes_log_what_one_does(arguments, tmp_path, launcher):
    processes = start(launcher, arguments("two"))
    train.main(arguments("one"))
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert sum("train/loss" in row for row in one) == 2
    assert sum("val/mrr@10" in row for row in one) == 1
    assert two == [pytest.approx(row, rel=1e-4) for row in one]
    assert (tmp_path / "two" / "checkpoints" / "last.ckpt").is_file()
