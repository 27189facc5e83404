"""π_ref: adapters off, a frozen copy, and the cache of its likelihoods on disk."""

from __future__ import annotations

import math
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gradcache import assert_same_gradients, make_batch
from test_objective import by, with_generation

from ullme.batch import Batch
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective, score
from ullme.engine.reference import AdaptersOff, Cached, FrozenCopy, make_reference
from ullme.losses import DPO


@pytest.fixture
def batch() -> Batch:
    return with_generation(make_batch())


@pytest.mark.parametrize("kind", [AdaptersOff, Cached, FrozenCopy])
def test_the_reference_has_no_dropout_while_the_policy_trains(kind, make_model, batch, tmp_path):
    """GPT-2 with its own dropout of 0.1: the policy's likelihoods differ from call to call, the reference's do not."""
    model = make_model("gpt2", sizes={"resid_pdrop": 0.1}, llm_dropout=True).train()
    mask = torch.ones(len(batch), batch.num_candidates, dtype=torch.bool)
    with torch.no_grad():
        first, second = (score(model, batch, mask, True)[0] for _ in range(2))
    assert (first - second).abs().max() > 0.1  # nats
    found = []
    for n in range(2):
        reference = Cached(tmp_path / str(n), AdaptersOff()) if kind is Cached else kind()
        reference.prepare(model, "32-true")
        found.append(reference.logps(model, batch, mask, True))
        assert model.training
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    with torch.no_grad(), model.adapters_off():
        expected = score(model.eval(), batch, mask, True)[0]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    reference.logps(model, batch, mask, True)
    assert not model.training  # nor does a reference start dropout in a model that has none


def test_full_fine_tuning_needs_an_explicit_reference(make_model, batch):
    model = make_model(lora_name=None).double().train()
    with pytest.raises(ValueError, match=r"loss.reference=adapters_off.*frozen_copy"):
        Objective([DPO()]).check(model, 2)
    objective = Objective([DPO()], FrozenCopy())
    objective.check(model, 2)
    objective.reference.copy.double()
    logs, grads = by(objective, model, batch)
    assert logs["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grads:
                parameter.sub_(grads[name], alpha=0.05)
    assert by(objective, model, batch)[0]["dpo"] < math.log(2)  # the model moved, the reference did not


def test_cached_reference_is_the_computed_one_and_is_not_computed_again(make_model, batch, tmp_path):
    model = make_model().train()
    plain, expected = by(Objective([DPO()]), model, batch)

    class Counting(AdaptersOff):
        calls = 0

        def logps(self, *args):
            self.calls += 1
            return super().logps(*args)

    for run in range(2):
        source = Counting()
        objective = Objective([DPO()], Cached(tmp_path / "cache", source))
        objective.check(model, 2)
        for epoch in range(2):
            logs, found = by(objective, model, batch, chunk_slices(batch, 2, None))
            assert source.calls == (1 if run == 0 else 0), (run, epoch)
            assert logs["dpo"] == pytest.approx(plain["dpo"], rel=1e-5)
            assert_same_gradients(found, expected, 1e-3)  # chunks round differently in float32
    only = Objective([DPO()], Cached(tmp_path / "cache", None))
    only.check(model, 2)
    assert by(only, model, batch)[0]["dpo"] == pytest.approx(plain["dpo"], rel=1e-5)
    with pytest.raises(ValueError, match=r"lacks the likelihoods of \d+ passages \(training rows"):
        by(only, model, with_generation(make_batch(4, 3)))


def test_a_cache_holds_what_other_ranks_have_computed(make_model, batch, tmp_path):
    model, mask = make_model().train(), torch.ones(5, 3, dtype=torch.bool)
    first = Cached(tmp_path / "cache", AdaptersOff())
    first.prepare(model, "32-true")
    expected = first.logps(model, batch, mask, True)
    assert (expected < -1).all()
    for file in first.files:
        file.close()
    (tmp_path / "cache" / "reference-0.sqlite").rename(tmp_path / "cache" / "reference-1.sqlite")
    second = Cached(tmp_path / "cache", None)
    second.prepare(model, "32-true")
    assert not (tmp_path / "cache" / "reference-0.sqlite").exists()  # the folder may be writable for others only
    opened = second.files
    second.prepare(model, "32-true")  # as a second fit does
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")
    torch.testing.assert_close(second.logps(model, batch, mask, True), expected, rtol=0, atol=0)


def test_the_file_of_a_rank_that_starts_later_is_read_too(make_model, tmp_path, monkeypatch):
    """A later epoch gives a row to another rank, which would compute it once more."""

    def wait(message, device):
        other = sqlite3.connect(tmp_path / "reference-1.sqlite")
        other.execute("CREATE TABLE logps (key BLOB PRIMARY KEY, logp REAL)")
        other.close()
        (tmp_path / "reference-2.sqlite").touch()  # of a process that was killed just then
        return {}

    monkeypatch.setattr("ullme.engine.reference.gather_messages", wait)
    cached = Cached(tmp_path, AdaptersOff())
    cached.prepare(make_model(), "32-true")
    assert len(cached.files) == 2


def test_the_file_of_a_rank_that_was_killed_while_it_wrote_is_read(make_model, batch, tmp_path):
    """By a run of fewer ranks, or one that only reads, which cannot undo the half of it that was written."""
    model, everything = make_model(), torch.ones(len(batch), batch.num_candidates, dtype=torch.bool)
    folder, own = tmp_path / "cache", tmp_path / "cache" / "reference-0.sqlite"
    full = Cached(folder, AdaptersOff())
    full.prepare(model, "32-true")
    expected = full.logps(model, batch, everything, True)
    writing = sqlite3.connect(own, isolation_level=None)
    writing.execute("PRAGMA cache_size=5")  # so that pages are in the file before the commit
    writing.execute("BEGIN")
    writing.executemany("INSERT INTO logps VALUES (?, ?)", [(n.to_bytes(16), 0.0) for n in range(20_000)])
    for name in ("reference-3.sqlite", "reference-3.sqlite-journal"):
        shutil.copy(folder / name.replace("3", "0"), folder / name)
    writing.close()
    own.unlink()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        sqlite3.connect(f"file:{folder / 'reference-3.sqlite'}?mode=ro", uri=True).execute("SELECT * FROM logps")
    reader = Cached(folder, None)
    reader.prepare(model, "32-true")
    assert torch.equal(reader.logps(model, batch, everything, True), expected)


def test_a_likelihood_that_is_not_finite_is_not_kept(make_model, batch, tmp_path):
    class Broken(AdaptersOff):
        def logps(self, *args):
            return super().logps(*args).masked_fill(torch.eye(5, 3, dtype=torch.bool), float("nan"))

    model, mask = make_model().train(), torch.ones(5, 3, dtype=torch.bool)
    cached = Cached(tmp_path, Broken())
    cached.prepare(model, "32-true")
    assert cached.logps(model, batch, mask, True).isnan().sum() == 3  # which stops the step
    cached.source = AdaptersOff()
    assert cached.logps(model, batch, mask, True).isfinite().all()
    assert (cached.hits, cached.misses) == (12, 18)


def test_a_cache_that_cannot_be_written_is_named_and_is_not_to_be_deleted(make_model, batch, tmp_path):
    model, mask = make_model().train(), torch.ones(5, 3, dtype=torch.bool)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"loss\.cache_reference='.*file' cannot be written .*; name a folder that can"
    ):
        Cached(tmp_path / "file", AdaptersOff()).prepare(model, "32-true")
    cached = Cached(tmp_path / "cache", AdaptersOff())
    cached.prepare(model, "32-true")
    cached.files[0].execute("PRAGMA query_only=ON")
    with pytest.raises(
        ValueError, match=r"cannot be used \(attempt to write a readonly database\); free space, make it"
    ):
        cached.logps(model, batch, mask, True)


