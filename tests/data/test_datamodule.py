from __future__ import annotations

import json
import logging
from itertools import chain
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from ullme.data.datamodule import ULLMEDataModule
from ullme.data.mixture import TrainSet
from ullme.prompts import Prompts, PromptTokenizer


@pytest.fixture
def make(write_jsonl, rows):
    path = write_jsonl(rows)

    def make(**options):
        defaults = {"train": path, "num_hard_negatives": 3, "batch_size": 8, "num_workers": 0, "seed": 5}
        return ULLMEDataModule(**(defaults | options))

    return make


@pytest.fixture
def prompt_tokenizer(tokenizer):
    return PromptTokenizer(tokenizer, Prompts(instruction="find"))  # a byte is a token here


@pytest.mark.parametrize("by", ["dataset", "schema"])
def test_passages_with_the_querys_template_need_room_for_it(by, make, rows, write_jsonl, prompt_tokenizer):
    """Else all of them would be the same row, the beginning of the template."""
    if by == "dataset":
        data = make(train=None, datasets=[TrainSet(write_jsonl(rows), symmetric=True)], passage_max_length=20)
    else:
        pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": n} for n in range(8)]
        data = make(train=write_jsonl(pairs), num_hard_negatives=0, passage_max_length=20)
    with pytest.raises(ValueError, match=r"query: max_length=20 tokens, .* takes \d+; raise passage_max_length"):
        data.train_dataloader_for(prompt_tokenizer)


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = {"corpus": [f"passage {'x' * (i % 7)} {i}" for i in range(10)], "queries": ["a b", "a", "a b c"]}
    for name, values in texts.items():
        lines = (json.dumps({"_id": f"{name[0]}{i}", "text": text}) + "\n" for i, text in enumerate(values))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\tc{i}\t1\n" for i in range(3)))
    return str(folder)


def content(batch):
    """A batch as plain numbers, to compare."""
    return (
        batch.row_ids.tolist(),
        batch.queries.input_ids.tolist(),
        batch.passages.input_ids.tolist(),
        batch.passage_keys.tolist(),
    )


def epochs(loader, count):
    return [[content(batch) for batch in loader] for _ in range(count)]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(make, prompt_tokenizer, num_workers):
    alone = epochs(make().train_dataloader_for(prompt_tokenizer), 2)
    assert [len(epoch) for epoch in alone] == [5, 5]
    assert alone[0] != alone[1]
    assert epochs(make(num_workers=num_workers).train_dataloader_for(prompt_tokenizer), 2) == alone


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_process_sees(make, prompt_tokenizer, world_size):
    def draws(batch):
        return list(zip(batch.row_ids.tolist(), batch.passage_keys.tolist(), strict=True))

    alone = [draws(batch) for batch in make().train_dataloader_for(prompt_tokenizer)]
    ranks = [make().train_dataloader_for(prompt_tokenizer, rank, world_size) for rank in range(world_size)]
    together = [[d for part in parts for d in draws(part)] for parts in zip(*ranks, strict=True)]
    assert together == alone


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("epoch", "start_batch"), [(0, 3), (1, 0), (1, 4)])
def test_resuming_inside_an_epoch(make, prompt_tokenizer, num_workers, epoch, start_batch):
    whole = list(chain(*epochs(make().train_dataloader_for(prompt_tokenizer), 3)))
    loader = make(num_workers=num_workers).train_dataloader_for(prompt_tokenizer, epoch=epoch, start_batch=start_batch)
    assert len(loader) == 5
    resumed = list(chain(*epochs(loader, 2)))
    first = 5 * epoch + start_batch
    assert resumed == whole[first : first + len(resumed)]


def test_iterating_leaves_the_global_random_state_alone(make, prompt_tokenizer):
    before = torch.get_rng_state()
    epochs(make().train_dataloader_for(prompt_tokenizer), 1)
    assert torch.equal(before, torch.get_rng_state())


