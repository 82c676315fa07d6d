"""Annealed importance sampling against closed forms and quadrature: it brackets log p(x), in both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from oracles import library, shared_latent, wrapped
from scipy import stats

from elbozoo.inference import InvalidArgument, annealed_importance_sampling, bracket, calibrate, evaluate
from elbozoo.inference.annealing import WU_2016, sigmoid_schedule
from elbozoo.zoo import LinearVAE

FAST: dict[str, Any] = {"num_temperatures": 24, "num_chains": 8, "num_leapfrog": 4}
FASTER: dict[str, Any] = {"num_temperatures": 6, "num_chains": 8, "num_leapfrog": 2}


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test, whichever ran before."""
    return np.random.default_rng(5)


def weights(rng: np.random.Generator, spec: LinearVAE) -> dict[str, np.ndarray]:
    """A random model, and a diagonal guide that is off: shifted and too wide."""
    model = {"decoder.weight": rng.normal(size=(4, 2)), "decoder.bias": rng.normal(size=4)}
    guide = spec.exact_guide(model)
    return guide | {"encoder.bias": guide["encoder.bias"] + 0.4, "encoder_log_scale": guide["encoder_log_scale"] + 0.3}


@covering("start", ("guide", "prior"), numpyro=(1,))
def test_meets_the_closed_form(engine: str, start: Any, rng: np.random.Generator) -> None:
    spec = LinearVAE(data_dim=4, latent_dim=2, scale=0.6)
    w, x = weights(rng, spec), rng.normal(size=(25, 4))
    program = getattr(spec, engine)().with_weights(w)
    found = annealed_importance_sampling(program, x, start=start, **FAST)
    error = found.log_lik_estimate - spec.log_prob(w, x)
    spread = error.std(ddof=1) / 5
    assert -4 * spread - error.var(ddof=1) < error.mean() < 4 * spread, "E log w is below log E w by half its variance"
    assert 0.3 < found.mc_se / spread < 3, "the standard error from the chains is one"
    assert found.log_lik == pytest.approx(found.log_lik_estimate.mean())
    importance = evaluate(program, x, num_particles=8)
    assert error.std() < np.std(importance.per_datum.log_lik_estimate - spec.log_prob(w, x))
    assert found.acceptance > 0.4


@PYRO_ALONE
def test_the_last_states_are_posterior_draws(engine: str, rng: np.random.Generator) -> None:
    spec = LinearVAE(data_dim=4, latent_dim=2, scale=0.6)
    w, x = weights(rng, spec), rng.normal(size=(3, 4))
    options = {**FAST, "num_chains": 400}
    found = annealed_importance_sampling(getattr(spec, engine)().with_weights(w), x, **options)
    mean, covariance = spec.posterior(w, x)
    error = (found.values["z"].mean(axis=0) - mean) / np.sqrt(np.diag(covariance) / 400)
    assert np.abs(error).max() < 4
    for draws in np.moveaxis(found.values["z"], 1, 0):
        np.testing.assert_allclose(np.cov(draws.T), covariance, atol=4 * covariance.max() * np.sqrt(2 / 400))


@covering("start", ("guide", "prior"), numpyro=())
def test_both_directions_bracket_the_closed_form(engine: str, start: Any, rng: np.random.Generator) -> None:
    """Few temperatures and one chain: the bounds are apart, and the truth is between them."""
    spec = LinearVAE(data_dim=4, latent_dim=2, scale=0.6)
    w = weights(rng, spec)
    program, like = getattr(spec, engine)().with_weights(w), np.zeros((240, 4))
    loose = bracket(program, like, num_temperatures=8, num_chains=1, num_leapfrog=3, start=start)
    exact = spec.log_prob(w, loose.data[0])
    below, above = exact - loose.lower, loose.upper - exact
    assert below.mean() > 3 * below.std() / np.sqrt(240)
    assert above.mean() > 3 * above.std() / np.sqrt(240)
    assert loose.gap == pytest.approx(below.mean() + above.mean())
    tight = bracket(program, like, start=start, **FAST)
    exact = spec.log_prob(w, tight.data[0])
    assert abs(tight.gap) < 0.3 * loose.gap
    for bound in (tight.lower, tight.upper):
        error = bound - exact
        assert abs(error.mean()) < 4 * error.std(ddof=1) / np.sqrt(240) + error.var(ddof=1)


