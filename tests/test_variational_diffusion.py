"""VariationalDiffusion: its twins, what its bound depends on, drawn times, learned schedules, draws and the flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy import special, stats
from test_diffusion_vae import continuous_loss, end_losses, hermite, noise, parts, program

from elbozoo.inference import ELBO, evaluate, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import (
    VAE,
    CosineSchedule,
    DiffusionVAE,
    ExactNormal,
    GaussianDenoiser,
    LearnedSchedule,
    LinearSchedule,
    MLPDenoiser,
    PolynomialSchedule,
    TabulatedSchedule,
    VariationalDiffusion,
)
from elbozoo.zoo.diffusion.sampling import draw, flow_bound, flow_log_prob

SMALL = MLPDenoiser(units=6, num_layers=1)
TWINS = [
    VariationalDiffusion(4, SMALL, "velocity", CosineSchedule(6.0, -3.0)),
    VariationalDiffusion(4, SMALL, schedule=LearnedSchedule(6.0, -3.0, schedule_units=4), likelihood=ExactNormal()),
    VariationalDiffusion(4, SMALL, schedule=LearnedSchedule(6.0, -3.0, schedule_units=4, minimise_variance=True)),
]
GAUSSIAN = VariationalDiffusion(1, GaussianDenoiser(), "signal", likelihood=ExactNormal())


# --- the bound ----------------------------------------------------------------------------------------------------


def expected_step(engine: str, spec: VariationalDiffusion, breaks: int, learned: Any = None) -> float:
    """The mean charge at ``step``, by quadrature over data, noise, and pieces of time."""
    nodes, weights = hermite(3)
    x = spec.denoiser.scale * nodes[:, None]  # type: ignore[attr-defined]
    gauss, share = np.polynomial.legendre.leggauss(40)
    time = ((np.arange(breaks)[:, None] + (gauss + 1) / 2) / breaks).ravel()
    level = (learned or spec.schedule)(time)[0]
    alpha, sigma = noise(level)
    noisy = (alpha[:, None, None] * x[:, 0] + sigma[:, None, None] * nodes[:, None]).reshape(-1, 3, 1)
    drawn = np.repeat(time, 3)[:, None] + np.zeros((1, 3))
    found = program(engine, spec).apply(parts, (x,), values={"time": drawn, "noisy": noisy}, analytic_kl=True)
    step = (found["step"].reshape(-1, 3, 3) * weights[:, None] * weights).sum((1, 2))
    return float((step * np.tile(share / 2, breaks)).sum() / breaks)


SCHEDULES = [
    (LinearSchedule(), 4),
    (PolynomialSchedule(), 4),
    (CosineSchedule(), 64),
    (TabulatedSchedule((13.3, 9.0, 1.0, -5.0)), 3),
]


@covering(
    "schedule,breaks,scale",
    [(schedule, breaks, scale) for schedule, breaks in SCHEDULES for scale in (1.0, 0.5)],
    numpyro=(),
    ids=lambda value: value if isinstance(value, float | int) else type(value).__name__,
)
def test_the_continuous_loss_depends_on_the_ends_alone(engine: str, schedule: Any, breaks: int, scale: float) -> None:
    spec = replace(GAUSSIAN, denoiser=GaussianDenoiser(scale), schedule=schedule)
    assert expected_step(engine, spec, breaks) == pytest.approx(continuous_loss(scale**2), rel=1e-6)


def test_the_whole_bound_is_nearly_the_entropy(engine: str) -> None:
    found = expected_step(engine, GAUSSIAN, 4) + sum(end_losses(1.0))
    entropy = float(stats.norm.entropy())
    assert entropy < found < entropy + 5e-5
    # and the rest is what the ends do not reach
    assert found - entropy == pytest.approx(continuous_loss(1.0) + sum(end_losses(1.0)) - entropy, abs=1e-6)


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_a_thousand_steps_are_nearly_infinitely_many(engine: str) -> None:
    """The discrete loss falls to the continuous one as 1 / T."""
    from test_diffusion_vae import discrete_loss

    gaps = [discrete_loss("linear", steps, 1.0) - continuous_loss(1.0) for steps in (1000, 2000)]
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.02)
    steps = GAUSSIAN.with_steps(7)
    assert (steps.num_steps, steps.process, steps.denoiser) == (7, "chain", GAUSSIAN.denoiser)
    x = np.random.default_rng(0).standard_normal((200, 1))
    rough = evaluate(program(engine, steps), x, num_particles=100)
    fine = evaluate(program(engine, GAUSSIAN.with_steps(2000, "one-step")), x, num_particles=400)
    limit = evaluate(program(engine, GAUSSIAN), x, num_particles=400)
    assert rough.weighted
    assert not fine.weighted
    assert fine.elbo == pytest.approx(limit.elbo, abs=4.5 * np.hypot(fine.nll_mc_se, limit.nll_mc_se) + 0.03)
    assert rough.elbo < limit.elbo - 5


# --- drawn times --------------------------------------------------------------------------------------------------


def times(engine: str, spec: Any, num_data: int, num_particles: int) -> np.ndarray:
    """(K, B)"""
    x = np.zeros((num_data, 1))
    return program(engine, spec).apply(lambda terms: terms.values["time"], (x,), num_particles=num_particles)


def test_stratified_times_are_uniform_and_even(engine: str) -> None:
    found = times(engine, GAUSSIAN, 50, 400)
    assert stats.kstest(found[:, 0], "uniform").pvalue > 1e-3
    # of each run's 50 (JAX) or all together (torch), one to an interval of equal length
    rows = found if engine == "numpyro" else found.reshape(1, -1)
    for row in rows:
        np.testing.assert_array_equal(
            np.sort(np.floor(row * len(row) - row.min() * len(row) + 1e-6)), np.arange(len(row))
        )
    alone = times(engine, replace(GAUSSIAN, stratified=False), 50, 400)
    assert stats.kstest(alone.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(alone[:, 0], alone[:, 1])[0, 1]) < 0.25


@PYRO_ALONE
def test_stratified_times_lower_the_variance_of_a_batch(engine: str) -> None:
    """By how much: the batch's mean charge has the variance that is left within strata."""
    x, spread = np.random.default_rng(0).standard_normal((64, 16)), {}
    for stratified in (True, False):
        given = program(engine, replace(GAUSSIAN, data_dim=16, stratified=stratified))
        means = [given.apply(parts, (x,), seed=seed, analytic_kl=True)["step"].mean() for seed in range(150)]
        spread[stratified] = np.var(means, ddof=1)
    # Of a datum's charge, 18.3 / 2 ||e - e_said||^2, the time alone makes 16^2 (18.3 / 2)^2 p (1 - p) with p = 0.73, and
    # the noise 2 * 16 (18.3 / 2)^2 p.
    assert spread[True] / spread[False] == pytest.approx(2 / (2 + 16 * 0.27), abs=0.15)


