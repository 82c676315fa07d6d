"""The networks in flax.nnx, for NumPyro."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from math import prod, sqrt
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jax import Array
from numpyro.contrib.module import nnx_module

from elbozoo.zoo import networks as specs

Weights = Mapping[Any, Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}


def network(name: str, build: Callable[[nnx.Rngs], nnx.Module]) -> Callable[..., Any]:
    """``nnx_module(name, build(rngs))``: the site ``<name>$params``, with the module built inside the program.

    Its initial weights come from the ``seed`` handler's key, so that one seed determines them and several seeds can be
    vmapped. Where the parameters are given, the initial ones are not even traced. A module without parameters makes no
    site.
    """
    key = numpyro.prng_key()
    blueprint = _blueprint_of(build)
    if blueprint is not None:
        graph, shapes = blueprint
        given = numpyro.param(f"{name}$params")
        if given is not None and jax.tree.structure(given) == jax.tree.structure(nnx.to_pure_dict(shapes)):
            return nnx_module(name, nnx.merge(graph, shapes, copy=True))
    module = build(nnx.Rngs(params=jax.random.key(0) if key is None else key))
    return nnx_module(name, module) if jax.tree.leaves(nnx.state(module, nnx.Param)) else cast(Callable, module)


def _blueprint_of(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any] | None:
    """What a module is without its weights; None where it keeps other numbers too, has no weights, or is not known."""
    if not isinstance(build, partial):
        return None
    key = (jnp.result_type(float), tuple(build.keywords.items()), build.func, *build.args)
    try:
        hash(key)
    except TypeError:
        return None
    return _blueprint(*key)


@lru_cache(maxsize=None, typed=True)  # 1, 1.0 and True are three arguments; the dtype is JAX's default at the time
def _blueprint(dtype: Any, keywords: tuple, make: Callable, *args: Any) -> tuple[Any, Any] | None:
    module = nnx.eval_shape(lambda: make(*args, nnx.Rngs(params=0), **dict(keywords)))
    graph, weights, others = nnx.split(module, nnx.Param, nnx.Not(nnx.Param))
    return (graph, weights) if jax.tree.leaves(weights) and not jax.tree.leaves(others) else None


def linear(num_inputs: int, num_outputs: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A dense layer with the initial weights the specs pin."""
    return nnx.Linear(
        num_inputs,
        num_outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.glorot_uniform(),
        bias_init=nnx.initializers.zeros_init(),
        param_dtype=jnp.result_type(float),
        rngs=rngs,
    )


def side_by_side(layer: nnx.Linear, parts: Sequence[Array]) -> Array:
    """The layer's outputs for inputs in parts. Parts broadcast after their products: one that many share costs one."""
    if len(parts) == 1:
        return layer(parts[0])
    ends = np.cumsum([part.shape[-1] for part in parts])
    first, *others = map(jnp.matmul, parts, jnp.split(layer.kernel[...], ends[:-1]))
    bias = layer.bias
    return sum(others, start=first if bias is None else first + bias[...])


def conv(num_inputs: int, num_outputs: int, stride: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3x3 convolution with padding 1 and the initial weights the specs pin."""
    return nnx.Conv(
        num_inputs,
        num_outputs,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        kernel_init=nnx.initializers.glorot_uniform(),
        bias_init=nnx.initializers.zeros_init(),
        param_dtype=jnp.result_type(float),
        rngs=rngs,
    )


class Convs(nnx.Module):
    """The weights of ``count`` equal convolutions, in torch's layout; of one, without the first axis, for None."""

    def __init__(self, count: int | None, num_inputs: int, num_outputs: int, size: int, gain: float, rngs: nnx.Rngs):
        lead, bound = () if count is None else (count,), gain * sqrt(6 / ((num_inputs + num_outputs) * size**2))
        shape = (*lead, num_outputs, num_inputs, size, size)
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.result_type(float), -bound, bound))
        self.bias = nnx.Param(jnp.zeros((*lead, num_outputs)))


