"""The network of the autoregressive prior over indices, in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from elbozoo.zoo.networks.networks_pyro import linear
from elbozoo.zoo.vqvae import HEADS, VQVAE


class CodePrior(nn.Module):
    """Indices (..., L) to the logits of each given those before it, (..., L, num_codes)."""

    def __init__(self, spec: VQVAE):
        super().__init__()
        width, scale = spec.prior_width, spec.prior_width**-0.5
        self.embedding = nn.Parameter(scale * torch.randn(spec.quantizer.num_codes, width))
        self.positions = nn.Parameter(scale * torch.randn(spec.num_indices, width))
        self.start = nn.Parameter(scale * torch.randn(width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(spec.prior_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, spec.quantizer.num_codes)
        nn.init.zeros_(self.head.weight)

    def forward(self, index: Tensor) -> Tensor:
        before = self.embedding[index[..., :-1]]
        x = torch.cat([self.start.expand(*before.shape[:-2], 1, -1), before], -2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention to what came before, then two dense layers, each on a residual path."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.output = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.output(self.attend(self.norm1(x)))
        return x + self.down(gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        length, width = x.shape[-2:]
        split = self.attention(x).reshape(*x.shape[:-1], 3, HEADS, width // HEADS)
        query, key, value = split.movedim(-3, 0)
        scores = torch.einsum("...ihd,...jhd->...hij", query, key) * (width // HEADS) ** -0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("...hij,...jhd->...ihd", weights, value).flatten(-2)
