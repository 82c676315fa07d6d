"""DiffusionVAE: its twins, and every figure of a diffusion of Gaussian data, which has a closed form.

Expectations over the data, the noise and the time are quadratures, put into the programs by giving sites their values.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy import special, stats

from elbozoo.inference import (
    ELBO,
    IWAE,
    P2,
    STL,
    Beta,
    DReG,
    MinSNR,
    SimpleLoss,
    bottleneck,
    evaluate,
    fit,
    gaps,
    to_arviz,
)
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.zoo import (
    CosineSchedule,
    DiffusionVAE,
    DiscretizedNormal,
    ExactNormal,
    GaussianDenoiser,
    LearnedSchedule,
    LinearSchedule,
    MLPDenoiser,
    PolynomialSchedule,
    TabulatedSchedule,
    UNet,
    VariationalDiffusion,
)
from elbozoo.zoo import diffusion as specs
from elbozoo.zoo.diffusion import PREDICTS

SMALL = MLPDenoiser(units=6, num_layers=2, octaves=(0, 1))
TWINS = [
    DiffusionVAE(3, 3, "chain", GaussianDenoiser(0.7), "signal", LearnedSchedule(4.0, -3.0, schedule_units=3), ExactNormal()),
    DiffusionVAE(4, 3, "chain", SMALL, schedule=LinearSchedule(6.0, -3.0)),
    *(DiffusionVAE(4, 50, "one-step", SMALL, predicts, CosineSchedule(6.0, -3.0)) for predicts in PREDICTS),
    DiffusionVAE(
        16, 50, "one-step", UNet((1, 4, 4), (4, 8), octaves=(0,)), likelihood=DiscretizedNormal(8),
        schedule=TabulatedSchedule((6.0, 2.0, -3.0)),
    ),
    DiffusionVAE(32, 50, "one-step", UNet((2, 4, 4), (3,), num_blocks=2, patch=2), "prior", schedule=PolynomialSchedule(6.0, -3.0)),
    DiffusionVAE(4, 50, "one-step", SMALL, schedule=LearnedSchedule(6.0, -3.0, schedule_units=4)),
]  # fmt: skip

SCHEDULES = {"linear": LinearSchedule(), "cubic": PolynomialSchedule()}
"""The end points of the published figures."""


def gaussian(process: Any, num_steps: int, schedule: Any = None, scale: float = 1.0) -> DiffusionVAE:
    """A diffusion of N(0, scale^2) with the exact denoiser."""
    schedule = schedule or LinearSchedule()
    return DiffusionVAE(1, num_steps, process, GaussianDenoiser(scale), "signal", schedule, ExactNormal())


def program(engine: str, spec: Any) -> Any:
    return getattr(spec, engine)().with_weights({})


def parts(terms: Any) -> dict[str, Any]:
    return {"log_lik": terms.log_lik} | {name: site.rate for name, site in terms.sites.items()}


# --- oracles ------------------------------------------------------------------------------------------------------


def log_snr(name: str, t: Any) -> Any:
    """The schedules of the published figures, worked out anew."""
    return 13.3 - 18.3 * t ** {"linear": 1, "cubic": 3}[name]


def noise(log_snr: Any) -> tuple[Any, Any]:
    return np.sqrt(special.expit(log_snr)), np.sqrt(special.expit(-log_snr))


def discrete_loss(name: str, num_steps: int, variance: float) -> float:
    """``L_T = 1/2 sum_i (v_{i-1} - v_i) c / (1 + c v_i)``."""
    v = np.exp(log_snr(name, np.arange(num_steps + 1) / num_steps))
    return float((0.5 * (v[:-1] - v[1:]) * variance / (1 + variance * v[1:])).sum())


def continuous_loss(variance: float) -> float:
    """``1/2 log((1 + c v_max) / (1 + c v_min))``: of the ends alone."""
    return float(0.5 * np.log((1 + variance * np.exp(13.3)) / (1 + variance * np.exp(-5.0))))


def end_losses(variance: float) -> tuple[float, float]:
    """The prior's KL and the reconstruction's ``-log p(x | z_0)``."""
    v_min = np.exp(-5.0)
    prior = 0.5 * ((variance * v_min + 1) / (1 + v_min) - 1 + np.log1p(v_min))
    return float(prior), float(0.5 * np.log(2 * np.pi * np.e) - 0.5 * 13.3)


def hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the standard normal distribution; three are exact for squares."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


def test_the_published_figures() -> None:
    assert continuous_loss(1.0) == pytest.approx(6.6466, abs=5e-5)
    for name, figures in {"linear": (17.708, 7.244, 6.703), "cubic": (32.080, 7.508, 6.726)}.items():
        found = [discrete_loss(name, steps, 1.0) for steps in (10, 100, 1000)]
        assert found == pytest.approx(figures, abs=5e-4)


# --- the bound ----------------------------------------------------------------------------------------------------


@covering("name,num_steps,scale", list(product(SCHEDULES, (10, 100, 1000), (1.0, 0.5))), numpyro=(0, 9), ids=str)
def test_the_discrete_loss_is_the_closed_form(engine: str, name: str, num_steps: int, scale: float) -> None:
    nodes, weights = hermite(3)
    x = scale * nodes[:, None]  # three data, of which the means are the expectation
    t = np.arange(1, num_steps + 1) / num_steps
    alpha, sigma = noise(log_snr(name, t))
    noisy = (alpha[:, None, None] * x[:, 0] + sigma[:, None, None] * nodes[:, None]).reshape(-1, 3, 1)
    drawn = np.repeat(t - 0.5 / num_steps, 3)[:, None] + np.zeros((1, 3))
    spec = gaussian("one-step", num_steps, SCHEDULES[name], scale)
    found = program(engine, spec).apply(parts, (x,), values={"time": drawn, "noisy": noisy}, analytic_kl=True)
    step = (found["step"].reshape(num_steps, 3, 3) * weights[:, None] * weights).sum((1, 2)).mean()
    assert step == pytest.approx(discrete_loss(name, num_steps, scale**2), rel=1e-8)
    prior, _ = end_losses(scale**2)
    assert (found[f"z{num_steps}"][0] * weights).sum() == pytest.approx(prior, rel=1e-8)


@PYRO_ALONE
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_by_itself_is_the_closed_form_too(engine: str, name: str) -> None:
    nodes, weights = hermite(3)
    x, num_steps = nodes[:, None], 100
    alpha, sigma = noise(log_snr(name, np.arange(1, num_steps + 1) / num_steps))
    noisy = alpha[:, None] * x[:, 0] + sigma[:, None] * nodes[:, None, None]
    given = program(engine, gaussian("every-step", num_steps, SCHEDULES[name]))
    found = given.apply(parts, (x,), values={"noisy": noisy[..., None]}, analytic_kl=True)
    step = (found["step"] * weights[:, None] * weights).sum()
    assert step == pytest.approx(discrete_loss(name, num_steps, 1.0), rel=1e-8)


def test_the_reconstruction_is_the_closed_form(engine: str) -> None:
    nodes, weights = hermite(3)
    x = nodes[:, None]
    alpha, sigma = noise(13.3)
    z = alpha * x + sigma * nodes[:, None, None]
    found = program(engine, gaussian("one-step", 10)).apply(parts, (x,), values={"z0": z})
    assert -(found["log_lik"] * weights[:, None] * weights).sum() == pytest.approx(end_losses(1.0)[1], abs=1e-8)


@covering("process", ("chain", "one-step", "every-step"), numpyro=(1, 2))
def test_the_three_forms_estimate_one_number(engine: str, process: str) -> None:
    x = np.random.default_rng(1).standard_normal((2000, 1))
    x /= np.sqrt((x**2).mean())  # every term is quadratic in x
    spec = replace(gaussian(process, 10), stratified=False)
    found = program(engine, spec).apply(parts, (x,), num_particles=100, seed=3, analytic_kl=True)
    bound = found.pop("log_lik") - sum(found.values())
    want = -(discrete_loss("linear", 10, 1.0) + sum(end_losses(1.0)))
    error = float(np.sqrt((bound.var(axis=0, ddof=1) / len(bound)).sum())) / len(x)  # of these data
    assert bound.mean() == pytest.approx(want, abs=4.5 * error)
    assert 4.5 * error < 0.05 * abs(want), "the test must be able to fail"


@PYRO_ALONE
def test_the_chain_is_as_likely_as_its_marginal(engine: str) -> None:
    """Its marginal is Gaussian: z_{i-1} is linear in z_i."""
    steps = 6
    schedule = LinearSchedule(4.0, -4.0)
    spec = gaussian("chain", steps, schedule)
    levels = 4.0 - 8.0 * np.arange(steps + 1) / steps
    variance = 1.0
    for s in reversed(range(steps)):
        (alpha, sigma), (alpha_s, sigma_s) = noise(levels[s + 1]), noise(levels[s])
        lost = -np.expm1(levels[s + 1] - levels[s])
        said = alpha / (alpha**2 + sigma**2)  # E[x | z] = said z, for data of variance 1
        slope = alpha_s / alpha * (1 - lost * (1 - alpha * said))
        variance = slope**2 * variance + sigma_s**2 * lost
    alpha, sigma = noise(4.0)
    exact = stats.norm(scale=np.sqrt(variance / alpha**2 + sigma**2 / alpha**2))
    x = np.array([[-1.0], [0.2], [1.5]])
    found = evaluate(program(engine, spec), x, num_particles=5000)
    assert found.weighted
    assert found.nll == pytest.approx(-exact.logpdf(x).mean(), abs=4.5 * found.nll_mc_se)
    assert found.nll_mc_se < 0.03
    drawn = program(engine, spec).predict((x,), num_particles=1000, prior=True)["observed"]["x"]
    assert stats.kstest(drawn.ravel(), exact.cdf).pvalue > 1e-3


@PYRO_ALONE
def test_the_model_draws_what_its_chain_is(engine: str) -> None:
    """In the form that draws one step, z_0 comes of all of them."""
    x = np.zeros((4, 1))
    chain, one = (
        program(engine, gaussian(p, 5, LinearSchedule(4.0, -4.0))).predict((x,), num_particles=500, prior=True)
        for p in ("chain", "one-step")
    )
    assert stats.ks_2samp(chain["latent"]["z0"].ravel(), one["latent"]["z0"].ravel()).pvalue > 1e-3
    assert set(one["latent"]) == {"z5", "time", "level", "noisy", "step", "z0"}


# --- what is made of it ------------------------------------------------------------------------------------------


def test_the_libraries_own_elbo_is_the_bound() -> None:
    numpyro, pyro = pytest.importorskip("numpyro"), pytest.importorskip("pyro")
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((400, 1))
    spec = gaussian("one-step", 10)
    want = -400 * (discrete_loss("linear", 10, 1.0) + sum(end_losses(1.0)))
    one = numpyro.infer.Trace_ELBO(200).loss(jax.random.key(0), {}, spec.numpyro().model, spec.numpyro().guide, x)
    two = pyro.infer.Trace_ELBO(200, vectorize_particles=True, max_plate_nesting=1)
    found = two.loss(spec.pyro().model, spec.pyro().guide, torch.as_tensor(x))
    assert -float(one) == pytest.approx(want, rel=0.1)
    assert -found == pytest.approx(want, rel=0.1)


@PYRO_ALONE
@pytest.mark.parametrize("spec", [gaussian("one-step", 10), gaussian("every-step", 10)], ids=lambda s: s.process)
def test_an_estimate_is_not_a_weight(engine: str, spec: DiffusionVAE) -> None:
    given, x = program(engine, spec), np.random.default_rng(0).standard_normal((6, 1))
    terms = given.outline((x,))
    assert "masked out" in terms.estimated
    with pytest.raises(Refused, match=r"the program of IWAE must weigh all that it draws; got site .*process='chain'"):
        IWAE(2).check(terms)
    ELBO(2).check(terms)
    for instrument in (bottleneck, gaps):
        with pytest.raises(Refused, match="must weigh all that it draws"):
            instrument(given, x)
    found = evaluate(given, x, num_particles=40)
    assert not found.weighted
    assert found.nll == pytest.approx(-found.elbo)
    assert found.nll == pytest.approx(found.rate + found.distortion)
    assert "NLL, at most" in str(found)
    assert "effective draws" not in str(found)
    assert found.summary()["k_hat_bad"] is None
    assert np.isfinite(found.nll_mc_se)


def test_a_plate_that_is_subsampled_beside_the_data_makes_an_estimate(engine: str) -> None:
    """On a user's own program."""
    import oracles

    lib = oracles.library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", 3, dim=-1):
            with lib.plate("parts", 4, subsample_size=1, dim=-2):
                z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z.sum(-2), 1.0), obs=x)

    def guide(x: Any) -> None:
        a = lib.param("a", lib.array(0.4))
        with lib.plate("data", 3, dim=-1), lib.plate("parts", 4, subsample_size=1, dim=-2):
            lib.sample("z", lib.dist.Normal(a, 1.0))

    terms = oracles.wrapped(engine, model, guide).outline((np.zeros(3),))
    with pytest.raises(Refused, match="got plate 'parts', which is subsampled beside the data's"):
        IWAE(2).check(terms)
    ELBO(2).check(terms)


