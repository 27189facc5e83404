"""Encode a corpus into shards on disk, index it, and search it."""
