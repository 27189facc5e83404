"""Steps that are finished are not repeated, those that changed begin anew, and those that were stopped go on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ullme.commands.adapt.steps import Records, Step, digest_of, locked, process_runner, run_steps

OF = {"LLM": ("llm", "1"), "corpus": ("docs", "2")}


class World:
    """Two commands: ``words N FILE``, and ``count FILE OTHER``, which reads what the first wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.fails: str | None = None

    def steps(self, words: int = 2, least: int = 0) -> list[Step]:
        a, parts, b = (self.folder / name for name in ("a", "a.parts", "b"))
        first = ("words", str(words), f"--least={least}")
        return [
            Step("words", (*first, str(a)), (a,), inputs={"x": "1"}, keeps=(parts,), keeps_for=first[:2]),
            Step("count", ("count", str(a)), (b,), after=("words",)),
        ]

    def run(self, command) -> int:
        self.calls.append(command[0])
        if command[0] == "words":
            (self.folder / "a.parts").mkdir(exist_ok=True)
        if command[0] == self.fails:
            return 2
        path = self.folder / ("a" if command[0] == "words" else "b")
        path.write_text(" ".join(command))
        return 0

    def go(self, *args, **kwargs) -> list[str]:
        return run_steps(self.steps(*args, **kwargs), Records(self.folder, OF), self.run)


@pytest.fixture
def world(tmp_path) -> World:
    (tmp_path / "to").mkdir()
    return World(tmp_path / "to")


def test_finished_steps_are_not_repeated(world, capsys):
    assert world.go() == ["words", "count"]
    assert f"[1/2] words\n$ ullme words 2 --least=0 {world.folder}/a" in capsys.readouterr().out
    assert world.go() == []
    assert "[2/2] count: done before\n$ ullme count" in capsys.readouterr().out
    (world.folder / "b").unlink()
    assert world.go() == ["count"]


def test_a_step_that_was_stopped_runs_again_although_what_it_writes_is_there(world):
    world.fails = "count"
    with pytest.raises(ValueError, match="step count ended with status 2"):
        world.go()
    (world.folder / "b").write_text("a part")
    world.fails = None
    assert world.go() == ["count"]
    assert (world.folder / "b").read_text() == f"count {world.folder}/a"


def test_a_change_reruns_from_there(world, capsys):
    world.go()
    (world.folder / "a.parts" / "written").touch()
    assert world.go(least=1) == ["words", "count"]  # the second reads what the first writes
    assert "[1/2] words: begins anew, its command or what it reads has changed" in capsys.readouterr().out
    assert (world.folder / "a.parts" / "written").exists()  # does not depend on `least`
    world.go(words=3)
    assert not (world.folder / "a.parts" / "written").exists()
    last = world.steps(3)[1]
    changed = [world.steps(3)[0], Step("count", (*last.command, "--more"), last.writes, last.after)]
    assert run_steps(changed, Records(world.folder, OF), world.run) == ["count"]


def test_a_stopped_step_goes_on(world):
    world.fails = "words"
    with pytest.raises(ValueError, match=r"step words ended with status 2; .* By hand: ullme words 2"):
        world.go()
    (world.folder / "a.parts" / "written").touch()
    world.fails = None
    assert world.go() == ["words", "count"]
    assert (world.folder / "a.parts" / "written").exists()
    world.fails = "count"
    (world.folder / "b").unlink()
    with pytest.raises(ValueError, match="step count"):
        world.go()
    assert world.calls == ["words", "words", "count", "count"]


def test_a_step_that_writes_nothing(world):
    world.run = lambda command: 0
    with pytest.raises(ValueError, match=r"step words ended without .*a; run it by hand"):
        world.go()


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"LLM": ("other", "9"), "corpus": OF["corpus"]}, "is of another LLM: 'other' now, 'llm' before"),
        ({"LLM": OF["LLM"], "corpus": ("docs", "9")}, "another corpus: 'docs' now, the same name with other content"),
    ],
)
def test_a_folder_of_something_else_is_refused(world, of, message):
    world.go()
    with pytest.raises(ValueError, match=re.escape(message)):
        Records(world.folder, of)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"has no steps\.json, but holds mine\.txt; name a new or an empty folder"):
        Records(tmp_path, OF)
    with pytest.raises(ValueError, match="is a file"):
        Records(tmp_path / "mine.txt", OF)
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(ValueError, match=r"steps\.json cannot be used"):
        Records(tmp_path, OF)
    (tmp_path / "steps.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="its format is 99, and this version of ullme reads 1"):
        Records(tmp_path, OF)


def test_digests(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("x")
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two")
    (tmp_path / "two" / "f").write_text("y")
    assert digest_of(tmp_path / "one") != digest_of(tmp_path / "two")
    assert digest_of(tmp_path / "one" / "f") != digest_of(tmp_path / "two" / "f")
    assert digest_of("org/model") == "org/model"


def test_a_folder_is_locked_as_long_as_a_step_runs(tmp_path, monkeypatch):
    start, held = subprocess.Popen, []
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **more: held.append(more["pass_fds"]) or start(*args, **more)
    )
    with locked(tmp_path) as lock:
        assert process_runner(lock)(["--version"]) == 0
        assert process_runner(lock)(["no such command"]) == 2
        assert held == [[lock.fileno()]] * 2
        left = start([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    try:
        with pytest.raises(ValueError, match="another process works there"), locked(tmp_path):
            pass
    finally:
        left.communicate(b"\n")
    with locked(tmp_path):
        pass
