"""Ray's actors write the shards that one process writes, and a killed one is replaced."""

from __future__ import annotations

import builtins
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from children import PATIENCE, start_process, wait_until
from search_helpers import StubEmbedder, contents, corpus_of, encoded, load_slow

from ullme.commands import encode
from ullme.search.corpus import check_corpus
from ullme.search.encode import EncodeSettings
from ullme.search.ray_engine import ActorPool, ShardWriter, _absolute, _with_gpus, encode_corpus_on_ray

SETTINGS = EncodeSettings()


def load_stub() -> tuple[StubEmbedder, dict]:
    return StubEmbedder(), {}


def test_an_actor_writes_the_local_engines_shards(tmp_path):
    whole = encoded(tmp_path / "e")
    corpus = corpus_of(tmp_path / "corpus.jsonl")
    plan = check_corpus(corpus, 4)
    actor = ShardWriter(load_stub, corpus, plan, tmp_path / "of actors", SETTINGS, "stub")
    for number, rows in enumerate((4, 4, 2)):
        assert actor({"shard": np.array([number])}) == {"documents": [rows], "error": [""]}
    written = contents(tmp_path / "of actors")
    manifest = "manifest.json"  # gets the hashes of the shards when all are there
    assert {k: v for k, v in written.items() if k != manifest} == {
        k: v for k, v in contents(whole).items() if k != manifest
    }
    refused = ShardWriter(lambda: (StubEmbedder(version="2"), {}), corpus, plan, whole, SETTINGS, "stub")
    assert ", revision 1' and is '" in refused({"shard": np.array([0])})["error"][0]


def test_paths_of_the_corpus_are_absolute_for_actors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = corpus_of(Path("c.jsonl"))
    sent = _absolute(corpus)
    assert (sent.name, sent.reader.files) == ("c.jsonl", [tmp_path / "c.jsonl"])
    assert check_corpus(sent) == check_corpus(corpus)


def test_gpus_of_an_actor():
    def cluster(*nodes: dict) -> SimpleNamespace:
        dead = {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}
        return SimpleNamespace(nodes=lambda: [dead, *({"Alive": True, "Resources": node} for node in nodes)])

    assert _with_gpus(cluster({"CPU": 2}, {"CPU": 4, "GPU": 2}), ActorPool()).gpus == 1
    assert _with_gpus(cluster({"CPU": 2}), ActorPool()).gpus == 0
    assert _with_gpus(cluster({"CPU": 2, "GPU": 1}), ActorPool(gpus=0.5)).gpus == 0.5
    for pool in (ActorPool(gpus=1), ActorPool(cpus=3)):
        with pytest.raises(ValueError, match=r"no machine of the cluster has as many \(2 CPUs, 0 GPUs\); give fewer"):
            _with_gpus(cluster({"CPU": 2}), pool)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engine=spark"], "--engine spark: choose local or ray"),
        (["--engine=ray", "--actors=0"], "--actors 0 must be at least 1"),
        (["--engine=ray", "--actor_cpus=0"], "--actor_cpus 0 must be at least 1"),
        (["--engine=ray", "--actor_gpus=-1"], "--actor_gpus -1.0 must be at least 0"),
        (["--engine=ray", "--shard=0/2"], "start it once, without --shard and without torchrun"),
        (["--engine=ray", "--device=cpu"], "leave --device out, and give --actor_gpus 0 to use CPUs"),
        (["--engine=ray"], "Ray is not installed: pip install 'ullme[ray]', or leave --engine out to encode here"),
    ],
)
def test_mistakes_are_one_line(argv, message, monkeypatch, capsys):
    inner = builtins.__import__

    def without_ray(name, *rest, **options):
        if name == "ray":
            raise ImportError(name)
        return inner(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    assert encode.main(["model", "--corpus=no.jsonl", "--to=x", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@contextmanager
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """A Ray cluster of two nodes of one CPU each on this machine; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(__file__).parents[2]
    (tmp_path / "token").write_text(secrets.token_hex(32))
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    ray += ["--object-store-memory=100000000"]
    head = ["--head", f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    nodes = []
    with pytest.MonkeyPatch.context() as patched, (tmp_path / "ray.log").open("wb") as log:
        for name, value in own.items():
            patched.setenv(name, value)
        try:
            for arguments in (head, [f"--address={address}"]):
                nodes.append(start_process([*ray, *arguments], env=environment, stdout=log, stderr=log))
                started = partial(says_that_it_runs, tmp_path / "ray.log", nodes)
                wait_until(started, "a node")
            yield address
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.wait(PATIENCE)


def says_that_it_runs(log: Path, nodes: list[subprocess.Popen]) -> bool:
    assert all(node.poll() is None for node in nodes), log.read_text()
    return log.read_text().count("will now block forever") == len(nodes)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_actor_on_a_cluster_of_two_nodes(tmp_path):
    if find_spec("ray") is None:  # it is imported below, since it reads the environment then
        pytest.skip("pip install 'ullme[ray]'")
    corpus = corpus_of(tmp_path / "corpus.jsonl", 40)
    plan = check_corpus(corpus, 2)
    whole = encoded(tmp_path / "whole", 40, shard_rows=2)
    killed = []

    def kill_an_actor() -> None:
        while len(list((tmp_path / "e").glob("shard-?????.json"))) < 5:
            time.sleep(0.05)
        for process in psutil.process_iter(["cmdline", "environ"]):
            ours = (process.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH") == str(tmp_path / "token")
            if ours and "ShardWriter" in " ".join(process.info["cmdline"] or ()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                return

    with two_nodes(tmp_path) as address:
        ray = pytest.importorskip("ray")
        Thread(target=kill_an_actor, daemon=True).start()
        on_ray = partial(encode_corpus_on_ray, load_slow, corpus, plan, tmp_path / "e", pool=ActorPool(address))
        try:
            done = on_ray(SETTINGS, model_name="stub")
            again = on_ray(SETTINGS, model_name="stub")
            found = contents(tmp_path / "e")
            (tmp_path / "e" / "shard-00007.json").unlink()
            with pytest.raises(ValueError, match="--role was 'passage' and is 'query' now"):
                on_ray(EncodeSettings(role="query"))
        finally:
            ray.shutdown()
    assert len(killed) == 1
    assert (len(done.written), done.finished) == (20, True)
    assert (again.written, again.finished) == ([], True)
    assert found == contents(whole)
