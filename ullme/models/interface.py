"""What the parts of an embedder (weights, encoding, stages) ask of it; :class:`~ullme.models.ULLME` provides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ullme.batch import TokenRows
from ullme.models.config import BackboneConfig
from ullme.prompts import Prompts, PromptTokenizer


class Embedder(Protocol):
    """A decoder LLM with its adapter, pooling and prompt contract. Attributes: see :class:`~ullme.models.ULLME`."""

    options: BackboneConfig
    prompts: Prompts
    fingerprint: str
    llm: nn.Module
    tokenizer: Any
    training: bool
    __call__: Callable[..., Any]
    embed_blocks: Callable[[Any, Iterable[TokenRows]], Iterator[Tensor]]

    @property
    def pooler(self) -> nn.Module | None: ...

    @property
    def causal_lm(self) -> PreTrainedModel: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def prompt_tokenizer(self) -> PromptTokenizer: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...
