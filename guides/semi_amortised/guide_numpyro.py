"""The semi-amortised guide in NumPyro: encoder outputs and a log joint in, a distribution of z out."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from elbozoo.guides import semi_amortised as specs


class SemiAmortised(nnx.Module):
    def __init__(self, spec: specs.SemiAmortised, latent_dim: int, rngs: nnx.Rngs):
        self.spec, self.latent_dim = spec, latent_dim
        self.family = spec.family.form("numpyro")(spec.family, latent_dim, rngs)

    def __call__(self, outputs: Array, log_joint: Callable[[Array], Array] | None = None) -> dist.Distribution:
        if log_joint is None:
            raise specs.refuse_without_log_joint()
        points = jnp.asarray(self.spec.points(self.latent_dim), outputs.dtype)
        points = points.reshape(len(points), *(1,) * (outputs.ndim - 1), self.latent_dim)

        def bound(outputs: Array) -> Array:
            q = self.family(outputs)
            return (log_joint(place(q, points)).mean(0) + q.entropy()).sum()

        def step(_: int, outputs: Array) -> Array:
            return outputs + self.spec.step_size * jax.grad(bound)(outputs)

        return self.family(jax.lax.fori_loop(0, self.spec.steps, step, outputs))


def place(q: dist.Distribution, points: Array) -> Array:
    """Standardised points as points of a Gaussian."""
    if isinstance(q, dist.Independent):
        return q.mean + jnp.sqrt(q.variance) * points
    return q.mean + (q.scale_tril @ points[..., None])[..., 0]
