"""Exact answers for a linear-Gaussian model with random weights, in both engines.

With the exact posterior as guide every bound is ``log p(x)`` with no variance; with a wrong one the gaps are known in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import LinearGaussian, library

from elbozoo import options
from elbozoo.inference import Bound
from elbozoo.inference.gradients import STL, DReG, Pathwise
from elbozoo.inference.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Renyi

EXACT = LinearGaussian.random(seed=3)
# A guide that is off, but mildly: wider than the posterior, so that weights have every moment that the tests use.
SHIFT = np.array([0.4, 0.3]) * np.sqrt(np.diag(EXACT.posterior()[1]))
TRIL = np.array([[1.3, 0.0], [0.1, 1.2]]) @ np.linalg.cholesky(EXACT.posterior()[1])
NOISY = ELBO(1, analytic_kl=False)
EVERY_BOUND = [
    NOISY, ELBO(4, analytic_kl=False), IWAE(1), IWAE(4), IWAE(64), Renyi(0.3, 4), Renyi(-2.0, 4), Renyi(3.0, 4),
    MIWAE(2, 2), CIWAE(0.3, 4), PIWAE(2, 2), TVO(1, 4), TVO(6, 4),
]  # fmt: skip
BOUNDS = options.choices(Bound).values()
NO_SCORE = [bound(gradient=gradient) for bound in BOUNDS for gradient in (STL(), DReG())]


def loss_and_gradients(
    engine: str, objectives: list[Any], model: Callable, guide: Callable, init: dict, x: np.ndarray
) -> list:
    """Each objective's loss at one seed and, where its estimator is not the default, its gradients by parameter."""
    data = library(engine).array(x)
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        def compute(params: Any, key: Any) -> Any:
            losses = [lambda p, o=o: Loss(o).loss(key, p, model, guide, data) for o in objectives]
            with_grads = [o.gradient != Pathwise() or o == NOISY for o in objectives]
            return [
                jax.value_and_grad(f)(params) if g else (f(params), {}) for f, g in zip(losses, with_grads, strict=True)
            ]

        return jax.tree.map(np.asarray, oracles.compiled(compute)(init, jax.random.key(0)))
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    out = []
    for objective in objectives:
        pyro.clear_param_store()
        for name, value in init.items():
            pyro.param(name, value.clone())
        loss = Loss(objective, max_plate_nesting=1).loss_and_grads(model, guide, data)
        out.append((loss, {n: pyro.param(n).unconstrained().grad.numpy() for n in init}))
    return out


@cache
def exact_guide(engine: str) -> list:
    return loss_and_gradients(engine, [*EVERY_BOUND, *NO_SCORE], *EXACT.program(engine), EXACT.x)


def test_the_oracle_agrees_with_the_textbook() -> None:
    """The posterior of reference formulas (M = WᵀW + s2 I), and evidence = likelihood x prior / posterior at any z."""
    W, gain, S = EXACT.W, *EXACT.posterior()
    M = W.T @ W + EXACT.s2 * np.eye(2)
    np.testing.assert_allclose(gain, np.linalg.solve(M, W.T))
    np.testing.assert_allclose(S, EXACT.s2 * np.linalg.inv(M))
    z = np.array([0.3, -1.1])
    log_lik = oracles.normal(EXACT.x, EXACT.b + W @ z, EXACT.s2**0.5).sum(-1)
    d = z - (EXACT.x - EXACT.b) @ gain.T
    log_q = -0.5 * np.einsum("bi,ij,bj->b", d, np.linalg.inv(S), d) - 0.5 * np.linalg.slogdet(2 * np.pi * S)[1]
    np.testing.assert_allclose(EXACT.log_evidence, log_lik + oracles.normal(z, 0, 1).sum() - log_q)


@pytest.mark.parametrize("i", range(len(EVERY_BOUND)), ids=[repr(b).split(", gradient")[0] for b in EVERY_BOUND])
def test_every_bound_is_the_evidence_under_the_exact_posterior(engine: str, i: int) -> None:
    assert float(exact_guide(engine)[i][0]) == pytest.approx(-EXACT.log_evidence.sum(), abs=1e-10)


@pytest.mark.parametrize(
    "i", range(len(NO_SCORE)), ids=[f"{type(b).__name__}-{type(b.gradient).__name__}" for b in NO_SCORE]
)
def test_no_score_no_gradient_under_the_exact_posterior(engine: str, i: int) -> None:
    """STL and DReG: the guide's gradient is zero draw by draw; the model's is that of the evidence, but for noise, and not zero."""
    loss, grads = exact_guide(engine)[len(EVERY_BOUND) + i]
    assert float(loss) == pytest.approx(-EXACT.log_evidence.sum(), abs=1e-10)
    for name in ("A", "shift", "L"):
        np.testing.assert_allclose(grads[name], 0.0, atol=1e-10)
    assert np.abs(grads["W"]).max() > 0.1


def test_the_pathwise_gradient_is_noisy_there(engine: str) -> None:
    """The contrast that makes the zeros above mean something."""
    assert np.abs(exact_guide(engine)[EVERY_BOUND.index(NOISY)][1]["shift"]).max() > 0.1