def gamma_program(engine: str) -> Callable:
    """``g ~ Gamma(2, 1)``, ``r | g ~ Beta(1 + g, 2)``, ``x ~ N(g r, ½)``; a guide that does not look."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            g = lib.sample("g", lib.dist.Gamma(2.0 + 0.0 * x, 1.0))
            r = lib.sample("r", lib.dist.Beta(1.0 + g, 2.0))
            lib.sample("x", lib.dist.Normal(g * r, 0.5), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("g", lib.dist.Gamma(3.0 + 0.0 * x, 1.5))
            lib.sample("r", lib.dist.Beta(2.0 + 0.0 * x, 2.0))

    return wrapped(engine, model, guide)


@covering("start", ("guide", "prior"), numpyro=(0,))
def test_bounded_and_dependent_latents_meet_quadrature(engine: str, start: Any) -> None:
    x = np.array([0.3, 1.0, 2.5, 4.0])

    g, r = np.linspace(0, 30, 1501)[:, None], (np.arange(400) + 0.5) / 400  # trapezoids by midpoints
    prior = stats.gamma.pdf(g, 2) * stats.beta.pdf(r, 1 + g, 2)
    exact = [np.log(np.trapezoid((prior * stats.norm.pdf(v, g * r, 0.5)).mean(axis=1), g[:, 0])) for v in x]
    options = {**FAST, "num_chains": 200}
    found = annealed_importance_sampling(gamma_program(engine), x, start=start, **options)
    assert abs((found.log_lik_estimate - exact).mean()) < 4 * found.mc_se
    assert found.mc_se < 0.1


@PYRO_ALONE
def test_the_prior_start_knows_nothing_of_the_guide(engine: str, rng: np.random.Generator) -> None:
    spec = LinearVAE(data_dim=4, latent_dim=2, scale=0.6)
    w, x = weights(rng, spec), rng.normal(size=(4, 4))
    other = w | {"encoder.bias": w["encoder.bias"] + 3.0}
    one, two = (
        annealed_importance_sampling(getattr(spec, engine)().with_weights(v), x, start="prior", **FASTER)
        for v in (w, other)
    )
    np.testing.assert_array_equal(one.log_lik_estimate, two.log_lik_estimate)


def test_equal_seeds_and_small_batches(engine: str, rng: np.random.Generator) -> None:
    spec = LinearVAE(data_dim=4, latent_dim=2, scale=0.6)
    w, x = weights(rng, spec), rng.normal(size=(7, 4))
    program = getattr(spec, engine)().with_weights(w)
    one, same, other = (annealed_importance_sampling(program, x, seed=s, **FASTER) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.log_lik_estimate, same.log_lik_estimate)
    assert (one.log_lik_estimate != other.log_lik_estimate).all()
    limit = 3 * 8 * 32 * 4 * 8  # three data of eight chains a call
    batched = annealed_importance_sampling(program, x, memory_limit=limit, **FASTER)
    assert batched.log_lik_estimate.shape == (7,)
    assert batched.values["z"].shape == (8, 7, 2)
    error = batched.log_lik_estimate - spec.log_prob(w, x)
    assert np.abs(error).max() < 6 * np.sqrt(7) * batched.mc_se


def test_schedule_and_published_settings() -> None:
    betas = sigmoid_schedule(10)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (np.diff(betas) > 0).all()
    np.testing.assert_allclose(betas + betas[::-1], 1.0)
    assert np.diff(betas)[0] < np.diff(betas)[5]
    assert WU_2016["num_temperatures"] == 10_000


def test_bad_input_is_refused(engine: str, rng: np.random.Generator) -> None:
    lib = library(engine)
    spec = LinearVAE(data_dim=4, latent_dim=2)
    program = getattr(spec, engine)().with_weights(weights(rng, spec))
    for options, text in [
        ({"num_chains": 0}, "num_chains must be"),
        ({"start": "posterior"}, "start must be"),
        ({"target_acceptance": 1.0}, r"target_acceptance must lie in \(0, 1\)"),
        ({"num_leapfrog": 0}, "num_leapfrog must be"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            annealed_importance_sampling(program, rng.normal(size=(2, 4)), **options)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            d = lib.sample("d", lib.dist.Bernoulli(0.5 + 0.0 * x))
            lib.sample("x", lib.dist.Normal(1.0 * d, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("d", lib.dist.Bernoulli(0.5 + 0.0 * x))

    with pytest.raises(InvalidArgument, match="site 'd' must be continuous"):
        annealed_importance_sampling(wrapped(engine, model, guide), rng.normal(size=3))

    with pytest.raises(InvalidArgument, match="program must have every latent inside its data plate"):
        annealed_importance_sampling(wrapped(engine, *shared_latent(engine)), rng.normal(size=3))


def test_simulated_data_need_a_place(engine: str, rng: np.random.Generator) -> None:
    """A program that looks only at a part of its argument: where its data come from cannot be told."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * x[:, 0], 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(0.5 * x[:, 0], 1.0))

    with pytest.raises(InvalidArgument, match="site 'x' must be observed at one argument of the program"):
        bracket(wrapped(engine, model, guide), rng.normal(size=(3, 2)))


