"""The autoregressive guide's distribution in Pyro: each categorical latent given those before it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from elbozoo.zoo.categorical_vae import CategoricalVAE


class AutoregressivePosterior(nn.Module):
    """Logits (..., num_latents, num_categories), which the latents before each one shift, to q(z | x)."""

    allowed: Tensor

    def __init__(self, spec: CategoricalVAE):
        super().__init__()
        self.autoregression = nn.Parameter(torch.zeros(spec.num_codes, spec.num_codes))
        self.register_buffer("allowed", torch.from_numpy(spec.earlier()), persistent=False)

    def forward(self, logits: Tensor) -> AutoregressiveOneHot:
        return AutoregressiveOneHot(logits, self.autoregression * self.allowed)


class AutoregressiveOneHot(TorchDistribution):
    """One-hot vectors (n, C), each given those before it; the spec has the mathematics, the matrix is masked here."""

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real_vector, 1)}
    support = constraints.independent(constraints.one_hot, 1)

    def __init__(self, logits: Tensor, autoregression: Tensor, *, validate_args: bool | None = None):
        self.logits, self.autoregression = logits, autoregression
        super().__init__(logits.shape[:-2], logits.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(AutoregressiveOneHot, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits, new.autoregression = self.logits.expand(batch_shape + self.event_shape), self.autoregression
        super(AutoregressiveOneHot, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
            uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
            perturbed = self.logits - uniform.log().neg().log()  # the largest is category c as often as c's probability
            num_latents, num_categories = self.event_shape
            drawn = []
            for i in range(num_latents):  # nothing in place: a traced step takes out draws that it has no use for
                index = perturbed[..., i, :].argmax(-1, keepdim=True)
                drawn.append(torch.zeros_like(perturbed[..., i, :]).scatter(-1, index, 1.0))
                columns = self.autoregression[:, i * num_categories : (i + 1) * num_categories]
                perturbed = perturbed + (drawn[-1] @ columns.T).unflatten(-1, self.event_shape)
            return torch.stack(drawn, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shift = (1.0 * value.flatten(-2)) @ self.autoregression.T
        log_probs = (self.logits + shift.unflatten(-1, self.event_shape)).log_softmax(-1)
        return (value * log_probs).sum((-1, -2))
