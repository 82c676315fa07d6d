"""The network inside a flow, in flax.nnx: which entries of z each output depends on is up to masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jax import Array
from jax.nn import elu

from elbozoo.zoo.networks import networks_numpyro as networks


class MaskedNetwork(nnx.Module):
    """ELU layers with a mask (units, inputs) each; every unit of the first also sees the whole context."""

    def __init__(self, masks: list[np.ndarray], context_dim: int, rngs: nnx.Rngs):
        self.context = networks.linear(context_dim, len(masks[0]), rngs, bias=False)
        self.layers = nnx.List([networks.linear(mask.shape[1], mask.shape[0], rngs) for mask in masks])

    def __call__(self, context: Array, masks: list[np.ndarray]) -> Callable[[Array], Array]:
        """The outputs as a function of z, given the context: what does not depend on z is worked out once."""
        layers: Any = self.layers
        shift = self.context(context)
        kernels = [layer.kernel[...] * mask.T for layer, mask in zip(layers, masks, strict=True)]
        first, *biases = (layer.bias[...] for layer in layers)

        def outputs(z: Array) -> Array:
            z = z @ kernels[0] + first + shift
            for kernel, bias in zip(kernels[1:], biases, strict=True):
                z = elu(z) @ kernel + bias
            return z

        return outputs
