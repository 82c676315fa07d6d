"""The very deep hierarchical variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.nn import silu
from jax.typing import ArrayLike

from elbozoo.zoo.deep_hierarchical_vae import DeepHierarchicalVAE
from elbozoo.zoo.deep_hierarchical_vae.layers_numpyro import Layers, Residuals, repeat, residual
from elbozoo.zoo.networks.networks_numpyro import Convs, Weights, convolve, network, weights
from elbozoo.zoo.spec import plate_sizes


class Blocks(nnx.Module):
    """The generative weights of a group of blocks."""

    def __init__(self, spec: DeepHierarchicalVAE, count: int, rngs: nnx.Rngs):
        gain, sizes = sum(spec.blocks) ** -0.5, (spec.width, spec.hidden)
        self.prior = Residuals(count, *sizes, spec.width + 2 * spec.latent_channels, 0.0, rngs)
        self.project = Convs(count, spec.latent_channels, spec.width, 1, gain, rngs)
        self.residual = Residuals(count, *sizes, spec.width, gain, rngs)


class Generator(nnx.Module):
    """All weights of the generative path."""

    def __init__(self, spec: DeepHierarchicalVAE, rngs: nnx.Rngs):
        _, _, *coarsest = next(iter(spec.shapes.values()))
        self.start = nnx.Param(jnp.zeros((spec.width, *coarsest)))
        self.groups = nnx.List([Blocks(spec, count, rngs) for count in spec.blocks])
        num_outputs = spec.likelihood.num_outputs * spec.image_shape[0] * spec.patch**2
        self.output = Convs(None, spec.width, num_outputs, 3, 1.0, rngs)

    def __call__(self) -> Weights:
        return weights(self)


class Encoder(nnx.Module):
    """The weights that the guide has for itself."""

    def __init__(self, spec: DeepHierarchicalVAE, rngs: nnx.Rngs):
        gain, sizes = sum(spec.blocks) ** -0.5, (spec.hidden, 2 * spec.latent_channels)
        self.input = Convs(None, spec.image_shape[0] * spec.patch**2, spec.width, 3, 1.0, rngs)
        self.residuals = nnx.List(
            [Residuals(count, spec.width, spec.hidden, spec.width, gain, rngs) for count in spec.blocks]
        )
        self.posteriors = nnx.List([Residuals(count, 2 * spec.width, *sizes, gain, rngs) for count in spec.blocks])

    def __call__(self) -> Weights:
        return weights(self)


class Model:
    """p(z_G) ... p(z_1 | z_2 ... z_G) p(x | z)."""

    def __init__(self, spec: DeepHierarchicalVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")

    def generator(self) -> Weights:
        """The weights of the generative path."""
        return network(self.prefix + "generator", partial(Generator, self.spec))()

    def start(self, generator: Weights, batch: int) -> Array:
        """The path's first state, (batch, height, width, width)."""
        start = jnp.moveaxis(generator["start"], 0, -1)
        return jnp.broadcast_to(start, (batch, *start.shape))

    def decode(self, generator: Weights, state: Array) -> dist.Distribution:
        """p(x | z) given the path's last state (..., height, width, width); its mean is the reconstruction."""
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, self.spec.likelihood))
        *lead, height, width, channels = state.shape
        outputs = convolve(generator["output"], silu(state.reshape(-1, height, width, channels)))
        outputs = outputs.reshape(len(outputs), height, width, -1, self.spec.patch, self.spec.patch)
        return likelihood(outputs.transpose(0, 3, 1, 4, 2, 5).reshape(*lead, -1))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        generator = self.generator()
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            state = self.start(generator, batch)
            for group, site in enumerate(self.spec.shapes):
                state = double(state) if group else state
                prior = Layers(generator["groups"][group], state, remat=self.spec.remat)
                state = prior.state(numpyro.sample(site, prior.to_event(1)))
            return numpyro.sample("x", self.decode(generator, state), obs=x)


class Guide:
    """q(z_G | x) ... q(z_1 | z_2 ... z_G, x), along the model's path."""

    def __init__(self, spec: DeepHierarchicalVAE, model: Model, name: str = ""):
        self.spec, self.name, self.path = spec, name, model
        self.prefix = f"{name}." if name else ""

    def encoder(self) -> Weights:
        """The weights that are the guide's alone."""
        return network(self.prefix + "encoder", partial(Encoder, self.spec))()

    def encode(self, encoder: Weights, x: ArrayLike) -> list[Array]:
        """The features (..., height, width, width) of x (..., data_dim) at each resolution, from the coarsest."""
        x, (channels, *_) = jnp.asarray(x), self.spec.image_shape
        (_, _, height, width), patch = self.spec.shapes["z1"], self.spec.patch
        pixels = (2 * x - 1).reshape(-1, channels, height, patch, width, patch).transpose(0, 2, 4, 1, 3, 5)
        state, features = convolve(encoder["input"], pixels.reshape(*pixels.shape[:3], -1)), []

        def block(state: Array, net: Weights) -> tuple[Array, None]:
            return state + residual(net, state), None

        for group in reversed(range(len(self.spec.blocks))):
            nets, count = encoder["residuals"][group], self.spec.blocks[group]
            state = repeat(block, state, nets, count, self.spec.remat)[0]
            features.append(state.reshape(*x.shape[:-1], *state.shape[1:]))
            state = halve(state) if group else state
        return features[::-1]

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z given x. Returns z1."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        generator, encoder = self.path.generator(), self.encoder()
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            features, state = self.encode(encoder, x), self.path.start(generator, batch)
            for group, site in enumerate(self.spec.shapes):
                state = double(state) if group else state
                moved = encoder["posteriors"][group], features[group]
                posterior = Layers(generator["groups"][group], state, *moved, remat=self.spec.remat)
                z = numpyro.sample(site, posterior.to_event(1))
                state = posterior.state(z)
            return z


def double(x: Array) -> Array:
    """Every position of (..., height, width, channels) twice in height and width."""
    return x.repeat(2, -3).repeat(2, -2)


def halve(x: Array) -> Array:
    """Means over 2 x 2 positions of (N, height, width, channels)."""
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))
