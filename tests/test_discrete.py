"""Discrete sites: estimators that follow the gradient of no bound of the discrete model against their own definitions,
what is refused, what is reported, and whether a guide gets away from a bad start.

Definitions are worked out in NumPy: enumeration for states, Gauss–Legendre quadrature for the noise of relaxations.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from covering import PYRO_ALONE, covering
from oracles import BINARY_LAYERS, DISCRETE, ONE_HOT, ONE_SITE, Nodes, Params, Toy, bernoulli, normal
from scipy.optimize import minimize
from scipy.special import expit

from elbozoo.inference.discrete import ARM, REBAR, RELAX, DisARM, Enumerate, GumbelSoftmax, StraightThrough
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.gradients import NVIL, RWS, VIMCO, Covariance, ScoreFunction
from elbozoo.inference.objectives import ELBO, IWAE, PIWAE, TVO
from elbozoo.inference.shapes import AnnealedKL

DRAWS = 200_000
SIGMAS = 4.5
TOY = BINARY_LAYERS
STATES = np.array([0.0, 1.0])
NODES = {1: 10, 2: 4}
"""Nodes in each piece of the noise of one site, by K."""


def close(found: dict[str, tuple[float, float]], want: Params, limit: float = 0.04) -> None:
    """Every component within its standard errors, and small enough errors to see a bias of ``limit`` of the norm."""
    norm = np.linalg.norm(list(want.values()))
    for name, exactly in want.items():
        mean, error = found[name]
        assert abs(mean - exactly) < SIGMAS * error + 1e-7, f"{name}: {mean} ± {error}, exactly {exactly}"
        assert SIGMAS * error < limit * norm, f"{name}: no power, ± {error} for a gradient of norm {norm}"


# --- the toy, long-hand -------------------------------------------------------------------------------------------


def log_guide(p: Params, b1: Any, b2: Any) -> np.ndarray:
    return bernoulli(b1, p["qa"]) + bernoulli(b2, p["qb"] + p["qc"] * b1)


def log_joint(p: Params, b1: Any, b2: Any) -> np.ndarray:
    log_prior = bernoulli(b2, p["m"]) + bernoulli(b1, p["u0"] + p["u1"] * b2)
    return log_prior + normal(TOY.x, p["w0"] + p["w1"] * b1 + p["w2"] * b1 * b2, np.exp(p["s"]))


def states(num_particles: int) -> tuple[np.ndarray, np.ndarray]:
    """``b1, b2`` of every combination of particles: ``(num_particles, combinations)`` each."""
    each = np.array(list(itertools.product(itertools.product(STATES, STATES), repeat=num_particles)))
    return each[:, :, 0].T, each[:, :, 1].T


# --- relaxations: the gradient of the relaxed program -------------------------------------------------------------


def relaxed_nodes(temperature: float, hard: bool) -> Any:
    """Nodes of the relaxed toy. Straight-through values are ``y + (b - y)``, whose last part does not move."""

    def values(p: Params, logistic: list[np.ndarray], moved: list[np.ndarray] | None) -> list[np.ndarray]:
        y1 = expit((p["qa"] + logistic[0]) / temperature)
        b1 = y1 if moved is None else y1 + moved[0]
        y2 = expit((p["qb"] + p["qc"] * b1 + logistic[1]) / temperature)
        return [b1, y2 if moved is None else y2 + moved[1]]

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        grid = gauss_legendre(num)
        (u1, u2), weight = oracles.product(grid, grid)
        logistic = [np.log(u) - np.log1p(-u) for u in (u1, u2)]
        moved = None
        if hard:
            at = TOY.params
            y1 = expit((at["qa"] + logistic[0]) / temperature)
            first = np.round(y1) - y1
            y2 = expit((at["qb"] + at["qc"] * np.round(y1) + logistic[1]) / temperature)
            moved = [first, np.round(y2) - y2]
        b1, b2 = values(p, logistic, moved)
        log_lik = normal(TOY.x, p["w0"] + p["w1"] * b1 + p["w2"] * b1 * b2, np.exp(p["s"]))
        return Nodes(weight, log_lik, log_guide(q, b1, b2) - (log_joint(p, b1, b2) - log_lik))

    return nodes


def gauss_legendre(num: int) -> tuple[np.ndarray, np.ndarray]:
    """On (0, 1), in pieces that end where the toy's states change, so that rounding leaves each piece smooth."""
    p = TOY.params
    ends = sorted({0.0, 1.0, *(float(expit(-a)) for a in (p["qa"], p["qb"], p["qb"] + p["qc"]))})
    x, w = np.polynomial.legendre.leggauss(num)
    pieces = [((b - a) / 2 * x + (a + b) / 2, (b - a) / 2 * w) for a, b in itertools.pairwise(ends)]
    return np.concatenate([x for x, _ in pieces]), np.concatenate([w for _, w in pieces])


@covering("hard", (False, True), numpyro=(1,), ids=lambda hard: "straight-through" if hard else "soft")
def test_gumbel_softmax_follows_its_relaxed_program(engine: str, hard: bool) -> None:
    """And not the discrete model: the bias is plain, and is what the docstring warns of."""
    temperature = 0.7
    relaxed = Toy("relaxed", TOY.params, TOY.x, TOY.program, relaxed_nodes(temperature, hard))
    gradient = GumbelSoftmax(temperature, hard=hard)
    one, two = oracles.estimates(
        engine, TOY, [ELBO(gradient=gradient, analytic_kl=False), IWAE(2, gradient)], DRAWS, seed=3
    )
    close(one, relaxed.gradient(oracles.elbo, 1, NODES[1], list(TOY.params)))
    close(two, relaxed.gradient(oracles.iwae, 2, NODES[2], list(TOY.params)))
    truth = TOY.gradient(oracles.elbo, 1, 1, list(TOY.params))
    off = max(abs(one[n][0] - truth[n]) / one[n][1] for n in TOY.guide_names)
    assert off > 20, "its bias should be plain here"


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "straight-through"])
def test_the_relaxed_quadrature_has_converged(hard: bool) -> None:
    relaxed = Toy("relaxed", TOY.params, TOY.x, TOY.program, relaxed_nodes(0.7, hard))
    for bound, num_particles, more in ((oracles.elbo, 1, 5), (oracles.iwae, 2, 2)):
        num = NODES[num_particles]
        coarse, finer = (relaxed.gradient(bound, num_particles, n, TOY.guide_names) for n in (num, num + more))
        assert max(abs(coarse[n] - finer[n]) for n in coarse) < 1e-4


