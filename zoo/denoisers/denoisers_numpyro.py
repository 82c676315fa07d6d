"""The denoisers in flax.nnx, for NumPyro. Feature maps are (N, height, width, channels) inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from elbozoo.zoo import denoisers as specs
from elbozoo.zoo.networks.networks_numpyro import ACTIVATIONS, Convs, convolve, linear, weights


class GaussianDenoiser(nnx.Module):
    def __init__(self, spec: specs.GaussianDenoiser, data_dim: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec = spec

    def __call__(self, z: Array, log_snr: Array) -> Array:
        return self.spec.expected_signal(z, log_snr)


class MLPDenoiser(nnx.Module):
    def __init__(self, spec: specs.MLPDenoiser, data_dim: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        count, units = range(spec.num_layers), spec.units
        self.time = linear(2 * len(specs.FREQUENCIES), units, rngs)
        self.enter = linear(data_dim * (1 + 2 * len(spec.octaves)), units, rngs)
        self.hidden = nnx.List([linear(units, units, rngs) for _ in count])
        self.times = nnx.List([linear(units, units, rngs, bias=False) for _ in count])
        self.back = nnx.List([zeroed(linear(units, units, rngs)) for _ in count])
        self.leave = zeroed(linear(units, num_outputs * data_dim, rngs))

    def __call__(self, z: Array, log_snr: Array) -> Array:
        level = jax.nn.silu(self.time(specs.embed(log_snr)))
        x = self.enter(jnp.concatenate(specs.fourier(z, self.spec.octaves), -1))
        for hidden, time, back in zip(self.hidden, self.times, self.back, strict=True):
            x = x + back(self.activation(hidden(x) + time(level)))
        return self.leave(self.activation(x))


def zeroed(layer: nnx.Linear) -> nnx.Linear:
    """The layer with weights that begin at 0."""
    layer.kernel[...] = 0.0 * layer.kernel[...]
    return layer


class UNet(nnx.Module):
    def __init__(self, spec: specs.UNet, data_dim: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, maps = spec, spec.channels
        signal, units, each = spec.image_shape[0] * spec.patch**2, 4 * maps[0], range(spec.num_blocks)
        finer, coarser = maps[:-1], maps[1:]
        self.time = linear(2 * len(specs.FREQUENCIES), units, rngs)
        self.enter = Convolution(signal * (1 + 2 * len(spec.octaves)), maps[0], rngs)
        self.down = nnx.List([nnx.List([Block(c, c, units, rngs) for _ in each]) for c in maps])
        self.shrink = nnx.List([Convolution(*pair, rngs) for pair in zip(finer, coarser, strict=True)])
        self.middle = Block(maps[-1], maps[-1], units, rngs)
        self.grow = nnx.List([Convolution(*pair, rngs) for pair in zip(coarser, finer, strict=True)])
        self.up = nnx.List([nnx.List([Block(2 * c, c, units, rngs) for _ in each]) for c in maps])
        self.norm = GroupNorm(maps[0])
        self.leave = Convolution(maps[0], num_outputs * signal, rngs, gain=0.0)

    def __call__(self, z: Array, log_snr: Array) -> Array:
        leading = z.shape[:-1]
        level = jax.nn.silu(self.time(specs.embed(jnp.broadcast_to(log_snr, leading).reshape(-1))))
        x = jnp.moveaxis(_folded(z.reshape(-1, *self.spec.image_shape), self.spec.patch), 1, -1)
        x, seen = self.enter(jnp.concatenate(specs.fourier(x, self.spec.octaves), -1)), []
        for i, blocks in enumerate(self.down):
            x = self.shrink[i - 1](_halve(x)) if i else x
            for block in blocks:
                x = block(x, level)
                seen.append(x)
        x = self.middle(x, level)
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:
                x = block(jnp.concatenate([x, seen.pop()], -1), level)
            x = self.grow[i - 1](x.repeat(2, -3).repeat(2, -2)) if i else x
        x = self.leave(jax.nn.silu(self.norm(x)))
        return _unfolded(jnp.moveaxis(x, -1, 1), self.spec.patch).reshape(*leading, -1)


class Block(nnx.Module):
    """A residual block that is told the noise level."""

    def __init__(self, num_inputs: int, num_outputs: int, units: int, rngs: nnx.Rngs):
        self.norms = nnx.List([GroupNorm(num_inputs), GroupNorm(num_outputs)])
        self.convs = nnx.List(
            [Convolution(num_inputs, num_outputs, rngs), Convolution(num_outputs, num_outputs, rngs, gain=0.0)]
        )
        self.time = linear(units, num_outputs, rngs, bias=False)
        if num_inputs != num_outputs:
            self.skip = Convolution(num_inputs, num_outputs, rngs, size=1)

    def __call__(self, x: Array, level: Array) -> Array:
        h = self.convs[0](jax.nn.silu(self.norms[0](x))) + self.time(level)[:, None, None]
        h = self.convs[1](jax.nn.silu(self.norms[1](h)))
        return h + (self.skip(x) if hasattr(self, "skip") else x)


class Convolution(Convs):
    """A convolution that keeps the height and width, in torch's layout."""

    def __init__(self, num_inputs: int, num_outputs: int, rngs: nnx.Rngs, size: int = 3, gain: float = 1.0):
        super().__init__(None, num_inputs, num_outputs, size, gain, rngs)

    def __call__(self, x: Array) -> Array:
        return convolve(weights(self), x)


class GroupNorm(nnx.Module):
    """As torch's, with its names."""

    def __init__(self, channels: int):
        self.groups = specs.group_count(channels)
        self.weight, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        grouped = jax.nn.standardize(grouped, axis=(-4, -3, -1), epsilon=1e-5)
        return grouped.reshape(x.shape) * self.weight + self.bias


def _folded(x: Array, side: int) -> Array:
    """Squares of (N, channels, height, width) as channels, in the order of torch's ``pixel_unshuffle``."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // side, side, width // side, side)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, channels * side**2, height // side, width // side)


def _unfolded(x: Array, side: int) -> Array:
    """The inverse of :func:`_folded`."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels // side**2, side, side, height, width)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, channels // side**2, height * side, width * side)


def _halve(x: Array) -> Array:
    """Means of squares of four."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