def chain(engine: str) -> Any:
    """``z → a → b``, two observed sites of which the second is drawn given the first; an exact guide."""
    lib = library(engine)

    def model(a: Any, b: Any) -> None:
        with lib.plate("data", len(a), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * a, 1.0))
            first = lib.sample("a", lib.dist.Normal(z, 1.0), obs=a)
            lib.sample("b", lib.dist.Normal(10.0 * first, 1.0), obs=b)

    def guide(a: Any, b: Any) -> None:
        with lib.plate("data", len(a), dim=-1):
            lib.sample("z", lib.dist.Normal(0.5 * a, 0.5**0.5))

    return wrapped(engine, model, guide)


def test_what_is_simulated_is_one_draw_of_the_whole_model(engine: str) -> None:
    """The second observed site follows the first's draw, and the bound from above is of the same data."""
    a = np.full(200, 5.0)
    options: dict[str, Any] = {"num_temperatures": 2, "num_chains": 2, "num_leapfrog": 1}
    found = bracket(chain(engine), (a, 0.0 * a), observed={"a": 0, "b": 1}, **options)
    drawn, second = found.data
    exact = stats.norm.logpdf(drawn, 0, 2**0.5) + stats.norm.logpdf(second, 10 * drawn, 1)
    np.testing.assert_allclose(found.lower, exact, atol=1e-9)
    np.testing.assert_allclose(found.upper, exact, atol=1e-9)
    assert abs(drawn.mean()) < 4 * np.sqrt(2 / 200), "the data given were for their shapes alone"
    with pytest.raises(InvalidArgument, match=r"Say which: bracket\(…, observed="):
        bracket(chain(engine), (a, 0.0 * a), **options)


def test_a_latent_drawn_given_data_is_not_simulated(engine: str, rng: np.random.Generator) -> None:
    lib = library(engine)

    def model(y: Any) -> None:
        with lib.plate("data", len(y), dim=-1):
            lib.sample("y", lib.dist.Normal(0.0 * y, 1.0), obs=y)
            lib.sample("z", lib.dist.Normal(3.0 * y, 1.0))

    def guide(y: Any) -> None:
        with lib.plate("data", len(y), dim=-1):
            lib.sample("z", lib.dist.Normal(3.0 * y, 1.0))

    for instrument in (bracket, calibrate):
        with pytest.raises(InvalidArgument, match="site 'z' must be drawn before what is observed"):
            instrument(wrapped(engine, model, guide), rng.normal(size=5))


def test_supports_that_differ_between_data(engine: str, rng: np.random.Generator) -> None:
    """``z ~ U(0, x)``: on JAX refused by name; where torch keeps the bounds, right."""
    lib = library(engine)
    x = rng.uniform(1.0, 3.0, size=30)

    def model(x: Any, y: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Uniform(0.0 * x, x))
            lib.sample("y", lib.dist.Normal(z, 0.5), obs=y)

    def guide(x: Any, y: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Uniform(0.0 * x, x))

    program, y = wrapped(engine, model, guide), rng.normal(size=30) + 1
    if engine == "numpyro":
        with pytest.raises(InvalidArgument, match="site 'z' must have a support that is the same for all data"):
            annealed_importance_sampling(program, (x, y), **FASTER)
        return
    found = annealed_importance_sampling(program, (x, y), **{**FASTER, "num_chains": 100})
    exact = np.log((stats.norm.cdf((x - y) / 0.5) - stats.norm.cdf(-y / 0.5)) / x)
    assert abs((found.log_lik_estimate - exact).mean()) < 4 * found.mc_se + 0.01


def test_one_program_on_data_of_two_widths(engine: str, rng: np.random.Generator) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * x, 1.0).to_event(1))
            lib.sample("x", lib.dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(0.5 * x, 0.5**0.5).to_event(1))

    program = wrapped(engine, model, guide)
    for width in (4, 3):
        x = rng.normal(size=(5, width))
        found = annealed_importance_sampling(program, x, **FASTER)
        np.testing.assert_allclose(found.log_lik_estimate, stats.norm.logpdf(x, 0, 2**0.5).sum(-1), atol=1e-9)
