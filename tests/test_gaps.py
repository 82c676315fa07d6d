"""The gaps of the bound, and exact likelihoods, against closed forms and enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from oracles import library, wrapped
from scipy import optimize, stats

from elbozoo.inference import (
    InvalidArgument,
    Refused,
    bottleneck,
    calibrate,
    evaluate,
    exact_log_lik,
    fit,
    gaps,
    optimise_guide,
)
from elbozoo.zoo import LinearVAE


def linear(rng: np.random.Generator, guide: str) -> tuple[LinearVAE, dict[str, np.ndarray], np.ndarray]:
    """A model with a correlated posterior, its best guide, and data."""
    spec = LinearVAE(data_dim=5, latent_dim=2, scale=0.7, guide=guide)
    model = {"decoder.weight": rng.normal(size=(5, 2)) + 0.5, "decoder.bias": rng.normal(size=5)}
    return spec, spec.exact_guide(model), rng.normal(size=(12, 5)) * 1.5


def correlation_gap(spec: LinearVAE, w: Any, x: np.ndarray) -> float:
    covariance = spec.posterior(w, x)[1]
    rho = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    return -0.5 * np.log(1 - rho**2)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test, whichever ran before."""
    return np.random.default_rng(3)


def near(values: np.ndarray, want: Any, short: float = 0.0) -> None:
    """The mean is ``want`` within its own Monte Carlo error, and what an optimiser may fall short by."""
    error = values - want
    assert -short < error.mean() + 4 * error.std(ddof=1) / np.sqrt(len(error))
    assert error.mean() < 4 * error.std(ddof=1) / np.sqrt(len(error)) + 1e-9


@PYRO_ALONE
def test_a_diagonal_guide_loses_the_correlation(engine: str, rng: np.random.Generator) -> None:
    """Cremer et al.'s split: −½ log(1 − ρ²) is the family's, and what a shift costs is the network's."""
    spec, best, x = linear(rng, "diagonal")
    gap = correlation_gap(spec, best, x)
    assert gap > 0.1
    shifted = best | {"encoder.bias": best["encoder.bias"] + 0.3}
    program = getattr(spec, engine)().with_weights(shifted)
    found = gaps(program, x, num_data=None, num_steps=200)
    assert found.log_lik_method == "exact"
    np.testing.assert_allclose(found.per_datum["log_lik"], spec.log_prob(best, x))
    near(found.per_datum["optimal_elbo"], spec.elbo(best, x), short=1e-3)
    near(found.per_datum["elbo"], spec.elbo(shifted, x))
    near(found.per_datum["richer_elbo"], spec.log_prob(best, x), short=1e-3)
    near(found.per_datum["log_lik"] - found.per_datum["optimal_elbo"], gap + 1e-3, short=2e-3)
    assert found.approximation + found.amortisation == pytest.approx(found.log_lik - found.elbo)
    assert found.richer == pytest.approx(found.approximation, abs=1e-3)


def test_an_optimal_linear_guide_amortises_without_a_gap(engine: str, rng: np.random.Generator) -> None:
    for guide in ("full",) if engine == "numpyro" else ("diagonal", "full"):
        spec, best, x = linear(rng, guide)
        found = gaps(getattr(spec, engine)().with_weights(best), x, num_data=None, num_steps=150)
        assert abs(found.amortisation) < 4 * found.amortisation_se + 1e-3
        if guide == "full":
            assert abs(found.approximation) < 1e-3
            assert found.richer_elbo is None


