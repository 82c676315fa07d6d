"""CategoricalVAE against sums over all of its states in NumPy; NumPyro's one-hot distribution against Pyro's and SciPy."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy.special import log_expit, log_softmax, logsumexp

from elbozoo.inference import ELBO, IWAE, Adam, evaluate, fit
from elbozoo.inference.discrete import REBAR, RELAX, DisARM, Enumerate, GumbelSoftmax
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.gradients import NVIL, RWS, VIMCO, ScoreFunction
from elbozoo.zoo import MLP, CategoricalVAE, Conv, Gaussian

TWINS = [
    CategoricalVAE(6, 3, 4, MLP((5,))),
    CategoricalVAE(16, 2, 3, Conv((1, 4, 4), (3,), 6), Gaussian("pixel")),
    CategoricalVAE(6, 3, 4, MLP((5,)), autoregressive_guide=True),
]
TINY = CategoricalVAE(3, 2, 3, MLP((4,)))
AUTOREGRESSIVE = CategoricalVAE(3, 3, 3, MLP((4,)), autoregressive_guide=True)
X = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


# --- the oracle -------------------------------------------------------------------------------------------------


@cache
def weights_of(spec: CategoricalVAE) -> dict[str, np.ndarray]:
    from test_twins import random_weights

    return {name: 2 * array for name, array in random_weights(spec, seed=3).items()}


def trained(engine: str, spec: CategoricalVAE = TINY) -> Any:
    return getattr(spec, engine)().with_weights(weights_of(spec))


def outputs(network: str, x: np.ndarray) -> np.ndarray:
    w = weights_of(TINY)
    hidden = np.tanh(x @ w[f"{network}.layers.0.weight"].T + w[f"{network}.layers.0.bias"])
    return hidden @ w[f"{network}.layers.1.weight"].T + w[f"{network}.layers.1.bias"]


def states() -> np.ndarray:
    """Every state of z, ``(9, B, 2, 3)``."""
    table = np.eye(3)[np.array(list(product(range(3), repeat=2)))]
    return np.repeat(table[:, None], len(X), axis=1)


def log_joint(z: np.ndarray) -> np.ndarray:
    """``log p(x, z)``, linear in the prior's log probabilities where z lies between the states."""
    logits = outputs("decoder", z.reshape(*z.shape[:-2], 6))
    log_lik = (X * log_expit(logits) + (1 - X) * log_expit(-logits)).sum(-1)
    return log_lik - z.sum((-1, -2)) * np.log(3)


def log_guide(z: np.ndarray) -> np.ndarray:
    return (z * log_softmax(outputs("encoder", X).reshape(len(X), 2, 3), axis=-1)).sum((-1, -2))


def densities(terms: Any) -> tuple[Any, Any]:
    return terms.log_prior + terms.log_lik, terms.log_guide


def bound_of(objective: Any, terms: Any) -> Any:
    return objective.bound(terms)


def kl_of(terms: Any) -> Any:
    return terms.sites["z"].kl_terms


# --- exact ------------------------------------------------------------------------------------------------------


def test_both_densities_at_every_state(engine: str) -> None:
    z = states()
    joint, guide = trained(engine).apply(densities, (X,), values={"z": z})
    np.testing.assert_allclose(joint, log_joint(z), rtol=1e-11)
    np.testing.assert_allclose(guide, log_guide(z), rtol=1e-11)
    np.testing.assert_allclose(logsumexp(guide, axis=0), 0.0, atol=1e-12)


def test_between_the_states_both_densities_are_continued(engine: str) -> None:
    z = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, len(X), 2))
    with import_module(engine).validation_enabled(False):
        joint, guide = trained(engine).apply(densities, (X,), values={"z": z})
    np.testing.assert_allclose(joint, log_joint(z), rtol=1e-11)
    np.testing.assert_allclose(guide, log_guide(z), rtol=1e-11)


def test_the_kl_is_the_sum_over_the_categories(engine: str) -> None:
    log_q = log_softmax(outputs("encoder", X).reshape(len(X), 2, 3), axis=-1)
    kl = (np.exp(log_q) * (log_q + np.log(3))).sum(-1)
    found = trained(engine).apply(kl_of, (X,), analytic_kl=True)
    np.testing.assert_allclose(found[0], kl, rtol=1e-11)