@PYRO_ALONE  # written once for both engines
def test_what_is_measured_of_a_chain(engine: str) -> None:
    x = np.random.default_rng(0).standard_normal((30, 1))
    given = program(engine, gaussian("chain", 4, LinearSchedule(4.0, -4.0)))
    found = evaluate(given, x, num_particles=200)
    assert found.rate == pytest.approx(sum(found.rate_per_site.values()))
    assert list(found.rate_per_site) == ["z0", "z1", "z2", "z3", "z4"]
    bottle = bottleneck(given, x, num_particles=50)
    assert 0 < bottle.mutual_information < np.log(30) + 0.1
    assert bottle.rate == pytest.approx(found.rate, abs=4.5 * bottle.rate_se)


@PYRO_ALONE  # written once for both engines
def test_in_arviz(engine: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 1))
    found = to_arviz(program(engine, gaussian("one-step", 10)), x, num_draws=7)
    assert found["posterior"]["z0"].shape[:3] == (1, 7, 5)
    assert found["prior"]["z0"].shape[:3] == (1, 1, 5)
    assert not any("posterior_resampled" in str(group) for group in found.groups())
    assert not any("log_weight" in found[group] for group in found.groups() if group.strip("/"))


# --- weighted losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        (SimpleLoss(), lambda snr: np.ones_like(snr)),
        (P2(snr_offset=2.0, snr_power=0.7), lambda snr: (2.0 + snr) ** -0.7),
        (MinSNR(snr_cap=5.0), lambda snr: np.minimum(snr, 5.0) / snr),
    ],
    ids=["simple", "p2", "min-snr"],
)
@pytest.mark.parametrize("process", [10, None])
def test_weighted_losses(engine: str, shape: Any, weight: Any, process: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((6, 1))
    spec: Any = gaussian("one-step", process or 1)
    if process is None:
        spec = VariationalDiffusion(1, GaussianDenoiser(), "signal", likelihood=ExactNormal())
    rng = np.random.default_rng(1)
    time = (rng.integers(10, size=(3, 6)) + 0.5) / 10
    level = 13.3 - 18.3 * (np.ceil(time * 10) / 10 if process else time)
    alpha, sigma = noise(level)
    noisy = alpha * x[:, 0] + sigma * rng.standard_normal(level.shape)
    said = (noisy - alpha * (alpha * noisy)) / sigma  # E[x | z] = alpha z, for data of variance 1
    error = 0.5 * ((noisy - alpha * x[:, 0]) / sigma - said) ** 2
    values = {"time": time, "noisy": noisy[..., None]}
    given = program(engine, spec)

    def look(terms: Any) -> Any:
        shaped = shape.shape_all(terms)
        return {"step": shaped.sites["step"].shaped_rate, "rate": terms.sites["step"].rate,
                "ends": shaped.log_weight + shaped.sites["step"].shaped_rate - terms.log_weight - terms.sites["step"].rate,
                "bound": shape.bound(terms) - ELBO().bound(terms), "gap": shape.scalars(terms)["weighted_gap"]}  # fmt: skip

    found = given.apply(look, (x,), values=values, analytic_kl=True)
    np.testing.assert_allclose(found["step"], weight(np.exp(level)) * error, rtol=1e-9)
    np.testing.assert_allclose(found["ends"], 0, atol=1e-9)
    np.testing.assert_array_equal(found["bound"], 0)
    assert found["gap"] == pytest.approx((found["rate"] - found["step"]).mean())


def test_weighted_losses_train_and_report_the_bound(engine: str) -> None:
    x = 0.5 * np.random.default_rng(0).standard_normal((64, 2))
    spec = VariationalDiffusion(2, MLPDenoiser(units=8, num_layers=1), likelihood=ExactNormal())
    run = fit(getattr(spec, engine)(), x, objective=MinSNR(), epochs=2, batch_size=32, progress=False)
    last = run.history[-1]
    assert last["shaped_bound"] == pytest.approx(last["bound"] + last["weighted_gap"], rel=1e-5)
    assert last["weighted_gap"] > 0


def test_weighted_losses_refuse_what_they_are_not_of(engine: str) -> None:
    x = np.zeros((4, 1))
    for process in ("chain", "every-step"):
        terms = program(engine, gaussian(process, 3)).outline((x,))
        with pytest.raises(Refused, match="the program under SimpleLoss must (be a diffusion|draw one step)"):
            SimpleLoss().check(terms)
    with pytest.raises(Refused, match="allow gains that differ"):
        SimpleLoss(IWAE(2, DReG()))
    SimpleLoss(Beta(ELBO(gradient=STL()), 0.5))
    for bad in ({"snr_offset": 0.0}, {"snr_power": -1.0}):
        with pytest.raises(InvalidArgument, match="snr_"):
            P2(**bad)
    with pytest.raises(InvalidArgument, match="snr_cap"):
        MinSNR(snr_cap=0.0)


# --- odd cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffusionVAE(4, 0), "num_steps must be a whole number of at least 1; got 0"),
        (lambda: DiffusionVAE(4, process="all"), "process must be one of"),
        (lambda: DiffusionVAE(4, predicts="score"), "predicts must be one of"),
        (lambda: DiffusionVAE(4, denoiser=GaussianDenoiser()), r"predicts must be one of \['signal'\]; got 'noise'"),
        (lambda: DiffusionVAE(5, denoiser=UNet((1, 2, 2), (4,))), "image_shape must have data_dim=5 entries"),
        (lambda: DiffusionVAE(4, denoiser=MLPDenoiser), "denoiser must be a Denoiser"),
        (lambda: DiffusionVAE(4, schedule=LearnedSchedule(minimise_variance=True)), "minimise_variance must be of"),
        (lambda: UNet((1, 7, 7), (4, 8)), "image_shape must have a height and width that patches of 1 and 1 halvings"),
        (
            lambda: UNet((1, 6, 6), (4, 8), patch=2),
            "image_shape must have a height and width that patches of 2 and 1 halvings",
        ),
        (lambda: MLPDenoiser(octaves=(-1,)), "every entry of octaves must be"),
        (lambda: GaussianDenoiser(scale=0.0), "scale must be a finite number above 0"),
        (lambda: LinearSchedule(-5.0, 13.3), r"log_snr_max must be above log_snr_min.*got -5.0 and 13.3"),
        (lambda: CosineSchedule(2.0, 2.0), "log_snr_max must be above log_snr_min"),
        (lambda: LinearSchedule(float("inf"), 0.0), r"log_snr_max must lie in \[-25, 25\]"),
        (lambda: PolynomialSchedule(power=0.5), "power must be finite and at least 1"),
        (lambda: TabulatedSchedule((5.0, 6.0, -3.0)), "log_snr must be at least two values, each below the one before"),
        (lambda: TabulatedSchedule((5.0,)), "log_snr must be at least two values"),
        (lambda: LearnedSchedule(schedule_units=0), "schedule_units must be a whole number"),
        (lambda: DiscretizedNormal(levels=1), "levels must be a whole number of at least 2"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build()


def test_images_outside_the_range_are_refused(engine: str) -> None:
    given = getattr(DiffusionVAE(4, 10, denoiser=SMALL), engine)()
    for x in (np.full((2, 4), 1.5), np.full((2, 4), -0.1), np.full((2, 4), 0.3)):
        with pytest.raises(InvalidArgument, match="x must be a multiple of 1/255 in"):
            fit(given, x, epochs=1, progress=False)


# --- parts --------------------------------------------------------------------------------------------------------


@covering("levels,narrow", [(2, False), (8, False), (256, False), (8, True), (256, True)], numpyro=(1, 3), ids=str)
def test_levels_are_a_distribution(engine: str, levels: int, narrow: bool) -> None:
    """Against the densities themselves, normalised in float64 by SciPy."""
    pytest.importorskip({"numpyro": "numpyro", "pyro": "torch"}[engine])
    form = DiscretizedNormal(levels).form(engine)(DiscretizedNormal(levels), narrow)
    if engine == "pyro":
        import torch

        array: Any = torch.as_tensor
    else:
        import jax.numpy as jnp

        array = jnp.asarray
    z, level = np.array([[0.3, -1.7], [0.9, 0.02]]), np.array([6.0, -1.0])
    if narrow:  # as a diffusion has it: each between two levels, or beyond them all; normalised over the nearest alone
        z, level = np.array([[0.3, -1.01], [0.9, 0.02]]), np.array([13.3, 16.0])
        assert specs.is_narrow(DiscretizedNormal(levels), LinearSchedule(level.min()))
    alpha, sigma = (v[:, None] for v in noise(level))
    given = form(array(z), array(level))
    grid = np.linspace(-1, 1, levels)
    density = stats.norm.logpdf(z[..., None], alpha[..., None] * grid, sigma[..., None])
    want = density - special.logsumexp(density, -1, keepdims=True)
    for k in range(levels):
        x = np.full(z.shape, k / (levels - 1))
        np.testing.assert_allclose(given.log_prob(array(x)), want[..., k].sum(-1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(given.mean, (np.exp(want) * np.arange(levels)).sum(-1) / (levels - 1), rtol=1e-9)


def test_a_prior_is_weighed_against_the_noised_signal() -> None:
    """The noise said is that of the posterior mean of x ~ N(m, s^2) given z, by quadrature; it is finite at the limits."""
    level, z, mean, scale = np.array([2.0, -1.0]), np.array([[0.4, -1.2], [1.5, 0.1]]), 0.3, np.array([0.5, 2.0])
    alpha, sigma = noise(level)
    x = np.linspace(-25, 25, 200_001)
    for i, j in np.ndindex(2, 2):
        weight = stats.norm.pdf(x, mean, scale[j]) * stats.norm.pdf(z[i, j], alpha[i] * x, sigma[i])
        want = (z[i, j] - alpha[i] * (weight @ x) / weight.sum()) / sigma[i]
        output = np.concatenate([np.full((2, 2), mean), np.log(scale) + np.zeros((2, 2))], -1)
        np.testing.assert_allclose(specs.noise_said(output, z, level, "prior", ExactNormal())[i, j], want, rtol=1e-9)
    for log_scale, limit in ((-1e4, specs.noise_of(z, 0.0 * z, level)), (1e4, 0.0 * z)):
        output = np.concatenate([0.0 * z, 0.0 * z + log_scale], -1)
        np.testing.assert_allclose(specs.noise_said(output, z, level, "prior", ExactNormal()), limit, atol=1e-12)


@pytest.mark.parametrize(("log_snr", "within"), [(13.3, 1e-3), (11.0, 1e-3), (9.0, 4e-3), (6.0, 4e-3)])
def test_a_level_is_read_off_where_it_can_be(log_snr: float, within: float) -> None:
    """The noise said is that of the mean given z of a level that was ``N(m, s^2)`` before: Bayes's rule on all levels."""
    levels, level = 256, np.array([log_snr])
    (alpha,), (sigma,) = noise(level)
    grid, gap = np.linspace(-1, 1, levels), 2.0 / (levels - 1)
    random = np.random.default_rng(0)
    for mean, scale in ((-0.3, 0.2), (0.1, 5.0), (0.2, 0.3 * gap), (-0.6, 1e-4 * gap)):
        prior = special.softmax(stats.norm.logpdf(grid, mean, scale) + np.where(np.abs(grid) < 0.8, 0.0, -np.inf))
        z = alpha * random.choice(grid, 20, p=prior) + sigma * random.normal(size=20)
        logits = stats.norm.logpdf(grid, mean, scale) + stats.norm.logpdf(z[:, None], alpha * grid, sigma)
        want = special.softmax(logits, -1) @ grid
        output = np.stack([np.full(20, mean), np.full(20, np.log(scale))], -1)
        said = specs.noise_said(output, z[:, None], np.repeat(level, 20), "prior", DiscretizedNormal(levels))
        np.testing.assert_allclose((z - sigma * said[:, 0]) / alpha, want, atol=within * gap)


def test_a_level_that_is_surely_known_costs_no_nats() -> None:
    """Beyond the ends there is no level: an output below them is the lowest one exactly, however little noise is left."""
    level, z = np.array([13.3]), np.array([[-0.999, 0.31]])
    output = np.array([[-1.7, 0.31, -0.5, 9.0]])  # a prior that black is in the middle of; any level, so read off z
    x = specs.signal_of(z, specs.noise_said(output, z, level, "prior", DiscretizedNormal(256)), level)
    np.testing.assert_allclose(x, [[-1.0, np.round(0.31 * 127.5 + 127.5) / 127.5 - 1.0]], atol=2e-4)


def test_what_contradicts_a_sure_denoiser_costs_nats_and_not_their_square() -> None:
    """A black that is white: the chain's KL for one pixel, over all noise levels, is tens of nats; else half a million."""
    level = np.linspace(-5.0, 13.3, 2001)
    alpha, sigma = (v[:, None] for v in noise(level))
    eps = np.random.default_rng(0).normal(size=(2001, 1))
    for mean, x in ((-1.0, 1.0), (1.5, 0.95), (-30.0, 1.0)):
        z, output = alpha * x + sigma * eps, np.repeat([[mean, -9.0]], 2001, 0)
        said = specs.noise_said(output, z, level, "prior", DiscretizedNormal(256))
        assert 10.0 < 0.5 * ((eps - said) ** 2).mean() * 18.3 < 60.0, (mean, x)
    said = specs.noise_said(output, z, level, "prior", ExactNormal())
    assert 0.5 * ((eps - said) ** 2).mean() * 18.3 > 1e5


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(),
        PolynomialSchedule(power=2.0),
        CosineSchedule(),
        TabulatedSchedule((8.0, 3.0, 1.0, -4.0)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedules_fall_at_the_slope_they_say(schedule: Any) -> None:
    t, h = np.linspace(0.01, 0.99, 50), 1e-6
    value, slope = schedule(t)
    np.testing.assert_allclose((schedule(t - h)[0] - schedule(t + h)[0]) / (2 * h), slope, rtol=1e-4)
    assert (np.diff(value) < 0).all()
    ends = getattr(schedule, "log_snr", None) or (schedule.log_snr_max, schedule.log_snr_min)
    np.testing.assert_allclose(schedule(np.array([0.0, 1.0]))[0], (ends[0], ends[-1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "schedule", [PolynomialSchedule(), CosineSchedule(13.3, -25.0), CosineSchedule(25.0, -25.0)], ids=str
)
def test_single_precision_is_enough(engine: str, schedule: Any) -> None:
    """Where steps are so small that rounding makes them none, and at the ends."""
    t = np.linspace(0, 1, 1001)
    exact, rounded = schedule(t), schedule(t.astype(np.float32))
    assert rounded[0].dtype == np.float32
    np.testing.assert_allclose(rounded[0], exact[0], atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(rounded[1], exact[1], rtol=1e-3)
    from elbozoo.zoo.diffusion import step_back

    level = rounded[0].astype(np.float32)
    z = np.ones((1000, 2), np.float32)
    loc, scale = step_back(z, z, level[1:], level[:-1])
    assert np.isfinite(loc).all()
    assert (scale > 0).all()


@PYRO_ALONE
def test_a_weighting_of_a_step_that_costs_nothing(engine: str) -> None:
    """At the very beginning of a cubic schedule."""
    spec = VariationalDiffusion(
        1, GaussianDenoiser(), "signal", schedule=PolynomialSchedule(), likelihood=ExactNormal()
    )
    for shape in (SimpleLoss(), P2(), MinSNR()):
        found = program(engine, spec).apply(
            lambda terms, s=shape: s.surrogate(terms),
            (np.ones((2, 1)),),
            values={"time": np.array([[0.0, 0.5]])},
            analytic_kl=True,
        )
        assert np.isfinite(found).all()


def test_a_masked_latent_that_a_plate_spreads_makes_an_estimate(engine: str) -> None:
    import oracles

    lib = oracles.library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", 3, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0).mask(False))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", 3, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.param("a", lib.array(0.4)), 1.0).mask(False))

    assert "'z', which is masked out" in oracles.wrapped(engine, model, guide).outline((np.zeros(3),)).estimated
