"""How a decoder attends: the paths through it, the packed row, and the probe that tells which path obeys."""

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
from ullme.models.attention.probe import choose_path, find_path

__all__ = [
    "PATHS",
    "Hidden",
    "choose_path",
    "decoder_layers",
    "find_path",
    "run_flags",
    "run_mask4d",
    "run_packed",
    "run_padded",
    "run_rows",
    "text_decoder",
]
