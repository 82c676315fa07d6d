"""Two levels of codes: the bound, every part of its gradient and the priors against NumPy and sums over all codes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy.special import log_expit, logsumexp
from test_vqvae import AUTOREGRESSIVE, OBJECTIVE, choose, chosen, gradient, log_weight, program, still

from elbozoo.inference import ELBO, IWAE, DReG, ScoreFunction, StraightThrough, evaluate, exact_log_lik, fit
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.zoo import Codebook, FiniteScalar, Gaussian, HierarchicalVQVAE, Quantizer, Residual, code_usage

BOOK, RESIDUAL, GRID = Codebook(3, 2), Residual(3, 2, depth=2), FiniteScalar((3, 4))
SMALL = HierarchicalVQVAE((1, 4, 4), (3,), (4,), "tanh", BOOK)
LEARNED = replace(SMALL, **AUTOREGRESSIVE)
TWINS = [
    replace(SMALL, quantizer=RESIDUAL, **AUTOREGRESSIVE),
    replace(SMALL, quantizer=GRID),
    HierarchicalVQVAE((2, 8, 8), (2, 3), (4,), "tanh", BOOK, Gaussian("pixel")),
]
X = (np.random.default_rng(0).random((7, 16)) < 0.5) * 1.0


Weights = dict[str, np.ndarray]


def weights_of(spec: HierarchicalVQVAE, seed: int = 5) -> Weights:
    """Under which no level has one code alone; buffers as they start."""
    rng = np.random.default_rng(seed)
    start = spec.pyro().weights
    drawn = {n: rng.standard_normal(a.shape) for n, a in sorted(start.items())}
    kept = {n: a for n, a in start.items() if n.endswith((".counts", ".sums", ".steps"))}
    return drawn | {n: 0.0 * a for n, a in drawn.items() if n.startswith("encoders.") and n.endswith("bias")} | kept


# --- the model in NumPy, on (1, 4, 4): a map of 2 x 2 places, and one place above ---------------------------------


def conv(weights: Weights, name: str, image: np.ndarray, stride: int = 1) -> np.ndarray:
    """A 3 x 3 convolution of (..., C, H, W), long-hand."""
    kernel, (height, width) = weights[f"{name}.weight"], image.shape[-2:]
    padded = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)])
    total = weights[f"{name}.bias"][:, None, None]
    for i, j in np.ndindex(3, 3):
        part = padded[..., i : i + height : stride, j : j + width : stride]
        total = total + np.einsum("oc,...chw->...ohw", kernel[:, :, i, j], part)
    return total


def places(image: np.ndarray) -> np.ndarray:
    """(..., C, H, W) as (..., H W, C)."""
    return np.moveaxis(image.reshape(*image.shape[:-2], -1), -2, -1)


def image(vectors: np.ndarray, side: int) -> np.ndarray:
    return np.moveaxis(vectors, -1, -2).reshape(*vectors.shape[:-2], vectors.shape[-1], side, side)


def down(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """An encoder of one halving, (..., C, H, W) to (..., P, vector)."""
    return places(conv(weights, f"{name}.convs.1", np.tanh(conv(weights, f"{name}.convs.0", x, stride=2))))


def up(weights: Weights, name: str, vectors: np.ndarray, side: int) -> np.ndarray:
    """A decoder of one doubling, (..., P, vector) to (..., C, H, W)."""
    hidden = np.tanh(conv(weights, f"{name}.convs.0", image(vectors, side)))
    return conv(weights, f"{name}.convs.1", hidden.repeat(2, -1).repeat(2, -2))


def features(weights: Weights, x: np.ndarray) -> np.ndarray:
    return np.tanh(down(weights, "encoders.0", x.reshape(-1, 1, 4, 4)))


def top_outputs(spec: HierarchicalVQVAE, weights: Weights, x: np.ndarray) -> np.ndarray:
    return bounded(spec, down(weights, "encoders.1", image(features(weights, x), 2)))


def bottom_outputs(spec: HierarchicalVQVAE, weights: Weights, x: np.ndarray, z2: np.ndarray) -> np.ndarray:
    joined = np.concatenate([features(weights, x), places(up(weights, "conditioner", z2, 1))], -1)
    return bounded(spec, joined @ weights["merge.weight"].T + weights["merge.bias"])


def bounded(spec: HierarchicalVQVAE, outputs: np.ndarray) -> np.ndarray:
    if not isinstance(spec.quantizer, FiniteScalar):
        return outputs
    level = np.array(spec.quantizer.levels)
    half, offset = (level - 1) * 1.001 / 2, (level + 1) % 2 / 2
    return (np.tanh(outputs + np.arctanh(offset / half)) * half - offset) / (level // 2)


def decode(weights: Weights, z1: np.ndarray, z2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``log p(x | z)`` of values (..., P_l, D), summed over depth already."""
    above = places(up(weights, "decoders.1", z2, 1))
    logits = up(weights, "decoders.0", np.concatenate([z1, np.broadcast_to(above, (*z1.shape[:-1], 3))], -1), 2)
    return log_expit((2 * x - 1) * logits.reshape(*logits.shape[:-3], 16)).sum(-1)


