"""The LightningDataModule: rows to train on and a retrieval collection to validate on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from ullme.batch import LikelihoodKind
from ullme.data.beir import BeirFolder, read_beir
from ullme.data.collator import Collator, EvalCollator, EvalDataset, TrainDataset, length_sorted_batches
from ullme.data.loader import ResumableLoader, defer_worker_signals
from ullme.data.mixture import Mixture, MixtureSampler, TrainSet
from ullme.data.records import Schema, check_schema
from ullme.data.sampler import GlobalBatchSampler, ShortRows, settle_short_rows
from ullme.data.sources import OnBadRow, RowSource
from ullme.prompts import PromptTokenizer, Role

log = logging.getLogger(__name__)


class ULLMEDataModule(L.LightningDataModule):
    """Training rows and a BEIR folder for validation.

    Batches are global: ``batch_size`` counts the queries of all ranks together, and each rank is given its own slice
    of every batch. So the trainer must run with ``use_distributed_sampler=False``. The place in the data follows the
    trainer's step counter, one optimizer step a batch, so a resumed run goes on with the very next batch.

    Args:
        train: JSONL files (paths, patterns or folders), or a dataset: a hub name, a dataset folder, table files.
        datasets: several datasets in place of ``train``, each as :class:`~ullme.data.mixture.TrainSet` says; every
            batch is of one of them, and each says its own split, name, schema and max_rows.
        train_split: which split of the dataset.
        train_name: the dataset's configuration, where it has several.
        schema: the columns: auto, bge, tevatron, sentence-transformers or ullme; text, one text a row (of a row of
            retrieval its first positive), which is its own positive (SimCSE, arXiv 2104.08821); or the dotted path of
            a function that reads a row.
        on_bad_row: stop at the first bad row with its place and reason, before training; or skip and count them.
        short_rows: a row with too few hard negatives of its own borrows positives of other rows, repeats its own
            negatives, or is dropped.
        num_hard_negatives: hard negatives for each query.
        batch_size: queries in a global batch, over all ranks; one optimizer step.
        query_max_length: in tokens, template included.
        passage_max_length: in tokens, template included.
        max_rows: train on the first so many rows after a shuffle; null uses all.
        val: a BEIR folder to validate on; null for none.
        val_split: which of its qrels.
        val_batch_size: texts in a validation batch, on each rank.
        num_workers: processes that draw and tokenise.
        seed: decides the order of the rows and the draws, apart from every other seed; not negative.
        drop_last: leave out an epoch's last batch if it is not full.

    Raises:
        ValueError: from ``setup``: data that cannot be read, a bad row, or options that do not fit the data.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        datasets: list[TrainSet] | None = None,
        train_split: str = "train",
        train_name: str | None = None,
        schema: Schema = "auto",
        on_bad_row: OnBadRow = "stop",
        short_rows: ShortRows = "borrow",
        num_hard_negatives: int = 8,
        batch_size: int = 512,
        query_max_length: int = 64,
        passage_max_length: int = 256,
        max_rows: int | None = None,
        val: str | None = None,
        val_split: str = "test",
        val_batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 42,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_hard_negatives", num_hard_negatives, 0),
            ("query_max_length", query_max_length, 1),
            ("passage_max_length", passage_max_length, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        check_schema(schema)
        if (train is None) == (datasets is None):
            both = f"data.train={train!r} and data.datasets={datasets!r}"
            raise ValueError(f"{both}: give exactly one of them (the rows to train on)")
        if datasets is not None and not datasets:
            raise ValueError("data.datasets=[] holds no dataset; name at least one, or give data.train")
        self.sets = [TrainSet(train, train_split, train_name, schema, max_rows)] if train is not None else datasets
        self.train = train
        self.datasets = datasets
        self.train_split = train_split
        self.train_name = train_name
        self.schema: Schema = schema
        self.on_bad_row: OnBadRow = on_bad_row
        self.short_rows: ShortRows = short_rows
        self.num_hard_negatives = num_hard_negatives
        self.batch_size = batch_size
        self.query_max_length = query_max_length
        self.passage_max_length = passage_max_length
        self.max_rows = max_rows
        self.val = val
        self.val_split = val_split
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last
        self.source: RowSource | None = None
        self.beir: BeirFolder | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything once. ``stage`` is Lightning's: fit, validate or None for both."""
        if self.val is not None and self.beir is None:
            try:
                self.beir = read_beir(self.val, self.val_split)
            except ValueError as error:
                raise ValueError(f"data.val={self.val!r}, data.val_split={self.val_split!r}: {error}") from error
        if stage in ("fit", None) and self.source is None:
            self.source = self._open_train()
            self._sampler(*self._rank_and_world_size())  # options that do not fit the data fail here, early

    def _open_train(self) -> RowSource:
        sources = [self._open(one) for one in self.sets or []]
        return sources[0] if self.datasets is None else Mixture(self.datasets, sources)

    def _open(self, one: TrainSet) -> RowSource:
        source = one.open(self.on_bad_row, self.seed)
        settled, short = settle_short_rows(source, self.num_hard_negatives, self.short_rows, self.seed)
        if self._rank_and_world_size()[0] == 0:
            log.info("data: %d rows to train on%s", len(settled), f" in {one.train}" if self.datasets else "")
            if source.skipped:
                log.warning("data: skipped %d bad rows, the first: %s", len(source.skipped), source.skipped[:3])
            if short:
                log.warning(
                    "data: %d of %d rows have fewer than %d hard negatives (data.short_rows=%s)",
                    short,
                    len(source),
                    self.num_hard_negatives,
                    self.short_rows,
                )
        return settled

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's slice of the global batches, from where the trainer's step counter stands."""
        trainer = self.trainer
        assert trainer is not None
        # Lightning's way to see the same batches again and again
        overfit = bool(trainer.overfit_batches)  # type: ignore[attr-defined]

        def position() -> int:
            return 0 if overfit else trainer.global_step

        loss: Any = getattr(trainer.lightning_module, "loss", None)
        return self.train_dataloader_for(
            self._prompt_tokenizer(),
            *self._rank_and_world_size(),
            position=position,
            generation=() if loss is None else loss.objective.likelihoods,
        )

    def train_dataloader_for(
        self,
        prompt_tokenizer: PromptTokenizer,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start_batch: int = 0,
        position: Callable[[], int] | None = None,
        generation: bool | Collection[LikelihoodKind] = False,
    ) -> DataLoader[Any]:
        """The training batches without a Trainer; iterating again gives the next epoch.

        Args:
            prompt_tokenizer: the prompt contract with its tokenizer.
            rank: this process.
            world_size: W; ``batch_size`` must divide by it.
            epoch: the first epoch.
            start_batch: where in it to start.
            position: see :class:`~ullme.data.sampler.GlobalBatchSampler`.
            generation: the likelihoods that the loss needs rows for (``objective.likelihoods``); True: log π(passage |
                query), False: none.

        Returns:
            A loader of :class:`~ullme.batch.Batch`; its length is that of a whole epoch.
        """
        self.setup("fit")
        assert self.source is not None
        dataset = TrainDataset(self.source, self.seed, self.num_hard_negatives, self.short_rows)
        sampler = self._sampler(rank, world_size, epoch, start_batch, position)
        lengths = self.query_max_length, self.passage_max_length
        collator = Collator(prompt_tokenizer, *lengths, generation, self.source.longest_instruction)
        return ResumableLoader(dataset, batch_sampler=sampler, collate_fn=collator, **self._loader_options())

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Loaders of the corpus and of the queries, in this order; none without a validation folder.

        They yield :class:`~ullme.data.collator.EvalRows`, whose ``indices`` are positions in ``beir.corpus_ids`` and
        ``beir.query_ids``. Over several ranks each gets its share, and a few rows may come to two ranks.
        """
        if self.beir is None:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # it is meant to be
            return []
        prompt_tokenizer = self._prompt_tokenizer()
        return [
            self._eval_loader(list(self.beir.corpus.values()), prompt_tokenizer, "passage", self.passage_max_length),
            self._eval_loader(list(self.beir.queries.values()), prompt_tokenizer, "query", self.query_max_length),
        ]

    def _eval_loader(
        self, texts: list[str], prompt_tokenizer: PromptTokenizer, role: Role, max_length: int
    ) -> DataLoader[Any]:
        batches = length_sorted_batches(texts, self.val_batch_size, *self._rank_and_world_size())
        collator = EvalCollator(prompt_tokenizer, role, max_length)
        return DataLoader(EvalDataset(texts), batch_sampler=batches, collate_fn=collator, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        if self.num_workers:  # a tokenizer that has threads of its own must not be forked
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": defer_worker_signals,
            "pin_memory": torch.cuda.is_available(),
            # a loader draws a number from the global generator at each epoch, which would change dropout on resuming
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _sampler(
        self,
        rank: int,
        world_size: int,
        epoch: int = 0,
        start_batch: int = 0,
        position: Callable[[], int] | None = None,
    ) -> GlobalBatchSampler:
        assert self.source is not None
        if isinstance(self.source, Mixture):
            return MixtureSampler(
                self.source, self.batch_size, self.seed, rank, world_size, epoch, start_batch, position
            )
        return GlobalBatchSampler(
            len(self.source), self.batch_size, self.seed, rank, world_size, self.drop_last, epoch, start_batch, position
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Of the data-parallel group, which is not every process where a strategy also splits the model."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _prompt_tokenizer(self) -> PromptTokenizer:
        assert self.trainer is not None
        model: Any = self.trainer.lightning_module.model
        return PromptTokenizer(model.tokenizer, model.prompts)

    def state_dict(self) -> dict[str, Any]:
        """What must not change for a resumed run to meet the rows in the order of an uninterrupted one."""
        rows = len(self.source) if self.source is not None else 0
        return {"rows": rows, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn where the data is not the checkpoint's."""
        now = self.state_dict()
        changed = {k: (state_dict[k], now[k]) for k in now if k in state_dict and state_dict[k] != now[k]}
        if changed and self.source is not None:
            log.warning(
                "data: resuming with other data than the checkpoint was made with (then, now): %s; some rows of this "
                "epoch will be seen twice or not at all",
                changed,
            )