@PYRO_ALONE
def test_without_a_closed_form_annealing_takes_its_place(engine: str, rng: np.random.Generator) -> None:
    """A user's own program: z ~ Gamma(3, 1), x ~ N(z, 1), a LogNormal guide too narrow and too low."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Gamma(3.0 + 0.0 * x, 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.LogNormal(0.5 + 0.0 * x, 0.3))

    x = rng.gamma(3.0, size=16) + rng.normal(size=16)
    z = np.linspace(1e-9, 40, 40001)
    joint = stats.gamma.logpdf(z, 3.0) + stats.norm.logpdf(x[:, None], z)
    exact = np.log(np.trapezoid(np.exp(joint), z, axis=1))
    found = gaps(
        wrapped(engine, model, guide), x, num_steps=600, num_particles=20_000, num_temperatures=24, num_chains=32
    )
    assert found.log_lik_method.startswith("AIS, 32 chains, 24 temperatures")
    near(found.per_datum["log_lik"], exact, short=1e-2)
    assert found.amortisation > 0.1
    assert 0 < found.approximation < 0.2
    assert found.richer is None, "nothing here is a diagonal Gaussian"
    log_posterior = joint[0, 1::5] - exact[0]
    best = optimize.minimize(lambda at: _lognormal_kl(log_posterior, z[1::5], at[0], np.exp(at[1])), [2.0, -2.0]).fun
    assert exact[0] - found.per_datum["optimal_elbo"][0] == pytest.approx(best, abs=0.005)


def _lognormal_kl(log_posterior: np.ndarray, z: np.ndarray, loc: float, scale: float) -> float:
    """KL(LogNormal || posterior) by quadrature on the grid ``z``."""
    log_q = stats.lognorm.logpdf(z, scale, scale=np.exp(loc))
    return float(np.trapezoid(np.exp(log_q) * (log_q - log_posterior), z))


@PYRO_ALONE
def test_part_of_the_data_and_refusals(engine: str, rng: np.random.Generator) -> None:
    spec, best, x = linear(rng, "diagonal")
    program = getattr(spec, engine)().with_weights(best)
    found = gaps(program, x, num_data=3, num_steps=2, num_particles=5)
    assert found.num_data == 3
    assert found.per_datum["elbo"].shape == (3,)
    assert found.summary()["log_lik_method"] == "exact"
    if engine == "pyro":  # NumPyro would compile it anew
        one = gaps(program, x[:1], num_steps=2, num_particles=5)
        assert one.summary()["amortisation_se"] is None, "one datum has no spread"
    with pytest.raises(InvalidArgument, match="num_steps must be"):
        gaps(program, x, num_steps=0)
    with pytest.raises(InvalidArgument, match="num_data must be"):
        gaps(program, x, num_data=0)

    lib = library(engine)

    def flow(base: Any) -> Any:
        transforms = lib.dist.transforms
        return lib.dist.TransformedDistribution(base, [transforms.AffineTransform(lib.array(0.0), 2.0)])

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * x, 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", flow(lib.dist.Normal(0.5 * x, 1.0)))

    with pytest.raises(InvalidArgument, match="site 'z' must be drawn from a distribution that can be optimised"):
        gaps(wrapped(engine, model, guide), rng.normal(size=3))


def categorical_program(engine: str) -> Any:
    """``c ~ Categorical``, ``d | c ~ two Bernoullis``, ``x | c, d ~ N``."""
    lib = library(engine)
    table, loc = lib.array(np.array([[0.2, 0.9], [0.5, 0.6], [0.7, 0.1]])), lib.array(np.array([-2.0, 0.0, 3.0]))
    probs = lib.array(np.array([0.5, 0.3, 0.2]))

    def draw(x: Any) -> Any:
        c = lib.sample("c", lib.dist.Categorical(probs=probs))
        d = lib.sample("d", lib.dist.Bernoulli(probs=table[c]).to_event(1))
        return loc[c] + d[..., 0] - 0.5 * d[..., 1]

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            draw(x)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", lib.dist.Normal(draw(x), 0.8), obs=x)

    return wrapped(engine, model, guide)


def test_discrete_latents_are_enumerated(engine: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=9)
    table, loc = np.array([[0.2, 0.9], [0.5, 0.6], [0.7, 0.1]]), [-2.0, 0.0, 3.0]
    want = np.zeros(9)
    for c, a, b in itertools.product(range(3), (0, 1), (0, 1)):
        p = [0.5, 0.3, 0.2][c] * stats.bernoulli.pmf(a, table[c, 0]) * stats.bernoulli.pmf(b, table[c, 1])
        want += p * stats.norm.pdf(x, loc[c] + a - 0.5 * b, 0.8)
    program = categorical_program(engine)
    np.testing.assert_allclose(exact_log_lik(program, x), np.log(want), atol=1e-12)
    assert exact_log_lik(program, x, max_states=11) is None
    with pytest.raises(Refused):  # a local optimum along gradients does not exist
        gaps(program, x, num_steps=2)


@PYRO_ALONE
def test_a_continuous_latent_cannot_be_enumerated(engine: str, rng: np.random.Generator) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * x, 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(0.5 * x, 1.0))

    assert exact_log_lik(wrapped(engine, model, guide), rng.normal(size=3)) is None


@PYRO_ALONE
def test_the_spec_knows_its_marginal(engine: str, rng: np.random.Generator) -> None:
    spec, best, x = linear(rng, "full")
    found = exact_log_lik(getattr(spec, engine)().with_weights(best), x)
    covariance = best["decoder.weight"] @ best["decoder.weight"].T + 0.49 * np.eye(5)
    np.testing.assert_allclose(found, stats.multivariate_normal(best["decoder.bias"], covariance).logpdf(x))


def test_an_optimised_guide_is_a_program(engine: str, rng: np.random.Generator) -> None:
    """Every datum's own best guide, evaluated like any other: with a full covariance it is exact, and k̂ says so."""
    spec, best, x = linear(rng, "diagonal")
    shifted = best | {"encoder.bias": best["encoder.bias"] + 0.3}
    program = getattr(spec, engine)().with_weights(shifted)
    full = optimise_guide(program, x, full_covariance=True, num_steps=200)
    found = evaluate(full, x, num_particles=50)
    np.testing.assert_allclose(found.per_datum.elbo, spec.log_prob(best, x), atol=2e-2)
    assert found.per_datum.ess.min() > 49
    assert program.weights.keys() == shifted.keys(), "the program itself is as it was"
    for instrument in (evaluate, bottleneck, gaps):
        with pytest.raises(InvalidArgument, match="data must be the 12 data that the guide was optimised for; got 5"):
            instrument(full, x[:5])
    with pytest.raises(InvalidArgument, match="guide must be one for any data under calibrate"):
        calibrate(full, x)
    frozen = evaluate(full.frozen(), x, num_particles=50)
    np.testing.assert_allclose(
        frozen.per_datum.elbo, found.per_datum.elbo, rtol=1e-14
    )  # the last bit: folded constants


