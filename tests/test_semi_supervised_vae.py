"""SemiSupervisedVAE: its twins, both bounds and their gradients against brute force, and what labels do."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from oracles import bernoulli, gauss_hermite, normal
from scipy.special import log_softmax, logsumexp

from elbozoo.guides import FullCovarianceGaussian, SemiAmortised
from elbozoo.inference import (
    ELBO,
    IWAE,
    RWS,
    VIMCO,
    AnnealedKL,
    Classification,
    Enumerate,
    Objective,
    ScoreFunction,
    accuracy,
    class_probabilities,
    evaluate,
    fit,
)
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.weights import to_torch_layout
from elbozoo.zoo import MLP, VAE, Conv, Gaussian, SemiSupervisedVAE

TWINS = [
    SemiSupervisedVAE(6, 3, 2, MLP((5,), "softplus")),
    SemiSupervisedVAE(6, 2, 3, MLP((5, 4)), Gaussian(scale="pixel"), FullCovarianceGaussian()),
]

# --- brute force: three binary entries, three classes, one style --------------------------------------------------

C, D = 3, 3
SPEC = SemiSupervisedVAE(D, C, 1, MLP((2,), "softplus"))
X = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]], float)
Y = np.array([-1, -1, 2, 0])
SIZES = {"decoder": (C + 1, D), "classifier": (D, C), "encoder": (D + C, 2)}


def random_weights() -> dict[str, np.ndarray]:
    rng, out = np.random.default_rng(0), {}
    for name, (inputs, outputs) in SIZES.items():
        for i, shape in enumerate([(2, inputs), (outputs, 2)]):
            out[f"{name}.layers.{i}.weight"] = 0.7 * rng.normal(size=shape)
            out[f"{name}.layers.{i}.bias"] = 0.5 * rng.normal(size=shape[:1])
    return out


WEIGHTS = random_weights()
Weights = dict[str, np.ndarray]


def mlp(weights: Weights, name: str, inputs: np.ndarray) -> np.ndarray:
    hidden = np.logaddexp(0, inputs @ weights[f"{name}.layers.0.weight"].T + weights[f"{name}.layers.0.bias"])
    return hidden @ weights[f"{name}.layers.1.weight"].T + weights[f"{name}.layers.1.bias"]


def log_q_class(weights: Weights) -> np.ndarray:
    """``log q(y | x)``, (B, C)."""
    return log_softmax(mlp(weights, "classifier", X), axis=1)


def log_lik(weights: Weights, y: int, z: np.ndarray) -> np.ndarray:
    """``log p(x | y, z)``, (..., B), at z (..., B)."""
    return bernoulli(X, mlp(weights, "decoder", joined(np.eye(C)[y], z[..., None]))).sum(-1)


def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    leading = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return np.concatenate([np.broadcast_to(v, leading + v.shape[-1:]) for v in (a, b)], -1)


def posterior(weights: Weights, y: int) -> tuple[np.ndarray, np.ndarray]:
    out = mlp(weights, "encoder", joined(X, np.eye(C)[y]))
    return out[:, 0], np.exp(out[:, 1])


def labelled_bounds(weights: Weights) -> np.ndarray:
    """``-L(x, y)``, (B, C), by Gauss-Hermite quadrature."""
    nodes, w = gauss_hermite(50)
    out = []
    for y in range(C):
        loc, scale = posterior(weights, y)
        z = loc + scale * nodes[:, None]
        out.append(w @ (log_lik(weights, y, z) - np.log(C) + normal(z, 0, 1) - normal(z, loc, scale)))
    return np.stack(out, -1)


def exact_bound(weights: Weights) -> np.ndarray:
    """``-L(x, y)`` of the labelled data, ``-U(x)`` of the others, (B,)."""
    each, log_q = labelled_bounds(weights), log_q_class(weights)
    return np.where(Y < 0, (np.exp(log_q) * (each - log_q)).sum(-1), each[np.arange(len(Y)), Y])


def evidence(weights: Weights) -> np.ndarray:
    """``log p(x, y)`` of the labelled data, ``log p(x)`` of the others, (B,)."""
    nodes, w = gauss_hermite(80)
    each = [
        logsumexp(log_lik(weights, y, nodes[:, None] + 0 * X[:, 0]), axis=0, b=w[:, None]) - np.log(C) for y in range(C)
    ]
    joint = np.stack(each, -1)
    return np.where(Y < 0, logsumexp(joint, axis=-1), joint[np.arange(len(Y)), Y])


def differences(total: Any) -> Weights:
    """Central differences in every weight."""
    out = {}
    for name, value in WEIGHTS.items():
        out[name] = np.zeros_like(value)
        for at in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[at] = 1e-5
            up, down = (total({**WEIGHTS, name: value + s * step}) for s in (1, -1))
            out[name][at] = (up - down) / 2e-5
    return out


def program(engine: str, weights: Weights = WEIGHTS) -> Any:
    return getattr(SPEC, engine)().with_weights(weights)


def gradients(engine: str, objective: Objective, args: tuple, num: int) -> dict[str, np.ndarray]:
    """The gradient of the mean over the data, by weight, at ``num`` seeds: (num, ...)."""
    made = program(engine)
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        grad = jax.jit(jax.grad(lambda p, k: Loss(objective).loss(k, p, made.model_fn, made.guide_fn, *args)))
        found = [to_torch_layout(jax.tree.map(np.asarray, grad(made.params, jax.random.key(s)))) for s in range(num)]
    else:
        import pyro
        import torch

        from elbozoo.inference.pyro_engine import Loss

        found, loss, inputs = [], Loss(objective, max_plate_nesting=1), [torch.as_tensor(a) for a in args]
        for seed in range(num):
            pyro.set_rng_seed(seed)
            for tensor in made._tensors().values():
                tensor.grad = None
            loss.loss_and_grads(made.model, made.guide, *inputs)
            grads = {n: t.grad for n, t in made._tensors().items()}
            found.append({n: np.zeros_like(WEIGHTS[n]) if g is None else g.numpy() for n, g in grads.items()})
    return {n: np.stack([-g[n] / len(args[0]) for g in found]) for n in WEIGHTS}


# --- bounds -------------------------------------------------------------------------------------------------------


def log_weight(terms: Any) -> Any:
    return terms.log_weight


def enumerated(terms: Any) -> Any:
    return ELBO(gradient=Enumerate(), analytic_kl=False).bound(terms)


@cache
def repeated(copies: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(X, copies, axis=0), np.repeat(Y, copies)


def test_the_bounds_by_hand_are_below_the_evidence() -> None:
    gap = evidence(WEIGHTS) - exact_bound(WEIGHTS)
    assert (gap > 0.01).all()
    np.testing.assert_allclose(logsumexp(log_q_class(WEIGHTS), axis=1), 0, atol=1e-12)


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_log_weights_at_given_latents(engine: str) -> None:
    made, z = program(engine), np.random.default_rng(1).normal(size=(2, len(X), 1))
    for y in range(C):
        loc, scale = posterior(WEIGHTS, y)
        at_label = log_lik(WEIGHTS, y, z[..., 0]) - np.log(C) + normal(z[..., 0], 0, 1) - normal(z[..., 0], loc, scale)
        values = {"y": np.full((2, len(X)), y), "z": z}
        found = made.apply(log_weight, (X,), values=values)
        np.testing.assert_allclose(found, at_label - log_q_class(WEIGHTS)[:, y], 1e-10)
        found = made.apply(log_weight, (X, Y), values=values)
        np.testing.assert_allclose(found[:, y == Y], at_label[:, y == Y], 1e-10, err_msg="log q(y) must be 0")
        assert np.isfinite(found).all()


@covering("bound", (enumerated, log_weight), numpyro=(0,), ids=lambda f: f.__name__)
def test_bounds_are_the_labelled_and_the_unlabelled_one(engine: str, bound: Any) -> None:
    copies, want = 2000, exact_bound(WEIGHTS)
    draws = program(engine).apply(bound, repeated(copies), seed=1).reshape(len(X), copies)
    error = draws.std(axis=1, ddof=1) / copies**0.5
    assert (abs(draws.mean(axis=1) - want) < 4 * error).all()
    assert (4 * error < 0.25 * (evidence(WEIGHTS) - want) + 0.05).all(), "no power"


@PYRO_ALONE  # written once for both engines
def test_importance_sampling_gives_both_evidences(engine: str) -> None:
    found = evaluate(program(engine), (X, Y), num_particles=4000).per_datum
    np.testing.assert_allclose(found.log_lik_estimate, evidence(WEIGHTS), atol=0.05)


def exact_without_style() -> tuple[Weights, np.ndarray]:
    """A decoder that does not read z, and the exact guide: a linear classifier, and z's prior. ``log p(x)``."""
    rng = np.random.default_rng(4)
    of_class = rng.normal(size=(D, C))
    weights = {
        "decoder.layers.0.weight": np.concatenate([of_class, np.zeros((D, 1))], 1), "decoder.layers.0.bias": np.zeros(D),
        "classifier.layers.0.weight": of_class.T, "classifier.layers.0.bias": -np.logaddexp(0, of_class).sum(0),
        "encoder.layers.0.weight": np.zeros((2, D + C)), "encoder.layers.0.bias": np.zeros(2),
    }  # fmt: skip
    return weights, logsumexp(bernoulli(X[:, None], of_class.T).sum(-1), axis=1) - np.log(C)


