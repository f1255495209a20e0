"""A small vision transformer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.zoo.layers import Activation, check_sizes, make_activation, scaled

__all__ = ["TransformerBlock", "ViT"]


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, T, C)."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, C / heads]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and two affine layers, each after layer normalisation and with a shortcut."""

    def __init__(self, channels: int, heads: int, hidden: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            OrderedDict(
                expand=nn.Linear(channels, hidden),
                act=make_activation(activation),
                contract=nn.Linear(hidden, channels),
            )
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021), small enough for images of 28 x 28 or 32 x 32 pixels.

    Patches, a class token and learned positions; blocks; layer normalisation and a linear map of the class token.

    Parameters
    ----------
    depth : int, default=6
        Transformer blocks.
    channels : int, default=192
        Of a token.
    heads : int, default=3
        Of the attention; channels are rounded to a multiple of it.
    patch : int, default=4
        Side of a patch, which divides `image_size`.
    expansion : float, default=4.0
        Hidden features of a block's affine layers, as a multiple of its channels.
    in_channels, classes, image_size : int, default=3, 10, 32
        Of the data.
    width : float, default=1.0
        Factor on `channels`.
    dropout : float, default=0.0
        In the attention and after each sublayer.
    activation : default="gelu"
        A name or a callable that makes a module.
    """

    def __init__(
        self,
        *,
        depth: int = 6,
        channels: int = 192,
        heads: int = 3,
        patch: int = 4,
        expansion: float = 4.0,
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, image_size=image_size, width=width, dropout=dropout)
        if depth < 1 or heads < 1:
            raise ValueError(f"depth, heads: expected at least 1, got {depth}, {heads}")
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch: expected a divisor of image_size={image_size}, got {patch}")
        channels = heads * scaled(channels / heads, width)
        self.patches = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, channels))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        hidden = max(1, round(expansion * channels))
        self.blocks = nn.Sequential(
            *(TransformerBlock(channels, heads, hidden, activation, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.dropout(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions)
        return self.classifier(self.norm(self.blocks(x))[:, 0])
