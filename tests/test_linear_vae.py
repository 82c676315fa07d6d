"""The linear β-VAE, trained, is where the closed form says: its information bottleneck is known direction by direction.

The data's sample covariance *is* the target (they are whitened exactly), so nothing but optimisation separates a trained
program from the optimum. Every figure is computed from the trained weights by linear algebra, without Monte Carlo, and in
quantities that no rotation of the latents changes; the diagonal guide also has to find the principal axes themselves, because
only there is a diagonal posterior exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import covering
from scipy.stats import multivariate_normal

from elbozoo.inference import ELBO, Beta, Run, fit
from elbozoo.zoo import LinearVAE
from elbozoo.zoo.linear_vae import (
    active_unit_statistic,
    kl_per_direction,
    learned_variance,
    posterior_variance,
    squared_error,
)

EIGENVALUES = np.array([9.0, 3.0, 1.0, 0.3, 0.1])
LATENTS = 4  # the fifth direction has no latent to serve it
AXES = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]  # columns: the principal directions
MEAN = np.array([1.0, -2.0, 0.0, 3.0, 0.5])

# What Adam leaves, in nats and in units of the prior's variance: the gradient has the noise of one latent draw for each of
# 3000 data, and the learning rate goes to 0 over 1500 steps (1200 in Pyro). Over four seeds and five (β, σ²) the largest error was 0.003
# (NumPyro) and 0.005 (Pyro) in a KL, 0.007 in an activity. A KL is half the logarithm of an error's ratio,
# so a squared error may be off by twice as much, relatively; it was by 0.005 and 0.010.
TOLERANCE = 0.01


def whitened(num_data: int = 3000) -> np.ndarray:
    """Data whose sample mean and sample covariance (divided by N) are exactly MEAN and the target."""
    noise = np.random.default_rng(0).normal(size=(num_data, 5))
    basis = np.linalg.svd(noise - noise.mean(axis=0), full_matrices=False)[0]
    return MEAN + np.sqrt(num_data * EIGENVALUES) * basis @ AXES.T


DATA = whitened()


@dataclass(frozen=True)
class Linear:
    """A learning rate that falls to 0 in a straight line."""

    start: float
    steps: int

    def __call__(self, step: Any) -> Any:
        return self.start * (1.0 - step / self.steps)


def train(engine: str, spec: LinearVAE, beta: float, steps: int, seed: int = 0) -> Run:
    """Full batches, fifty steps an epoch: one compiled loop."""
    steps = steps // 50 * 50
    options: dict[str, Any] = {
        "epochs": steps // 50,
        "epoch_steps": 50,
        "batch_size": len(DATA),
        "learning_rate": Linear(0.1, steps),
    }
    return fit(getattr(spec, engine)(), DATA, objective=Beta(ELBO(), beta), seed=seed, progress=False, **options)


@dataclass(frozen=True)
class Bottleneck:
    """What the weights say, in quantities that no rotation of the latents changes, largest information first.

    The means of q(z|x) have covariance ``A Σ A^T`` over the data, and q(z|x) has covariance S for every x. At the optimum the
    two commute, so their eigenvalues, in opposite orders, belong together direction by direction.
    """

    activity: np.ndarray
    variance: np.ndarray
    kl: np.ndarray
    error: np.ndarray
    strength: np.ndarray
    offset: float


def bottleneck(spec: LinearVAE, weights: dict[str, np.ndarray]) -> Bottleneck:
    decoder, encoder = weights["decoder.weight"], weights["encoder.weight"]
    covariance = AXES * EIGENVALUES @ AXES.T
    root = spec._scale_tril(weights)
    shared = root @ root.T
    mean = encoder @ MEAN + weights["encoder.bias"]
    activity = np.linalg.eigvalsh(encoder @ covariance @ encoder.T)[::-1]
    variance = np.linalg.eigvalsh(shared)
    left = np.eye(5) - decoder @ encoder
    error = AXES.T @ (left @ covariance @ left.T + decoder @ shared @ decoder.T) @ AXES
    return Bottleneck(
        activity=activity,
        variance=variance,
        kl=0.5 * (activity + variance - 1.0 - np.log(variance)),
        error=np.diag(error),
        strength=((AXES.T @ decoder) ** 2).sum(axis=1),
        offset=float(np.abs(MEAN - decoder @ mean - weights["decoder.bias"]).max() + np.abs(mean).max()),
    )


def best_log_likelihood(s2: float, latents: int) -> float:
    """The maximum of the pPCA likelihood over W and b (Tipping & Bishop 1999, eqs. 7, 14), by SciPy's density."""
    kept = np.where(np.arange(5) < latents, np.maximum(EIGENVALUES, s2), s2)
    return float(multivariate_normal(MEAN, AXES * kept @ AXES.T).logpdf(DATA).mean())


CASES = {  # (β, σ²): active directions of the five, and steps
    (1.0, 0.5): (3, 1500),
    (4.0, 0.4): (2, 1500),
    (0.5, 1.2): (3, 1500),
    (2.0, 2.5): (1, 800),
    (6.0, 2.0): (0, 400),
}


def test_the_data_are_what_the_closed_form_is_about() -> None:
    np.testing.assert_allclose(DATA.mean(axis=0), MEAN, atol=1e-12)
    np.testing.assert_allclose(np.cov(DATA, rowvar=False, bias=True), AXES * EIGENVALUES @ AXES.T, atol=1e-12)