def choose_codes(codes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return choose(SMALL, codes, outputs)


def books(spec: HierarchicalVQVAE, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    return tuple(spec.quantizer.table(weights, f"codebooks.{i}") for i in range(2))  # type: ignore[return-value]


class Held:
    """What the guide does at some weights: outputs, indices and codes of each level, next to the data first."""

    def __init__(self, spec: HierarchicalVQVAE, weights: Weights, x: np.ndarray):
        bottom, top = books(spec, weights)
        second = top_outputs(spec, weights, x)
        index2 = choose_codes(top, second)
        first = bottom_outputs(spec, weights, x, chosen(top, index2).sum(-2))
        index1 = choose_codes(bottom, first)
        self.outputs, self.index = (first, second), (index1, index2)
        self.codes = chosen(bottom, index1), chosen(top, index2)
        self.sums = self.codes[0].sum(-2), self.codes[1].sum(-2)


def values_of(terms: Any) -> dict[str, Any]:
    return dict(terms.values)


def densities(terms: Any) -> dict[str, Any]:
    sites = terms.sites
    return {n: {"prior": s.log_prior, "guide": s.log_guide, "rate": s.rate} for n, s in sites.items()}


# --- the bound --------------------------------------------------------------------------------------------------


@covering("quantizer", (BOOK, RESIDUAL, GRID), numpyro=(), ids=lambda q: type(q).__name__)
def test_the_bound_is_distortion_and_the_codes_logarithms(engine: str, quantizer: Quantizer) -> None:
    spec = replace(SMALL, quantizer=quantizer)
    weights = weights_of(spec)
    held, found = Held(spec, weights, X), program(engine, spec, weights)
    assert min(len(np.unique(index)) for index in held.index) > 1, "one code alone shows nothing"
    rates = [p * quantizer.depth * np.log(quantizer.num_codes) for p in (4, 1)]
    expected = decode(weights, *held.sums, X) - sum(rates)
    np.testing.assert_allclose(found.apply(log_weight, (X,), num_particles=3), [expected] * 3, 1e-12)
    sites = found.apply(densities, (X,))
    for name, rate in zip(("z1", "z2"), rates, strict=True):
        np.testing.assert_allclose(sites[name]["rate"], np.full((1, 7), rate), 1e-12)
        assert (sites[name]["guide"] == 0).all()


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_the_finer_codes_depend_on_the_coarse_ones(engine: str) -> None:
    """The guide's at another top code are those of its own outputs there."""
    weights = weights_of(SMALL)
    bottom, top = books(SMALL, weights)
    held, seen = Held(SMALL, weights, X), set()
    for code in top[0]:
        z2 = np.tile(code, (7, 1, 1))
        index = choose_codes(bottom, bottom_outputs(SMALL, weights, X, z2))
        seen.add(index.tobytes())
        values = {"z1": chosen(bottom, index)[..., 0, :][None], "z2": z2[None]}
        found = program(engine, SMALL, weights).apply(densities, (X,), values=values)
        assert (found["z1"]["guide"] == 0).all()
        same = (held.index[1] == choose_codes(top, z2)).all((-1, -2))
        np.testing.assert_array_equal(found["z2"]["guide"][0] == 0, same)
    assert len(seen) > 1, "the top changes nothing here"


def every_code(weights: Weights) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Indices of all 3^5 joint states, the top's first, and their values for one datum, ``(243, 1, P, D)``."""
    states = np.array(list(itertools.product(range(3), repeat=5)))
    bottom, top = books(SMALL, weights)
    return states, {"z1": bottom[0][states[:, None, 1:]], "z2": top[0][states[:, None, :1]]}


@covering(
    "spec", (SMALL, LEARNED), numpyro=(), ids=lambda s: s.prior
)  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_the_evidence_by_every_code_is_above_the_bound(engine: str, spec: HierarchicalVQVAE) -> None:
    weights = weights_of(spec)
    found, (_, values) = program(engine, spec, weights), every_code(weights)
    prior = {n: s["prior"][:, 0] for n, s in found.apply(densities, (X[:1],), values=values).items()}
    given = prior["z1"].reshape(3, 81)
    np.testing.assert_allclose(logsumexp(given, axis=1), 0.0, atol=1e-12)  # a distribution given each top code
    top = prior["z2"].reshape(3, 81)
    assert np.ptp(top, axis=1).max() < 1e-12, "the top does not see what is below it"
    np.testing.assert_allclose(logsumexp(top[:, 0]), 0.0, atol=1e-12)
    learned = spec.prior == "autoregressive"
    assert (np.ptp(top) > 0.1, np.ptp(given) > 0.1, np.ptp(given, axis=0).max() > 0.1) == (learned,) * 3
    log_p = prior["z1"] + prior["z2"]
    evidence = logsumexp(log_p[:, None] + decode(weights, values["z1"], values["z2"], X), axis=0)
    held = Held(spec, weights, X)
    state = held.index[1][:, 0, 0] * 81 + (held.index[0][..., 0] * [27, 9, 3, 1]).sum(-1)
    bound = found.apply(log_weight, (X,))[0]
    np.testing.assert_allclose(bound, log_p[state] + decode(weights, *held.sums, X), 1e-11)
    assert (evidence > bound + 1e-3).all()
    np.testing.assert_allclose(evaluate(found, X, num_particles=5).nll, -bound.mean(), 1e-6)
    assert exact_log_lik(found, X) is None


def test_the_prior_draws_what_it_says(engine: str) -> None:
    factors = {".head.weight": 0.4, ".head.bias": 0.4, ".output.weight": 10.0}  # no state is all, and the top is heard
    weights = {
        n: a * next((f for end, f in factors.items() if n.endswith(end)), 1.0) for n, a in weights_of(LEARNED).items()
    }
    found, num = program(engine, LEARNED, weights), 4000
    drawn = found.predict((np.zeros((num, 16)),), prior=True)["latent"]
    bottom, top = books(LEARNED, weights)
    z1, z2 = drawn["z1"][0], drawn["z2"][0]
    index = np.concatenate([choose_codes(top, z2)[..., 0], choose_codes(bottom, z1)[..., 0]], -1)
    np.testing.assert_array_equal(z1, bottom[0][index[:, 1:]])
    states, values = every_code(weights)
    sites = found.apply(densities, (X[:1],), values=values)
    p = np.exp(sites["z1"]["prior"] + sites["z2"]["prior"])[:, 0]
    pairs = np.array(
        [[(states[:, 0] == i) & (states[:, j] == k) for k in range(3)] for j in range(1, 5) for i in range(3)]
    )
    share = (pairs @ np.bincount(index @ 3 ** np.arange(4, -1, -1), minlength=243)) / num
    expected = pairs @ p
    assert (abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / num)).all()
    alone = expected.sum(-1, keepdims=True) * expected.reshape(4, 3, 3).sum(1)[:, None].repeat(3, 1).reshape(12, 3)
    assert abs(expected - alone).max() > 0.03, "draws that ignore the top would show"


# --- gradients --------------------------------------------------------------------------------------------------


@covering("quantizer", (BOOK, RESIDUAL), numpyro=(1,), ids=lambda q: type(q).__name__)
def test_every_parts_gradient_is_its_definitions(engine: str, quantizer: Quantizer) -> None:
    """Differences of the written surrogate, in which what is held constant is held constant, at both levels."""
    spec = replace(SMALL, quantizer=quantizer)
    weights = weights_of(spec)
    held = Held(spec, weights, X)
    before = [np.cumsum(codes, -2) - codes for codes in held.codes]

    def surrogate(weights: Weights) -> float:
        second = top_outputs(spec, weights, X)
        z2 = held.sums[1] + second - held.outputs[1]
        first = bottom_outputs(spec, weights, X, z2)
        total = decode(weights, held.sums[0] + first - held.outputs[0], z2, X).sum()
        for level, outputs in enumerate((first, second)):
            moved = chosen(books(spec, weights)[level], held.index[level])
            total -= 0.7 * ((held.outputs[level][..., None, :] - before[level] - moved) ** 2).sum()
            total -= 0.3 * ((outputs[..., None, :] - before[level] - held.codes[level]) ** 2).sum()
        return float(total)

    value, found = gradient(engine, spec, weights, OBJECTIVE, X)
    bound = decode(weights, *held.sums, X) - 5 * quantizer.depth * np.log(3)
    np.testing.assert_allclose(value, -bound.sum(), 1e-12)
    assert sorted(found) == sorted(weights)
    rng = np.random.default_rng(0)
    for name, array in weights.items():
        for _ in range(3):  # along directions at random: an entry at a time takes too long
            step = 1e-5 * rng.standard_normal(array.shape)
            expected = (surrogate(weights | {name: array + step}) - surrogate(weights | {name: array - step})) / 2
            np.testing.assert_allclose(-(np.asarray(found[name]) * step).sum(), expected, 1e-4, 1e-10, err_msg=name)
        assert abs(np.asarray(found[name])).max() > 1e-3, name


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_the_priors_gradient_does_not_reach_the_codes(engine: str) -> None:
    weights = weights_of(LEARNED)
    uniform = {n: a for n, a in weights.items() if not n.startswith("priors.")}
    _, without = gradient(engine, SMALL, uniform, OBJECTIVE, X)
    _, found = gradient(engine, LEARNED, weights, OBJECTIVE, X)
    for name, array in without.items():
        np.testing.assert_allclose(found[name], array, 1e-12, 1e-12, err_msg=name)
    priors = [n for n in weights if n.startswith("priors.")]
    assert "priors.0.context" in priors
    moved = {n for n in priors if abs(np.asarray(found[n])).max() > 0}
    assert moved == set(priors) - {"priors.1.embedding"}, "the one place at the top has none before it"


@covering("gradient", (None, DReG(), ScoreFunction()), numpyro=(), ids=lambda g: type(g).__name__)
def test_other_gradients_are_refused(engine: str, gradient: Any) -> None:
    objective = ELBO() if gradient is None else ELBO(gradient=gradient)
    with pytest.raises(Refused, match=r"site 'z\d' under .* must have a gradient.*Use gradient=StraightThrough\(\)"):
        fit(getattr(SMALL, engine)(), X, objective=objective, epochs=1, progress=False)


# --- in use -----------------------------------------------------------------------------------------------------


def test_each_level_has_moving_averages_of_its_own(engine: str) -> None:
    spec = replace(SMALL, quantizer=Codebook(3, 2, "ema", 0.7))
    weights = weights_of(spec)
    for level in range(2):
        codes = weights[f"codebooks.{level}.codes"]
        averages = {"counts": np.full(codes.shape[:2], 1.5), "sums": 1.5 * codes}
        weights |= {f"codebooks.{level}.{n}": a for n, a in averages.items()}
    held = Held(spec, weights, X)
    options = {"objective": OBJECTIVE, "epochs": 1, "batch_size": len(X), "progress": False}
    run = fit(program(engine, spec, weights), X, optimizer=still(engine), **options)
    for level in range(2):
        index, outputs = held.index[level].ravel(), held.outputs[level].reshape(-1, 2)
        expected = weights[f"codebooks.{level}.codes"][0].copy()
        for k in np.unique(index):
            mine = outputs[index == k]
            expected[k] = (0.7 * 1.5 * expected[k] + 0.3 * mine.sum(0)) / (0.7 * 1.5 + 0.3 * len(mine))
        np.testing.assert_allclose(run.weights[f"codebooks.{level}.codes"][0], expected, 1e-10, err_msg=str(level))
        assert abs(expected - weights[f"codebooks.{level}.codes"][0]).max() > 0.01


@PYRO_ALONE  # written once for both engines
def test_code_usage_by_level(engine: str) -> None:
    weights = weights_of(SMALL)
    held, found = Held(SMALL, weights, X), program(engine, SMALL, weights)
    for level in (1, 2):
        counts = np.bincount(held.index[level - 1].ravel(), minlength=3)
        np.testing.assert_array_equal(code_usage(found, X, batch_size=3, level=level).counts[0], counts)
    with pytest.raises(InvalidArgument, match="level must be one of the model's 2, from 1; got 3"):
        code_usage(found, X, level=3)


@PYRO_ALONE  # NumPyro's prior is trained in tests/test_vqvae.py
def test_a_learned_prior_lowers_the_rate_of_both_levels(engine: str) -> None:
    x = np.repeat(np.eye(16)[:2], 32, axis=0)  # two data, so one or two states of the codes
    spec = replace(SMALL, quantizer=Codebook(8, 2), **AUTOREGRESSIVE | {"prior_layers": 1})
    weights = weights_of(spec)
    weights = {n: (0.0 if ".head." in n else 0.5) * a for n, a in weights.items()}  # it starts as the uniform one
    start = program(engine, spec, weights)
    for name, places in (("z1", 4), ("z2", 1)):
        np.testing.assert_allclose(start.apply(densities, (x,))[name]["rate"], places * np.log(8), 1e-6)
    settings = {"objective": OBJECTIVE, "epochs": 60, "batch_size": 64, "learning_rate": 1e-2, "progress": False}
    run = fit(start, x, **settings)
    rates = run.program.apply(densities, (x,))
    total = rates["z1"]["rate"] + rates["z2"]["rate"]
    assert rates["z1"]["rate"].mean() < 2.6 * np.log(8)
    assert rates["z2"]["rate"].mean() < 0.85 * np.log(8)
    values = run.program.apply(values_of, (x,))
    num = len(np.unique(np.concatenate([z[0].reshape(64, -1) for z in values.values()], -1), axis=0))
    assert total.mean() >= np.log(num)  # Gibbs: they are equally frequent
    assert run.history[-1]["distortion"] < run.history[0]["distortion"]
    posterior = run.to_arviz(x[:4], num_draws=5).posterior
    assert posterior["z1"].shape[-2:] == (4, 2)


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_more_particles_are_one(engine: str) -> None:
    weights = weights_of(SMALL)
    one = gradient(engine, SMALL, weights, ELBO(gradient=StraightThrough()), X)
    many = gradient(engine, SMALL, weights, IWAE(3, gradient=StraightThrough()), X)
    np.testing.assert_allclose(many[0], one[0], 1e-12)
    for name, array in one[1].items():
        np.testing.assert_allclose(many[1][name], array, 1e-10, 1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SMALL, top_channels=(4, 4)), r"top_channels must .* got \(4, 4\) for a map of 2 x 2"),
        (lambda: HierarchicalVQVAE(channels=(8, 8)), r"top_channels must .* got \(128,\) for a map of 7 x 7"),
        (lambda: replace(SMALL, top_channels=()), "top_channels must have at least one entry"),
        (lambda: replace(SMALL, image_shape=(1, 5, 4)), "channels must have at least one entry and a height and width"),
        (lambda: replace(SMALL, channels=()), "channels must have at least one entry"),
        (lambda: replace(SMALL, activation="sine"), r"activation must be one of .*; got 'sine'"),
        (lambda: replace(SMALL, quantizer=Codebook), r"quantizer must be a Quantizer; got .* Pass Codebook\(\)"),
        (lambda: replace(SMALL, prior="normal"), "prior must be one of .*; got 'normal'"),
        (lambda: replace(SMALL, prior_width=6), "prior_width must be a multiple of 4; got 6"),
        (lambda: SMALL.check(np.zeros((3, 5))), r"x must have shape \(N, 16\); got \(3, 5\)"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_config_round_trip() -> None:
    for spec in TWINS:
        assert HierarchicalVQVAE.from_config(spec.to_config()) == spec