def test_enumeration_is_the_elbo(engine: str) -> None:
    joint, guide = log_joint(states()), log_guide(states())
    elbo = (np.exp(guide) * (joint - guide)).sum(axis=0)
    for analytic_kl in (False, True):
        objective = ELBO(gradient=Enumerate(), analytic_kl=analytic_kl)
        found = trained(engine).apply(partial(bound_of, objective), (X,), analytic_kl=analytic_kl)
        np.testing.assert_allclose(found, elbo, rtol=1e-11)


def test_draws_of_the_guide_have_its_probabilities(engine: str) -> None:
    joint, guide = log_joint(states()), log_guide(states())
    elbo = (np.exp(guide) * (joint - guide)).sum(axis=0)
    draws = trained(engine).apply(log_weight, (X,), num_particles=40_000, seed=1)
    error = draws.std(axis=0) / len(draws) ** 0.5
    assert (abs(draws.mean(axis=0) - elbo) < 4.5 * error).all()
    assert (error < 0.02).all(), "no power"


def log_weight(terms: Any) -> Any:
    return terms.log_weight


@pytest.mark.pyro
def test_a_traced_step_draws_what_pyros_own_distribution_draws() -> None:
    import pyro
    import torch

    from elbozoo.inference.pyro_distributions import OneHotCategorical

    logits, draws = torch.randn(2, 4), []
    for family in (OneHotCategorical, pyro.distributions.OneHotCategorical):
        torch.manual_seed(1)
        draws.append(family(logits=logits).expand((3, 2)).to_event(1).sample((5,)))
    assert torch.equal(*draws)
    trainer = import_module("elbozoo.inference.pyro_trainer").Trainer(
        TINY.pyro(), ELBO(gradient=GumbelSoftmax()), Adam(), (X,), batch_size=4, seeds=[0], redraw_pixels=False, device=None
    )  # fmt: skip
    trainer.compile_after = 0
    trainer.epoch(np.arange(4)[None, None])
    assert trainer.compiled is not None


# --- the autoregressive guide -----------------------------------------------------------------------------------

Weights = dict[str, np.ndarray]


def dense(weights: Weights, network: str, x: np.ndarray) -> np.ndarray:
    hidden = np.tanh(x @ weights[f"{network}.layers.0.weight"].T + weights[f"{network}.layers.0.bias"])
    return hidden @ weights[f"{network}.layers.1.weight"].T + weights[f"{network}.layers.1.bias"]