def test_every_bound_is_the_evidence_under_the_exact_guide(engine: str) -> None:
    weights, log_px = exact_without_style()
    made = getattr(SemiSupervisedVAE(D, C, 1, MLP(())), engine)().with_weights(weights)
    np.testing.assert_allclose(made.apply(enumerated, (X,)), log_px, rtol=0, atol=1e-10)
    np.testing.assert_allclose(made.apply(log_weight, (X,), num_particles=3), [log_px] * 3, rtol=0, atol=1e-10)


# --- gradients ----------------------------------------------------------------------------------------------------

WEIGHT = 0.8
OBJECTIVES = [ELBO(gradient=Enumerate()), ELBO(2, gradient=ScoreFunction()), ELBO(2, gradient=VIMCO())]


def with_classification(objective: Objective) -> Classification:
    return Classification(objective, weight=WEIGHT)


@cache
def measured(engine: str, row: int) -> dict[str, np.ndarray]:
    return gradients(engine, with_classification(OBJECTIVES[row]), repeated(300), 24)


@cache
def wanted() -> Weights:
    def total(weights: Weights) -> float:
        return (exact_bound(weights) + WEIGHT * classification(weights)).mean()

    return differences(total)


def classification(weights: Weights) -> np.ndarray:
    return np.where(Y < 0, 0.0, log_q_class(weights)[np.arange(len(Y)), Y])


