"""ULLME: LLM embeddings with generation-augmented learning (arXiv 2408.03402).

Importing this package is cheap: torch, transformers and the rest are imported by the submodule that needs them.
"""

from ullme.utils import moved_modules

__version__ = "0.1.0"

moved_modules.install()
