"""ULLME: one decoder LLM that embeds with bidirectional attention and generates with causal attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.batch import TokenRows
from ullme.models import attention, encoding, likelihood, loading, stages
from ullme.models.config import BackboneConfig
from ullme.models.encoding import EmbedBlocks
from ullme.models.latent_attention import make_pooler
from ullme.models.loading import set_attention_dropout
from ullme.models.pooling import only_pooled, pool
from ullme.prompts import Prompts, PromptTokenizer, Role

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


class ULLME(nn.Module):
    """A decoder LLM as a text embedder that can still generate (arXiv 2408.03402, sections 3.1 and 3.2).

    Example::

        model = ULLME(model_name_or_path="mistralai/Mistral-7B-v0.1", lora_name="ullme-mistral", lora_r=16)
        inputs = model.tokenizer(["This a example sentence."], return_tensors="pt")
        rep = model(**inputs, is_generate=False)["rep"]  # (1, D)

    Args:
        model_name_or_path: a hub name or a local folder of a decoder-only LLM.
        model_backbone_type: transformers' model_type; checked against the config if given.
        lora_name: name of the adapter; None trains all weights.
        prompts: the prompt contract; None takes the default one.
        **options: every other field of :class:`~ullme.models.config.BackboneConfig`.

    Attributes:
        tokenizer: with a pad token.
        prompts: the prompt contract.
        llm: the (PEFT-wrapped) causal LM.
        pooler: the trained layer of latent_attention pooling, else None.
        fingerprint: tells this pre-trained LLM, in this dtype, from another.
        attention_path: how embedding runs (packed, padded, flags or mask4d), as the probe chose it.

    Raises:
        ValueError: an option out of range, a backbone that cannot be loaded or whose attention does not obey.
    """

    # How blocks of tokens become embeddings; evaluation over several processes puts its own way here.
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
        config = loading.load_config(self.options)
        self.tokenizer = loading.load_tokenizer(self.options)
        if self.options.init_from is not None and self.options.init_mode == "merge":
            model, earlier_pooler = stages.merged_backbone(self.options)
        else:
            model, earlier_pooler = loading.load_backbone(self.options, config), None
        if self.options.attention_dropout is not None:
            set_attention_dropout(model, self.options.attention_dropout)
        loading.check_vocabulary(self.tokenizer, model, model_name_or_path)
        self.attention_path = self._attention_path(model)
        self._probed_on = model.device.type
        self._head_checked = self._compiled = False
        self.fingerprint = loading.fingerprint(model)
        self.llm = loading.add_adapter(model, self.options)
        self.pooler = make_pooler(self.options, self.hidden_size, earlier_pooler)
        if self.options.init_from is not None and self.options.init_mode == "continue":
            stages.continue_training(self)
        if self.options.gradient_checkpointing is True:
            self.recompute_layers()
        self.eval()  # as from_pretrained: whoever trains says so, and a loaded model embeds without dropout

    def recompute_layers(self) -> None:
        """Gradient checkpointing, from here on."""
        model = self.causal_lm
        # Reentrant checkpointing would need inputs that require gradients; frozen embeddings give none.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # transformers 5.2x renamed it

    def _compile_layers(self) -> None:
        """After the probe, which looks into every layer. A layer is compiled once for all numbers of tokens.

        It is compiled anew with and without gradient, dropout, adapters and causal attention, and no more often.
        Random numbers are drawn as without compilation: GradCache draws them twice, in two differently compiled ways.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 24)
        for layer in attention.decoder_layers(self.causal_lm.base_model):
            layer.compile(dynamic=True, options={"fallback_random": True})
        self._compiled = True

    def _attention_path(self, model: PreTrainedModel) -> str:
        wanted, causal = self.options.attention_path, self.options.attention == "causal"
        if self.options.probe:
            return attention.choose_path(model, causal, wanted)
        path = "packed" if wanted == "auto" else wanted
        if path == "packed":
            attention.packing.install(model)
        return path

    def _probe_device(self, device: torch.device) -> None:
        """Kernels differ between devices, so the first forward on another one than the probe's asks again."""
        if device.type == self._probed_on or not self.options.probe:
            return
        self._probed_on = device.type
        with self.adapters_off() if self.options.lora_name else nullcontext():
            self.attention_path = self._attention_path(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """transformers' own model, adapters inside."""
        return self.llm if self.options.lora_name is None else self.llm.get_base_model()  # type: ignore[return-value,operator]

    @property
    def hidden_size(self) -> int:
        """D, the width of an embedding."""
        config = self.causal_lm.config.get_text_config()
        return getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT may project at the end

    @property
    def max_positions(self) -> int:
        """The longest text the LLM was made for, in tokens."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None) or 2**31

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """Texts to token rows under this model's prompt contract."""
        return PromptTokenizer(self.tokenizer, self.prompts)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        is_generate: bool = False,
        targets: TokenRows | None = None,
        owner: Tensor | None = None,
        share_prompts: bool = True,
        pool_mask: Tensor | None = None,
        masked: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed, generate or score. The only way into the backbone: hooks of FSDP and of checkpointing sit here.

        Args:
            input_ids: (R, L) token ids.
            attention_mask: (R, L), padded on either side; None means no padding.
            is_generate: False embeds, True runs the causal language model.
            targets: with ``is_generate=True``: passages to score, each behind its prompt in ``input_ids``.
            owner: (number of targets,) row of the prompt of each target, not falling; None: one target for each.
            share_prompts: run a prompt once for all of its targets, where the backbone can be packed.
            pool_mask: (R, L), 1 on the real tokens that are pooled, which every row must have; None pools all.
            masked: (R, L) the tokens that stood where ``input_ids`` was masked, -100 elsewhere: asks for their
                likelihoods, read at the position before each, under the attention of embedding.
            **kwargs: with ``is_generate=True``, passed on to transformers' forward.

        Returns:
            ``{"rep": (R, D)}``, pooled in float32 and of unit length; with ``is_generate=True`` what transformers'
            own causal LM returns; with ``targets`` or ``masked`` a :class:`~ullme.models.likelihood.Likelihood`.

        Raises:
            ValueError: a row without a real token, or arguments that embedding does not take.
        """
        self._probe_device(input_ids.device)
        if self.options.compile and not self._compiled:
            self._compile_layers()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if is_generate and targets is not None:
            self._check_head()
            owner = torch.arange(len(targets)) if owner is None else owner
            prompts = TokenRows(input_ids, attention_mask)
            packed = self.attention_path == "packed"
            return likelihood.likelihood(self.causal_lm, packed, prompts, targets, owner, share_prompts)
        if is_generate:
            return self.causal_lm(input_ids=input_ids, attention_mask=attention_mask, is_causal=True, **kwargs)
        if kwargs:
            raise ValueError(f"{sorted(kwargs)}: only is_generate=True takes more than input_ids and attention_mask")
        causal = self.options.attention == "causal"
        hidden = attention.PATHS[self.attention_path](self.causal_lm.base_model, input_ids, attention_mask, causal)
        if masked is not None:
            self._check_head()
            return likelihood.masked_likelihood(self.causal_lm, hidden.flat, attention_mask, masked)
        if pool_mask is None:
            states, lengths = hidden.flat, hidden.lengths
        else:
            states, lengths = only_pooled(hidden.flat, attention_mask, pool_mask)
        if self.options.pooling == "latent_attention":
            assert self.pooler is not None
            pooled = pool(self.pooler(states), lengths, "mean")
        else:
            pooled = pool(states, lengths, self.options.pooling)
        return {"rep": nn.functional.normalize(pooled, dim=-1)}

    def _check_head(self) -> None:
        if not self._head_checked and self.options.probe:
            with self.adapters_off() if self.options.lora_name else nullcontext():
                likelihood.check_head(self.causal_lm)
            self._head_checked = True

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The pre-trained LLM, with the same weights and no second copy.

        Raises:
            ValueError: there is no adapter to switch off.
        """
        if self.options.lora_name is None:
            raise ValueError("lora_name=null: without an adapter the pre-trained LLM is gone once training starts")
        with self.llm.disable_adapter():  # type: ignore[operator]
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` with causal attention, adapters on."""
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
    ) -> np.ndarray | Tensor:
        """Embed texts in the order given, each as if it were alone.

        Args:
            texts: R texts; an empty text is embedded as the end token.
            role: ``query`` or ``passage`` puts the text into that template; None leaves it bare.
            instruction: the task, one for all texts or one for each; None takes the contract's own.
            batch_size: texts of average length at once (batches hold equally many tokens, not texts); None takes what
                suits the device.
            max_length: in tokens, template included; never more than the LLM's positions.
            show_progress_bar: count texts on stderr.
            convert_to_tensor: a tensor on the CPU instead of an array.

        Returns:
            (R, D) in float32, of unit length.
        """
        return encoding.encode(
            self, texts, role, instruction, batch_size, max_length, show_progress_bar, convert_to_tensor
        )
