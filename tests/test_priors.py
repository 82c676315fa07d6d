"""Learned priors against SciPy, quadrature and closed limits, and in every instrument that reads p(z); both engines.

``Linear`` is the model without hidden layers, written out in NumPy: what the two forms must agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import oracles
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from scipy import special, stats
from test_starts import DATA, EIGENVALUES, MEAN, Falling, log_likelihood

from elbozoo.guides import DiagonalGaussian, FullCovarianceGaussian, NeuralSplineFlow, SemiAmortised
from elbozoo.inference import (
    ELBO,
    IWAE,
    PPCA,
    STL,
    Collapsed,
    DReG,
    Informative,
    Pathwise,
    annealed_importance_sampling,
    bottleneck,
    evaluate,
    fit,
    gaps,
    local_minima,
    to_arviz,
)
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import (
    MLP,
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    FlowPrior,
    Gaussian,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
)
from elbozoo.zoo.linear_vae import kl_per_direction

SMALL = VAE(data_dim=4, latent_dim=2, network=MLP(hidden=()), likelihood=Gaussian(scale=0.7))
LEARNED = (MixturePrior(num_components=3), VampPrior(num_components=3))
SPECS = [replace(SMALL, prior=prior) for prior in (StandardNormal(), *LEARNED)]


def name_of(value: Any) -> str:
    return type(getattr(value, "prior", value)).__name__


def random_weights(spec: VAE, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: 0.7 * rng.standard_normal(array.shape) for name, array in spec.pyro().weights.items()}


def trained(engine: str, spec: VAE, weights: dict[str, np.ndarray]) -> Any:
    return getattr(spec, engine)().with_weights(weights)


def array(engine: str, x: Any) -> Any:
    if engine == "pyro":
        import torch

        return torch.as_tensor(x)
    return np.asarray(x)


def numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def standard_sample(size: int = 30, spec: VAE = SMALL) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(size, spec.data_dim))


@dataclass(frozen=True)
class Linear:
    """A VAE of one linear layer each way, with a diagonal guide and a Gaussian likelihood of fixed scale, in NumPy."""

    spec: VAE
    weights: dict[str, np.ndarray]

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = x @ self.weights["encoder.layers.0.weight"].T + self.weights["encoder.layers.0.bias"]
        loc, log_scale = np.split(outputs, 2, -1)
        return loc, np.exp(log_scale)

    def log_guide(self, z: np.ndarray, x: np.ndarray) -> np.ndarray:
        return stats.norm.logpdf(z, *self.posterior(x)).sum(-1)

    @property
    def mixture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights (C,), locations and scales (C, latent_dim) of p(z)."""
        w, prior = self.weights, self.spec.prior
        if isinstance(prior, StandardNormal):
            return np.ones(1), np.zeros((1, self.spec.latent_dim)), np.ones((1, self.spec.latent_dim))
        if isinstance(prior, MixturePrior):
            return special.softmax(w["prior.logits"]), w["prior.loc"], np.exp(w["prior.log_scale"])
        u = w["prior.pseudo_inputs"]
        u = u if isinstance(self.spec.likelihood, Gaussian) else special.expit(u)
        return np.full(len(u), 1 / len(u)), *self.posterior(u)

    def log_prior(self, z: np.ndarray) -> np.ndarray:
        weight, loc, scale = self.mixture
        each = stats.norm.logpdf(z[..., None, :], loc, scale).sum(-1)
        return np.asarray(special.logsumexp(each, b=weight, axis=-1))

    def log_lik(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        mean = z @ self.weights["decoder.layers.0.weight"].T + self.weights["decoder.layers.0.bias"]
        return stats.norm.logpdf(x, mean, self.spec.likelihood.scale).sum(-1)

    def log_marginal(self, x: np.ndarray) -> np.ndarray:
        """``log p(x)`` of one latent dimension, on a grid that is fine for every scale here."""
        z = np.linspace(-30, 30, 60_001)[:, None]
        return special.logsumexp(self.log_lik(x[:, None], z) + self.log_prior(z), axis=1) + np.log(z[1, 0] - z[0, 0])


# --- densities and draws ----------------------------------------------------------------------------------------


@covering(
    "spec,likelihood", list(product(SPECS, (Gaussian(scale=0.7), Bernoulli()))), numpyro=(), ids=name_of
)  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_densities(engine: str, spec: VAE, likelihood: Any) -> None:
    """By SciPy's Gaussians; pseudo-inputs go through the sigmoid under a likelihood of data in [0, 1] alone."""
    spec = replace(spec, likelihood=likelihood)
    weights, z = random_weights(spec), 2 * np.random.default_rng(1).normal(size=(3, 5, 2))
    prior = trained(engine, spec, weights).model.prior_distribution()
    assert tuple(prior.batch_shape) == ()
    assert tuple(prior.event_shape) == (2,)
    np.testing.assert_allclose(numpy(prior.log_prob(array(engine, z))), Linear(spec, weights).log_prior(z), rtol=1e-12)


@covering(
    "spec,guide", list(product(SPECS[1:], (DiagonalGaussian(), FullCovarianceGaussian()))), numpyro=(), ids=name_of
)  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_densities_integrate_to_one(engine: str, spec: VAE, guide: Any) -> None:
    spec = replace(spec, guide=guide)
    weights = {name: 0.5 * a for name, a in random_weights(spec).items()}  # the grid must resolve and cover every scale
    prior = trained(engine, spec, weights).model.prior_distribution()
    points, step = np.linspace(-25, 25, 1001, retstep=True)
    z = np.stack(np.meshgrid(points, points), -1)
    assert float(np.exp(numpy(prior.log_prob(array(engine, z)))).sum()) * step**2 == pytest.approx(1.0, abs=1e-6)


@covering(
    "guide", (DiagonalGaussian(), FullCovarianceGaussian()), numpyro=(), ids=name_of
)  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_one_pseudo_input_is_that_posterior(engine: str, guide: Any) -> None:
    spec = replace(SMALL, guide=guide, prior=VampPrior(num_components=1))
    weights, z = random_weights(spec), np.random.default_rng(1).normal(size=(7, 2))
    model = trained(engine, spec, weights).model
    posterior = model.encode(array(engine, weights["prior.pseudo_inputs"][0]))
    expected = numpy(posterior.log_prob(array(engine, z)))
    np.testing.assert_allclose(numpy(model.prior_distribution().log_prob(array(engine, z))), expected, rtol=1e-12)


@PYRO_ALONE
def test_one_component_is_a_gaussian(engine: str) -> None:
    spec = replace(SMALL, prior=MixturePrior(num_components=1))
    weights, z = random_weights(spec), np.random.default_rng(1).normal(size=(7, 2))
    expected = stats.multivariate_normal(weights["prior.loc"][0], np.diag(np.exp(2 * weights["prior.log_scale"][0])))
    prior = trained(engine, spec, weights).model.prior_distribution()
    np.testing.assert_allclose(numpy(prior.log_prob(array(engine, z))), expected.logpdf(z), rtol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_draws_have_the_mixture_as_their_distribution(engine: str, spec: VAE) -> None:
    """Every dimension by itself (Kolmogorov–Smirnov), their correlation, and data drawn after them."""
    spec = replace(spec, data_dim=3)
    weights = random_weights(spec)
    program, linear = trained(engine, spec, weights), Linear(spec, weights)
    drawn = program.predict((np.zeros((5000, 3)),), prior=True)
    z, x = drawn["latent"]["z"][0], drawn["observed"]["x"][0]
    weight, loc, scale = linear.mixture
    for d in range(2):
        cdf: Callable = lambda t, d=d: stats.norm.cdf(t[:, None], loc[:, d], scale[:, d]) @ weight  # noqa: E731
        assert stats.kstest(z[:, d], cdf).pvalue > 1e-3
    product = weight @ loc.prod(1)
    error = z.prod(1).std() / len(z) ** 0.5
    assert abs(z.prod(1).mean() - product) < 4 * error
    residual = x - z @ weights["decoder.layers.0.weight"].T - weights["decoder.layers.0.bias"]
    assert stats.kstest(residual.ravel() / 0.7, "norm").pvalue > 1e-3


def test_the_model_draws_without_data(engine: str) -> None:
    for spec in SPECS:
        program = trained(engine, spec, random_weights(spec))
        if engine == "numpyro":
            import numpyro

            assert numpyro.handlers.seed(program.model, 0)(size=6).shape == (6, 4)
        else:
            assert program.model(size=6).shape == (6, 4)


# --- parameters -------------------------------------------------------------------------------------------------

NAMES = {
    "StandardNormal": set(),
    "MixturePrior": {"prior.logits", "prior.loc", "prior.log_scale"},
    "VampPrior": {"prior.pseudo_inputs"},
}


def initial(engine: str, spec: VAE) -> dict[str, np.ndarray]:
    if engine == "pyro":
        return spec.pyro().weights or {}
    import jax

    from elbozoo.inference.weights import to_torch_layout

    return to_torch_layout(spec.numpyro().init(jax.random.key(0), np.zeros((1, spec.data_dim)))[0])


@PYRO_ALONE
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_each_parameter_has_one_name(engine: str, spec: VAE) -> None:
    base = {f"{part}.layers.0.{kind}" for part in ("encoder", "decoder") for kind in ("weight", "bias")}
    assert set(initial(engine, spec)) == base | NAMES[name_of(spec)]


def test_initial_values_are_the_pinned_ones(engine: str) -> None:
    found = initial(engine, VAE(30, 8, MLP(hidden=()), prior=MixturePrior(num_components=200)))
    assert not found["prior.logits"].any()
    assert not found["prior.log_scale"].any()
    assert found["prior.loc"].shape == (200, 8)
    assert stats.kstest(found["prior.loc"].ravel() * 8**0.5, "norm").pvalue > 1e-3
    found = initial(engine, VAE(30, 8, MLP(hidden=()), prior=VampPrior(num_components=50)))
    assert found["prior.pseudo_inputs"].shape == (50, 30)
    assert stats.kstest(found["prior.pseudo_inputs"].ravel(), "norm").pvalue > 1e-3


@pytest.mark.pyro
def test_copies_share_what_the_program_shares() -> None:
    import torch

    program = replace(SMALL, prior=LEARNED[1]).pyro()
    for twin in (program, program.copy(), program.fresh(), program.with_weights(program.weights)):
        assert twin.guide.encoder is twin.model.encoder
        assert twin.guide.posterior is twin.model.posterior
    assert program.copy().model.encoder is not program.model.encoder
    single = program.copy()
    single.model.to(torch.float32)
    assert {v.dtype for v in single._tensors().values()} == {torch.float32}


def test_likelihoods_say_where_their_data_lie() -> None:
    found = {
        type(part).__name__: part.unit_interval
        for part in (Bernoulli(), ContinuousBernoulli(), Gaussian(), DiscretizedLogistic())
    }
    assert found == {"Bernoulli": True, "ContinuousBernoulli": True, "Gaussian": False, "DiscretizedLogistic": True}


# --- gradients: the encoder as the guide and as a parameter of p(z) ---------------------------------------------

ONE = VAE(1, 1, MLP(hidden=()), Gaussian(scale=0.7), prior=VampPrior(num_components=2))
ONE_WEIGHTS = {
    "decoder.layers.0.weight": np.array([[1.2]]),
    "decoder.layers.0.bias": np.array([-0.3]),
    "encoder.layers.0.weight": np.array([[0.8], [0.3]]),
    "encoder.layers.0.bias": np.array([0.2, -0.5]),
    "prior.pseudo_inputs": np.array([[-2.0], [1.0]]),
}
X = 1.4
SIGMAS = 4.5
OBJECTIVES = {
    "pathwise": (ELBO(2, Pathwise()), oracles.elbo, 1),
    "stl": (ELBO(2, STL()), oracles.elbo, 1),
    "dreg": (IWAE(2, DReG()), oracles.iwae, 2),
}


def flat(weights: dict[str, np.ndarray]) -> oracles.Params:
    return {f"{n}/{i}": float(v) for n, a in weights.items() for i, v in enumerate(np.ravel(a))}


def unflat(params: oracles.Params) -> dict[str, np.ndarray]:
    parts = {n: [v for k, v in params.items() if k.rpartition("/")[0] == n] for n in ONE_WEIGHTS}
    return {n: np.reshape(v, ONE_WEIGHTS[n].shape) for n, v in parts.items()}


@cache
def exact_gradients(bound: Callable, num_particles: int) -> tuple[oracles.Params, oracles.Params]:
    """Of ``E[F(l_1 … l_K)]`` in all weights, and in their part as the model's alone: by quadrature and differences."""
    noise, weight = oracles.gauss_hermite(60)

    def value(model: oracles.Params, guide: oracles.Params) -> float:
        generative, amortised = Linear(ONE, unflat(model)), Linear(ONE, unflat(guide))
        x = np.array([X])
        loc, scale = amortised.posterior(x)
        z = (loc + scale * noise)[:, None]
        rate = amortised.log_guide(z, x) - generative.log_prior(z)
        return oracles.expected(bound, oracles.Nodes(weight, generative.log_lik(x, z), rate), num_particles)

    at = flat(ONE_WEIGHTS)
    whole = oracles.differentiate(lambda p: value(p, p), at, list(at))
    return whole, oracles.differentiate(lambda p: value(p, at), at, list(at))


def estimated(engine: str, objective: Any, groups: int = 25, size: int = 4000) -> tuple[oracles.Params, oracles.Params]:
    """Mean and standard error, by weight, of the drop-in loss's gradient for one datum."""
    program, x = trained(engine, ONE, ONE_WEIGHTS), array(engine, np.full((size, 1), X))
    found: list[oracles.Params] = []
    if engine == "pyro":
        import torch

        from elbozoo.inference.pyro_engine import Loss

        torch.manual_seed(1)
        loss = Loss(objective, max_plate_nesting=1)
        for _ in range(groups):
            for p in program._tensors().values():
                p.grad = None
            loss.loss_and_grads(program.model, program.guide, x)
            found.append(flat({n: -p.grad.numpy() / size for n, p in program._tensors().items()}))
    else:
        import jax

        from elbozoo.inference.numpyro_engine import Loss
        from elbozoo.inference.weights import to_torch_layout

        def total(params: Any, key: Any) -> Any:
            return Loss(objective).loss(key, params, program.model_fn, program.guide_fn, x)

        gradient = jax.jit(jax.grad(total))
        for key in jax.random.split(jax.random.key(1), groups):
            grads = to_torch_layout(gradient(program.params, key))
            found.append(flat({n: -g / size for n, g in grads.items()}))
    each = np.array([[f[n] for n in found[0]] for f in found])
    mean, error = each.mean(0), each.std(0, ddof=1) / groups**0.5
    return dict(zip(found[0], mean, strict=True)), dict(zip(found[0], error, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shared_parameters_are_differentiated_in_both_roles(engine: str, name: str) -> None:
    objective, bound, num_particles = OBJECTIVES[name]
    exact, as_the_models = exact_gradients(bound, num_particles)
    mean, error = estimated(engine, objective)
    assert sorted(mean) == sorted(exact)
    for weight in exact:
        assert abs(mean[weight] - exact[weight]) < SIGMAS * error[weight], weight
        if weight.startswith("encoder"):  # it would have been seen had the prior's part been stopped
            assert abs(as_the_models[weight]) > 4 * SIGMAS * error[weight], weight
    assert max(abs(exact[n]) for n in exact if n.startswith("prior")) > 0.01


def test_a_guide_of_constant_parameters_leaves_a_shared_flow_to_the_model(engine: str) -> None:
    """A flow reads its parameters when its density is asked for. Here q = N(m, 1) and p(z) = N(m + 1, 1), x | z ~ N(z, 1).

    Sticking the landing: ``(x - z) + 1`` along the path, and ``z - m - 1`` for m in the prior: x - m for every draw.
    """
    lib, x = oracles.library(engine), 0.9

    def shifted(loc: float, m: Any) -> Any:
        kind = lib.dist.transforms.AffineTransform
        return lib.dist.TransformedDistribution(lib.dist.Normal(lib.array(np.full(1, loc)), 1.0), [kind(m, 1.0)])

    def model(data: Any) -> None:
        m = lib.param("m", lib.array(0.3))
        with lib.plate("data", 1, dim=-1):
            z = lib.sample("z", shifted(1.0, m))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=data)

    def guide(data: Any) -> None:
        m = lib.param("m", lib.array(0.3))
        with lib.plate("data", 1, dim=-1):
            lib.sample("z", shifted(0.0, m))

    data, objective = lib.array(np.full(1, x)), ELBO(1, STL())
    if engine == "pyro":
        import pyro

        from elbozoo.inference.pyro_engine import Loss

        Loss(objective).loss_and_grads(model, guide, data)
        gradient = -float(pyro.get_param_store()["m"].grad)
    else:
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        grads = jax.grad(lambda p: Loss(objective).loss(jax.random.key(0), p, model, guide, data))({"m": 0.3})
        gradient = -float(grads["m"])
    assert gradient == pytest.approx(x - 0.3, rel=1e-10)


# --- in the harness -----------------------------------------------------------------------------------------------

ONE_DIM = [replace(SMALL, latent_dim=1, prior=prior) for prior in LEARNED]


@covering("spec", ONE_DIM, numpyro=(), ids=name_of)  # written once for both engines
def test_likelihoods_by_importance_sampling_and_annealing_are_the_quadrature(engine: str, spec: VAE) -> None:
    """Annealing begins at the prior's own draws and density, and moves along its gradient."""
    weights, x = random_weights(spec), standard_sample(8)
    weights["encoder.layers.0.weight"] *= 0.2  # a guide wide enough to be a proposal
    weights["encoder.layers.0.bias"] = np.array([0.0, 0.7])
    program, exact = trained(engine, spec, weights), Linear(spec, weights).log_marginal(x)
    found = evaluate(program, x, num_particles=4000).per_datum
    assert found.ess.min() > 200
    assert (np.abs(found.log_lik_estimate - exact) < 5 * (1 / found.ess - 1 / 4000) ** 0.5).all()
    annealed = annealed_importance_sampling(
        program, x, num_temperatures=40, num_chains=200, num_leapfrog=3, start="prior"
    )
    assert annealed.ess.min() > 100
    assert (np.abs(annealed.log_lik_estimate - exact) < 5 * (1 / annealed.ess - 1 / 200) ** 0.5).all()


@covering("guide", (DiagonalGaussian(), FullCovarianceGaussian()), numpyro=(), ids=name_of)
def test_pseudo_inputs_equal_to_the_data_make_the_prior_the_aggregate_posterior(engine: str, guide: Any) -> None:
    """Then ``KL(q(z) || p(z))`` is 0 draw by draw, and the rate is the information."""
    x = standard_sample(20)
    spec = replace(SMALL, guide=guide, prior=VampPrior(num_components=20))
    program = trained(engine, spec, random_weights(spec) | {"prior.pseudo_inputs": x})
    found = bottleneck(program, x, num_data=None, num_particles=10)
    assert found.marginal_kl == pytest.approx(0.0, abs=1e-12)
    assert found.marginal_kl_se == pytest.approx(0.0, abs=1e-12)
    assert 0.5 < found.rate == pytest.approx(found.mutual_information, rel=1e-12)
    assert found.rate < np.log(20)
    assert found.kl_per_dimension == {}  # a mixture does not factorise
    other = trained(
        engine,
        replace(spec, prior=StandardNormal()),
        {n: a for n, a in program.weights.items() if n != "prior.pseudo_inputs"},
    )
    assert bottleneck(other, x, num_data=None, num_particles=10).marginal_kl > 0.5


@covering("spec", SPECS[1:], numpyro=(), ids=name_of)  # written once for both engines
def test_the_rate_is_to_the_programs_own_prior(engine: str, spec: VAE) -> None:
    """On average over draws, ``log q(z|x) - log p(z)`` by SciPy."""
    weights, x = {n: 0.3 * a for n, a in random_weights(spec).items()}, standard_sample(200)
    weights["encoder.layers.0.weight"][2:] = 0.0  # one scale for all data, or the widest few make up the mean
    weights["encoder.layers.0.bias"][:2] += 1.5  # away from N(0, I), with the prior following
    if "prior.loc" in weights:
        weights["prior.loc"] += 1.5
    linear = Linear(spec, weights)
    found = bottleneck(trained(engine, spec, weights), x, num_data=None, num_particles=2)
    loc, scale = linear.posterior(x)
    z = loc + scale * np.random.default_rng(0).normal(size=(2000, *loc.shape))
    each = (linear.log_guide(z, x) - linear.log_prior(z)).mean(0)
    assert found.rate == pytest.approx(each.mean(), abs=5 * found.rate_se)
    fixed = Linear(replace(spec, prior=StandardNormal()), weights).log_prior(z)  # which would have been told from it
    assert abs((linear.log_guide(z, x) - fixed).mean() - each.mean()) > 10 * found.rate_se


@covering("spec", SPECS[1:], numpyro=(), ids=name_of)  # written once for both engines
def test_arviz_has_the_priors_draws(engine: str, spec: VAE) -> None:
    weights, x = random_weights(spec), standard_sample(10)
    idata = to_arviz(trained(engine, spec, weights), x, num_draws=300)
    weight, loc, scale = Linear(spec, weights).mixture
    z = np.asarray(idata["prior"]["z"]).reshape(-1, 2)
    assert len(z) == 3000
    cdf: Callable = lambda t: stats.norm.cdf(t[:, None], loc[:, 0], scale[:, 0]) @ weight  # noqa: E731
    assert stats.kstest(z[:, 0], cdf).pvalue > 1e-3
    assert idata["prior_predictive"]["x"].shape == (1, 300, 10, 4)


@PYRO_ALONE
@pytest.mark.parametrize("spec", SPECS[2:], ids=name_of)
def test_gaps_are_of_the_programs_own_posterior(engine: str, spec: VAE) -> None:
    """A guide optimised for each datum by itself, the encoder inside the prior held constant."""
    spec = replace(spec, latent_dim=1)
    weights, x = random_weights(spec), standard_sample(6)
    options: dict[str, Any] = {"num_steps": 100, "num_particles": 200, "num_temperatures": 20}
    found = gaps(trained(engine, spec, weights), x, num_data=None, **options)
    assert found.log_lik == pytest.approx(Linear(spec, weights).log_marginal(x).mean(), abs=0.05)
    assert found.approximation > -0.05
    assert found.amortisation > 0.5  # weights are random


def fitted(engine: str, spec: VAE, x: np.ndarray, **options: Any) -> Any:
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": len(x), "learning_rate": 0.01, "progress": False}
    return fit(getattr(spec, engine)(), x, **(defaults | options))


@pytest.mark.pyro
@pytest.mark.parametrize(
    "objective", [ELBO(), ELBO(2, STL()), IWAE(3, DReG())], ids=lambda o: type(o.gradient).__name__
)
@pytest.mark.parametrize("spec", SPECS[1:], ids=name_of)
def test_a_traced_step_is_the_step_to_the_bit(spec: VAE, objective: Any) -> None:
    from test_fit import pyro_trainer, same_weights

    x, found = standard_sample(30), []
    for traced in (True, False):
        trainer = pyro_trainer(spec.pyro(), objective, x)
        trainer.compile_after, trainer.redraw_pixels = 0 if traced else math.inf, False
        trainer.epoch(np.arange(30).reshape(1, 3, 10))
        assert (trainer.compiled is not None) is traced
        found.append(trainer.arrays())
    assert same_weights(*found)
    assert {n for n in found[0] if n.startswith("params/prior")} == {f"params/{n}" for n in NAMES[name_of(spec)]}


@covering("spec", SPECS[1:], numpyro=(), ids=name_of)
def test_a_learned_prior_ends_nearer_to_the_aggregate_posterior(engine: str, spec: VAE) -> None:
    """Data of three clusters, which N(0, I) cannot be the aggregate of: a learned prior has the better bound."""
    rng = np.random.default_rng(0)
    x = np.array([[-3.0, 0, 0, 0], [3, 0, 0, 0], [0, 4, 0, 0]])[rng.integers(3, size=300)] + 0.3 * rng.normal(
        size=(300, 4)
    )
    spec = replace(spec, network=MLP(hidden=(16,)), likelihood=Gaussian(scale=0.3))
    bound = {}
    for prior in (spec.prior, StandardNormal()):
        options: dict[str, Any] = {"epochs": 60, "batch_size": 100, "learning_rate": 0.02, "seed": 1}
        run = fitted(engine, replace(spec, prior=prior), x, **options)
        bound[type(prior)] = np.mean([row["bound"] for row in run.history[-10:]])
    assert bound[type(spec.prior)] > bound[StandardNormal] + 0.2


# --- starts and replicates ----------------------------------------------------------------------------------------

START = VAE(5, 3, MLP(hidden=()), Gaussian(scale=0.7))


@covering("prior", LEARNED, numpyro=(), ids=name_of)  # written once for both engines
def test_a_collapsed_start_carries_nothing(engine: str, prior: Prior) -> None:
    """A rate of 0 is no information whatever the prior: ``rate = I + KL(q(z) || p(z))``."""
    spec = replace(START, network=MLP(hidden=(8,)), likelihood=Gaussian(scale=0.3), prior=prior)
    x = (DATA - MEAN) / 3
    run = fitted(engine, spec, x, epochs=1, learning_rate=0.03, start=Collapsed(epochs=150))
    found = bottleneck(run.program, x, num_data=300, num_particles=50)
    assert abs(found.rate) < 0.1
    assert abs(found.mutual_information) < 0.1
    assert found.activity["z"].max() < 0.05
    assert kl_per_direction(EIGENVALUES[:3] / 9, 0.3**2).sum() > 1.5  # which a linear model would keep


@covering("prior", LEARNED, numpyro=(), ids=name_of)  # written once for both engines
def test_an_informative_start_carries_more_than_the_bound_will_keep(engine: str, prior: Prior) -> None:
    run = fitted(engine, replace(START, prior=prior), DATA, epochs=1, learning_rate=0.03, start=Informative(epochs=100))
    assert run.history[0]["rate"] > 4.0


@PYRO_ALONE  # NumPyro's teacher: tests/test_starts.py
def test_ppca_teaches_a_learned_prior_too(engine: str) -> None:
    """The teacher's aggregate has the moments of N(0, I), which one Gaussian component then is: the bound is pPCA's."""
    spec = VAE(5, 3, MLP(hidden=()), Gaussian("learned"), prior=MixturePrior(num_components=1))
    small = 0.3 * (DATA - MEAN)
    options: dict[str, Any] = {"learning_rate": Falling(0.1, 200), "start": PPCA(epochs=200)}
    run = fitted(engine, spec, small, epochs=1, objective=ELBO(analytic_kl=False), **options)
    assert run.history[0]["bound"] == pytest.approx(log_likelihood(0.2, 3) - 5 * np.log(0.3), abs=0.02)


@PYRO_ALONE  # the teacher is the one of the test above, whatever the prior
def test_ppca_teaches_pseudo_inputs(engine: str) -> None:
    """A mixture of the posteriors comes near their aggregate, which is about N(0, I)."""
    spec = VAE(5, 3, MLP(hidden=()), Gaussian("learned"), prior=VampPrior(num_components=30))
    small = 0.3 * (DATA - MEAN)
    options: dict[str, Any] = {"learning_rate": Falling(0.1, 200), "start": PPCA(epochs=200)}
    run = fitted(engine, spec, small, epochs=1, objective=ELBO(analytic_kl=False), **options)
    best = log_likelihood(0.2, 3) - 5 * np.log(0.3)
    assert best - 0.5 < run.history[0]["bound"] < best + 0.1


@covering("prior", LEARNED, numpyro=(), ids=name_of)  # written once for both engines
def test_replicates_of_a_learned_prior_are_compared(engine: str, prior: Prior) -> None:
    runs = fitted(engine, replace(START, prior=prior), DATA, epochs=3, replicates=2, batch_size=250)
    found = local_minima(runs, DATA[:50], num_particles=20)
    assert [len(course.live) for course in found.courses] == [3, 3]
    assert not np.array_equal(*(list(run.weights.values())[-1] for run in runs))
    assert all("live_z" not in row for row in runs[0].history)  # z does not factorise: it is live as a whole
    assert found.num_minima >= 1


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MixturePrior, VampPrior])
@pytest.mark.parametrize("count", [0, -1, 2.0, "many", True, None])
def test_counts_of_components_are_whole_numbers(cls: type[Prior], count: Any) -> None:
    with pytest.raises(InvalidArgument, match="num_components must be a whole number of at least 1; got"):
        cls(num_components=count)


def test_a_prior_is_an_instance_of_one() -> None:
    with pytest.raises(InvalidArgument, match=r"prior must be a Prior; got <class .*Pass VampPrior\(\)"):
        VAE(prior=VampPrior)
    with pytest.raises(InvalidArgument, match="prior must be a Prior; got 'vamp'"):
        VAE(prior="vamp")
    with pytest.raises(InvalidArgument, match="prior must be a Prior; got Gaussian"):
        VAE(prior=Gaussian())


@PYRO_ALONE
def test_a_vamp_prior_without_an_encoder_is_refused(engine: str) -> None:
    assert [prior.needs_encoder for prior in (StandardNormal(), *LEARNED)] == [False, False, True]
    for spec in (StandardNormal(), *LEARNED):
        if engine == "pyro":
            prior = spec.form("pyro")(spec, 2, 4, False)
        else:
            from flax import nnx

            prior = spec.form("numpyro")(spec, 2, 4, False, nnx.Rngs(0))
        if spec.needs_encoder:
            with pytest.raises(
                InvalidArgument, match="encode must be the map x -> q.* that a VampPrior is made of; got None"
            ):
                prior()
        else:
            assert tuple(prior().event_shape) == (2,)


# --- flows --------------------------------------------------------------------------------------------------------


def log_prior(terms: Any) -> Any:
    return terms.log_prior


def flow_density(engine: str, prior: Prior, z: np.ndarray, seed: int = 3) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``log p(z)`` of z (K, 2) under random weights, and the weights."""
    spec = replace(SMALL, prior=prior)
    weights = random_weights(spec, seed)
    found = trained(engine, spec, weights).apply(log_prior, (standard_sample(1),), values={"z": z[:, None]})
    return found[:, 0], weights


@PYRO_ALONE
def test_a_flow_prior_of_a_gaussian_is_one(engine: str) -> None:
    z = np.random.default_rng(0).normal(size=(5, 2))
    found, weights = flow_density(engine, FlowPrior(DiagonalGaussian()), z)
    loc, log_scale = np.split(weights["prior.outputs"], 2)
    np.testing.assert_allclose(found, stats.norm.logpdf(z, loc, np.exp(log_scale)).sum(-1), 1e-12)


@PYRO_ALONE
def test_a_flow_prior_integrates_to_one_and_is_none(engine: str) -> None:
    """By the trapezoidal rule; and it is no Gaussian: its log density is not quadratic."""
    axis, step = np.linspace(-14, 14, 561, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    flow = NeuralSplineFlow(num_flows=2, flow_hidden=(4,), context_dim=2, num_bins=4)
    found, _ = flow_density(engine, FlowPrior(flow), grid)
    assert np.exp(found).sum() * step**2 == pytest.approx(1.0, abs=2e-3)
    line = found.reshape(561, 561)[280]
    third = np.diff(line[200:360], 3)
    assert np.abs(third).max() > 1e-3


@PYRO_ALONE
def test_a_flow_prior_trains_under_every_estimator(engine: str) -> None:
    x = standard_sample(200)
    flow = FlowPrior(NeuralSplineFlow(num_flows=1, flow_hidden=(4,), context_dim=2))
    spec = replace(SMALL, network=MLP(hidden=(8,)), prior=flow)
    for objective in (ELBO(gradient=STL()), IWAE(3, gradient=DReG()))[: 1 if engine == "numpyro" else 2]:
        run = fit(getattr(spec, engine)(), x, objective=objective, epochs=6, batch_size=50, progress=False)
        assert run.history[-1]["bound"] > run.history[0]["bound"]
        assert np.abs(run.weights["prior.outputs"]).max() > 0


def test_a_guide_that_climbs_meets_no_prior_that_is_made_of_it() -> None:
    with pytest.raises(InvalidArgument, match="guide must be one that does not climb"):
        replace(SMALL, guide=SemiAmortised(), prior=VampPrior())
