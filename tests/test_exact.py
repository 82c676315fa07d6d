"""A linear-Gaussian program with random weights: everything about it is known, in both engines.

``z ~ N(0, I)``, ``x | z ~ N(Wz + b, s² I)``; log p(x) and the posterior come from SciPy and the conditioning formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from elbozoo.inference import CIWAE, ELBO, IWAE, MIWAE, PIWAE, STL, TVO, DReG, Objective, Renyi

D, Z, B, S2 = 4, 2, 3, 0.5
RNG = np.random.default_rng(0)
W, OFFSET, X = RNG.normal(size=(D, Z)), RNG.normal(size=D), RNG.normal(size=(B, D))
PRECISION = W.T @ W + S2 * np.eye(Z)
GAIN, COVARIANCE = np.linalg.solve(PRECISION, W.T), S2 * np.linalg.inv(PRECISION)
MEAN = (X - OFFSET) @ GAIN.T
LOG_P = multivariate_normal(OFFSET, W @ W.T + S2 * np.eye(D)).logpdf(X)
WRONG_SHIFT, WRONG_SCALE = np.array([0.15, -0.1]), np.sqrt(np.diag(COVARIANCE)) * np.array([1.3, 1.2])


def program(engine: str, exact: bool) -> tuple[Any, Any]:
    """The engine's module and a ``Program``: the exact posterior as guide, or a shifted diagonal one, both with parameters."""
    if engine == "numpyro":
        import jax.numpy as np_
        import numpyro as ppl
        import numpyro.distributions as dist

        from elbozoo.inference import numpyro_engine as module

        array: Callable = np_.asarray
    else:
        import pyro as ppl
        import pyro.distributions as dist
        import torch

        from elbozoo.inference import pyro_engine as module

        array = torch.as_tensor

    def model(x: Any) -> None:
        weight = ppl.param("weight", array(W))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(array(np.zeros(Z)), 1.0).to_event(1))
            ppl.sample("x", dist.Normal(z @ weight.T + array(OFFSET), S2**0.5).to_event(1), obs=x)

    def guide(x: Any) -> None:
        gain = ppl.param("gain", array(GAIN))
        loc = (x - array(OFFSET)) @ gain.T
        tril = ppl.param("tril", array(np.linalg.cholesky(COVARIANCE)))
        scale = ppl.param("scale", array(WRONG_SCALE))
        with ppl.plate("data", len(x)):
            exactly = dist.MultivariateNormal(loc, scale_tril=tril)
            ppl.sample("z", exactly if exact else dist.Normal(loc + array(WRONG_SHIFT), scale).to_event(1))

    return module, module.Program(model, guide)


