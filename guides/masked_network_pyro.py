"""The network inside a flow, in torch: which entries of z each output depends on is up to masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, linear

from elbozoo.zoo.networks import networks_pyro as networks


class MaskedNetwork(nn.Module):
    """ELU layers with a mask (units, inputs) each; every unit of the first also sees the whole context."""

    def __init__(self, masks: list[np.ndarray], context_dim: int):
        super().__init__()
        self.context = networks.linear(context_dim, len(masks[0]), bias=False)
        self.layers = nn.ModuleList([networks.linear(mask.shape[1], mask.shape[0]) for mask in masks])

    def forward(self, context: Tensor, masks: list[np.ndarray]) -> Callable[[Tensor], Tensor]:
        """The outputs as a function of z, given the context: what does not depend on z is worked out once."""
        layers: Any = self.layers
        shift = self.context(context)
        on_device = [torch.from_numpy(mask).to(shift.device) for mask in masks]
        weights = [layer.weight * mask for layer, mask in zip(layers, on_device, strict=True)]
        first, *biases = (layer.bias for layer in layers)

        def outputs(z: Tensor) -> Tensor:
            z = linear(z, weights[0], first) + shift
            for weight, bias in zip(weights[1:], biases, strict=True):
                z = linear(elu(z), weight, bias)
            return z

        return outputs