def log_densities(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every state of three latents of three categories, ``(27, 3, 3)``; ``log p(x, z)`` and ``log q(z | x)``, ``(27, B)``.

    The guide's is the product of its conditionals, latent by latent, each by its own blocks.
    """
    z = np.eye(3)[np.array(list(product(range(3), repeat=3)))]
    logits = dense(weights, "decoder", z.reshape(27, 1, 9))
    joint = (x * log_expit(logits) + (1 - x) * log_expit(-logits)).sum(-1) - 3 * np.log(3)
    own, blocks = (
        dense(weights, "encoder", x).reshape(-1, 3, 3),
        weights["posterior.autoregression"].reshape(3, 3, 3, 3),
    )
    guide = np.zeros(joint.shape)
    for i in range(3):
        conditional = own[:, i] + sum((z[:, j] @ blocks[i, :, j].T for j in range(i)), start=np.zeros((27, 3)))[:, None]
        guide += (z[:, i, None] * log_softmax(conditional, axis=-1)).sum(-1)
    return z, joint, guide


def test_every_state_under_the_autoregressive_guide(engine: str) -> None:
    z, joint, guide = log_densities(weights_of(AUTOREGRESSIVE), X)
    values = {"z": np.repeat(z[:, None], len(X), axis=1)}
    found = trained(engine, AUTOREGRESSIVE).apply(densities, (X,), values=values)
    np.testing.assert_allclose(found[0], joint, rtol=1e-11)
    np.testing.assert_allclose(found[1], guide, rtol=1e-11)
    np.testing.assert_allclose(logsumexp(found[1], axis=0), 0.0, atol=1e-12)
    apart = guide.reshape(3, 3, 3, -1)
    conditional = apart - logsumexp(apart, axis=(1, 2), keepdims=True)
    assert np.ptp(conditional, axis=0).max() > 0.1, "the later latents see the first one"


def test_draws_of_the_autoregressive_guide_have_its_probabilities(engine: str) -> None:
    """State by state, and so the ELBO of one particle in expectation, which is told apart from that of none."""
    z, joint, guide = log_densities(weights_of(AUTOREGRESSIVE), X)
    num = 40_000
    found = trained(engine, AUTOREGRESSIVE).apply(drawn_and_weighed, (X,), num_particles=num, seed=1)
    draws, weights = found["z"], found["log_weight"]
    state = (draws.argmax(-1) * [9, 3, 1]).sum(-1)
    assert (draws == z[state]).all()
    share = np.stack([np.bincount(each, minlength=27) / num for each in state.T], axis=-1)
    probability = np.exp(guide)
    assert (abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / num)).all()
    elbo = (probability * (joint - guide)).sum(axis=0)
    error = weights.std(axis=0) / num**0.5
    assert (abs(weights.mean(axis=0) - elbo) < 4.5 * error).all()
    assert (error < 0.02).all(), "no power"


def drawn_and_weighed(terms: Any) -> Any:
    return {"z": terms.values["z"], "log_weight": terms.log_weight}


@PYRO_ALONE
def test_a_guide_that_sees_nothing_before_it_is_the_factorised_one(engine: str) -> None:
    """And so it is at first: what is on and above the diagonal never counts."""
    factorised = CategoricalVAE(3, 3, 3, MLP((4,)))
    weights = weights_of(AUTOREGRESSIVE)
    above = np.where(np.tril(np.ones((3, 3)), -1).repeat(3, 0).repeat(3, 1), 0.0, weights["posterior.autoregression"])
    assert above.any()
    values = {"z": np.repeat(log_densities(weights, X)[0][:, None], len(X), axis=1)}
    blind = trained(engine, AUTOREGRESSIVE).with_weights(weights | {"posterior.autoregression": above})
    without = {n: a for n, a in weights.items() if n != "posterior.autoregression"}
    expected = getattr(factorised, engine)().with_weights(without).apply(densities, (X,), values=values)
    np.testing.assert_allclose(blind.apply(densities, (X,), values=values), expected, rtol=1e-11)
    from test_twins import initial_weights

    assert not initial_weights(engine, AUTOREGRESSIVE)["posterior.autoregression"].any()


@PYRO_ALONE
@pytest.mark.parametrize(
    "objective", [ELBO(gradient=ScoreFunction(baseline="none")), IWAE(2, VIMCO())], ids=["score-function", "vimco"]
)
def test_gradients_of_the_autoregressive_guide_are_unbiased(engine: str, objective: Any) -> None:
    """Weighted by every outcome's probability they are the derivative of the bound's sum over states: no draws at all."""
    x, weights, num = X[:1], weights_of(AUTOREGRESSIVE), objective.num_particles
    z, _, guide = (a[:, 0] if a.ndim == 2 else a for a in log_densities(weights, x))
    outcomes = np.array(list(product(range(27), repeat=num))).T  # (K, 27^K)
    probability = np.exp(guide[outcomes].sum(axis=0))

    def expected_bound(weights: Weights) -> float:
        _, joint, guide = log_densities(weights, x)
        log_weight = (joint - guide)[outcomes, 0]
        return float(np.exp(guide[outcomes, 0].sum(axis=0)) @ (logsumexp(log_weight, axis=0) - np.log(num)))

    found = weighted_gradient(engine, objective, np.repeat(x, len(probability), axis=0), z[outcomes], probability)
    assert sorted(found) == sorted(weights)
    for name, array in weights.items():
        want = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[i] = 1e-5
            above, below = (expected_bound(weights | {name: array + s}) for s in (step, -step))
            want[i] = (above - below) / 2e-5
        assert abs(want).max() > 1e-3, name
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-7, err_msg=name)


def weighted_gradient(engine: str, objective: Any, x: np.ndarray, z: np.ndarray, probability: np.ndarray) -> Weights:
    """Of the surrogate at latents (K, B, 3, 3), each datum's weighted by its probability (B,)."""
    found, num = trained(engine, AUTOREGRESSIVE), len(z)
    if engine == "pyro":
        import torch

        args = torch.tensor(x), torch.tensor(z), torch.tensor(probability)
        terms = found.terms(args[:1], num_particles=num, values={"z": args[1]})
        (args[2] * objective.surrogate(terms)).sum().backward()
        return {n: p.grad.numpy() for n, p in found._tensors().items() if p.requires_grad}
    import jax

    from elbozoo.inference.numpyro_engine import particles
    from elbozoo.inference.weights import to_torch_layout

    def surrogate(params: dict) -> Any:
        forms, values = (found.model_fn, found.guide_fn), {"z": jax.numpy.asarray(z)}
        terms, _ = particles(jax.random.key(0), params, *forms, (x,), num_particles=num, values=values)
        return (probability * objective.surrogate(terms)).sum()

    return to_torch_layout(jax.jit(jax.grad(surrogate))(found.params))


@PYRO_ALONE
@pytest.mark.parametrize("gradient", [DisARM(), REBAR(), GumbelSoftmax(), Enumerate()], ids=repr)
def test_gradients_that_look_at_the_logits_refuse_the_autoregressive_guide(engine: str, gradient: Any) -> None:
    program = getattr(AUTOREGRESSIVE, engine)()
    with pytest.raises(Refused, match=r"site 'z' under \w+ must be of a .*; got AutoregressiveOneHot.*VIMCO"):
        fit(program, X, objective=ELBO(gradient=gradient), epochs=1, progress=False)


@PYRO_ALONE
def test_the_pathwise_gradient_refuses_the_autoregressive_guide(engine: str) -> None:
    with pytest.raises(Refused, match="site 'z' under Pathwise must have a reparameterised guide"):
        fit(getattr(AUTOREGRESSIVE, engine)(), X, objective=ELBO(), epochs=1, progress=False)


@covering("objective", [IWAE(3, VIMCO()), ELBO(gradient=NVIL(baseline_units=4)), IWAE(3, RWS())], numpyro=(), ids=str)
def test_it_trains_with_an_autoregressive_guide(engine: str, objective: Any) -> None:
    x = (np.random.default_rng(0).random((48, 5)) < 0.3) * 1.0
    program = getattr(CategoricalVAE(5, 3, 4, MLP((4,)), autoregressive_guide=True), engine)()
    run = fit(program, x, objective=objective, epochs=2, batch_size=16, progress=False)
    assert np.isfinite(run.history[-1]["bound"])
    within = run.program.weights["posterior.autoregression"]
    below = np.tril(np.ones((3, 3)), -1).repeat(4, 0).repeat(4, 1) > 0
    assert np.isfinite(within).all()
    assert within[below].all()
    assert not within[~below].any()


@pytest.mark.pyro
def test_a_traced_step_takes_the_autoregressive_guide() -> None:
    trainer = import_module("elbozoo.inference.pyro_trainer").Trainer(
        AUTOREGRESSIVE.pyro(), IWAE(3, VIMCO()), Adam(), (X,), batch_size=4, seeds=[0], redraw_pixels=False, device=None
    )  # fmt: skip
    trainer.compile_after = 0
    trainer.epoch(np.arange(4)[None, None])
    assert trainer.compiled is not None


# --- training ---------------------------------------------------------------------------------------------------


@covering(
    "objective",
    [IWAE(3, VIMCO()), ELBO(gradient=ScoreFunction(baseline="running-mean")), ELBO(gradient=GumbelSoftmax()), ELBO(gradient=REBAR()), IWAE(2, RELAX(network_units=4))],
    numpyro=(2,),
    ids=lambda o: type(o.gradient).__name__,
)  # fmt: skip
def test_it_trains(engine: str, objective: Any) -> None:
    x = (np.random.default_rng(0).random((48, 5)) < 0.3) * 1.0
    program = getattr(CategoricalVAE(5, 3, 4, MLP((4,))), engine)()
    run = fit(program, x, objective=objective, epochs=2, batch_size=16, progress=False)
    assert np.isfinite(run.history[-1]["bound"])
    for weight, array in run.program.weights.items():
        assert np.isfinite(array).all()
        if weight.endswith("bias"):  # they start at 0: each has got a gradient
            assert array.all(), weight


@PYRO_ALONE
def test_training_finds_the_evidence(engine: str) -> None:
    """Data of three patterns: one variable of three values tells them apart, and the bound is their entropy."""
    x = np.repeat([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]], 16, axis=0)
    program = getattr(CategoricalVAE(4, 1, 3, MLP(())), engine)()
    options = {"optimizer": Adam(0.1), "epochs": 200, "batch_size": 48, "progress": False}
    run = fit(program, x, objective=ELBO(gradient=Enumerate()), **options)
    assert abs(evaluate(run.program, x, num_particles=20).elbo + np.log(3)) < 0.05


