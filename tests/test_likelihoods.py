"""Likelihoods in each engine against SciPy, quadrature and sums over levels: values, constants, gradients, moments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, special, stats

from elbozoo.inference import fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.report import write_report
from elbozoo.zoo import (
    MLP,
    VAE,
    AutoregressiveBernoulli,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
)

LOGITS = np.array([-60.0, -30.0, -3.0, -0.2001, -0.1999, -1e-3, -1e-9, 0.0, 1e-5, 0.1, 0.1999, 0.2001, 1.0, 20.0, 60.0])


@dataclass
class Evaluated:
    """One likelihood with given decoder outputs, as functions of NumPy arrays."""

    log_prob: Callable[[np.ndarray], np.ndarray]  # x (..., data_dim) -> (...,)
    grad: Callable[[np.ndarray], np.ndarray]  # x -> gradient of the summed log_prob in the outputs
    mean: np.ndarray
    variance: np.ndarray
    sample: Callable[[int], np.ndarray]
    supports: Callable[[np.ndarray], np.ndarray]


def evaluate(engine: str, spec: Likelihood, outputs: np.ndarray, dtype: str = "float64") -> Evaluated:
    outputs = outputs.astype(dtype)
    if engine == "pyro":
        import torch

        form, leaf = spec.form("pyro")(spec), torch.tensor(outputs, requires_grad=True)

        def grad(x: np.ndarray) -> np.ndarray:
            log_prob = form(leaf).log_prob(torch.tensor(x, dtype=leaf.dtype)).sum()
            return torch.autograd.grad(log_prob, leaf)[0].numpy()

        def draw(count: int) -> np.ndarray:
            torch.manual_seed(0)
            return form(leaf).sample((count,)).detach().numpy()

        form.requires_grad_(False)
        d = form(leaf.detach())
        return Evaluated(
            lambda x: d.log_prob(torch.tensor(x, dtype=leaf.dtype)).numpy(),
            grad,
            d.mean.numpy(),
            d.variance.numpy(),
            draw,
            lambda x: d.base_dist.support.check(torch.tensor(x)).numpy(),
        )
    import jax
    from flax import nnx

    form = spec.form("numpyro")(spec, nnx.Rngs(0))
    leaf = jax.numpy.asarray(outputs)
    d = form(leaf)
    log_prob = jax.jit(lambda x: form(leaf).log_prob(x))
    gradient = jax.jit(jax.grad(lambda leaf, x: form(leaf).log_prob(x).sum()))
    mean, variance = jax.jit(lambda leaf: (form(leaf).mean, form(leaf).variance))(leaf)
    return Evaluated(
        lambda x: np.asarray(log_prob(x.astype(dtype))),
        lambda x: np.asarray(gradient(leaf, x.astype(dtype))),
        np.asarray(mean),
        np.asarray(variance),
        lambda count: np.asarray(jax.jit(lambda key: form(leaf).sample(key, (count,)))(jax.random.key(0))),
        lambda x: np.asarray(d.base_dist.support(x)),
    )


def pairs(loc: Any, log_scale: Any) -> np.ndarray:
    """Outputs of a likelihood with two outputs an entry, one entry: (..., 2)."""
    return np.stack(np.broadcast_arrays(np.asarray(loc, float), np.asarray(log_scale, float)), -1)


def test_bernoulli(engine: str) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (4, 6))
    x = (np.random.default_rng(1).random((4, 6)) < 0.5).astype(float)
    d = evaluate(engine, Bernoulli(), logits)
    np.testing.assert_allclose(d.log_prob(x), stats.bernoulli.logpmf(x, special.expit(logits)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(d.mean, special.expit(logits), rtol=1e-12)


def test_gaussian(engine: str) -> None:
    rng = np.random.default_rng(0)
    loc, log_scale, x = rng.normal(size=(3, 4, 6))
    fixed = evaluate(engine, Gaussian(0.3), loc)
    np.testing.assert_allclose(fixed.log_prob(x), stats.norm.logpdf(x, loc, 0.3).sum(-1), rtol=1e-12)
    learned = evaluate(engine, Gaussian("learned"), loc)  # starts at 1
    np.testing.assert_allclose(learned.log_prob(x), stats.norm.logpdf(x, loc).sum(-1), rtol=1e-12)
    pixel = evaluate(engine, Gaussian("pixel"), np.concatenate([loc, log_scale], -1))
    expected = stats.norm.logpdf(x, loc, np.exp(log_scale)).sum(-1)
    np.testing.assert_allclose(pixel.log_prob(x), expected, rtol=1e-12)
    np.testing.assert_allclose(pixel.mean, loc)


def continuous_bernoulli_mean(logit: float) -> float:
    """By quadrature, with the density scaled by its maximum so that nothing overflows."""
    peak = max(logit, 0.0)
    moments = [integrate.quad(lambda x, k=k: x**k * np.exp(logit * x - peak), 0, 1, epsabs=0)[0] for k in (0, 1)]
    return moments[1] / moments[0]


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli(engine: str, logit: float) -> None:
    peak = max(logit, 0.0)
    log_norm = peak + np.log(integrate.quad(lambda x: np.exp(logit * x - peak), 0, 1, epsabs=0, epsrel=1e-13)[0])
    x = np.array([0.0, 0.1, 0.5, 1.0])
    d = evaluate(engine, ContinuousBernoulli(), np.full((4, 1), logit))
    np.testing.assert_allclose(d.log_prob(x[:, None]), logit * x - log_norm, rtol=1e-13, atol=1e-13)
    # An exponential family: the gradient in the logit is x - E[x], and the mean's derivative is the variance.
    mean = continuous_bernoulli_mean(logit)
    np.testing.assert_allclose(d.mean, mean, rtol=1e-11)
    np.testing.assert_allclose(d.grad(x[:, None])[:, 0], x - mean, rtol=1e-10, atol=1e-11)
    second = integrate.quad(lambda x: (x - mean) ** 2 * np.exp(logit * x - log_norm), 0, 1, epsabs=0)[0]
    np.testing.assert_allclose(d.variance, second, rtol=1e-9)


def test_continuous_bernoulli_in_float32(engine: str) -> None:
    """Saturated logits keep their constant and their gradient (clamped probabilities lose both below -16)."""
    d = evaluate(engine, ContinuousBernoulli(), LOGITS[:, None], "float32")
    exact = evaluate(engine, ContinuousBernoulli(), LOGITS[:, None])
    x = np.full((len(LOGITS), 1), 0.0)
    np.testing.assert_allclose(d.log_prob(x), exact.log_prob(x), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(d.grad(x), exact.grad(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("levels", [2, 8, 256])
def test_discretized_logistic_sums_to_one(engine: str, levels: int) -> None:
    grid = np.linspace(0, 1, levels)
    outputs = pairs(*np.meshgrid([-3.0, 0.0, 0.31, 1.0, 5.0], [-9.0, -4.0, -1.0, 2.0, 6.0]))[..., None, :]
    d = evaluate(engine, DiscretizedLogistic(levels), np.broadcast_to(outputs, (5, 5, levels, 2)))
    log_prob = d.log_prob(np.broadcast_to(grid[:, None], (5, 5, levels, 1)))
    np.testing.assert_allclose(special.logsumexp(log_prob, -1), 0.0, atol=1e-10)
    mean = (np.exp(log_prob) * grid).sum(-1)
    np.testing.assert_allclose(d.mean[:, :, 0, 0], mean, rtol=1e-9, atol=1e-12)
    variance = (np.exp(log_prob) * (grid - mean[..., None]) ** 2).sum(-1)
    np.testing.assert_allclose(d.variance[:, :, 0, 0], variance, rtol=1e-6, atol=1e-12)


def test_discretized_logistic_against_scipy(engine: str) -> None:
    """Masses of every level, in the tails too: differences of SciPy's log CDF or log survival, whichever is small."""
    levels, loc, scale = 16, 0.4, 0.02
    grid, half = np.linspace(0, 1, levels), 0.5 / 15
    below, above = (grid - half - loc) / scale, (grid + half - loc) / scale
    left = stats.logistic.logcdf(above) + np.log1p(-np.exp(stats.logistic.logcdf(below) - stats.logistic.logcdf(above)))
    right = stats.logistic.logsf(below) + np.log1p(-np.exp(stats.logistic.logsf(above) - stats.logistic.logsf(below)))
    expected = np.where(grid < loc, left, right)
    expected[0], expected[-1] = stats.logistic.logcdf(above[0]), stats.logistic.logsf(below[-1])
    d = evaluate(engine, DiscretizedLogistic(levels), np.tile(pairs(loc, np.log(scale)), (levels, 1)))
    np.testing.assert_allclose(d.log_prob(grid[:, None]), expected, rtol=1e-10)
    assert expected.min() < -25  # the tail is really in the test


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_discretized_logistic_far_out_has_finite_values_and_gradients(engine: str, dtype: str) -> None:
    outputs = pairs(*np.meshgrid([-1e3, 0.5, 1e3], [-12.0, 0.0, 12.0])).reshape(-1, 2)
    d = evaluate(engine, DiscretizedLogistic(256), outputs, dtype)
    for x in (0.0, 100 / 255, 1.0):
        value = np.full((9, 1), x)
        assert np.isfinite(d.log_prob(value)).all()
        assert np.isfinite(d.grad(value)).all()


