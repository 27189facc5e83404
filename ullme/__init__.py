"""ULLME: LLM embeddings with generation-augmented learning (arXiv 2408.03402).

Importing this package is cheap: torch, transformers and the rest are imported by the submodule that needs them.
"""

__version__ = "0.1.0"