def bound_and_gradient(engine: str, objective: Objective, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The bound per datum and the gradient of the surrogate, with the exact guide."""
    module, pair = program(engine, exact=True)
    if engine == "numpyro":
        import jax

        x = jax.numpy.asarray(X)
        params = pair.init(jax.random.key(0), x)[0]

        def surrogate(params: Any) -> Any:
            terms, _ = module.particles(
                jax.random.key(seed), params, pair.model_fn, pair.guide_fn, (x,), num_particles=objective.num_particles
            )
            return objective.surrogate(terms).sum(), objective.bound(terms)

        gradient, bound = jax.grad(surrogate, has_aux=True)(params)
        return np.asarray(bound), {n: np.asarray(g) for n, g in gradient.items()}
    import pyro
    import torch

    pyro.set_rng_seed(seed)
    terms = module.particles(pair.model, pair.guide, (torch.as_tensor(X),), num_particles=objective.num_particles)
    objective.surrogate(terms).sum().backward()
    gradients = {n: pyro.param(n).grad for n in ("weight", "gain", "tril")}
    return objective.bound(terms).detach().numpy(), {n: g.numpy() for n, g in gradients.items() if g is not None}


OBJECTIVES = [
    *(ELBO(k, analytic_kl=False) for k in (1, 4)), *(IWAE(k) for k in (1, 2, 7)), Renyi(0.3, 5), Renyi(-1.0, 3), MIWAE(2, 3),
    CIWAE(0.3, 4), PIWAE(3, 2), TVO(4, 5), ELBO(3, STL(), analytic_kl=False), IWAE(4, STL()), IWAE(4, DReG()), PIWAE(2, 3, DReG()),
    TVO(3, 4, gradient=DReG()), Renyi(0.5, 4, DReG()), MIWAE(2, 2, DReG()), CIWAE(0.3, 4, DReG()),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_bound_is_exact_with_the_exact_posterior(engine: str, objective: Objective) -> None:
    """A random draw gives log p(x) to 1e-10, so the variance is zero; STL and DReG move the guide not at all."""
    bound, gradient = bound_and_gradient(engine, objective, seed=1)
    np.testing.assert_allclose(bound, LOG_P, rtol=0, atol=1e-10)
    assert np.abs(gradient["weight"]).max() > 1e-2
    if isinstance(objective.gradient, STL | DReG):
        assert max(np.abs(gradient[n]).max() for n in ("gain", "tril")) < 1e-10
    else:
        assert np.abs(gradient["gain"]).max() > 1e-3


def log_weights(terms: Any) -> dict[str, Any]:
    return {"log_weight": terms.log_weight}


def test_a_wrong_guide_is_off_by_what_theory_says(engine: str) -> None:
    """ELBO gap = KL(q || posterior); E[ELBO] <= E[IWAE_K] <= E[IWAE_2K] <= log p(x); the IWAE gap falls as 1/K."""
    _, pair = program(engine, exact=False)
    if engine == "numpyro":
        import jax

        x = jax.numpy.asarray(X)
        pair = pair.with_params(pair.init(jax.random.key(0), x)[0])
    else:
        import torch

        x = torch.as_tensor(X)
    num = 2**19
    draws = [pair.apply(log_weights, (x,), num_particles=num // 8, seed=s)["log_weight"] for s in range(8)]
    l = np.concatenate(draws)
    wrong = np.diag(WRONG_SCALE**2)
    inverse = np.linalg.inv(COVARIANCE)
    kl = 0.5 * (
        np.trace(inverse @ wrong) + WRONG_SHIFT @ inverse @ WRONG_SHIFT - Z
        + np.log(np.linalg.det(COVARIANCE) / np.linalg.det(wrong))
    )  # fmt: skip
    gap, error = LOG_P - l.mean(axis=0), l.std(axis=0) / np.sqrt(num)
    assert (np.abs(gap - kl) < 4.5 * error).all()
    assert (error < 0.02 * kl).all()  # the test can see a gap that is 9% off

    counts, gaps, errors = 2 ** np.arange(1, 6), [], []  # beyond K = 32 noise hides the gap
    for k in counts:
        bounds = (logsumexp(l.reshape(-1, k, B), axis=1) - np.log(k)).mean(axis=1)
        gaps.append((LOG_P.mean() - bounds).mean())
        errors.append(bounds.std() / np.sqrt(len(bounds)))
    gaps, errors = np.array(gaps), np.array(errors)
    assert gaps[0] < kl
    assert (np.diff(gaps) < 4 * np.hypot(errors[1:], errors[:-1])).all()  # tighter with every doubling
    assert (gaps > -4 * errors).all()
    large = counts >= 4
    slope = np.polyfit(np.log(counts[large]), np.log(gaps[large]), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.12)
    ratio = np.exp(2 * (l - LOG_P)).mean(axis=0) - 1.0  # Var(w) over the squared mean weight
    np.testing.assert_allclose(gaps[-1] * 2 * counts[-1], ratio.mean(), rtol=0.1, atol=4 * errors[-1] * 2 * counts[-1])
    assert 4 * errors[-1] * 2 * counts[-1] < 0.35 * ratio.mean()