# --- gradients of no bound ----------------------------------------------------------------------------------------


def held_weights(num_particles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every combination of particles: its states, its probability and its log weights, at the toy's parameters."""
    b1, b2 = states(num_particles)
    p = TOY.params
    return b1, b2, np.exp(log_guide(p, b1, b2)).prod(axis=0), log_joint(p, b1, b2) - log_guide(p, b1, b2)


@covering("wake,sleep", ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), numpyro=(2,), ids=str)
def test_reweighted_wake_sleep_follows_its_own_definition(engine: str, wake: float, sleep: float) -> None:
    """Bornschein & Bengio 2015, eqs. 4, 8, 9, with weights, draws and dreams of fixed parameters, enumerated."""
    b1, b2, probability, log_weight = held_weights(3)
    share = np.exp(log_weight - np.logaddexp.reduce(log_weight))
    c1, c2 = np.meshgrid(STATES, STATES)  # this guide reads no data, so that dreams of data integrate out
    prior = np.exp(bernoulli(c2, TOY.params["m"]) + bernoulli(c1, TOY.params["u0"] + TOY.params["u1"] * c2))

    def climbed(p: Params) -> float:
        model = probability @ (share * log_joint(p, b1, b2)).sum(axis=0)
        guide = probability @ (share * log_guide(p, b1, b2)).sum(axis=0)
        return model + wake * guide + sleep * (prior * log_guide(p, c1, c2)).sum()

    want = oracles.differentiate(climbed, TOY.params, list(TOY.params))
    (found,) = oracles.estimates(engine, TOY, [IWAE(3, RWS(wake, sleep))], DRAWS, seed=5)
    close(found, want)


def test_the_sleep_phase_shows_the_guide_what_the_model_dreams(engine: str) -> None:
    """``E_{p(z, x)}[∂ log q(z | x)]`` by quadrature over the dreamt x, far from the datum that was passed."""
    at = {"m": 0.4, "w": 2.0, "qa": -0.5, "qb": 0.8}

    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z = lib.sample("z", lib.dist.Bernoulli(logits=p("m")))
                lib.sample("x", lib.dist.Normal(p("w") * z, 1.0), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", lib.dist.Bernoulli(logits=p("qa") + p("qb") * x))

        return model, guide

    e, weight = oracles.gauss_hermite(40)

    def climbed(p: Params) -> float:
        dreams = [(expit(at["m"]), 1.0, at["w"] + e), (expit(-at["m"]), 0.0, e)]
        return sum(prior * weight @ bernoulli(z, p["qa"] + p["qb"] * x) for prior, z, x in dreams)

    toy = Toy("dreams", at, 30.0, program, lambda p, q, num: None)
    (found,) = oracles.estimates(engine, toy, [IWAE(1, RWS(wake=0.0, sleep=1.0))], DRAWS, seed=8)
    close({n: found[n] for n in toy.guide_names}, oracles.differentiate(climbed, at, toy.guide_names))


@PYRO_ALONE
def test_the_thermodynamic_covariance_follows_its_own_definition(engine: str) -> None:
    """Masrani et al. 2019, eq. 12, each expectation by self-normalised weights of fixed parameters, enumerated."""
    b1, b2, probability, log_weight = held_weights(3)
    betas = oracles.log_spaced(3, 0.025)

    def climbed(p: Params) -> float:
        log_p, log_q = log_joint(p, b1, b2), log_guide(p, b1, b2)
        total = np.zeros(probability.shape)
        for left, right in itertools.pairwise(betas):
            w = np.exp(left * log_weight) / np.exp(left * log_weight).sum(axis=0)
            centred = log_weight - (w * log_weight).sum(axis=0)
            potential = (1 - left) * log_q + left * log_p
            total = total + (right - left) * (w * (log_p - log_q + centred * potential)).sum(axis=0)
        return float(probability @ total)

    want = oracles.differentiate(climbed, TOY.params, list(TOY.params))
    (found,) = oracles.estimates(engine, TOY, [TVO(3, 3, gradient=Covariance())], DRAWS, seed=6)
    close(found, want)


def test_the_covariance_gradient_is_the_objectives_own_in_the_limit(engine: str) -> None:
    """With 300 particles it is within 2 % of the derivative of the exact integral's left sum."""
    b1, b2 = states(1)
    betas = oracles.log_spaced(3, 0.025)

    def exact(p: Params) -> float:
        log_p, log_q = log_joint(p, b1, b2)[0], log_guide(p, b1, b2)[0]
        total = 0.0
        for left, right in itertools.pairwise(betas):
            density = np.exp((1 - left) * log_q + left * log_p)
            total += (right - left) * (density / density.sum()) @ (log_p - log_q)
        return total

    want = oracles.differentiate(exact, TOY.params, list(TOY.params))
    (found,) = oracles.estimates(engine, TOY, [TVO(3, 300, gradient=Covariance())], 2000, seed=7)
    norm = np.linalg.norm(list(want.values()))
    assert max(abs(found[n][0] - want[n]) for n in want) < 0.02 * norm


# --- what is reported ---------------------------------------------------------------------------------------------


def losses(engine: str, objective: Any, seeds: int) -> np.ndarray:
    """The reported bound of one datum of the toy, a seed at a time."""
    lib = oracles.library(engine)
    model, guide = TOY.program(lib, lambda n: lib.param(n, lib.array(TOY.params[n])), 1)
    x = lib.array(np.array([TOY.x]))
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss, Program

        params = {n: lib.array(v) for n, v in TOY.params.items()}
        outline = Program(model, guide).with_params(params).outline((x,))
        params["elbozoo_estimator"] = objective.gradient.initial(x, outline.sites)[0]
        one = jax.vmap(lambda seed: -Loss(objective).loss(jax.random.key(seed), params, model, guide, x))
        return np.asarray(oracles.compiled(one)(np.arange(seeds)))
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.set_rng_seed(0)
    return np.array([-float(Loss(objective).loss(model, guide, x)) for _ in range(seeds)])


@covering("gradient", (GumbelSoftmax(0.5), REBAR(), RELAX(), DisARM()), ids=lambda g: type(g).__name__)
def test_what_is_reported_is_of_the_discrete_model(engine: str, gradient: Any) -> None:
    """Every value is one of the four that the states allow, never one of a relaxed state."""
    *_, log_weight = held_weights(1)
    found = losses(engine, ELBO(gradient=gradient, analytic_kl=False), 60)
    distance = np.abs(found[:, None] - log_weight).min(axis=1)
    assert distance.max() < 1e-9
    assert len(np.unique(np.round(found, 9))) > 1


@covering(
    "gradient,logit",
    list(itertools.product((GumbelSoftmax(0.5), REBAR(0.5), RELAX(), DisARM(), ARM()), (800.0, -800.0))),
    numpyro=(0, 3),
    ids=lambda v: v if isinstance(v, float) else type(v).__name__,
)
def test_an_all_but_sure_state_has_a_finite_gradient(engine: str, gradient: Any, logit: float) -> None:
    """A uniform number given such a state rounds to 0 or 1, whose logit is infinite."""
    sure = Toy("sure", {**TOY.params, "qa": logit}, TOY.x, TOY.program, TOY.nodes)
    (found,) = oracles.estimates(engine, sure, [ELBO(gradient=gradient, analytic_kl=False)], 50)
    assert all(np.isfinite(mean) for mean, _ in found.values())


def test_the_enumerated_bound_is_the_exact_expectation(engine: str) -> None:
    *_, probability, log_weight = held_weights(1)
    found = losses(engine, ELBO(gradient=Enumerate()), 3)
    np.testing.assert_allclose(found, probability @ log_weight[0], rtol=1e-12)


# --- from a bad start ---------------------------------------------------------------------------------------------

BITS = 4


def _bits(lib: Any) -> tuple[Any, Any, np.ndarray]:
    """``z`` of independent bits, ``x_i = z_i`` plus noise, and 20 sharp measurements ``y`` that tell nothing of ``z``.

    The posterior is in the guide's family, and known. ``y`` adds some 60 nats to every bound, as sharp data do.
    """
    noise, data = 0.35, np.array([1.0, 0.0, 1.0, 0.0])
    log_odds = normal(data, 1.0, noise) - normal(data, 0.0, noise)

    def model(x: Any) -> None:
        z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(np.zeros(BITS))).to_event(1))
        lib.sample("x", lib.dist.Normal(1.0 * z, noise).to_event(1), obs=x)
        lib.sample("y", lib.dist.Normal(lib.array(np.zeros(20)), 0.02).to_event(1), obs=lib.array(np.zeros(20)))

    def guide(x: Any) -> None:
        start = lib.array(np.where(data > 0.5, -4.0, 4.0))  # every bit is wrong, at odds of 55 to one
        lib.sample("z", lib.dist.Bernoulli(logits=lib.param("a", start)).to_event(1))

    return model, guide, expit(log_odds)


