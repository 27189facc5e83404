"""Latent attention pooling (NV-Embed, arXiv 2405.17428, section 3.2): a trained layer before the mean.

Each token's last hidden state attends to a small set of learned vectors, the latents; a feed-forward layer follows; the
embedding is the mean over the tokens. Tokens do not attend to each other here, so packed rows need no mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

if TYPE_CHECKING:
    from ullme.models.config import BackboneConfig


class LatentAttention(nn.Module):
    """Cross-attention from tokens to latents, then a gated feed-forward layer, each with pre-norm and residual.

    The paper gives latents, heads and the order of the parts. Norms, residuals, the width of a head (D) and the
    feed-forward (GEGLU of width 4 D) are those of the released model.

    Args:
        width: D, of the hidden states.
        latents: number of learned vectors.
        heads: number of attention heads, each of width D.
    """

    def __init__(self, width: int, latents: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.norm, self.norm_latents, self.norm_feed = (nn.LayerNorm(width) for _ in range(3))
        self.queries = nn.Linear(width, heads * width, bias=False)
        self.keys = nn.Linear(width, heads * width, bias=False)
        self.values = nn.Linear(width, heads * width, bias=False)
        self.out = nn.Linear(heads * width, width, bias=False)
        self.feed_in = nn.Linear(width, 8 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, D) hidden states of any dtype -> (T, D) in the dtype of the parameters."""
        hidden = hidden.to(self.latents.dtype)
        latents = self.norm_latents(self.latents)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for layer, x in ((self.queries, self.norm(hidden)), (self.keys, latents), (self.values, latents))
        )
        attended = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        hidden = hidden + self.out(attended)
        content, gate = self.feed_in(self.norm_feed(hidden)).chunk(2, dim=-1)
        return hidden + self.feed_out(content * gelu(gate))


def make_pooler(options: BackboneConfig, width: int, earlier: nn.Module | None = None) -> LatentAttention | None:
    """The trained layer of the pooling in ``options``, in float32 like adapters; None for poolings without weights.

    Args:
        options: of the backbone.
        width: D, of the hidden states.
        earlier: the pooler of an earlier stage, whose weights are copied.

    Raises:
        ValueError: the earlier pooler has another shape.
    """
    if options.pooling != "latent_attention":
        return None
    pooler = LatentAttention(width, options.latents, options.latent_heads)
    if earlier is not None:
        try:
            pooler.load_state_dict(earlier.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"init_from={options.init_from!r} has a latent attention of another shape than latents="
                f"{options.latents}, latent_heads={options.latent_heads}; set both as in the earlier run"
            ) from error
    return pooler
