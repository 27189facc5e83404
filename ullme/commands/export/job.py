"""Exporting a model in memory to a folder, which is checked before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.commands.export import check, contract, folder, weights
from ullme.commands.export.texts import TEXTS, long_text
from ullme.losses.matryoshka import truncated
from ullme.models import loading
from ullme.models.checkpoint import save_adapter
from ullme.models.compression import check_truncate_dim, warn_untrained_dim

if TYPE_CHECKING:
    from ullme.commands.export.contract import Layout
    from ullme.models.ullme import ULLME

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Largest 1 - cosine between the embeddings of the weights before and after rounding to a half-precision dtype.
TOLERANCE = 1e-3
# Longest text, in tokens, with which truncation is compared.
_MAX_COMPARED = 8192


@dataclass(frozen=True)
class Exported:
    """The result of an export, and how much it differs from the model in memory.

    Args:
        folder: that was written.
        dtype: of the weights written.
        max_length: in tokens, prompt included.
        dimensions: of an embedding.
        truncate_dim: the dimensions to which sentence-transformers truncates embeddings; None does not truncate.
        layout: the settings of sentence-transformers; None for an adapter.
        merged: largest difference of a component between adapter and merged weights, in float32.
        rounded: largest 1 - cosine that the dtype costs.
        loaded: largest difference of a component between the rounded weights in memory and the folder as
            sentence-transformers loads it (for an adapter: of a logit, as PEFT loads it).
    """

    folder: Path
    dtype: str
    max_length: int
    dimensions: int
    layout: Layout | None
    merged: float
    rounded: float
    loaded: float
    truncate_dim: int | None = None


def check_limits(dtype: str, max_length: int, tolerance: float) -> None:
    """Raises: ValueError: an unknown dtype, or a limit that is not positive."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if max_length < 1 or not tolerance > 0:
        raise ValueError(f"--max_length {max_length}, --tolerance {tolerance:g}: both must be positive")


def export_model(
    model: ULLME,
    to: str | Path,
    *,
    dtype: str = "auto",
    max_length: int = 512,
    tolerance: float = TOLERANCE,
    truncate_dim: int | None = None,
    texts: Sequence[str] = TEXTS,
    extra: Callable[[Path, Exported], None] | None = None,
    show_progress_bar: bool = False,
) -> Exported:
    """Write a folder that sentence-transformers and ``AutoModel`` load without any code of this project.

    The model is changed: its adapter is merged into its weights, which are rounded to the dtype.

    Args:
        model: trained, or an LLM as it is.
        to: a new or empty folder.
        dtype: of the weights written: auto (the LLM's own), float32, bfloat16, float16.
        max_length: where sentence-transformers cuts a text, in tokens, prompt included.
        tolerance: the largest 1 - cosine by which the dtype may change an embedding.
        truncate_dim: keep so many of an embedding's first dimensions; None keeps all. sentence-transformers does not
            scale what it has truncated to unit length, unless it is asked to (``normalize_embeddings``).
        texts: real texts, on which everything is compared.
        extra: writes more files into the folder before it gets its name.
        show_progress_bar: count the steps on stderr.

    Returns:
        The folder and the measured differences.

    Raises:
        ValueError: a contract that sentence-transformers cannot express, a family that does not keep its attention
            without ullme, a dtype that changes too much, or a folder that cannot be written. No partial folder is left.
    """
    folder.check_target(Path(to))
    check.need_sentence_transformers()
    check_limits(dtype, max_length, tolerance)
    if model.options.quantization != "none":
        raise ValueError(
            f"quantization={model.options.quantization}: an adapter is not merged into quantised weights; load the "
            "model with --quantization none"
        )
    check_truncate_dim(truncate_dim, model.hidden_size)
    warn_untrained_dim(model, truncate_dim)
    own = next(model.causal_lm.parameters()).dtype
    target = own if dtype == "auto" else getattr(torch, dtype)
    max_length = min(max_length, model.max_positions)
    plan = contract.layout(model.prompts, model.options.pooling, model.tokenizer)
    tokenizer = contract.exported_tokenizer(model.tokenizer, plan, max_length)
    tried = [*texts, long_text(min(max_length, _MAX_COMPARED))]
    for role in contract.PROMPT_NAMES:
        model.prompt_tokenizer.check_length(role, max_length)
    contract.check_tokens(model.prompt_tokenizer, tokenizer, plan, tried, max_length)
    work = weights.working_dtype(model)
    with _Steps(6, show_progress_bar) as step, folder.atomic_folder(to) as unnamed:
        step("embed with the adapter")
        model.to(work).eval()
        before = weights.embeddings(model, texts, max_length)
        step("merge")
        weights.merge(model)
        merged = weights.embeddings(model, texts, max_length)
        same = weights.check_merged(before, merged)
        step("round")
        weights.round_to(model, target)
        final = weights.embeddings(model, texts, max_length)
        # rounding costs something in half precision, and in float32 for a float64 model
        cost = weights.check_rounded(merged, final, str(target).removeprefix("torch."), tolerance)
        step("write")
        decoder = weights.prepare_decoder(model).to(dtype=target)  # type: ignore[call-arg]
        folder.write_model(unnamed, decoder, tokenizer, plan, max_length, truncate_dim)
        step("load and compare")
        dimensions = truncate_dim or model.hidden_size
        loaded = _check_loaded(model, unnamed, texts, truncated(final, dimensions))
        name = str(target).removeprefix("torch.")
        done = Exported(Path(to), name, max_length, dimensions, plan, same, cost, loaded, truncate_dim)
        step("describe")
        if extra is not None:
            extra(unnamed, done)
    return done


