"""A trained model as a folder that needs no code of this project.

``contract`` writes the prompt contract in the terms of sentence-transformers, ``weights`` merges what was trained,
``folder`` writes the files, ``check`` loads them with sentence-transformers and compares, ``job`` runs these in turn.
"""

from __future__ import annotations

from ullme.commands.export.job import Exported, export_adapter, export_model

__all__ = ["Exported", "export_adapter", "export_model"]