def test_disarm_is_for_two_categories(engine: str) -> None:
    program = getattr(TINY, engine)()
    with pytest.raises(Refused, match="site 'z' under DisARM must be of a Bernoulli; got OneHotCategorical"):
        fit(program, X, objective=ELBO(gradient=DisARM()), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latents": 0}, "num_latents must be a whole number of at least 1; got 0"),
        ({"num_categories": 1}, "num_categories must be a whole number of at least 2; got 1"),
        ({"network": MLP}, "network must be a Network; got"),
        ({"data_dim": 3, "network": Conv()}, "image_shape must have data_dim=3 entries; got"),
        ({"autoregressive_guide": 1}, "autoregressive_guide must be True or False; got 1"),
        ({"likelihood": "gaussian"}, "likelihood must be a Likelihood; got"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        CategoricalVAE(**settings)


# --- NumPyro's one-hot distribution -----------------------------------------------------------------------------


@pytest.mark.numpyro
class TestOneHotCategorical:
    LOGITS = np.random.default_rng(0).normal(size=(2, 4))

    def made(self) -> Any:
        from elbozoo.inference.numpyro_distributions import OneHotCategorical

        return OneHotCategorical(self.LOGITS)

    def test_log_probs_of_its_states(self) -> None:
        fn, log_probs = self.made(), log_softmax(self.LOGITS, axis=-1)
        values = fn.enumerate_support()
        assert values.shape == (4, 2, 4)
        assert fn.enumerate_support(expand=False).shape == (4, 1, 4)
        np.testing.assert_allclose(fn.log_prob(values), log_probs.T, rtol=1e-12)
        np.testing.assert_allclose(fn.entropy(), -(np.exp(log_probs) * log_probs).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(fn.mean, np.exp(log_probs), rtol=1e-12)

    def test_draws(self) -> None:
        import jax

        fn, num = self.made(), 40_000
        draws = np.asarray(fn.expand((3, 2)).sample(jax.random.key(0), (num,)))
        assert draws.shape == (num, 3, 2, 4)
        assert draws.dtype == np.float64
        assert fn.support(draws).all()
        error = np.sqrt(fn.variance / (3 * num))
        assert (abs(draws.mean((0, 1)) - fn.mean) < 4.5 * error).all()
        np.testing.assert_allclose(draws.var((0, 1)), fn.variance, atol=0.01)

    def test_support(self) -> None:
        support = self.made().support
        for value, inside in {(0, 1, 0): True, (0, 0, 0): False, (1, 1, 0): False, (0.5, 0.5, 0): False}.items():
            assert bool(support(np.array(value))) is inside
        assert support.is_discrete
        assert support.event_dim == 1
        assert support(support.feasible_like(np.zeros((2, 3)))).all()

    def test_impossible_states(self) -> None:
        """A log probability of minus infinity spoils neither the others nor their gradient."""
        import jax
        import jax.numpy as jnp

        from elbozoo.inference.numpyro_distributions import OneHotCategorical

        def log_prob(logits: Any) -> Any:
            fn = OneHotCategorical(jnp.concatenate([logits, jnp.array([-jnp.inf])]), validate_args=False)
            return fn.log_prob(jnp.array([1.0, 0.0, 0.0]))

        value, slope = jax.value_and_grad(log_prob)(jnp.zeros(2))
        np.testing.assert_allclose(value, -np.log(2))
        np.testing.assert_allclose(slope, [0.5, -0.5])

    def test_it_is_a_pytree(self) -> None:
        import jax

        fn = jax.jit(lambda fn: fn)(self.made())
        np.testing.assert_array_equal(fn.logits, self.LOGITS)
        assert fn.batch_shape == (2,)
        assert fn.event_shape == (4,)

    def test_a_number_is_refused(self) -> None:
        from elbozoo.inference.numpyro_distributions import OneHotCategorical

        with pytest.raises(ValueError, match="logits must have at least one dim"):
            OneHotCategorical(1.0)
