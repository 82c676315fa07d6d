"""The very deep hierarchical variational autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle, silu
from torch.utils.checkpoint import checkpoint

from elbozoo.zoo.deep_hierarchical_vae import DeepHierarchicalVAE
from elbozoo.zoo.deep_hierarchical_vae.layers_pyro import (
    Convs,
    Layers,
    Residuals,
    as_it_is,
    convolve,
    residual,
    unstack,
)
from elbozoo.zoo.spec import plate_sizes


class Blocks(nn.Module):
    """The generative weights of a group of blocks."""

    def __init__(self, spec: DeepHierarchicalVAE, count: int):
        super().__init__()
        gain, sizes = sum(spec.blocks) ** -0.5, (spec.width, spec.hidden)
        self.prior = Residuals(count, *sizes, spec.width + 2 * spec.latent_channels, 0.0)
        self.project = Convs(count, spec.latent_channels, spec.width, 1, gain)
        self.residual = Residuals(count, *sizes, spec.width, gain)


class Generator(nn.Module):
    """All weights of the generative path."""

    def __init__(self, spec: DeepHierarchicalVAE):
        super().__init__()
        _, _, *coarsest = next(iter(spec.shapes.values()))
        self.start = nn.Parameter(torch.zeros(spec.width, *coarsest))
        self.groups = nn.ModuleList([Blocks(spec, count) for count in spec.blocks])
        num_outputs = spec.likelihood.num_outputs * spec.image_shape[0] * spec.patch**2
        self.output = Convs(None, spec.width, num_outputs, 3, 1.0)


class Encoder(nn.Module):
    """The weights that the guide has for itself."""

    def __init__(self, spec: DeepHierarchicalVAE):
        super().__init__()
        gain, sizes = sum(spec.blocks) ** -0.5, (spec.hidden, 2 * spec.latent_channels)
        self.input = Convs(None, spec.image_shape[0] * spec.patch**2, spec.width, 3, 1.0)
        self.residuals = nn.ModuleList(
            [Residuals(count, spec.width, spec.hidden, spec.width, gain) for count in spec.blocks]
        )
        self.posteriors = nn.ModuleList([Residuals(count, 2 * spec.width, *sizes, gain) for count in spec.blocks])


class Model(PyroModule):
    """p(z_G) ... p(z_1 | z_2 ... z_G) p(x | z)."""

    def __init__(self, spec: DeepHierarchicalVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.generator = Generator(spec)

    @staticmethod
    def start(generator: Generator, batch: int) -> Tensor:
        """The path's first state, (batch, width, height, width)."""
        return as_it_is(generator.start).expand(batch, *generator.start.shape)

    def decode(self, generator: Generator, state: Tensor) -> dist.TorchDistribution:
        """p(x | z) given the path's last state (..., width, height, width); its mean is the reconstruction."""
        outputs = convolve(dict(generator.output.named_parameters()), "", silu(state.reshape(-1, *state.shape[-3:])))
        return self.likelihood(pixel_shuffle(outputs, self.spec.patch).reshape(*state.shape[:-3], -1))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        generator = self.generator
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            state = self.start(generator, batch)
            for group, site in enumerate(self.spec.shapes):
                state = double(state) if group else state
                prior = Layers(unstack(generator.groups[group]), state, remat=self.spec.remat)
                state = prior.state(pyro.sample(site, prior.to_event(1)))
            return pyro.sample("x", self.decode(generator, state), obs=x)


class Guide(PyroModule):
    """q(z_G | x) ... q(z_1 | z_2 ... z_G, x), along the model's path."""

    def __init__(self, spec: DeepHierarchicalVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.generator = model.generator
        self.encoder = Encoder(spec)

    def encode(self, encoder: Encoder, x: Tensor) -> list[Tensor]:
        """The features (..., width, height, width) of x (..., data_dim) at each resolution, from the coarsest."""
        pixels = pixel_unshuffle((2 * x - 1).reshape(-1, *self.spec.image_shape), self.spec.patch)
        state, features = convolve(dict(encoder.input.named_parameters()), "", pixels), []
        for group in reversed(range(len(self.spec.blocks))):
            for net in unstack(encoder.residuals[group]):
                if self.spec.remat and torch.is_grad_enabled():
                    state = state + checkpoint(residual, net, "", state, use_reentrant=False, preserve_rng_state=False)
                else:
                    state = state + residual(net, "", state)
            features.append(state.reshape(*x.shape[:-1], *state.shape[1:]))
            state = avg_pool2d(state, 2) if group else state
        return features[::-1]

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z given x. Returns z1."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        generator, encoder = self.generator, self.encoder
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            features, state = self.encode(encoder, x), Model.start(generator, batch)
            for group, site in enumerate(self.spec.shapes):
                state = double(state) if group else state
                moved = unstack(encoder.posteriors[group]), features[group]
                posterior = Layers(unstack(generator.groups[group]), state, *moved, remat=self.spec.remat)
                z = pyro.sample(site, posterior.to_event(1))
                state = posterior.state(z)
            return z


def double(x: Tensor) -> Tensor:
    """Every position of (..., channels, height, width) twice in height and width."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
