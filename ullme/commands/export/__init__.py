"""Exporting a trained model to a folder that needs no code of this project.

``contract`` translates the prompt contract for sentence-transformers, ``weights`` merges what was trained, ``folder``
writes the files, ``check`` loads them again, and ``job`` runs these steps and compares.
"""

from __future__ import annotations

from ullme.commands.export.job import Exported, export_adapter, export_model

__all__ = ["Exported", "export_adapter", "export_model"]
