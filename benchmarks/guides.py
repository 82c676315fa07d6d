"""How many nats does each guide family lose where the posterior is strongly correlated and bent?

A decoder of fixed random weights, one tanh layer, maps four latents to three noisy observations, so that the posterior
is a thin bent sheet. On a few data of its own each family's guide is trained by the ELBO with the decoder held fixed.
For families with parameters of their own what amortisation still costs is then taken out by ``optimise_guide``, and
reported; for the flows it stays in. What remains is the approximation gap, ``log p(x) - ELBO``, with ``log p(x)`` by
importance sampling from the spline flow, which for the first seed is held against quadrature on a grid in all four
dimensions. One seed is one decoder, its data and one training; all families see the same. Expected: diagonal > low rank
> full covariance, as each holds the one before, and the flows below that.

    python benchmarks/guides.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats
from scipy.special import logsumexp

from elbozoo.benchmarks.records import Record
from elbozoo.guides import (
    DiagonalGaussian,
    Family,
    FullCovarianceGaussian,
    InverseAutoregressiveFlow,
    LowRankGaussian,
    MixtureOfGaussians,
    NeuralSplineFlow,
)
from elbozoo.inference import ELBO, STL, Adam, evaluate, fit, optimise_guide
from elbozoo.inference.arrays import cos
from elbozoo.zoo import MLP, VAE, Gaussian

Cells = Mapping[str, dict[str, Any]]

FAMILIES: dict[str, Family] = {
    "diagonal": DiagonalGaussian(),
    "low rank": LowRankGaussian(rank=1),
    "full covariance": FullCovarianceGaussian(),
    "mixture": MixtureOfGaussians(num_components=8),
    "autoregressive flow": InverseAutoregressiveFlow(num_flows=3, flow_hidden=(64,)),
    "spline flow": NeuralSplineFlow(num_flows=3, flow_hidden=(64,)),
}
"""Each family by the name it has in the table."""

LOCAL = ("diagonal", "low rank", "full covariance", "mixture")
"""Those with parameters of their own, which ``optimise_guide`` can move."""

ORDER = [("diagonal", "low rank"), ("low rank", "full covariance"), ("diagonal", "mixture")]
ORDER += [("full covariance", "autoregressive flow"), ("full covariance", "spline flow")]
"""Pairs of which the first loses more, whatever the model, or is expected to lose more on this one."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        num_seeds: seeds 0 … num_seeds - 1.
        families: of the guides, by their names in ``FAMILIES``; the spline flow is to be among them.
        data_dim, latent_dim: entries of a datum and of a latent.
        decoder_units: tanh units of the decoder.
        gain: standard deviation of a decoder unit's weights on each latent.
        noise: standard deviation of the observations.
        num_data: data of each seed.
        num_steps: of Adam, on all data at once, its step size falling to 0.
        learning_rate: the first step size.
        num_particles: of the training's ELBO (sticking-the-landing gradients).
        hidden: units of the encoder's two layers.
        local_steps: of the optimisation of each datum's own guide after.
        num_draws: draws a datum for each ELBO.
        num_importance: K for ``log p(x)``.
        grid_points, grid_end: of the quadrature: so many a dimension, from -grid_end to grid_end.
        results: JSON file to write and to go on from.
        smoke: a few seconds, to see that it runs.
    """

    num_seeds: int = 4
    families: tuple[str, ...] = tuple(FAMILIES)
    data_dim: int = 3
    latent_dim: int = 4
    decoder_units: int = 16
    gain: float = 0.7
    noise: float = 0.1
    num_data: int = 8
    num_steps: int = 2500
    learning_rate: float = 3e-3
    num_particles: int = 8
    hidden: int = 64
    local_steps: int = 300
    num_draws: int = 5000
    num_importance: int = 20_000
    grid_points: int = 101
    grid_end: float = 4.5
    results: Path = Path("benchmarks/results/guides.json")
    smoke: bool = False


def decoder(config: Config, seed: int) -> Any:
    """The program whose model has these fixed weights; its guide is not used."""
    rng = np.random.default_rng(seed)
    spec = VAE(config.data_dim, config.latent_dim, MLP((config.decoder_units,), "tanh"), Gaussian(config.noise))
    units, weights = config.decoder_units, {}
    weights["decoder.layers.0.weight"] = config.gain * rng.standard_normal((units, config.latent_dim))
    weights["decoder.layers.0.bias"] = rng.standard_normal(units)
    weights["decoder.layers.1.weight"] = rng.standard_normal((config.data_dim, units)) / math.sqrt(units)
    weights["decoder.layers.1.bias"] = np.zeros(config.data_dim)
    for t, shape in enumerate([(units, config.data_dim), (2 * config.latent_dim, units)]):
        weights |= {f"encoder.layers.{t}.weight": np.zeros(shape), f"encoder.layers.{t}.bias": np.zeros(shape[0])}
    return spec.numpyro().with_weights(weights)


def trained(config: Config, model: Any, family: Family, x: np.ndarray, seed: int) -> Any:
    """The fixed model with a guide of one family, trained: a program."""
    from elbozoo.inference.numpyro_engine import Program

    encoder = MLP((config.hidden,) * 2, "tanh")
    spec = VAE(config.data_dim, config.latent_dim, encoder, Gaussian(config.noise), family)
    program = Program(model.frozen().model_fn, spec.numpyro().guide_fn, spec)
    copies = max(config.num_steps // 100, 1)  # an epoch is one compiled loop: few long ones are faster

    def step_size(step: Any) -> Any:
        return config.learning_rate * 0.5 * (1.0 + cos(math.pi * step / config.num_steps))

    settings: dict[str, Any] = {"batch_size": len(x), "epochs": config.num_steps // copies, "progress": False}
    objective = ELBO(num_particles=config.num_particles, gradient=STL())
    data = np.tile(x, (copies, 1))
    return fit(program, data, objective=objective, optimizer=Adam(step_size), seed=seed, **settings).program


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Every family on one seed's model."""
    model = decoder(config, seed)
    x = data_of(config, model, seed)
    elbo, amortised, seconds = {}, {}, {}
    cell: dict[str, Any] = {"seed": seed, "elbo": elbo, "amortised_elbo": amortised, "seconds": seconds}
    for name in config.families:
        family, began = FAMILIES[name], time.perf_counter()
        program = trained(config, model, family, x, seed)
        seconds[name] = time.perf_counter() - began
        amortised[name] = elbo[name] = evaluate(program, x, num_particles=config.num_draws, seed=1).elbo
        if name in LOCAL:
            best = optimise_guide(program, x, num_steps=config.local_steps, seed=seed)
            elbo[name] = evaluate(best, x, num_particles=config.num_draws, seed=1).elbo
        if name == "spline flow":
            found = evaluate(program, x, num_particles=config.num_importance, seed=2)
            cell |= {"log_lik": -found.nll, "mc_se": found.nll_mc_se, "k_hat": found.per_datum.k_hat.tolist()}
    return cell


