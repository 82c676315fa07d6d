"""The diagonal Gaussian guide in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from elbozoo.guides import diagonal_gaussian as specs


class DiagonalGaussian(nn.Module):
    def __init__(self, spec: specs.DiagonalGaussian, latent_dim: int):
        super().__init__()

    def forward(self, outputs: Tensor) -> dist.Independent:
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
