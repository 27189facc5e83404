r"""A model family of your own: a Llama whose layers each have a gain, a learned number.

python train.py fit --config configs/base.yaml --model.backbone.family_code my_backbone \
  --model.backbone.model_name_or_path FOLDER

FOLDER is what ``GainForCausalLM(GainConfig(...)).save_pretrained(FOLDER)`` wrote, with a tokenizer beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class GainConfig(LlamaConfig):
    """A family needs a model_type of its own."""

    model_type = "gain_llama"


class GainLayer(LlamaDecoderLayer):
    """A Llama layer whose contribution to the residual stream is multiplied by a gain."""

    def __init__(self, config: GainConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D). What it is not asked about it hands on: masks, positions, is_causal."""
        return hidden_states + self.gain * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class GainForCausalLM(LlamaForCausalLM):
    """A causal LM; attention goes through transformers' own functions, so it can be packed and run both ways."""

    config_class = GainConfig

    def __init__(self, config: GainConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(GainLayer(config, n) for n in range(config.num_hidden_layers))
        self.post_init()


AutoConfig.register(GainConfig.model_type, GainConfig, exist_ok=True)
AutoModelForCausalLM.register(GainConfig, GainForCausalLM, exist_ok=True)