def data_of(config: Config, model: Any, seed: int) -> np.ndarray:
    """Data that the model generates, (num_data, data_dim)."""
    like = (np.zeros((config.num_data, config.data_dim), model.float_dtype),)
    return model.predict(like, seed=seed, prior=True)["observed"]["x"][0]


def quadrature(config: Config, seed: int) -> dict[str, Any]:
    """``log p(x)`` of one seed's data by the trapezoid rule, slab by slab of the first latent."""
    model = decoder(config, seed)
    x, weights = data_of(config, model, seed).astype(float), model.weights
    assert weights is not None
    w0, b0, w1, b1 = (weights[f"decoder.layers.{t}.{kind}"] for t in (0, 1) for kind in ("weight", "bias"))
    axis, step = np.linspace(-config.grid_end, config.grid_end, config.grid_points, retstep=True)
    rest = np.stack(np.meshgrid(*[axis] * (config.latent_dim - 1), indexing="ij"), -1).reshape(
        -1, config.latent_dim - 1
    )
    log_rest = -0.5 * (rest**2).sum(-1)
    total, in_rest = np.full(len(x), -np.inf), rest @ w0[:, 1:].T + b0
    for first in axis:
        mean = np.tanh(in_rest + first * w0[:, 0]) @ w1.T + b1
        for i, row in enumerate(x):
            log_joint = log_rest - 0.5 * first**2 - 0.5 * (((mean - row) / config.noise) ** 2).sum(-1)
            total[i] = np.logaddexp(total[i], logsumexp(log_joint))
    constant = config.latent_dim * (math.log(step) - 0.5 * math.log(2 * math.pi))
    constant -= config.data_dim * (math.log(config.noise) + 0.5 * math.log(2 * math.pi))
    return {"seed": seed, "log_lik": float(total.mean() + constant)}


def gap(cells: Cells, family: str) -> np.ndarray:
    """The approximation gap by seed, nats per datum."""
    return np.array([c["log_lik"] - c["elbo"][family] for c in cells.values()])


def amortisation(cells: Cells, family: str) -> np.ndarray:
    """What ``optimise_guide`` won, by seed, nats per datum; zeros for a family that it cannot move."""
    return np.array([c["elbo"][family] - c["amortised_elbo"][family] for c in cells.values()])


def interval(x: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return float(x.mean()), float(half)


def checks(cells: Cells, grid: Mapping[str, Any]) -> dict[str, bool]:
    """Each claim, and whether it held."""
    held = {}
    measured = next(iter(cells.values()))["elbo"]
    for worse, better in ORDER:
        if worse not in measured or better not in measured:
            continue
        mean, half = interval(gap(cells, worse) - gap(cells, better))
        held[f"{worse} loses more than {better} (95 % interval of the paired difference above 0)"] = bool(mean > half)
    first, exact = next(iter(cells.values())), grid["log_lik"]
    agree = abs(first["log_lik"] - exact) < 4 * first["mc_se"] + 1e-3
    held["log p(x) by importance sampling is that by quadrature within four standard errors"] = agree
    return held


def main(config: Config) -> None:
    """Measure every seed, then say which claims held."""
    if config.smoke:
        results = config.results.with_name("smoke_guides.json")
        small: dict[str, Any] = {"num_seeds": 1, "num_data": 4, "num_steps": 4, "hidden": 4, "local_steps": 2}
        small |= {"families": ("spline flow",)}
        config = replace(config, **small, num_draws=10, num_importance=20, grid_points=5, results=results, smoke=False)
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=("num_seeds", "families"))
    cells = {str(s): record.cell(f"seed {s}", lambda s=s: measure(config, s)) for s in range(config.num_seeds)}
    grid = record.cell("quadrature", lambda: quadrature(config, 0))
    found = checks(cells, grid)
    record.check(found)
    for name in config.families:
        print("{}: loses {:.3f} ± {:.3f}".format(name, *interval(gap(cells, name))))
    for claim, good in found.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
