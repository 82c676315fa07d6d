"""Which minimum each seed ended in: against the linear model's closed forms; and courses of histories written by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from test_starts import AXES, DATA, EIGENVALUES, MEAN, S2, Falling, log_likelihood

from elbozoo.inference import ELBO, Collapsed, Course, Run, fit, local_minima
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import LinearVAE

SPEC = LinearVAE(data_dim=5, latent_dim=3, scale=float(np.sqrt(S2)), guide="full")


# --- courses --------------------------------------------------------------------------------------------------------

COURSES = {  # live dimensions by epoch: collapse epoch, recovery epoch, changes, lost
    "loses all": ([3, 2, 0, 0], 3, None, [(2, -1), (3, -2)], 3),
    "comes back": ([0, 0, 2, 2], None, 3, [(3, 2)], 0),
    "never lived": ([0, 0, 0], 1, None, [], 0),
    "comes back and goes": ([2, 0, 1, 0], 4, None, [(2, -2), (3, 1), (4, -1)], 2),
    "loses one": ([4, 4, 3], None, None, [(3, -1)], 1),
    "in some minibatches": ([2.6, 0.4, 0.3], 2, None, [(2, -3)], 3),
}


@pytest.mark.parametrize("name", COURSES)
def test_courses(name: str) -> None:
    live, collapse, recovery, changes, lost = COURSES[name]
    course = Course.of([{"epoch": e, "kl_z": 9.0, "live_z": float(n), "bound": 0.0} for e, n in enumerate(live, 1)])
    assert course.live.tolist() == [round(n) for n in live]
    assert (course.collapse_epoch, course.recovery_epoch, course.lost) == (collapse, recovery, lost)
    assert course.changes == changes


def test_a_course_is_over_all_sites() -> None:
    """z2 does not factorise: it is one dimension, live while it carries 0.01 nats."""
    rows = [{"kl_z1": 1.0, "live_z1": 2.0, "kl_z2": 0.5}, {"kl_z1": 0.0, "live_z1": 0.0, "kl_z2": 0.011}]
    rows += [{"kl_z1": 0.0, "live_z1": 0.0, "kl_z2": 0.009}]
    assert Course.of(rows).live.tolist() == [3, 1, 0]
    assert Course.of(rows).collapse_epoch == 3


# --- known minima ---------------------------------------------------------------------------------------------------


def at(engine: str, kept: list[int], seed: int, stretch: float = 1.0) -> Run:
    """A run that has these of the first three directions, with the exact guide."""
    norm = stretch * np.sqrt(EIGENVALUES[:3] - S2) * np.isin(np.arange(3), kept)
    weights = SPEC.exact_guide({"decoder.weight": AXES[:, :3] * norm, "decoder.bias": MEAN})
    program = getattr(SPEC, engine)().with_weights(weights)
    history = [{"epoch": 1, "kl_z": float(n)} for n in kept or [0]]
    return Run(program, ELBO(), history, {"seed": seed, "binarize": "none", "engine": engine})


@PYRO_ALONE  # written once for both engines
def test_lost_directions_cost_what_the_closed_form_says(engine: str) -> None:
    """½ [λ/σ² - 1 - log(λ/σ²)] nats each; the guide is exact, so no draw adds anything."""
    value = 0.5 * (EIGENVALUES[:3] / S2 - 1 - np.log(EIGENVALUES[:3] / S2))
    runs = [at(engine, [0, 2], 5), at(engine, [0, 1, 2], 6), at(engine, [], 7), at(engine, [0, 1, 2], 8, stretch=1.01)]
    found = local_minima(runs, DATA, num_particles=20)
    cost = np.array([value[1], 0.0, value.sum()])
    np.testing.assert_allclose(found.difference[:3], cost, rtol=1e-9, atol=1e-9)
    assert 0 < found.difference[3] < 0.1
    assert found.nll[1] == pytest.approx(-log_likelihood(S2, 3), rel=1e-10)
    assert found.active_units == (2, 3, 0, 3)
    assert found.minimum.tolist() == [1, 0, 2, 0]
    assert (found.num_minima, found.best) == (3, 1)
    assert found.worse.tolist() == [True, False, True, False]
    # the error is that of the mean of the paired differences
    pair = SPEC.log_prob(runs[1].weights, DATA) - SPEC.log_prob(runs[0].weights, DATA)
    assert found.difference_se[0] == pytest.approx(pair.std(ddof=1) / np.sqrt(len(DATA)), rel=1e-9)
    said = " ".join(found.verdict)
    assert "3 minima are told apart" in said
    assert "with 2, 1 and 1 seeds" in said
    assert f"seed 5 ({cost[0]:.2f} ± {found.difference_se[0]:.2f}) and 7 ({cost[2]:.2f} ±" in said
    assert json.loads(json.dumps(found.summary()))["seeds"] == [5, 6, 7, 8]
    strict = local_minima(runs, DATA, num_particles=20, tolerance=0.0)
    assert strict.minimum.tolist()[3] == (found.difference[3] > 2 * found.difference_se[3]) * 3


@PYRO_ALONE
def test_what_the_data_cannot_tell_apart_is_one_minimum(engine: str) -> None:
    """Two data: a difference beyond the tolerance, within two standard errors of it."""
    runs = [at(engine, [0, 1, 2], 0), at(engine, [0, 1, 2], 1, stretch=1.3)]
    x = DATA[:2]
    pair = SPEC.log_prob(runs[0].weights, x) - SPEC.log_prob(runs[1].weights, x)
    error = abs(pair[0] - pair[1]) / 2
    found = local_minima(runs, x, num_particles=20, tolerance=1e-6)
    assert found.difference_se[1 - found.best] == pytest.approx(error, rel=1e-9)
    assert (abs(pair.mean()) > 2 * error) == bool(found.worse.any())


# --- trained --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@covering("start", (None, Collapsed(epochs=100)), numpyro=(1,), ids=lambda s: "normal" if s is None else "collapsed")
def test_the_linear_model_has_no_bad_minimum(engine: str, start: Any) -> None:
    """All seeds end at the likelihood's maximum, wherever they begin (Lucas et al. 2019, theorem 1)."""
    spec = LinearVAE(data_dim=5, latent_dim=2, scale=float(np.sqrt(S2)))
    options: dict[str, Any] = {"batch_size": len(DATA), "learning_rate": Falling(0.1, 600), "progress": False}
    steps = 50 if start is None else 1  # of an epoch: what comes back from a collapse has done so after two
    runs = fit(
        getattr(spec, engine)(), DATA, epochs=600 // steps, epoch_steps=steps, start=start, replicates=3, **options
    )
    found = local_minima(runs, DATA, num_particles=30, tolerance=0.05)
    assert found.num_minima == 1
    assert found.active_units == (2, 2, 2)
    assert not found.worse.any()
    assert not found.collapsed.any()
    np.testing.assert_allclose(found.nll, -log_likelihood(S2, 2), atol=0.02)
    if start is not None:
        assert all(course.live[0] == 0 for course in found.courses)
        assert all(1 < (course.recovery_epoch or 0) < 600 for course in found.courses)
        assert "3 came back from a collapse" in " ".join(found.verdict)


# --- what cannot be -------------------------------------------------------------------------------------------------


@PYRO_ALONE  # written once for both engines
def test_bad_input_is_refused(engine: str) -> None:
    one, two = at(engine, [0], 0), at(engine, [1], 1)
    for runs, x, options, text in [
        ([one], DATA, {}, "runs must be two Runs at least; got 1"),
        (one, DATA, {}, "runs must be two Runs at least"),
        ([], DATA, {}, "runs must be two Runs at least; got none"),
        ([one, two.program], DATA, {}, "runs must be two Runs at least"),
        ([one, two], DATA[:1], {}, "runs must have a likelihood for each of two data"),
        ([one, two], DATA, {"tolerance": -1.0}, "tolerance must be finite and at least 0"),
        ([one, two], DATA, {"num_particles": 1}, "num_particles must be a whole number of at least 2"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            local_minima(runs, x, **options)
    with pytest.raises(InvalidArgument, match="history must have an epoch with a rate"):
        Course.of([])
    grey = Run(one.program, ELBO(), one.history, {**one.config, "binarize": "threshold"})
    with pytest.raises(InvalidArgument, match="runs must take the data alike"):
        local_minima([one, grey], (DATA - DATA.min()) / np.ptp(DATA))
