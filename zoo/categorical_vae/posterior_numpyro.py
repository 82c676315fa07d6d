"""The autoregressive guide's distribution in NumPyro: each categorical latent given those before it."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from elbozoo.inference.numpyro_distributions import one_hot
from elbozoo.zoo.categorical_vae import CategoricalVAE


class AutoregressivePosterior(nnx.Module):
    """Logits (..., num_latents, num_categories), which the latents before each one shift, to q(z | x)."""

    def __init__(self, spec: CategoricalVAE, rngs: nnx.Rngs):
        self.spec = spec
        self.autoregression = nnx.Param(jnp.zeros((spec.num_codes, spec.num_codes)))

    def __call__(self, logits: Array) -> AutoregressiveOneHot:
        return AutoregressiveOneHot(logits, self.autoregression[...] * self.spec.earlier())


class AutoregressiveOneHot(dist.Distribution):
    """One-hot vectors (n, C), each given those before it; the spec has the mathematics, the matrix is masked here."""

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real_vector, 1)}
    support = constraints.independent(one_hot, 1)
    pytree_data_fields = ("autoregression",)

    def __init__(self, logits: Array, autoregression: Array, *, validate_args: bool | None = None):
        self.logits, self.autoregression = logits, autoregression
        super().__init__(jnp.shape(logits)[:-2], jnp.shape(logits)[-2:], validate_args=validate_args)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape, dtype = sample_shape + self.batch_shape + self.event_shape, jnp.result_type(self.logits)
        num_latents, num_categories = self.event_shape
        noise = jax.random.gumbel(key, shape, dtype)  # the largest is category c as often as c's probability
        columns = self.autoregression.reshape(-1, num_latents, num_categories)

        def draw(i, state):
            perturbed, z = state
            one = jax.nn.one_hot(jnp.argmax(perturbed[..., i, :], -1), num_categories, dtype=dtype)
            shift = (one @ columns[:, i].T).reshape(shape)
            return perturbed + shift, z.at[..., i, :].set(one)

        start = jnp.broadcast_to(self.logits, shape) + noise, jnp.zeros(shape, dtype)
        return jax.lax.fori_loop(0, num_latents, draw, start)[1]

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        shift = value.reshape(*value.shape[:-2], -1) @ self.autoregression.T
        log_probs = jax.nn.log_softmax(self.logits + shift.reshape(value.shape))
        return (value * log_probs).sum((-1, -2))