class Recorder(L.LightningModule):
    """One manual optimizer step a batch, as the real module does; remembers what it was given."""

    def __init__(self, prompt_tokenizer):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.model = SimpleNamespace(tokenizer=prompt_tokenizer.tokenizer, prompts=prompt_tokenizer.prompts)
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append(content(batch))
        self.optimizers().step()

    def validation_step(self, rows, batch_idx, dataloader_idx=0):
        self.validated += [(dataloader_idx, i) for i in rows.indices.tolist()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data, prompt_tokenizer, tmp_path, ckpt_path=None, **options):
    module = Recorder(prompt_tokenizer)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        **(quiet | {"max_epochs": 3} | options),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


class SaveAt(L.Callback):
    """A checkpoint in the middle of a run, at the place where ModelCheckpoint makes its own."""

    def __init__(self, step, path):
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("until", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 13}])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_fit_sees_what_an_uninterrupted_one_sees(
    make, prompt_tokenizer, tmp_path, num_workers, until, stop, recwarn
):
    path = tmp_path / "stopped.ckpt"
    data = make(num_workers=num_workers)
    whole, _ = fit(data, prompt_tokenizer, tmp_path, callbacks=[SaveAt(stop, path)], **until)
    expected = list(chain(*epochs(make().train_dataloader_for(prompt_tokenizer), 3)))
    assert whole.seen == expected[: until.get("max_steps", 15)]
    resumed, _ = fit(make(num_workers=num_workers), prompt_tokenizer, tmp_path, path, **until)
    assert resumed.seen == whole.seen[stop:]
    assert not [w for w in recwarn if "not resumable" in str(w.message) or "is zero" in str(w.message)]


def test_a_limited_epoch_has_the_first_batches_of_its_own_order(make, prompt_tokenizer, tmp_path):
    module, _ = fit(make(), prompt_tokenizer, tmp_path, limit_train_batches=2)
    whole = epochs(make().train_dataloader_for(prompt_tokenizer), 3)
    assert len(whole[0]) > 2
    assert module.seen == [batch for epoch in whole for batch in epoch[:2]]


class WriteSeen(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([batch[0] for batch in pl_module.seen]))


@pytest.mark.distributed
def test_lightning_gives_each_process_its_slice(make, prompt_tokenizer, tmp_path):
    callbacks = [WriteSeen(tmp_path)]
    fit(make(), prompt_tokenizer, tmp_path, max_epochs=2, devices=2, strategy="ddp_fork", callbacks=callbacks)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    together = [first + second for first, second in zip(*ranks, strict=True)]
    alone = chain(*epochs(make().train_dataloader_for(prompt_tokenizer), 2))
    assert together == [batch[0] for batch in alone]


def test_overfit_batches_repeats_the_same(make, prompt_tokenizer, tmp_path):
    module, _ = fit(make(), prompt_tokenizer, tmp_path, overfit_batches=2)
    assert module.seen == 3 * module.seen[:2]


@pytest.mark.parametrize(("query", "warns"), [("q: {text}", True), ("{instruction}: {text}", False)])
def test_instructions_without_a_place_in_the_template_are_named(
    query, warns, make, rows, write_jsonl, tokenizer, tmp_path, caplog
):
    data = make(train=write_jsonl([{**row, "prompt": "find the answer"} for row in rows]))
    with caplog.at_level(logging.WARNING, "ullme.data"):
        fit(data, PromptTokenizer(tokenizer, Prompts(query=query, instruction="find")), tmp_path, max_steps=1)
    message = "instructions (such as 'find the answer'), and model.prompts.query='q: {text}' has no {instruction}"
    assert (message in caplog.text) == warns


