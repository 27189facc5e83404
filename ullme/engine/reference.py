"""log π_ref: likelihoods under the pre-trained LLM, which preference losses compare with and a KL may learn from."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ullme.batch import Batch, LikelihoodKind, Representations, likelihood_keys
from ullme.distributed import all_reduce_max, any_rank, gather_messages, world
from ullme.engine.gradcache import embed_batch
from ullme.engine.scoring import embedder, score_by_chunk
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME
    from ullme.prompts import Prompts

ReferenceChoice = Literal["adapters_off", "frozen_copy", "cached"]


class MissingLikelihoodsError(ValueError):
    """A cache lacks likelihoods, and nothing may compute them."""


def make_reference(choice: ReferenceChoice, folder: str | None) -> Reference:
    """The reference that a config names. Raises: ValueError: an unknown choice, or ``cached`` without a folder."""
    if choice not in get_args(ReferenceChoice):
        raise ValueError(f"loss.reference={choice!r}: choose one of {', '.join(get_args(ReferenceChoice))}")
    if choice == "cached":
        if folder is None:
            raise ValueError("loss.reference=cached needs loss.cache_reference, the folder that holds the likelihoods")
        return Cached(folder, None)
    source = FrozenCopy() if choice == "frozen_copy" else AdaptersOff()
    return source if folder is None else Cached(folder, source)


class Reference(ABC):
    """Where log-likelihoods under π_ref come from."""

    @abstractmethod
    def prepare(
        self, model: ULLME, precision: str, likelihoods: Sequence[LikelihoodKind] = ("passage_given_query",)
    ) -> None:
        """Before training.

        Args:
            model: the policy.
            precision: what forwards run under.
            likelihoods: the kinds that will be asked for.

        Raises:
            ValueError: this reference cannot be had for this model.
        """

    @abstractmethod
    def logps(
        self,
        model: ULLME,
        batch: Batch,
        mask: Tensor,
        share_prompts: bool,
        kind: LikelihoodKind = "passage_given_query",
        chunks: Sequence[slice] | None = None,
    ) -> Tensor:
        """Log-likelihoods without gradient.

        Args:
            model: the policy.
            batch: B queries with their C candidates.
            mask: (B, C) bool on the CPU, the candidates that are asked for.
            share_prompts: as for :func:`ullme.engine.scoring.score`.
            kind: log π(p|q), log π(q|p) or log π(p).
            chunks: queries whose likelihoods are computed together; None: all.

        Returns:
            (B, C) in nats where ``mask`` is True, zero elsewhere, on the batch's device.
        """


class AdaptersOff(Reference):
    """The same weights with the adapters switched off: no second copy."""

    def prepare(
        self, model: ULLME, precision: str, likelihoods: Sequence[LikelihoodKind] = ("passage_given_query",)
    ) -> None:
        """Raises: ValueError: there is no adapter to switch off."""
        if model.options.lora_name is None:
            raise ValueError(
                "loss.reference=adapters_off, but lora_name=null trains the LLM itself, so the reference would move "
                "with it; set loss.reference to frozen_copy (a second LLM in memory) or to cached"
            )

    def logps(
        self,
        model: ULLME,
        batch: Batch,
        mask: Tensor,
        share_prompts: bool,
        kind: LikelihoodKind = "passage_given_query",
        chunks: Sequence[slice] | None = None,
    ) -> Tensor:
        """(B, C), see :meth:`Reference.logps`."""
        # the reference has no dropout, whatever mode the policy is in
        with evaluation_mode(model), model.adapters_off():
            return score_by_chunk(model, batch, mask, share_prompts, kind, chunks or [slice(0, len(batch))])


@torch.no_grad()
def embed_with_adapters_off(model: ULLME, batch: Batch, chunks: Sequence[slice]) -> Representations:
    """Embeddings of a batch by the LLM with its adapters off, in the memory of one chunk.

    Ranks of a sharded model do every forward together: one with fewer chunks embeds a query that counts for nothing.

    Args:
        model: the policy.
        batch: B queries with their C candidates.
        chunks: consecutive queries that are embedded together.
    """
    with evaluation_mode(model), model.adapters_off():
        parts = [embed_batch(embedder(model), batch[chunk]) for chunk in chunks]
        for _ in range(all_reduce_max(len(chunks), batch.row_ids.device) - len(chunks)):
            embed_batch(embedder(model), batch[:1])
    torch.clear_autocast_cache()  # it would keep copies of weights that were made here, without gradient
    queries, passages, *extra = (
        torch.cat(list(rows)) for rows in zip(*(part.embeddings for part in parts), strict=True)
    )
    return Representations(queries, passages, batch.passage_keys, extra_positives=extra[0] if extra else None)


class FrozenCopy(Reference):
    """A second copy of the pre-trained LLM, for full fine-tuning."""

    def __init__(self) -> None:
        self.copy: ULLME | None = None

    def prepare(
        self, model: ULLME, precision: str, likelihoods: Sequence[LikelihoodKind] = ("passage_given_query",)
    ) -> None:
        """Load the copy, split over ranks as the model is. Raises: ValueError: the LLM is quantised."""
        from ullme.engine.fsdp import split_alike
        from ullme.models.ullme import ULLME

        if model.options.quantization != "none":
            raise ValueError(
                f"loss.reference=frozen_copy with quantization={model.options.quantization!r}: quantised weights are "
                "frozen under their adapter, so no copy is needed; set loss.reference=adapters_off"
            )
        if self.copy is None:  # from the folder, not from the model: a resumed one is not the pre-trained any more
            options = {**model.options.to_dict(), "lora_name": None, "train": None, "gradient_checkpointing": False}
            if model.options.init_mode == "continue":
                options["init_from"] = None

            def build() -> ULLME:
                return ULLME(**options, prompts=model.prompts).requires_grad_(False).eval()

            self.copy = split_alike(model, build)

    def logps(
        self,
        model: ULLME,
        batch: Batch,
        mask: Tensor,
        share_prompts: bool,
        kind: LikelihoodKind = "passage_given_query",
        chunks: Sequence[slice] | None = None,
    ) -> Tensor:
        """(B, C), see :meth:`Reference.logps`."""
        assert self.copy is not None
        return score_by_chunk(self.copy, batch, mask, share_prompts, kind, chunks or [slice(0, len(batch))])


class Cached(Reference):
    """Likelihoods kept on disk, so that later epochs, seeds and methods on the same data do not compute them again.

    Every rank writes a file of its own and reads all; a likelihood is found by a hash of its prompt's and its target's
    token ids, a batch's with one look-up.

    Args:
        folder: where they are kept.
        source: what computes those that are missing, or None to allow none missing.
    """

    def __init__(self, folder: str | Path, source: Reference | None) -> None:
        self.folder, self.source = Path(folder), source
        self.files: list[sqlite3.Connection] = []
        self.hits = self.misses = 0

    def prepare(
        self, model: ULLME, precision: str, likelihoods: Sequence[LikelihoodKind] = ("passage_given_query",)
    ) -> None:
        """Raises: ValueError: the folder belongs to another backbone, direction, prompt or precision, or is damaged."""
        if self.source is not None:
            self.source.prepare(model, precision, likelihoods)
        identity = {
            "version": 1,
            "backbone": model.fingerprint,
            "likelihoods": sorted(likelihoods),
            **_templates(model.prompts, likelihoods),
            "precision": precision,
        }
        note = self.folder / "reference.json"
        if not note.is_file():
            if self.source is None:
                raise ValueError(
                    f"loss.cache_reference={str(self.folder)!r} holds no reference likelihoods; fill it first with a "
                    "run that has loss.reference adapters_off or frozen_copy and the same data and prompts"
                )
            self._claim(note, identity)
        self._compare(note, identity)
        self._open(model.device)

    def _claim(self, note: Path, identity: dict[str, Any]) -> None:
        """Write what the folder is for, unless another rank or run has done so by now.

        Raises:
            ValueError: it cannot be written.
        """
        draft = note.with_suffix(f".{uuid.uuid4().hex}")  # nobody reads half a file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(identity, indent=2))
            try:
                os.link(draft, note)  # never in place of another run's, as a rename would be
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(draft, note)
            draft.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"loss.cache_reference={str(self.folder)!r} cannot be written ({error}); name a folder that can"
            ) from error

    def _compare(self, note: Path, identity: dict[str, Any]) -> None:
        try:
            found = json.loads(note.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"loss.cache_reference: {note} cannot be read ({error}); delete the folder") from error
        held = found.get("likelihoods", ["passage_given_query"])  # version 0.1 knew no other
        if missing := sorted(set(identity["likelihoods"]) - set(held)):
            raise ValueError(
                f"loss.cache_reference={str(self.folder)!r} was made with another direction: it holds likelihoods of "
                f"{' and '.join(held)}, and this loss needs those of {' and '.join(missing)}; name another folder"
            )
        different = [key for key in identity if key != "likelihoods" and found.get(key) != identity[key]]
        if different:
            raise ValueError(
                f"loss.cache_reference={str(self.folder)!r} was made with another {' and '.join(different)}; "
                "name another folder, or delete this one"
            )

    def _open(self, device: torch.device) -> None:
        """Open this rank's file and those of the others, in place of those of an earlier run; without a source, which
        writes nothing, all of them for reading only."""
        for file in self.files:
            file.close()
        self.files = []
        own: Path | None = None
        problem: str | None = None
        try:
            if self.source is not None:
                own = self.folder / f"reference-{world()[0]}.sqlite"
                self.files = [sqlite3.connect(own, timeout=60, isolation_level=None)]
                self.files[0].execute("PRAGMA synchronous=NORMAL")
                self.files[0].execute(
                    "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp REAL) WITHOUT ROWID"
                )
        except sqlite3.DatabaseError as error:
            problem = str(self._unusable(error))
        # every rank's file is there before the others are listed: a later epoch gives a row to another rank
        if found := gather_messages(problem, device):
            raise ValueError(next(iter(found.values())))
        found_files = sorted(self.folder.glob("reference-*.sqlite"))
        others = [path for path in found_files if path != own and path.stat().st_size]  # one just made is empty
        for path in others:
            _roll_back(path)
        try:
            self.files += [
                sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=60) for path in others
            ]
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.DatabaseError) -> ValueError:
        """What to say where a file is damaged, or where it is in order and cannot be read or written now."""
        remedy = "delete the folder"
        if isinstance(error, sqlite3.OperationalError):  # a lock, a full disk, no permission
            remedy = "free space, make it writable, wait for other runs to end, or name another folder"
        return ValueError(f"loss.cache_reference={str(self.folder)!r} cannot be used ({error}); {remedy}")

    @torch.no_grad()
    def logps(
        self,
        model: ULLME,
        batch: Batch,
        mask: Tensor,
        share_prompts: bool,
        kind: LikelihoodKind = "passage_given_query",
        chunks: Sequence[slice] | None = None,
    ) -> Tensor:
        """(B, C), see :meth:`Reference.logps`.

        Raises:
            MissingLikelihoodsError: there is no ``source``, and some are missing.
            ValueError: a file of the folder is damaged, or cannot be written.
        """
        device = batch.row_ids.device
        places = mask.flatten().nonzero()[:, 0].tolist()
        keys = [row.tobytes() for row in _keys(batch, kind)[places]]
        known = self._lookup(keys)
        missing = [place for place, key in zip(places, keys, strict=True) if key not in known]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if self.source is None:
            self._check_none_missing(batch, [place // mask.shape[1] for place in missing])
        elif any_rank(bool(missing), device):
            todo = torch.zeros(mask.numel(), dtype=torch.bool)
            todo[missing] = True
            new = self.source.logps(model, batch, todo.view(mask.shape), share_prompts, kind, chunks).flatten().tolist()
            by_place = dict(zip(places, keys, strict=True))
            fresh = {by_place[place]: new[place] for place in missing}
            self._store(fresh)
            known |= fresh
        out = torch.zeros(mask.numel(), dtype=torch.promote_types(model.causal_lm.dtype, torch.float32))
        out[places] = torch.tensor([known[key] for key in keys], dtype=out.dtype)
        return out.view(mask.shape).to(device)

    def _store(self, fresh: dict[bytes, float]) -> None:
        """Keep new likelihoods. Raises: ValueError: the file cannot be written."""
        # NaN stops the step, and SQLite would store it as NULL
        stored = [(key, logp) for key, logp in fresh.items() if math.isfinite(logp)]
        try:
            self.files[0].execute("BEGIN")  # one transaction: a commit waits for the disk
            self.files[0].executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", stored)
            self.files[0].execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def _check_none_missing(self, batch: Batch, queries: list[int]) -> None:
        """Raise on every rank, so that none waits for one that stopped.

        Args:
            batch: of this rank.
            queries: those of its queries that lack a likelihood, once for each candidate.

        Raises:
            MissingLikelihoodsError: some rank lacks one.
        """
        message = None
        if queries:
            rows = sorted({int(batch.row_ids[query]) for query in queries})
            message = f"{len(queries)} passages (training rows {rows[:8]})"
        if found := gather_messages(message, batch.row_ids.device):
            raise MissingLikelihoodsError(
                f"loss.cache_reference={str(self.folder)!r} lacks the likelihoods of {' and '.join(found.values())}; "
                "it was filled with other data, another seed or fewer epochs"
            )

    def _lookup(self, keys: list[bytes]) -> dict[bytes, float]:
        known: dict[bytes, float] = {}
        for file in self.files:
            most = file.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)  # 999 before SQLite 3.32
            for start in range(0, len(keys), most):
                part = keys[start : start + most]
                query = f"SELECT key, logp FROM logps WHERE key IN ({','.join('?' * len(part))}) AND logp IS NOT NULL"
                try:
                    known |= dict(file.execute(query, part).fetchall())
                except sqlite3.DatabaseError as error:
                    raise self._unusable(error) from error
        return known


def _roll_back(path: Path) -> None:
    """Undo what a killed process left half written: a connection that only reads cannot, and would fail.

    Where nothing may be written, reading says so.
    """
    if path.with_name(f"{path.name}-journal").exists():
        with (
            suppress(sqlite3.DatabaseError),
            closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=60)) as file,
        ):
            file.execute("SELECT 1 FROM logps LIMIT 1")  # SQLite does it before it reads


def _templates(prompts: Prompts, likelihoods: Sequence[LikelihoodKind]) -> dict[str, str]:
    """The parts of the prompt contract that the likelihoods depend on."""
    used = {"query_generation" if kind == "query_given_passage" else "generation" for kind in likelihoods}
    found: dict[str, str] = {name: getattr(prompts, name) for name in sorted(used)}
    if any("{instruction}" in template for template in found.values()) or "generation" in found:
        found["instruction"] = prompts.instruction
    return found


def _keys(batch: Batch, kind: LikelihoodKind) -> np.ndarray:
    """(B * C, 2) hashes of every candidate's prompt and target ids; a collator has computed them in its worker."""
    rows = batch.generation_rows(kind)
    if rows.keys is not None:
        return rows.keys.numpy()
    prompts, targets = (
        [row[real].tolist() for row, real in zip(part.input_ids.cpu(), part.attention_mask.bool().cpu(), strict=True)]
        for part in (rows.prompts, rows.targets)
    )
    return likelihood_keys(prompts, targets, batch.passage_keys.numel())
