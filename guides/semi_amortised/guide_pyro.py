"""The semi-amortised guide in Pyro: encoder outputs and a log joint in, a distribution of z out."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from elbozoo.guides import semi_amortised as specs


class SemiAmortised(nn.Module):
    def __init__(self, spec: specs.SemiAmortised, latent_dim: int):
        super().__init__()
        self.spec, self.latent_dim = spec, latent_dim
        self.family = spec.family.form("pyro")(spec.family, latent_dim)

    def forward(self, outputs: Tensor, log_joint: Callable[[Tensor], Tensor] | None = None) -> dist.TorchDistribution:
        if log_joint is None:
            raise specs.refuse_without_log_joint()
        points = torch.from_numpy(self.spec.points(self.latent_dim)).to(outputs)
        points = points.reshape(len(points), *(1,) * (outputs.dim() - 1), self.latent_dim)

        def bound(outputs: Tensor) -> Tensor:
            q = self.family(outputs)
            return (log_joint(place(q, points)).mean(0) + q.entropy()).sum()

        for _ in range(self.spec.steps):
            outputs = outputs + self.spec.step_size * torch.func.grad(bound)(outputs)
        return self.family(outputs)


def place(q: dist.TorchDistribution, points: Tensor) -> Tensor:
    """Standardised points as points of a Gaussian."""
    if isinstance(q, dist.Independent):
        return q.mean + q.stddev * points
    return q.mean + (q.scale_tril @ points.unsqueeze(-1)).squeeze(-1)
