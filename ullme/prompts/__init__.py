"""The prompt contract: the one place that says how a text becomes token ids.

Training, evaluation and export all go through :class:`PromptTokenizer`, and the contract is stored with every
checkpoint, so that a model never meets another format at inference than it saw in training.
"""

from ullme.prompts.contract import Pooled, Prompts, Role
from ullme.prompts.tokenizer import PromptTokenizer, begin_and_end, pad_rows

__all__ = ["Pooled", "PromptTokenizer", "Prompts", "Role", "begin_and_end", "pad_rows"]
