"""The same bytes from one process, from several, and from one that was stopped and started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from children import default_signals
from search_helpers import StubEmbedder, contents, corpus_of, encoded

from ullme.search import encode as encode_module
from ullme.search.encode import EncodeSettings, encode_corpus, local_device, own_part
from ullme.search.shards import Shards
from ullme.utils import atomic_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return encoded(tmp_path_factory.mktemp("whole") / "e")


@pytest.fixture
def corpus(whole):
    """That of ``whole``, under the same name, which the manifest holds."""
    return corpus_of(whole.parent / "corpus.jsonl")


def test_two_workers_write_the_same_bytes_as_one(whole, corpus, tmp_path):
    done = []
    for part in ((1, 2), (0, 2)):
        options = {"shard_rows": 4, "model_name": "stub", "part": part}
        done.append(encode_corpus(StubEmbedder(), corpus, tmp_path / "e", **options))
    assert [d.written for d in done] == [[1], [0, 2]]
    assert [d.finished for d in done] == [False, True]
    assert contents(tmp_path / "e") == contents(whole)


@pytest.mark.parametrize("write", range(12))
def test_stopped_at_any_file_the_same_command_goes_on(write, whole, corpus, tmp_path, monkeypatch):
    """A process that is killed leaves an unfinished file; an exception cannot show that, so it is put there."""
    inner, writes = atomic_files.os.replace, []

    def replace(old, new):
        writes.append(new)
        if len(writes) == write + 1:
            dead = Path(new).with_name(f".unfinished.{2**22 + 1}.{Path(new).name}")  # beyond every process number
            dead.write_bytes(Path(old).read_bytes()[:3])
            raise InterruptedError
        inner(old, new)

    options = {"shard_rows": 4, "model_name": "stub"}
    with monkeypatch.context() as patched:
        patched.setattr(atomic_files.os, "replace", replace)
        with pytest.raises(ValueError, match="cannot be written"):
            encode_corpus(StubEmbedder(), corpus, tmp_path / "e", **options)
    assert len(list((tmp_path / "e").glob(".unfinished.*"))) == 1
    again = StubEmbedder()
    encode_corpus(again, corpus, tmp_path / "e", **options)
    whole_shards = max(0, write - 1) // 4  # behind the manifest each shard has four files
    assert again.embedded == [4, 4, 2][whole_shards:]
    assert contents(tmp_path / "e") == contents(whole)


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_bytes(tmp_path):
    """The kernel ends a process of its own, without a handler, once it has worked for some milliseconds."""
    corpus = corpus_of(tmp_path / "c.jsonl", 3000)
    options = {"shard_rows": 200, "model_name": "stub"}
    encode_corpus(StubEmbedder(), corpus, tmp_path / "whole", **options)
    killed = 0
    for milliseconds in (30, 60, 90, 120, 150):
        pid = os.fork()
        if not pid:
            try:
                default_signals()
                signal.setitimer(signal.ITIMER_PROF, milliseconds / 1000)  # whose signal ends the process
                encode_corpus(StubEmbedder(), corpus, tmp_path / "e", **options)
            finally:
                os._exit(0)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGPROF
    assert killed
    encode_corpus(StubEmbedder(), corpus, tmp_path / "e", **options)
    assert contents(tmp_path / "e") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(whole, corpus, tmp_path):
    times = {p.name: p.stat().st_mtime_ns for p in whole.glob("shard*")}
    again = StubEmbedder()
    done = encode_corpus(again, corpus, whole, shard_rows=4, model_name="stub")
    assert (done.written, done.finished, again.embedded) == ([], True, [])
    assert {p.name: p.stat().st_mtime_ns for p in whole.glob("shard*")} == times


REFUSED = {
    "model": ({"embedder": StubEmbedder(version="2")}, "the model was 'stub, revision 1' and is ', revision 2' now"),
    "prompt": (
        {"embedder": StubEmbedder(prompts={"passage": "passage: {text}"})},
        r"the prompts, field passage was '\{text\}' and is 'passage: \{text\}' now",
    ),
    "role": ({"settings": EncodeSettings(role="query")}, "--role was 'passage' and is 'query' now"),
    "max_length": ({"settings": EncodeSettings(max_length=9)}, "--max_length was 512 and is 9 now"),
    "precision": ({"settings": EncodeSettings(precision="int8")}, "--precision was 'float32' and is 'int8' now"),
    "truncate_dim": ({"settings": EncodeSettings(truncate_dim=8)}, "--truncate_dim was None and is 8 now"),
    "dimensions": ({"embedder": StubEmbedder(8)}, "the number of dimensions was 16 and is 8 now"),
    "shard_rows": ({"shard_rows": 5}, "--shard_rows was 4 and is 5 now"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_of_other_embeddings_is_refused(name, whole, corpus):
    changed, message = REFUSED[name]
    before = contents(whole)
    with pytest.raises(ValueError, match=rf"holds embeddings of another command: {message}.*give another folder"):
        encode_corpus(**{"embedder": StubEmbedder(), "corpus": corpus, "folder": whole, "shard_rows": 4, **changed})
    assert contents(whole) == before


def test_an_instruction_without_a_place_in_the_template_is_refused(corpus, tmp_path):
    settings = EncodeSettings(instruction="find")
    with pytest.raises(ValueError, match=r"--instruction 'find': the passage template '\{text\}' has no \{instruction"):
        encode_corpus(StubEmbedder(), corpus, tmp_path / "e", settings)
    taking = StubEmbedder(prompts={"passage": "{instruction}: {text}"})
    encode_corpus(taking, corpus, tmp_path / "e", settings)
    with pytest.raises(ValueError, match="--instruction was 'find' and is None now"):
        encode_corpus(taking, corpus, tmp_path / "e")


def test_a_folder_of_another_corpus_or_of_other_files_is_refused(whole, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"--corpus .* was '.*corpus.jsonl with 10 documents, SHA-256 [0-9a-f]{12}' and is '.*c.jsonl with 9 ",
    ):
        encode_corpus(StubEmbedder(), corpus_of(tmp_path / "c.jsonl", 9), whole, shard_rows=4)
    with pytest.raises(ValueError, match=r"has no manifest.json, but holds c.jsonl; name a new or an empty folder"):
        encode_corpus(StubEmbedder(), corpus_of(tmp_path / "c.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="is a file; name a new folder"):
        encode_corpus(StubEmbedder(), corpus_of(tmp_path / "c.jsonl"), tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, "--precision int4: choose float32, float16, int8"),
        ({"role": "generation"}, "--role generation: choose passage or query"),
        ({"max_length": 0}, "--max_length 0 must be at least 1"),
        ({"truncate_dim": 0}, "--truncate_dim 0 must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        EncodeSettings(**settings).check()
    with pytest.raises(ValueError, match="--shard_rows 0"):
        encode_module.check_corpus(None, 0)  # type: ignore[arg-type]


def test_the_part_of_a_process(monkeypatch):
    assert own_part(None) == (0, 1)
    assert own_part("2/3") == (2, 3)
    for bad in ("3/3", "1", "a/b", "-1/3", "1/0", ""):
        with pytest.raises(ValueError, match=r"give I/N, .*such as 0/8"):
            own_part(bad)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_part(None) == (1, 4)
    assert sorted((rank, int(n)) for n in "012" for rank in range(4)) == sorted(
        divmod_part(own_part_of(monkeypatch, rank, n)) for n in "012" for rank in range(4)
    )
    assert local_device() is None  # no GPU here
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == "cuda:1"


def own_part_of(monkeypatch, rank: int, shard: str) -> tuple[int, int]:
    monkeypatch.setenv("RANK", str(rank))
    return own_part(f"{shard}/3")


def divmod_part(part: tuple[int, int]) -> tuple[int, int]:
    assert part[1] == 12
    return part[0] % 4, part[0] // 4


def test_a_real_model_gives_the_embeddings_of_encode(make_model, tmp_path):
    from ullme.search.embedder import ULLMEEmbedder

    model = make_model()
    corpus = corpus_of(tmp_path / "c.jsonl")
    texts = [document.text for _, document in corpus.documents()]
    seen: list[int] = []
    embedder = ULLMEEmbedder(model)
    direct = embedder.embed(texts, "passage", max_length=64, on_batch=seen.append)
    assert sum(seen) == 10
    assert np.array_equal(direct, model.encode(texts, role="passage", max_length=64))
    encode_corpus(embedder, corpus, tmp_path / "e", EncodeSettings(max_length=64), shard_rows=4)
    found = Shards(tmp_path / "e")
    assert np.abs(found.vectors(range(10)) - direct).max() < 1e-5
    assert found.manifest["prompts"] == model.prompts.to_dict()
    assert len(found.manifest["model"]["revision"]) == 12
    assert os.environ.get("RANK") is None
