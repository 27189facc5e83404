"""Latent attention pooling (NV-Embed, arXiv 2405.17428, section 3.2): a trained layer in front of the mean.

Each token's last hidden state asks a small set of learned vectors, the latents; what it gets goes through a
feed-forward layer; the mean over the tokens is the embedding. Tokens do not look at one another here, so the packed
form needs no care.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

if TYPE_CHECKING:
    from ullme.models.config import BackboneConfig


class LatentAttention(nn.Module):
    """Cross-attention from tokens to latents and a gated feed-forward, each after a norm and with a residual.

    The paper gives latents, heads and the order of the parts. Norms, residuals, the width of a head (D) and the
    feed-forward (GEGLU of width 4 D) are those of the released model.

    Args:
        width: D.
        latents: r, learned vectors.
        heads: of the attention, each D wide.
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
        """(T, D) hidden states of any dtype -> (T, D)."""
        hidden = hidden.to(self.latents.dtype)
        latents = self.norm_latents(self.latents)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for layer, x in ((self.queries, self.norm(hidden)), (self.keys, latents), (self.values, latents))
        )
        read = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        hidden = hidden + self.out(read)
        content, gate = self.feed_in(self.norm_feed(hidden)).chunk(2, dim=-1)
        return hidden + self.feed_out(content * gelu(gate))


def make_pooler(options: BackboneConfig, width: int, earlier: nn.Module | None = None) -> LatentAttention | None:
    """The trained part of the pooling that the options name, if it has one, in float32 as adapters are.

    Args:
        options: of the backbone.
        width: D.
        earlier: an earlier stage's, whose weights it starts from.

    Raises:
        ValueError: the earlier stage's is of another shape.
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
                f"{options.latents}, latent_heads={options.latent_heads}; give those of the earlier run"
            ) from error
    return pooler
