"""evaluate.py over several processes: the single process's scores, files and output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from children import PATIENCE
from ranks import on_ranks

from ullme.commands.evaluate import main

ROOT = Path(__file__).parents[2]


def evaluate(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def everything(arguments: list[str], wrong: list[str]) -> tuple[tuple[int, str, str], tuple[int, str, str], int]:
    """What a mistake and an evaluation give, and how many texts this process embedded."""
    from ullme.eval import ranks

    embedded, embed = [], ranks.embed_blocks

    def counted(model, blocks):
        embedded.extend(len(block) for block in blocks)
        return embed(model, blocks)

    with mock.patch.object(ranks, "embed_blocks", counted):
        return evaluate(wrong), evaluate(arguments), sum(embedded)


def scores(folder: Path) -> dict[str, dict]:
    """Task -> the scores in its result file."""
    return {p.name: json.loads(p.read_text())["scores"] for p in folder.rglob("*-????????.json")}


@pytest.fixture
def arguments(tiny_llm, beir_folder, sts_file, tmp_path):
    def make(output: str) -> list[str]:
        data = ["--corpus", str(beir_folder), "--sts", str(sts_file), "--batch_size", "2"]
        return ["--model", str(tiny_llm), *data, "--output", str(tmp_path / output), "--progress", "false"]

    return make


@pytest.mark.distributed
def test_ranks_evaluate_as_one_process(arguments, tmp_path):
    """Three processes; the queries make two batches, so one of them has nothing to do there."""
    wrong = ["--model", str(tmp_path / "none"), *arguments("wrong")[2:]]
    first, *others = on_ranks(3, tmp_path / "ranks", everything, arguments("three"), wrong)
    status, out, _ = evaluate(arguments("one"))
    assert status == 0
    assert first[1][:2] == (0, out)
    expected = scores(tmp_path / "one")
    assert len(expected) == 2
    assert scores(tmp_path / "three") == expected  # to the last digit
    assert first[0][0] == 2
    assert "error: model_name_or_path=" in first[0][2]
    for mistake, evaluation, _ in others:
        assert (mistake[:2], evaluation[:2]) == ((2, ""), (0, ""))
        assert "error:" not in mistake[2]
    assert sum(count for *_, count in (first, *others)) == 6 + 3 + 2 * 6  # corpus, queries, pairs
    assert all(count > 0 for *_, count in (first, *others))


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_starts_evaluation(arguments, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "evaluate.py"), *arguments("two")]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(evaluate(arguments("one"))[1])
    assert done.stdout.count("Mean of 2") == 1
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
