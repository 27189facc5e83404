"""Rows in, token batches out. The LightningDataModule is in :mod:`ullme.data.datamodule`; nothing else here imports
Lightning."""

from ullme.data.beir import BeirFolder, read_beir
from ullme.data.collator import Collator, EvalRows, TrainDataset, passage_key
from ullme.data.records import BadRow, Record, parse_record
from ullme.data.sampler import Draw, GlobalBatchSampler, draw
from ullme.data.short_rows import settle_short_rows
from ullme.data.sources import HubSource, JsonlSource, RowSource, open_source

__all__ = [
    "BadRow",
    "BeirFolder",
    "Collator",
    "Draw",
    "EvalRows",
    "GlobalBatchSampler",
    "HubSource",
    "JsonlSource",
    "Record",
    "RowSource",
    "TrainDataset",
    "draw",
    "open_source",
    "parse_record",
    "passage_key",
    "read_beir",
    "settle_short_rows",
]
