"""A trained model as a folder that needs no code of this project.

The order of the house: :mod:`~ullme.export.contract` says in the terms of sentence-transformers how texts are put,
:mod:`~ullme.export.weights` merges what was trained, :mod:`~ullme.export.folder` writes, :mod:`~ullme.export.check`
loads what was written as anybody would and compares, :mod:`~ullme.export.job` does one after the other.
"""

from __future__ import annotations

from ullme.export.job import Exported, export_adapter, export_model

__all__ = ["Exported", "export_adapter", "export_model"]
