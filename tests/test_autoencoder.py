"""Autoencoder: what it is (a reconstruction), and that nothing takes it for a distribution of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from elbozoo.inference import (
    ELBO,
    IWAE,
    Adam,
    annealed_importance_sampling,
    bottleneck,
    calibrate,
    diagnose,
    evaluate,
    exact_log_lik,
    fit,
    gaps,
    ground_truth,
    to_arviz,
)
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import MLP, VAE, Autoencoder, Gaussian

TWINS = [Autoencoder(6, 3, MLP((5,))), Autoencoder(6, 3, MLP((5,)), Gaussian("learned"))]
X = np.random.default_rng(0).normal(size=(40, 5)) @ np.random.default_rng(1).normal(size=(5, 5))


def test_the_best_linear_one_is_pca(engine: str) -> None:
    """Baldi & Hornik 1989: least squares through two components leaves the sum of the other eigenvalues."""
    x = X - X.mean(0)
    spec = Autoencoder(5, 2, MLP(()), Gaussian(scale=1.0))
    options = {"optimizer": Adam(0.02), "epochs": 800, "batch_size": 40, "progress": False}
    run = fit(getattr(spec, engine)(), x, objective=ELBO(), **options)
    residual = np.linalg.svd(x, compute_uv=False)[2:] @ np.linalg.svd(x, compute_uv=False)[2:] / len(x)
    assert run.history[-1]["rate"] == 0
    np.testing.assert_allclose(run.history[-1]["bound"], -2.5 * np.log(2 * np.pi) - residual / 2, rtol=2e-3)


def test_its_bound_is_the_reconstructions_log_likelihood(engine: str) -> None:
    """The networks are the VAE's: what the VAE's decoder says of the data at the code."""
    from test_twins import random_weights

    spec = Autoencoder(6, 3, MLP((5,)))
    weights, x = random_weights(spec), (np.random.default_rng(0).random((4, 6)) < 0.5) * 1.0
    code = np.tanh(x @ weights["encoder.layers.0.weight"].T + weights["encoder.layers.0.bias"])
    code = code @ weights["encoder.layers.1.weight"].T + weights["encoder.layers.1.bias"]
    vae = getattr(VAE(6, 3, MLP((5,))), engine)()
    template = random_weights(VAE(6, 3, MLP((5,))))
    shared = {n: weights[n] if n.startswith("decoder") else a for n, a in template.items()}
    expected = vae.with_weights(shared).apply(log_lik, (x,), values={"z": code[None]})
    found = getattr(spec, engine)().with_weights(weights)
    for objective in (ELBO(), ELBO(analytic_kl=False), IWAE(3)):
        k = objective.num_particles
        bound = found.apply(objective.bound, (x,), num_particles=k, analytic_kl=objective.uses_analytic_kl)
        np.testing.assert_allclose(bound, expected[0], rtol=1e-11)


def log_lik(terms: Any) -> Any:
    return terms.log_lik


INSTRUMENTS = [
    evaluate, to_arviz, exact_log_lik, bottleneck, gaps, calibrate, diagnose, annealed_importance_sampling, ground_truth
]  # fmt: skip


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda fn: fn.__name__)
def test_no_instrument_takes_it_for_a_distribution(engine: str, instrument: Callable) -> None:
    program = getattr(Autoencoder(5, 2, MLP(()), Gaussian()), engine)()
    with pytest.raises(InvalidArgument, match=r"program must have a prior, to be measured.*; got Autoencoder.*VAE"):
        instrument(program, X)


def test_it_draws_no_data(engine: str) -> None:
    program = getattr(Autoencoder(5, 2), engine)()
    model = program.model
    if engine == "numpyro":
        from numpyro.handlers import seed

        model = seed(model, 0)
    with pytest.raises(InvalidArgument, match="site 'z' of an Autoencoder must be given: codes have no distribution"):
        model(size=3)


def test_its_prior_cannot_be_drawn_from(engine: str) -> None:
    from test_twins import random_weights

    program = getattr(TWINS[0], engine)().with_weights(random_weights(TWINS[0]))
    with pytest.raises(InvalidArgument, match="codes have no distribution to draw from"):
        program.predict((np.zeros((2, 6)),), prior=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dim": 0}, "data_dim must be a whole number of at least 1; got 0"),
        ({"latent_dim": 2.0}, "latent_dim must be a whole number of at least 1; got 2.0"),
        ({"network": MLP}, "network must be a Network; got"),
        ({"likelihood": None}, "likelihood must be a Likelihood; got None"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Autoencoder(**settings)
