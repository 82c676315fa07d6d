"""The inverse autoregressive flow in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

from math import inf

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from numpyro.distributions.flows import InverseAutoregressiveTransform

from elbozoo.guides import inverse_autoregressive_flow as specs
from elbozoo.guides.masked_network_numpyro import MaskedNetwork


class InverseAutoregressiveFlow(nnx.Module):
    def __init__(self, spec: specs.InverseAutoregressiveFlow, latent_dim: int, rngs: nnx.Rngs):
        self.spec, self.latent_dim = spec, latent_dim
        masks = [spec.masks(latent_dim, t) for t in range(spec.num_flows)]
        self.flows = nnx.List([MaskedNetwork(mask, spec.context_dim, rngs) for mask in masks])

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, log_scale, context = jnp.split(outputs, (self.latent_dim, 2 * self.latent_dim), -1)
        transforms = [self.affine(t, context) for t in range(self.spec.num_flows)]
        return dist.TransformedDistribution(dist.Normal(loc, jnp.exp(log_scale)).to_event(1), transforms)

    def affine(self, t: int, context: Array) -> InverseAutoregressiveTransform:
        """The map t."""
        network = self.flows[t](context, self.spec.masks(self.latent_dim, t))

        def means_and_log_scales(z: Array) -> list[Array]:
            return jnp.split(network(z), 2, -1)

        return InverseAutoregressiveTransform(means_and_log_scales, log_scale_min_clip=-inf, log_scale_max_clip=inf)
