"""log π_ref: the likelihoods under the pre-trained LLM that preference losses compare with."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.distributed import any_rank, world

if TYPE_CHECKING:
    from ullme.batch import Batch
    from ullme.models.ullme import ULLME


class Reference(ABC):
    """Where log π_ref(p|q) comes from."""

    @abstractmethod
    def prepare(self, model: ULLME, precision: str) -> None:
        """Before training. Raises: ValueError: this reference cannot be had for this model."""

    @abstractmethod
    def logps(self, model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> Tensor:
        """(b, C) log-likelihoods in nats where ``mask`` (b, C) is True, zero elsewhere; without gradient."""


class AdaptersOff(Reference):
    """The same weights with the adapters switched off: no second copy."""

    def prepare(self, model: ULLME, precision: str) -> None:
        if model.options.lora_name is None:
            raise ValueError(
                "loss.reference=adapters_off, but lora_name=null trains the LLM itself, so the reference would move "
                "with it; set loss.reference to frozen_copy (a second LLM in memory) or to cached"
            )

    @torch.no_grad()
    def logps(self, model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> Tensor:
        with model.adapters_off():
            return _score_in_eval_mode(model, batch, mask, share_prompts)


class FrozenCopy(Reference):
    """A second copy of the pre-trained LLM, for full fine-tuning."""

    def __init__(self) -> None:
        self.copy: ULLME | None = None

    def prepare(self, model: ULLME, precision: str) -> None:
        from ullme.engine.fsdp import split_alike
        from ullme.models.ullme import ULLME

        if self.copy is None:  # from the folder, not from the model: a resumed one is not the pre-trained any more
            options = {**model.options.to_dict(), "lora_name": None, "train": None, "gradient_checkpointing": False}
            if model.options.init_mode == "continue":
                options["init_from"] = None
            copy = ULLME(**options, prompts=model.prompts).requires_grad_(False).eval().to(model.device)
            self.copy = split_alike(model, copy)

    @torch.no_grad()
    def logps(self, model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> Tensor:
        from ullme.engine.objective import score

        assert self.copy is not None
        return score(self.copy, batch, mask, share_prompts)[0]


class Cached(Reference):
    """Likelihoods kept on disk, so that later epochs, seeds and methods on the same data do not compute them again.

    Every rank writes a file of its own and reads all; a passage is found by its and its prompt's token ids.

    Args:
        folder: where they are kept.
        source: what computes those that are missing, or None to allow none missing.
    """

    def __init__(self, folder: str | Path, source: Reference | None) -> None:
        self.folder, self.source = Path(folder), source
        self.files: list[sqlite3.Connection] = []
        self.hits = self.misses = 0

    def prepare(self, model: ULLME, precision: str) -> None:
        """Raises: ValueError: the folder belongs to another backbone, prompt or precision, or is damaged."""
        if self.source is not None:
            self.source.prepare(model, precision)
        identity = {
            "version": 1,
            "backbone": model.fingerprint,
            "generation": model.prompts.generation,
            "instruction": model.prompts.instruction,
            "precision": precision,
        }
        note = self.folder / "reference.json"
        if not note.is_file():
            if self.source is None:
                raise ValueError(
                    f"loss.cache_reference={str(self.folder)!r} holds no reference likelihoods; fill it first with a "
                    "run that has loss.reference adapters_off or frozen_copy and the same data and prompts"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = note.with_suffix(f".{os.getpid()}")  # another rank never reads half a file
            draft.write_text(json.dumps(identity, indent=2))
            os.replace(draft, note)
        self._compare(note, identity)
        self._open()

    def _compare(self, note: Path, identity: dict[str, Any]) -> None:
        try:
            found = json.loads(note.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"loss.cache_reference: {note} cannot be read ({error}); delete the folder") from error
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            raise ValueError(
                f"loss.cache_reference={str(self.folder)!r} was made with another {' and '.join(different)}; "
                "name another folder, or delete this one"
            )

    def _open(self) -> None:
        own = self.folder / f"reference-{world()[0]}.sqlite"
        try:
            self.files = [sqlite3.connect(own, timeout=60, isolation_level=None)]
            self.files[0].execute("PRAGMA synchronous=NORMAL")
            self.files[0].execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp REAL) WITHOUT ROWID")
            others = [path for path in sorted(self.folder.glob("reference-*.sqlite")) if path != own]
            self.files += [
                sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=60) for path in others
            ]
        except sqlite3.DatabaseError as error:
            raise ValueError(f"loss.cache_reference: {own} cannot be used ({error}); delete the folder") from error

    @torch.no_grad()
    def logps(self, model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> Tensor:
        from ullme.engine.objective import at_least_one

        keys = _keys(batch, mask)
        known = self._lookup(keys)
        places = mask.flatten().nonzero()[:, 0].tolist()
        missing = [place for place, key in zip(places, keys, strict=True) if key not in known]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing and self.source is None:
            rows = sorted({int(batch.row_ids[place // mask.shape[1]]) for place in missing})
            raise ValueError(
                f"loss.cache_reference={str(self.folder)!r} lacks the likelihoods of {len(missing)} passages "
                f"(training rows {rows[:8]}); it was filled with other data, another seed or fewer epochs"
            )
        if self.source is not None and any_rank(bool(missing), mask.device):
            todo = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
            todo[missing] = True
            wanted = at_least_one(todo.view(mask.shape))
            new = self.source.logps(model, batch, wanted, share_prompts).flatten().tolist()
            by_place = dict(zip(places, keys, strict=True))
            fresh = {by_place[place]: new[place] for place in missing}
            self.files[0].execute("BEGIN")  # one transaction: a commit waits for the disk
            self.files[0].executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", list(fresh.items()))
            self.files[0].execute("COMMIT")
            known |= fresh
        out = torch.zeros(mask.numel(), device=mask.device)
        out[places] = torch.tensor([known[key] for key in keys], device=mask.device)
        return out.view(mask.shape)

    def _lookup(self, keys: list[bytes]) -> dict[bytes, float]:
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            query = f"SELECT key, logp FROM logps WHERE key IN ({','.join('?' * len(part))})"
            for file in self.files:
                try:
                    known |= dict(file.execute(query, part).fetchall())
                except sqlite3.DatabaseError as error:
                    raise ValueError(
                        f"loss.cache_reference={str(self.folder)!r}: {error}; delete the folder"
                    ) from error
        return known


def _score_in_eval_mode(model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> Tensor:
    """The reference has no dropout, whatever mode the policy is in."""
    from ullme.engine.objective import score

    training = model.training
    model.eval()
    try:
        return score(model, batch, mask, share_prompts)[0]
    finally:
        model.train(training)


def _keys(batch: Batch, mask: Tensor) -> list[bytes]:
    """A hash of the token ids of prompt and passage, for every True in ``mask``."""
    assert batch.generation is not None
    prompts, targets = batch.generation.prompts, batch.generation.targets
    heads = [
        row[m].numpy().tobytes()
        for row, m in zip(prompts.input_ids.cpu(), prompts.attention_mask.bool().cpu(), strict=True)
    ]
    ids, real, c = targets.input_ids.cpu(), targets.attention_mask.bool().cpu(), mask.shape[1]
    keys = []
    for place in mask.flatten().nonzero()[:, 0].tolist():
        digest = hashlib.blake2b(heads[place // c], digest_size=16)
        digest.update(b"|" + ids[place][real[place]].numpy().tobytes())
        keys.append(digest.digest())
    return keys
