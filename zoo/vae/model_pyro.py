"""The variational autoencoder in Pyro."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vae import VAE


class Model(PyroModule):
    """p(z) p(x | z)."""

    def __init__(self, spec: VAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, spec.latent_dim, num_outputs)
        sizes = (spec.latent_dim, spec.data_dim, spec.likelihood.unit_interval)
        self.prior = spec.prior.form("pyro")(spec.prior, *sizes)
        if spec.prior.needs_encoder:
            self.posterior, self.encoder = recognition(spec)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim): the guide's, for a prior that is made of it."""
        return self.posterior(self.encoder(x))

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z), with batch shape () and event shape (latent_dim,)."""
        return self.prior(self.encode)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        return self.likelihood(self.decoder(z))

    @pyro_method
    def log_joint(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """``log p(x, z)`` as a function of z of shape (..., latent_dim), for a guide that climbs it."""
        prior, decoder, likelihood = self.prior_distribution(), self.decoder, self.likelihood
        return lambda z: prior.log_prob(z) + likelihood(decoder(z)).log_prob(x)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x)."""

    def __init__(self, spec: VAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec, self.log_joint = spec, model.log_joint
        shared = spec.prior.needs_encoder  # then they are the model's own, under the same names
        self.posterior, self.encoder = (model.posterior, model.encoder) if shared else recognition(spec)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim)."""
        log_joint = (self.log_joint(x),) if self.spec.guide.uses_log_joint else ()
        return self.posterior(self.encoder(x), *log_joint)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            return pyro.sample("z", self.encode(x))


def recognition(spec: VAE) -> tuple[nn.Module, nn.Module]:
    """The parts of q(z | x): the family and its encoder."""
    posterior = spec.guide.form("pyro")(spec.guide, spec.latent_dim)
    num_outputs = spec.guide.num_outputs(spec.latent_dim)
    return posterior, spec.network.form("pyro", "Encoder")(spec.network, spec.data_dim, num_outputs)
