"""The instrument of gradients against closed forms of their mean and variance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE

from elbozoo.benchmarks.estimators import initialised
from elbozoo.inference import ELBO, IWAE, NVIL, REBAR, STL, AnnealedKL, DReG, InvalidArgument, Refused, gradient_noise
from elbozoo.inference.gradient_noise import GradientNoise
from elbozoo.zoo import MLP, VAE, SigmoidBeliefNet

X = np.array([0.4, -1.0, 2.0, 0.1])
B, M = 0.3, 0.5


def program(engine: str, num_data: int = len(X)) -> Any:
    """z ~ N(0, 1), x ~ N(z + b, 1) under q = N(m, 1), one b and one m for all data, of which these are some."""
    if engine == "numpyro":
        numpyro = pytest.importorskip("numpyro")
        dist = numpyro.distributions
        from elbozoo.inference.numpyro_engine import Program

        def param(name: str, value: float) -> Any:
            return numpyro.param(name, value)

        plate, sample = numpyro.plate, numpyro.sample
    else:
        pyro = pytest.importorskip("pyro")
        dist, plate, sample = pyro.distributions, pyro.plate, pyro.sample
        import torch

        from elbozoo.inference.pyro_engine import Program

        def param(name: str, value: float) -> Any:
            return pyro.param(name, torch.tensor(value))

    def model(x: Any) -> None:
        b = param("b", B)
        with plate("data", num_data, subsample_size=len(x)):
            sample("x", dist.Normal(sample("z", dist.Normal(0.0 * x, 1.0)) + b, 1.0), obs=x)

    def guide(x: Any) -> None:
        m = param("m", M)
        with plate("data", num_data, subsample_size=len(x)):
            sample("z", dist.Normal(m + 0.0 * x, 1.0))

    return Program(model, guide)


def near(value: float, want: float, error: float) -> None:
    """Within 4.5 standard errors."""
    assert abs(value - want) < 4.5 * error, (value, want, error)


@pytest.mark.parametrize("num_data", [len(X), 10 * len(X)])
def test_mean_and_variance_are_the_closed_forms(engine: str, num_data: int) -> None:
    """Of the mean bound: d/dm = mean(x - z - b) - m and d/db = mean(x - z - b), z the only noise; per datum, of a minibatch too."""
    n = 1000
    found = gradient_noise(program(engine, num_data), X, ELBO(), num_draws=n)
    variance = 1.0 / len(X)
    for part, want in (("guide", X.mean() - 2 * M - B), ("model", X.mean() - M - B)):
        assert found.mean[part].shape == (1,)
        near(found.mean[part][0], want, math.sqrt(variance / n))
        near(found.total_variance(part), variance, variance * math.sqrt(2 / (n - 1)))
        near(found.signal_to_noise(part), abs(want) / math.sqrt(variance), 2 / math.sqrt(n))
    bound = (-0.5 * math.log(2 * math.pi) - 0.5 * ((X - M - B) ** 2 + 1)).mean() - 0.5 * M**2
    near(found.bound, bound, 1 / math.sqrt(n))


def test_a_schedule_stands_still_at_the_step(engine: str) -> None:
    """Without the KL's weight the guide's gradient has no -m."""
    n, objective = 300, AnnealedKL(ELBO(), warmup=100, unit="steps")
    for step, weight in ((0, 0.0), (50, 0.5), (100, 1.0)):
        found = gradient_noise(program(engine), X, objective, num_draws=n, step=step)
        near(found.mean["guide"][0], X.mean() - M - B - weight * M, math.sqrt(1 / len(X) / n))


@PYRO_ALONE
def test_bias_is_seen_where_there_is_one(engine: str) -> None:
    """DReG is unbiased for IWAE, STL is not for K > 1 (reference: Tucker et al. 2019)."""
    given = program(engine)
    reference = gradient_noise(given, X, IWAE(4), num_draws=1000)
    for gradient, biased in ((DReG(), False), (STL(), True)):
        found = gradient_noise(given, X, IWAE(4, gradient=gradient), num_draws=1000, seed=1)
        size, resolution = found.bias(reference, "guide")
        assert (size > 3 * resolution) == biased, (gradient, size, resolution)


def test_bias_takes_the_draws_own_noise_out() -> None:
    rng = np.random.default_rng(0)
    one, two = (
        GradientNoise(
            ELBO(), 100, 0.0, {"guide": m, "model": np.zeros(0)}, {"guide": np.ones(2000), "model": np.zeros(0)}
        )
        for m in (2.0 + 0.1 * rng.standard_normal(2000), 2.0 + 0.1 * rng.standard_normal(2000))
    )
    assert one.bias(two, "guide")[0] < 0.3 * one.bias(two, "guide")[1]
    two.mean["guide"][:] += 1.0
    assert one.bias(two, "guide")[0] == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("spec", [VAE(4, 2, MLP((3,))), SigmoidBeliefNet(4, (3,))], ids=["vae", "sbn"])
def test_parts_are_the_guide_s_and_the_rest(engine: str, spec: Any) -> None:
    pytest.importorskip({"numpyro": "numpyro", "pyro": "torch"}[engine])
    x = np.eye(4)
    built = getattr(spec, engine)()
    found = gradient_noise(
        built, x, ELBO(gradient=NVIL()) if isinstance(spec, SigmoidBeliefNet) else ELBO(), num_draws=3, warm_up=2
    )
    weights = initialised(built, x).weights
    guide = sum(w.size for n, w in weights.items() if n.startswith("encoder"))
    assert found.mean["guide"].size == guide > 0
    assert found.mean["model"].size == sum(w.size for w in weights.values()) - guide > 0


@PYRO_ALONE
def test_an_estimator_is_measured_as_it_is_once_it_knows_its_numbers(engine: str) -> None:
    pytest.importorskip({"numpyro": "numpyro", "pyro": "torch"}[engine])
    x = (np.random.default_rng(0).random((8, 6)) < 0.2) * 1.0
    given = getattr(SigmoidBeliefNet(6, (4,)), engine)()
    objective = ELBO(gradient=REBAR(eta=0.0, adapt=True))  # without its control variate, to begin with
    raw, trained = (gradient_noise(given, x, objective, num_draws=200, warm_up=w) for w in (0, 400))
    assert trained.total_variance("guide") < 0.7 * raw.total_variance("guide")
    assert set(trained.summary()) == {
        "num_draws",
        "bound",
        "variance_model",
        "snr_model",
        "variance_guide",
        "snr_guide",
    }


@PYRO_ALONE
def test_bad_arguments(engine: str) -> None:
    given = program(engine)
    with pytest.raises(InvalidArgument, match="num_draws must be a whole number of at least 2; got 1"):
        gradient_noise(given, X, ELBO(), num_draws=1)
    with pytest.raises(InvalidArgument, match="objective must be"):
        gradient_noise(given, X, ELBO)  # type: ignore[arg-type]
    pytest.importorskip({"numpyro": "numpyro", "pyro": "torch"}[engine])
    with pytest.raises(Refused, match="reparameterised"):
        gradient_noise(getattr(SigmoidBeliefNet(6, (4,)), engine)(), np.ones((2, 6)), ELBO(), num_draws=2)


def test_a_batch_of_another_size_is_measured_as_if_it_were_the_first(engine: str) -> None:
    """What is compiled for one knows how many data there are."""
    x = np.random.default_rng(0).random((8, 3)).round()
    programs = [getattr(VAE(3, 2, MLP(hidden=(4,))), engine)() for _ in range(2)]
    gradient_noise(programs[0], x[:2], ELBO(), num_draws=2)
    found, fresh = (gradient_noise(program, x, ELBO(), num_draws=2) for program in programs)
    np.testing.assert_allclose(found.bound, fresh.bound, rtol=1e-12)
    for name, mean in fresh.mean.items():
        np.testing.assert_allclose(found.mean[name], mean, rtol=1e-10, atol=1e-12)
