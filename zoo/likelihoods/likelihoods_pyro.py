"""The likelihoods in Pyro: decoder outputs in, distributions of x out."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from elbozoo.zoo import likelihoods as specs
from elbozoo.zoo.networks.networks_pyro import linear


class Bernoulli(nn.Module):
    def __init__(self, spec: specs.Bernoulli):
        super().__init__()

    def forward(self, outputs: Tensor) -> dist.Independent:
        return dist.Bernoulli(logits=outputs).to_event(1)


class AutoregressiveBernoulli(nn.Module):
    sees: Tensor
    seen: Tensor

    def __init__(self, spec: specs.AutoregressiveBernoulli):
        super().__init__()
        self.autoregression = nn.Parameter(torch.zeros(spec.data_dim, spec.data_dim))
        self.masked_units = spec.masked_units
        if spec.masked_units:
            self.hidden = linear(spec.data_dim, spec.masked_units)
            self.readout = linear(spec.masked_units, spec.data_dim, bias=False)
            for name, mask in zip(("sees", "seen"), spec.masks(), strict=True):
                self.register_buffer(name, torch.from_numpy(mask), persistent=False)

    def forward(self, outputs: Tensor) -> AutoregressiveLogits:
        direct = self.autoregression.tril(-1)
        if not self.masked_units:
            return AutoregressiveLogits(outputs, direct)
        hidden, readout = self.hidden.weight * self.sees, self.readout.weight * self.seen
        return AutoregressiveLogits(outputs, direct, hidden, self.hidden.bias, readout)


class ContinuousBernoulli(nn.Module):
    def __init__(self, spec: specs.ContinuousBernoulli):
        super().__init__()

    def forward(self, outputs: Tensor) -> dist.Independent:
        return ContinuousBernoulliLogits(outputs).to_event(1)


class Gaussian(nn.Module):
    def __init__(self, spec: specs.Gaussian):
        super().__init__()
        self.scale = spec.scale
        if spec.scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor) -> dist.Independent:
        if self.scale == "pixel":
            loc, log_scale = outputs.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)
        scale = self.log_scale.exp() if self.scale == "learned" else self.scale
        return dist.Normal(outputs, scale).to_event(1)


class DiscretizedLogistic(nn.Module):
    def __init__(self, spec: specs.DiscretizedLogistic):
        super().__init__()
        self.levels = spec.levels

    def forward(self, outputs: Tensor) -> dist.Independent:
        loc, log_scale = outputs.chunk(2, -1)
        return LogisticLevels(loc, log_scale, self.levels).to_event(1)


class AutoregressiveLogits(TorchDistribution):
    """Binary vectors, each entry given those before it; the spec has the mathematics, the matrices are masked here."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self,
        logits: Tensor,
        direct: Tensor,
        hidden: Tensor | None = None,
        bias: Tensor | None = None,
        readout: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.logits, self.direct, size = logits, direct, logits.shape[-1]
        self.hidden = direct.new_zeros(0, size) if hidden is None else hidden  # no hidden unit: no row
        self.bias = direct.new_zeros(0) if bias is None else bias
        self.readout = direct.new_zeros(size, 0) if readout is None else readout
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(AutoregressiveLogits, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.direct, new.hidden, new.bias, new.readout = self.direct, self.hidden, self.bias, self.readout
        super(AutoregressiveLogits, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
            logits, noise = self.logits.expand(shape), torch.rand(shape, dtype=self.logits.dtype).to(self.logits.device)
            total, entries = self.bias.expand(*shape[:-1], -1), []
            for i in range(shape[-1]):  # nothing in place: a traced step takes out draws that it has no use for
                conditional = logits[..., i] + total.tanh() @ self.readout[i]
                entries.append((noise[..., i] < conditional.sigmoid()).to(noise.dtype))
                logits = logits + entries[-1][..., None] * self.direct[:, i]
                total = total + entries[-1][..., None] * self.hidden[:, i]
            return torch.stack(entries, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        hidden = (value @ self.hidden.T + self.bias).tanh()
        conditional = self.logits + (value @ self.direct.T + hidden @ self.readout.T)
        return logsigmoid((2 * value - 1) * conditional).sum(-1)


class ContinuousBernoulliLogits(TorchDistribution):
    """The continuous Bernoulli by its logits; the spec's docstring has the mathematics."""

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(ContinuousBernoulliLogits, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(ContinuousBernoulliLogits, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        # The inverse of F(x) = expm1(l x) / expm1(l), at -|l| so that nothing overflows, mirrored where l > 0.
        logits, shape = self.logits, self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=logits.dtype, device=logits.device)
        flat = logits.abs() < 1e-3
        rate = torch.where(flat, -torch.ones_like(logits), -logits.abs())
        below = torch.log1p(torch.where(logits > 0, 1 - uniform, uniform) * torch.expm1(rate)) / rate
        curved = torch.where(logits > 0, 1 - below, below)
        return torch.where(flat, uniform + logits * uniform * (1 - uniform) / 2, curved).clamp(0.0, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u = self.logits.abs() / 2
        near = u < 0.1
        far = torch.where(near, torch.ones_like(u), u)  # keeps the branch not taken from giving NaN gradients
        exact = far + torch.log(-torch.expm1(-2 * far)) - torch.log(2 * far)
        square = torch.where(near, u, torch.zeros_like(u)) ** 2
        series = square / 6 - square**2 / 180 + square**3 / 2835 - square**4 / 37800
        return self.logits * (value - 0.5) - torch.where(near, series, exact)

    @property
    def mean(self) -> Tensor:
        u = self.logits / 2
        near = u.abs() < 0.1
        far = torch.where(near, torch.ones_like(u), u)
        series = u / 3 - u**3 / 45 + 2 * u**5 / 945 - u**7 / 4725
        return 0.5 + torch.where(near, series, 1 / torch.tanh(far) - 1 / far) / 2

    @property
    def variance(self) -> Tensor:
        u = self.logits.abs() / 2
        near = u < 0.1
        far = torch.where(near, torch.ones_like(u), u)
        csch_squared = 4 * torch.exp(-2 * far) / torch.expm1(-2 * far) ** 2
        series = 1 / 3 - u**2 / 15 + 2 * u**4 / 189 - u**6 / 675
        return torch.where(near, series, 1 / far**2 - csch_squared) / 4


class LogisticLevels(TorchDistribution):
    """A logistic distribution's mass on each of ``levels`` values in [0, 1]; the spec has the mathematics."""

    arg_constraints: ClassVar = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int = 256, *, validate_args: bool | None = None):
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return _Levels(self.levels)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(LogisticLevels, _instance)
        new.loc, new.log_scale = self.loc.expand(batch_shape), self.log_scale.expand(batch_shape)
        new.levels = self.levels
        super(LogisticLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            value = self.loc + self.log_scale.exp() * (torch.log(uniform) - torch.log1p(-uniform))
            return torch.round(value.clamp(0.0, 1.0) * (self.levels - 1)) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        precision = torch.exp(-self.log_scale)
        below = logsigmoid((value + half - self.loc) * precision)
        above = logsigmoid((self.loc - value + half) * precision)
        inner = below + above + torch.log(-torch.expm1(-2 * half * precision))
        return torch.where(value < half, below, torch.where(value > 1 - half, above, inner))

    @property
    def mean(self) -> Tensor:
        # E[k] is the sum over k >= 1 of P(level >= k); level by level, so that memory does not grow with levels.
        precision, steps = torch.exp(-self.log_scale), self.levels - 1
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - (k - 0.5) / steps) * precision)
        return total / steps

    @property
    def variance(self) -> Tensor:
        precision, steps = torch.exp(-self.log_scale), self.levels - 1
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            total = total + (2 * k - 1) * torch.sigmoid((self.loc - (k - 0.5) / steps) * precision)
        return total / steps**2 - self.mean**2


class _Levels(constraints.Constraint):
    """Multiples of 1 / (levels - 1) in [0, 1]."""

    is_discrete = True

    def __init__(self, levels: int):
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((steps - steps.round()).abs() <= specs.LEVEL_TOLERANCE)
