"""Drawing from a diffusion, and its flow, in torch; the flow is solved by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torchdiffeq import odeint

from elbozoo.zoo.diffusion import flow, step_back, step_without_noise
from elbozoo.zoo.diffusion.process_pyro import grid, noised


def draw(program: Any, num_data: int, sampler: str, num_steps: int, tolerance: float, seed: int) -> np.ndarray:
    with torch.no_grad(), program._running(seed):
        model = program.model
        z = torch.randn_like(model.origin.expand(num_data, -1))
        if sampler == "flow":
            (z,) = _solve(lambda log_snr, state: (_flow(model, log_snr, state[0]),), (z,), model, tolerance, True)
        else:
            z = _walk(model, z, model.schedule(grid(num_steps, z))[0], sampler)
        return model.decode(z).sample().cpu().numpy()


def flow_log_prob(program: Any, z: np.ndarray, num_probes: int | None, tolerance: float, seed: int) -> np.ndarray:
    with torch.no_grad(), program._running(seed):
        model, start = program.model, torch.as_tensor(z).to(program.model.origin)
        if num_probes is None:
            probes = torch.eye(start.shape[-1]).to(start).expand(len(start), -1, -1).movedim(1, 0)
        else:
            probes = torch.randint(0, 2, (num_probes, *start.shape)).to(start) * 2.0 - 1.0
        weight = 1.0 if num_probes is None else 1.0 / num_probes

        def both(log_snr: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = state[0].detach().requires_grad_()
                moved, trace = _flow(model, log_snr, z), start.new_zeros(len(start))
                for probe in probes:
                    (pulled,) = torch.autograd.grad(moved, z, probe, retain_graph=True)
                    trace = trace + weight * (probe * pulled).sum(-1)
            return moved.detach(), trace

        end, trace = _solve(both, (start, start.new_zeros(len(start))), model, tolerance)
        return (dist.Normal(0.0, 1.0).log_prob(end).sum(-1) + trace).cpu().numpy()


def end(program: Any, x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z_0 drawn given x, and ``log p(x | z_0) - log q(z_0 | x)``."""
    with torch.no_grad(), program._running(seed):
        data = torch.as_tensor(x).to(program.model.origin)
        log_snr = program.model.schedule(data.new_zeros(len(x)))[0]
        given = noised(program.spec.likelihood.signal(data), log_snr)
        z = given.sample()
        return z.cpu().numpy(), (program.model.decode(z).log_prob(data) - given.log_prob(z)).cpu().numpy()


def _flow(model: Any, log_snr: Tensor, z: Tensor) -> Tensor:
    now = log_snr.to(z.dtype).expand(z.shape[:-1])
    return flow(z, model.noise(z, now), now)


def _walk(model: Any, z: Tensor, log_snr: Tensor, sampler: str) -> Tensor:
    """Back from noise through these levels."""
    for s in reversed(range(len(log_snr) - 1)):
        now, then = (v.expand(z.shape[:-1]) for v in (log_snr[s + 1], log_snr[s]))
        said = model.noise(z, now)
        if sampler == "ddim":
            z = step_without_noise(z, said, now, then)
        else:
            loc, scale = step_back(z, said, now, then)
            z = loc + scale * torch.randn_like(z)
    return z


def _solve(
    field: Callable, state: tuple[Tensor, ...], model: Any, tolerance: float, backwards: bool = False
) -> tuple[Tensor, ...]:
    """The flow's solution from the data's end of the schedule to the noise's, or back."""
    ends = model.schedule(model.origin.new_tensor([1.0, 0.0] if backwards else [0.0, 1.0]))[0]
    return tuple(y[-1] for y in odeint(field, state, ends, rtol=tolerance, atol=tolerance, method="dopri5"))