def weights(module: nnx.Module) -> Weights:
    """The parameters of ``module``, as a tree of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def convolve(conv: Weights, x: Array) -> Array:
    """One convolution that keeps the height and width: a matrix product, three times as fast as XLA's on a CPU."""
    kernel, (height, width), size = conv["weight"], x.shape[1:3], conv["weight"].shape[-1]
    padded, shifts = jnp.pad(x, ((0, 0), *((size // 2, size // 2),) * 2, (0, 0))), range(size)
    seen = [padded[:, i : i + height, j : j + width] for i in shifts for j in shifts]
    kernel = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
    return (seen[0] if size == 1 else jnp.concatenate(seen, axis=-1)) @ kernel + conv["bias"]


class LayerNorm(nnx.Module):
    """As torch's, with its names; flax's own calls the weight ``scale``."""

    def __init__(self, num_units: int):
        self.weight = nnx.Param(jnp.ones(num_units))
        self.bias = nnx.Param(jnp.zeros(num_units))

    def __call__(self, x: Array) -> Array:
        return jax.nn.standardize(x, epsilon=1e-5) * self.weight + self.bias


class MLPEncoder(nnx.Module):
    def __init__(self, spec: specs.MLP, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[spec.activation]
        sizes = (num_inputs, *spec.hidden, num_outputs)
        self.layers = nnx.List([linear(*pair, rngs=rngs) for pair in pairwise(sizes)])
        gains = (*[spec.hidden_gain] * len(spec.hidden), spec.output_gain)
        for layer, gain in zip(self.layers, gains, strict=True):
            layer.kernel[...] = gain * layer.kernel[...]
        self.norms = nnx.List([LayerNorm(units) for units in spec.hidden if spec.normalization == "layer"])

    def features(self, *parts: Array) -> tuple[Array, ...]:
        """The last hidden layer; of none, the parts."""
        for i, layer in enumerate(self.layers[:-1]):
            x = side_by_side(layer, parts)
            parts = (self.activation(self.norms[i](x) if self.norms else x),)
        return parts

    def __call__(self, *parts: Array) -> Array:
        """The outputs for inputs that are given whole, or in parts whose leading dimensions broadcast."""
        return side_by_side(self.layers[-1], self.features(*parts))


class MLPRung(MLPEncoder):
    """One rung of a ladder: outputs and, for the next rung, the last hidden layer."""

    def __call__(self, x: Array) -> tuple[Array, Array]:
        (features,) = self.features(x)
        return self.layers[-1](features), features


class MLPDecoder(MLPEncoder):
    def __init__(self, spec: specs.MLP, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        super().__init__(replace(spec, hidden=spec.hidden[::-1]), num_inputs, num_outputs, rngs)


class ConvEncoder(nnx.Module):
    def __init__(self, spec: specs.Conv, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        maps = (spec.image_shape[0], *spec.channels)
        self.convs = nnx.List([conv(*pair, stride=2, rngs=rngs) for pair in pairwise(maps)])
        sizes = (prod(spec.reduced_shape), spec.hidden, num_outputs)
        self.layers = nnx.List([linear(*pair, rngs=rngs) for pair in pairwise(sizes)])

    def __call__(self, x: Array) -> Array:
        leading = x.shape[:-1]
        x = jnp.moveaxis(x.reshape(-1, *self.spec.image_shape), 1, -1)
        for layer in self.convs:
            x = self.activation(layer(x))
        x = jnp.moveaxis(x, -1, 1).reshape(*leading, -1)
        return self.layers[1](self.activation(self.layers[0](x)))


class ConvDecoder(nnx.Module):
    def __init__(self, spec: specs.Conv, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        sizes = (num_inputs, spec.hidden, prod(spec.reduced_shape))
        self.layers = nnx.List([linear(*pair, rngs=rngs) for pair in pairwise(sizes)])
        maps = (*spec.channels[::-1], num_outputs // prod(spec.image_shape[1:]))
        self.convs = nnx.List([conv(*pair, rngs=rngs) for pair in pairwise(maps)])

    def __call__(self, z: Array) -> Array:
        leading = z.shape[:-1]
        for layer in self.layers:
            z = self.activation(layer(z))
        z = jnp.moveaxis(z.reshape(-1, *self.spec.reduced_shape), 1, -1)
        *hidden, last = self.convs
        for layer in hidden:
            z = self.activation(layer(_double(z)))
        return jnp.moveaxis(last(_double(z)), -1, 1).reshape(*leading, -1)


class FullyConvEncoder(nnx.Module):
    def __init__(self, spec: specs.FullyConv, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        maps = (spec.image_shape[0], *spec.channels)
        last = conv(spec.channels[-1], spec.vector_dim(num_outputs), rngs=rngs)
        self.convs = nnx.List([*(conv(*pair, stride=2, rngs=rngs) for pair in pairwise(maps)), last])

    def __call__(self, x: Array) -> Array:
        leading = x.shape[:-1]
        x = jnp.moveaxis(x.reshape(-1, *self.spec.image_shape), 1, -1)
        *hidden, last = self.convs
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x).reshape(*leading, -1)


class FullyConvDecoder(nnx.Module):
    def __init__(self, spec: specs.FullyConv, num_inputs: int, num_outputs: int, rngs: nnx.Rngs):
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        first = conv(spec.vector_dim(num_inputs), spec.channels[-1], rngs=rngs)
        maps = (*spec.channels[::-1], num_outputs // prod(spec.image_shape[1:]))
        self.convs = nnx.List([first, *(conv(*pair, rngs=rngs) for pair in pairwise(maps))])

    def __call__(self, z: Array) -> Array:
        leading = z.shape[:-1]
        z = z.reshape(-1, *self.spec.map_shape, z.shape[-1] // self.spec.positions)
        first, *rest = self.convs
        z = first(z)
        for layer in rest:
            z = layer(_double(self.activation(z)))
        return jnp.moveaxis(z, -1, 1).reshape(*leading, -1)


def _double(x: Array) -> Array:
    return x.repeat(2, -3).repeat(2, -2)
