"""The low-rank Gaussian guide in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from elbozoo.guides import low_rank_gaussian as specs


class LowRankGaussian(nn.Module):
    def __init__(self, spec: specs.LowRankGaussian, latent_dim: int):
        super().__init__()
        self.spec, self.latent_dim = spec, latent_dim

    def forward(self, outputs: Tensor) -> dist.LowRankMultivariateNormal:
        loc, log_scale, factor = outputs.tensor_split((self.latent_dim, 2 * self.latent_dim), -1)
        factor = factor.reshape(*factor.shape[:-1], self.latent_dim, self.spec.rank)
        return dist.LowRankMultivariateNormal(loc, factor, (2 * log_scale).exp())
