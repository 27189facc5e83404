"""A file is there whole or not at all; a damaged one is found; nothing in it runs."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from ullme.models.trained_weights import find_checkpoint
from ullme.utils import atomic_files
from ullme.utils.atomic_files import StorageError

CONTENT = {"weights": torch.arange(5000.0), "name": "a" * 50, "step": 7, "more": {"x": torch.ones(3, 4).bfloat16()}}


def same(a, b) -> bool:
    return (
        torch.equal(a["weights"], b["weights"])
        and torch.equal(a["more"]["x"], b["more"]["x"])
        and (a["name"], a["step"]) == (b["name"], b["step"])
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    atomic_files.save(CONTENT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_what_goes_in_comes_out(saved):
    assert same(atomic_files.read(saved), CONTENT)
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


def test_every_flipped_bit_that_matters_is_found(saved):
    whole = saved.read_bytes()
    draw = random.Random(0)
    refused = 0
    # everywhere, and closely where the archive's own tables are
    places = [*draw.sample(range(len(whole)), 300), *range(200), *range(len(whole) - 900, len(whole), 3)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        try:
            found = atomic_files.read(saved)
        except StorageError:
            refused += 1
        else:
            assert same(found, CONTENT), place
    assert refused > len(places) / 2  # the rest lies in padding, dates and the like


def test_every_cut_is_found(saved):
    whole = saved.read_bytes()
    for length in [0, 1, 10, *range(100, len(whole), len(whole) // 40), len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(StorageError, match="cannot be read"):
            atomic_files.read(saved)


def test_the_last_good_one_is_named(saved):
    atomic_files.save(CONTENT, saved.with_name("older.ckpt"))
    os.utime(saved.with_name("older.ckpt"), (1, 1))
    atomic_files.save(CONTENT, saved.with_name("bad.ckpt"))
    saved.with_name("bad.ckpt").write_bytes(b"PK nothing")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"the last good checkpoint is '.*older.ckpt'"):
        atomic_files.read(saved)


class FullDisk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 3000, 15000])
def test_a_full_disk_leaves_the_checkpoint_that_was_there(saved, monkeypatch, room):
    inner = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **kw: FullDisk(inner(self, mode, **kw), room))
    with pytest.raises(
        StorageError,
        match=r"No space left.*free space.*trainer.default_root_dir.*the last good checkpoint is '.*last.ckpt'",
    ):
        atomic_files.save({**CONTENT, "step": 8}, saved)
    monkeypatch.undo()
    assert atomic_files.read(saved)["step"] == 7
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"trainer.default_root_dir"):
        atomic_files.check_writable(tmp_path / "file" / "run")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="Permission denied"):
            atomic_files.check_writable(tmp_path / "closed")


def test_only_what_dead_processes_left_is_swept(saved):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    dead, alive = (saved.with_name(f"{atomic_files.UNFINISHED}{pid}.last.ckpt") for pid in (child, os.getppid()))
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    assert atomic_files.newest_first(saved.parent) == [saved]
    atomic_files.sweep(saved.parent)
    assert alive.exists()
    assert not dead.exists()
    assert saved.exists()


class Payload:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_payload_does_not_run(tmp_path, how):
    flag, path = tmp_path / "ran", tmp_path / "x.ckpt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Payload(flag)}))
    else:
        torch.save({"state_dict": Payload(flag)}, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(StorageError, match=r"refused because loading them would run code"):
        atomic_files.read(path)
    assert not flag.exists()
    pickle.loads(pickle.dumps(Payload(flag)))  # it does work
    assert flag.exists()


def write_step(path, step):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step}, path)
    return path


def test_the_newest_checkpoint_has_the_largest_step_whatever_its_time(tmp_path):
    """Copied files have new times in any order; last.ckpt goes before others of its step; damaged ones come last."""
    written = [write_step(tmp_path / name, step) for name, step in (("a.ckpt", 9), ("last.ckpt", 10), ("b.ckpt", 10))]
    written += [write_step(tmp_path / "c.ckpt", 2)]
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"cut")
    for age, path in enumerate([*written, broken]):
        os.utime(path, (age, age))
    a, last, b, c = written
    assert atomic_files.newest_first(tmp_path) == [last, b, a, c, broken]


def test_checkpoints_behind_a_link_are_found(tmp_path):
    disk = write_step(tmp_path / "disk" / "last.ckpt", 3).parent
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(disk)
    (disk / "loop").symlink_to(tmp_path / "run")
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_an_older_last_checkpoint_does_not_stand_for_the_run(tmp_path):
    """As where only last.ckpt was restored from a copy of the folder."""
    write_step(tmp_path / "run" / "checkpoints" / "last.ckpt", 3)
    newest = write_step(tmp_path / "run" / "checkpoints" / "step5.ckpt", 5)
    assert find_checkpoint(tmp_path / "run") == newest == atomic_files.newest_first(tmp_path / "run")[0]


def test_a_folder_of_several_runs_stands_for_none_of_them(tmp_path):
    one = write_step(tmp_path / "runs/a/checkpoints/last.ckpt", 3)
    assert find_checkpoint(tmp_path / "runs") == one
    write_step(tmp_path / "runs/b/checkpoints/last.ckpt", 4)
    with pytest.raises(ValueError, match=r"holds several runs: .*runs/a, .*runs/b; give one of them"):
        find_checkpoint(tmp_path / "runs")
    own = write_step(tmp_path / "runs/checkpoints/last.ckpt", 1)  # a run that has others below it
    assert find_checkpoint(tmp_path / "runs") == own
