"""The rate–distortion curve: trained, it is the linear model's reverse water-filling, and its slope is β."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from oracles import shared_latent

from elbozoo.inference import Beta, RateDistortion, RatePoint, rate_distortion
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import LinearVAE
from elbozoo.zoo.linear_vae import kl_per_direction, squared_error

EIGENVALUES = np.array([4.0, 1.5, 0.5, 0.1])
S2 = 0.4
SPEC = LinearVAE(data_dim=4, latent_dim=3, scale=math.sqrt(S2))
BETAS = (0.5, 1.0, 2.0, 5.0)  # water levels 0.2, 0.4, 0.8 and 2.0: three, three, two and one direction above them
TRAINING = 0.01
"""What Adam leaves, in nats a direction: test_linear_vae.py measured it for the same steps, more data and a larger β."""


def with_covariance(eigenvalues: np.ndarray, num_data: int) -> np.ndarray:
    """Data whose covariance has exactly these eigenvalues, on axes that are not the coordinates'."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(num_data, len(eigenvalues)))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T, bias=True))).T
    return white * np.sqrt(eigenvalues) @ axes(len(eigenvalues)).T


def axes(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]


STEPS, LOOP = 500, 50  # steps of training, fifty to an epoch: one compiled loop


def falling(step: Any) -> Any:
    """A learning rate that falls to 0 in a straight line."""
    return 0.1 * (1.0 - step / STEPS)


def closed_form(beta: float) -> tuple[float, float]:
    """Rate and distortion at the optimum: reverse water-filling over the directions."""
    served = EIGENVALUES[:3]
    error = squared_error(served, S2, beta).sum() + EIGENVALUES[3:].sum()
    return kl_per_direction(served, S2, beta).sum(), 0.5 * error / S2 + 2.0 * np.log(2 * np.pi * S2)


@PYRO_ALONE
@pytest.mark.usefixtures("as_users_run_it")  # thousands of steps
def test_the_trained_curve_is_the_closed_forms(engine: str) -> None:
    test = np.random.default_rng(2).normal(size=(2000, 4)) * np.sqrt(EIGENVALUES) @ axes(4).T
    found = rate_distortion(
        getattr(SPEC, engine)(), with_covariance(EIGENVALUES, 1000), BETAS, test=test, num_particles=20,
        epochs=STEPS // LOOP, epoch_steps=LOOP, batch_size=1000, learning_rate=falling, progress=False,
    )  # fmt: skip
    assert [p.beta for p in found.points] == list(BETAS)
    for point, live in zip(found.points, (3, 3, 2, 1), strict=True):
        rate, distortion = closed_form(point.beta)
        assert point.rate == pytest.approx(rate, abs=4 * point.rate_se + 3 * TRAINING)
        assert point.distortion == pytest.approx(distortion, abs=4 * point.distortion_se + 3 * TRAINING * point.beta)
        assert 0.005 < point.rate_se < 0.05, "2000 data"
        assert point.elbo == pytest.approx(-(point.rate + point.distortion))
        assert point.active_units == {"z": live}
        assert (point.collapse_epsilon["z"] > 0.05).sum() == live
        if point.beta == 1.0:  # elsewhere the guide is not the posterior, and K samples overstate the NLL
            assert point.nll == pytest.approx(-SPEC.log_prob(point.run.weights, test).mean(), abs=TRAINING)
    for (low, high, slope, se), many in zip(found.slopes(), (3, None, None), strict=True):
        assert low - 4 * se < slope < high + 4 * se
        ends = [closed_form(beta) for beta in (low, high)]
        chord = -(ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0])
        assert slope == pytest.approx(chord, abs=4 * se + 2 * TRAINING * chord)  # ΔR is about 1 nat
        assert se < 0.2 * slope
        if many:  # the same directions at both ends: the chord is the logarithmic mean of the two β
            assert chord == pytest.approx((high - low) / math.log(high / low))
    assert [p.beta for p in found.frontier()] == sorted(BETAS, reverse=True)
    plain = found.summary()
    json.dumps(plain, allow_nan=False)
    assert plain["points"][1]["num_particles"] == 20
    assert plain["num_data"] == 2000


