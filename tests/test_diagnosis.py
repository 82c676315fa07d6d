"""The verdict: its figures are the closed form's, and it says in words what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from compile_once import as_users_run_it, compile_once  # noqa: F401

from elbozoo.inference import diagnose
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


def test_the_optimum_of_a_linear_vae(engine: str, x: np.ndarray) -> None:
    """The bound is tight, and the third dimension is collapsed because the likelihood has no use for it."""
    program = getattr(SPEC, engine)().with_weights(SPEC.optimum(x))
    found = diagnose(program, x, num_particles=50)
    kl = np.sort(found.bottleneck.kl_per_dimension["z"])[::-1]
    np.testing.assert_allclose(kl, kl_per_direction(EIGENVALUES[:3], 0.36), atol=1e-8)
    assert found.gap == pytest.approx(0, abs=4 * x.shape[1] / (50 * len(x)) ** 0.5)
    assert found.bottleneck.active_units == {"z": 2}
    verdict = "\n".join(found.verdict)
    assert "1 of 3 dimensions of z are collapsed" in verdict
    assert "nats loose: the exact NLL is" in verdict
    assert "the likelihood itself has no use for them" in verdict
    assert "full-covariance" not in verdict, "a tight bound needs no other guide"
    json.dumps(found.summary(), allow_nan=False)


def test_a_loose_guide_is_told_from_a_collapsed_one(engine: str, x: np.ndarray) -> None:
    weights = SPEC.optimum(x)
    weights["encoder_log_scale"] = weights["encoder_log_scale"] - 2.0
    found = diagnose(getattr(SPEC, engine)().with_weights(weights), x, num_particles=50, num_data=100)
    exact = -SPEC.log_prob(weights, x).mean()
    assert found.exact_nll == pytest.approx(exact, rel=1e-12)
    want = exact + SPEC.elbo(weights, x).mean()
    assert found.gap == pytest.approx(-want, abs=0.05)
    assert found.bottleneck.num_data == 100
    verdict = "\n".join(found.verdict)
    assert f"Next: IWAE with DReG, or a full-covariance guide: {found.gap:.1f} nats" in verdict
    assert "No dimension of z is collapsed" in verdict
