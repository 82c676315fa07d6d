"""The mixture of Gaussians in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.lax import stop_gradient
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from elbozoo.guides import mixture_of_gaussians as specs


class MixtureOfGaussians(nnx.Module):
    def __init__(self, spec: specs.MixtureOfGaussians, latent_dim: int, rngs: nnx.Rngs):
        self.spec, self.latent_dim = spec, latent_dim

    def __call__(self, outputs: Array) -> dist.Distribution:
        num = self.spec.num_components
        logits, loc, log_scale = jnp.split(outputs, (num, num * (1 + self.latent_dim)), -1)
        shape = (*outputs.shape[:-1], num, self.latent_dim)
        return GaussianMixture(logits, loc.reshape(shape), jnp.exp(log_scale.reshape(shape)))


class GaussianMixture(dist.Distribution):
    """Diagonal Gaussians (..., C, D) with weights softmax(logits), (..., C), and implicitly reparameterised draws."""

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "locs": constraints.independent(constraints.real, 2),
        "scales": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    reparametrized_params: ClassVar = ["logits", "locs", "scales"]

    def __init__(self, logits: Array, locs: Array, scales: Array, *, validate_args: bool | None = None):
        self.logits, self.locs, self.scales = logits, locs, scales
        super().__init__(jnp.shape(logits)[:-1], jnp.shape(locs)[-1:], validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        by_component = dist.Normal(self.locs, self.scales).log_prob(value[..., None, :]).sum(-1)
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + by_component, -1)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        component_key, point_key = jax.random.split(key)
        component = dist.CategoricalLogits(self.logits).sample(component_key, sample_shape)[..., None, None]
        points = dist.Normal(self.locs, self.scales).sample(point_key, sample_shape)
        return self.reparameterise(jnp.take_along_axis(points, component, -2).squeeze(-2))

    def reparameterise(self, z: Array) -> Array:
        """``z``, of which nothing is differentiated, as a function of the parameters; the spec has the mathematics."""
        z = stop_gradient(z)
        u = (z[..., None, :] - self.locs) / self.scales
        log_density = -0.5 * u**2 - jnp.log(self.scales)  # less a constant that no weight depends on
        so_far = jnp.cumsum(log_density, -1) - log_density
        weight = jax.nn.softmax(self.logits[..., None] + so_far, -2)
        below = ndtr(u)
        upper = stop_gradient(weight * below).sum(-2, keepdims=True) > 0.5
        below = jnp.where(upper, -ndtr(-u), below)  # S, less 1 in its upper half: keeps the digits
        uniform = (weight * below).sum(-2)
        slope = -u / self.scales
        both = jnp.einsum("...cd,...cj->...dj", weight * below, slope)
        apart = uniform[..., None] * jnp.einsum("...cd,...cj->...dj", weight, slope)
        density = (weight * jnp.exp(dist.Normal(self.locs, self.scales).log_prob(z[..., None, :]))).sum(-2)
        jacobian = jnp.tril(both - apart, -1) + density[..., None] * jnp.eye(z.shape[-1], dtype=density.dtype)
        change = (uniform - stop_gradient(uniform))[..., None]
        return z - solve_triangular(stop_gradient(jacobian), change, lower=True).squeeze(-1)