def trained_guide(engine: str, objective: Any, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The guide's probabilities after ``steps`` of the library's own ``SVI``, and the posterior's."""
    lib = oracles.library(engine)
    model, guide, posterior = _bits(lib)
    x = lib.array(np.array([1.0, 0.0, 1.0, 0.0]))
    if engine == "numpyro":
        import jax
        import numpyro

        from elbozoo.inference.numpyro_engine import Loss

        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.1), Loss(objective))
        result = svi.run(jax.random.key(seed), steps, x, progress_bar=False)
        return expit(np.asarray(result.params["a"])), posterior
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Loss(objective))
    for _ in range(steps):
        svi.step(x)
    return expit(pyro.param("a").detach().numpy()), posterior


def multi_sample_bound(probabilities: np.ndarray, posterior: np.ndarray) -> float:
    """``E[log 1/3 Σ w] - log p(x)`` of three particles, every combination of which is counted; bits are alike."""
    bits = np.array(list(itertools.product(STATES, repeat=BITS)))
    log_q = (bits * np.log(probabilities) + (1 - bits) * np.log1p(-probabilities)).sum(axis=1)
    log_w = (bits * np.log(posterior) + (1 - bits) * np.log1p(-posterior)).sum(axis=1) - log_q
    return oracles.expected(oracles.iwae, Nodes(np.exp(log_q), log_w, 0.0 * log_w), 3)


@cache
def guide_of_the_plain_score(engine: str) -> np.ndarray:
    """Of the same start; every row below is held against it."""
    return trained_guide(engine, ELBO(gradient=ScoreFunction(baseline="none")), 350, seed=0)[0]


@pytest.mark.filterwarnings("ignore:.*lies outside")
@pytest.mark.parametrize("objective", [IWAE(3, VIMCO()), IWAE(30, RWS())], ids=["VIMCO", "RWS"])
def test_gets_away_from_a_bad_start_where_the_plain_score_does_not(engine: str, objective: Any) -> None:
    """Every bound is some 60 nats: without a baseline each draw is made likelier, and nearly every draw is wrong.

    RWS comes to the posterior. So does VIMCO, slowly towards the end, where its 3-sample bound is flat: what it has still
    to win of the 14.8 nats that the bound was loose by is under 0.1.
    """
    found, posterior = trained_guide(engine, objective, 500, seed=0)
    if isinstance(objective.gradient, VIMCO):
        assert np.abs(found - posterior).max() < 0.2
        assert multi_sample_bound(1 - np.round(posterior) * 0.964 - 0.018, posterior) == pytest.approx(-14.8, abs=0.2)
        assert -0.1 < multi_sample_bound(found, posterior) <= 0.0
    else:
        assert np.abs(found - posterior).max() < 0.02
    assert np.abs(guide_of_the_plain_score(engine) - posterior).max() > 0.9


