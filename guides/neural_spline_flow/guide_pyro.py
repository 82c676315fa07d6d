"""The neural spline flow in Pyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, Transform
from torch import Tensor, nn
from zuko.transforms import MonotonicRQSTransform

from elbozoo.guides import neural_spline_flow as specs
from elbozoo.guides.masked_network_pyro import MaskedNetwork


class NeuralSplineFlow(nn.Module):
    def __init__(self, spec: specs.NeuralSplineFlow, latent_dim: int):
        super().__init__()
        self.spec, self.latent_dim = spec, latent_dim
        masks = [spec.masks(latent_dim, t) for t in range(spec.num_flows)]
        self.flows = nn.ModuleList([MaskedNetwork(mask, spec.context_dim) for mask in masks])

    def forward(self, outputs: Tensor) -> dist.TransformedDistribution:
        loc, log_scale, context = outputs.tensor_split((self.latent_dim, 2 * self.latent_dim), -1)
        standard = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        couplings = [self.coupling(t, context) for t in range(self.spec.num_flows)]
        place = AffineTransform(loc, log_scale.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(standard, [*couplings, place])

    def coupling(self, t: int, context: Tensor) -> Coupling:
        """The map t."""
        stay, move = self.spec.halves(self.latent_dim, t)
        network, bins = self.flows[t](context, self.spec.masks(self.latent_dim, t)), self.spec.num_bins

        def spline(z: Tensor) -> MonotonicRQSTransform:
            knots = network(z)
            knots = knots.reshape(*knots.shape[:-1], len(move), -1)
            parameters = knots.tensor_split((bins, 2 * bins), -1)
            return MonotonicRQSTransform(*parameters, bound=self.spec.bound, slope=specs.MIN_SLOPE)

        return Coupling(spline, stay, move)


class Coupling(Transform):
    """Some entries stay, the others move by splines that depend on those; a draw's log slope is kept."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, spline, stay: np.ndarray, move: np.ndarray):
        super().__init__(cache_size=1)
        self.spline, self.stay, self.move = spline, stay, move
        self.back = np.argsort(np.concatenate([stay, move]))

    def _call(self, x: Tensor) -> Tensor:
        moved, log_slope = self.spline(x).call_and_ladj(x[..., self.move])
        self.log_slope = log_slope.sum(-1)
        return self.join(x, moved)

    def _inverse(self, y: Tensor) -> Tensor:
        spline = self.spline(y)
        moved = spline.inv(y[..., self.move])
        self.log_slope = spline.call_and_ladj(moved)[1].sum(-1)
        return self.join(y, moved)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known, _ = self._cached_x_y
        if x is not known:
            self(x)
        return self.log_slope

    def join(self, x: Tensor, moved: Tensor) -> Tensor:
        """``x`` with its other entries replaced."""
        return torch.cat([x[..., self.stay], moved], -1)[..., self.back]
