"""Texts to token blocks, in the worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ullme.batch import NO_TEXT, Batch, GenerationRows, LikelihoodKind, likelihood_keys
from ullme.data.columns import kind_of
from ullme.data.mixture import Mixture
from ullme.data.sampler import Draw, ShortRows, draw
from ullme.data.sources import RowSource
from ullme.prompts import PromptTokenizer, Role
from ullme.token_rows import TokenRows


def passage_key(text: str) -> int:
    """63-bit hash of a text, the same in every process and on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def query_key(text: str, instruction: str | None) -> int:
    """63-bit hash of a query: with another instruction the same text asks for something else."""
    return passage_key(text if instruction is None else f"{instruction}\0{text}")


def stack_columns(draws: Sequence[Draw]) -> dict[str, Tensor]:
    """Every column of the draws, (B, C) or (B,), in float32.

    Raises:
        ValueError: the draws have different columns: they are of different datasets.
    """
    kinds = [{name: kind_of(value) for name, value in drawn.columns.items()} for drawn in draws]
    if others := [found for found in kinds if found != kinds[0]]:
        raise ValueError(
            f"a batch of rows with the columns {kinds[0]} and rows with {others[0]}; give each its own entry of "
            "data.datasets, since a batch is of one dataset, or give all rows the same columns"
        )
    return {name: torch.tensor([drawn.columns[name] for drawn in draws], dtype=torch.float32) for name in kinds[0]}


class TrainDataset(Dataset[tuple[int, Draw]]):
    """Rows drawn for an epoch; the index is (row, epoch), as :class:`~ullme.data.sampler.GlobalBatchSampler` gives it.

    Args:
        source: all rows.
        seed: of the run.
        num_hard_negatives: N.
        short_rows: see :func:`ullme.data.sampler.draw`.
        num_positives: likewise.
    """

    def __init__(
        self,
        source: RowSource,
        seed: int,
        num_hard_negatives: int,
        short_rows: ShortRows = "borrow",
        num_positives: int = 1,
    ) -> None:
        self.source = source
        self.seed = seed
        self.num_hard_negatives = num_hard_negatives
        self.short_rows: ShortRows = short_rows
        self.num_positives = num_positives

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, Draw]:
        row, epoch = index
        how: dict[str, Any] = {"short_rows": self.short_rows, "num_positives": self.num_positives}
        if isinstance(self.source, Mixture):
            return row, self.source.draw(row, epoch, self.seed, self.num_hard_negatives, **how)
        return row, draw(self.source, row, epoch, self.seed, self.num_hard_negatives, **how)