def _check_loaded(model: ULLME, folder: Path, texts: Sequence[str], expected: Tensor) -> float:
    """The difference to the folder as sentence-transformers loads it.

    Args:
        model: that was exported.
        folder: that was written.
        texts: to compare on.
        expected: (2 R, D) their embeddings as queries, then as passages; truncated as the folder's are.

    Raises:
        ValueError: it cannot be loaded, or gives other embeddings.
    """
    try:
        found = check.plain_embeddings(folder, texts, weights.working_dtype(model), model.device)
    except Exception as error:  # loading may fail in many ways, by family
        raise ValueError(weights.unsupported(model, weights.short(error))) from error
    if found.shape[-1] != expected.shape[-1]:
        raise ValueError(
            f"--truncate_dim {expected.shape[-1]}: sentence-transformers {version('sentence-transformers')} gives "
            f"embeddings of {found.shape[-1]} dimensions; update it"
        )
    loaded = weights.difference(expected, found)
    if not loaded <= weights.SAME:
        raise ValueError(weights.unsupported(model, f"a component differs by {loaded:.1e}"))
    return loaded


def export_adapter(
    model: ULLME,
    to: str | Path,
    *,
    texts: Sequence[str] = TEXTS,
    extra: Callable[[Path, Exported], None] | None = None,
    show_progress_bar: bool = False,
) -> Exported:
    """Write only the adapter, as a folder that PEFT loads onto the LLM, and ullme with prompts and pooling.

    Args:
        model: with an adapter.
        to: a new or empty folder.
        texts: real texts, on which it is compared with the folder as PEFT loads it.
        extra: writes more files into the folder before it gets its name.
        show_progress_bar: count the steps on stderr.

    Raises:
        ValueError: no adapter, one that was trained on top of an earlier run, or a folder that cannot be written.
    """
    folder.check_target(Path(to))
    options = model.options
    if options.lora_name is None:
        raise ValueError(
            f"--adapter_only: {options.trained} of the LLM were trained, there is no adapter; leave --adapter_only out"
        )
    if options.init_from is not None and options.init_mode == "merge":
        raise ValueError(
            f"--adapter_only: the adapter was trained on top of {options.init_from!r}, so that it does not fit the "
            "LLM alone; leave --adapter_only out, and both are merged"
        )
    with _Steps(4, show_progress_bar) as step, folder.atomic_folder(to) as unnamed:
        step("write")
        save_adapter(model, unnamed)
        step("run with the adapter")
        work = weights.working_dtype(model)
        model.to(work).eval()
        before = check.causal_outputs(model, texts)
        step("load with PEFT and compare")
        llm = loading.load_backbone(options, loading.load_config(options)).to(device=model.device, dtype=work)  # type: ignore[call-arg]
        after = check.peft_outputs(llm, unnamed, model, texts)
        scale = max(1.0, *(logits.abs().max().item() for logits in before))
        loaded = max(weights.difference(a, b) for a, b in zip(before, after, strict=True)) / scale
        if not loaded <= 10 * weights.SAME:
            raise ValueError(f"--adapter_only: loaded by PEFT, the adapter gives other logits (by {loaded:.1e})")
        done = Exported(Path(to), "float32", model.max_positions, model.hidden_size, None, 0.0, 0.0, loaded)
        step("describe")
        if extra is not None:
            extra(unnamed, done)
    return done


class _Steps:
    """A progress bar that names the current step."""

    def __init__(self, total: int, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, desc="export", unit="step", disable=not shown)
        self.started = False

    def __enter__(self) -> Callable[[str], None]:
        return self._next

    def _next(self, what: str) -> None:
        if self.started:
            self.bar.update()
        self.started = True
        self.bar.set_description(f"export: {what}")

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.bar.update()
            self.bar.set_description("export: done")
        self.bar.close()