@covering("row", range(len(OBJECTIVES)), numpyro=(0, 2), ids=lambda r: type(OBJECTIVES[r].gradient).__name__)
def test_mean_gradients_are_those_of_brute_force(engine: str, row: int) -> None:
    for name, draws in measured(engine, row).items():
        error = draws.std(axis=0, ddof=1) / len(draws) ** 0.5
        assert np.isfinite(draws).all()
        assert (abs(draws.mean(axis=0) - wanted()[name]) < 5 * error + 1e-8).all(), name
    powerful = [
        abs(wanted()[n]).max() > 10 * d.std(axis=0).max() / len(d) ** 0.5 for n, d in measured(engine, row).items()
    ]
    assert np.mean(powerful) > 0.7, "no power"


@PYRO_ALONE
def test_enumeration_has_less_variance(engine: str) -> None:
    spread = [sum(d.var(axis=0).sum() for d in measured(engine, row).values()) for row in range(2)]
    assert spread[0] < 0.7 * spread[1]


@covering("objective", (*OBJECTIVES, IWAE(2, VIMCO()), IWAE(2, RWS()), IWAE(2, RWS(0.5, 0.5))), numpyro=(), ids=str)
def test_a_label_leaves_the_classifier_to_the_classification_term(engine: str, objective: Objective) -> None:
    """All data labelled: without the term the classifier has no gradient at all, with it exactly the term's."""
    args = (X, np.maximum(Y, 1))
    if not (isinstance(objective.gradient, RWS) and objective.gradient.sleep):
        for name, grad in gradients(engine, objective, args, 1).items():
            assert np.isfinite(grad).all()
            assert name.startswith("classifier") == (not grad.any()), name

    def term(weights: Weights) -> float:
        return WEIGHT * log_q_class(weights)[np.arange(len(X)), args[1]].mean()

    want = differences(term)
    for name, grad in gradients(engine, with_classification(objective), args, 1).items():
        assert np.isfinite(grad).all()
        if name.startswith("classifier"):
            np.testing.assert_allclose(grad[0], want[name], 1e-6, 1e-9)


