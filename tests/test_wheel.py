"""The wheel holds the package, its types and its configs, and works in a folder that is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ullme.utils import config_files

ROOT = Path(__file__).parents[1]


def test_a_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.locate("configs/base.yaml") == ROOT / "configs" / "base.yaml"
    assert config_files.locate("configs/loss/grl.yaml") == ROOT / "configs" / "loss" / "grl.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("seed_everything: 7")
    assert config_files.locate("configs/base.yaml") == Path("configs/base.yaml")  # one's own goes first
    for nowhere in ("configs/none.yaml", "other/base.yaml", "base.yaml"):
        assert config_files.locate(nowhere) == Path(nowhere)


def test_arguments_keep_what_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config_files.locate_in_arguments(
        ["fit", "--config=configs/base.yaml", "--config", "configs/small.yaml", "--x", "configs/y"]
    )
    base, small = (str(ROOT / "configs" / name) for name in ("base.yaml", "small.yaml"))
    assert found == ["fit", f"--config={base}", "--config", small, "--x", "configs/y"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout, so that nothing is left behind here; unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("ullme", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=source, check=True)
    (file,) = folder.glob("*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", str(file), "--no-deps", "--target", str(target), "-q"]
    subprocess.run(install, check=True, cwd=folder)
    return file, target


def ullme(target: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, str(target / "bin" / "ullme"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_it_holds(wheel):
    names = set(zipfile.ZipFile(wheel[0]).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ullme").rglob("*.py")}
    assert modules <= names
    assert "ullme/py.typed" in names
    configs = {f"ullme/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "configs/")) for name in names)


@pytest.mark.slow
def test_its_commands_run_elsewhere(wheel, tmp_path):
    _, target = wheel
    shown = ullme(target, tmp_path)
    assert shown.returncode == 0
    assert "quickstart" in shown.stdout
    where = ullme(target, tmp_path, "train", "fit", "--config", "configs/base.yaml", "--print_config")
    assert "max_rows: 279040" in where.stdout, where.stderr
    missing = ullme(target, tmp_path, "train", "fit", "--config", "configs/none.yaml")
    assert missing.returncode == 2
    assert "configs/none.yaml" in missing.stderr


@pytest.mark.slow
def test_its_quickstart_runs_elsewhere(wheel, tmp_path):
    small = ["--entities=40", "--pretrain_steps=5", "--hidden_size=32", "--num_layers=1"]
    options = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--data.num_workers=0"]
    done = ullme(wheel[1], tmp_path, "quickstart", *small, *options)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "quickstart.png").is_file()
