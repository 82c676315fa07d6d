"""NUTS on one datum at a time, by Pyro: one chain after another, for programs without a twin in NumPyro."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.poutine.util import site_is_subsample

from elbozoo.inference.errors import NonFinite, must
from elbozoo.inference.pyro_engine import Program


class _FirstRows(poutine.messenger.Messenger):
    """A plate's subsample is a given of the model: Pyro's NUTS refuses one that it would have to draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"], msg["is_observed"] = torch.arange(len(msg["fn"]())), True


class Chains:
    """Chains on the posterior of one datum under a program's model, its weights fixed.

    Args:
        program: a trained Pyro program.
        num_warmup, num_draws, num_chains: steps of adaptation, draws a chain, chains.
    """

    sums_discrete = True  # Pyro's NUTS enumerates them

    def __init__(self, program: Program, num_warmup: int, num_draws: int, num_chains: int):
        self.program = program
        self.model = program.frozen().model
        self.num_warmup, self.num_draws, self.num_chains = num_warmup, num_draws, num_chains

    def run(self, args: tuple, seed: int, scale: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Draws from ``p(z | x)`` by site, ``(chains, draws, …)``, and the sampler's statistics ``(chains, draws)``.

        Args:
            args: the data of one datum.
            seed: equal arguments give equal draws.
            scale: factor on every log density of the model.
        """
        inputs = self.program._inputs(args)
        chains: list[dict[str, np.ndarray]] = []
        diverging = np.zeros((self.num_chains, self.num_draws), dtype=bool)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for chain in range(self.num_chains):
                mcmc = MCMC(
                    NUTS(poutine.scale(_FirstRows()(self.model), scale)),
                    num_samples=self.num_draws,
                    warmup_steps=self.num_warmup,
                    disable_progbar=True,
                )
                try:
                    mcmc.run(*inputs)
                except ValueError as error:
                    if "valid initial params" not in str(error):
                        raise
                    todo = "Look at the model's density there, and at that datum"
                    raise must("NUTS", "find latents of finite density", "none", todo, NonFinite) from error
                chains.append({name: z.detach().cpu().numpy() for name, z in mcmc.get_samples().items()})
                diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
        values = {name: np.stack([draws[name] for draws in chains]) for name in chains[0]}
        return values, {"diverging": diverging}
