"""The autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from elbozoo.zoo.autoencoder import Autoencoder, no_draws
from elbozoo.zoo.spec import plate_sizes


class Flat(dist.ImproperUniform):
    """Log density 0 everywhere; nothing to draw from."""

    def expand(self, batch_shape, _instance=None):
        return Flat(self.support, torch.Size(batch_shape), self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value).sum(-1)  # of the value's type and device

    def sample(self, sample_shape=()) -> Tensor:
        raise no_draws()


class Model(PyroModule):
    """p(x | z), under a flat improper prior of z."""

    def __init__(self, spec: Autoencoder, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, spec.latent_dim, num_outputs)

    def prior_distribution(self) -> dist.TorchDistribution:
        """The flat prior, with batch shape () and event shape (latent_dim,)."""
        return Flat(dist.constraints.independent(dist.constraints.real, 1), (), (self.spec.latent_dim,))

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        return self.likelihood(self.decoder(z))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Score x given z, which must come from elsewhere. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """The point mass at encoder(x)."""

    def __init__(self, spec: Autoencoder, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.encoder = spec.network.form("pyro", "Encoder")(spec.network, spec.data_dim, spec.latent_dim)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """The code of x of shape (..., data_dim), as a distribution."""
        return dist.Delta(self.encoder(x), event_dim=1)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Encode x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            return pyro.sample("z", self.encode(x))
