"""VQ-VAE: the bound, every part of its gradient, moving averages and the priors against NumPy and enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy.special import expit, log_expit, logit, logsumexp

from elbozoo.guides import DiagonalGaussian
from elbozoo.inference import ELBO, IWAE, PIWAE, DReG, ScoreFunction, StraightThrough, evaluate, exact_log_lik, fit
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.zoo import (
    MLP,
    VAE,
    VQVAE,
    Codebook,
    DiscretizedLogistic,
    FiniteScalar,
    FullyConv,
    Quantizer,
    Residual,
    Spec,
    code_usage,
)

BOOK, RESIDUAL, GRID = Codebook(4, 3), Residual(4, 3, depth=2), FiniteScalar((4, 3))
AUTOREGRESSIVE = {"prior": "autoregressive", "prior_width": 8, "prior_layers": 2}
SMALL = VQVAE(6, 2, MLP((5,)), BOOK)
TWINS = [
    replace(SMALL, quantizer=GRID),
    replace(SMALL, **AUTOREGRESSIVE),
    replace(SMALL, quantizer=RESIDUAL, **AUTOREGRESSIVE),
    VQVAE(16, 2, FullyConv((2, 4, 2), (3,), "tanh"), Codebook(4, 3)),
]
X = (np.random.default_rng(0).random((7, 6)) < 0.5) * 1.0
OBJECTIVE = ELBO(gradient=StraightThrough(codebook=0.7, commitment=0.3))


def random_weights(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {n: np.asarray(a + 0.6 * rng.standard_normal(a.shape), a.dtype) for n, a in spec.pyro().weights.items()}
    return found | {n: 0.0 * a for n, a in found.items() if n.startswith("encoder.") and n.endswith(".bias")}


def program(engine: str, spec: Spec, weights: dict[str, np.ndarray]) -> Any:
    return getattr(spec, engine)().with_weights(weights)


# --- the model in NumPy -----------------------------------------------------------------------------------------


def mlp(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    hidden = np.tanh(x @ weights[f"{name}.layers.0.weight"].T + weights[f"{name}.layers.0.bias"])
    return hidden @ weights[f"{name}.layers.1.weight"].T + weights[f"{name}.layers.1.bias"]


def encode(spec: VQVAE, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Outputs (B, P, D), bounded where the quantizer bounds them."""
    outputs = mlp(weights, "encoder", x).reshape(len(x), spec.num_latents, -1)
    if isinstance(spec.quantizer, FiniteScalar):
        level = np.array(spec.quantizer.levels)
        half, offset = (level - 1) * 1.001 / 2, (level + 1) % 2 / 2
        outputs = (np.tanh(outputs + np.arctanh(offset / half)) * half - offset) / (level // 2)
    return outputs


def decode(weights: dict[str, np.ndarray], value: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``log p(x | z)`` of values (..., P, D), summed over depth already."""
    logits = mlp(weights, "decoder", value.reshape(*value.shape[:-2], -1))
    return log_expit((2 * x - 1) * logits).sum(-1)


def choose(spec: VQVAE, codes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Indices (B, P, depth), by comparing every distance."""
    residual, indices = outputs, []
    for book in codes:
        indices.append(((residual[..., None, :] - book) ** 2).sum(-1).argmin(-1))
        residual = residual - book[indices[-1]]
    return np.stack(indices, -1)


def chosen(codes: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The codes (B, P, depth, D) at indices."""
    return np.stack([book[index[..., d]] for d, book in enumerate(codes)], -2)


def log_weight(terms: Any) -> Any:
    return terms.log_weight


def rates(terms: Any) -> dict[str, Any]:
    return {"rate": terms.sites["z"].rate, "log_prior": terms.log_prior, "log_guide": terms.log_guide}


def log_prior(terms: Any) -> Any:
    return terms.log_prior


# --- the bound --------------------------------------------------------------------------------------------------


@covering("quantizer", (BOOK, RESIDUAL, GRID), numpyro=(), ids=lambda q: type(q).__name__)
def test_the_bound_is_distortion_and_the_codes_logarithms(engine: str, quantizer: Quantizer) -> None:
    spec = replace(SMALL, quantizer=quantizer)
    weights = random_weights(spec)
    codes = quantizer.table(weights)
    index = choose(spec, codes, encode(spec, weights, X))
    assert len(np.unique(index)) > 2, "one code alone shows nothing"
    rate = 2 * quantizer.depth * np.log(quantizer.num_codes)
    expected = decode(weights, chosen(codes, index).sum(-2), X) - rate
    found = program(engine, spec, weights)
    np.testing.assert_allclose(found.apply(log_weight, (X,), num_particles=3), [expected] * 3, 1e-12)
    terms = found.apply(rates, (X,))
    np.testing.assert_allclose(terms["rate"], np.full((1, 7), rate), 1e-12)
    assert (terms["log_guide"] == 0).all()


@covering("spec", (SMALL, replace(SMALL, **AUTOREGRESSIVE)), numpyro=(), ids=lambda s: s.prior)
def test_the_evidence_by_every_code_is_above_the_bound(engine: str, spec: VQVAE) -> None:
    weights = random_weights(spec)
    found = program(engine, spec, weights)
    tuples = np.array(list(itertools.product(range(4), repeat=2)))
    values = weights["codebook.codes"][0][tuples]  # (16, P, D)
    log_p = found.apply(log_prior, (X,), values={"z": np.repeat(values[:, None], len(X), 1)})
    assert np.ptp(log_p, axis=1).max() < 1e-12, "no prior sees the data"
    np.testing.assert_allclose(logsumexp(log_p, axis=0), 0.0, atol=1e-12)
    assert (np.ptp(log_p) > 0.1) == (spec.prior == "autoregressive")
    evidence = logsumexp(log_p + decode(weights, values[:, None], X), axis=0)
    bound = found.apply(log_weight, (X,))[0]
    assert (evidence > bound + 1e-3).all()
    np.testing.assert_allclose(evaluate(found, X, num_particles=5).nll, -bound.mean(), 1e-6)
    assert exact_log_lik(found, X) is None


def test_the_prior_draws_what_it_says(engine: str) -> None:
    spec = replace(SMALL, **AUTOREGRESSIVE)
    weights = random_weights(spec)
    found, num = program(engine, spec, weights), 4000
    z = found.predict((np.zeros((num, 6)),), prior=True)["latent"]["z"][0]
    codes = weights["codebook.codes"][0]
    index = ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(z, codes[index])
    tuples = np.array(list(itertools.product(range(4), repeat=2)))
    p = np.exp(found.apply(log_prior, (X[:1],), values={"z": codes[tuples][:, None]}))[:, 0]
    share = np.array([(index == t).all(-1).mean() for t in tuples])
    assert (abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / num) + 1e-9).all()
    assert np.ptp(p) > 20 / num


def test_what_is_no_code_has_no_mass(engine: str) -> None:
    weights = random_weights(SMALL)
    found = program(engine, SMALL, weights)
    terms = found.apply(rates, (X[:1],), values={"z": weights["codebook.codes"][0][:2][None, None] + 0.1})
    assert np.isneginf(terms["log_prior"]).all()
    assert np.isneginf(terms["log_guide"]).all()


@PYRO_ALONE
def test_the_grid_rounds_each_entry(engine: str) -> None:
    spec = replace(SMALL, quantizer=FiniteScalar((8, 5, 3)))
    weights = random_weights(spec)
    z = program(engine, spec, weights).apply(values_of, (X,))[0]
    width = np.array([4, 2, 1])
    np.testing.assert_allclose(z, np.rint(encode(spec, weights, X) * width) / width, atol=1e-12)


def values_of(terms: Any) -> Any:
    return terms.values["z"]


# --- gradients --------------------------------------------------------------------------------------------------


def gradient(
    engine: str, spec: Spec, weights: dict[str, np.ndarray], objective: Any, x: np.ndarray = X
) -> tuple[float, dict]:
    """The drop-in loss and its gradient, by weight."""
    found = program(engine, spec, weights)
    if engine == "pyro":
        import torch

        from elbozoo.inference.pyro_engine import Loss

        loss = Loss(objective).differentiable_loss(found.model, found.guide, torch.tensor(x))
        loss.backward()
        tensors = found._tensors().items()
        return loss.item(), {n: None if p.grad is None else p.grad.numpy() for n, p in tensors if p.requires_grad}
    import jax

    from elbozoo.inference.numpyro_engine import Loss as NumPyroLoss
    from elbozoo.inference.weights import to_torch_layout

    def loss_of(params: dict) -> Any:
        every = {**params, **(found.mutable or {})}
        return NumPyroLoss(objective).loss(jax.random.key(0), every, found.model_fn, found.guide_fn, x)

    value, grads = jax.jit(jax.value_and_grad(loss_of))(found.params)
    return float(value), to_torch_layout(grads)


@covering("quantizer", (BOOK, RESIDUAL, GRID), numpyro=(1,), ids=lambda q: type(q).__name__)
def test_every_parts_gradient_is_its_definitions(engine: str, quantizer: Quantizer) -> None:
    """Differences of the written surrogate, in which what is held constant is held constant."""
    spec = replace(SMALL, quantizer=quantizer)
    weights = random_weights(spec)
    start, codes = encode(spec, weights, X), quantizer.table(weights)
    index = choose(spec, codes, start)
    held = chosen(codes, index)
    before = np.cumsum(held, -2) - held  # what the codebooks before each one have taken

    def surrogate(weights: dict[str, np.ndarray]) -> float:
        outputs = encode(spec, weights, X)
        total = decode(weights, held.sum(-2) + outputs - start, X).sum()
        if quantizer is not GRID:
            moved = chosen(quantizer.table(weights), index)
            total -= 0.7 * ((start[..., None, :] - before - moved) ** 2).sum()
            total -= 0.3 * ((outputs[..., None, :] - before - held) ** 2).sum()
        return float(total)

    value, found = gradient(engine, spec, weights, OBJECTIVE)
    bound = decode(weights, held.sum(-2), X) - 2 * quantizer.depth * np.log(quantizer.num_codes)
    np.testing.assert_allclose(value, -bound.sum(), 1e-12)  # no error in what is reported
    assert sorted(found) == sorted(weights)
    for name, array in weights.items():
        expected = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[i] = 1e-5
            up, down = weights | {name: array + step}, weights | {name: array - step}
            expected[i] = (surrogate(up) - surrogate(down)) / 2e-5
        assert abs(expected).max() > 1e-3, name
        np.testing.assert_allclose(-np.asarray(found[name]), expected, 1e-5, 1e-7, err_msg=name)


@covering("objective", (IWAE(3, gradient=StraightThrough()), PIWAE(2, 2, gradient=StraightThrough())), numpyro=())
def test_equal_particles_are_one(engine: str, objective: Any) -> None:
    weights = random_weights(SMALL)
    one = gradient(engine, SMALL, weights, ELBO(gradient=StraightThrough()))
    many = gradient(engine, SMALL, weights, objective)
    np.testing.assert_allclose(many[0], one[0], 1e-12)
    for name, array in one[1].items():
        np.testing.assert_allclose(many[1][name], array, 1e-10, 1e-12, err_msg=name)


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_the_priors_gradient_does_not_reach_the_codes(engine: str) -> None:
    spec = replace(SMALL, **AUTOREGRESSIVE)
    weights = random_weights(spec)
    uniform = {n: a for n, a in weights.items() if not n.startswith("prior.")}
    _, without = gradient(engine, SMALL, uniform, OBJECTIVE)
    _, found = gradient(engine, spec, weights, OBJECTIVE)
    for name, array in without.items():
        np.testing.assert_allclose(found[name], array, 1e-12, 1e-12, err_msg=name)
    assert all(abs(found[n]).max() > 0 for n in weights if n.startswith("prior."))


def bernoulli_program(engine: str) -> Any:
    """``z ~ Bernoulli(0.3)``, ``x ~ N(2 z, 1)``, guide ``Bernoulli(logit 0.4)``."""
    if engine == "pyro":
        import pyro
        import pyro.distributions as dist
        import torch

        from elbozoo.inference.pyro_engine import Program

        sample, constant = pyro.sample, torch.tensor
        phi = partial(pyro.param, "phi", lambda: torch.tensor(0.4))
    else:
        import numpyro
        import numpyro.distributions as dist

        from elbozoo.inference.numpyro_engine import Program

        sample, constant = numpyro.sample, np.asarray
        phi = partial(numpyro.param, "phi", 0.4)

    def model(x: Any) -> None:
        z = sample("z", dist.Bernoulli(probs=constant(0.3)))
        sample("x", dist.Normal(2.0 * z, constant(1.0)), obs=x)

    def guide(x: Any) -> None:
        sample("z", dist.Bernoulli(logits=phi()))

    return Program(model, guide)


@cache
def bernoulli_gradient(objective: Any, x: float) -> Any:
    """NumPyro's loss and its derivative in φ, as a function of φ and the seed."""
    import jax

    from elbozoo.inference.numpyro_engine import Loss

    toy = bernoulli_program("numpyro")

    def loss_of(phi: Any, seed: Any) -> Any:
        return Loss(objective).loss(jax.random.key(seed), {"phi": phi}, toy.model, toy.guide, np.asarray(x))

    return jax.jit(jax.value_and_grad(loss_of))


@pytest.mark.parametrize("seed", range(4))
def test_a_bernoullis_straight_through_gradient(engine: str, seed: int) -> None:
    """``p (1-p) (a (x - a b) + logit 0.3 - φ) - (b - p)`` at the drawn b, which the value tells."""
    x, phi = 1.7, 0.4
    p = expit(phi)
    objective, toy = ELBO(gradient=StraightThrough(), analytic_kl=False), bernoulli_program(engine)
    if engine == "pyro":
        import pyro
        import torch

        from elbozoo.inference.pyro_engine import Loss

        pyro.set_rng_seed(seed)
        pyro.param("phi", lambda: torch.tensor(phi))
        loss = Loss(objective).differentiable_loss(toy.model, toy.guide, torch.tensor(x))
        loss.backward()
        value, found = loss.item(), pyro.get_param_store()._params["phi"].grad.item()
    else:
        value, found = map(float, bernoulli_gradient(objective, x)(phi, seed))
    bounds = [
        -0.5 * (x - 2 * b) ** 2 - 0.5 * np.log(2 * np.pi) + np.log([0.7, 0.3][b]) - np.log([1 - p, p][b])
        for b in (0, 1)
    ]
    b = int(np.argmin(np.abs(np.array(bounds) + value)))
    np.testing.assert_allclose(value, -bounds[b])
    expected = p * (1 - p) * (2 * (x - 2 * b) + logit(0.3) - phi) - (b - p)
    np.testing.assert_allclose(-found, expected)


@covering(
    "gradient",
    (None, DReG(), ScoreFunction()),
    numpyro=(),
    ids=lambda g: "default" if g is None else type(g).__name__,
)
def test_other_gradients_are_refused(engine: str, gradient: Any) -> None:
    objective = ELBO() if gradient is None else ELBO(gradient=gradient)
    with pytest.raises(Refused, match=r"site 'z' under .* must have a gradient.*Use gradient=StraightThrough\(\)"):
        fit(getattr(SMALL, engine)(), X, objective=objective, epochs=1, progress=False)


@PYRO_ALONE
def test_straight_through_is_refused_where_nothing_is_discrete(engine: str) -> None:
    vae = VAE(6, 2, MLP((5,)), guide=DiagonalGaussian())
    with pytest.raises(Refused, match=r"under StraightThrough must have a site .*Use gradient=Pathwise\(\)"):
        fit(getattr(vae, engine)(), X, objective=OBJECTIVE, epochs=1, progress=False)


# --- moving averages --------------------------------------------------------------------------------------------


def still(engine: str) -> Any:
    """An optimiser that moves nothing: what moves is the codebook alone."""
    if engine == "pyro":
        import torch

        return lambda params: torch.optim.SGD(params, lr=0.0)
    import optax

    return optax.sgd(0.0)


def train(engine: str, spec: VQVAE, weights: dict[str, np.ndarray], **options: Any) -> Any:
    settings = {"objective": OBJECTIVE, "epochs": 1, "batch_size": len(X), "progress": False} | options
    return fit(program(engine, spec, weights), X, optimizer=still(engine), **settings)


def averaged(spec: VQVAE, weights: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    """The moving averages of whole batches, by the definition."""
    codes, counts, sums = (weights[f"codebook.{n}"].copy() for n in ("codes", "counts", "sums"))
    decay = spec.quantizer.decay
    for _ in range(steps):
        outputs = encode(spec, weights, X)
        index = choose(spec, codes, outputs)
        before = np.cumsum(chosen(codes, index), -2) - chosen(codes, index)
        residuals = outputs[..., None, :] - before
        moved = codes.copy()
        for d, k in np.ndindex(codes.shape[:2]):
            mine = residuals[:, :, d][index[..., d] == k]
            counts[d, k] = decay * counts[d, k] + (1 - decay) * len(mine)
            sums[d, k] = decay * sums[d, k] + (1 - decay) * mine.sum(0)
            if len(mine):
                moved[d, k] = sums[d, k] / counts[d, k]
        codes = moved
    return {"codes": codes, "counts": counts, "sums": sums}


def ema_weights(spec: VQVAE, seed: int = 0) -> dict[str, np.ndarray]:
    weights = random_weights(spec, seed)
    counts = np.random.default_rng(1).uniform(0.5, 2, weights["codebook.counts"].shape)
    return weights | {"codebook.counts": counts, "codebook.sums": weights["codebook.codes"] * counts[..., None]}


@covering(
    "quantizer,objective",
    list(itertools.product((BOOK, RESIDUAL), (OBJECTIVE, PIWAE(2, 2, gradient=StraightThrough())))),
    numpyro=(3,),
    ids=lambda part: type(part).__name__,
)
def test_moving_averages(engine: str, quantizer: Any, objective: Any) -> None:
    spec = replace(SMALL, quantizer=replace(quantizer, update="ema", decay=0.7))
    weights = ema_weights(spec)
    expected = averaged(spec, weights, 3)
    assert abs(expected["codes"] - weights["codebook.codes"]).max() > 0.1
    run = train(engine, spec, weights, epochs=3, objective=objective, valid=X[:3])
    for name, array in expected.items():
        np.testing.assert_allclose(run.weights[f"codebook.{name}"], array, 1e-10, 1e-12, err_msg=name)
    assert run.weights["codebook.steps"] == 3
    evaluate(run.program, X, num_particles=2)
    np.testing.assert_allclose(run.program.weights["codebook.codes"], expected["codes"], 1e-10)
    # what is reported of the last step is of the codes that it began with
    last = averaged(spec, weights, 2)["codes"]
    held = chosen(last, choose(spec, last, encode(spec, weights, X)))
    distortion = -decode(weights, held.sum(-2), X).mean()
    np.testing.assert_allclose(run.history[-1]["distortion"], distortion, 1e-10)


@pytest.mark.pyro
def test_a_rerun_begins_where_the_step_did() -> None:
    """The guide again at the drawn codes: its codebook has moved since, and must not have."""
    import torch

    from elbozoo.inference.pyro_engine import particles

    spec = replace(SMALL, quantizer=Codebook(4, 3, "ema", 0.1))
    found = program("pyro", spec, ema_weights(spec))
    start = found.weights["codebook.codes"]
    terms = particles(found.model, found.guide, (torch.tensor(X),))
    moved = found.weights["codebook.codes"]
    assert abs(moved - start).max() > 0.1
    assert (terms.freeze().log_guide == 0).all()
    np.testing.assert_array_equal(found.weights["codebook.codes"], moved)


@pytest.mark.numpyro
def test_a_rerun_begins_where_the_step_did_in_numpyro() -> None:
    import jax

    from elbozoo.inference.numpyro_engine import particles

    spec = replace(SMALL, quantizer=Codebook(4, 3, "ema", 0.1))
    found = program("numpyro", spec, ema_weights(spec))

    @jax.jit
    def run(params: Any) -> Any:
        terms, mutable = particles(jax.random.key(0), params, found.model_fn, found.guide_fn, (X,))
        return mutable["codebook$buffers"]["codes"], terms.freeze().log_guide

    codes, log_guide = run({**found.params, **found.mutable})
    assert abs(codes - found.weights["codebook.codes"]).max() > 0.1
    assert (log_guide == 0).all()


def test_a_moving_codebook_is_saved_and_resumed(engine: str, tmp_path: Any) -> None:
    spec = replace(SMALL, quantizer=Codebook(4, 3, "ema", 0.7, revive=0.3))
    options = {"objective": OBJECTIVE, "batch_size": 3, "progress": False}
    whole = fit(getattr(spec, engine)(), X, epochs=2, **options)
    fit(getattr(spec, engine)(), X, epochs=1, directory=tmp_path, **options)
    resumed = fit(getattr(spec, engine)(), X, epochs=2, directory=tmp_path, resume=True, **options)
    loaded = type(whole).load(tmp_path)
    for name, array in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], array, err_msg=name)
        np.testing.assert_array_equal(loaded.weights[name], array, err_msg=name)
    np.testing.assert_array_equal(loaded.program.apply(values_of, (X,)), whole.program.apply(values_of, (X,)))


@pytest.mark.pyro
@pytest.mark.numpyro
def test_twins_move_alike() -> None:
    # Few codes: one that is revived onto an output leaves it no residual, and of several such the next level's nearest
    # is a matter of rounding.
    spec = replace(SMALL, quantizer=Residual(3, 3, "ema", 0.7, 0.6, depth=2))
    weights = ema_weights(spec)
    runs = [train(engine, spec, weights, epochs=4, batch_size=3) for engine in ("pyro", "numpyro")]
    assert sorted(runs[0].weights) == sorted(runs[1].weights)
    for name, array in runs[0].weights.items():
        np.testing.assert_allclose(runs[1].weights[name], array, 1e-10, 1e-12, err_msg=name)
    other = program("numpyro", spec, runs[0].weights).apply(log_weight, (X,))
    np.testing.assert_allclose(runs[0].program.apply(log_weight, (X,)), other, 1e-10)


@covering("num_dead", (1, 3, 4), numpyro=(1, 2))
def test_dead_codes_are_moved_onto_outputs(engine: str, num_dead: int) -> None:
    spec = replace(SMALL, quantizer=Codebook(4, 3, "ema", 0.5, revive=0.2))
    weights = ema_weights(spec)
    weights["codebook.counts"][0, :num_dead] = 0.01
    weights["codebook.codes"][0, :num_dead] += 100.0
    if num_dead == 4:  # the nearest of them is used, and would live
        weights["codebook.counts"][:] = -100.0
    outputs = encode(spec, weights, X).reshape(-1, 3)
    codes = train(engine, spec, weights).weights["codebook.codes"][0]
    distance = abs(codes[:num_dead, None] - outputs).max(-1)
    assert (distance.min(-1) < 1e-12).all()
    assert len(set(distance.argmin(-1))) == num_dead
    if num_dead < 4:
        expected = averaged(spec, weights, 1)["codes"][0, num_dead:]
        np.testing.assert_allclose(codes[num_dead:], expected, 1e-10)


def test_more_codes_than_outputs(engine: str) -> None:
    spec = replace(SMALL, quantizer=Codebook(40, 3, "ema", 0.5, revive=0.9))
    weights = ema_weights(spec)
    weights["codebook.counts"][:] = 0.0
    weights["codebook.sums"][:] = 0.0
    start = weights["codebook.codes"][0]
    run = train(engine, spec, weights)
    moved = abs(run.weights["codebook.codes"][0] - start).max(-1) > 0
    assert np.isfinite(run.weights["codebook.codes"]).all()
    assert 14 <= moved.sum() < 40
    usage = code_usage(run.program, X)
    assert usage.used[0] + usage.dead[0] == 40
    assert usage.used[0] <= 14


# --- in use -----------------------------------------------------------------------------------------------------


@PYRO_ALONE
def test_code_usage(engine: str) -> None:
    spec = replace(SMALL, quantizer=RESIDUAL)
    weights = random_weights(spec)
    found = code_usage(program(engine, spec, weights), X, batch_size=3)
    index = choose(spec, weights["codebook.codes"], encode(spec, weights, X))
    for d in range(2):
        counts = np.bincount(index[..., d].ravel(), minlength=4)
        np.testing.assert_array_equal(found.counts[d], counts)
        share = counts[counts > 0] / counts.sum()
        np.testing.assert_allclose(found.perplexity[d], np.prod(share**-share))
        assert (found.used[d], found.dead[d]) == (len(share), 4 - len(share))
    with pytest.raises(InvalidArgument, match="program must be one of a VQVAE; got VAE"):
        code_usage(getattr(VAE(6, 2, MLP((5,))), engine)(), X)


@PYRO_ALONE  # written once for both engines
def test_one_code_carries_nothing(engine: str) -> None:
    spec = replace(SMALL, quantizer=Codebook(1, 3))
    run = fit(getattr(spec, engine)(), X, objective=OBJECTIVE, epochs=2, progress=False)
    assert run.history[-1]["rate"] == 0
    assert code_usage(run.program, X).perplexity == [1.0]


@PYRO_ALONE
def test_a_learned_prior_lowers_the_rate(engine: str) -> None:
    x = np.eye(6)[np.arange(64) % 2]  # two data, so one or two pairs of codes
    spec = replace(SMALL, quantizer=Codebook(8, 3), **AUTOREGRESSIVE | {"prior_layers": 1})
    weights = random_weights(spec)
    weights |= {n: 0.0 * a for n, a in weights.items() if n.startswith("prior.head.")}  # it starts as the uniform one
    start = program(engine, spec, weights)
    np.testing.assert_allclose(start.apply(rates, (x,))["rate"], 2 * np.log(8), 1e-6)
    settings = {"objective": OBJECTIVE, "epochs": 40, "batch_size": 64, "learning_rate": 5e-3, "progress": False}
    run = fit(start, x, **settings)
    assert run.history[-1]["rate"] < np.log(8)
    pairs = np.unique(run.program.apply(values_of, (x,))[0], axis=0)
    assert run.program.apply(rates, (x,))["rate"].mean() >= np.log(len(pairs))  # Gibbs: they are equally frequent
    assert run.history[-1]["distortion"] < run.history[0]["distortion"]
    posterior = run.to_arviz(x[:4], num_draws=5).posterior
    assert posterior["z"].shape[-2:] == (2, 3)


def test_it_learns_what_it_encodes(engine: str) -> None:
    """Four equally frequent data and one position of eight codes: 2 bits at best, at no distortion to speak of."""
    x = np.eye(6)[np.arange(64) % 4]
    spec = VQVAE(6, 1, MLP((16,)), Codebook(8, 3, "ema", 0.9, revive=0.1))
    settings = {"objective": OBJECTIVE, "epochs": 120, "batch_size": 64, "learning_rate": 2e-2, "progress": False}
    run = fit(getattr(spec, engine)(), x, **settings)
    assert run.history[-1]["distortion"] < 0.3 < np.log(4)
    assert code_usage(run.program, x).perplexity[0] > 3.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Codebook(0), "num_codes must be a whole number of at least 1; got 0"),
        (lambda: Codebook(4, 0), "code_dim must be a whole number of at least 1; got 0"),
        (lambda: Codebook(update="moving"), r"update must be one of .*; got 'moving'"),
        (lambda: Codebook(update="ema", decay=1.0), r"decay must lie in \[0, 1\); got 1.0"),
        (lambda: Codebook(revive=0.1), "revive must be 0 for a codebook that gradients move; got 0.1"),
        (lambda: Residual(depth=0), "depth must be a whole number of at least 1; got 0"),
        (lambda: FiniteScalar((5, 2)), "every entry of levels must be a whole number of at least 3; got 2"),
        (lambda: FiniteScalar(()), "levels must have at least one entry"),
        (lambda: replace(SMALL, num_latents=0), "num_latents must be a whole number of at least 1; got 0"),
        (lambda: replace(SMALL, quantizer=Codebook), r"quantizer must be a Quantizer; got .* Pass Codebook\(\)"),
        (lambda: replace(SMALL, prior="normal"), "prior must be one of .*; got 'normal'"),
        (lambda: replace(SMALL, prior_width=6), "prior_width must be a multiple of 4; got 6"),
        (
            lambda: VQVAE(num_latents=16, network=FullyConv()),
            "num_latents must be the network's 49 positions; got 16. Pass num_latents=49",
        ),
        (lambda: FullyConv((1, 28, 28), (8, 8, 8)), "channels must have at least one entry and a height and width"),
        (lambda: StraightThrough(commitment=-1.0), "commitment must be finite and at least 0; got -1.0"),
        (lambda: SMALL.check(np.zeros((3, 5))), r"x must have shape \(N, 6\); got \(3, 5\)"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


@PYRO_ALONE
def test_latents_that_the_places_do_not_divide(engine: str) -> None:
    vae = VAE(16, 3, FullyConv((1, 4, 4), (3,)))
    with pytest.raises(InvalidArgument, match="must be a multiple of its 4 places; got"):
        fit(getattr(vae, engine)(), np.zeros((4, 16)), epochs=1, progress=False)


def test_on_the_command_line() -> None:
    """The data have levels, which are not the grid's."""
    from elbozoo import options

    chosen = {"objective": "elbo", "gradient": "straight-through", "shape": (), "network": "fully-conv"}
    chosen |= {"quantizer": "finite-scalar", "likelihood": "discretized-logistic", "num_latents": 49}
    facts = {"data_dim": 784, "image_shape": (1, 28, 28), "levels": 256}
    spec, objective, _ = options.assemble(VQVAE, chosen, facts)
    assert spec == VQVAE(784, 49, FullyConv(), FiniteScalar(), DiscretizedLogistic(256))
    assert objective == ELBO(gradient=StraightThrough())


def test_config_round_trip() -> None:
    for spec in TWINS:
        assert VQVAE.from_config(spec.to_config()) == spec
