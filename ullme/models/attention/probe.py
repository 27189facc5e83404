"""The attention probe: choose a path on which the loaded model really has the attention asked for, in every layer.

transformers does not guarantee that a decoder respects ``is_causal=False``: some families accept the keyword and stay
causal without a warning. So each path is run on a small input and checked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.models.attention import packing, rotary
from ullme.models.attention.layers import (
    LayerCall,
    LayerCallRecorder,
    contains_attention,
    rounding,
    short_windows,
    token_table,
)
from ullme.models.attention.paths import (
    PATHS,
    text_decoder,
    without_cache,
)
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The values of config.layer_types that are no attention layers; layers of any other type must become bidirectional.
_LAYERS_WITHOUT_ATTENTION = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp"}


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of probing one path.

    Args:
        failure: why the path cannot be used, or None.
        recurrent_layers: indices of layers that stay causal because they are recurrent or convolutional.
    """

    failure: str | None
    recurrent_layers: tuple[int, ...] = ()


def choose_path(model: PreTrainedModel, causal: bool, path: str = "auto") -> str:
    """The first of packed, padded, flags and mask4d that passes the probe on this model.

    Args:
        model: the causal LM, with or without an adapter.
        causal: whether embedding uses causal attention.
        path: ``auto``, or the only path to try.

    Returns:
        The path's name. Packing stays installed only if it is ``packed``.

    Raises:
        ValueError: no path passes; the message names the model family and the layers.
    """
    name, result = find_path(model, causal, path)
    if result.recurrent_layers:
        logger.warning(
            "%s is a hybrid model: layers %s are recurrent or convolutional and stay causal; "
            "only its attention layers became bidirectional",
            model.config.model_type,
            list(result.recurrent_layers),
        )
    return name


@torch.no_grad()
def find_path(model: PreTrainedModel, causal: bool, path: str = "auto") -> tuple[str, ProbeResult]:
    """Like :func:`choose_path`, without the warning; also returns the path's probe result.

    Raises:
        ValueError: no path passes.
    """
    failures: list[str] = []
    with evaluation_mode(model):
        for name in PATHS if path == "auto" else [path]:
            result = _probe_path(model, name, causal)
            if result.failure is None:
                if failures:
                    logger.info("%s uses attention_path=%s (%s)", model.config.model_type, name, "; ".join(failures))
                return name, result
            failures.append(f"{name}: {result.failure}")
    kind = "causal" if causal else "bidirectional"
    remedies = ["Take another backbone", *([] if causal else ["set attention: causal"])]
    if next(model.parameters()).dtype == torch.float64:
        remedies.append("set dtype: float32 (not every family runs in float64)")
    raise ValueError(
        f"the {model.config.model_type!r} backbone cannot be run with {kind} attention here "
        f"({'; '.join(failures)}). {', or '.join(remedies)}."
    )


def _probe_path(model: PreTrainedModel, name: str, causal: bool) -> ProbeResult:
    """Probe one path; packing stays installed only if it passes."""
    try:
        with short_windows(text_decoder(model.base_model)):
            plain = _plain_forward(model)
            if name == "packed":
                packing.install(model)
            result = _check_path(model, name, causal, plain)
    except Exception as error:  # families fail in many ways on arguments they do not support
        result = ProbeResult(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
    if name == "packed" and result.failure is not None:
        packing.uninstall(model)
    return result


def _probe_block(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(2, 12) token ids of two rows of 12 and 7 tokens, and their attention mask."""
    table = token_table(model)
    ids = (torch.arange(24, device=table.device).view(2, 12) * 7 + 11) % table.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def run_on_probe_block(model: PreTrainedModel, path: str, causal: bool) -> Tensor:
    """(19, D) hidden states of the probe's two rows on a path, in the mode that the model is in."""
    return PATHS[path](model.base_model, *_probe_block(model), causal).flat


def _plain_forward(model: PreTrainedModel, length: int = 12) -> Tensor:
    """(length, D) hidden states of the first row in transformers' own forward."""
    ids, mask = _probe_block(model)
    decoder = text_decoder(model.base_model)
    ids = ids[:1, :length]
    out = decoder(input_ids=ids, attention_mask=mask[:1, :length], **without_cache(type(decoder).forward))
    return out.last_hidden_state[0]


def _check_path(model: PreTrainedModel, name: str, causal: bool, plain: Tensor) -> ProbeResult:
    """Check a path on two rows of different lengths.

    A row's result must not depend on the other row or on padding; the causal result must equal transformers' own; and
    every attention layer must attend to later tokens exactly if ``causal`` is false.
    """
    decoder, run = model.base_model, PATHS[name]
    ids, mask = _probe_block(model)
    device, vocab_size = ids.device, len(token_table(model))
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(decoder.parameters()).dtype
    tolerance = rounding(dtype)

    def differ(a: Tensor, b: Tensor) -> bool:
        difference = (a.double() - b.double()).abs().max().item()
        return not difference <= tolerance * max(1.0, a.double().abs().max().item())

    with LayerCallRecorder(decoder) as recorder:
        together = run(decoder, ids, mask, causal).flat
    separate = torch.cat(
        [run(decoder, ids[:1], mask[:1], causal).flat, run(decoder, ids[1:, :7], mask[1:, :7], causal).flat]
    )
    if differ(together, separate):
        return ProbeResult("a row's result depends on the other rows or on padding")
    with rotary.short_limits(text_decoder(decoder)) as has_limits:
        rows = [run(decoder, x, m, causal).flat for x, m in ((ids, mask), (ids[:1], mask[:1]), (ids[1:], mask[1:]))]
    if has_limits and differ(rows[0], torch.cat(rows[1:])):
        return ProbeResult("a row's rotary positions depend on the length of other rows")
    other = ids.clone()
    other[1] = (other[1] + vocab_size // 2) % vocab_size
    before, after = together[:12].double(), run(decoder, other, mask, causal).flat[:12].double()
    # A small bound in half precision too: the first row's computation is the same, so rounding does not differ.
    if (after - before).abs().max() > 1e-3 * before.abs().max():
        return ProbeResult("a row's result depends on the other rows")
    if differ(plain[:6], _plain_forward(model, 6)):
        return ProbeResult("its plain forward is not causal: it is not a decoder, or not configured as one")
    causal_run = together if causal else run(decoder, ids, mask, True).flat
    if differ(causal_run[: len(plain)], plain):
        return ProbeResult("its causal result differs from the plain forward's")
    # Rounding may change a causal layer's output a little (experts get other groups of tokens); attending to a later
    # token changes it by much more.
    threshold = min(tolerance, 1e-2) if causal else 1e-6
    wrong = {call.index: call for call in recorder.calls if call.looks_ahead(12, threshold) == causal}
    recurrent = [n for n, call in wrong.items() if not causal and not _has_attention(model, call, len(recorder.layers))]
    if disobeying := sorted(set(wrong) - set(recurrent)):
        state = "attend to later tokens" if causal else "stay causal"
        return ProbeResult(f"layers {_format_ranges(disobeying)} of {len(recorder.layers)} {state}")
    if len(recurrent) == len({call.index for call in recorder.calls}):
        return ProbeResult("no layer has attention")
    return ProbeResult(None, tuple(sorted(recurrent)))


def _has_attention(model: PreTrainedModel, call: LayerCall, num_layers: int) -> bool:
    """Whether the called layer is an attention layer, by the config or else by the names of its modules."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types and len(types) == num_layers:
        return types[call.index] not in _LAYERS_WITHOUT_ATTENTION
    return contains_attention(call.module)


def _format_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
