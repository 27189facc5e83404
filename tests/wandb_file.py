"""The records in W&B's offline file: LevelDB's log format behind a header of seven bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from children import wait_until

_BLOCK = 32768


def records(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    found, place, part = [], 7, b""
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:  # no header fits: the rest of a block is empty
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several; 2 and 3 are the first and middle ones
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def finished(file: Path) -> list[Any]:
    """The records once the last one is there: W&B's service writes them in its own time."""

    def is_whole() -> bool:
        return any(record.WhichOneof("record_type") == "exit" for record in records(file))

    wait_until(is_whole, f"the last record of {file}")
    return records(file)


class Run:
    """What a run logged: ``history`` key -> values in order, ``config``, ``summary``."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.rglob("*.wandb")
        self.folder = file.parent
        self.history: dict[str, list[Any]] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        for record in finished(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row: dict[str, Any] = {}
                self._update(row, record.history, "item")
                for key, value in row.items():
                    self.history.setdefault(key, []).append(value)
            elif kind == "summary":
                self._update(self.summary, record.summary)
            elif kind == "config":
                self._update(self.config, record.config)
            elif kind == "run":
                self.id, self.project = record.run.run_id, record.run.project
                self._update(self.config, record.run.config)

    @staticmethod
    def _update(into: dict[str, Any], message: Any, field: str = "update") -> None:
        for item in getattr(message, field):
            *outer, last = item.nested_key or [item.key]
            place = into
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = json.loads(item.value_json)