@pytest.mark.usefixtures("as_users_run_it")  # thousands of steps
@covering("beta,s2", list(CASES), numpyro=(1, 4))
def test_training_ends_where_the_closed_form_says(engine: str, beta: float, s2: float) -> None:
    active, steps = CASES[beta, s2]
    spec = LinearVAE(data_dim=5, latent_dim=LATENTS, scale=float(np.sqrt(s2)))
    run = train(engine, spec, beta, steps if engine == "numpyro" else steps * 4 // 5)
    found, theta, served = bottleneck(spec, run.weights), beta * s2, EIGENVALUES[:LATENTS]

    kl = np.maximum(0.0, 0.5 * np.log(served / theta))
    np.testing.assert_allclose(found.kl, kl, atol=TOLERANCE)
    np.testing.assert_allclose(found.activity, np.maximum(0.0, 1.0 - theta / served), atol=TOLERANCE)
    np.testing.assert_allclose(found.variance, np.minimum(1.0, theta / served), atol=TOLERANCE)
    error = np.minimum(theta, EIGENVALUES)
    np.testing.assert_allclose(found.error, error, rtol=2 * TOLERANCE)
    np.testing.assert_allclose(
        found.strength, np.maximum(0.0, EIGENVALUES - theta) * (np.arange(5) < LATENTS), atol=0.06
    )
    assert found.offset < 2 * TOLERANCE

    # A direction is collapsed exactly where λ ≤ θ: by the usual threshold, in the latents and in the data.
    assert int((served > theta).sum()) == active
    assert (found.activity > 0.01).tolist() == [True] * active + [False] * (LATENTS - active)
    assert (found.strength > 0.05 * EIGENVALUES).tolist() == (theta < EIGENVALUES).tolist()

    # The diagonal guide is exact on the principal axes alone: each latent has one direction's information to itself.
    weights = run.weights
    spread = np.diag(weights["encoder.weight"] @ (AXES * EIGENVALUES @ AXES.T) @ weights["encoder.weight"].T)
    variance = np.exp(2.0 * weights["encoder_log_scale"])
    each = 0.5 * (spread + variance - 1.0 - np.log(variance))
    np.testing.assert_allclose(np.sort(each)[::-1], kl, atol=TOLERANCE)

    # What fit and evaluate report is the same bottleneck, within their Monte Carlo error.
    assert run.history[-1]["rate"] == pytest.approx(kl.sum(), abs=LATENTS * TOLERANCE)
    distortion = 0.5 * (error.sum() / s2 + 5 * np.log(2 * np.pi * s2))
    spread = np.sqrt(2.0 * (error**2).sum() / len(DATA)) / (2.0 * s2)  # of the mean of a sum of squared Gaussians
    distortion_error = 5.0 * spread + 2 * TOLERANCE * error.sum() / (2.0 * s2)
    assert run.history[-1]["distortion"] == pytest.approx(distortion, abs=distortion_error)
    evaluated = run.evaluate(DATA[:400], num_particles=100)
    assert evaluated.total_active_units == active

    if beta == 1.0:  # the bound is tight: it is the likelihood's maximum
        best = best_log_likelihood(s2, LATENTS)
        assert spec.log_prob(weights, DATA).mean() == pytest.approx(best, abs=0.002)
        assert spec.elbo(weights, DATA).mean() == pytest.approx(best, abs=0.002)
        assert spec.elbo(weights, DATA).mean() < best


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.numpyro
def test_learned_variance_and_full_covariance_reach_the_maximum_of_the_likelihood() -> None:
    """The full guide is exact on any axes, so no rotation has to be found; σ² is the mean of what three latents leave."""
    spec = LinearVAE(data_dim=5, latent_dim=3, scale=1.0, learn_scale=True, guide="full")
    run = train("numpyro", spec, 1.0, 1200)
    s2 = float(np.exp(2.0 * run.weights["decoder_log_scale"]))
    assert s2 == pytest.approx((0.3 + 0.1) / 2, rel=2 * TOLERANCE)
    found = bottleneck(spec, run.weights)
    np.testing.assert_allclose(found.kl, 0.5 * np.log(EIGENVALUES[:3] / 0.2), atol=TOLERANCE)
    np.testing.assert_allclose(found.activity, 1.0 - 0.2 / EIGENVALUES[:3], atol=TOLERANCE)
    best = best_log_likelihood(0.2, 3)
    assert spec.elbo(run.weights, DATA).mean() == pytest.approx(best, abs=0.002)
    assert spec.elbo(run.weights, DATA).mean() < best


@pytest.mark.parametrize(("beta", "s2"), CASES)
def test_closed_forms_and_the_optimum_s_weights_are_one(beta: float, s2: float) -> None:
    """``optimum`` has the closed forms' figures to rounding, so either may stand for the optimum elsewhere."""
    spec = LinearVAE(data_dim=5, latent_dim=LATENTS, scale=float(np.sqrt(s2)))
    found, served = bottleneck(spec, spec.optimum(DATA, beta)), EIGENVALUES[:LATENTS]
    np.testing.assert_allclose(found.kl, kl_per_direction(served, s2, beta), atol=1e-10)
    np.testing.assert_allclose(found.activity, active_unit_statistic(served, s2, beta), atol=1e-10)
    np.testing.assert_allclose(found.variance, posterior_variance(served, s2, beta), atol=1e-10)
    np.testing.assert_allclose(found.error[:LATENTS], squared_error(served, s2, beta), rtol=1e-10)
    assert found.error[LATENTS] == pytest.approx(EIGENVALUES[LATENTS], rel=1e-10)


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_the_exact_elbo_at_the_optimum_is_scipy_s_maximum(latents: int) -> None:
    for guide in ("diagonal", "full"):
        spec = LinearVAE(data_dim=5, latent_dim=latents, learn_scale=True, guide=guide)
        s2 = learned_variance(EIGENVALUES, latents)
        best = best_log_likelihood(s2, latents)
        assert spec.elbo(spec.optimum(DATA), DATA).mean() == pytest.approx(best, rel=1e-12)
