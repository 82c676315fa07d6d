"""The full-covariance Gaussian guide in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from elbozoo.guides import full_covariance_gaussian as specs


class FullCovarianceGaussian(nn.Module):
    def __init__(self, spec: specs.FullCovarianceGaussian, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, outputs: Tensor) -> dist.MultivariateNormal:
        loc, triangle = outputs[..., : self.latent_dim], outputs[..., self.latent_dim :]
        return dist.MultivariateNormal(loc, scale_tril=scale_tril(triangle, self.latent_dim))


def scale_tril(triangle: Tensor, dim: int) -> Tensor:
    """The (..., dim, dim) Cholesky factor whose row-major lower triangle is given, with its diagonal as logarithms."""
    matrix = triangle[..., specs.lower_triangle(dim)]
    return matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())
