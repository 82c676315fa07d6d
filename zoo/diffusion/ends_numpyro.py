"""p(x | z_0) in NumPyro."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from elbozoo.zoo import diffusion as specs


class ExactNormal:
    def __init__(self, spec: specs.ExactNormal, narrow: bool = False):
        pass

    def __call__(self, z: Array, log_snr: Array) -> dist.Distribution:
        alpha, sigma = specs.scales(log_snr)
        return dist.Normal(z / alpha, sigma / alpha).to_event(1)


class DiscretizedNormal:
    def __init__(self, spec: specs.DiscretizedNormal, narrow: bool = False):
        self.levels, self.narrow = spec.levels, narrow

    def __call__(self, z: Array, log_snr: Array) -> dist.Distribution:
        alpha, sigma = specs.scales(log_snr)
        return NormalLevels(z / alpha, sigma / alpha, self.levels, self.narrow).to_event(1)


class NormalLevels(dist.Distribution):
    """Levels in [0, 1], each with the density that a normal distribution has at its place in [-1, 1], normalised.

    ``narrow``: the levels near its mean are all that count, see :func:`elbozoo.zoo.diffusion.is_narrow`.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    pytree_aux_fields = ("levels", "narrow")
    reparametrized_params: ClassVar = []

    def __init__(
        self, loc: Array, scale: Array, levels: int, narrow: bool = False, *, validate_args: bool | None = None
    ):
        self.levels, self.narrow = levels, narrow
        self.loc, self.scale = jnp.broadcast_arrays(loc, scale)
        super().__init__(batch_shape=self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.unit_interval

    @property
    def _logits(self) -> Array:
        grid = jnp.linspace(-1.0, 1.0, self.levels, dtype=jnp.result_type(self.loc))
        return -0.5 * ((self.loc[..., None] - grid) / self.scale[..., None]) ** 2

    @property
    def mean(self) -> Array:
        found = (jax.nn.softmax(self._logits) * jnp.linspace(0.0, 1.0, self.levels)).sum(-1)
        return jnp.broadcast_to(found, self.batch_shape)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        drawn = jax.random.categorical(key, self._logits, shape=sample_shape + self.batch_shape)
        return drawn / jnp.asarray(self.levels - 1, jnp.result_type(self.loc))

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        logits = specs.near(self.loc, self.scale, self.levels) if self.narrow else self._logits
        total = jax.nn.logsumexp(logits, -1)
        return -0.5 * ((self.loc - (2.0 * value - 1.0)) / self.scale) ** 2 - total
