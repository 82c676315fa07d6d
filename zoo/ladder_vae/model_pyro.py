"""The ladder variational autoencoder in Pyro: the hierarchical model, and a guide that comes down with it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.hierarchical_vae.model_pyro import Model
from elbozoo.zoo.ladder_vae import LadderVAE
from elbozoo.zoo.spec import plate_sizes

__all__ = ["Guide", "Model"]


class Guide(PyroModule):
    """q(z_L | x) q(z_{L-1} | z_L, x) ... q(z_1 | z_2, x)."""

    def __init__(self, spec: LadderVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.decoders = model.decoders
        rungs = zip(spec.networks, spec.encoder_sizes, strict=True)
        self.encoders = nn.ModuleList([network.form("pyro", "Rung")(network, *sizes) for network, sizes in rungs])

    conditional = Model.conditional

    def climb(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Location and log scale of the evidence on every rung, next to the data first."""
        features, evidence = x, []
        for encoder in self.encoders:
            outputs, features = encoder(features)
            loc, log_scale = outputs.chunk(2, -1)
            evidence.append((loc, log_scale))
        return evidence

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample every z given x. Returns z_1 of shape (B, latent_dims[0])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        *evidence, (loc, log_scale) = self.climb(x)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            top = len(self.spec.latent_dims)
            z = pyro.sample(f"z{top}", dist.Normal(loc, log_scale.exp()).to_event(1))
            for layer in range(top - 1, 0, -1):
                q = merge(evidence[layer - 1], self.conditional(layer, z))
                z = pyro.sample(f"z{layer}", q)
        return z


def merge(evidence: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor]) -> dist.TorchDistribution:
    """The normalised product of two diagonal Gaussians, given by locations and log scales."""
    (m, log_s), (mu, log_sigma) = evidence, prior
    loc = mu + torch.sigmoid(2.0 * (log_sigma - log_s)) * (m - mu)
    return dist.Normal(loc, torch.exp(-0.5 * torch.logaddexp(-2.0 * log_s, -2.0 * log_sigma))).to_event(1)
