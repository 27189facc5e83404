"""What a start costs: which modules are imported, and that --help is answered from its file only while it is true."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ullme import start

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "datasets", "mteb", "wandb", "lightning", "torchmetrics", "matplotlib")


def run(code: str, cache: Path, *argv: str) -> tuple[str, list[str]]:
    """Standard output of a fresh interpreter, and the heavy modules that it had imported at its end."""
    tail = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr))
sys.argv = {["train.py", *argv]!r}
{code}
"""
    done = subprocess.run(
        [sys.executable, "-c", tail],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    assert run("import ullme", tmp_path)[1] == []


def test_the_parser_imports_no_heavy_library_of_its_own_accord(tmp_path):
    # torchmetrics, which Lightning imports, imports transformers; whoever comes first is recorded
    spy = """
import importlib.abc, sys, traceback
names = {"transformers", "peft", "datasets", "mteb", "wandb"}
class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in names:
            files = [f.filename for f in traceback.extract_stack()]
            assert any("torchmetrics" in f for f in files), (name, files)
sys.meta_path.insert(0, Spy())
"""
    text, imported = run(spy + "from ullme.commands.train import main; main()", tmp_path, "fit", "--help")
    assert "--loss" in text
    assert not {"peft", "datasets", "mteb", "wandb"} & set(imported)


def test_a_second_help_is_the_first_and_imports_nothing(tmp_path):
    shutil.copytree(ROOT / "ullme", tmp_path / "ullme")  # nobody edits these files between the two
    code = f"sys.path.insert(0, {str(tmp_path)!r})\nfrom ullme.start import main; main()"
    first, imported = run(code, tmp_path, "fit", "--help")
    assert "lightning" in imported
    assert "--data.batch_size" in first
    second, imported = run(code, tmp_path, "fit", "--help")
    assert second == first
    assert imported == []


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(start, "_ask", lambda argv: calls.append(argv) or f"text {len(calls)}\nmore\n")
    return calls


def help_text(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        start.main(argv)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_made_again_when_the_terminal_or_the_code_changes(asked, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert help_text(capsys, "fit", "--help") == help_text(capsys, "fit", "--help") == "text 1\nmore\n"
    monkeypatch.setenv("COLUMNS", "80")
    assert help_text(capsys, "fit", "--help") == "text 2\nmore\n"
    monkeypatch.setattr(start, "version", lambda name: "99")
    assert help_text(capsys, "fit", "--help") == "text 3\nmore\n"
    assert help_text(capsys, "--help") == "text 4\nmore\n"


def test_a_cache_that_cannot_be_written_costs_only_time(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert help_text(capsys, "fit", "--help") == "text 1\nmore\n"


def test_other_arguments_go_to_the_real_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("ullme.commands.train.main", seen.append)
    for arguments in (["fit", "--config=x", "--help"], ["fit"], []):
        start.main(arguments)
    assert seen == [["fit", "--config=x", "--help"], ["fit"], []]


def test_imports_rest_the_collector_and_wake_it_again():
    try:
        with start.imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        with pytest.raises(ImportError), start.imports():
            raise ImportError
        assert gc.isenabled()
        gc.disable()  # as the caller left it
        with start.imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_training_starts_without_the_collector(tmp_path):
    code = """
import builtins, gc
real, seen = builtins.__import__, []
def spy(name, *args, **kwargs):
    if name == "lightning":
        seen.append(gc.isenabled())
    return real(name, *args, **kwargs)
builtins.__import__ = spy
from ullme.start import main
try:
    main()
except SystemExit:
    pass
print(seen[0], gc.isenabled())
"""
    assert run(code, tmp_path, "fit", "--no_such_option")[0].split() == ["False", "True"]