def test_a_look_up_keeps_to_the_values_that_sqlite_takes_at_once(make_model, batch, tmp_path):
    model, mask = make_model().train(), torch.ones(5, 3, dtype=torch.bool)
    cached = Cached(tmp_path, AdaptersOff())
    cached.prepare(model, "32-true")
    cached.files[0].setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 4)
    cold, warm = (cached.logps(model, batch, mask, True) for _ in range(2))
    assert torch.equal(cold, warm)
    assert (cached.hits, cached.misses) == (15, 15)


def test_likelihoods_that_another_rank_lacks_stop_every_rank(make_model, batch, tmp_path, monkeypatch):
    model, mask = make_model(), torch.ones(5, 3, dtype=torch.bool)
    cached = Cached(tmp_path, AdaptersOff())
    cached.prepare(model, "32-true")
    cached.logps(model, batch, mask, True)
    cached.source = None
    assert cached.logps(model, batch, mask, True).isfinite().all()
    monkeypatch.setattr("ullme.engine.reference.gather_messages", lambda message, _: {1: "7 passages"})
    with pytest.raises(ValueError, match="lacks the likelihoods of 7 passages"):
        cached.logps(model, batch, mask, True)


def test_a_frozen_copy_of_a_quantised_llm_is_refused(make_model):
    model = make_model()
    model.options = replace(model.options, quantization="nf4")
    with pytest.raises(ValueError, match=r"frozen_copy with quantization='nf4': .* set loss\.reference=adapters_off"):
        FrozenCopy().prepare(model, "32-true")


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match=r"loss\.reference='frozen': choose one of adapters_off, frozen_copy, cached"):
        make_reference("frozen", None)


def test_of_two_runs_that_start_at_once_one_has_the_cache(make_model, tmp_path, monkeypatch):
    """The second looked before the first had written; another LLM must not fill the same files."""
    first, second = (Cached(tmp_path, AdaptersOff()) for _ in range(2))
    first.prepare(make_model(), "32-true")
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(ValueError, match="made with another backbone"):
        second.prepare(make_model("mistral"), "32-true")
    second.prepare(make_model(), "32-true")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference-0.sqlite", "reference.json"]


def test_a_foreign_stale_or_damaged_cache_is_refused(make_model, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="holds no reference likelihoods"):
        Cached(folder, None).prepare(make_model(), "32-true")
    Cached(folder, AdaptersOff()).prepare(make_model(), "32-true")
    with pytest.raises(ValueError, match="made with another precision"):
        Cached(folder, AdaptersOff()).prepare(make_model(), "bf16-mixed")
    with pytest.raises(ValueError, match="made with another backbone"):
        Cached(folder, AdaptersOff()).prepare(make_model("mistral"), "32-true")
    other = make_model()
    other.prompts = replace(other.prompts, generation="Q: {text} A:")
    with pytest.raises(ValueError, match="made with another generation"):
        Cached(folder, AdaptersOff()).prepare(other, "32-true")
    other = make_model()
    other.prompts = replace(other.prompts, instruction="Another task")
    with pytest.raises(ValueError, match="made with another instruction"):
        Cached(folder, AdaptersOff()).prepare(other, "32-true")
    (folder / "reference-0.sqlite").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(ValueError, match=r"cannot be used .*; delete the folder"):
        Cached(folder, AdaptersOff()).prepare(make_model(), "32-true")
    (folder / "reference.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Cached(folder, AdaptersOff()).prepare(make_model(), "32-true")
