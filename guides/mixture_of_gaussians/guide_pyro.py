"""The mixture of Gaussians in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from elbozoo.guides import mixture_of_gaussians as specs


class MixtureOfGaussians(nn.Module):
    def __init__(self, spec: specs.MixtureOfGaussians, latent_dim: int):
        super().__init__()
        self.spec, self.latent_dim = spec, latent_dim

    def forward(self, outputs: Tensor) -> GaussianMixture:
        num = self.spec.num_components
        logits, loc, log_scale = outputs.tensor_split((num, num * (1 + self.latent_dim)), -1)
        shape = (*outputs.shape[:-1], num, self.latent_dim)
        return GaussianMixture(logits, loc.reshape(shape), log_scale.reshape(shape).exp())


class GaussianMixture(TorchDistribution):
    """Diagonal Gaussians (..., C, D) with weights softmax(logits), (..., C), and implicitly reparameterised draws."""

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "locs": constraints.independent(constraints.real, 2),
        "scales": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, locs: Tensor, scales: Tensor, *, validate_args: bool | None = None):
        self.logits, self.locs, self.scales = logits, locs, scales
        super().__init__(logits.shape[:-1], locs.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(GaussianMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.logits.shape[-1:])
        new.locs, new.scales = (x.expand(batch_shape + x.shape[-2:]) for x in (self.locs, self.scales))
        super(GaussianMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        by_component = dist.Normal(self.locs, self.scales).log_prob(value.unsqueeze(-2)).sum(-1)
        return (self.logits.log_softmax(-1) + by_component).logsumexp(-1)

    def rsample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            component = dist.Categorical(logits=self.logits).sample(sample_shape)[..., None, None]
            points = dist.Normal(self.locs, self.scales).sample(sample_shape)
            z = points.take_along_dim(component, -2).squeeze(-2)
        return self.reparameterise(z)

    def reparameterise(self, z: Tensor) -> Tensor:
        """``z``, of which nothing is differentiated, as a function of the parameters; the spec has the mathematics."""
        z = z.detach()
        u = (z.unsqueeze(-2) - self.locs) / self.scales
        log_density = -0.5 * u**2 - self.scales.log()  # less a constant that no weight depends on
        so_far = log_density.cumsum(-1) - log_density
        weight = (self.logits.unsqueeze(-1) + so_far).softmax(-2)
        below = torch.special.ndtr(u)
        upper = (weight * below).sum(-2, keepdim=True).detach() > 0.5
        below = torch.where(upper, -torch.special.ndtr(-u), below)  # S, less 1 in its upper half: keeps the digits
        uniform = (weight * below).sum(-2)
        with torch.no_grad():
            slope = -u / self.scales
            both = torch.einsum("...cd,...cj->...dj", weight * below, slope)
            apart = uniform.unsqueeze(-1) * torch.einsum("...cd,...cj->...dj", weight, slope)
            density = (weight * dist.Normal(self.locs, self.scales).log_prob(z.unsqueeze(-2)).exp()).sum(-2)
            jacobian = (both - apart).tril(-1) + density.diag_embed()
        change = (uniform - uniform.detach()).unsqueeze(-1)
        return z - torch.linalg.solve_triangular(jacobian, change, upper=False).squeeze(-1)