# --- control variates that are trained on the variance -----------------------------------------------------------

KNOBS = {"eta": np.array(0.7), "log_temperature": np.array(np.log(0.8))}
"""Away from where they begin, and from the best."""


def network(inputs: int, sites: int) -> dict[str, np.ndarray]:
    """Two hidden units, none of them at zero."""
    rng = np.random.default_rng(3)
    shapes = {"weight": (inputs, 2), "bias": (2,), "readout": (sites, 2)}
    return {n: rng.normal(size=s) for n, s in shapes.items()}


def given_state(logit: Any, uniform: Any, b: Any) -> np.ndarray:
    """The perturbed logit given its sign: a uniform number of the part of (0, 1) that gives ``b``, and its quantile."""
    zero = expit(-logit)
    v = np.where(b > 0.5, zero + uniform * (1 - zero), uniform * zero)
    return logit + np.log(v) - np.log1p(-v)


def read_out(own: dict[str, np.ndarray], site: int, *values: Any) -> Any:
    """The network's part of a control variate."""
    if "weight" not in own:
        return 0.0
    x = np.stack(np.broadcast_arrays(*values), axis=-1)
    return np.tanh((2 * x - 1) @ own["weight"] + own["bias"]) @ own["readout"][site]


def squared_length(surrogate: Any, weight: np.ndarray, logits: int) -> float:
    """``E ‖∂ surrogate‖²`` at no shift of the logits, by central differences of every draw."""
    stencil, step = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)), 1e-3
    slopes = (
        sum(c * surrogate(*(i * step * (n == j) for j in range(logits))) for i, c in stencil) / step
        for n in range(logits)
    )
    return float(sum(weight @ slope**2 for slope in slopes))


def second_moment_of_layers(own: dict[str, np.ndarray], num: int = 8) -> float:
    """Of the gradient of the ELBO of ``BINARY_LAYERS`` in the logits of its two sites, from one draw.

    Tucker et al. 2017, eq. 3, site by site; states are enumerated, the noise of the first site, of the second after it
    and of the second alone is integrated.
    """
    p, eta, temperature = TOY.params, own["eta"], np.exp(own["log_temperature"])
    grid = oracles.shifted_legendre(num)
    coin = (STATES, np.ones(2))
    (b1, b2, u1, u2, u3), weight = oracles.product(coin, coin, grid, grid, grid)
    weight = weight * np.exp(log_guide(p, b1, b2))

    def bound(c1: Any, c2: Any, e1: float, e2: float) -> np.ndarray:
        log_q = bernoulli(c1, p["qa"] + e1) + bernoulli(c2, p["qb"] + p["qc"] * c1 + e2)
        return log_joint(p, c1, c2) - log_q

    def first(z1: Any, e1: float, e2: float) -> np.ndarray:
        y1 = expit(z1 / temperature)
        y2 = expit((p["qb"] + p["qc"] * y1 + e2 + np.log(u2) - np.log1p(-u2)) / temperature)
        return eta * bound(y1, y2, e1, e2) + read_out(own, 0, y1, y2)

    def second(z2: Any, e1: float, e2: float) -> np.ndarray:
        y2 = expit(z2 / temperature)
        return eta * bound(b1, y2, e1, e2) + read_out(own, 1, b1, y2)

    logit1, logit2 = p["qa"], p["qb"] + p["qc"] * b1
    z1, z2 = given_state(logit1, u1, b1), given_state(logit2, u3, b2)
    signal1, signal2 = (bound(b1, b2, 0, 0) - c for c in (first(z1, 0, 0), second(z2, 0, 0)))

    def surrogate(e1: float, e2: float) -> np.ndarray:
        total = bound(b1, b2, e1, e2) + signal1 * bernoulli(b1, logit1 + e1) + signal2 * bernoulli(b2, logit2 + e2)
        total = total + first(z1 + e1, e1, e2) - first(given_state(logit1 + e1, u1, b1), e1, e2)
        return total + second(z2 + e2, e1, e2) - second(given_state(logit2 + e2, u3, b2), e1, e2)

    return squared_length(surrogate, weight, 2)


COIN = {"m": 0.4, "w": 1.6, "qa": 0.5}


