"""The ladder variational autoencoder in Pyro: the hierarchical model, and a guide that comes down with it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.hierarchical_vae import model_pyro as hierarchical
from elbozoo.zoo.ladder_vae import LadderVAE
from elbozoo.zoo.networks.networks_pyro import ACTIVATIONS
from elbozoo.zoo.spec import plate_sizes


class Model(hierarchical.Model):
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    def __init__(self, spec: LadderVAE, name: str = ""):
        super().__init__(spec, name)
        if spec.prior.needs_encoder:
            self.encoders = rungs(spec)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z_L | x): the guide's, for a prior that is made of it."""
        loc, variance = climb(self.encoders, x)[-1]
        return dist.Normal(loc, variance.sqrt()).to_event(1)

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return self.prior(self.encode)


class Guide(PyroModule):
    """q(z_L | x) q(z_{L-1} | z_L, x) ... q(z_1 | z_2, x)."""

    def __init__(self, spec: LadderVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.decoders = model.decoders  # the model's own, under the same name; so are the encoders of some priors
        self.encoders = model.encoders if spec.prior.needs_encoder else rungs(spec)

    conditional = Model.conditional

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample every z given x. Returns z_1 of shape (B, latent_dims[0])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        *evidence, (loc, variance) = climb(self.encoders, x)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            top = len(self.spec.latent_dims)
            z = pyro.sample(f"z{top}", dist.Normal(loc, variance.sqrt()).to_event(1))
            for layer in range(top - 1, 0, -1):
                q = merge(evidence[layer - 1], self.conditional(layer, z))
                z = pyro.sample(f"z{layer}", q)
        return z


def rungs(spec: LadderVAE) -> nn.ModuleList:
    """The encoders, next to the data first."""
    layers = zip(spec.rungs, spec.encoder_sizes, strict=True)
    return nn.ModuleList([network.form("pyro", "Rung")(network, *sizes) for network, sizes in layers])


def climb(encoders: nn.ModuleList, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Location and variance of the evidence on every rung, next to the data first."""
    features, evidence = x, []
    for encoder in encoders:
        outputs, features = encoder(features)
        loc, raw = outputs.chunk(2, -1)
        evidence.append((loc, ACTIVATIONS["softplus"](raw)))
    return evidence


def merge(evidence: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor]) -> dist.TorchDistribution:
    """The normalised product of two diagonal Gaussians, by location and variance, and by location and log scale."""
    (m, variance), (mu, log_scale) = evidence, prior
    share = 1.0 / (1.0 + variance * torch.exp(-2.0 * log_scale))
    return dist.Normal(mu + share * (m - mu), torch.sqrt(share * variance)).to_event(1)
