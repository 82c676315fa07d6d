"""The bottleneck's instruments against closed forms of the linear-Gaussian model and quadrature, in both engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from oracles import library, shared_latent, wrapped
from scipy import integrate, stats

from elbozoo.inference import bottleneck
from elbozoo.inference.errors import InvalidArgument, NonFinite
from elbozoo.zoo import MLP, VAE, LinearVAE


def linear(engine: str, weights: dict[str, np.ndarray], latent_dim: int = 2, guide: str = "diagonal") -> Any:
    spec = LinearVAE(data_dim=4, latent_dim=latent_dim, scale=0.6, guide=guide)
    return getattr(spec, engine)().with_weights(weights)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test, whichever ran before."""
    return np.random.default_rng(7)


def wide(latent_dim: int = 2) -> dict[str, np.ndarray]:
    """A model whose posteriors are wide, so that M data say what the population would; a guide that is a bit off."""
    rng = np.random.default_rng(3)
    return {
        "decoder.weight": 0.5 * rng.normal(size=(4, latent_dim)), "decoder.bias": rng.normal(size=4),
        "encoder.weight": 0.4 * rng.normal(size=(latent_dim, 4)), "encoder.bias": 0.3 + np.zeros(latent_dim),
        "encoder_log_scale": np.log(0.8) + np.zeros(latent_dim),
    }  # fmt: skip


