"""A frozen LLM in few bits through bitsandbytes, an adapter trained on top.

nf4 is QLoRA's 4-bit NormalFloat (arXiv 2305.14314); int8 is LLM.int8() (arXiv 2208.07339), whose outlying features
stay in half precision.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullme.models.config import BackboneConfig


def check_quantization(options: BackboneConfig) -> None:
    """Before any weight is read.

    Raises:
        ValueError: no GPU, no bitsandbytes, or no adapter that could be trained.
    """
    if options.quantization == "none":
        return
    import torch

    def refuse(reason: str) -> ValueError:
        return ValueError(f"quantization={options.quantization!r}: {reason}, or set quantization=none")

    if options.lora_name is None:
        raise refuse("quantised weights cannot be trained themselves; set lora_name to train an adapter")
    if not torch.cuda.is_available():
        raise refuse("bitsandbytes needs a CUDA device, and there is none here; run it on a GPU")
    if find_spec("bitsandbytes") is None:
        raise refuse("bitsandbytes is not installed; pip install 'ullme[quantization]'")


def loading_options(options: BackboneConfig) -> dict[str, Any]:
    """What from_pretrained is to be told; straight onto this GPU. NF4: double quantisation, computation in bfloat16.

    Norms, embeddings and the LM head keep their type. PEFT's ``prepare_model_for_kbit_training`` would make them
    float32 (large, for a vocabulary of 128k) and switch on the reentrant checkpointing; the adapter needs neither.
    """
    if options.quantization == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if options.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