# --- binary entries that depend on one another ----------------------------------------------------------------------

BINARY = np.array(list(itertools.product([0.0, 1.0], repeat=5)))  # every datum of five entries
AUTOREGRESSIVE = [AutoregressiveBernoulli(5), AutoregressiveBernoulli(5, masked_units=6)]


def autoregressive(engine: str, spec: AutoregressiveBernoulli, logits: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """The distribution with random parameters, and those parameters in torch's layout."""
    rng = np.random.default_rng(4)
    shapes = {"autoregression": (5, 5)}
    if units := spec.masked_units:
        shapes |= {"hidden.weight": (units, 5), "hidden.bias": (units,), "readout.weight": (5, units)}
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if engine == "pyro":
        import torch

        form = spec.form("pyro")(spec)
        form.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        return form.requires_grad_(False)(torch.tensor(logits)), weights
    from flax import nnx

    form = spec.form("numpyro")(spec, nnx.Rngs(0))
    form.autoregression[...] = weights["autoregression"]
    if spec.masked_units:
        form.hidden.kernel[...], form.hidden.bias[...] = weights["hidden.weight"].T, weights["hidden.bias"]
        form.readout.kernel[...] = weights["readout.weight"].T
    return form(logits), weights


def entry_by_entry(
    spec: AutoregressiveBernoulli, weights: dict[str, np.ndarray], l: np.ndarray, x: np.ndarray
) -> float:
    """The sum in the spec's docstring, written out in loops, by SciPy's mass function."""
    total = 0.0
    for i in range(5):
        logit = l[i] + sum(weights["autoregression"][i, j] * x[j] for j in range(i))
        for k in range(spec.masked_units):
            degree = int(np.floor(k * 4 / spec.masked_units))
            if degree < i:
                seen = sum(weights["hidden.weight"][k, j] * x[j] for j in range(degree + 1))
                logit += weights["readout.weight"][i, k] * np.tanh(weights["hidden.bias"][k] + seen)
        total += float(stats.bernoulli.logpmf(x[i], special.expit(logit)))
    return total


def scored(engine: str, d: Any, x: np.ndarray) -> np.ndarray:
    if engine == "pyro":
        import torch

        return d.log_prob(torch.tensor(x)).numpy()
    return np.asarray(d.log_prob(x))


@pytest.mark.parametrize("spec", AUTOREGRESSIVE, ids=str)
def test_autoregressive_is_the_sum_and_a_distribution(engine: str, spec: AutoregressiveBernoulli) -> None:
    """Over all 32 data, under two sets of the decoder's outputs at once."""
    logits = np.random.default_rng(5).normal(size=(2, 1, 5))
    d, weights = autoregressive(engine, spec, logits)
    log_prob = scored(engine, d, BINARY)  # (2, 32)
    expected = [[entry_by_entry(spec, weights, l[0], x) for x in BINARY] for l in logits]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-12)
    np.testing.assert_allclose(special.logsumexp(log_prob, axis=-1), 0.0, atol=1e-12)


