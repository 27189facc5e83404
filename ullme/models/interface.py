"""The type of an embedding model for the modules that :class:`~ullme.models.ULLME` itself imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ullme.models.config import BackboneConfig
from ullme.models.loading import Identity
from ullme.prompts import Prompts, PromptTokenizer
from ullme.token_rows import TokenRows


class Embedder(Protocol):
    """What those modules use of :class:`~ullme.models.ULLME`, where the attributes are described."""

    options: BackboneConfig
    prompts: Prompts
    fingerprint: str
    identity: Identity
    llm: nn.Module
    tokenizer: Any
    training: bool
    matryoshka_dims: tuple[int, ...]
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
