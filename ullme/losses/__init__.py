"""Losses: each a pure function and a small module, named by ``class_path`` in a config."""

from ullme.losses.base import RepresentationLoss
from ullme.losses.info_nce import InfoNCE, info_nce

__all__ = ["InfoNCE", "RepresentationLoss", "info_nce"]