# --- learned schedules --------------------------------------------------------------------------------------------


def monotone(weights: dict[str, np.ndarray], t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The network between the ends, as its docstring has it."""
    w = {name.removeprefix("schedule."): value for name, value in weights.items()}

    def m(t: np.ndarray) -> np.ndarray:
        inner = special.expit(np.exp(w["log_steepness"]) * (t[..., None] - w["center"]))
        return np.exp(w["log_linear"]) * t + (np.exp(w["log_height"]) * inner).mean(-1)

    def level(t: np.ndarray) -> np.ndarray:
        zero, one = m(np.zeros(1))[0], m(np.ones(1))[0]
        return w["log_snr_max"] - np.exp(w["log_span"]) * (m(t) - zero) / (one - zero)

    return level(t), (level(t - 1e-6) - level(t + 1e-6)) / 2e-6


def random_schedule(spec: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    initial = {"log_snr_max": np.array(6.0), "log_span": np.array(np.log(9.0)), "log_linear": np.array(0.0)}
    initial |= {n: np.zeros(spec.schedule.schedule_units) for n in ("log_height", "log_steepness")}
    initial |= {"center": np.linspace(0, 1, spec.schedule.schedule_units)}
    return {f"schedule.{n}": np.asarray(v + 0.4 * rng.standard_normal(v.shape)) for n, v in initial.items()}


LEARNED = replace(GAUSSIAN, schedule=LearnedSchedule(6.0, -3.0, schedule_units=3))


@PYRO_ALONE
def test_a_learned_schedule_is_what_it_says(engine: str) -> None:
    weights = random_schedule(LEARNED)
    given = getattr(LEARNED, engine)().with_weights(weights)
    drawn = given.apply(lambda terms: terms.values, (np.zeros((40, 1)),))
    level, slope = monotone(weights, drawn["time"][0])
    np.testing.assert_allclose(drawn["level"][0, :, 0], level, rtol=1e-7)
    np.testing.assert_allclose(drawn["level"][0, :, 1], slope, rtol=1e-5)
    assert (slope > 0).all()


def test_a_learned_schedule_begins_near_the_line(engine: str) -> None:
    x = 0.5 * np.random.default_rng(0).standard_normal((64, 1))
    begun = getattr(replace(LEARNED, denoiser=SMALL, predicts="noise"), engine)()
    if engine == "numpyro":
        import jax

        begun = begun.with_params(*jax.jit(lambda key: begun.init(key, x)[::2])(jax.random.key(0)))
    drawn = begun.apply(lambda terms: terms.values, (x,))
    line = 6.0 - 9.0 * drawn["time"][0]
    assert np.abs(drawn["level"][0, :, 0] - line).max() < 0.3


@PYRO_ALONE
@pytest.mark.parametrize("minimise", [False, True])
def test_what_a_learned_schedule_follows(engine: str, minimise: bool) -> None:
    """The gradient between the ends: of the bound, 0 on average, or of ``E[l^2] / E[l]``, by quadrature."""
    spec = replace(LEARNED, schedule=replace(LEARNED.schedule, minimise_variance=minimise), stratified=False)
    weights = random_schedule(spec)
    name, index = "schedule.log_height", 1
    nodes, share = hermite(9)
    gauss, part = np.polynomial.legendre.leggauss(100)

    def moments(height: float) -> tuple[float, float]:
        moved = {n: v.copy() for n, v in weights.items()}
        moved[name][index] = height
        level, slope = monotone(moved, (gauss + 1) / 2)
        alpha, sigma = noise(level)
        x, e = nodes[:, None], nodes
        z = alpha[:, None, None] * x + sigma[:, None, None] * e
        said = (z - alpha[:, None, None] ** 2 * z) / sigma[:, None, None]
        charge = 0.5 * slope[:, None, None] * (e - said) ** 2
        expect = lambda v: float((v * share[:, None] * share).sum((1, 2)) @ part / 2)  # noqa: E731
        return expect(charge), expect(charge**2)

    at, h = float(weights[name][index]), 1e-4
    (low, low2), (high, high2), (mean, _) = moments(at - h), moments(at + h), moments(at)
    assert high == pytest.approx(low, abs=1e-8), "the mean does not depend on what is between the ends"
    want = (high2 - low2) / (2 * h) / mean if minimise else 0.0
    found = schedule_gradients(engine, spec, weights, name, index)
    error = float(stats.sem(found))
    assert found.mean() == pytest.approx(want, abs=4.5 * error)
    assert 4.5 * error < (0.2 * abs(want) if minimise else 0.05)


def schedule_gradients(engine: str, spec: Any, weights: Any, name: str, index: int) -> np.ndarray:
    """Of the mean charge of 60 batches of 2000, at one parameter."""
    rng, out = np.random.default_rng(0), []
    batches = [rng.standard_normal((2000, 1)) for _ in range(60)]
    given = getattr(spec, engine)().with_weights(weights)
    if engine == "pyro":
        import torch

        parameter = dict(given.model.named_parameters())[name]
        for seed, x in enumerate(batches):
            parameter.grad = None
            torch.manual_seed(seed)
            terms = given.terms((torch.as_tensor(x),), num_particles=1, analytic_kl=True)
            terms.sites["step"].rate.mean().backward()
            assert parameter.grad is not None
            out.append(float(parameter.grad[index]))
        return np.array(out)
    import jax

    from elbozoo.inference.numpyro_engine import particles

    def mean(params: Any, key: Any, x: Any) -> Any:
        terms, _ = particles(key, params, given.model_fn, given.guide_fn, (x,), analytic_kl=True)
        return terms.sites["step"].rate.mean()

    gradient = jax.jit(jax.grad(mean))
    for seed, x in enumerate(batches):
        found = gradient(given.params, jax.random.key(seed), x)["schedule$params"]
        out.append(float(found[name.removeprefix("schedule.")][index]))
    return np.array(out)


# --- draws and the flow -------------------------------------------------------------------------------------------


@covering("scale", (1.0, 2.0), numpyro=(1,))
def test_the_flow_is_as_likely_as_in_closed_form(engine: str, scale: float) -> None:
    """With the exact denoiser z scales with the marginal's standard deviation."""
    spec = replace(GAUSSIAN, data_dim=3, denoiser=GaussianDenoiser(scale))
    z = np.random.default_rng(0).standard_normal((6, 3))
    first, last = (np.sqrt(special.expit(v) * scale**2 + special.expit(-v)) for v in (13.3, -5.0))
    want = stats.norm.logpdf(z * last / first).sum(-1) + 3 * np.log(last / first)
    np.testing.assert_allclose(flow_log_prob(program(engine, spec), z, tolerance=1e-9), want, rtol=0, atol=1e-6)
    probed = flow_log_prob(program(engine, spec), z, num_probes=2, tolerance=1e-9)
    np.testing.assert_allclose(probed, want, rtol=0, atol=1e-6)  # the Jacobian is a multiple of the identity


@PYRO_ALONE
def test_the_trace_is_the_jacobians(engine: str) -> None:
    """On a network, whose Jacobian has no such form: the density integrates to one, and probes agree on average."""
    spec = VariationalDiffusion(1, SMALL, schedule=LinearSchedule(4.0, -4.0), likelihood=ExactNormal())
    rng = np.random.default_rng(0)
    weights = {name: 0.2 * rng.standard_normal(v.shape) for name, v in spec.pyro().weights.items()}
    given = getattr(spec, engine)().with_weights(weights)
    grid = np.linspace(-60, 60, 2401)[:, None]
    density = np.exp(flow_log_prob(given, grid, tolerance=1e-7))
    assert np.trapezoid(density, grid[:, 0]) == pytest.approx(1.0, abs=1e-3)


def test_the_bound_with_the_flow(engine: str) -> None:
    x = np.random.default_rng(0).standard_normal((200, 3))
    found = flow_bound(program(engine, replace(GAUSSIAN, data_dim=3)), x)
    want = stats.norm.logpdf(x).sum(-1)
    np.testing.assert_allclose(found.mean(), want.mean(), atol=0.02)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "flow"])
