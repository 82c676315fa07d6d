"""The network of the autoregressive prior over indices, in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from elbozoo.zoo.networks.networks_pyro import linear
from elbozoo.zoo.vqvae import HEADS, CodePriorSizes


class CodePrior(nn.Module):
    """Indices (..., L), and a context of (..., L'), to the logits of each given the context and those before it.

    The context stands in front of the sequence, every position sees all of it, and the logits are (..., L, num_codes).
    """

    def __init__(self, sizes: CodePriorSizes):
        super().__init__()
        self.sizes = sizes
        width, scale = sizes.width, sizes.width**-0.5
        self.embedding = nn.Parameter(scale * torch.randn(sizes.num_codes, width))
        self.positions = nn.Parameter(scale * torch.randn(sizes.context_length + sizes.length, width))
        self.start = nn.Parameter(scale * torch.randn(width))
        if sizes.context_length:
            self.context = nn.Parameter(scale * torch.randn(sizes.context_codes, width))
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, sizes.num_codes)
        nn.init.zeros_(self.head.weight)

    def forward(self, index: Tensor, context: Tensor | None = None) -> Tensor:
        before = self.embedding[index[..., :-1]]
        parts = [self.start.expand(*before.shape[:-2], 1, -1), before]
        if context is not None:
            first = self.context[context]
            leading = torch.broadcast_shapes(first.shape[:-2], before.shape[:-2])
            parts = [part.expand(*leading, *part.shape[-2:]) for part in (first, *parts)]
        x = torch.cat(parts, -2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[..., self.sizes.context_length :, :]))


class Block(nn.Module):
    """Attention to the context and what came before, then two dense layers, each on a residual path."""

    hidden: Tensor

    def __init__(self, sizes: CodePriorSizes):
        super().__init__()
        width = sizes.width
        self.register_buffer("hidden", torch.from_numpy(~sizes.visible()), persistent=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.output = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.output(self.attend(self.norm1(x)))
        return x + self.down(gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        split = self.attention(x).reshape(*x.shape[:-1], 3, HEADS, width // HEADS)
        query, key, value = split.movedim(-3, 0)
        scores = torch.einsum("...ihd,...jhd->...hij", query, key) * (width // HEADS) ** -0.5
        weights = scores.masked_fill(self.hidden, -torch.inf).softmax(-1)
        return torch.einsum("...hij,...jhd->...ihd", weights, value).flatten(-2)
