"""p(x | z_0) in Pyro."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from elbozoo.zoo import diffusion as specs

_TOGETHER = 16  # levels in one array: all of them, for many data and particles, would fill the memory


class ExactNormal:
    def __init__(self, spec: specs.ExactNormal, narrow: bool = False):
        pass

    def __call__(self, z: Tensor, log_snr: Tensor) -> TorchDistribution:
        alpha, sigma = specs.scales(log_snr)
        return dist.Normal(z / alpha, sigma / alpha).to_event(1)


class DiscretizedNormal:
    def __init__(self, spec: specs.DiscretizedNormal, narrow: bool = False):
        self.levels, self.narrow = spec.levels, narrow

    def __call__(self, z: Tensor, log_snr: Tensor) -> TorchDistribution:
        alpha, sigma = specs.scales(log_snr)
        return NormalLevels(z / alpha, sigma / alpha, self.levels, self.narrow).to_event(1)


class NormalLevels(TorchDistribution):
    """Levels in [0, 1], each with the density that a normal distribution has at its place in [-1, 1], normalised.

    ``narrow``: the levels near its mean are all that count, see :func:`elbozoo.zoo.diffusion.is_narrow`.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.unit_interval

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, narrow: bool = False, *, validate_args: bool | None = None
    ):
        self.levels, self.narrow = levels, narrow
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(NormalLevels, _instance)
        new.levels, new.narrow, batch_shape = self.levels, self.narrow, torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(NormalLevels, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _logits(self, grid: Tensor) -> Tensor:
        return -0.5 * ((self.loc[..., None] - grid) / self.scale[..., None]) ** 2

    def _grid(self) -> Tensor:
        return torch.linspace(-1.0, 1.0, self.levels, dtype=self.loc.dtype, device=self.loc.device)

    @property
    def mean(self) -> Tensor:
        grid = self._grid()
        return self._logits(grid).softmax(-1) @ (0.5 * (grid + 1.0))

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            drawn = dist.Categorical(logits=self._logits(self._grid())).sample(torch.Size(sample_shape))
            return drawn.to(self.loc.dtype) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return -0.5 * ((self.loc - (2.0 * value - 1.0)) / self.scale) ** 2 - self._log_total()

    def _log_total(self) -> Tensor:
        if self.narrow:
            return specs.near(self.loc, self.scale, self.levels).logsumexp(-1)
        total = torch.full_like(self.loc, -torch.inf)
        for grid in self._grid().split(_TOGETHER):
            total = torch.logaddexp(total, self._logits(grid).logsumexp(-1))
        return total