@PYRO_ALONE
def test_classes_of_no_probability_count_exactly_zero(engine: str) -> None:
    """The enumerated bound of a labelled datum is that of its class alone, whatever the others' likelihood."""
    weights, _ = exact_without_style()
    weights["decoder.layers.0.weight"][:, 1] = 1e6
    made = getattr(SemiSupervisedVAE(D, C, 1, MLP(())), engine)().with_weights(weights)
    y = np.array([2, 2, 0, 0])
    of_class = weights["decoder.layers.0.weight"][:, y].T
    found = made.apply(enumerated, (X, y))
    np.testing.assert_allclose(found, bernoulli(X, of_class).sum(-1) - np.log(C), rtol=0, atol=1e-10)


# --- the shape ----------------------------------------------------------------------------------------------------


def report(terms: Any) -> Any:
    shape = AnnealedKL(with_classification(OBJECTIVES[0]), warmup=4, unit="steps", start=0.5)
    shape.check(terms)
    return {"bound": shape.bound(terms), "plain": enumerated(terms), **shape.scalars(terms), "rec": terms.recorded}


@covering("num_particles", (1, 3), numpyro=())
def test_classification_is_of_training_alone(engine: str, num_particles: int) -> None:
    weights, _ = exact_without_style()
    made = getattr(SemiSupervisedVAE(D, C, 1, MLP(())), engine)().with_weights(weights)
    found = made.apply(report, (X, Y), num_particles=num_particles)
    logits = X @ weights["classifier.layers.0.weight"].T + weights["classifier.layers.0.bias"]
    term = np.where(Y < 0, 0.0, log_softmax(logits, axis=1)[np.arange(len(Y)), Y])
    assert found["rec"]["log_classifier"].shape == (num_particles, len(X))
    np.testing.assert_allclose(found["rec"]["log_classifier"], [term] * num_particles, 1e-10)
    np.testing.assert_array_equal(found["bound"], found["plain"])
    assert found["classification"] == pytest.approx(WEIGHT * term.mean())
    log_q = np.where(Y[:, None] < 0, log_softmax(logits, axis=1), np.where(Y[:, None] == np.arange(C), 0.0, -1e4))
    kl = (np.exp(log_q) * (log_q + np.log(C))).sum(1)
    assert found["shaped_bound"] == pytest.approx((found["plain"] + 0.5 * kl + WEIGHT * term).mean())


@PYRO_ALONE
def test_classification_refuses_what_records_nothing(engine: str) -> None:
    settings: dict[str, Any] = {"objective": Classification(OBJECTIVES[0]), "progress": False}
    with pytest.raises(InvalidArgument, match="Classification must record 'log_classifier' by deterministic; got noth"):
        fit(getattr(SPEC, engine)(), X, **settings)
    with pytest.raises(InvalidArgument, match="weight must be finite and at least 0; got -1"):
        Classification(weight=-1)
    with pytest.raises(Refused, match="site 'y' under Pathwise must have a reparameterised guide"):
        fit(getattr(SPEC, engine)(), (X, Y), objective=Classification(ELBO()), progress=False)


