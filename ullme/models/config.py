"""What describes an embedder before anything is loaded: :class:`BackboneConfig`, and its refusals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ullme.models.pooling import POOLING_METHODS, own_pooling

Attention = Literal["bidirectional", "causal"]
AttentionPath = Literal["auto", "packed", "padded", "flags", "mask4d"]
Quantization = Literal["none", "nf4", "int8"]
POOLINGS = (*POOLING_METHODS, "latent_attention")
Trained = Literal["lora", "biases", "all"]
InitMode = Literal["merge", "continue"]
INIT_MODES: tuple[str, ...] = get_args(InitMode)
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class BackboneConfig:
    """How to build the embedder from an LLM. The defaults are the paper's (arXiv 2408.03402).

    Args:
        model_name_or_path: a hub name or a local folder of a decoder-only LLM.
        model_backbone_type: transformers' model_type (mistral, llama, phi ...); checked if given.
        lora_name: name of the adapter; null for none.
        train: lora, an adapter; biases alone (BitFit, arXiv 2106.10199); or all weights. null is lora where there is
            a lora_name, and all where it is null.
        lora_r: rank of LoRA.
        lora_alpha: scale of LoRA, over the rank.
        lora_dropout: dropout in front of LoRA.
        lora_target_modules: module names, or "all-linear".
        pooling: mean, weighted_mean, first or last; or latent_attention, a trained layer in front of the mean
            (NV-Embed, arXiv 2405.17428); or the dotted path of your own function, such as my_file.max_pool.
        attention: attention while embedding.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16, float64. Adapters stay in float32.
        attn_implementation: transformers' choice (sdpa, eager, flash_attention_2 ...); null lets it choose.
        trust_remote_code: run code that comes with the model.
        family_code: a module of yours to import first, which registers a family with transformers' Auto classes.
        gradient_checkpointing: recompute the layers in backward instead of keeping their activations; auto does so
            only where training would not fit otherwise.
        compile: run the decoder layers through torch.compile; the first steps then take a minute or more.
        attention_path: how bidirectional attention reaches the layers; auto takes the first that passes the probe.
        probe: check at load time that attention is what it should be; false trusts attention_path.
        attention_dropout: on attention weights while training; null keeps the LLM's own.
        init_from: a run, checkpoint or adapter folder to start from; null starts from the LLM.
        init_mode: merge what that run trained into the LLM, and train anew on top; or continue to train the same
            weights.
        latents: learned vectors of latent_attention pooling.
        latent_heads: heads of it.
        quantization: nf4 or int8 keeps the frozen LLM in 4 or 8 bits (a GPU and the extra ``quantization``), or none.

    Raises:
        ValueError: an option is out of its range.
    """

    model_name_or_path: str
    model_backbone_type: str | None = None
    lora_name: str | None = "ullme"
    train: Trained | None = None
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.2
    lora_target_modules: str | list[str] = "all-linear"
    pooling: str = "mean"
    attention: Attention = "bidirectional"
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    family_code: str | None = None
    gradient_checkpointing: bool | Literal["auto"] = False
    compile: bool = False
    attention_path: AttentionPath = "auto"
    probe: bool = True
    quantization: Quantization = "none"
    attention_dropout: float | None = None
    init_from: str | None = None
    init_mode: InitMode = "merge"
    latents: int = 512
    latent_heads: int = 8

    def __post_init__(self) -> None:
        def need(ok: bool, option: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"{option}={getattr(self, option)!r}: {remedy}")

        need(bool(self.model_name_or_path), "model_name_or_path", "name a hub model or a local folder")
        ways = f"choose one of {', '.join(POOLINGS)}, or give module.name of a function of your own"
        need(self.pooling in POOLINGS or "." in self.pooling, "pooling", ways)
        if "." in self.pooling:
            own_pooling(self.pooling)
        need(self.attention in ("bidirectional", "causal"), "attention", "choose bidirectional or causal")
        need(self.dtype in DTYPES, "dtype", f"choose one of {', '.join(DTYPES)}")
        need(self.quantization in ("none", "nf4", "int8"), "quantization", "choose none, nf4 or int8")
        need(
            self.attention_path in ("auto", "packed", "padded", "flags", "mask4d"),
            "attention_path",
            "choose auto, packed, padded, flags or mask4d",
        )
        need(self.train in (None, "lora", "biases", "all"), "train", "choose lora, biases or all")
        need(
            self.train is None or (self.train == "lora") == (self.lora_name is not None),
            "train",
            f"with lora_name={self.lora_name!r}; lora needs a lora_name, biases and all need lora_name: null",
        )
        need(self.init_mode in INIT_MODES, "init_mode", f"choose {' or '.join(INIT_MODES)}")
        need(self.latents >= 1, "latents", "at least 1")
        need(self.latent_heads >= 1, "latent_heads", "at least 1")
        if self.attention_dropout is not None:
            need(0 <= self.attention_dropout < 1, "attention_dropout", "a share from 0 to below 1")
        if self.lora_name is not None:
            need(
                bool(self.lora_name) and "." not in self.lora_name,
                "lora_name",
                "a name without dots, or null to train all weights",
            )
            need(self.lora_r >= 1, "lora_r", "a positive rank; lora_name: null trains all weights")
            need(self.lora_alpha > 0, "lora_alpha", "a positive number; usually twice lora_r")
            need(0 <= self.lora_dropout < 1, "lora_dropout", "a share from 0 to below 1")

    @property
    def trained(self) -> Trained:
        """What is trained, said or not."""
        return self.train or ("all" if self.lora_name is None else "lora")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
