"""The LightningDataModule: training rows, and a BEIR test collection for validation."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from ullme.batch import Batch, LikelihoodKind
from ullme.data.beir import BeirFolder, read_beir
from ullme.data.collator import Collator, EvalCollator, EvalDataset, TrainDataset, length_sorted_batches
from ullme.data.columns import ColumnOption, split_option
from ullme.data.loader import ResumableLoader, defer_worker_signals
from ullme.data.mixture import Mixture, MixtureSampler, TrainSet, check_alpha
from ullme.data.order import ORDER_VERSION, random_order
from ullme.data.records import Schema, check_schema
from ullme.data.sampler import GlobalBatchSampler, ShortRows
from ullme.data.short_rows import check_no_row_borrows
from ullme.data.sources import OnBadRow, RowSource
from ullme.data.train_rows import (
    check_beside_datasets,
    check_mixture_drops_last,
    datasets_of_entries,
    usable_rows,
)
from ullme.prompts import Prompts, PromptTokenizer, Role

log = logging.getLogger(__name__)


class ULLMEDataModule(L.LightningDataModule):
    """Training rows and a BEIR folder for validation.

    ``batch_size`` is global: it counts the queries of all ranks together, and each rank gets its slice of every batch.
    So the trainer must have ``use_distributed_sampler=False``. The position in the data follows from the trainer's
    step counter (one optimizer step per batch), so a resumed run continues with the next batch.

    Args:
        train: JSONL files (paths, patterns or folders), or a dataset: a hub name, a dataset folder, table files.
        datasets: several datasets in place of ``train``, each a :class:`~ullme.data.mixture.TrainSet` with its own
            split, name, schema and max_rows; every batch comes from one of them.
        train_split: split of the dataset.
        train_name: configuration of the dataset, if it has several.
        schema: the columns: auto, bge, tevatron, sentence-transformers or ullme; candidates, a query and passages that
            nobody has judged (for losses that need no label); pairs, sentence1, sentence2 and score; chat, messages or
            prompt and completion; text, one text per row (of a retrieval row, the first
            positive), which is its own positive (SimCSE, arXiv 2104.08821); or the dotted path of a function that
            parses a row.
        on_bad_row: stop at the first bad row, before training, with its file, line and reason; or skip bad rows and
            count them.
        short_rows: what to do if a row has too few hard negatives: borrow positives of other rows (never those of the
            same query; refused for a dataset with ``in_batch_negatives: false``), repeat its negatives, or drop the
            row.
        num_hard_negatives: N, hard negatives per query.
        batch_size: B, queries in a global batch, over all ranks; one optimizer step.
        query_max_length: in tokens, template included.
        passage_max_length: in tokens, template included.
        max_rows: train on this many rows of ``train``, the first after a shuffle; null uses all.
        val: a BEIR folder to validate on; null for no validation.
        val_split: split of its qrels.
        val_batch_size: texts in a validation batch, on each rank.
        num_workers: dataloader processes that draw and tokenise rows.
        seed: of the order of rows and the draws, independent of other seeds; not negative.
        drop_last: leave out an epoch's last batch if it is not full; a mixture always does, in each pass.
        columns: numbers of the rows that losses read, besides ``score``, which is read anyway: BGE's pos_scores and
            neg_scores, sentence-transformers' score, scores and label, a score of each passage. A list of fields, or
            column: field, or column: file.jsonl, a side file with one line for each row. Of a query it is a number; of
            the candidates a list with one number for each positive and then each negative, or the two lists pos_FIELD
            and neg_FIELD.
        cache_dir: folder of the indices of checked rows, one for all processes of a machine; null takes $ULLME_CACHE or
            ~/.cache/ullme.
        mixture_alpha: α between 0 and 1: an epoch has batches of each of ``datasets`` in proportion to its rows to the
            power α (times its weight); below 1, small datasets are repeated. See
            :func:`~ullme.data.mixture.epoch_batches`. Without ``datasets``, a value below 1 makes a dataset of each
            entry of a list in ``train``.
        num_positives: the most positives of a row that are drawn at once, for InfoNCE with ``positives: all``; other
            terms look at the first one only. Rows with fewer give all they have.

    Raises:
        ValueError: an option is out of its range; or, in ``setup``, data cannot be read, has a bad row, or does not fit
            the options.
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
        columns: ColumnOption = None,
        cache_dir: str | None = None,
        mixture_alpha: float = 1.0,
        num_positives: int = 1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_hard_negatives", num_hard_negatives, 0),
            ("num_positives", num_positives, 1),
            ("query_max_length", query_max_length, 1),
            ("passage_max_length", passage_max_length, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        check_schema(schema)
        split_option(columns)
        if datasets is not None:
            own: dict[str, Any] = {"columns": columns, "schema": schema, "max_rows": max_rows}
            check_beside_datasets({**own, "train_name": train_name, "train_split": train_split})
        if (train is None) == (datasets is None):
            both = f"data.train={train!r} and data.datasets={datasets!r}"
            raise ValueError(f"{both}: give exactly one of them (the rows to train on)")
        check_alpha(mixture_alpha)
        if datasets is not None and not datasets:
            raise ValueError("data.datasets=[] holds no dataset; name at least one, or give data.train")
        if train is not None:
            whole = TrainSet(train, train_split, train_name, schema, max_rows, columns=columns)
            datasets = None if mixture_alpha == 1 else datasets_of_entries(whole, mixture_alpha)
            self.sets = datasets or [whole]
        else:
            self.sets = datasets or []
        if datasets is not None:
            check_mixture_drops_last(drop_last)
        self.train = train
        self.datasets = datasets
        self.train_split = train_split
        self.train_name = train_name
        self.schema: Schema = schema
        self.columns = columns
        self.cache_dir = cache_dir
        self.mixture_alpha = mixture_alpha
        self.num_positives = num_positives
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
        self.order_version = ORDER_VERSION
        self.source: RowSource | None = None
        self.beir: BeirFolder | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the data, once.

        Args:
            stage: Lightning's: fit, validate, or None for both.

        Raises:
            ValueError: see the class.
        """
        if self.val is not None and self.beir is None:
            try:
                self.beir = read_beir(self.val, self.val_split)
            except ValueError as error:
                raise ValueError(f"data.val={self.val!r}, data.val_split={self.val_split!r}: {error}") from error
            if self._rank_and_world_size()[0] == 0:
                for note in self.beir.notes:
                    log.warning("data.val: %s", note)
        if stage in ("fit", None) and self.source is None:
            self.source = self._open_train()
            sampler = self._sampler(*self._rank_and_world_size())  # raises now, if options do not fit the data
            if isinstance(sampler, MixtureSampler) and self._rank_and_world_size()[0] == 0:
                for line in sampler.shares():
                    log.info("data: %s", line)

    @property
    def labelled(self) -> bool:
        """Whether every training row says which text is a positive; known after :meth:`setup`."""
        return self.source is None or self.source.labelled

    @property
    def sources(self) -> list[RowSource]:
        """The rows of each dataset; known after :meth:`setup`."""
        if self.source is None:
            return []
        return self.source.sources if isinstance(self.source, Mixture) else [self.source]

    def _open_train(self) -> RowSource:
        """Open the training set, or all datasets of the mixture."""
        sources = [self._open(dataset) for dataset in self.sets]
        if self.datasets is None:
            return sources[0]
        mixture = Mixture(self.datasets, sources)
        for dataset, rows in zip(self.datasets, sources, strict=True):
            own = dataset.num_hard_negatives
            negatives = self.num_hard_negatives if own is None else own
            if not dataset.in_batch_negatives:
                check_no_row_borrows(rows, negatives, self.short_rows, f"data.datasets: {dataset.train!r}", mixture)
        return mixture

    def _open(self, dataset: TrainSet) -> RowSource:
        """Open one dataset."""
        source = dataset.open(self.on_bad_row, self.seed, self.order_version, self.cache_dir)
        several, quiet = self.datasets is not None, self._rank_and_world_size()[0] != 0
        return usable_rows(dataset, source, self.num_hard_negatives, self.short_rows, self.seed, several, quiet)

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's slices of the global batches, starting at the trainer's step counter."""
        trainer = self.trainer
        assert trainer is not None
        # with overfit_batches, every epoch has the same batches
        overfit = bool(trainer.overfit_batches)  # type: ignore[attr-defined]

        def position() -> int:
            if overfit:
                return 0
            limit, whole = trainer.num_training_batches, len(loader)
            if limit >= whole:
                return trainer.global_step
            # with limit_train_batches, each epoch has the first batches of its own order
            epoch, batch = divmod(trainer.global_step, int(limit))
            return epoch * whole + batch

        loss: Any = getattr(trainer.lightning_module, "loss", None)
        prompt_tokenizer = self._prompt_tokenizer()
        self._warn_of_unread_instructions(prompt_tokenizer.prompts)
        loader = self.train_dataloader_for(
            prompt_tokenizer,
            *self._rank_and_world_size(),
            position=position,
            generation=() if loss is None else loss.objective.likelihoods,
        )
        return loader

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
        """A dataloader of training batches that needs no Trainer; each iteration over it is the next epoch.

        Args:
            prompt_tokenizer: the tokenizer with the prompt contract.
            rank: of this process.
            world_size: W; ``batch_size`` must be a multiple of it.
            epoch: the first epoch.
            start_batch: the first batch in that epoch.
            position: see :class:`~ullme.data.sampler.GlobalBatchSampler`.
            generation: the likelihoods that the loss needs rows for (``objective.likelihoods``); True: log π(passage |
                query), False: none.

        Returns:
            A loader of :class:`~ullme.batch.Batch`; its length is that of a whole epoch.
        """
        self.setup("fit")
        assert self.source is not None
        dataset = self._draws()
        sampler = self._sampler(rank, world_size, epoch, start_batch, position)
        collator = self._collator(prompt_tokenizer, generation)
        return ResumableLoader(dataset, batch_sampler=sampler, collate_fn=collator, **self._loader_options())

    def _warn_of_unread_instructions(self, prompts: Prompts) -> None:
        """Say that rows or datasets have instructions, and the template of what is embedded no place for them."""
        own = None if self.source is None else self.source.longest_instruction
        if own is not None and "{instruction}" not in prompts.query and self._rank_and_world_size()[0] == 0:
            log.warning(
                "data: rows or datasets have instructions (such as %.80r), and model.prompts.query=%r has no "
                "{instruction}: they are not used to embed queries",
                own,
                prompts.query,
            )

    def _collator(self, prompt_tokenizer: PromptTokenizer, generation: bool | Collection[LikelihoodKind]) -> Collator:
        """Raises: ValueError: a template leaves no room for a text."""
        assert self.source is not None
        lengths = self.query_max_length, self.passage_max_length
        symmetric = any(s.symmetric or rows[0].symmetric for s, rows in zip(self.sets, self.sources, strict=True))
        return Collator(prompt_tokenizer, *lengths, generation, self.source.longest_instruction, symmetric)

    def _draws(self) -> TrainDataset:
        """The rows as they are drawn."""
        assert self.source is not None
        return TrainDataset(self.source, self.seed, self.num_hard_negatives, self.short_rows, self.num_positives)

    def first_batches(
        self,
        prompt_tokenizer: PromptTokenizer,
        generation: bool | Collection[LikelihoodKind] = False,
        rows: int = 100,
        datasets: Collection[int] | None = None,
    ) -> Iterator[Batch]:
        """This rank's part of the batches that training begins with, without worker processes.

        Args:
            prompt_tokenizer: the prompt contract with its tokenizer.
            generation: as for :meth:`train_dataloader_for`.
            rows: queries of each batch at the most, over all ranks.
            datasets: places among :attr:`sources`; batches of other datasets are passed over. None: all.
        """
        self.setup("fit")
        assert self.source is not None
        dataset = self._draws()
        collator = self._collator(prompt_tokenizer, generation)
        rank, ranks = self._rank_and_world_size()
        for places in self._sampler(rank, ranks):
            of = self.source.locate(places[0][0])[0] if isinstance(self.source, Mixture) else 0
            if datasets is not None and of not in datasets:
                continue
            yield collator([dataset[place] for place in places[: -(-rows // ranks)]])

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Dataloaders of the queries and the corpus, in this order; an empty list without validation.

        They yield :class:`~ullme.data.collator.EvalRows`, whose ``indices`` are indices of ``beir.query_ids`` and
        ``beir.corpus_ids``. The queries come first, so that passages can be ranked as they are embedded. The texts are
        split over ranks; a few may be in the batches of two ranks.
        """
        if self.beir is None:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # on purpose
            return []
        prompt_tokenizer = self._prompt_tokenizer()
        return [
            self._eval_loader(list(self.beir.queries.values()), prompt_tokenizer, "query", self.query_max_length),
            self._eval_loader(list(self.beir.corpus.values()), prompt_tokenizer, "passage", self.passage_max_length),
        ]

    def _eval_loader(
        self, texts: list[str], prompt_tokenizer: PromptTokenizer, role: Role, max_length: int
    ) -> DataLoader[Any]:
        batches = length_sorted_batches(texts, self.val_batch_size, *self._rank_and_world_size())
        collator = EvalCollator(prompt_tokenizer, role, max_length)
        return DataLoader(EvalDataset(texts), batch_sampler=batches, collate_fn=collator, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        if self.num_workers:  # a tokenizer with threads must not be forked
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": defer_worker_signals,
            "pin_memory": torch.cuda.is_available(),
            # else a dataloader draws from the global generator in each epoch, which would change dropout on resuming
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
        """The sampler of global batches, of one dataset or a mixture."""
        assert self.source is not None
        order = self.order_version
        if isinstance(self.source, Mixture):
            place, alpha = (rank, world_size, epoch, start_batch), self.mixture_alpha
            return MixtureSampler(self.source, self.batch_size, self.seed, *place, position, order, alpha)
        size, drop_last = self.batch_size, self.drop_last
        return GlobalBatchSampler(
            len(self.source), size, self.seed, rank, world_size, drop_last, epoch, start_batch, position, order
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        """(rank, W) in the data-parallel group, which is smaller than the world under tensor parallelism."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _prompt_tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the trainer's model, with its prompt contract."""
        assert self.trainer is not None
        model: Any = self.trainer.lightning_module.model
        return PromptTokenizer(model.tokenizer, model.prompts)

    def state_dict(self) -> dict[str, Any]:
        """The values that must not change for a resumed run to have the same batches as an uninterrupted one."""
        rows = len(self.source) if self.source is not None else 0
        known = {"rows": rows, "batch_size": self.batch_size, "seed": self.seed, "order": self.order_version}
        return known if self.datasets is None else {**known, "mixture_alpha": self.mixture_alpha}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the checkpoint's order of rows, and warn if other values differ from the checkpoint's.

        Raises:
            ValueError: a newer release's order.
        """
        self._go_on_in_order(state_dict.get("order", 1))  # checkpoints without a version have the first
        now = self.state_dict()
        changed = {k: (state_dict[k], now[k]) for k in now if k in state_dict and state_dict[k] != now[k]}
        if changed and self.source is not None:
            log.warning(
                "data: resuming with other data than in the checkpoint (before, now): %s; some rows of this epoch "
                "will be used twice or not at all",
                changed,
            )

    def _go_on_in_order(self, version: int) -> None:
        """Change to the order of rows of a checkpoint; the rows that ``max_rows`` keeps follow from it too."""
        if version == self.order_version:
            return
        random_order(1, [self.seed], version)  # raises, if it is unknown
        self.order_version = version
        log.info("data: the checkpoint's rows are in the order of version %d, and the run goes on in it", version)
        if self.source is not None and any(dataset.max_rows is not None for dataset in self.sets):
            self.source = self._open_train()
