"""Distributions that NumPyro lacks and Pyro has."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

__all__ = ["OneHotCategorical", "one_hot"]


class _OneHot(constraints.ParameterFreeConstraint):
    """Vectors with a single 1 among zeros."""

    is_discrete = True
    event_dim = 1

    def __call__(self, x: ArrayLike) -> Array:
        x = jnp.asarray(x)
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)

    def feasible_like(self, prototype: ArrayLike) -> Array:
        return jnp.zeros_like(prototype).at[..., 0].set(1)


one_hot = _OneHot()


class OneHotCategorical(dist.Distribution):
    r"""A categorical variable as a one-hot vector, what ``pyro.distributions.OneHotCategorical`` is in Pyro.

    .. math:: \log p(z) = \sum_c z_c \log \mathrm{softmax}(l)_c

    Between the states ``log_prob`` is this same sum, their linear continuation: what a relaxation trains on.

    Shapes: logits l (..., C), any constant may be added to a row; batch shape (...), event shape (C,). Values have the
    type of the logits. Units: nats.
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support: constraints.Constraint = one_hot
    has_enumerate_support = True

    def __init__(self, logits: ArrayLike, *, validate_args: bool | None = None):
        if jnp.ndim(logits) < 1:
            raise ValueError("logits must have at least one dim, the categories'; got a number. Pass shape (..., C).")
        self.logits = logits
        super().__init__(jnp.shape(logits)[:-1], jnp.shape(logits)[-1:], validate_args=validate_args)

    def _state(self, index: Array) -> Array:
        return jax.nn.one_hot(index, self.event_shape[0], dtype=jnp.result_type(self.logits, float))

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        return self._state(jax.random.categorical(key, self.logits, shape=sample_shape + self.batch_shape))

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        log_probs = jax.nn.log_softmax(self.logits)
        return (value * log_probs.clip(jnp.finfo(log_probs.dtype).min)).sum(-1)  # not 0 times -inf

    @property
    def probs(self) -> Array:
        return jax.nn.softmax(self.logits)

    @property
    def mean(self) -> Array:
        return self.probs

    @property
    def variance(self) -> Array:
        return self.probs * (1 - self.probs)

    def entropy(self) -> Array:
        return dist.CategoricalLogits(self.logits).entropy()

    def enumerate_support(self, expand: bool = True) -> Array:
        num = self.event_shape[0]
        states = self._state(jnp.arange(num)).reshape((num,) + (1,) * len(self.batch_shape) + (num,))
        return jnp.broadcast_to(states, (num, *self.batch_shape, num)) if expand else states