@PYRO_ALONE  # written once for both engines
def test_latents_over_two_event_dims_have_no_richer_family(engine: str, rng: np.random.Generator) -> None:
    """A diagonal Gaussian over a matrix is not made full, and nothing is claimed of it."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(0.0 * x, 1.0).to_event(2))
            lib.sample("x", lib.dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(0.5 * x, 0.5**0.5).to_event(2))

    options = {"num_steps": 3, "num_particles": 5, "num_temperatures": 2, "num_chains": 600}
    found = gaps(wrapped(engine, model, guide), rng.normal(size=(8, 2, 2)), **options)
    assert found.richer is None
    assert found.richer_elbo is None


@PYRO_ALONE
def test_states_that_differ_between_data_are_not_enumerated(engine: str) -> None:
    """``z ~ Binomial(n_i, ½)`` has other states for other data, whichever comes first."""
    lib = library(engine)

    def model(n: Any, x: Any) -> None:
        with lib.plate("data", len(n), dim=-1):
            z = lib.sample("z", lib.dist.Binomial(total_count=n, probs=0.5 + 0.0 * x))
            lib.sample("x", lib.dist.Normal(1.0 * z, 1.0), obs=x)

    def guide(n: Any, x: Any) -> None:
        with lib.plate("data", len(n), dim=-1):
            lib.sample("z", lib.dist.Binomial(total_count=n, probs=0.5 + 0.0 * x))

    for counts in ([2, 5], [5, 2]):
        assert exact_log_lik(wrapped(engine, model, guide), (np.array(counts), np.array([1.0, 4.0]))) is None


@PYRO_ALONE
def test_a_frozen_program_hides_its_closed_form(engine: str, rng: np.random.Generator) -> None:
    spec, best, x = linear(rng, "diagonal")
    assert exact_log_lik(getattr(spec, engine)().with_weights(best).frozen(), x) is None


def test_a_local_guide_starts_where_the_amortised_one_is(engine: str, rng: np.random.Generator) -> None:
    """Also after a first optimisation: training one copy moves no other."""
    spec, best, x = linear(rng, "diagonal")
    shifted = best | {"encoder.bias": best["encoder.bias"] + 0.3}
    local = getattr(spec, engine)().with_weights(shifted).localised((x,))
    one, two = (fit(local, x, epochs=1, batch_size=len(x), progress=False).history[0]["bound"] for _ in range(2))
    assert one == two


@pytest.mark.pyro
def test_a_distribution_without_a_support_is_evaluated(rng: np.random.Generator) -> None:
    """A user's own prior need not state where it lies, unless latents are to be moved."""
    import pyro
    import pyro.distributions as dist

    from elbozoo.inference.pyro_engine import Program

    class Own(dist.TorchDistribution):
        arg_constraints: Any = {}  # noqa: RUF012

        def __init__(self, base: Any):
            self.base = base
            super().__init__(base.batch_shape, base.event_shape, validate_args=False)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Own(self.base.expand(batch_shape))

        def sample(self, sample_shape: Any = ()) -> Any:
            return self.base.sample(sample_shape)

        def log_prob(self, value: Any) -> Any:
            return self.base.log_prob(value)

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Own(dist.Normal(0.0 * x, 1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5))

    x = rng.normal(size=6)
    found = evaluate(Program(model, guide), x, num_particles=3)
    assert found.nll == pytest.approx(-stats.norm.logpdf(x, 0, 2**0.5).mean())
    with pytest.raises(InvalidArgument, match="site 'z' must have a support that is the same for all data"):
        gaps(Program(model, guide), x, num_steps=1)