def test_resuming_with_other_data_warns(make, prompt_tokenizer, tmp_path, caplog):
    _, trainer = fit(make(), prompt_tokenizer, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    with caplog.at_level(logging.WARNING, "ullme.data"):
        fit(make(), prompt_tokenizer, tmp_path, tmp_path / "stopped.ckpt", max_steps=3)
        assert "other data" not in caplog.text
        fit(make(batch_size=4), prompt_tokenizer, tmp_path, tmp_path / "stopped.ckpt", max_steps=3)
    assert "'batch_size': (8, 4)" in caplog.text


def test_a_checkpoint_of_the_old_order_goes_on_in_it(make, prompt_tokenizer, tmp_path):
    """A checkpoint without a version of the order is one of version 1; so are the rows that max_rows keeps."""
    options = {"max_rows": 20}
    old = make(**options)
    old.load_state_dict({"rows": 20, "batch_size": 8, "seed": 5})
    before, _ = fit(old, prompt_tokenizer, tmp_path, max_epochs=2)
    kept = np.random.default_rng(5).permutation(41)[:20]
    old.setup("fit")
    assert [old.source[i].query for i in range(20)] == [f"query {row}" for row in kept]
    first = np.random.default_rng([5, 0]).permutation(20)[:8].tolist()
    assert before.seen[0][0] == first
    stopped = tmp_path / "stopped.ckpt"
    fit(old, prompt_tokenizer, tmp_path, max_epochs=2, callbacks=[SaveAt(1, stopped)])
    saved = torch.load(stopped, weights_only=False)
    assert saved["ULLMEDataModule"]["order"] == 1
    del saved["ULLMEDataModule"]["order"]
    torch.save(saved, stopped)
    resumed, _ = fit(make(**options), prompt_tokenizer, tmp_path, stopped, max_epochs=2)
    assert resumed.seen == before.seen[1:]
    new, _ = fit(make(**options), prompt_tokenizer, tmp_path, max_epochs=2)
    assert new.seen != before.seen


def test_the_order_of_a_newer_release_is_refused(make):
    with pytest.raises(ValueError, match="order of rows has version 9"):
        make().load_state_dict({"order": 9})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_gives_every_document_and_query(make, prompt_tokenizer, tmp_path, beir, num_workers):
    data = make(val=beir, val_batch_size=4, num_workers=num_workers)
    module, _ = fit(data, prompt_tokenizer, tmp_path, max_epochs=1, num_sanity_val_steps=0)
    assert sorted(module.validated) == [(0, i) for i in range(3)] + [(1, i) for i in range(10)]
    assert data.beir.corpus_ids[4] == "c4"
    assert data.beir.query_ids == ["q0", "q1", "q2"]


def test_options_reach_rows_and_texts(make, prompt_tokenizer, tokenizer, write_jsonl):
    """Each text is cut at its own length; a short row repeats its negatives; a row that is left out depends on the seed."""
    rows = [{"query": f"{n}" * 90, "pos": ["p" * 90], "neg": [f"negative {n}"]} for n in range(4)]
    path = write_jsonl(rows, "long.jsonl")
    lengths = {"query_max_length": 40, "passage_max_length": 70, "num_workers": 0}
    data = make(train=path, batch_size=4, short_rows="repeat", **lengths)
    batch = next(iter(data.train_dataloader_for(prompt_tokenizer)))
    assert (batch.queries.input_ids.shape[1], batch.passages.input_ids.shape[1]) == (40, 70)
    assert all(len(set(keys[1:])) == 1 for keys in batch.passage_keys.tolist())  # its one negative, three times
    kept = []
    for seed in range(6):
        data = make(train=path, batch_size=1, max_rows=1, num_hard_negatives=1, seed=seed)
        data.setup("fit")
        kept.append(data.source[0].query)
    assert len(set(kept)) > 1


def test_each_validation_text_is_cut_at_its_own_length(make, prompt_tokenizer, beir, monkeypatch):
    data = make(val=beir, query_max_length=30, passage_max_length=9)
    data.setup("validate")
    monkeypatch.setattr(data, "_prompt_tokenizer", lambda: prompt_tokenizer)
    widths = [max(rows.rows.input_ids.shape[1] for rows in loader) for loader in data.val_dataloader()]
    assert widths == [len("Instruct: find\nQuery: a b c"), 9]


def test_validation_texts_match_their_indices(make, tokenizer, prompt_tokenizer, beir, monkeypatch):
    data = make(val=beir)
    data.setup("validate")
    assert data.source is None, "validating alone does not read the training rows"
    monkeypatch.setattr(data, "_prompt_tokenizer", lambda: prompt_tokenizer)
    for loader, texts, prefix in zip(
        data.val_dataloader(),
        (list(data.beir.queries.values()), list(data.beir.corpus.values())),
        ("Instruct: find\nQuery: ", ""),
        strict=True,
    ):
        for rows in loader:
            for ids, mask, index in zip(rows.rows.input_ids, rows.rows.attention_mask, rows.indices, strict=True):
                decoded = tokenizer.decode(ids[mask.bool()])
                assert decoded == (prefix + texts[index])[: data.query_max_length if prefix else None]


def test_no_validation(make):
    data = make()
    data.setup("fit")
    assert data.val_dataloader() == []


def test_counts_are_logged_once(make, prompt_tokenizer, write_jsonl, rows, caplog):
    path = write_jsonl([*rows, {"query": "no positive"}], "bad.jsonl")
    with caplog.at_level(logging.INFO, "ullme.data"):
        data = make(train=path, on_bad_row="skip", short_rows="drop")
        data.setup("fit")
        data.setup("fit")
        data.train_dataloader_for(prompt_tokenizer)
    assert [record.getMessage().partition(" the first")[0] for record in caplog.records] == [
        "data: 16 rows to train on",
        "data: skipped 1 bad rows,",
        "data: 25 of 41 rows have fewer than 3 hard negatives (data.short_rows=drop)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 42}, r"data\.batch_size=42 is larger than the 41 rows"),
        ({"train": "nowhere.jsonl"}, "no such file"),
        ({"val": "nowhere"}, "a BEIR folder has"),
        ({"num_hard_negatives": 100}, r"lower data\.num_hard_negatives"),
        ({"num_hard_negatives": -1}, r"data\.num_hard_negatives=-1 must be at least 0"),
        ({"seed": -1}, r"data\.seed=-1 must be at least 0"),
        ({"max_rows": 7}, r"data\.batch_size=8 is larger than the 7 rows"),
    ],
)
def test_options_that_do_not_fit_stop_in_setup(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).setup("fit")