@pytest.mark.parametrize("spec", AUTOREGRESSIVE, ids=str)
def test_autoregressive_draws_have_the_masses_that_are_scored(engine: str, spec: AutoregressiveBernoulli) -> None:
    count, logits = 40_000, np.random.default_rng(6).normal(size=(2, 5))
    d, _ = autoregressive(engine, spec, logits)
    if engine == "pyro":
        draws = d.sample((count,)).numpy()
    else:
        import jax

        draws = np.asarray(d.sample(jax.random.key(0), (count,)))
    assert draws.shape == (count, 2, 5)
    spec.check(draws)
    codes = (draws @ 2.0 ** np.arange(4, -1, -1)).astype(int)  # rows of BINARY
    for side in range(2):
        mass = np.exp(scored(engine, autoregressive(engine, spec, logits[side])[0], BINARY))
        counts = np.bincount(codes[:, side], minlength=32)
        assert stats.chisquare(counts, count * mass / mass.sum()).pvalue > 1e-4


def test_autoregressive_starts_as_independent_entries(engine: str) -> None:
    logits, spec = np.random.default_rng(7).normal(size=(32, 5)), AutoregressiveBernoulli(5)
    d = evaluate_without_moments(engine, spec, logits)
    np.testing.assert_allclose(scored(engine, d, BINARY), stats.bernoulli.logpmf(BINARY, special.expit(logits)).sum(-1))


