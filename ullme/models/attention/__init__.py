"""Bidirectional and causal attention in a decoder: the paths to run it, the packed forward, and the probe that
chooses a path when a model is loaded."""

from ullme.models.attention.layers import decoder_layers
from ullme.models.attention.paths import (
    PATHS,
    Hidden,
    run_flags,
    run_mask4d,
    run_packed,
    run_padded,
    run_rows,
    text_decoder,
)
from ullme.models.attention.probe import choose_path, find_path, run_on_probe_block
from ullme.models.attention.rotary import length_key

__all__ = [
    "PATHS",
    "Hidden",
    "choose_path",
    "decoder_layers",
    "find_path",
    "length_key",
    "run_flags",
    "run_mask4d",
    "run_on_probe_block",
    "run_packed",
    "run_padded",
    "run_rows",
    "text_decoder",
]
