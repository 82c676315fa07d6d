"""The priors in NumPyro: distributions of one latent vector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from elbozoo.zoo import priors as specs
from elbozoo.zoo.networks.networks_numpyro import network

Encode = Callable[[Array], dist.Distribution]


def prior(
    name: str, spec: specs.Prior, latent_dim: int, data_dim: int, unit_interval: bool
) -> Callable[..., dist.Distribution]:
    """The prior as a ``network``; a fixed one takes no key, so other draws do not depend on its being there."""
    build = partial(spec.form("numpyro"), spec, latent_dim, data_dim, unit_interval)
    return network(name, build) if spec.learned else build(nnx.Rngs(0))


class StandardNormal(nnx.Module):
    def __init__(self, spec: specs.StandardNormal, latent_dim: int, data_dim: int, unit_interval: bool, rngs: nnx.Rngs):
        self.latent_dim = latent_dim

    def __call__(self, encode: Encode | None = None) -> dist.Distribution:
        return dist.Normal(jnp.zeros(self.latent_dim), 1.0).to_event(1)


class MixturePrior(nnx.Module):
    def __init__(self, spec: specs.MixturePrior, latent_dim: int, data_dim: int, unit_interval: bool, rngs: nnx.Rngs):
        shape = (spec.num_components, latent_dim)
        self.logits = nnx.Param(jnp.zeros(spec.num_components))
        self.loc = nnx.Param(jax.random.normal(rngs.params(), shape) / sqrt(latent_dim))
        self.log_scale = nnx.Param(jnp.zeros(shape))

    def __call__(self, encode: Encode | None = None) -> dist.Distribution:
        components = dist.Normal(self.loc[...], jnp.exp(self.log_scale[...])).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits[...]), components)


class FlowPrior(nnx.Module):
    def __init__(self, spec: specs.FlowPrior, latent_dim: int, data_dim: int, unit_interval: bool, rngs: nnx.Rngs):
        self.outputs = nnx.Param(jnp.zeros(spec.flow.num_outputs(latent_dim)))
        self.flow = spec.flow.form("numpyro")(spec.flow, latent_dim, rngs)

    def __call__(self, encode: Encode | None = None) -> dist.Distribution:
        return self.flow(self.outputs[...])


class VampPrior(nnx.Module):
    def __init__(self, spec: specs.VampPrior, latent_dim: int, data_dim: int, unit_interval: bool, rngs: nnx.Rngs):
        self.spec, self.unit_interval = spec, unit_interval
        self.pseudo_inputs = nnx.Param(jax.random.normal(rngs.params(), (spec.num_components, data_dim)))

    def __call__(self, encode: Encode | None = None) -> dist.Distribution:
        u = self.pseudo_inputs[...]
        components = self.spec.encoder(encode)(jax.nn.sigmoid(u) if self.unit_interval else u)
        return dist.MixtureSameFamily(dist.Categorical(logits=jnp.zeros(len(u), u.dtype)), components)
