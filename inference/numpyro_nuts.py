"""NUTS on one datum at a time, by NumPyro: chains side by side, compiled once for all data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.primitives import Messenger

from elbozoo.inference.numpyro_engine import Program

_STATISTICS = {
    "potential_energy": "lp",
    "energy": "energy",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "adapt_state.step_size": "step_size",
    "diverging": "diverging",
}
"""NumPyro's fields and ArviZ's names for them."""


class _FirstRows(Messenger):
    """A plate's subsample is a given of the model: NumPyro's NUTS refuses one that it would have to draw."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            msg["value"] = jnp.arange(msg["args"][1])


class Chains:
    """Chains on the posterior of one datum under a program's model, its weights fixed.

    Args:
        program: a trained NumPyro program.
        num_warmup, num_draws, num_chains: steps of adaptation, draws a chain, chains.
    """

    sums_discrete = False  # NumPyro sums discrete sites out with funsor alone

    def __init__(self, program: Program, num_warmup: int, num_draws: int, num_chains: int):
        self.program = program
        self.params = {**(program.params or {}), **(program.mutable or {})}
        # Parameters are arguments of what is compiled, so programs that differ in them alone share it.
        self.compiled = program.__dict__.setdefault("_compiled", {})
        self.sizes = (num_warmup, num_draws, num_chains)

    def _model(self, params: Mapping[str, Any]) -> Any:
        model = replace(self.program, params=dict(params), mutable=None).frozen().model
        return _FirstRows(model)

    def run(self, args: tuple, seed: int, scale: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Draws from ``p(z | x)`` by site, ``(chains, draws, …)``, and the sampler's statistics ``(chains, draws)``.

        Args:
            args: the data of one datum.
            seed: equal arguments give equal draws.
            scale: factor on every log density of the model.
        """
        if (key := ("nuts", *self.sizes)) not in self.compiled:
            num_warmup, num_draws, num_chains = self.sizes

            def compute(seed: Any, scale: Any, params: Any, args: tuple) -> Any:
                mcmc = MCMC(
                    NUTS(handlers.scale(self._model(params), scale)),
                    num_warmup=num_warmup,
                    num_samples=num_draws,
                    num_chains=num_chains,
                    chain_method="vectorized",
                    progress_bar=False,
                )
                mcmc.run(random.key(seed), *args, extra_fields=tuple(_STATISTICS))
                return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)

            self.compiled[key] = jax.jit(compute)
        values, fields = jax.tree.map(np.asarray, self.compiled[key](seed, scale, self.params, args))
        statistics = {name: fields[field] for field, name in _STATISTICS.items()}
        return values, statistics | {"lp": -statistics["lp"]}
