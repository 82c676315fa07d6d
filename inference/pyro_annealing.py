"""Annealed importance sampling in Pyro: Hamiltonian transitions of all chains and data at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.ops.integrator import velocity_verlet
from torch.distributions import biject_to

from elbozoo.inference.latents import ChainState, LatentSpace, end_points
from elbozoo.inference.pyro_engine import Program


class Annealer:
    """See :class:`elbozoo.inference.annealing.annealed_importance_sampling`; one program on B data, K chains each.

    Args:
        program: a trained program.
        args: the data.
        start: "guide" or "prior".
        num_leapfrog: leapfrog steps a transition.
    """

    def __init__(self, program: Program, args: tuple, start: str, num_leapfrog: int):
        self.program, self.args, self.start, self.num_leapfrog = program, program._inputs(args), start, num_leapfrog
        self.space = LatentSpace(program.outline(args), len(args[0]), biject_to)

    def _densities(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``log π_0`` and ``log π_1`` at ``u``, ``(K, B)``."""
        values, log_det = self.space.constrain(u)
        terms = self.program.terms(self.args, num_particles=len(u), values=values)
        return end_points(terms, log_det, self.start)

    def _transition(self, state: ChainState, beta: float) -> tuple[ChainState, torch.Tensor]:
        """One Hamiltonian transition that leaves ``π_0^(1-β) π_1^β`` invariant, and each datum's acceptance."""

        def potential(z: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return -ChainState(z["u"], *self._densities(z["u"]), state.step_size).log_density(beta).sum()

        momentum, size = torch.randn_like(state.u), state.step_size[:, None]
        with torch.enable_grad():
            end: Any = velocity_verlet(
                {"u": state.u.detach().clone()}, {"u": momentum}, potential, dict, size, self.num_leapfrog
            )
        u, r = end[0]["u"].detach(), end[1]["u"]
        new = ChainState(u, *self._densities(u), state.step_size)
        energy = momentum.square().sum(-1) - r.square().sum(-1)
        log_ratio = new.log_density(beta) - state.log_density(beta) + 0.5 * energy
        log_ratio = torch.where(log_ratio.isfinite(), log_ratio, -torch.inf)  # a diverged trajectory is rejected
        accept = torch.rand_like(log_ratio).log() < log_ratio
        log_start, log_joint = (torch.where(accept, a, b) for a, b in zip(new[1:3], state[1:3], strict=True))
        state = ChainState(torch.where(accept[..., None], u, state.u), log_start, log_joint, state.step_size)
        return state, log_ratio.clamp(max=0.0).exp().mean(dim=0)

    # --- what annealing calls ---

    def begin(self, values: Mapping[str, np.ndarray], step_size: float) -> ChainState:
        """Chains at these latents ``(K, B, …)``."""
        with torch.no_grad(), self.program._running(0):
            u = self.space.unconstrain(dict(zip(values, self.program._inputs(tuple(values.values())), strict=True)))
            log_start, log_joint = self._densities(u)
            return ChainState(u, log_start, log_joint, u.new_full((u.shape[1],), step_size))

    def advance(
        self,
        state: ChainState,
        path: tuple[np.ndarray, np.ndarray, np.ndarray],
        *,
        seed: int,
        adapt: float,
        target: float,
    ) -> tuple[ChainState, np.ndarray, np.ndarray, np.ndarray]:
        """Weigh and move the chains along ``path``: changes of β ``(S,)``, βs ``(S,)``, step sizes ``(S, B)``.

        Args:
            adapt: how fast step sizes follow the acceptance; 0 takes those of ``path``.
            target: the acceptance they aim at.

        Returns: the state, log weights ``(K, B)`` of this path, step sizes and acceptances ``(S, B)``.
        """
        total, sizes, accepted = torch.zeros_like(state.log_joint), [], []
        with torch.no_grad(), self.program._running(seed):
            for change, beta, given in zip(*path, strict=True):
                total += float(change) * (state.log_joint - state.log_start)
                size = state.step_size if adapt > 0 else torch.as_tensor(given).to(state.step_size)
                state, acceptance = self._transition(state._replace(step_size=size), float(beta))
                state = state._replace(step_size=size * (adapt * (acceptance - target)).exp())
                sizes.append(size)
                accepted.append(acceptance)
        return state, total.cpu().numpy(), torch.stack(sizes).cpu().numpy(), torch.stack(accepted).cpu().numpy()

    def values(self, state: ChainState) -> dict[str, np.ndarray]:
        """The chains' latents."""
        with torch.no_grad():
            return {n: v.cpu().numpy() for n, v in self.space.constrain(state.u)[0].items()}
