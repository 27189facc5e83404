"""ULLME: a decoder LLM that embeds texts with bidirectional attention and generates with causal attention."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ullme.models import attention, encoding, likelihood, loading, rank_zero, stages
from ullme.models.config import BackboneConfig
from ullme.models.dropout import check_attention_dropout, set_attention_dropout, turn_off_dropout
from ullme.models.encoding import EmbedBlocks
from ullme.models.fused import fuse
from ullme.models.latent_attention import make_pooler
from ullme.models.pooling import pool, select_pooled
from ullme.models.positions import check_generation, check_rows
from ullme.prompts import Prompts, PromptTokenizer, Role
from ullme.token_rows import HostMasks, TokenRows
from ullme.utils.precision import autocast_is_needless

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ullme.models.compression import Precision

logger = logging.getLogger(__name__)


class ULLME(nn.Module):
    """A decoder LLM as a text-embedding model that can still generate (arXiv 2408.03402, sections 3.1 and 3.2).

    Example::

        model = ULLME(model_name_or_path="mistralai/Mistral-7B-v0.1", lora_name="ullme-mistral", lora_r=16)
        inputs = model.tokenizer(["This a example sentence."], return_tensors="pt")
        rep = model(**inputs, is_generate=False)["rep"]  # (1, D)

    Args:
        model_name_or_path: a hub name or a local folder of a decoder-only LLM.
        model_backbone_type: transformers' model_type; checked against the config if given.
        lora_name: name of the adapter; None for no adapter.
        prompts: the prompt contract (templates for queries and passages); None takes the default.
        **options: every other field of :class:`~ullme.models.config.BackboneConfig`.

    Attributes:
        tokenizer: the LLM's, with a pad token.
        prompts: the prompt contract.
        llm: the (PEFT-wrapped) causal LM.
        pooler: the trained layer of latent_attention pooling; None for other poolings.
        matryoshka_dims: the numbers of leading dimensions that training made embeddings of, the largest first
            (:class:`~ullme.losses.Matryoshka`); empty for none.
        fingerprint: hash that identifies the pre-trained LLM in its dtype.
        identity: the parts of which it is made.
        is_on_rank_zero: the other ranks have no memory for the weights yet (:mod:`ullme.models.rank_zero`).
        attention_path: how the LLM is run to embed (packed, padded, flags or mask4d), as chosen by the probe.

    Raises:
        ValueError: an option out of range, an LLM that cannot be loaded, or one that has no such attention.
    """

    # Embeds padded blocks of token ids; evaluation on several processes replaces it.
    embed_blocks: EmbedBlocks = staticmethod(encoding.embed_blocks)

    def __init__(
        self,
        model_name_or_path: str,
        model_backbone_type: str | None = None,
        lora_name: str | None = "ullme",
        *,
        prompts: Prompts | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = BackboneConfig(model_name_or_path, model_backbone_type, lora_name, **options)
        self.prompts = prompts or Prompts()
        self.matryoshka_dims: tuple[int, ...] = ()
        config = loading.load_config(self.options)
        self.options = loading.choose_dtype(self.options, config)
        self.tokenizer = loading.load_tokenizer(self.options)
        self.is_on_rank_zero = rank_zero.split_device() is not None
        model, earlier_pooler = rank_zero.load(lambda: self._load(config), config, self.options)
        if not self.options.llm_dropout:
            turn_off_dropout(model)
        fuse(model)
        if self.options.attention_dropout is not None:
            set_attention_dropout(model, self.options.attention_dropout)
            if self.options.attention_dropout and not self.options.probe:
                logger.warning(
                    "attention_dropout=%s is not tried with probe=false; a family that applies no dropout to attention "
                    "weights (Falcon, DiffLlama) trains without it",
                    self.options.attention_dropout,
                )
        loading.check_vocabulary(self.tokenizer, model, model_name_or_path)
        self.attention_path, self._probed_device_type = self._first_attention_path(model)
        self._head_checked = self._compiled = False
        self._autocast_is_needless: tuple[tuple[torch.dtype, torch.dtype], bool] | None = None
        self.identity = rank_zero.of_rank_zero(lambda: loading.identity(model))
        self.fingerprint = self.identity.fingerprint
        self.llm = loading.add_adapter(model, self.options)
        self.pooler = make_pooler(self.options, self.hidden_size, earlier_pooler)
        if self.options.init_from is not None and self.options.init_mode == "continue":
            rank_zero.of_rank_zero(lambda: stages.continue_training(self))
        if self.options.gradient_checkpointing is True:
            self.recompute_layers()
        self.eval()  # like from_pretrained, so that a loaded model embeds without dropout

    def _load(self, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.Module | None]:
        """The LLM, and the pooler of the earlier run that was merged into it, if it has one."""
        if self.options.init_from is not None and self.options.init_mode == "merge":
            return stages.merged_backbone(type(self), self.options)
        return loading.load_backbone(self.options, config), None

    def recompute_layers(self) -> None:
        """Turn on gradient checkpointing."""
        model = self.causal_lm
        # Reentrant checkpointing needs inputs that require gradients, which frozen embeddings do not give.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # transformers 5.2x renamed it

    def _compile_layers(self) -> None:
        """Compile every decoder layer with dynamic shapes; called after the probe, whose hooks record layer calls.

        A layer is recompiled for each combination of gradient, dropout, adapters and causal attention, but not for
        other numbers of tokens. ``fallback_random`` draws random numbers as without compilation: GradCache needs the
        same dropout in two forwards that are compiled differently.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 24)
        for layer in attention.decoder_layers(self.causal_lm.base_model):
            layer.compile(dynamic=True, options={"fallback_random": True})
        self._compiled = True

    def _first_attention_path(self, model: PreTrainedModel) -> tuple[str, str]:
        """The attention path, and the type of device on which it was probed.

        A model that will be split over GPUs is probed on them, in the first forward: rank 0's CPU would take minutes
        for a 7B LLM. On CPUs rank 0 probes for all.
        """
        device = rank_zero.split_device()
        if device is not None and device.type != "cpu":
            return self._unprobed_path(model), "none"
        path = rank_zero.of_rank_zero(lambda: self._choose_attention_path(model))
        if path == "packed":
            attention.packing.install(model)  # on ranks that did not probe
        return path, model.device.type if device is None else device.type

    def _choose_attention_path(self, model: PreTrainedModel) -> str:
        """The path that passes the probe, or without a probe the one in the options (auto: packed)."""
        if not self.options.probe:
            return self._unprobed_path(model)
        causal = self.options.attention == "causal"
        path = attention.choose_path(model, causal, self.options.attention_path)
        if self.options.attention_dropout is not None:
            run = partial(attention.run_on_probe_block, model, path, causal)
            check_attention_dropout(model, self.options.attention_dropout, run)
        return path

    def _unprobed_path(self, model: PreTrainedModel) -> str:
        path = "packed" if self.options.attention_path == "auto" else self.options.attention_path
        if path == "packed":
            attention.packing.install(model)
        return path

    def _probe_again_on_new_device(self, device: torch.device) -> None:
        """Repeat the probe at the first forward on another type of device, where other kernels run."""
        if device.type == self._probed_device_type or not self.options.probe:
            return
        self._probed_device_type = device.type
        with self.pretrained():
            self.attention_path = self._choose_attention_path(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers inside."""
        return self.llm if self.options.lora_name is None else self.llm.get_base_model()  # type: ignore[return-value,operator]

    @property
    def hidden_size(self) -> int:
        """D, the dimension of an embedding."""
        config = self.causal_lm.config.get_text_config()
        # OPT may project the last hidden states
        return getattr(config, "word_embed_proj_dim", None) or config.hidden_size

    @property
    def max_positions(self) -> int:
        """The longest text, in tokens, for which the LLM has positions."""
        return loading.max_positions(self.causal_lm.config)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """Turns texts into token rows with this model's tokenizer and prompt contract."""
        return PromptTokenizer(self.tokenizer, self.prompts)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        is_generate: bool = False,
        targets: TokenRows | None = None,
        owner: Tensor | np.ndarray | None = None,
        share_prompts: bool = True,
        pool_mask: Tensor | None = None,
        masked: Tensor | None = None,
        host: HostMasks | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed, generate or score. All use of the LLM goes through here, where FSDP's hooks run.

        Args:
            input_ids: (R, L) token ids.
            attention_mask: (R, L), padded on either side; None means no padding.
            is_generate: False embeds, True runs the causal language model.
            targets: with ``is_generate=True``: passages to score, each after its prompt in ``input_ids``.
            owner: (number of targets,) index of each target's prompt, not decreasing; None means one target per prompt.
                An array, or a tensor on the CPU, is not waited for.
            share_prompts: run a prompt once for all of its targets; only on the packed path.
            pool_mask: (R, L), 1 on the real tokens to pool, at least one in every row; None pools all.
            masked: (R, L) the original tokens where ``input_ids`` has a mask token, -100 elsewhere; returns their
                likelihoods, read at the position before each, with the attention used for embedding.
            host: the masks as they are on the host, so that it need not wait for the device to copy them from there.
            **kwargs: with ``is_generate=True``, passed on to transformers' forward.

        Returns:
            ``{"rep": (R, D)}``, pooled in float32 and normalised; with ``is_generate=True`` the output of transformers'
            causal LM; with ``targets`` or ``masked`` a :class:`~ullme.models.likelihood.Likelihood`.

        Raises:
            ValueError: a row without a real token or with more tokens than the LLM has positions, or arguments that
                would not be read.
        """
        _check_all_read(is_generate, targets, owner=owner, pool_mask=pool_mask, masked=masked, **kwargs)
        self._probe_again_on_new_device(input_ids.device)
        if self.options.compile and not self._compiled:
            self._compile_layers()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = TokenRows(input_ids, attention_mask, pool_mask, host)
        if is_generate and targets is not None:
            self._check_lm_head()
            owners = np.arange(len(targets)) if owner is None else np.asarray(torch.as_tensor(owner).cpu())
            check_rows(rows, targets, owners, self.max_positions, self.options.model_name_or_path)
            packed = self.attention_path == "packed"
            with self._precision_of_weights():
                return likelihood.likelihood(self.causal_lm, packed, rows, targets, owners, share_prompts)
        check_rows(rows, None, None, self.max_positions, self.options.model_name_or_path)
        if is_generate:
            with self._precision_of_weights():
                return self.causal_lm(input_ids=input_ids, attention_mask=attention_mask, is_causal=True, **kwargs)
        causal, masks = self.options.attention == "causal", rows.host_masks
        with self._precision_of_weights():
            hidden = attention.PATHS[self.attention_path](
                self.causal_lm.base_model, input_ids, attention_mask, causal, masks
            )
            if masked is not None:
                self._check_lm_head()
                return likelihood.masked_likelihood(self.causal_lm, hidden.flat, attention_mask, masked)
        states, lengths = (hidden.flat, hidden.lengths) if pool_mask is None else select_pooled(hidden.flat, masks)
        if self.options.pooling == "latent_attention":
            assert self.pooler is not None
            pooled = pool(self.pooler(states), lengths, "mean")
        else:
            pooled = pool(states, lengths, self.options.pooling)
        return {"rep": nn.functional.normalize(pooled, dim=-1)}

    def _precision_of_weights(self) -> AbstractContextManager:
        """Context without autocast, if all weights of the LLM already have autocast's dtype.

        Autocast would only add casts there: of LoRA's float32 matrices, which LoRA's layers cast themselves, and of
        norms and softmax to float32, which the kernels compute in float32 anyway. Pooling and losses stay outside.
        """
        device = self.device.type
        if not torch.is_autocast_enabled(device):
            return nullcontext()
        key = (torch.get_autocast_dtype(device), next(self.causal_lm.parameters()).dtype)
        if self._autocast_is_needless is None or self._autocast_is_needless[0] != key:
            self._autocast_is_needless = key, autocast_is_needless(self.causal_lm, key[0])
        return torch.autocast(device, enabled=False) if self._autocast_is_needless[1] else nullcontext()

    def _check_lm_head(self) -> None:
        """Check, once, that likelihoods are computed with the LM head as the model itself uses it."""
        if not self._head_checked and self.options.probe:
            with self.pretrained():
                likelihood.check_head(self.causal_lm)
            self._head_checked = True

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Context in which the model is the pre-trained LLM: the adapter is switched off, no weights are copied.

        Raises:
            ValueError: there is no adapter.
        """
        if self.options.lora_name is None:
            raise ValueError(
                "lora_name=null: without an adapter, training changes the pre-trained LLM itself; set a lora_name, or "
                "loss.reference=frozen_copy"
            )
        with self.llm.disable_adapter():  # type: ignore[operator]
            yield

    def pretrained(self) -> AbstractContextManager[None]:
        """Context in which the LLM has its pre-trained weights, if it has an adapter; without one, as it is."""
        return self.adapters_off() if self.options.lora_name else nullcontext()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, with causal attention and the adapter.

        Raises:
            ValueError: the prompt is no tensor, or with ``max_new_tokens`` has more tokens than the LLM has positions.
        """
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if prompt is not None and not isinstance(prompt, Tensor):
            raise ValueError(
                f"generate takes token ids, a tensor, not {type(prompt).__name__}; tokenise first: "
                'model.generate(**model.tokenizer(text, return_tensors="pt"))'
            )
        if prompt is not None:
            check_generation(prompt.shape[-1], kwargs, self.max_positions, self.options.model_name_or_path)
        return self.causal_lm.generate(*args, **kwargs)  # type: ignore[operator]

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: Role | None = None,
        instruction: str | Sequence[str | None] | None = None,
        batch_size: int | None = None,
        max_length: int = 512,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
    ) -> np.ndarray | Tensor:
        """Embed texts. The embedding of a text does not depend on the other texts.

        Args:
            texts: R texts; an empty one is embedded as the end token.
            role: ``query`` or ``passage`` applies that prompt template; None applies none.
            instruction: the task, one for all texts or one for each; None takes the prompt contract's.
            batch_size: texts of average length in a batch (batches have equally many tokens, not texts); None depends
                on the device.
            max_length: in tokens, template included; at most the LLM's number of positions.
            show_progress_bar: show a bar on stderr.
            convert_to_tensor: return a tensor on the CPU instead of an array.
            truncate_dim: keep so many of the first dimensions, of unit length again; None keeps all. With a warning if
                training did not make embeddings of so many (:class:`~ullme.losses.Matryoshka`).
            precision: as in sentence-transformers. int8 and uint8: 256 steps over the range that each dimension has in
                these texts, so embeddings of different calls do not compare. binary and ubinary: signs, eight in a
                byte.

        Returns:
            (R, D) normalised embeddings in float32, in the order of the texts; D is ``truncate_dim`` if given. int8 or
            uint8 for another precision, and (R, ⌈D/8⌉) for binary and ubinary.

        Raises:
            ValueError: a text or option that cannot be used, or an embedding that is not finite (float16 overflows).
        """
        return encoding.encode(
            self,
            texts,
            role,
            instruction,
            batch_size,
            max_length,
            show_progress_bar,
            convert_to_tensor,
            truncate_dim,
            precision,
        )


def _check_all_read(is_generate: bool, targets: TokenRows | None, **given: Any) -> None:
    """Raises: ValueError: arguments of :meth:`ULLME.forward` that it does not read with the others that are given."""
    if not is_generate:
        reads, needs = {"pool_mask", "masked"}, "is_generate=True"
        given = {"targets": targets, **given}
    elif targets is not None:
        reads, needs = {"owner"}, "a call without targets"
    else:
        reads, needs = given.keys() - {"owner", "pool_mask", "masked"}, "targets, or a call without is_generate"
    if unread := sorted(name for name, value in given.items() if value is not None and name not in reads):
        raise ValueError(f"{unread} would not be read: these arguments of forward need {needs}; leave them out")
