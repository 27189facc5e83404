"""What ``auto`` comes to in a run of train.py: said before the first step, and in force."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.callbacks import choose_chunking
from ullme.commands import train
from ullme.planning import auto_chunk

pytestmark = pytest.mark.filterwarnings("ignore")
AUTO = ["--loss.chunk_tokens=auto", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
AUTO += ["--model.backbone.lora_dropout=0"]


@pytest.fixture
def forwards(monkeypatch):
    """(rows, with gradient) of every embedding forward."""
    from ullme.models import ULLME

    seen, forward = [], ULLME.forward

    def watched(model, input_ids, *args, **kwargs):
        if not kwargs.get("is_generate"):
            seen.append((len(input_ids), torch.is_grad_enabled()))
        return forward(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(ULLME, "forward", watched)
    return seen


def given(arguments, run: str, *extra: str) -> list[str]:  # noqa: F811
    return [a for a in arguments(run, *extra) if "chunk_size" not in a]


@pytest.mark.parametrize("loss", ["GradCache", "GRL"])
def test_where_memory_suffices_every_row_is_embedded_once(loss, arguments, forwards, caplog, monkeypatch, tmp_path):  # noqa: F811
    """Chunks are small all the same on a CPU, so their graphs are kept."""
    monkeypatch.setitem(auto_chunk._MOST, "cpu", 1)  # as small as they may be
    with caplog.at_level(logging.INFO):
        train.main(given(arguments, "run", f"--loss={loss}", *AUTO))
    said = re.search(
        r"auto: [\d.]+ GiB are free on cpu, so chunks have (\d+) tokens, the graphs of (\d+) more are retained, and layers "
        "keep their activations",
        caplog.text,
    )
    assert said
    assert int(said[2]) > 1000
    assert all(grad for _, grad in forwards)
    assert sum(rows for rows, _ in forwards) == 2 * 4 * (1 + 3)
    if loss == "GradCache":
        assert len(forwards) > 2  # in microbatches


def test_where_it_does_not_chunks_are_embedded_twice(arguments, forwards, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(auto_chunk._MOST, "cpu", 1)
    found = choose_chunking.largest_chunk
    monkeypatch.setattr(
        choose_chunking, "largest_chunk", lambda *a, **k: auto_chunk.replace(found(*a, **k), retained_tokens=0)
    )
    train.main(given(arguments, "run", *AUTO))
    assert [sum(rows for rows, grad in forwards if grad is wanted) for wanted in (False, True)] == [2 * 4 * 4] * 2
    train.main(given(arguments, "whole", *AUTO[1:], "--loss=FullBatch"))
    one, other = (logged(tmp_path / run, "train/loss") for run in ("run", "whole"))
    assert one == pytest.approx(other, rel=1e-4)
    assert len(one) == 2


def test_a_settled_chunk_that_runs_out_of_memory_is_said(arguments, monkeypatch, capsys):  # noqa: F811
    found = choose_chunking.largest_chunk
    monkeypatch.setattr(
        choose_chunking, "largest_chunk", lambda *a, **k: auto_chunk.replace(found(*a, **k), chunk_tokens=100)
    )
    with pytest.raises(SystemExit) as end:
        train.main(
            given(
                arguments, "run", "--loss.chunk_tokens=300", "--model.backbone.gradient_checkpointing=auto", *AUTO[1:]
            )
        )
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "with as many tokens at once as loss says (300); 100 fit: give loss.chunk_tokens=auto" in error
