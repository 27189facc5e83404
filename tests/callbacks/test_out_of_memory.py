"""Out of memory: say what to try, or go on with half of the chunk and the same result."""

from __future__ import annotations

import pytest
import torch
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.commands import train
from ullme.models import ULLME


@pytest.fixture
def room(monkeypatch):
    """Let forwards with gradient fail above so many rows."""

    def limit(rows: int, device: str = "cuda") -> list[int]:
        inner, refused = ULLME.forward, []

        def forward(self, input_ids, *args, **kwargs):
            # after it drew from the random state, as a real forward does
            result = inner(self, input_ids, *args, **kwargs)
            if torch.is_grad_enabled() and len(input_ids) > rows:
                refused.append(len(input_ids))
                if device == "cpu":
                    torch.empty(2**60)  # what torch says of a CPU is no OutOfMemoryError
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            return result

        monkeypatch.setattr(ULLME, "forward", forward)
        return refused

    return limit


@pytest.mark.parametrize(
    ("loss", "device"),
    [
        pytest.param("--loss=GradCache", "cpu", marks=pytest.mark.slow),
        ("--loss=GRL", "cuda"),
        pytest.param("--loss=GradCache", "cuda", marks=pytest.mark.slow),
        pytest.param("--loss=GRL", "cpu", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_with_half_the_chunk_and_the_same_losses(loss, device, arguments, tmp_path, room, caplog):  # noqa: F811
    def run(name: str, chunk: int, *extra: str) -> dict[int, float]:
        dropped = [a for a in arguments(name, loss, "--trainer.max_steps=3") if "chunk_size" not in a]
        train.main([*dropped, f"--loss.chunk_size={chunk}", *extra])
        return logged(tmp_path / name, "train/loss")

    expected = run("whole", 1)
    refused = room(7, device)  # a query and its 3 candidates are 4 rows
    assert run("halved", 4, "--loss.on_oom=halve_chunk") == expected
    assert refused
    assert "loss.chunk_size=2 from here on, it was 4" in caplog.text
    assert "loss.chunk_size=1 from here on, it was 2" in caplog.text


@pytest.mark.parametrize(
    ("chunk", "rows", "messages"),
    [
        (
            "chunk_size=4",
            7,
            [
                "out of memory in step 0 with loss.chunk_size=4 (CUDA out of memory. Tried to allocate 2 GiB)",
                "start again with loss.chunk_size=2, or loss.on_oom=halve_chunk to go on by itself",
            ],
        ),
        ("chunk_tokens=100000", 7, ["start again with loss.chunk_tokens="]),
        ("chunk_size=1", 2, ["with the smallest chunk (loss.chunk_size=1"]),
    ],
)
def test_it_says_what_to_try(chunk, rows, messages, arguments, room, capsys):  # noqa: F811
    room(rows)
    dropped = [a for a in arguments("run", "--loss=GradCache") if "chunk_size" not in a]
    with pytest.raises(SystemExit) as stop:
        train.main([*dropped, f"--loss.{chunk}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said
