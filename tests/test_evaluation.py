"""Importance-sampled likelihoods, against closed forms of a linear-Gaussian model and sums over a table of weights.

Oracles are SciPy and NumPy: the exact marginal and KL, a plain logsumexp over all draws at once, and for Pareto k̂
samples of known k and ArviZ's own.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE
from scipy import stats
from scipy.special import logsumexp

from elbozoo.inference.data import prepare
from elbozoo.inference.errors import InvalidArgument, NonFinite
from elbozoo.inference.evaluation import Evaluation, call_size, evaluate
from elbozoo.inference.psis import largest, pareto_k, pareto_k_from_tail, pareto_smooth, tail_size
from elbozoo.inference.terms import Site, Terms
from elbozoo.zoo import VAE

# --- programs ---------------------------------------------------------------------------------------------------

X, D, NOISE = 4, 3, 0.6
WEIGHT, BIAS = np.split(np.random.default_rng(7).normal(size=(X, D + 1)), [D], axis=1)
BIAS = BIAS[:, 0]
DATA = np.random.default_rng(8).normal(size=(23, D + X)) @ np.hstack([WEIGHT, NOISE * np.eye(X)]).T + BIAS
EXACT_LOG_LIK = stats.multivariate_normal(BIAS, WEIGHT @ WEIGHT.T + NOISE**2 * np.eye(X)).logpdf(DATA)


def posterior(weight: np.ndarray = WEIGHT) -> tuple[np.ndarray, np.ndarray]:
    """Rows A of the posterior mean ``A (x - b)``, and the posterior's covariance."""
    covariance = np.linalg.inv(np.eye(weight.shape[1]) + weight.T @ weight / NOISE**2)
    return covariance @ weight.T / NOISE**2, covariance


def wrap(engine: str, model: Any, guide: Any) -> Any:
    if engine == "pyro":
        from elbozoo.inference.pyro_engine import Program

        return Program(model, guide)
    from elbozoo.inference.numpyro_engine import Program

    return Program(model, guide).with_params({})


def library(engine: str) -> tuple[Any, Any, Any]:
    """(the library, its distributions, a function from NumPy to its arrays)"""
    if engine == "pyro":
        import pyro
        import pyro.distributions as dist
        import torch

        return pyro, dist, torch.as_tensor
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return numpyro, dist, jnp.asarray


