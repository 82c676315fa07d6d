"""The networks in torch, for Pyro."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from elbozoo.zoo import networks as specs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": partial(functional.softplus, threshold=40.0),  # exact to rounding in float64 too
}


def linear(num_inputs: int, num_outputs: int, bias: bool = True) -> nn.Linear:
    """A dense layer with the initial weights the specs pin."""
    layer = nn.Linear(num_inputs, num_outputs, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def side_by_side(layer: Any, parts: Sequence[Tensor]) -> Tensor:
    """The layer's outputs for inputs in parts. Parts broadcast after their products: one that many share costs one."""
    if len(parts) == 1:
        return layer(parts[0])
    weights = layer.weight.split([part.shape[-1] for part in parts], dim=1)
    first, *others = map(functional.linear, parts, weights)
    return sum(others, start=first + layer.bias)


def conv(num_inputs: int, num_outputs: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the height and width, but for its stride, and the initial weights the specs pin."""
    layer = nn.Conv2d(num_inputs, num_outputs, size, stride=stride, padding=size // 2)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class MLPEncoder(nn.Module):
    def __init__(self, spec: specs.MLP, num_inputs: int, num_outputs: int):
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        sizes = (num_inputs, *spec.hidden, num_outputs)
        layers = [linear(*pair) for pair in pairwise(sizes)]
        gains = (*[spec.hidden_gain] * len(spec.hidden), spec.output_gain)
        with torch.no_grad():
            for layer, gain in zip(layers, gains, strict=True):
                layer.weight.mul_(gain)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.LayerNorm(units) for units in spec.hidden if spec.normalization == "layer"])

    def features(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The last hidden layer; of none, the parts."""
        for i, layer in enumerate(self.layers[:-1]):
            x = side_by_side(layer, parts)
            parts = (self.activation(self.norms[i](x) if self.norms else x),)
        return parts

    def forward(self, *parts: Tensor) -> Tensor:
        """The outputs for inputs that are given whole, or in parts whose leading dimensions broadcast."""
        return side_by_side(self.layers[-1], self.features(*parts))


class MLPRung(MLPEncoder):
    """One rung of a ladder: outputs and, for the next rung, the last hidden layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (features,) = self.features(x)
        return self.layers[-1](features), features


class MLPDecoder(MLPEncoder):
    def __init__(self, spec: specs.MLP, num_inputs: int, num_outputs: int):
        super().__init__(replace(spec, hidden=spec.hidden[::-1]), num_inputs, num_outputs)


class ConvEncoder(nn.Module):
    def __init__(self, spec: specs.Conv, num_inputs: int, num_outputs: int):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        maps = (spec.image_shape[0], *spec.channels)
        self.convs = nn.ModuleList([conv(*pair, stride=2) for pair in pairwise(maps)])
        sizes = (prod(spec.reduced_shape), spec.hidden, num_outputs)
        self.layers = nn.ModuleList([linear(*pair) for pair in pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[:-1]
        x = x.reshape(-1, *self.spec.image_shape)
        for layer in self.convs:
            x = self.activation(layer(x))
        x = x.reshape(*leading, -1)
        return self.layers[1](self.activation(self.layers[0](x)))


class ConvDecoder(nn.Module):
    def __init__(self, spec: specs.Conv, num_inputs: int, num_outputs: int):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        sizes = (num_inputs, spec.hidden, prod(spec.reduced_shape))
        self.layers = nn.ModuleList([linear(*pair) for pair in pairwise(sizes)])
        maps = (*spec.channels[::-1], num_outputs // prod(spec.image_shape[1:]))
        self.convs = nn.ModuleList([conv(*pair) for pair in pairwise(maps)])

    def forward(self, z: Tensor) -> Tensor:
        leading = z.shape[:-1]
        for layer in self.layers:
            z = self.activation(layer(z))
        z = z.reshape(-1, *self.spec.reduced_shape)
        *hidden, last = self.convs
        for layer in hidden:
            z = self.activation(layer(_double(z)))
        return last(_double(z)).reshape(*leading, -1)


class FullyConvEncoder(nn.Module):
    def __init__(self, spec: specs.FullyConv, num_inputs: int, num_outputs: int):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        maps = (spec.image_shape[0], *spec.channels)
        last = conv(spec.channels[-1], spec.vector_dim(num_outputs))
        self.convs = nn.ModuleList([*(conv(*pair, stride=2) for pair in pairwise(maps)), last])

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[:-1]
        x = x.reshape(-1, *self.spec.image_shape)
        *hidden, last = self.convs
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x).movedim(1, -1).reshape(*leading, -1)


class FullyConvDecoder(nn.Module):
    def __init__(self, spec: specs.FullyConv, num_inputs: int, num_outputs: int):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        first = conv(spec.vector_dim(num_inputs), spec.channels[-1])
        maps = (*spec.channels[::-1], num_outputs // prod(spec.image_shape[1:]))
        self.convs = nn.ModuleList([first, *(conv(*pair) for pair in pairwise(maps))])

    def forward(self, z: Tensor) -> Tensor:
        leading = z.shape[:-1]
        z = z.reshape(-1, *self.spec.map_shape, z.shape[-1] // self.spec.positions).movedim(-1, 1)
        first, *rest = self.convs
        z = first(z)
        for layer in rest:
            z = layer(_double(self.activation(z)))
        return z.reshape(*leading, -1)


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
