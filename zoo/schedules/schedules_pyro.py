"""The learned schedule in torch, for Pyro."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor, nn

from elbozoo.inference.arrays import scale_gradient
from elbozoo.zoo import schedules as specs


def schedule(spec: specs.Schedule) -> Callable[..., tuple[Tensor, Tensor]]:
    """The schedule as a function of time; a module where it is learned."""
    return spec.form("pyro")(spec) if spec.learned else spec


class LearnedSchedule(nn.Module):
    def __init__(self, spec: specs.LearnedSchedule):
        super().__init__()
        self.spec = spec
        self.log_snr_max = nn.Parameter(torch.tensor(float(spec.log_snr_max)))
        self.log_span = nn.Parameter(torch.tensor(log(spec.log_snr_max - spec.log_snr_min)))
        self.log_linear = nn.Parameter(torch.zeros(()))
        self.log_height = nn.Parameter(torch.full((spec.schedule_units,), -3.0))
        self.log_steepness = nn.Parameter(torch.full((spec.schedule_units,), log(10.0)))
        self.center = nn.Parameter(
            (torch.arange(spec.schedule_units, dtype=torch.get_default_dtype()) + 0.5) / spec.schedule_units
        )

    def forward(self, t: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lost, slope = specs.monotone(t, self.log_linear, self.log_height, self.log_steepness, self.center)
        if factor is not None:
            lost, slope = scale_gradient(lost, factor), scale_gradient(slope, factor)
        highest, span = self.log_snr_max.clamp(max=specs.MOST), self.log_span.exp()
        if not self.spec.learn_ends:
            highest, span = highest.detach(), span.detach()
        return highest - span * lost, span * slope
