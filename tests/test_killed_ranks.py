"""kill -9 within an epoch, with two ranks, data workers and an index of the rows on disk."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupted import (  # start, ended and end_of_whole_run are fixtures
    assert_same,
    before_step,
    end,
    end_of_whole_run,  # noqa: F401
    ended,  # noqa: F401
    start,  # noqa: F401
)
from test_training import arguments  # noqa: F401 - a fixture

from ullme.data import row_cache, row_index
from ullme.distributed import world
from ullme.training.module import ULLMEModule

TWO_RANKS = ("--trainer.strategy=ddp", "--data.num_workers=2")


def recording(log: Path, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Write a line for each batch of each rank: step, rank, and the rows with all of their drawn texts."""

    def install() -> None:
        then()
        inner = ULLMEModule.training_step

        def training_step(self, batch, batch_idx):
            line = [self.global_step, world()[0], batch.row_ids.tolist(), batch.passage_keys.tolist()]
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            return inner(self, batch, batch_idx)

        ULLMEModule.training_step = training_step

    return install


def read(log: Path) -> dict[tuple[int, int], list]:
    """(step, rank) -> rows and texts."""
    return {(step, rank): rest for step, rank, *rest in map(json.loads, log.read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rows_go_on_where_they_were(start, end_of_whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(row_index, "SMALLEST", 0)
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "cache"))
    logs = {name: tmp_path / f"{name}.jsonl" for name in ("whole", "killed", "resumed")}
    assert start("whole", "whole", *TWO_RANKS, ranks=2, then=recording(logs["whole"])) == 0
    killing = recording(logs["killed"], lambda: before_step(11))  # the last of the second epoch
    assert start("run", "first", *TWO_RANKS, ranks=2, then=killing) == -signal.SIGKILL
    assert start("run", "second", *TWO_RANKS, ranks=2, then=recording(logs["resumed"])) == 0
    assert len(row_cache.entries(row_cache.cache_root(str(tmp_path / "cache")))) == 1  # one index for all six processes
    whole, killed, resumed = (read(log) for log in logs.values())
    assert set(whole) == {(step, rank) for step in range(12) for rank in range(2)}
    assert len({json.dumps(batch) for batch in whole.values()}) == 24
    assert min(resumed)[0] == 10  # the last checkpoint before the kill
    assert max(killed)[0] in (10, 11)
    for found in (killed, resumed):
        assert all(found[place] == whole[place] for place in found)
    assert killed.keys() | resumed.keys() == whole.keys()
    assert_same(end(tmp_path, "run", ["first", "second"]), end(tmp_path, "whole", ["whole"]))
