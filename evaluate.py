"""Evaluate an LLM, a trained checkpoint or a sentence-transformers model on MTEB tasks and local files."""

from __future__ import annotations

import sys

from ullme.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
