"""The verdict: its figures are the closed form's, and it says in words what they say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from oracles import library, wrapped
from scipy import stats

from elbozoo.inference import InvalidArgument, diagnose, fit
from elbozoo.zoo import LinearVAE
from elbozoo.zoo.linear_vae import kl_per_direction

EIGENVALUES = np.array([4.0, 1.0, 0.2, 0.1])
SPEC = LinearVAE(data_dim=4, latent_dim=3, scale=0.6)  # σ² = 0.36: the optimum keeps two directions


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Data whose covariance has exactly these eigenvalues."""
    white = np.random.default_rng(0).normal(size=(400, 4))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T, bias=True))).T
    return white * np.sqrt(EIGENVALUES)


@PYRO_ALONE
def test_the_optimum_of_a_linear_vae(engine: str, x: np.ndarray) -> None:
    """The bound is tight, and the third dimension is collapsed because the likelihood has no use for it."""
    program = getattr(SPEC, engine)().with_weights(SPEC.optimum(x))
    found = diagnose(program, x, num_particles=50, num_gaps=0, num_simulations=400)
    kl = np.sort(found.bottleneck.kl_per_dimension["z"])[::-1]
    np.testing.assert_allclose(kl, kl_per_direction(EIGENVALUES[:3], 0.36), atol=1e-8)
    assert found.gap == pytest.approx(0, abs=4 * x.shape[1] / (50 * len(x)) ** 0.5)
    assert found.bottleneck.active_units == {"z": 2}
    verdict = "\n".join(found.verdict)
    assert "1 of 3 dimensions of z are collapsed" in verdict
    assert "nats loose: the exact NLL is" in verdict
    assert "the likelihood itself may have no use for them" in verdict
    assert "full-covariance" not in verdict, "a tight bound needs no other guide"
    json.dumps(found.summary(), allow_nan=False)


@PYRO_ALONE  # written once for both engines
def test_a_loose_guide_is_told_from_a_collapsed_one(engine: str, x: np.ndarray) -> None:
    weights = SPEC.optimum(x)
    weights["encoder_log_scale"] = weights["encoder_log_scale"] - 2.0
    program = getattr(SPEC, engine)().with_weights(weights)
    found = diagnose(program, x, num_particles=50, num_data=100, num_gaps=8, num_simulations=200)
    exact = -SPEC.log_prob(weights, x).mean()
    assert found.exact_nll == pytest.approx(exact, rel=1e-12)
    want = exact + SPEC.elbo(weights, x).mean()
    assert found.gap == pytest.approx(-want, abs=0.05)
    assert found.bottleneck.num_data == 100
    verdict = "\n".join(found.verdict)
    assert found.gaps is not None
    assert found.gaps.amortisation == pytest.approx(-want, abs=0.2)
    assert abs(found.gaps.approximation) < 0.01, "the optimum's posterior has no correlation"
    assert (
        f"Next: a larger encoder, or longer training of the guide alone: {found.gaps.amortisation:.1f} nats" in verdict
    )
    assert "the guide is too narrow (∪) in" in verdict
    assert "No dimension of z is collapsed" in verdict
    without = diagnose(program, x, num_particles=50, num_data=100, num_gaps=0, num_simulations=0)
    assert f"Next: IWAE with DReG, or a richer guide: {without.gap:.1f} nats" in "\n".join(without.verdict)
    json.dumps(found.summary(), allow_nan=False)


@PYRO_ALONE  # written once for both engines
def test_discrete_latents_are_diagnosed_as_far_as_they_go(engine: str) -> None:
    """A mixture of two known components, guided by its exact posterior: no gap, enumerated, and why it is not split."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            c = lib.sample("c", lib.dist.Bernoulli(probs=0.5 + 0.0 * x))
            lib.sample("x", lib.dist.Normal(4.0 * c - 2.0, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("c", lib.dist.Bernoulli(logits=4.0 * x))

    x = np.random.default_rng(0).normal(size=60) + 2.0
    found = diagnose(wrapped(engine, model, guide), x, num_particles=5, num_data=30)
    exact = np.log(0.5 * stats.norm.pdf(x, -2) + 0.5 * stats.norm.pdf(x, 2))
    assert found.exact_nll == pytest.approx(-exact.mean())
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert "gaps" in found.refused
    assert any(sentence.startswith("The gap is not split: ") for sentence in found.verdict)
    assert found.calibration is not None
    json.dumps(found.summary(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:The program does not broadcast")
@PYRO_ALONE  # written once for both engines
def test_what_cannot_be_diagnosed_says_what_is_missing(engine: str, x: np.ndarray) -> None:
    """One datum, no plate, an untrained program; data that are all equal have figures that are right."""
    lib = library(engine)
    program = getattr(SPEC, engine)().with_weights(SPEC.optimum(x))
    with pytest.raises(InvalidArgument, match="data must hold at least two data"):
        diagnose(program, x[:1], num_particles=5)

    def model(x: Any) -> None:
        z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
        lib.sample("x", lib.dist.Normal(z + 0.0 * x, 1.0).to_event(1), obs=x)

    def guide(x: Any) -> None:
        lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    with pytest.raises(InvalidArgument, match="program must have every latent inside its data plate"):
        diagnose(wrapped(engine, model, guide), x[:, 0], num_particles=5)
    if engine == "numpyro":
        with pytest.raises(InvalidArgument, match="program must have trained parameters"):
            diagnose(SPEC.numpyro(), x, num_particles=5)
    equal = diagnose(program, np.ones((30, 4)), num_particles=20, num_gaps=0, num_simulations=0)
    assert equal.bottleneck.mutual_information == pytest.approx(0, abs=1e-9)
    assert equal.bottleneck.active_units == {"z": 0}
    assert equal.exact_nll == pytest.approx(-SPEC.log_prob(SPEC.optimum(x), np.ones((1, 4)))[0])


@pytest.mark.numpyro
def test_replicates_are_compared_and_the_best_is_diagnosed(x: np.ndarray) -> None:
    runs = fit(SPEC.numpyro(), x, epochs=2, replicates=3, progress=False)
    found = diagnose(runs, x, num_particles=20, num_gaps=0, num_simulations=0)
    assert found.minima is not None
    nll = [run.evaluate(x, num_particles=20).nll for run in runs]
    assert found.evaluation.nll == min(nll)
    assert any(sentence.startswith("Over 3 seeds") for sentence in found.verdict)
    json.dumps(found.summary(), allow_nan=False)