def test_global_batch_must_divide_by_the_ranks_before_training(make):
    data = make()
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": 1, "num_replicas": 3})
    with pytest.raises(ValueError, match=r"data\.batch_size=8 .* processes \(3\)"):
        data.setup("fit")


def test_options_have_types_and_help_for_the_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ULLMEDataModule, "data")
    parsed = parser.parse_args(["--data.train=[a.jsonl,b.jsonl]", "--data.short_rows=repeat", "--data.max_rows=279040"])
    data = parser.instantiate_classes(parsed).data
    assert data.train == ["a.jsonl", "b.jsonl"]
    assert (data.short_rows, data.max_rows, data.num_hard_negatives, data.batch_size) == ("repeat", 279040, 8, 512)
    assert "queries in a global batch" in parser.format_help()


def test_marco_with_its_tokenizer(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data.parent / "models" / "marco-6m")
    data = ULLMEDataModule(train=str(shared_data / "msmarco" / "train.jsonl"), batch_size=64, num_workers=2)
    batch = next(iter(data.train_dataloader_for(PromptTokenizer(tokenizer, Prompts()))))
    assert (len(batch), batch.num_candidates) == (64, 9)
    for b, row in enumerate(batch.row_ids.tolist()):
        ids = batch.passages.input_ids[9 * b][batch.passages.attention_mask[9 * b].bool()]
        assert data.source[row].positives[0].startswith(tokenizer.decode(ids[:50], skip_special_tokens=True)[:100])
