"""The priors in Pyro: distributions of one latent vector."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from elbozoo.zoo import priors as specs

Encode = Callable[[Tensor], TorchDistribution]


class StandardNormal(nn.Module):
    loc: Tensor

    def __init__(self, spec: specs.StandardNormal, latent_dim: int, data_dim: int, unit_interval: bool):
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)  # goes where the model goes

    def forward(self, encode: Encode | None = None) -> TorchDistribution:
        return dist.Normal(self.loc, 1.0).to_event(1)


class MixturePrior(nn.Module):
    def __init__(self, spec: specs.MixturePrior, latent_dim: int, data_dim: int, unit_interval: bool):
        super().__init__()
        shape = (spec.num_components, latent_dim)
        self.logits = nn.Parameter(torch.zeros(spec.num_components))
        self.loc = nn.Parameter(torch.randn(shape) / sqrt(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, encode: Encode | None = None) -> TorchDistribution:
        components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return Mixture(dist.Categorical(logits=self.logits), components)


class FlowPrior(nn.Module):
    def __init__(self, spec: specs.FlowPrior, latent_dim: int, data_dim: int, unit_interval: bool):
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(spec.flow.num_outputs(latent_dim)))
        self.flow = spec.flow.form("pyro")(spec.flow, latent_dim)

    def forward(self, encode: Encode | None = None) -> TorchDistribution:
        return self.flow(self.outputs)


class VampPrior(nn.Module):
    def __init__(self, spec: specs.VampPrior, latent_dim: int, data_dim: int, unit_interval: bool):
        super().__init__()
        self.spec, self.unit_interval = spec, unit_interval
        self.pseudo_inputs = nn.Parameter(torch.randn(spec.num_components, data_dim))

    def forward(self, encode: Encode | None = None) -> TorchDistribution:
        u = self.pseudo_inputs
        components = self.spec.encoder(encode)(u.sigmoid() if self.unit_interval else u)
        return Mixture(dist.Categorical(logits=u.new_zeros(len(u))), components)


class Mixture(dist.MixtureSameFamily):
    """Torch's own with its components' support: torch has no bijection onto its constraint for mixtures."""

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        return self.component_distribution.support