class Collator:
    """Drawn rows to a :class:`~ullme.batch.Batch`: the candidates of query b are rows b * C .. b * C + C - 1, the
    positive first.

    Args:
        prompt_tokenizer: the prompt contract with its tokenizer.
        query_max_length: in tokens, template included.
        passage_max_length: in tokens, template included.
        generation: the likelihoods that the loss needs rows for; True: log π(passage | query), False: none. A prompt
            may have as many tokens more than its text as its template has.
        longest_instruction: of the rows' own, to be checked before training.
        symmetric: whether some rows' passages have the query's template, to be checked likewise.

    Raises:
        ValueError: a template, with the longest instruction, leaves no room for a text.
    """

    def __init__(
        self,
        prompt_tokenizer: PromptTokenizer,
        query_max_length: int,
        passage_max_length: int,
        generation: bool | Collection[LikelihoodKind] = False,
        longest_instruction: str | None = None,
        symmetric: bool = False,
    ) -> None:
        self.prompt_tokenizer = prompt_tokenizer
        self.query_max_length = query_max_length
        self.passage_max_length = passage_max_length
        if isinstance(generation, bool):
            generation = ["passage_given_query"] if generation else []
        self.likelihoods: tuple[LikelihoodKind, ...] = tuple(generation)
        for instruction in {None, longest_instruction}:
            prompt_tokenizer.check_length("query", query_max_length, instruction)
            prompt_tokenizer.check_length("passage", passage_max_length, instruction)
            if symmetric:
                prompt_tokenizer.check_length("query", passage_max_length, instruction, "passage_max_length")

    def __call__(self, items: Sequence[tuple[int, Draw]]) -> Batch:
        draws = [drawn for _, drawn in items]
        passages = [text for drawn in draws for text in (drawn.positive, *drawn.negatives)]
        instructions = [drawn.instruction for drawn in draws]
        queries = [drawn.query for drawn in draws]
        generation = {kind: self._rows_of(kind, queries, passages, instructions) for kind in self.likelihoods}
        return Batch(
            generation=generation.get("passage_given_query"),
            query_generation=generation.get("query_given_passage"),
            passage_generation=generation.get("passage"),
            queries=self.prompt_tokenizer(queries, "query", max_length=self.query_max_length, instruction=instructions),
            passages=self._passage_rows(draws, [[drawn.positive, *drawn.negatives] for drawn in draws]),
            passage_keys=torch.tensor([passage_key(text) for text in passages]).view(len(draws), -1),
            row_ids=torch.tensor([row for row, _ in items]),
            labelled=draws[0].labelled,
            query_keys=torch.tensor([query_key(drawn.query, drawn.instruction) for drawn in draws]),
            columns=stack_columns(draws),
            terms=draws[0].terms,
            isolated=None if all(d.in_batch_negatives for d in draws) else torch.tensor([True] * len(draws)),
            **self._extra_positives(draws),
        )

    def _passage_rows(self, draws: list[Draw], texts: Sequence[Sequence[str]]) -> TokenRows:
        """The texts of each draw, query-major. A batch is of one dataset, so the first row speaks for all."""
        flat = [text for own in texts for text in own]
        role: Role = "query" if draws[0].symmetric else "passage"
        instructions = [drawn.instruction for drawn, own in zip(draws, texts, strict=True) for _ in own]
        return self.prompt_tokenizer(flat, role, max_length=self.passage_max_length, instruction=instructions)

    def _extra_positives(self, draws: list[Draw]) -> dict[str, Any]:
        """The batch's extra positives and their keys; nothing where one positive of a row is drawn."""
        drawn = [text for one in draws for text in one.extra_positives]
        if not drawn:
            return {}
        keys = torch.tensor([NO_TEXT if text is None else passage_key(text) for text in drawn])
        # a row of one token stands in for a text that is not there, so that all queries have as many rows
        stand_in = self.prompt_tokenizer([""], None, max_length=1)
        texts = self._passage_rows(draws, [[t for t in one.extra_positives if t is not None] for one in draws])
        places = torch.where(keys == NO_TEXT, 0, (keys != NO_TEXT).cumsum(0))
        rows = TokenRows.cat([stand_in, texts])[places]
        return {"extra_positives": rows, "extra_positive_keys": keys.view(len(draws), -1)}

    def _rows_of(
        self, kind: LikelihoodKind, queries: list[str], passages: list[str], instructions: list[str | None]
    ) -> GenerationRows:
        tokenizer = self.prompt_tokenizer
        if kind == "query_given_passage":
            each = [instruction for instruction in instructions for _ in range(len(passages) // len(queries))]
            prompts = self._prompt_ids(passages, "query_generation", self.passage_max_length, each)
            targets = tokenizer.target_ids(queries, max_length=self.query_max_length)
        else:
            asked = queries if kind == "passage_given_query" else [""] * len(queries)
            prompts = self._prompt_ids(asked, "generation", self.query_max_length, instructions)
            targets = tokenizer.target_ids(passages, max_length=self.passage_max_length)
        keys = torch.from_numpy(likelihood_keys(prompts, targets, len(passages)))
        return GenerationRows(tokenizer.pad(prompts), tokenizer.pad(targets), keys)

    def _prompt_ids(
        self,
        texts: list[str],
        role: Literal["generation", "query_generation"],
        text_max_length: int,
        instructions: list[str | None],
    ) -> list[list[int]]:
        """Prompts whose texts keep ``text_max_length`` tokens: each has the room of its own template, so that a row is
        cut alike whatever rows are with it in the batch."""
        overheads = self.prompt_tokenizer.prompt_overheads(role, instructions)
        limits = [text_max_length + overhead for overhead in overheads]
        return self.prompt_tokenizer.prompt_ids(texts, max_length=limits, instruction=instructions, role=role)


@dataclass(frozen=True)
class EvalRows:
    """Texts of a corpus or of its queries, with their places, so that their order of arrival does not matter.

    Args:
        rows: R texts.
        indices: (R,) int64, the position of each in the corpus or in the list of queries.
    """

    rows: TokenRows
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EvalRows:
        return EvalRows(
            self.rows.to(device, non_blocking=non_blocking), self.indices.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> EvalRows:
        return EvalRows(self.rows.pin_memory(), self.indices.pin_memory())


class EvalDataset(Dataset[tuple[int, str]]):
    """Texts with their positions."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.texts[index]


class EvalCollator:
    """(position, text) pairs to :class:`EvalRows` under the same prompt contract as training."""

    def __init__(self, prompt_tokenizer: PromptTokenizer, role: Role, max_length: int) -> None:
        self.prompt_tokenizer = prompt_tokenizer
        self.role: Role = role
        self.max_length = max_length
        prompt_tokenizer.check_length(role, max_length)

    def __call__(self, items: Sequence[tuple[int, str]]) -> EvalRows:
        rows = self.prompt_tokenizer([text for _, text in items], self.role, max_length=self.max_length)
        return EvalRows(rows, torch.tensor([index for index, _ in items]))


def length_sorted_batches(texts: Sequence[str], batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's batches of positions, the longest texts first so that a lack of memory shows at once.

    Every rank gets the same number of batches (sharded models need that); to make it so a batch may come twice.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    surplus = -len(batches) % world_size
    return [*batches, *(batches[i % len(batches)] for i in range(surplus))][rank::world_size]
