"""SigmoidBeliefNet against sums over all of its states, worked out from the weights in NumPy."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy.special import expit, log_expit, logsumexp

from elbozoo.inference import ELBO, IWAE, Adam, evaluate, exact_log_lik, fit, to_arviz
from elbozoo.inference.discrete import REBAR, RELAX, DisARM, Enumerate, GumbelSoftmax
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.gradients import NVIL, RWS, VIMCO
from elbozoo.zoo import Gaussian, SigmoidBeliefNet

TWINS = [
    SigmoidBeliefNet(5, (4, 3, 2), hidden=(4, 3)),
    SigmoidBeliefNet(5, (4, 3), autoregressive_guide=True, likelihood=Gaussian("pixel")),
]
TINY = [
    SigmoidBeliefNet(3, (3,)),
    SigmoidBeliefNet(3, (2, 2)),
    SigmoidBeliefNet(3, (2, 2, 1), hidden=(4, 3)),
    SigmoidBeliefNet(3, (3, 2), autoregressive_guide=True),
]
FACTORISED = TINY[:3]
X = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


# --- the oracle -------------------------------------------------------------------------------------------------


def outputs(weights: dict[str, np.ndarray], network: str, below: np.ndarray) -> np.ndarray:
    """A tanh network at binary inputs, which it sees as -1 and 1."""
    h, i = 2 * below - 1, 0
    while f"{network}.layers.{i}.weight" in weights:
        h = (np.tanh(h) if i else h) @ weights[f"{network}.layers.{i}.weight"].T + weights[f"{network}.layers.{i}.bias"]
        i += 1
    assert i
    return h


def bernoulli(z: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return (z * log_expit(logits) + (1 - z) * log_expit(-logits)).sum(-1)


def log_joint(weights: dict[str, np.ndarray], layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """``log p(x, z)`` of ``layers`` z_1 ... z_L."""
    total = bernoulli(layers[-1], weights["prior.logits"])
    for i, below in enumerate([x, *layers[:-1]]):
        total = total + bernoulli(below, outputs(weights, f"decoders.{i}", layers[i]))
    return total


def log_guide(weights: dict[str, np.ndarray], layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """``log q(z | x)``, unit by unit."""
    total = np.zeros(x.shape[:-1])
    for i, (below, z) in enumerate(zip([x, *layers[:-1]], layers, strict=True)):
        logits = outputs(weights, f"encoders.{i}", below)
        within = weights.get(f"posteriors.{i}.autoregression", np.zeros((z.shape[-1],) * 2))
        for unit in range(z.shape[-1]):
            own = logits[..., unit] + sum(within[unit, j] * z[..., j] for j in range(unit))
            total = total + bernoulli(z[..., unit, None], own[..., None])
    return total


def states(spec: SigmoidBeliefNet) -> list[np.ndarray]:
    """Every joint state of the latents, by layer ``(states, B, units)``."""
    table = np.array(list(product([0.0, 1.0], repeat=sum(spec.latent_dims))))
    parts = np.split(table, np.cumsum(spec.latent_dims)[:-1], axis=-1)
    return [np.repeat(part[:, None], len(X), axis=1) for part in parts]


def named(layers: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"z{i + 1}": z for i, z in enumerate(layers)}


@cache
def weights_of(spec: SigmoidBeliefNet) -> dict[str, np.ndarray]:
    from test_twins import random_weights

    return random_weights(spec, seed=3)


def trained(engine: str, spec: SigmoidBeliefNet) -> Any:
    return getattr(spec, engine)().with_weights(weights_of(spec))


def densities(terms: Any) -> tuple[Any, Any]:
    return terms.log_prior + terms.log_lik, terms.log_guide


def bound_of(objective: Any, terms: Any) -> Any:
    return objective.bound(terms)


def log_weight(terms: Any) -> Any:
    return terms.log_weight


def closed_forms(terms: Any) -> dict[str, Any]:
    return {n: s.kl for n, s in terms.sites.items() if s.kl is not None}


# --- exact ------------------------------------------------------------------------------------------------------


@covering("spec", TINY, numpyro=(), ids=str)  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_both_densities_at_every_state(engine: str, spec: SigmoidBeliefNet) -> None:
    weights, layers = weights_of(spec), states(spec)
    joint, guide = trained(engine, spec).apply(densities, (X,), values=named(layers))
    np.testing.assert_allclose(joint, log_joint(weights, layers, X), rtol=1e-11)
    np.testing.assert_allclose(guide, log_guide(weights, layers, X), rtol=1e-11)
    np.testing.assert_allclose(logsumexp(guide, axis=0), 0.0, atol=1e-12)


@covering("spec", TINY, numpyro=(2,), ids=str)
def test_the_evidence_is_the_sum_over_states(engine: str, spec: SigmoidBeliefNet) -> None:
    evidence = logsumexp(log_joint(weights_of(spec), states(spec), X), axis=0)
    np.testing.assert_allclose(exact_log_lik(trained(engine, spec), X), evidence, rtol=1e-11)
    every = np.array(list(product([0.0, 1.0], repeat=3)))
    np.testing.assert_allclose(logsumexp(exact_log_lik(trained(engine, spec), every)), 0.0, atol=1e-12)


@covering("spec", TINY, numpyro=(3,), ids=str)
def test_draws_of_the_guide_have_its_probabilities(engine: str, spec: SigmoidBeliefNet) -> None:
    """The mean ELBO over draws is that over states: by no other way than the draws is it told whether they are right."""
    weights, layers = weights_of(spec), states(spec)
    joint, guide = log_joint(weights, layers, X), log_guide(weights, layers, X)
    elbo = (np.exp(guide) * (joint - guide)).sum(axis=0)
    draws = trained(engine, spec).apply(log_weight, (X,), num_particles=40_000, seed=1)
    error = draws.std(axis=0) / len(draws) ** 0.5
    assert (abs(draws.mean(axis=0) - elbo) < 4.5 * error).all()
    assert (error < 0.02).all(), "no power"


@covering("spec", FACTORISED, numpyro=(), ids=str)
def test_enumeration_is_the_elbo(engine: str, spec: SigmoidBeliefNet) -> None:
    weights, layers = weights_of(spec), states(spec)
    joint, guide = log_joint(weights, layers, X), log_guide(weights, layers, X)
    elbo = (np.exp(guide) * (joint - guide)).sum(axis=0)
    for analytic_kl in (False, True):
        objective = ELBO(gradient=Enumerate(), analytic_kl=analytic_kl)
        found = trained(engine, spec).apply(partial(bound_of, objective), (X,), analytic_kl=analytic_kl)
        np.testing.assert_allclose(found, elbo, rtol=1e-11)


@covering("spec", TINY, numpyro=(), ids=str)
def test_the_top_layer_alone_has_its_kl_in_closed_form(engine: str, spec: SigmoidBeliefNet) -> None:
    """Its prior has no parents; those of the others are drawn after them by a guide that climbs."""
    weights, layers, top = weights_of(spec), states(spec), len(spec.latent_dims)
    found = trained(engine, spec).apply(closed_forms, (X,), values=named(layers), analytic_kl=True)
    if spec.autoregressive_guide:
        assert not found
        return
    q, p = outputs(weights, f"encoders.{top - 1}", [X, *layers][top - 1]), weights["prior.logits"]
    kl = sum(expit(s * q) * (log_expit(s * q) - log_expit(s * p)) for s in (-1, 1)).sum(-1)
    assert set(found) == {f"z{top}"}
    np.testing.assert_allclose(found[f"z{top}"], np.broadcast_to(kl, found[f"z{top}"].shape), rtol=1e-10)


@covering("spec", FACTORISED, numpyro=(), ids=str)
def test_between_the_states_both_densities_are_continued(engine: str, spec: SigmoidBeliefNet) -> None:
    """What a relaxation trains on: each log probability linear in its unit, the networks at 2 z - 1."""
    rng, weights = np.random.default_rng(0), weights_of(spec)
    layers = [rng.uniform(size=z[:5].shape) for z in states(spec)]
    with import_module(engine).validation_enabled(False):
        joint, guide = trained(engine, spec).apply(densities, (X,), values=named(layers))
    np.testing.assert_allclose(joint, log_joint(weights, layers, X), rtol=1e-11)
    np.testing.assert_allclose(guide, log_guide(weights, layers, X), rtol=1e-11)


@PYRO_ALONE
def test_whole_number_states_are_as_good_as_floats(engine: str) -> None:
    values = named(states(TINY[2]))
    program = trained(engine, TINY[2])
    floats, whole = (
        program.apply(densities, (X,), values={n: z.astype(t) for n, z in values.items()}) for t in (float, int)
    )
    np.testing.assert_allclose(whole, floats, rtol=1e-12)


def test_initial_weights(engine: str) -> None:
    from test_twins import initial_weights

    spec = SigmoidBeliefNet(40, (30, 20), hidden=(25,), autoregressive_guide=True)
    found = initial_weights(engine, spec)
    names = [n for i in range(2) for n in (f"decoders.{i}", f"encoders.{i}")]
    expected = {f"{n}.layers.{i}.{kind}" for n in names for i in range(2) for kind in ("weight", "bias")}
    assert set(found) == expected | {"prior.logits", "posteriors.0.autoregression", "posteriors.1.autoregression"}
    for name, array in found.items():
        bound = (6 / sum(array.shape)) ** 0.5 if name.endswith(".weight") else 0.0
        assert 0.9 * bound <= np.abs(array).max() <= bound, name


# --- training ---------------------------------------------------------------------------------------------------

ANY_FAMILY = [IWAE(3, VIMCO()), IWAE(3, RWS(1.0, 0.5))]
BERNOULLI = [ELBO(gradient=NVIL(baseline_units=4)), ELBO(gradient=DisARM()), ELBO(gradient=GumbelSoftmax(hard=True))]


def name(objective: Any) -> str:
    return f"{type(objective).__name__}-{type(objective.gradient).__name__}"


def data(num: int = 48) -> np.ndarray:
    return (np.random.default_rng(0).random((num, 5)) < 0.3) * 1.0


@covering("objective", [*ANY_FAMILY, *BERNOULLI], numpyro=(2,), ids=name)
def test_it_trains(engine: str, objective: Any) -> None:
    program = getattr(SigmoidBeliefNet(5, (3, 2), hidden=(4,)), engine)()
    run = fit(program, data(), objective=objective, epochs=2, batch_size=16, progress=False)
    assert np.isfinite(run.history[-1]["bound"])
    for weight, array in run.program.weights.items():
        assert np.isfinite(array).all()
        if weight.endswith(("bias", "logits")):  # they start at 0: each has got a gradient
            assert array.all(), weight


@covering("objective", ANY_FAMILY, numpyro=(), ids=name)
def test_it_trains_with_an_autoregressive_guide(engine: str, objective: Any) -> None:
    program = getattr(SigmoidBeliefNet(5, (3, 2), autoregressive_guide=True), engine)()
    run = fit(program, data(), objective=objective, epochs=2, batch_size=16, progress=False)
    assert np.isfinite(run.history[-1]["bound"])
    for i, units in enumerate((3, 2)):
        within = run.program.weights[f"posteriors.{i}.autoregression"]
        below = np.tril(np.ones((units, units)), -1) > 0
        assert within[below].all()
        assert not within[~below].any()


@PYRO_ALONE
def test_training_finds_the_evidence(engine: str) -> None:
    """Data of two patterns: a net with one binary unit can tell them apart, and its bound then is their entropy."""
    x = np.repeat([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]], 32, axis=0)
    program = getattr(SigmoidBeliefNet(4, (1,)), engine)()
    run = fit(program, x, objective=ELBO(gradient=DisARM()), optimizer=Adam(0.1), epochs=150, batch_size=64, progress=False)  # fmt: skip
    assert abs(evaluate(run.program, x, num_particles=50).elbo + np.log(2)) < 0.05


@PYRO_ALONE  # written once for both engines
def test_to_arviz_holds_the_states(engine: str) -> None:
    posterior = to_arviz(trained(engine, TINY[1]), X, num_draws=20).posterior
    assert set(posterior.data_vars) == {"z1", "z2"}
    assert set(np.unique(posterior["z1"])) == {0, 1}


# --- refused ----------------------------------------------------------------------------------------------------


@covering(
    "gradient", (DisARM(), REBAR(), RELAX(), GumbelSoftmax(), Enumerate()), numpyro=(), ids=lambda g: type(g).__name__
)
def test_gradients_that_look_at_the_logits_refuse_the_autoregressive_guide(engine: str, gradient: Any) -> None:
    program = getattr(SigmoidBeliefNet(5, (3,), autoregressive_guide=True), engine)()
    with pytest.raises(Refused, match=r"site 'z1' under \w+ must be of a Bernoulli.*; got Autoregressive.*VIMCO"):
        fit(program, data(), objective=ELBO(gradient=gradient), epochs=1, progress=False)


@PYRO_ALONE
def test_the_pathwise_gradient_is_refused(engine: str) -> None:
    program = getattr(SigmoidBeliefNet(5, (3,)), engine)()
    with pytest.raises(Refused, match="site 'z1' under Pathwise must have a reparameterised guide"):
        fit(program, data(), objective=ELBO(), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dims": ()}, r"latent_dims must have one to three layers; got \(\)"),
        ({"latent_dims": (2, 2, 2, 2)}, "latent_dims must have one to three layers; got"),
        ({"latent_dims": (2, 0)}, "every entry of latent_dims must be a whole number of at least 1; got 0"),
        ({"hidden": 200}, "hidden must be a tuple of whole numbers; got 200"),
        ({"autoregressive_guide": 1}, "autoregressive_guide must be True or False; got 1"),
        ({"likelihood": Gaussian}, "likelihood must be a Likelihood; got"),
        ({"data_dim": 0}, "data_dim must be a whole number of at least 1; got 0"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SigmoidBeliefNet(**settings)