@PYRO_ALONE  # written once for both engines
def test_errors_are_those_of_the_choice_of_data(engine: str) -> None:
    """At the optimum ``rate_n = Σ ½ (m_i² + v_i - 1 - log v_i)`` with ``m_i ~ N(0, 1 - v_i)``: variance ``½ Σ (1 - v_i)²``."""
    x = with_covariance(EIGENVALUES, 1000)
    program = getattr(SPEC, engine)().with_weights(SPEC.optimum(x))
    (point,) = rate_distortion(program, x, [1.0], num_particles=2, epochs=1, learning_rate=1e-12, progress=False).points
    rate, distortion = closed_form(1.0)
    assert point.rate == pytest.approx(rate, abs=1e-6), "analytic, on data with exactly that covariance"
    carried = 1 - S2 / EIGENVALUES[:3]
    assert point.rate_se == pytest.approx(math.sqrt(0.5 * (carried**2).sum() / 1000), rel=0.1)
    per_draw = np.minimum(S2, EIGENVALUES)  # squared errors' means: their spread over draws is √2 times each
    assert point.distortion == pytest.approx(distortion, abs=4 * math.sqrt(2 * (per_draw**2).sum() / 1e5) / (2 * S2))
    assert set(point.active_units) == {"z"}


@PYRO_ALONE  # what is NumPyro's own is fit's
def test_equal_seeds_and_data_in_parts(engine: str) -> None:
    spec, x = LinearVAE(data_dim=4, latent_dim=2), with_covariance(EIGENVALUES, 100)
    program = getattr(spec, engine)()
    one, two = (
        rate_distortion(program, x, [2, 1], num_particles=3, epochs=1, seed=3, progress=False) for _ in range(2)
    )
    assert one.summary() == two.summary()
    assert [p.beta for p in one.points] == [1, 2]
    assert one.points[0].run.objective == Beta(beta=1.0)
    assert one.points[0].collapse_epsilon["z"].shape == (2,)


def point(beta: float, rate: float, distortion: float, spread: float = 0.0, of_rate: float = 0.0) -> RatePoint:
    """Two data, that far to either side of the mean."""
    sides = np.array([-1.0, 1.0])
    return RatePoint(
        beta=beta, rate=rate, rate_se=0.1, distortion=distortion, distortion_se=0.1, nll=1.0, nll_se=math.nan,
        num_particles=1, active_units={}, collapse_epsilon={}, rate_per_datum=rate + of_rate * sides,
        distortion_per_datum=distortion + spread * sides, run=None,
    )  # fmt: skip


def test_frontier_and_slopes_by_hand() -> None:
    """(1, 3.5) lies above the line from (0, 4) to (2, 1); (5, 1.5) has more rate than (4, 0.5) and more distortion."""
    points = [(4, 0.0, 4.0), (3, 1.0, 3.5), (2, 2.0, 1.0), (1, 4.0, 0.5), (0.5, 5.0, 1.5)]
    found = RateDistortion(tuple(point(*p) for p in reversed(points)), 2, 0.01)
    assert [p.rate for p in found.frontier()] == [0.0, 2.0, 4.0]
    assert [s.slope for s in found.slopes()] == pytest.approx([-1.0, 0.25, 2.5, 0.5])
    noisy = RateDistortion((point(1, 2.0, 1.0), point(2, 1.0, 3.0, 0.3)), 2, 0.01)
    assert noisy.slopes()[0].slope == pytest.approx(2.0)
    assert noisy.slopes()[0].se == pytest.approx(0.3)  # sd of ±0.3 is 0.3 √2, over √2 data, over a rate of 1
    along = RateDistortion((point(1, 2.0, 1.0), point(2, 1.0, 3.0, 0.2, of_rate=-0.1)), 2, 0.01)
    assert along.slopes()[0].se == pytest.approx(0.0), "data that lie along the slope leave no doubt of it"
    equal = RateDistortion((point(1, 2.0, 1.0), point(2, 2.0, 3.0)), 2, 0.01)
    assert math.isnan(equal.slopes()[0].slope)
    assert equal.summary()["slopes"][0]["slope"] is None


@PYRO_ALONE
def test_bad_input_is_refused(engine: str) -> None:
    program, x = getattr(LinearVAE(4, 2), engine)(), with_covariance(EIGENVALUES, 20)
    for betas, options, text in [
        ([], {}, "betas must hold one distinct number or more"),
        ([1, 1.0], {}, "betas must hold one distinct"),
        ([-1.0], {}, "every β must be finite and at least 0"),
        ([1.0], {"delta": 1.0}, r"delta must lie in \[0, 1\)"),
        ([1.0], {"objective": Beta()}, "objective must not be among the options of fit"),
        ([1.0], {"replicates": 2}, "replicates must not be among the options of fit"),
        ([1.0], {"epochs": 0}, "epochs must be a whole number"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            rate_distortion(program, x, betas, progress=False, **options)


@PYRO_ALONE
def test_a_latent_outside_the_plate_is_refused(engine: str) -> None:
    from importlib import import_module

    program = import_module(f"elbozoo.inference.{engine}_engine").Program(*shared_latent(engine))
    with pytest.raises(InvalidArgument, match="program must have every latent inside its data plate"):
        rate_distortion(program, np.zeros(10), [1.0], epochs=1, batch_size=10, progress=False)
