"""The denoisers in torch, for Pyro. Feature maps are (N, channels, height, width) inside."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from elbozoo.zoo import denoisers as specs
from elbozoo.zoo.networks.networks_pyro import ACTIVATIONS, conv, linear


class GaussianDenoiser(nn.Module):
    def __init__(self, spec: specs.GaussianDenoiser, data_dim: int, num_outputs: int):
        super().__init__()
        self.spec = spec

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        return self.spec.expected_signal(z, log_snr)


class MLPDenoiser(nn.Module):
    def __init__(self, spec: specs.MLPDenoiser, data_dim: int, num_outputs: int):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        count, units = range(spec.num_layers), spec.units
        self.time = linear(2 * len(specs.FREQUENCIES), units)
        self.enter = linear(data_dim * (1 + 2 * len(spec.octaves)), units)
        self.hidden = nn.ModuleList([linear(units, units) for _ in count])
        self.times = nn.ModuleList([linear(units, units, bias=False) for _ in count])
        self.back = nn.ModuleList([zeroed(linear(units, units)) for _ in count])
        self.leave = zeroed(linear(units, num_outputs * data_dim))

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        level = functional.silu(self.time(specs.embed(log_snr)))
        x = self.enter(torch.cat(specs.fourier(z, self.spec.octaves), -1))
        for hidden, time, back in zip(self.hidden, self.times, self.back, strict=True):
            x = x + back(self.activation(hidden(x) + time(level)))
        return self.leave(self.activation(x))


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights that begin at 0."""
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    return layer


class UNet(nn.Module):
    def __init__(self, spec: specs.UNet, data_dim: int, num_outputs: int):
        super().__init__()
        self.spec, maps = spec, spec.channels
        signal, units, each = spec.image_shape[0] * spec.patch**2, 4 * maps[0], range(spec.num_blocks)
        finer, coarser = maps[:-1], maps[1:]
        self.time = linear(2 * len(specs.FREQUENCIES), units)
        self.enter = conv(signal * (1 + 2 * len(spec.octaves)), maps[0])
        self.down = nn.ModuleList([nn.ModuleList([Block(c, c, units) for _ in each]) for c in maps])
        self.shrink = nn.ModuleList([conv(*pair) for pair in zip(finer, coarser, strict=True)])
        self.middle = Block(maps[-1], maps[-1], units)
        self.grow = nn.ModuleList([conv(*pair) for pair in zip(coarser, finer, strict=True)])
        self.up = nn.ModuleList([nn.ModuleList([Block(2 * c, c, units) for _ in each]) for c in maps])
        self.norm = group_norm(maps[0])
        self.leave = zeroed(conv(maps[0], num_outputs * signal))

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        leading = z.shape[:-1]
        level = functional.silu(self.time(specs.embed(log_snr.expand(leading).reshape(-1))))
        x = functional.pixel_unshuffle(z.reshape(prod(leading), *self.spec.image_shape), self.spec.patch)
        x, seen = self.enter(torch.cat(specs.fourier(x, self.spec.octaves), 1)), []
        for i, blocks in enumerate(self.down):
            x = self.shrink[i - 1](functional.avg_pool2d(x, 2)) if i else x
            for block in blocks:  # type: ignore[union-attr]
                x = block(x, level)
                seen.append(x)
        x = self.middle(x, level)
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:  # type: ignore[union-attr]
                x = block(torch.cat([x, seen.pop()], 1), level)
            x = self.grow[i - 1](x.repeat_interleave(2, -2).repeat_interleave(2, -1)) if i else x
        x = self.leave(functional.silu(self.norm(x)))
        return functional.pixel_shuffle(x, self.spec.patch).reshape(*leading, -1)


class Block(nn.Module):
    """A residual block that is told the noise level."""

    def __init__(self, num_inputs: int, num_outputs: int, units: int):
        super().__init__()
        self.norms = nn.ModuleList([group_norm(num_inputs), group_norm(num_outputs)])
        self.convs = nn.ModuleList([conv(num_inputs, num_outputs), zeroed(conv(num_outputs, num_outputs))])
        self.time = linear(units, num_outputs, bias=False)
        self.skip = conv(num_inputs, num_outputs, size=1) if num_inputs != num_outputs else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.convs[0](functional.silu(self.norms[0](x))) + self.time(level)[..., None, None]
        h = self.convs[1](functional.silu(self.norms[1](h)))
        return h + self.skip(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(specs.group_count(channels), channels)