def linear_gaussian(
    engine: str,
    covariance: np.ndarray,
    shift: float = 0.0,
    weight: np.ndarray = WEIGHT,
    diagonal: bool = False,
    plate: bool = True,
) -> Any:
    """``z ~ N(0, I), x | z ~ N(W z + b, s2 I)`` as a user writes it; the guide ``N(A (x - b) + shift, covariance)``."""
    library_, dist, array = library(engine)
    w, b, a, root = array(weight), array(BIAS), array(posterior(weight)[0]), array(np.linalg.cholesky(covariance))
    zeros, scale = array(np.zeros(weight.shape[1])), array(np.sqrt(np.diag(covariance)))

    def rows(x: Any) -> Any:
        return library_.plate("data", len(x), dim=-1) if plate else _Nothing()

    def model(x: Any) -> None:
        with rows(x):
            prior = dist.Normal(zeros, 1.0).to_event(1)
            z = library_.sample("z", prior if plate else prior.expand((len(x),)))
            library_.sample("x", dist.Normal(z @ w.T + b, NOISE).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc = (x - b) @ a.T + shift
        with rows(x):
            library_.sample(
                "z", dist.Normal(loc, scale).to_event(1) if diagonal else dist.MultivariateNormal(loc, scale_tril=root)
            )

    return wrap(engine, model, guide)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def gaussian_kl(loc: np.ndarray, covariance: np.ndarray, other_loc: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(N(loc, covariance) || N(other_loc, other)) for each row of locations."""
    inverse = np.linalg.inv(other)
    distance = np.einsum("ni,ij,nj->n", other_loc - loc, inverse, other_loc - loc)
    log_dets = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + distance - len(covariance) + log_dets)


@dataclass
class Tabled:
    """A fake program whose draws come off a table, so that however they are cut into calls they are the same draws."""

    num_particles: int
    num_data: int
    latent_dim: int = 2
    joint: bool = False
    spec: Any = None
    engine: str = "numpyro"
    float_dtype: type = float
    calls: list[tuple[int, int, int, int]] = field(default_factory=list)  # first row, data, particles, seed
    taken: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(3)
        shape = (self.num_particles, self.num_data)
        self.log_lik = 300.0 * rng.normal(size=shape[1:]) + 3.0 * rng.normal(size=shape)
        self.prior, self.guide = rng.normal(size=(2, *shape, self.latent_dim))
        self.z = np.linspace(0.0, 3.0, self.num_data)[:, None] * [1.0, 0.0] + rng.normal(size=(*shape, self.latent_dim))

    @property
    def data(self) -> np.ndarray:
        return np.arange(float(self.num_data))[:, None]

    @property
    def log_weight(self) -> np.ndarray:
        return self.log_lik + (self.prior - self.guide).sum(axis=-1)

    def outline(self, args: tuple) -> Terms:
        return Terms(np.zeros((1, 1)), {})

    def apply(self, fn: Any, args: tuple, *, num_particles: int, seed: int, analytic_kl: bool = False) -> Any:
        rows = args[0][:, 0].astype(int)
        first = self.taken.get(rows[0], 0)
        self.taken[rows[0]] = first + num_particles
        self.calls.append((rows[0], len(rows), num_particles, seed))
        at = np.ix_(np.arange(first, first + num_particles), rows)
        guide, prior = self.guide[at], self.prior[at]
        site = Site(prior.sum(axis=-1), guide.sum(axis=-1), log_prior_terms=prior, log_guide_terms=guide)
        return fn(Terms(self.log_lik[at], {"z": site}, values={"z": self.z[at]}))


# --- likelihoods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 7, 300])
def test_an_exact_guide_gives_the_exact_likelihood_at_every_k(engine: str, num_particles: int) -> None:
    found = evaluate(linear_gaussian(engine, posterior()[1]), DATA, num_particles=num_particles)
    np.testing.assert_allclose(found.per_datum.log_lik_estimate, EXACT_LOG_LIK, atol=1e-10)
    np.testing.assert_allclose(found.per_datum.elbo, EXACT_LOG_LIK, atol=1e-10)
    assert found.nll == pytest.approx(-EXACT_LOG_LIK.mean(), abs=1e-10)
    assert found.nll_se == pytest.approx(stats.sem(EXACT_LOG_LIK), abs=1e-10)
    if num_particles > 1:
        assert found.nll_mc_se < 1e-7
    else:
        assert math.isnan(found.nll_mc_se)
    np.testing.assert_allclose(found.per_datum.ess, num_particles)
    expected = -np.inf if num_particles >= 21 else np.nan
    np.testing.assert_array_equal(found.per_datum.k_hat, np.full(len(DATA), expected))


@PYRO_ALONE
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_wrong_guide_misses_by_its_divergence(engine: str, batch_size: int | None) -> None:
    mean, covariance = posterior()
    wide = np.diag(1.5 * np.diag(covariance))
    program = linear_gaussian(engine, wide, shift=0.1, diagonal=True)
    found = evaluate(program, DATA, num_particles=4000, batch_size=batch_size)

    assert 1e-4 < found.nll_mc_se < 0.05
    assert found.nll == pytest.approx(-EXACT_LOG_LIK.mean(), abs=4 * found.nll_mc_se)

    loc = (DATA - BIAS) @ mean.T + 0.1
    gap = gaussian_kl(loc, wide, loc - 0.1, covariance)
    np.testing.assert_allclose(EXACT_LOG_LIK - found.per_datum.elbo, gap, atol=0.2)
    assert -EXACT_LOG_LIK.mean() - found.elbo + 2 * EXACT_LOG_LIK.mean() == pytest.approx(gap.mean(), abs=0.03)

    variances = np.diag(wide)
    rate = 0.5 * (variances + loc**2 - 1.0 - np.log(variances)).mean(axis=0)
    np.testing.assert_allclose(found.rate_per_dimension["z"], rate, atol=0.03)
    assert found.rate == pytest.approx(rate.sum(), abs=0.05)
    assert found.rate == pytest.approx(found.rate_per_dimension["z"].sum(), abs=1e-10)
    assert -found.elbo == pytest.approx(found.rate + found.distortion, abs=1e-10)
    assert (found.per_datum.ess > 10).all()
    assert (found.per_datum.ess < 4000).all()


@pytest.mark.numpyro
def test_the_monte_carlo_error_is_the_spread_over_seeds() -> None:
    program = linear_gaussian("numpyro", np.diag(1.5 * np.diag(posterior()[1])))
    runs = [evaluate(program, DATA[:5], num_particles=200, seed=seed) for seed in range(60)]
    spread = np.std([run.nll for run in runs], ddof=1)
    stated = np.sqrt(np.mean([run.nll_mc_se**2 for run in runs]))
    assert 0.7 < stated / spread < 1.4  # sixty draws know a spread to about a tenth


@PYRO_ALONE
def test_a_guide_that_does_not_factorise_has_no_rate_per_dimension(engine: str) -> None:
    found = evaluate(linear_gaussian(engine, posterior()[1]), DATA, num_particles=2)
    assert found.rate_per_dimension == {}
    assert found.rate == found.rate_per_site["z"]


def test_draws_depend_on_the_seed_alone(engine: str) -> None:
    program = linear_gaussian(engine, 1.3 * posterior()[1])
    first, again = (evaluate(program, DATA, num_particles=20, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.per_datum.log_lik_estimate, again.per_datum.log_lik_estimate)
    assert first.nll != evaluate(program, DATA, num_particles=20, seed=4).nll
    other = evaluate(program, DATA, num_particles=20, seed=3, batch_size=4)
    assert first.nll == pytest.approx(other.nll, abs=4 * math.hypot(first.nll_mc_se, other.nll_mc_se))
    assert first.nll != other.nll


def test_data_may_be_a_tuple_of_arrays(engine: str) -> None:
    library_, dist, _ = library(engine)

    def model(x: Any, y: Any) -> None:
        with library_.plate("data", len(x), dim=-1):
            z = library_.sample("z", dist.Normal(0.0, 1.0))
            library_.sample("x", dist.Normal(z, 1.0), obs=x)
            library_.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x: Any, y: Any) -> None:
        with library_.plate("data", len(x), dim=-1):
            library_.sample("z", dist.Normal((x + y) / 3.0, 3.0**-0.5))

    x, y = np.random.default_rng(9).normal(size=(2, 11))
    found = evaluate(wrap(engine, model, guide), (x, y), num_particles=30, batch_size=4)
    exact = stats.multivariate_normal([0, 0], np.eye(2) + 1.0).logpdf(np.stack([x, y], axis=-1))
    np.testing.assert_allclose(found.per_datum.log_lik_estimate, exact, atol=1e-10)
    assert found.rate_per_dimension["z"].shape == (1,)


# --- joint weights ----------------------------------------------------------------------------------------------


@pytest.mark.numpyro
def test_without_a_plate_there_is_one_joint_weight() -> None:
    program = linear_gaussian("numpyro", posterior()[1], plate=False)  # Pyro's own plates refuse an undeclared batch
    found = evaluate(program, DATA, num_particles=50, batch_size=4)
    assert found.num_data == len(DATA)
    assert found.nll == pytest.approx(-EXACT_LOG_LIK.mean(), abs=1e-10)
    assert found.elbo == pytest.approx(EXACT_LOG_LIK.mean(), abs=1e-10)
    assert -found.elbo == pytest.approx(found.rate + found.distortion, abs=1e-10)
    assert found.per_datum.log_lik_estimate.shape == found.per_datum.k_hat.shape == (1,)
    assert math.isnan(found.nll_se)
    assert found.activity == {}
    assert found.total_active_units is None


def test_a_global_latent_makes_one_joint_weight(engine: str) -> None:
    library_, dist, _ = library(engine)
    data = np.random.default_rng(10).normal(size=30) + 0.7
    precision = 1.0 + len(data)
    loc, scale = data.sum() / precision, 1.3 * precision**-0.5

    def model(x: Any) -> None:
        mean = library_.sample("mean", dist.Normal(0.0, 1.0))
        with library_.plate("data", len(x), dim=-1):
            library_.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Any) -> None:
        library_.sample("mean", dist.Normal(loc, scale))

    found = evaluate(wrap(engine, model, guide), data, num_particles=2720)
    exact = stats.multivariate_normal(np.zeros(30), np.eye(30) + 1.0).logpdf(data) / 30
    assert found.nll == pytest.approx(-exact, abs=4 * found.nll_mc_se)
    assert 0.0 < found.nll_mc_se < 1e-3
    assert exact - found.elbo == pytest.approx((0.5 * (1.3**2 - 1) - math.log(1.3)) / 30, abs=2e-3)
    assert found.num_data == 30


# --- streaming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_particles", "batch_size", "memory_limit"),
    [(400, None, 2**28), (400, 3, 2**28), (401, 7, 20_000), (60, 1, 1), (1, 2, 2**28)],
)
def test_streamed_sums_are_the_sums_over_all_draws(
    num_particles: int, batch_size: int | None, memory_limit: int
) -> None:
    table = Tabled(num_particles, num_data=10)
    found = evaluate(table, table.data, num_particles=num_particles, batch_size=batch_size, memory_limit=memory_limit)
    log_weight = table.log_weight
    log_lik = logsumexp(log_weight, axis=0) - math.log(num_particles)
    weight = np.exp(log_weight - log_weight.max(axis=0))
    np.testing.assert_allclose(found.per_datum.log_lik_estimate, log_lik, rtol=1e-12)
    np.testing.assert_allclose(found.per_datum.elbo, log_weight.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.per_datum.ess, weight.sum(axis=0) ** 2 / (weight**2).sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.per_datum.k_hat, pareto_k(log_weight), rtol=1e-10)
    assert found.nll == pytest.approx(-log_lik.mean(), rel=1e-12)
    assert found.distortion == pytest.approx(-table.log_lik.mean(), rel=1e-12)
    np.testing.assert_allclose(found.rate_per_dimension["z"], (table.guide - table.prior).mean(axis=(0, 1)), rtol=1e-10)
    if num_particles == 1:
        assert math.isnan(found.nll_mc_se)
        assert found.activity == {}
        return
    relative = weight / weight.mean(axis=0)  # delta method: Var(log mean w) = Var(w / mean w) / K
    assert found.nll_mc_se == pytest.approx(
        math.sqrt(relative.var(axis=0, ddof=1).sum() / num_particles) / 10, rel=1e-8
    )
    mean, noise = table.z.mean(axis=0), table.z.var(axis=0, ddof=1).mean(axis=0) / num_particles
    np.testing.assert_allclose(found.activity["z"], mean.var(axis=0, ddof=1) - noise, rtol=1e-10)


def test_every_call_has_one_of_two_shapes_and_a_seed_of_its_own() -> None:
    table = Tabled(601, num_data=50)
    evaluate(table, table.data, num_particles=601)
    shapes = {(data, particles) for _, data, particles, _ in table.calls}
    assert len(table.calls) > 4
    assert len(shapes) <= 2
    assert all(1000 <= data * particles <= 4096 for data, particles in shapes)
    assert sum(particles for first, _, particles, _ in table.calls if first == 0) == 601
    assert len({seed for *_, seed in table.calls}) == len(table.calls)


@pytest.mark.parametrize("num_particles", [1, 10, 1000, 5000])
@pytest.mark.parametrize("num_data", [1, 100, 10_000])
@pytest.mark.parametrize("data_dim", [2, 784, 100_000])
def test_calls_fit_in_the_caches_and_in_memory(num_particles: int, num_data: int, data_dim: int) -> None:
    x = np.broadcast_to(np.float32(0.0), (num_data, data_dim))
    batch, chunk = call_size((x,), num_particles)
    assert 1 <= batch <= num_data
    assert 1 <= chunk <= num_particles
    assert batch * chunk <= 4096
    assert batch * chunk * data_dim * 4 * 32 <= 2**30
    if data_dim <= 784:
        assert batch * chunk >= min(1000, num_data * num_particles)


class Endless:
    """A fake program that makes fresh weights at every call and keeps none."""

    engine, spec, float_dtype = "numpyro", None, np.dtype(float)

    def outline(self, args: tuple) -> Terms:
        return Terms(np.zeros((1, 1)), {})

    def apply(self, fn: Any, args: tuple, *, num_particles: int, seed: int, analytic_kl: bool = False) -> Any:
        log_lik = np.random.default_rng(seed).normal(size=(num_particles, len(args[0])))
        zeros = np.zeros_like(log_lik)
        return fn(Terms(log_lik, {"z": Site(zeros, zeros)}, values={"z": zeros[..., None]}))


def peak_memory(num_particles: int, num_data: int) -> int:
    data = np.zeros((num_data, 1))
    tracemalloc.start()
    evaluate(Endless(), data, num_particles=num_particles)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_grows_with_neither_particles_nor_data() -> None:
    peak_memory(500, 32)  # imports and caches
    few, many_particles, many_data = peak_memory(500, 32), peak_memory(50_000, 32), peak_memory(500, 320)
    # All weights of one batch would be 6.4 MB; the tail's, which grow as √K, and their work arrays come to half of one.
    assert many_particles < few + 700_000
    assert many_data < few + 200_000


# --- active units -----------------------------------------------------------------------------------------------


@PYRO_ALONE
def test_active_units_are_those_whose_posterior_mean_moves(engine: str) -> None:
    weight = np.zeros((X, D))
    weight[0, 0], weight[1, 1] = 3.0, 0.12  # an active unit, one of activity 0.02 and one that the data never see
    mean, covariance = posterior(weight)
    noise = np.random.default_rng(11).normal(size=(400, D + X))
    data = BIAS + noise @ np.hstack([weight, NOISE * np.eye(X)]).T
    activity = ((data - BIAS) @ mean.T).var(axis=0, ddof=1)
    assert activity[0] > 0.9
    assert 0.01 < activity[1] < 0.06
    assert activity[2] == 0.0
    found = evaluate(linear_gaussian(engine, covariance, weight=weight, diagonal=True), data, num_particles=30)
    # Undebiased, the unseen unit would have activity 1/30 and be called active.
    np.testing.assert_allclose(found.activity["z"], activity, atol=0.008)
    assert found.active_units == {"z": 2}
    assert found.total_active_units == 2


# --- what is refused, what is shown -----------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    table = Tabled(4, num_data=3)
    for wrong, text in [
        ({"num_particles": 0}, "num_particles must be a whole number of at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
        ({"memory_limit": 0}, "memory_limit must be"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            evaluate(table, table.data, **wrong)
    assert table.calls == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (np.zeros((0, 3)), r"data must hold at least one datum; got shape \(0, 3\)"),
        (np.float64(1.0), "data must hold at least one datum"),
        ((), "data must hold at least one array"),
        (
            np.array([[0.0, np.nan], [np.nan, 1.0]]),
            r"data must be finite everywhere; got NaN at data\[0, 1\] \(2 not finite in all\)",
        ),
        (
            (np.zeros((2, 1)), np.array([1.0, np.inf])),
            r"data\[1\] must be finite everywhere; got inf at data\[1\]\[1\]",
        ),
        ((np.zeros((2, 1)), np.zeros(3)), r"data\[1\] must have the 2 rows of data\[0\]; got 3"),
        (np.array(["a"]), "data must be an array of numbers"),
    ],
)
def test_bad_data_are_refused(data: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        prepare(SimpleNamespace(spec=None, float_dtype=np.dtype(float)), data)


def test_the_spec_checks_the_data() -> None:
    table = Tabled(4, num_data=3, spec=VAE(data_dim=1, latent_dim=1))
    with pytest.raises(InvalidArgument, match="be 0 or 1 under a Bernoulli"):
        evaluate(table, table.data / 5, num_particles=4)


def test_weights_that_are_not_numbers_are_refused() -> None:
    table = Tabled(4, num_data=3)
    table.guide[2, 1, 0] = np.nan
    with pytest.raises(NonFinite, match="log weights must be numbers below infinity; got nan from z"):
        evaluate(table, table.data, num_particles=4)


def test_an_impossible_datum_has_no_likelihood() -> None:
    table = Tabled(40, num_data=3)
    table.log_lik[:, 1] = -np.inf
    table.log_lik[:30, 2] = -np.inf
    found = evaluate(table, table.data, num_particles=40)
    expected = logsumexp(table.log_weight, axis=0) - math.log(40)
    np.testing.assert_allclose(found.per_datum.log_lik_estimate, expected)
    assert found.nll == np.inf
    assert found.summary()["nll"] is None


def test_the_summary_is_json_and_says_k() -> None:
    table = Tabled(40, num_data=3)
    found = evaluate(table, table.data, num_particles=40)
    read = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert read["num_particles"] == 40
    assert read["nll"] == found.nll
    assert read["rate_per_site"] == {"z": found.rate}
    assert read["active_units"] == {"z": read["total_active_units"]}
    assert read["k_hat_bad"] == (found.per_datum.k_hat > 0.7).mean()
    assert "K = 40" in str(found)
    assert f"{found.nll:.3f}" in str(found)
    assert found.bits_per_dim(5) == pytest.approx(found.nll / 5 / math.log(2))
    assert isinstance(found, Evaluation)


# --- Pareto k ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-0.4, 0.0, 0.3, 0.7, 1.2])
def test_k_hat_finds_the_shape_of_a_generalised_pareto(k: float) -> None:
    weight = 2.5 * stats.genpareto(k).rvs((100, 10_000), random_state=np.random.default_rng(1))
    found = pareto_k(np.log(weight) + 800.0, axis=1)  # any scale, far outside what exp can hold
    shrunk = (300 * k + 5) / 310  # a tail of 300 beside a prior worth ten draws
    assert found.shape == (100,)
    assert found.mean() == pytest.approx(shrunk, abs=4 * found.std() / 10 + 0.02)
    assert found.std() < 1.5 * (1 + max(k, -0.5)) / math.sqrt(300)  # the asymptotic standard deviation, (1 + k) / √M


def test_the_tail_is_enough() -> None:
    log_weight = np.random.default_rng(12).normal(size=(900, 4, 5)) * 2
    top = largest(log_weight, tail_size(900) + 1)
    assert tail_size(900) == 90
    assert top.shape == (91, 4, 5)
    np.testing.assert_array_equal(pareto_k_from_tail(top, 900), pareto_k(log_weight))
    with pytest.raises(InvalidArgument, match="top must hold the 91 largest of 900 log weights; got 90"):
        pareto_k_from_tail(top[1:], 900)


def test_k_hat_of_weights_without_a_tail() -> None:
    rng = np.random.default_rng(5)
    assert np.isnan(pareto_k(rng.normal(size=20)))
    assert np.isfinite(pareto_k(rng.normal(size=21)))
    equal = np.full(100, -3.7) + 1e-14 * rng.normal(size=100)
    assert pareto_k(equal) == -np.inf
    assert pareto_k((-300.0 + 1e-5 * rng.normal(size=100)).astype(np.float32)) == -np.inf
    lone = np.full(100, -2000.0)
    lone[3] = 0.0
    assert pareto_k(lone) == np.inf
    for value in (np.nan, np.inf):
        broken = rng.normal(size=(100, 2))
        broken[3, 1] = value
        np.testing.assert_array_equal(np.isnan(pareto_k(broken)), [False, True])
    assert np.isnan(pareto_k(np.full(100, -np.inf)))
    with pytest.raises(InvalidArgument, match="at least one draw"):
        pareto_k(np.zeros((0, 3)))


@pytest.mark.arviz
def test_k_hat_is_arviz_s() -> None:
    import arviz

    log_weight = np.random.default_rng(2).normal(size=(10_000, 6)) * [0.1, 0.5, 1.0, 2.0, 3.0, 4.0]
    if arviz.__version__.startswith("0."):
        expected = [arviz.psislw(column.copy(), normalize=False) for column in log_weight.T]
    else:  # from 1.0 on it takes the logarithm of 1 / w
        from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

        expected = [array_stats.psislw(-column) for column in log_weight.T]
    np.testing.assert_allclose(pareto_k(log_weight), np.ravel([k for _, k in expected]), rtol=1e-9)
    assert pareto_k(log_weight)[-1] > 0.7 > pareto_k(log_weight)[1]
    for column, (smooth, _) in zip(pareto_smooth(log_weight).T, expected, strict=True):
        np.testing.assert_allclose(column - logsumexp(column), smooth - logsumexp(smooth), rtol=1e-9, atol=1e-9)


def test_smoothed_weights_are_the_quantiles_of_their_tail() -> None:
    """Exact Pareto weights at k = ½: the tail moves onto SciPy's quantiles, its order and the rest stay."""
    rng = np.random.default_rng(0)
    log_weight = 0.5 * rng.exponential(size=(20_000, 100)) + 800.0  # exp overflows
    smooth, tail = pareto_smooth(log_weight), tail_size(20_000)
    ranked = np.argsort(log_weight, axis=0)
    assert (np.diff(np.take_along_axis(smooth, ranked, axis=0), axis=0) >= 0).all()
    body = ranked[:-tail]
    np.testing.assert_array_equal(np.take_along_axis(smooth, body, 0), np.take_along_axis(log_weight, body, 0))
    assert ((smooth != log_weight).sum(axis=0) >= tail - 1).all(), "the largest may stay"
    assert (smooth.max(axis=0) <= log_weight.max(axis=0)).all()
    top = np.take_along_axis(smooth, ranked[-tail:], axis=0) - 800.0
    threshold = np.exp(np.take_along_axis(log_weight, ranked[-tail - 1 :][:1], axis=0) - 800.0)
    # Beyond u the excess of a Pareto variable is a generalised one of scale k u.
    want = threshold + stats.genpareto.ppf((np.arange(tail)[:, None] + 0.5) / tail, 0.5, scale=0.5 * threshold)
    ratio = (np.exp(top) / want)[: tail // 2]  # above it the cut at the largest weight tells
    assert (np.abs(ratio.mean(axis=1) - 1) < 4 * stats.sem(ratio, axis=1) + 1e-3).all()
    assert stats.sem(ratio, axis=1).max() < 0.005


def test_weights_without_a_tail_stay_as_they_are() -> None:
    rng = np.random.default_rng(5)
    lone, few = np.full((100, 2), -2000.0), rng.normal(size=20)
    lone[3] = 0.0
    for log_weight in (lone, few, np.full(100, -3.7), np.full(100, -np.inf)):
        np.testing.assert_array_equal(pareto_smooth(log_weight), log_weight)


@pytest.mark.arviz
def test_ties_with_the_threshold_are_not_in_the_tail() -> None:
    arviz = pytest.importorskip("arviz", exc_type=ImportError)
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x fits them as exceedances of zero")
    log_weight = np.round(np.random.default_rng(4).normal(size=(900, 8)), 1)
    expected = [arviz.psislw(column.copy())[1] for column in log_weight.T]
    np.testing.assert_allclose(pareto_k(log_weight), np.ravel(expected), rtol=1e-9)


def test_weights_without_a_usable_tail_are_never_called_good() -> None:
    """Log weights of standard deviation 1000: one draw holds everything, and the quartile underflows."""
    from elbozoo.inference.psis import pareto_k

    assert pareto_k(1000.0 * np.random.default_rng(0).normal(size=(1000, 300))).min() > 1.0


@pytest.mark.numpyro
def test_reported_densities_are_of_products_in_full() -> None:
    """On a GPU JAX would multiply float32 with fewer digits; what is in force is read where a program is traced."""
    import jax
    import numpyro
    import numpyro.distributions as dist

    from elbozoo.inference.numpyro_engine import Program

    seen = []

    def model(x: Any) -> None:
        seen.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Any) -> None:
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, 1.0))

    x = np.zeros(3)
    program = Program(model, guide).with_params({"loc": np.zeros(())})
    for report in (
        lambda: evaluate(program, x, num_particles=2),
        lambda: program.log_density({"z": np.zeros((2, 3))}, (x,)),
        lambda: program.predict((x,), num_particles=2),
    ):
        seen.clear()
        report()
        assert "float32" in seen
