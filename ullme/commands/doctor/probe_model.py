"""The model on which the doctor checks results: the configuration's LLM where it is small, else a tiny random one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.batch import Batch, GenerationRows
from ullme.commands.doctor.settings import Settings
from ullme.engine.objective import Objective
from ullme.losses.scored_pairs import ScoredPairs
from ullme.models.config import BackboneConfig
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ullme.models.ullme import ULLME

# A larger LLM takes too long on a CPU.
_MAX_WEIGHTS = 100_000_000
# Sizes of the batch: B queries, C candidates each.
_QUERIES, _CANDIDATES = 4, 3


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' warnings about tiny random models, and without their progress bars."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class ProbeModel:
    """A small embedder with a loss and a batch.

    Args:
        options: of the embedder, in float32 and without dropout, so that results can be compared.
        objective: the loss.
        batch: random token rows.
        description: of the model, in words.
    """

    options: BackboneConfig
    objective: Objective
    batch: Batch
    description: str

    def build(self) -> ULLME:
        """The embedder in evaluation mode, the same at every call. Its adapter is away from zero, where it would have
        no effect on the results that are compared."""
        from ullme.models.ullme import ULLME

        with torch.random.fork_rng(), quietly():
            torch.manual_seed(0)  # LoRA starts at random, and two processes must start the same
            model = ULLME(**self.options.to_dict()).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.objective.check(model, self.batch.num_candidates - 1)
        return model


def _columns(objective: Objective, keys: Tensor) -> dict[str, Tensor]:
    """Random numbers for the columns that terms read: of pairs one a query, else one a candidate."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for term in objective.terms:
        shape = keys.shape[: 1 if isinstance(term, ScoredPairs) else 2]
        found |= {name: torch.rand(shape, generator=generator) for name in term.columns}
    return found


def select_model(settings: Settings | None, folder: Path) -> ProbeModel:
    """Choose the model, and save a tiny one where the configuration's LLM is large or not on this machine.

    Args:
        settings: None takes a tiny Llama with GRL.
        folder: an empty one, for the tiny model.

    Raises:
        ValueError: the configuration's LLM cannot be loaded, or there is no tiny model of its family.
    """
    from ullme.engine.presets import grl_terms
    from ullme.engine.reference import make_reference

    if settings is None:
        options, objective, family, candidates = (
            BackboneConfig(str(folder)),
            Objective(grl_terms()),
            "llama",
            _CANDIDATES,
        )
    else:
        options, objective, family = settings.options, settings.job.objective, settings.job.config.model_type
        candidates = 1 + min(settings.config.data.num_hard_negatives, _CANDIDATES - 1)
        if settings.config.loss.init_args.get("reference") == "frozen_copy":
            objective.reference = make_reference("frozen_copy", None)
    options = replace(
        options,
        dtype="float32",
        quantization="none",
        attn_implementation=None,
        compile=False,
        lora_dropout=0.0,
        attention_dropout=0.0,
        gradient_checkpointing=False,
        probe=True,
    )
    if settings is not None and settings.is_local and settings.plan.weights <= _MAX_WEIGHTS:
        vocabulary = settings.job.config.get_text_config().vocab_size
        batch = _batch(vocabulary, candidates, objective)
        return ProbeModel(
            options, objective, batch, f"the configuration's own {options.model_name_or_path}, in float32"
        )
    vocabulary = _save_tiny(family, folder)
    options = replace(options, model_name_or_path=str(folder), model_backbone_type=None, init_from=None)
    why = "" if settings is None else f", in place of {settings.options.model_name_or_path}"
    return ProbeModel(options, objective, _batch(vocabulary, candidates, objective), f"a tiny random {family}{why}")


def _save_tiny(family: str, folder: Path) -> int:
    """Save a tiny model with a tokenizer; returns the number of its tokens."""
    from ullme.utils.tiny_models import make_tiny

    with torch.random.fork_rng():
        make_tiny(family).save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, with the special tokens' ids of :mod:`ullme.utils.tiny_models`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "_", *map(chr, range(ord("a"), ord("z") + 1))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _batch(vocabulary: int, candidates: int, objective: Objective) -> Batch:
    """Random rows of different lengths, no two alike."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, shortest: int, longest: int) -> TokenRows:
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
        lengths[0], lengths[-1] = longest, shortest  # there is padding
        ids = torch.randint(5, vocabulary, (count, longest), generator=generator)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return TokenRows(ids * mask, mask)

    queries, passages = rows(_QUERIES, 4, 9), rows(_QUERIES * candidates, 3, 14)
    keys: Tensor = torch.arange(_QUERIES * candidates).view(_QUERIES, candidates)
    given_query, given_passage = GenerationRows(queries, passages), GenerationRows(passages, queries)
    return Batch(
        queries,
        passages,
        keys,
        torch.arange(_QUERIES),
        given_query,
        query_generation=given_passage,
        passage_generation=given_query,
        columns=_columns(objective, keys),
    )
