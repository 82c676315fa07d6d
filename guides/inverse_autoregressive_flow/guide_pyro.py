"""The inverse autoregressive flow in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

from math import inf

import pyro.distributions as dist
from pyro.distributions.transforms import AffineAutoregressive
from torch import Tensor, nn

from elbozoo.guides import inverse_autoregressive_flow as specs
from elbozoo.guides.masked_network_pyro import MaskedNetwork


class InverseAutoregressiveFlow(nn.Module):
    def __init__(self, spec: specs.InverseAutoregressiveFlow, latent_dim: int):
        super().__init__()
        self.spec, self.latent_dim = spec, latent_dim
        masks = [spec.masks(latent_dim, t) for t in range(spec.num_flows)]
        self.flows = nn.ModuleList([MaskedNetwork(mask, spec.context_dim) for mask in masks])

    def forward(self, outputs: Tensor) -> dist.TransformedDistribution:
        loc, log_scale, context = outputs.tensor_split((self.latent_dim, 2 * self.latent_dim), -1)
        transforms = [self.affine(t, context) for t in range(self.spec.num_flows)]
        return dist.TransformedDistribution(dist.Normal(loc, log_scale.exp()).to_event(1), transforms)

    def affine(self, t: int, context: Tensor) -> AffineAutoregressive:
        """The map t."""
        network = self.flows[t](context, self.spec.masks(self.latent_dim, t))

        def means_and_log_scales(z: Tensor) -> tuple[Tensor, ...]:
            return network(z).chunk(2, -1)

        means_and_log_scales.permutation = self.spec.order(self.latent_dim, t).tolist()  # in which Pyro inverts
        return AffineAutoregressive(means_and_log_scales, log_scale_min_clip=-inf, log_scale_max_clip=inf)
