"""Checks of ``ullme support`` with the default options that users get: train, save, load and export."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from ullme.prompts import Prompts
from ullme.utils.tiny_models import make_character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullme.models.ullme import ULLME

_TEXTS = ["the mill by the river", "A market", "x"]
# Largest difference of a component between embeddings that must be equal; families round differently alone and packed.
_SAME = 1e-4


def _embed(embedder: ULLME) -> torch.Tensor:
    return torch.as_tensor(embedder.encode(_TEXTS, role="query", convert_to_tensor=True))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _train(model: PreTrainedModel, folder: Path) -> tuple[ULLME, torch.Tensor]:
    """An embedder of the model after one step with the default options, and its embeddings before."""
    from ullme.models.ullme import ULLME

    model.save_pretrained(folder)
    make_character_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    embedder = ULLME(str(folder), prompts=Prompts(query="q: {text}"))
    before = _embed(embedder)
    trained = [p for p in embedder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    embedder.train()
    rows = embedder.prompt_tokenizer.rows(_TEXTS, "query", max_length=64)[0]
    block = embedder.prompt_tokenizer.pad(rows)
    rep = embedder(block.input_ids, block.attention_mask)["rep"]
    (rep * torch.linspace(-1, 1, rep.numel()).view_as(rep)).sum().backward()
    optimizer.step()
    return embedder.eval(), before


def trains_with_defaults(model: PreTrainedModel, path: str) -> bool:
    """A step changes the embedding, the adapter can be switched off, saved, loaded, and exported for PEFT.

    Raises:
        ValueError: one of these does not work; the message says which.
    """
    from ullme.commands.export.job import export_adapter
    from ullme.models.checkpoint import load_ullme, save_adapter

    with TemporaryDirectory() as place:
        embedder, before = _train(model, Path(place) / "llm")
        after = _embed(embedder)
        if not _distance(after, before) > 1e-3:
            raise ValueError("a training step does not change the embedding")
        with embedder.adapters_off():
            if not _distance(_embed(embedder), before) <= _SAME:
                raise ValueError("without the adapter the embedding is another than before training")
        loaded = load_ullme(save_adapter(embedder, Path(place) / "saved"))
        if not _distance(_embed(loaded), after) <= _SAME:
            raise ValueError("the loaded adapter gives another embedding")
        export_adapter(embedder, Path(place) / "exported", texts=_TEXTS)
        if not _distance(_embed(load_ullme(Path(place) / "exported")), after) <= _SAME:
            raise ValueError("the exported adapter gives another embedding")
    return True


def exports(model: PreTrainedModel, path: str) -> bool | None:
    """The merged model is the same for sentence-transformers.

    None if it is refused because transformers alone does not keep the family's attention, or if sentence-transformers
    is not installed.
    """
    from ullme.commands.export.job import export_model

    if find_spec("sentence_transformers") is None:
        return None
    with TemporaryDirectory() as place:
        embedder, _ = _train(model, Path(place) / "llm")
        try:
            export_model(embedder, Path(place) / "exported", texts=_TEXTS, max_length=64)
        except ValueError as error:
            if "does not embed the same when transformers loads it" in str(error):
                return None
            raise
    return True