def test_zero_variance(engine: str) -> None:
    """Each particle's log weight is the evidence of its own datum: shape (K, B), to 1e-10."""
    log_weight = draws(engine, EXACT.program(engine), EXACT.x, 7)
    np.testing.assert_allclose(log_weight, np.broadcast_to(EXACT.log_evidence, (7, len(EXACT.x))), atol=1e-10)


def draws(engine: str, program: tuple[Callable, Callable, dict], x: np.ndarray, num_particles: int) -> np.ndarray:
    """Log weights (K, B), through ``Program.apply``."""
    model, guide, init = program
    if engine == "numpyro":
        from elbozoo.inference.numpyro_engine import Program

        wrapped = Program(model, guide).with_params(init)
    else:
        import pyro

        from elbozoo.inference.pyro_engine import Program

        pyro.clear_param_store()
        wrapped = Program(model, guide)
    return wrapped.apply(log_weights, (library(engine).array(x),), num_particles=num_particles, seed=1)


def log_weights(terms: Any) -> Any:
    return terms.log_weight


SIZE, PARTICLES = 20_000, 32
ONE = LinearGaussian(EXACT.W, EXACT.b, EXACT.s2, EXACT.x[:1])


@cache
def wrong_guide(engine: str) -> np.ndarray:
    """Log weights less log p(x), (32, 20000), of one datum under a guide off in mean and covariance."""
    x = np.repeat(ONE.x, SIZE, axis=0)
    return draws(engine, ONE.program(engine, SHIFT, TRIL), x, PARTICLES) - ONE.log_evidence


def test_the_gap_of_the_elbo_is_the_kl(engine: str) -> None:
    gap = -wrong_guide(engine).mean(axis=0)
    kl = ONE.kl_to_posterior(SHIFT, TRIL)
    assert 0.1 < kl < 1, "a mild case"
    assert abs(gap.mean() - kl) < 4.5 * gap.std() / SIZE**0.5
    assert gap.std() / SIZE**0.5 < 0.005 * kl, "a wrong gap by 2.5% would show"


def test_weights_are_unbiased(engine: str) -> None:
    """``E[p(x,z) / q(z|x)] = p(x)``: no constant is missing anywhere."""
    mean = np.exp(wrong_guide(engine)).mean(axis=0)
    assert abs(mean.mean() - 1) < 4.5 * mean.std() / SIZE**0.5
    assert mean.std() / SIZE**0.5 < 0.005


def test_analytic_and_sampled_kl_have_one_expectation(engine: str) -> None:
    """The analytic ELBO's value at many draws: ``E_q[log p(x|z)]`` by hand less the closed-form KL to the prior."""
    x = np.repeat(ONE.x, SIZE, axis=0)
    model, guide, init = ONE.program(engine, SHIFT, TRIL)
    ((loss, _),) = loss_and_gradients(engine, [ELBO(4)], model, guide, init, x)
    want = ONE.log_evidence[0] - ONE.kl_to_posterior(SHIFT, TRIL)
    mean = ONE.posterior()[0] @ (ONE.x - ONE.b)[0] + SHIFT
    residual = ONE.x[0] - ONE.b - ONE.W @ mean
    spread = np.trace(ONE.W @ TRIL @ TRIL.T @ ONE.W.T)
    log_lik = -0.5 * (residual @ residual + spread) / ONE.s2 - 2 * np.log(2 * np.pi * ONE.s2)
    assert log_lik - ONE.kl_to_prior(SHIFT, TRIL)[0] == pytest.approx(want), "the oracle's two ways to the ELBO"
    assert -float(loss) / SIZE == pytest.approx(want, abs=0.03)  # five standard errors


def test_bounds_are_ordered(engine: str) -> None:
    """``E[ELBO] <= E[IWAE_K] <= E[IWAE_2K] <= log p``, each step seen at more than four standard errors (paired draws)."""
    l = wrong_guide(engine)
    ladder = [ELBO(1).value(l[:1])] + [IWAE(k).value(l[:k]) for k in (2, 4, 8, 16, 32)] + [np.zeros(SIZE)]
    for looser, tighter in zip(ladder[:-1], ladder[1:], strict=True):
        step = tighter - looser
        assert step.mean() > 4 * step.std() / SIZE**0.5


def test_the_gap_of_iwae_falls_as_one_over_k(engine: str) -> None:
    """Slope -1 in log-log, and the constant ``Var(w) / 2K``.

    ``E[log m] = E[log m - (m - 1)]`` as the mean weight m has expectation one: the control variate leaves the second order alone.
    """
    l = wrong_guide(engine)
    ks = np.array([4, 8, 16, 32])
    gaps, errors = [], []
    for k in ks:
        gap = -IWAE(int(k)).value(l[:k]) + np.exp(l[:k]).mean(axis=0) - 1
        gaps.append(gap.mean())
        errors.append(gap.std() / SIZE**0.5)
    assert max(np.array(errors) / gaps) < 0.03
    slopes = np.diff(np.log(gaps)) / np.diff(np.log(ks))
    variance = np.exp(l).var()
    # K times the gap is Var/2 + O(1/K), so the last slope is nearest to -1
    assert slopes[-1] == pytest.approx(-1, abs=0.12)
    assert gaps[-1] * ks[-1] == pytest.approx(variance / 2, rel=0.2)
