"""The linear variational autoencoder in Pyro."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.guides.full_covariance_gaussian.guide_pyro import scale_tril
from elbozoo.zoo.linear_vae import LinearVAE
from elbozoo.zoo.networks.networks_pyro import linear
from elbozoo.zoo.spec import plate_sizes


class Model(PyroModule):
    """p(z) p(x | z)."""

    def __init__(self, spec: LinearVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.decoder = linear(spec.latent_dim, spec.data_dim)
        if spec.learn_scale:
            self.decoder_log_scale = nn.Parameter(torch.tensor(math.log(spec.scale)))

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        scale = self.decoder_log_scale.exp() if self.spec.learn_scale else self.spec.scale
        return dist.Normal(self.decoder(z), scale).to_event(1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        loc = next(self.parameters()).new_zeros(self.spec.latent_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x)."""

    def __init__(self, spec: LinearVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.encoder = linear(spec.data_dim, spec.latent_dim)
        if spec.guide == "full":
            self.encoder_tril = nn.Parameter(torch.zeros(spec.latent_dim * (spec.latent_dim + 1) // 2))
        else:
            self.encoder_log_scale = nn.Parameter(torch.zeros(spec.latent_dim))

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim)."""
        loc = self.encoder(x)
        if self.spec.guide == "full":
            return dist.MultivariateNormal(loc, scale_tril=scale_tril(self.encoder_tril, self.spec.latent_dim))
        return dist.Normal(loc, self.encoder_log_scale.exp()).to_event(1)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            return pyro.sample("z", self.encode(x))