def _coin(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
    def model(x: Any) -> None:
        with lib.plate("data", size, dim=-1):
            b = lib.sample("b", lib.dist.Bernoulli(logits=p("m")))
            lib.sample("x", lib.dist.Normal(p("w") * b, 0.8), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", size, dim=-1):
            lib.sample("b", lib.dist.Bernoulli(logits=p("qa")))

    return model, guide


ONE_COIN = Toy("one coin", COIN, 1.0, _coin, lambda p, q, num: None)


def second_moment_of_pair(own: dict[str, np.ndarray], num: int = 12) -> float:
    """Of the gradient of the two-particle IWAE bound of ``ONE_COIN`` in the logit, which both particles share."""
    p, eta, temperature = COIN, own["eta"], np.exp(own["log_temperature"])
    grid, coin = oracles.shifted_legendre(num), (STATES, np.ones(2))
    (b1, b2, u1, u2), weight = oracles.product(coin, coin, grid, grid)
    b, u = np.stack([b1, b2]), np.stack([u1, u2])
    weight = weight * np.exp(bernoulli(b, p["qa"]).sum(axis=0))

    def log_weight(c: Any, e: float) -> np.ndarray:
        return bernoulli(c, p["m"]) + normal(ONE_COIN.x, p["w"] * c, 0.8) - bernoulli(c, p["qa"] + e)

    at = log_weight(b, 0.0)

    def control(k: int, z: Any, e: float) -> np.ndarray:
        y = expit(z / temperature)
        return eta * np.logaddexp(log_weight(y, e), at[1 - k]) - eta * np.log(2) + read_out(own, 0, y)

    tied = given_state(p["qa"], u, b)
    signal = [oracles.iwae(at) - control(k, tied[k], 0.0) for k in range(2)]

    def surrogate(e: float) -> np.ndarray:
        total = oracles.iwae(log_weight(b, e))
        for k in range(2):
            total = total + signal[k] * bernoulli(b[k], p["qa"] + e)
            total = total + control(k, tied[k] + e, e) - control(k, given_state(p["qa"] + e, u[k], b[k]), e)
        return total

    return squared_length(surrogate, weight, 1)


def second_moment_of_classes(own: dict[str, np.ndarray], num: int = 10) -> float:
    """Of the gradient of the ELBO of ``ONE_HOT`` in its three logits; Gumbel noise given the state by Tucker et al., C."""
    p, eta, temperature = ONE_HOT.params, own["eta"], np.exp(own["log_temperature"])
    grid = oracles.shifted_legendre(num)
    (state, *v), weight = oracles.product((np.arange(3), np.ones(3)), grid, grid, grid)
    b, v, means = np.eye(3)[state.astype(int)], np.stack(v, axis=-1), np.array([p["w0"], p["w1"], p["w2"]])

    def log_probs(logits: Any) -> np.ndarray:
        return np.asarray(logits) - np.logaddexp.reduce(logits)

    def bound(c: np.ndarray, log_q: np.ndarray) -> np.ndarray:
        return normal(ONE_HOT.x, c @ means, np.exp(p["s"])) + c @ (log_probs([p["m0"], p["m1"], 0.0]) - log_q)

    def control(z: np.ndarray, log_q: np.ndarray) -> np.ndarray:
        y = np.exp(z / temperature) / np.exp(z / temperature).sum(axis=-1, keepdims=True)
        return eta * bound(y, log_q) + read_out(own, 0, *y.T)

    def tied(log_q: np.ndarray) -> np.ndarray:
        of_winner = -np.log((v * b).sum(axis=-1, keepdims=True))
        return -np.log(np.where(b > 0.5, of_winner, -np.log(v) / np.exp(log_q) + of_winner))

    at = log_probs([p["q0"], p["q1"], 0.0])
    signal = bound(b, at) - control(tied(at), at)

    def surrogate(*shift: float) -> np.ndarray:
        log_q = log_probs(np.array([p["q0"], p["q1"], 0.0]) + shift)
        free = control(log_q + (tied(at) - at), log_q)
        return bound(b, log_q) + signal * (b @ log_q) + free - control(tied(log_q), log_q)

    return squared_length(surrogate, weight * np.exp(b @ at), 3)


def own_gradients(
    engine: str, toy: Toy, objective: Any, own: dict[str, np.ndarray], size: int, seeds: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The gradient of the drop-in loss in the estimator's own numbers, a datum: mean and standard error."""
    lib = oracles.library(engine)
    params = {n: lib.array(np.full(size, v)) for n, v in toy.params.items()}
    x = lib.array(np.full(size, toy.x))
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        model, guide = toy.program(lib, lambda n: lib.param(n, params[n]), size)

        def loss(own: Any, key: Any) -> Any:
            return Loss(objective).loss(key, params | {"elbozoo_estimator": own}, model, guide, x)

        keys = jax.random.split(jax.random.key(0), seeds)
        one = oracles.compiled(lambda key: jax.grad(loss)(jax.tree.map(lib.array, own), key))
        found = [{n: np.asarray(g) / size for n, g in one(key).items()} for key in keys]
    else:
        import pyro

        from elbozoo.inference.pyro_engine import Loss

        pyro.set_rng_seed(0)
        model, guide = toy.program(lib, lambda n: lib.param(n, params[n].clone()), size)
        found = []
        for _ in range(seeds):
            pyro.clear_param_store()
            drop_in = Loss(objective, max_plate_nesting=1)
            drop_in.own._start = own, {}
            drop_in.loss_and_grads(model, guide, x)
            found.append({n: pyro.param(f"elbozoo.{n}").grad.numpy() / size for n in own})
    stacked = {n: np.stack([f[n] for f in found]) for n in own}
    return {n: (v.mean(axis=0), v.std(axis=0, ddof=1) / seeds**0.5) for n, v in stacked.items()}


def differences(moment: Any, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The derivative of ``moment`` in every one of ``own``'s numbers."""
    out = {}
    for name, value in own.items():
        out[name] = np.empty_like(value)
        for index in np.ndindex(value.shape):

            def at(moved: Params, name: str = name, index: Any = index) -> float:
                changed = own[name].copy()
                changed[index] = moved["x"]
                return moment(own | {name: changed})

            out[name][index] = oracles.differentiate(at, {"x": float(value[index])}, ["x"])["x"]
    return out


@covering(
    "case,learned",
    list(itertools.product(("two sites", "two particles", "one hot"), (False, True))),
    numpyro=(5,),
    ids=lambda v: {False: "REBAR", True: "RELAX"}.get(v, v),
)
def test_a_control_variate_is_trained_on_the_variance(engine: str, case: str, learned: bool) -> None:
    """Its own numbers get the exact derivative of ``E‖g‖²``, by enumeration, quadrature and differences."""
    gradient = RELAX(network_units=2) if learned else REBAR(adapt=True)
    toy, objective, moment, shape = {
        "two sites": (TOY, ELBO(gradient=gradient, analytic_kl=False), second_moment_of_layers, (2, 2)),
        "two particles": (ONE_COIN, IWAE(2, gradient), second_moment_of_pair, (1, 1)),
        "one hot": (ONE_HOT, ELBO(gradient=gradient, analytic_kl=False), second_moment_of_classes, (3, 1)),
    }[case]
    own = KNOBS | (network(*shape) if learned else {})
    want = differences(moment, own)
    found = own_gradients(engine, toy, objective, own, 4000, 12)
    norm = np.sqrt(sum((w**2).sum() for w in want.values()))
    for name, exactly in want.items():
        mean, error = found[name]
        np.testing.assert_array_less(np.abs(mean - exactly), 5 * error + 1e-6, err_msg=name)
        assert 5 * error.max() < 0.05 * norm, f"{name}: no power, ± {error} for a derivative of norm {norm}"


@pytest.mark.parametrize(
    ("moment", "shape"),
    [(second_moment_of_layers, (2, 2)), (second_moment_of_pair, (1, 1)), (second_moment_of_classes, (3, 1))],
)
def test_the_quadrature_of_the_variance_has_converged(moment: Any, shape: tuple[int, int]) -> None:
    for own in (KNOBS, KNOBS | network(*shape)):
        assert moment(own) == pytest.approx(moment(own, 16), rel=1e-3)


def trained_own(engine: str, toy: Toy, objective: Any, steps: int) -> dict[str, np.ndarray]:
    """The estimator's numbers after ``steps`` of the library's own ``SVI`` on a program without parameters."""
    lib, size = oracles.library(engine), 200
    model, guide = toy.program(lib, lambda n: lib.array(np.full(size, toy.params[n])), size)
    x = lib.array(np.full(size, toy.x))
    if engine == "numpyro":
        import jax
        import numpyro

        from elbozoo.inference.numpyro_engine import Loss

        loss = Loss(objective)
        svi = numpyro.infer.SVI(model, loss.guide(guide), numpyro.optim.Adam(0.05), loss)
        result = svi.run(jax.random.key(0), steps, x, progress_bar=False)
        return {n: np.asarray(v) for n, v in result.params["elbozoo_estimator"].items()}
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Loss(objective))
    for _ in range(steps):
        svi.step(x)
    names = objective.gradient.initial(x, Loss(objective).terms(model, guide, x).sites)[0]
    return {n: pyro.param(f"elbozoo.{n}").detach().numpy() for n in names}


@pytest.fixture(scope="module")
def least_moment() -> float:
    """Of any η and τ."""

    def moment(at: np.ndarray) -> float:
        return second_moment_of_layers({"eta": at[0], "log_temperature": at[1]})

    return minimize(moment, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6}).fun


@pytest.mark.parametrize("engine", ["numpyro"])  # what trains the numbers is one optimiser for both estimators
def test_adapting_lowers_the_variance_from_a_bad_start(engine: str, least_moment: float) -> None:
    """To the least that any η and τ have, or nearly: it is flat in τ."""
    bad = {"eta": np.array(2.5), "log_temperature": np.log(0.2)}
    found = trained_own(engine, TOY, ELBO(gradient=REBAR(0.2, 2.5, adapt=True), analytic_kl=False), 250)
    assert second_moment_of_layers(bad) > 10 * least_moment
    assert second_moment_of_layers(found) < 1.1 * least_moment


@pytest.mark.parametrize("engine", ["numpyro"])
def test_a_free_network_lowers_the_variance_further(engine: str, least_moment: float) -> None:
    """Below what any η and τ have."""
    found = trained_own(engine, TOY, ELBO(gradient=RELAX(network_units=8), analytic_kl=False), 250)
    assert second_moment_of_layers(found) < 0.6 * least_moment


# --- guards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "objective", "message"),
    [
        (DISCRETE, ELBO(gradient=DisARM()), r"site 'd' under DisARM must be of a Bernoulli; got Categorical. .*VIMCO"),
        (DISCRETE, ELBO(gradient=REBAR()), r"site 'd' under REBAR must .*; got Categorical. Write it as a OneHot"),
        (DISCRETE, ELBO(gradient=RELAX()), r"site 'd' under RELAX must .*; got Categorical. Write it as a OneHot"),
        (DISCRETE, ELBO(gradient=GumbelSoftmax()), r"site 'd' under GumbelSoftmax .* Write it as a OneHotCategorical"),
        (ONE_SITE, IWAE(2, ARM()), r"the guide under ARM must have a site that is not reparameterised; .*DReG"),
        (ONE_SITE, IWAE(2, GumbelSoftmax()), r"the guide under GumbelSoftmax must have a site that is not"),
        (DISCRETE, IWAE(2, Enumerate()), r"bound under Enumerate must be the ELBO; got IWAE. .*VIMCO"),
        (DISCRETE, ELBO(2, RWS()), r"bound under RWS must be IWAE; got ELBO"),
        (DISCRETE, IWAE(1, RWS()), r"num_particles under RWS must be at least 2 in the wake phase; got 1"),
        (DISCRETE, IWAE(1, VIMCO()), r"num_particles under VIMCO must be at least 2; got 1. .*DisARM"),
        (TOY, PIWAE(2, 2, GumbelSoftmax()), r"bound under GumbelSoftmax must be one for model and guide; got PIWAE"),
        (TOY, PIWAE(2, 2, StraightThrough()), r"bound under StraightThrough must be one for model and guide"),
        (DISCRETE, IWAE(2, Covariance()), r"bound under Covariance must be TVO; got IWAE. .*ScoreFunction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_the_name_of_one_that_fits(engine: str, toy: Toy, objective: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        oracles.estimates(engine, toy, [objective], 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GumbelSoftmax(0.0), r"temperature must be a finite number above 0; got 0"),
        (lambda: REBAR(-1.0), r"temperature must be a finite number above 0; got -1"),
        (lambda: REBAR(eta=-0.1), r"eta must be finite and at least 0; got -0\.1"),
        (lambda: REBAR(lambda step: 0.5, adapt=True), r"temperature that is adapted must be a number; got a function"),
        (lambda: RELAX(0.0), r"temperature must be a finite number above 0; got 0"),
        (lambda: RELAX(network_units=0), r"network_units must be"),
        (lambda: RWS(wake=-1.0), r"wake must be finite and at least 0"),
        (lambda: RWS(0.0, 0.0), r"wake \+ sleep must be above 0"),
        (lambda: ScoreFunction(baseline_decay=1.0), r"baseline_decay must lie in \[0, 1\)"),
        (lambda: NVIL(baseline_units=0), r"baseline_units must be"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


@pytest.mark.pyro
def test_states_are_run_together_and_once_a_step() -> None:
    """Though a step asks thrice: for the gradient, the bound and the shaped bound."""
    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Loss
    from elbozoo.inference.recording import step_metrics

    x, loc, calls = torch.tensor([0.1, -0.4, 1.2]), torch.tensor([-1.0, 0.0, 1.0, 2.0]), []

    def model(x: Any) -> None:
        calls.append(x)
        with pyro.plate("data", 3):
            d = pyro.sample("d", dist.Categorical(logits=pyro.param("m", torch.zeros(4))))
            pyro.sample("x", dist.Normal(loc[d], 1.0), obs=x)

    def guide(x: Any) -> None:
        with pyro.plate("data", 3):
            pyro.sample("d", dist.Categorical(logits=pyro.param("g", torch.tensor([0.3, -0.2, 0.5, 0.0]))))

    objective, found = AnnealedKL(ELBO(gradient=Enumerate()), warmup=2, unit="steps"), []
    for together in (True, False):
        pyro.clear_param_store()
        loss = Loss(objective, vectorize_particles=together)
        loss.terms(model, guide, x)  # where it is tried whether the program broadcasts
        calls.clear()
        terms = loss.terms(model, guide, x)
        surrogate = objective.surrogate(terms).sum()
        metrics = step_metrics(objective, terms)
        assert len(calls) == {True: 1 + 1, False: 1 + 4}[together]  # the step's own run, and that of the states
        params = [pyro.get_param_store()._params[n] for n in "mg"]
        found.append([metrics["bound"], metrics["shaped_bound"], *torch.autograd.grad(surrogate, params)])
    for ours, looped in zip(*found, strict=True):
        torch.testing.assert_close(ours, looped, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The program does not broadcast")  # which is tried before the program is refused
@pytest.mark.parametrize("gradient", [Enumerate(), RELAX()], ids=lambda g: type(g).__name__)
def test_entries_that_no_shared_plate_holds_are_not_taken_together(engine: str, gradient: Any) -> None:
    """Three coins of one site: to give all of them one state would leave out six of eight states."""
    lib = oracles.library(engine)

    def model() -> None:
        d = lib.sample("d", lib.dist.Bernoulli(logits=lib.array(np.zeros(3))))
        lib.sample("x", lib.dist.Normal(1.0 * d.sum(), 1.0), obs=lib.array(1.5))

    def guide() -> None:
        lib.sample("d", lib.dist.Bernoulli(logits=lib.param("a", lib.array(np.array([0.4, -1.0, 0.2])))))

    message = r"site 'd' under \w+ must have one value for each particle and datum.*ScoreFunction"
    with pytest.raises(Refused, match=message):
        loss_of(engine, ELBO(gradient=gradient), model, guide, {"a": np.array([0.4, -1.0, 0.2])})


def loss_of(engine: str, objective: Any, model: Any, guide: Any, params: dict[str, np.ndarray]) -> float:
    """The drop-in loss of a program without arguments."""
    if engine == "numpyro":
        import jax
        import jax.numpy as jnp

        from elbozoo.inference.numpyro_engine import Loss

        given = {n: jnp.asarray(v) for n, v in params.items()}
        return float(Loss(objective).loss(jax.random.key(0), given, model, guide))
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    return float(Loss(objective).loss(model, guide))


@pytest.mark.numpyro
def test_antithetic_states_can_index_an_array() -> None:
    """They are of the type that the site is drawn in; a logit may be a plain number."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    table = jnp.array([0.2, 1.3])

    def model() -> None:
        d = numpyro.sample("d", dist.Bernoulli(logits=0.3))
        numpyro.sample("x", dist.Normal(table[d], 1.0), obs=0.5)

    def guide() -> None:
        numpyro.sample("d", dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.1))))

    for gradient in (DisARM(), ARM(), ScoreFunction()):
        assert np.isfinite(loss_of("numpyro", ELBO(gradient=gradient), model, guide, {"a": np.array(0.1)}))


@pytest.mark.pyro
def test_a_guide_with_dropout_is_not_run_again() -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    class Guide(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))

        def forward(self) -> None:
            pyro.sample("d", dist.Bernoulli(logits=self.net(torch.ones(1))[0]))

    def model() -> None:
        d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(d, 1.0), obs=torch.tensor(0.5))

    from elbozoo.inference.pyro_engine import Loss

    guide = Guide()
    with pytest.raises(Refused, match=r"the program must have no dropout under a gradient that runs it again"):
        Loss(ELBO(gradient=DisARM())).loss_and_grads(model, guide)
    Loss(ELBO(gradient=ScoreFunction())).loss_and_grads(model, guide)
    guide.eval()
    Loss(ELBO(gradient=DisARM())).loss_and_grads(model, guide)


def test_too_many_states_to_enumerate(engine: str) -> None:
    lib = oracles.library(engine)

    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(np.zeros(13))).to_event(1))
                lib.sample("x", lib.dist.Normal(z.sum(-1) + p("m"), 1.0), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", lib.dist.Bernoulli(logits=p("qa")[..., None] + lib.array(np.zeros(13))).to_event(1))

        return model, guide

    assert lib.engine == engine
    toy = Toy("many", {"m": 0.0, "qa": 0.1}, 1.0, program, lambda p, q, num: None)
    with pytest.raises(Refused, match=r"at most 4096 joint states; got 8192. .*VIMCO"):
        oracles.estimates(engine, toy, [ELBO(gradient=Enumerate())], 2)


def test_a_sleep_phase_needs_data_that_can_be_dreamt(engine: str) -> None:
    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z = lib.sample("z", lib.dist.Bernoulli(logits=p("m")))
                lib.sample("x", lib.dist.Normal(1.0 * z, 1.0), obs=2.0 * x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", lib.dist.Bernoulli(logits=p("qa")))

        return model, guide

    toy = Toy("altered data", {"m": 0.0, "qa": 0.1}, 1.0, program, lambda p, q, num: None)
    with pytest.raises(InvalidArgument, match=r"site 'x' must observe an argument as it came, to be dreamt"):
        oracles.estimates(engine, toy, [IWAE(2, RWS(0.0, 1.0))], 2)


# --- training -----------------------------------------------------------------------------------------------------


def _net(engine: str) -> Any:
    """A small belief net of the engine's own primitives, as a program for ``fit``."""
    lib = oracles.library(engine)
    rng = np.random.default_rng(0)
    start = {"W": rng.normal(size=(3, 6)), "a": np.zeros(3), "V": 0.1 * rng.normal(size=(6, 3))}

    def model(x: Any) -> None:
        weight, prior = lib.param("W", lib.array(start["W"])), lib.param("a", lib.array(start["a"]))
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Bernoulli(logits=prior).to_event(1))
            lib.sample("x", lib.dist.Bernoulli(logits=(1.0 * z) @ weight).to_event(1), obs=x)

    def guide(x: Any) -> None:
        weight = lib.param("V", lib.array(start["V"]))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Bernoulli(logits=x @ weight).to_event(1))

    if engine == "numpyro":
        from elbozoo.inference.numpyro_engine import Program
    else:
        from elbozoo.inference.pyro_engine import Program
    return Program(model, guide)


BINARY = (np.random.default_rng(1).random((24, 6)) < 0.4).astype(float)


@covering(
    "gradient",
    [
        NVIL(baseline_units=4),
        ScoreFunction(baseline="running-mean"),
        GumbelSoftmax(lambda step: 1.0 / (1.0 + step)),
        REBAR(adapt=True),
        RELAX(network_units=4),
    ],
    numpyro=(4,),
    ids=lambda g: type(g).__name__,
)
def test_training_resumes_with_what_the_estimator_knows(engine: str, gradient: Any, tmp_path: Path) -> None:
    """Bit for bit, and none of it is a weight of the program."""
    from elbozoo.inference import Adam, fit

    def run(epochs: int, directory: Path | None = None) -> Any:
        settings = {"directory": directory, "resume": True} if directory else {}
        return fit(
            _net(engine),
            BINARY,
            objective=ELBO(gradient=gradient),
            epochs=epochs,
            batch_size=8,
            optimizer=Adam(1e-2),
            progress=False,
            **settings,
        )

    whole = run(4)
    run(2, tmp_path / "run")
    resumed = run(4, tmp_path / "run")
    assert set(whole.weights) == {"W", "a", "V"}
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(np.asarray(resumed.weights[name]), np.asarray(value))


@pytest.mark.pyro
def test_a_traced_step_trains_a_control_variate_as_a_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """RELAX, whose numbers are REBAR's and a network's: two derivatives are taken within the step that is traced.

    A trace leaves out unused draws: none is random here.
    """
    import torch

    from elbozoo.inference import Adam
    from elbozoo.inference.pyro_trainer import Trainer
    from elbozoo.zoo import SigmoidBeliefNet

    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.37, **options))
    monkeypatch.setattr(torch, "bernoulli", lambda p: (p > 0.45).to(p))
    found = []
    for traced in (True, False):
        program = SigmoidBeliefNet(6, (3, 2)).pyro()
        settings = {"batch_size": 8, "seeds": [0], "redraw_pixels": False, "device": None}
        trainer = Trainer(program, IWAE(2, RELAX(network_units=4)), Adam(0.05), (BINARY,), **settings)
        trainer.compile_after = 0 if traced else math.inf
        start = trainer.snapshot()
        trainer.epoch(np.arange(24).reshape(1, 3, 8))
        assert (trainer.compiled is not None) is traced
        found.append(trainer.arrays())
        for name in ("eta", "log_temperature"):
            assert start[f"params/elbozoo.{name}"] != found[-1][f"params/elbozoo.{name}"]
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_learned_baseline_learns(engine: str) -> None:
    """The drop-in loss trains it along: it comes to explain the bound's mean by datum."""
    lib = oracles.library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(np.zeros(len(x)))))
            lib.sample("x", lib.dist.Normal(0.1 * z, 0.5), obs=x[:, 0])

    def guide(x: Any) -> None:
        a = lib.param("a", lib.array(0.0))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Bernoulli(logits=a * x[:, 0]))

    x = lib.array(np.linspace(-1.5, 1.5, 12)[:, None])
    gradient = NVIL(baseline_units=8, baseline_decay=0.5)
    if engine == "numpyro":
        import jax
        import numpyro

        from elbozoo.inference.numpyro_engine import Loss

        loss = Loss(ELBO(gradient=gradient))
        svi = numpyro.infer.SVI(model, loss.guide(guide), numpyro.optim.Adam(0.02), loss)
        result = svi.run(jax.random.key(0), 400, x, progress_bar=False)
        own = {n: np.asarray(v) for n, v in result.params["elbozoo_estimator"].items()}
    else:
        import pyro

        from elbozoo.inference.pyro_engine import Loss

        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Loss(ELBO(gradient=gradient)))
        for _ in range(400):
            svi.step(x)
        own = {n: pyro.param(f"elbozoo.{n}").detach().numpy() for n in ("weight", "bias", "readout")}
    x = np.asarray(x)
    predicted = np.tanh(x @ own["weight"] + own["bias"]) @ own["readout"]
    bound = normal(x[:, 0], 0.05, 0.5)
    assert np.corrcoef(predicted, bound)[0, 1] > 0.9