def evaluate_without_moments(engine: str, spec: Likelihood, logits: np.ndarray) -> Any:
    if engine == "pyro":
        import torch

        return spec.form("pyro")(spec).requires_grad_(False)(torch.tensor(logits))
    from flax import nnx

    return spec.form("numpyro")(spec, nnx.Rngs(0))(logits)


def test_autoregressive_trains_and_is_measured_like_any_other(engine: str, tmp_path: Path) -> None:
    """Pixels that are copies of their left neighbour: log 2 nats a pair, which no factorised decoder without z has."""
    rng = np.random.default_rng(8)
    x = np.repeat((rng.random((400, 2)) < 0.5) * 1.0, 2, axis=1)
    spec = VAE(4, 1, MLP(hidden=(3,)), AutoregressiveBernoulli(4, masked_units=3))
    options: dict[str, Any] = {"epochs": 60, "batch_size": 100, "learning_rate": 0.1, "progress": False}
    run = fit(getattr(spec, engine)(), x, **options)
    found = run.evaluate(x[:100], num_particles=20)
    # The entropy of two fair bits; the marginal of 400 draws of them is off by a few hundredths.
    assert found.nll == pytest.approx(2 * np.log(2), abs=0.1)
    draws = run.program.predict((x[:50],), num_particles=4)
    assert set(np.unique(draws["observed"]["x"])) <= {0.0, 1.0}
    assert not draws["mean"]
    assert run.to_arviz(x[:5], num_draws=3).posterior["z"].shape == (1, 3, 5, 1)
    if engine == "numpyro":
        return  # a report reads these alone, of either engine
    page = write_report({"run": run}, {"run": found}, {"run": x}, tmp_path / "report.html")
    assert page.stat().st_size > 10_000


def test_autoregressive_knows_its_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="likelihood.data_dim must be the model's 6; got 5"):
        VAE(6, 1, MLP(hidden=()), AutoregressiveBernoulli(5))
    with pytest.raises(InvalidArgument, match="masked_units must be a whole number of at least 0"):
        AutoregressiveBernoulli(5, masked_units=-1)
    with pytest.raises(InvalidArgument, match="data_dim must be at least 2"):
        AutoregressiveBernoulli(1, masked_units=1)