@PYRO_ALONE
def test_against_the_closed_forms_of_the_population(engine: str, rng: np.random.Generator) -> None:
    """x ~ N(m, C) makes q(z) Gaussian: I = ½ log |Q| / |S|, and the KL to the prior is one of Gaussians."""
    weights, covariance = wide(), np.diag([1.0, 0.5, 2.0, 0.3])
    x = rng.normal(size=(700, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # white, as the population is
    x = 1.0 + x * np.sqrt(np.diag(covariance))
    runs = [bottleneck(linear(engine, weights), x, num_data=None, num_particles=20, seed=s) for s in range(12)]
    a, s = weights["encoder.weight"], np.exp(2 * weights["encoder_log_scale"])
    q, mean = a @ covariance @ a.T + np.diag(s), a @ np.ones(4) + weights["encoder.bias"]
    information = 0.5 * (np.linalg.slogdet(q)[1] - np.log(s).sum())
    marginal = 0.5 * (np.trace(q) + mean @ mean - 2 - np.linalg.slogdet(q)[1])

    def near(name: str, want: float, bias: float = 0.0) -> None:
        values = [getattr(run, name) for run in runs]
        assert np.mean(values) == pytest.approx(want, abs=4 * stats.sem(values) + bias), name

    near("mutual_information", information, 0.01)  # 700 data stand for the population but for about D / 2M nats
    near("mutual_information_upper", information, 0.01)
    near("marginal_kl", marginal, 0.01)
    near("rate", information + marginal)
    for run in runs:
        assert run.rate == pytest.approx(run.mutual_information + run.marginal_kl, abs=1e-9)
        assert run.mutual_information < run.mutual_information_upper
    deviation = np.std([run.mutual_information for run in runs], ddof=1)
    assert 0.5 < deviation / runs[0].mutual_information_se < 2, (
        "the standard error is one (of the draws, the data are fixed)"
    )
    residual = covariance + np.outer(np.ones(4), np.ones(4))  # E[x x^T]
    w, b = weights["decoder.weight"], weights["decoder.bias"]
    second = np.trace(residual) + b @ b + np.trace(w.T @ w @ (q + np.outer(mean, mean)))
    cross = -2 * np.trace(w @ (a @ residual + np.outer(weights["encoder.bias"], np.ones(4))))
    second += cross + 2 * b @ (w @ mean) - 2 * b @ np.ones(4)
    distortion = 0.5 * second / 0.36 + 2 * np.log(2 * np.pi * 0.36)
    near("distortion", distortion)
    activity = np.mean([run.activity["z"] for run in runs], axis=0)
    np.testing.assert_allclose(activity, np.diag(a @ covariance @ a.T), rtol=0.1)


def test_against_quadrature_on_the_data_at_hand(engine: str, rng: np.random.Generator) -> None:
    """Seven data and one latent: q(z) is a mixture of seven Gaussians, and both terms are integrals over a line."""
    weights, x = wide(latent_dim=1), rng.normal(size=(7, 4))
    loc, scale = x @ weights["encoder.weight"][0] + 0.3, 0.8

    def q(z: float) -> float:
        return float(stats.norm.pdf(z, loc, scale).mean())

    entropy = integrate.quad(lambda z: -q(z) * np.log(q(z)), -12, 12, limit=200)[0]
    cross = integrate.quad(lambda z: -q(z) * stats.norm.logpdf(z), -12, 12, limit=200)[0]
    information, marginal = entropy - stats.norm(0, scale).entropy(), cross - entropy
    program = linear(engine, weights, latent_dim=1)
    found = [bottleneck(program, x, num_data=None, num_particles=2, seed=s) for s in range(60)]
    for values, want in (
        ([f.mutual_information for f in found], information),
        ([f.marginal_kl for f in found], marginal),
    ):
        assert np.mean(values) == pytest.approx(want, abs=4 * stats.sem(values))
    assert all(f.mutual_information <= np.log(7) for f in found)


@PYRO_ALONE
def test_posteriors_that_do_not_overlap_know_which_datum_it_is(engine: str, rng: np.random.Generator) -> None:
    weights = wide() | {"encoder_log_scale": np.full(2, -9.0)}
    found = bottleneck(linear(engine, weights), rng.normal(size=(50, 4)), num_data=None, num_particles=2)
    assert found.mutual_information == pytest.approx(np.log(50), abs=1e-6)
    assert found.mutual_information_upper > np.log(50)


def test_a_guide_that_does_not_look_carries_nothing(engine: str, rng: np.random.Generator) -> None:
    weights = wide() | {"encoder.weight": np.zeros((2, 4))}
    found = bottleneck(linear(engine, weights), rng.normal(size=(50, 4)))
    assert found.mutual_information == pytest.approx(0, abs=1e-9)
    assert found.active_units == {"z": 0}
    assert found.marginal_kl == pytest.approx(found.rate)


@PYRO_ALONE
def test_collapse_is_read_off_each_dimensions_kl(engine: str, rng: np.random.Generator) -> None:
    """Dimension 1 ignores x; dimension 0 has a KL that is known for every datum."""
    weights = wide() | {"encoder.bias": np.zeros(2), "encoder_log_scale": np.array([np.log(0.5), 0.0])}
    weights["encoder.weight"] = weights["encoder.weight"] * [[1.0], [0.0]]
    x = rng.normal(size=(200, 4))
    kl = 0.5 * (0.25 + (x @ weights["encoder.weight"][0]) ** 2 - 1 - np.log(0.25))
    found = bottleneck(linear(engine, weights), x, delta=0.1, num_particles=5)
    np.testing.assert_allclose(found.kl_per_dimension["z"], [kl.mean(), 0.0], atol=1e-10)
    np.testing.assert_array_equal(found.collapsed(1e-6)["z"], [False, True])
    epsilon = found.collapse_epsilon["z"][0]
    assert np.mean(kl <= epsilon + 1e-12) >= 0.9 > np.mean(kl < epsilon - 1e-12)
    np.testing.assert_array_equal(found.collapsed(epsilon * 1.001)["z"], [True, True])


@PYRO_ALONE
def test_a_part_of_the_data_and_equal_seeds(engine: str, rng: np.random.Generator) -> None:
    program, x = linear(engine, wide()), rng.normal(size=(60, 4))
    one, two, other = (bottleneck(program, x, num_data=20, num_particles=3, seed=s) for s in (0, 0, 1))
    assert one.num_data == 20
    assert one.mutual_information == two.mutual_information != other.mutual_information


@PYRO_ALONE
def test_discrete_and_dependent_latents(engine: str, rng: np.random.Generator) -> None:
    """A mixture: c ~ Bernoulli(½), z ~ N(±2, ½²). The guide is the prior, so no site carries anything."""
    lib = library(engine)

    def draw(x: Any) -> Any:
        c = lib.sample("c", lib.dist.Bernoulli(lib.array(0.5 * np.ones(len(x)))))
        return lib.sample("z", lib.dist.Normal(4.0 * c - 2.0, 0.5))

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            draw(x)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", lib.dist.Normal(draw(x), 1.0), obs=x)

    program = wrapped(engine, model, guide)
    found = bottleneck(program, rng.normal(size=40), num_particles=4)
    assert found.rate == pytest.approx(0, abs=1e-12)
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert found.marginal_kl == pytest.approx(0, abs=1e-12)


def test_twins_measure_alike(rng: np.random.Generator) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    spec = VAE(data_dim=6, latent_dim=2, network=MLP(hidden=(5,)))
    weights = spec.pyro().weights
    x = (rng.random((80, 6)) < 0.4) * 1.0
    one, two = (bottleneck(getattr(spec, e)().with_weights(weights), x) for e in ("numpyro", "pyro"))
    np.testing.assert_allclose(one.kl_per_dimension["z"], two.kl_per_dimension["z"], rtol=1e-10)
    assert one.mutual_information == pytest.approx(two.mutual_information, abs=5 * one.mutual_information_se)


@PYRO_ALONE
def test_bad_input_is_refused(engine: str, rng: np.random.Generator) -> None:
    program, x = linear(engine, wide()), rng.normal(size=(10, 4))
    for data, options, text in [
        (x[:1], {}, "data must hold at least two data"),
        (x, {"num_data": 1}, "num_data must be a whole number of at least 2"),
        (x, {"num_particles": 1}, "num_particles must be"),
        (x, {"delta": 1.0}, r"delta must lie in \[0, 1\)"),
        (x[:, :3], {}, r"x must have shape \(N, 4\)"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            bottleneck(program, data, **options)
    with pytest.raises(InvalidArgument, match="epsilon must be"):
        bottleneck(program, x, num_particles=2).collapsed(0.0)
    equal = bottleneck(program, np.ones((10, 4)), num_particles=50)
    assert equal.mutual_information == pytest.approx(0, abs=1e-9), "data that are all equal tell nothing apart"
    assert equal.active_units == {"z": 0}


def test_a_latent_outside_the_plate_is_refused(engine: str, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidArgument, match="program must have every latent inside its data plate"):
        bottleneck(wrapped(engine, *shared_latent(engine)), rng.normal(size=10))


@pytest.mark.pyro
def test_batch_statistics_are_seen(rng: np.random.Generator) -> None:
    """A guide that normalises over its batch gives one draw two densities; no mutual information is read off them."""
    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Program

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def model(self, x: Any) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

        def guide(self, x: Any) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.drop(x[:, None]), 0.1).to_event(1))

    both = Both()
    with pytest.raises(NonFinite, match="guide must give one draw one density"):
        bottleneck(Program(both.model, both.guide), 1 + rng.random(30))
