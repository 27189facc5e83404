"""The options of an embedding model, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ullme.models.pooling import POOLING_METHODS, custom_pooling

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
    """How to build an embedding model from an LLM. The defaults are the paper's (arXiv 2408.03402).

    Args:
        model_name_or_path: a hub name or a local folder of a decoder-only LLM.
        model_backbone_type: transformers' model_type (mistral, llama, phi ...); checked if given.
        lora_name: name of the adapter; null for none.
        train: lora (an adapter), biases (BitFit, arXiv 2106.10199) or all weights. null means lora with a lora_name
            and all without.
        lora_r: rank of LoRA.
        lora_alpha: numerator of LoRA's scale, lora_alpha / lora_r.
        lora_dropout: dropout on LoRA's input.
        lora_target_modules: module names, or "all-linear".
        pooling: mean, weighted_mean, first or last; latent_attention, a trained layer before the mean
            (NV-Embed, arXiv 2405.17428); or the dotted path of your own function, such as my_file.max_pool.
        attention: while embedding, bidirectional or causal; generation is always causal.
        dtype: of the LLM's weights: auto (as stored; float32 where a CPU multiplies that faster), float32, bfloat16,
            float16, float64. Adapters stay in float32.
        attn_implementation: transformers' choice (sdpa, eager, flash_attention_2 ...); null lets it choose.
        trust_remote_code: run code that comes with the model.
        family_code: a module of yours to import first, which registers a model family with transformers' Auto classes.
        gradient_checkpointing: recompute the layers in backward instead of keeping their activations; auto does so
            only if training would not fit into memory otherwise.
        compile: compile the decoder layers with torch.compile; the first steps then take a minute or more.
        attention_path: how the decoder is run with that attention; auto takes the first path that passes the probe.
        probe: check at load time that every layer has the attention asked for; false trusts attention_path.
        llm_dropout: keep the dropout that the LLM itself has in training (GPT-2, OPT and BLOOM: 0.1). false turns it
            off, for embedding and generation, so that the policy is as deterministic as its reference and DPO starts at
            ln 2; the adapter's lora_dropout is another matter.
        attention_dropout: dropout on attention weights in training; null: as llm_dropout says. Refused, by a trial
            while the model is loaded, where it applies none (Falcon). With ``probe: false`` there is a warning instead
            of the trial.
        init_from: a run, checkpoint or adapter folder to start from; null starts from the LLM.
        init_mode: merge that run's trained weights into the LLM and train new ones, or continue training the same
            weights.
        latents: number of learned vectors in latent_attention pooling.
        latent_heads: attention heads in latent_attention pooling.
        quantization: nf4 or int8 loads the frozen LLM in 4 or 8 bits (needs a GPU and ullme[quantization]); or none.

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
    llm_dropout: bool = False
    attention_dropout: float | None = None
    init_from: str | None = None
    init_mode: InitMode = "merge"
    latents: int = 512
    latent_heads: int = 8

    def __post_init__(self) -> None:
        def check(ok: bool, option: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"{option}={getattr(self, option)!r}: {remedy}")

        check(bool(self.model_name_or_path), "model_name_or_path", "name a hub model or a local folder")
        remedy = f"choose one of {', '.join(POOLINGS)}, or give module.name of a function of your own"
        check(self.pooling in POOLINGS or "." in self.pooling, "pooling", remedy)
        if "." in self.pooling:
            custom_pooling(self.pooling)
        check(self.attention in ("bidirectional", "causal"), "attention", "choose bidirectional or causal")
        check(self.dtype in DTYPES, "dtype", f"choose one of {', '.join(DTYPES)}")
        check(self.quantization in ("none", "nf4", "int8"), "quantization", "choose none, nf4 or int8")
        check(
            self.attention_path in ("auto", "packed", "padded", "flags", "mask4d"),
            "attention_path",
            "choose auto, packed, padded, flags or mask4d",
        )
        check(self.train in (None, "lora", "biases", "all"), "train", "choose lora, biases or all")
        check(
            self.train is None or (self.train == "lora") == (self.lora_name is not None),
            "train",
            f"with lora_name={self.lora_name!r}; lora needs a lora_name, biases and all need lora_name: null",
        )
        check(
            self.gradient_checkpointing in (True, False, "auto"), "gradient_checkpointing", "choose true, false or auto"
        )
        check(self.init_mode in INIT_MODES, "init_mode", f"choose {' or '.join(INIT_MODES)}")
        check(self.latents >= 1, "latents", "at least 1")
        check(self.latent_heads >= 1, "latent_heads", "at least 1")
        if self.attention_dropout is not None:
            check(0 <= self.attention_dropout < 1, "attention_dropout", "a probability from 0 to below 1")
        if self.lora_name is not None:
            check(
                bool(self.lora_name) and "." not in self.lora_name,
                "lora_name",
                "a name without dots, or null to train all weights",
            )
            check(self.lora_r >= 1, "lora_r", "a positive rank; lora_name: null trains all weights")
            check(self.lora_alpha > 0, "lora_alpha", "a positive number; usually twice lora_r")
            check(0 <= self.lora_dropout < 1, "lora_dropout", "a probability from 0 to below 1")

    @property
    def trained(self) -> Trained:
        """Which weights are trained: ``train``, or its default."""
        return self.train or ("all" if self.lora_name is None else "lora")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