SAMPLED = {
    "Bernoulli": (Bernoulli(), np.array([-2.0, 0.0, 3.0])),
    "ContinuousBernoulli": (ContinuousBernoulli(), np.array([-40.0, -2.0, -5e-4, 0.0, 1.5, 40.0])),
    "Gaussian": (Gaussian("pixel"), np.array([0.3, -1.0, -2.0, 0.5])),
    "DiscretizedLogistic": (DiscretizedLogistic(6), np.array([0.3, 1.1, -2.0, -0.5])),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sample_moments(engine: str, name: str) -> None:
    spec, outputs = SAMPLED[name]
    count, d = 40_000, evaluate(engine, spec, outputs)
    draws = d.sample(count)
    assert draws.shape == (count, len(outputs) // spec.num_outputs)
    spec.check(draws)
    assert d.supports(draws).all()
    error = np.sqrt(d.variance / count)
    assert (np.abs(draws.mean(0) - d.mean) < 4.5 * error).all()
    fourth = ((draws - d.mean) ** 4).mean(0)
    assert (np.abs(draws.var(0) - d.variance) < 4.5 * np.sqrt(fourth / count)).all()


def test_continuous_bernoulli_samples_are_reparameterised(engine: str) -> None:
    """The path derivative of a draw integrates the score: dE[x]/dl is the variance, over uniform noise."""
    logits = np.array([-3.0, 0.0, 0.5, 8.0])
    if engine == "pyro":
        import torch

        leaf = torch.tensor(logits, requires_grad=True)
        draws = ContinuousBernoulli().form("pyro")(ContinuousBernoulli())(leaf).rsample((20_000,))
        slope = torch.autograd.grad(draws.mean(0).sum(), leaf)[0].numpy()
    else:
        import jax
        from flax import nnx

        form = ContinuousBernoulli().form("numpyro")(ContinuousBernoulli(), nnx.Rngs(0))
        draw = jax.jit(jax.grad(lambda leaf: form(leaf).sample(jax.random.key(0), (20_000,)).mean(0).sum()))
        assert form(logits).has_rsample
        slope = draw(logits)
    np.testing.assert_allclose(slope, evaluate(engine, ContinuousBernoulli(), logits).variance, rtol=0.03)


@pytest.mark.numpyro
@pytest.mark.parametrize("spec", [ContinuousBernoulli(), DiscretizedLogistic(8)], ids=str)
def test_numpyro_distributions_are_pytrees(spec: Likelihood) -> None:
    import jax
    from flax import nnx

    outputs = np.random.default_rng(0).normal(size=(5, 4 * spec.num_outputs))
    form = spec.form("numpyro")(spec, nnx.Rngs(0))
    d, x = form(outputs), np.zeros((5, 4))
    assert (d.batch_shape, d.event_shape) == ((5,), (4,))
    rebuilt = jax.tree.unflatten(jax.tree.structure(d), jax.tree.leaves(d))
    np.testing.assert_array_equal(rebuilt.log_prob(x), d.log_prob(x))
    np.testing.assert_allclose(jax.vmap(lambda d, x: d.log_prob(x))(d, x), d.log_prob(x), rtol=1e-12)
    assert d.expand((3, 5)).log_prob(x).shape == (3, 5)
    assert d.expand((3, 5)).sample(jax.random.key(0)).shape == (3, 5, 4)


@pytest.mark.pyro
@pytest.mark.parametrize("spec", [ContinuousBernoulli(), DiscretizedLogistic(8)], ids=str)
def test_pyro_distributions_expand_and_refuse_values_outside(spec: Likelihood) -> None:
    import torch

    outputs = torch.tensor(np.random.default_rng(0).normal(size=(5, 4 * spec.num_outputs)))
    d, x = spec.form("pyro")(spec)(outputs), torch.zeros(5, 4)
    assert (d.batch_shape, d.event_shape) == ((5,), (4,))
    assert torch.equal(d.expand((3, 5)).log_prob(x), d.log_prob(x).expand(3, 5))
    assert d.expand((3, 5)).sample().shape == (3, 5, 4)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(x + 1.01)


REFUSED = [
    (AutoregressiveBernoulli(3), 0.5, r"x must be 0 or 1 .*; got 0.5 at index \(1, 2\)"),
    (Bernoulli(), 0.5, r"x must be 0 or 1 .*; got 0.5 at index \(1, 2\)"),
    (Bernoulli(), 0.5, 'Binarize .* binarize="stochastic" or binarize="threshold"'),
    (Bernoulli(), np.nan, "got nan"),
    (ContinuousBernoulli(), 1.2, r"x must lie in \[0, 1\].*; got 1.2"),
    (ContinuousBernoulli(), np.nan, "got nan"),
    (Gaussian(), np.inf, "x must be finite; got inf"),
    (DiscretizedLogistic(5), 0.3, r"x must be a multiple of 1/4 in \[0, 1\].*; got 0.3"),
    (DiscretizedLogistic(5), 1.25, "got 1.25"),
    (DiscretizedLogistic(5), np.nan, "got nan"),
]


@pytest.mark.parametrize(("spec", "bad", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_check_refuses_data_outside_the_support(spec: Likelihood, bad: float, message: str) -> None:
    x = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    spec.check(x)
    x[1, 2] = bad
    with pytest.raises(InvalidArgument, match=message):
        spec.check(x)


@pytest.mark.parametrize("levels", [256, 65536])
def test_check_allows_float32_levels(levels: int) -> None:
    DiscretizedLogistic(levels).check((np.arange(levels) / (levels - 1)).astype(np.float32))
    DiscretizedLogistic(levels).check(np.arange(levels).astype(np.float32) * np.float32(1 / (levels - 1)))