# --- classes and data ---------------------------------------------------------------------------------------------


@PYRO_ALONE
def test_class_probabilities_are_the_classifiers(engine: str) -> None:
    made = program(engine)
    found = class_probabilities(made, X, batch_size=3)
    np.testing.assert_allclose(found, np.exp(log_q_class(WEIGHTS)), 1e-10)
    labels = log_q_class(WEIGHTS).argmax(1)
    assert accuracy(found, labels) == 1.0
    assert accuracy(found, np.where(np.arange(4) < 3, labels, (labels + 1) % C)) == 0.75


def separable(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that differ in every entry but for some noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, num)
    return (rng.random((num, 8)) < np.where(y == 1, 0.85, 0.15)[:, None]) * 1.0, y


def test_it_learns_from_few_labels(engine: str) -> None:
    """Labels by a tuple of arrays, held-out data without any."""
    x, truth = separable(240)
    labels = np.where(np.arange(len(x)) % 24 == 0, truth, -1)
    spec = SemiSupervisedVAE(8, 2, 2, MLP((8,), "softplus"))
    settings: dict[str, Any] = {"batch_size": 60, "learning_rate": 6e-2, "epochs": 25, "progress": False}
    objective = Classification(ELBO(gradient=Enumerate()), weight=10.0)
    run = fit(getattr(spec, engine)(), (x, labels), objective=objective, valid=(x[:60], truth[:60]), **settings)
    assert run.history[-1]["valid_bound"] > run.history[0]["valid_bound"]
    assert run.history[-1]["classification"] > run.history[0]["classification"]
    assert accuracy(class_probabilities(run.program, x), truth) > 0.95


REFUSED = [
    (np.array([0, 1, 3, -1]), r"y must lie in 0 … 2 or be -1; got 3 at index 2"),
    (np.array([0, 1, -2, -1]), r"y must lie in 0 … 2 or be -1; got -2 at index 2"),
    (np.array([0, 0.5, 1, 1]), r"y must lie in 0 … 2 or be -1; got 0.5 at index 1"),
    (np.zeros((4, 1)), r"y must have shape \(4,\); got \(4, 1\)"),
]


@PYRO_ALONE
@pytest.mark.parametrize(("labels", "message"), REFUSED, ids=str)
def test_bad_labels_are_refused(engine: str, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fit(getattr(SPEC, engine)(), (X, labels), objective=OBJECTIVES[0], progress=False)


def test_bad_fields_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="num_classes must be a whole number of at least 2; got 1"):
        SemiSupervisedVAE(num_classes=1)
    with pytest.raises(InvalidArgument, match="network must be a MLP; got Conv"):
        SemiSupervisedVAE(network=Conv())
    with pytest.raises(InvalidArgument, match="guide must be one that does not climb"):
        SemiSupervisedVAE(guide=SemiAmortised())
    with pytest.raises(InvalidArgument, match="data must be what SemiSupervisedVAE takes; got 3 arrays"):
        SPEC.check_data(X, Y, Y)
    with pytest.raises(InvalidArgument, match="data must be what VAE takes; got 2 arrays"):
        VAE(D).check_data(X, Y)


@pytest.mark.filterwarnings("error")
def test_the_librarys_own_elbo_takes_labels(engine: str) -> None:
    """Without ours: the same mean, the recorded number in nobody's way."""
    made, (x, y) = program(engine), repeated(20_000)
    if engine == "pyro":
        import pyro
        import torch

        loss = pyro.infer.Trace_ELBO().loss(made.model, made.guide, torch.as_tensor(x), torch.as_tensor(y))
    else:
        import jax
        import numpyro

        own = numpyro.infer.TraceGraph_ELBO()
        loss = jax.jit(lambda key: own.loss(key, made.params, made.model_fn, made.guide_fn, x, y))(jax.random.key(0))
    assert -float(loss) / 20_000 == pytest.approx(exact_bound(WEIGHTS).sum(), abs=0.7)
