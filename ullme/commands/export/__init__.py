"""A trained model as a folder that needs no code of this project.

The order of the house: :mod:`~ullme.commands.export.contract` says in the terms of sentence-transformers how texts are put,
:mod:`~ullme.commands.export.weights` merges what was trained, :mod:`~ullme.commands.export.folder` writes, :mod:`~ullme.commands.export.check`
loads what was written as anybody would and compares, :mod:`~ullme.commands.export.job` does one after the other.
"""

from __future__ import annotations

from ullme.commands.export.job import Exported, export_adapter, export_model

__all__ = ["Exported", "export_adapter", "export_model"]