def test_draws(engine: str, sampler: Any) -> None:
    given = program(engine, replace(GAUSSIAN, data_dim=2, schedule=LinearSchedule(9.0, -9.0)))
    found = draw(given, 1500, sampler=sampler, num_steps=150)
    assert found.shape == (1500, 2)
    assert found.std() == pytest.approx(1.0, abs=0.06)
    assert stats.kstest(found.ravel() / found.std(), "norm").pvalue > 1e-3
    np.testing.assert_array_equal(found[:3], draw(given, 1500, sampler=sampler, num_steps=150)[:3])


@PYRO_ALONE
def test_samplers_refuse(engine: str) -> None:
    given = program(engine, GAUSSIAN)
    with pytest.raises(InvalidArgument, match="sampler must be one of"):
        draw(given, 2, sampler="euler")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="num_steps must be a whole number"):
        draw(given, 2, num_steps=0)
    with pytest.raises(InvalidArgument, match=r"z must have shape \(N, 1\)"):
        flow_log_prob(given, np.zeros((2, 3)))
    with pytest.raises(InvalidArgument, match="program must be a diffusion of data; got VAE"):
        draw(getattr(VAE(4, 2), engine)(), 2)


# --- training -----------------------------------------------------------------------------------------------------


@covering(
    "spec",
    [
        VariationalDiffusion(2, MLPDenoiser(32, 2), likelihood=ExactNormal(), schedule=LinearSchedule(6.0, -4.0)),
        DiffusionVAE(2, 100, denoiser=MLPDenoiser(32, 2), likelihood=ExactNormal(), schedule=LinearSchedule(6.0, -4.0)),
    ],
    numpyro=(0,),
    ids=lambda spec: type(spec).__name__,
)
def test_training_nears_the_entropy(engine: str, spec: Any) -> None:
    """Two clusters: the bound of a single Gaussian is beaten, and draws fall into both."""
    rng = np.random.default_rng(0)
    x = (rng.choice([-1.0, 1.0], (2000, 1)) + 0.1 * rng.standard_normal((2000, 2))).astype(np.float32)
    run = fit(getattr(spec, engine)(), x, objective=ELBO(), epochs=30, batch_size=200, progress=False, seed=0)
    found = run.evaluate(x[:500], num_particles=100)
    gaussian = -stats.multivariate_normal(x.mean(0), np.cov(x.T)).logpdf(x).mean()
    assert found.nll < gaussian - 0.1
    drawn = run.program.predict((x[:200],), prior=True)["observed"]["x"][0]
    assert 0.25 < (drawn.mean(-1) > 0).mean() < 0.75


@pytest.mark.pyro
@pytest.mark.parametrize("epochs", [1, 3])
def test_resumed_before_and_after_its_step_is_traced_it_is_the_same_to_the_bit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """A traced diffusion uses up fewer random numbers than one that is run, so the switch has to come where it came."""
    from elbozoo.inference import pyro_trainer

    traced, calls = pyro_trainer.traced, []
    monkeypatch.setattr(pyro_trainer, "STEPS_BEFORE_TRACING", 10)
    monkeypatch.setattr(pyro_trainer, "traced", lambda *args: calls.append(args) or traced(*args))
    x = (np.random.default_rng(1).random((100, 3)) > 0.5).astype(float)
    spec = VariationalDiffusion(data_dim=3, denoiser=MLPDenoiser(units=4))
    settings: dict[str, Any] = {"batch_size": 20, "progress": False}  # 5 steps an epoch
    whole = fit(spec.pyro(), x, epochs=4, **settings)
    fit(spec.pyro(), x, epochs=epochs, directory=tmp_path, **settings)
    resumed = fit(spec.pyro(), x, epochs=4, directory=tmp_path, resume=True, **settings)
    assert len(calls) == (2 if epochs == 1 else 3), "whole and resumed, and the first part where it is long enough"
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], weight)
