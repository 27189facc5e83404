"""What glibc is told, and when it is told nothing."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

from ullme.utils import allocator


class FakeLibc:
    """Records the calls of mallopt."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> FakeLibc:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeLibc()
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return fake


def test_both_thresholds_are_raised_on_a_cpu(libc: FakeLibc) -> None:
    assert allocator.keep_freed_memory("cpu")
    assert libc.calls == [(-1, 2**31 - 1), (-3, 2**30)]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_other_devices_are_left_alone(libc: FakeLibc, device: str) -> None:
    assert not allocator.keep_freed_memory(device)
    assert libc.calls == []


def test_the_users_own_settings_are_kept(libc: FakeLibc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not allocator.keep_freed_memory("cpu")
    assert libc.calls == []


def test_another_system_or_c_library_is_left_alone(libc: FakeLibc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory("cpu")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory("cpu")
    assert libc.calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt(3) of glibc")
def test_freed_memory_comes_back_without_page_faults() -> None:
    """Blocks of 8 MB that are written to and freed: cleared by the system each time, or once."""
    program = (
        "import ctypes, resource, sys\n"
        "from ullme.utils.allocator import keep_freed_memory\n"
        "if sys.argv[1] == 'keep' and not keep_freed_memory('cpu'): raise SystemExit('not glibc')\n"
        "libc, size = ctypes.CDLL(None), 2**23\n"
        "libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]\n"
        "def use():\n"
        "    blocks = [libc.malloc(size) for _ in range(8)]\n"
        "    for block in blocks: ctypes.memset(block, 1, size)\n"
        "    for block in blocks: libc.free(block)\n"
        "use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4): use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = {}
    for mode in ("default", "keep"):
        done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True, check=False)
        if "not glibc" in done.stderr:
            pytest.skip("not glibc")
        faults[mode] = int(done.stdout)
    pages = 4 * 8 * 2**23 // resource.getpagesize()
    assert faults["keep"] < pages / 100 < pages / 2 < faults["default"], faults
