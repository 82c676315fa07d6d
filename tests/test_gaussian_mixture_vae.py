"""GaussianMixtureVAE: its twins, and what is exact about clusters in the latent space."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from oracles import gauss_hermite, normal
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from elbozoo.guides import FullCovarianceGaussian, SemiAmortised
from elbozoo.inference import ELBO, IWAE, VIMCO, Enumerate, ScoreFunction, class_probabilities, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import MLP, VAE, Conv, Gaussian, GaussianMixtureVAE, MixturePrior

TWINS = [
    GaussianMixtureVAE(6, 3, 2, MLP((5,)), learn_weights=True),
    GaussianMixtureVAE(
        6, 4, 3, MLP((5,)), Gaussian(scale="pixel"), FullCovarianceGaussian(), exact_cluster=False, learn_weights=True
    ),
    GaussianMixtureVAE(16, 3, 2, Conv((1, 4, 4), (3,), 6)),
]

# --- linear Gaussian: y of three, z of one entry, x of two ------------------------------------------------------

RNG = np.random.default_rng(3)
C, D = 3, 2
X = RNG.normal(size=(4, D)) * 1.5
SPEC = GaussianMixtureVAE(D, C, 1, MLP(()), Gaussian(0.7), learn_weights=True)
CLUSTERS = {
    "clusters.loc": np.array([[-1.5], [0.2], [1.8]]),
    "clusters.log_scale": np.log([[0.5], [0.8], [0.4]]),
    "clusters.logits": np.array([0.3, -0.4, 0.1]),
}
DECODER = {"decoder.layers.0.weight": RNG.normal(size=(D, 1)), "decoder.layers.0.bias": RNG.normal(size=D)}
_W = DECODER["decoder.layers.0.weight"][:, 0]
_A = _W / (_W @ _W + 0.49)  # near the posterior, so that draws are not wild
ENCODER = {
    "encoder.layers.0.weight": np.stack([_A, [0.05, -0.1]]),
    "encoder.layers.0.bias": np.array([-_A @ DECODER["decoder.layers.0.bias"], -0.9]),
}
WEIGHTS = CLUSTERS | DECODER | ENCODER
LOC, SCALE = CLUSTERS["clusters.loc"][:, 0], np.exp(CLUSTERS["clusters.log_scale"][:, 0])
LOG_W = CLUSTERS["clusters.logits"] - logsumexp(CLUSTERS["clusters.logits"])


def exact_guide() -> tuple[Any, tuple[dict[str, np.ndarray], np.ndarray]]:
    """The guide that draws y first, with the exact q(z | x, y): linear in x and onehot(y), but for its scale.

    One scale serves all clusters only where they have one; then log q(y | x) is linear in x too.
    """
    W, b = DECODER["decoder.layers.0.weight"][:, 0], DECODER["decoder.layers.0.bias"]
    s2, v = 0.7**2, 0.6**2
    precision = 1 / v + W @ W / s2
    to_loc = np.concatenate([W / s2 / precision, LOC / v / precision])
    outputs = np.stack([to_loc, np.zeros(D + C)])
    bias = np.array([-(W @ b) / s2 / precision, -0.5 * np.log(precision)])
    covariance = v * np.outer(W, W) + s2 * np.eye(D)
    inverse = np.linalg.inv(covariance)
    means = np.outer(LOC, W) + b
    classifier = means @ inverse
    at_zero = LOG_W - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means)
    weights = CLUSTERS | DECODER | {
        "clusters.log_scale": np.full((C, 1), np.log(0.6)),
        "encoder.layers.0.weight": outputs, "encoder.layers.0.bias": bias,
        "classifier.layers.0.weight": classifier, "classifier.layers.0.bias": at_zero,
    }  # fmt: skip
    log_px = logsumexp([LOG_W[c] + multivariate_normal(means[c], covariance).logpdf(X) for c in range(C)], axis=0)
    return GaussianMixtureVAE(D, C, 1, MLP(()), Gaussian(0.7), exact_cluster=False, learn_weights=True), (
        weights, log_px,
    )  # fmt: skip


def log_evidence() -> np.ndarray:
    W, b = DECODER["decoder.layers.0.weight"][:, 0], DECODER["decoder.layers.0.bias"]
    covariances = [SCALE[c] ** 2 * np.outer(W, W) + 0.49 * np.eye(D) for c in range(C)]
    return logsumexp(
        [LOG_W[c] + multivariate_normal(W * LOC[c] + b, covariances[c]).logpdf(X) for c in range(C)], axis=0
    )


def log_joint(z: np.ndarray) -> np.ndarray:
    """``log p(x, y, z)``, (nodes, B, C), at z (nodes, B)."""
    mean = z[..., None] * DECODER["decoder.layers.0.weight"][:, 0] + DECODER["decoder.layers.0.bias"]
    log_lik = normal(X, mean, 0.7).sum(-1)
    return log_lik[..., None] + LOG_W + normal(z[..., None], LOC, SCALE)


def encoder() -> tuple[np.ndarray, np.ndarray]:
    out = X @ ENCODER["encoder.layers.0.weight"].T + ENCODER["encoder.layers.0.bias"]
    return out[:, 0], np.exp(out[:, 1])


def exact_elbo() -> np.ndarray:
    """``E_q(z|x)[sum_y p(y|z) (log p(x, y, z) - log p(y|z) - log q(z|x))]`` by Gauss-Hermite quadrature."""
    nodes, weights = gauss_hermite(60)
    loc, scale = encoder()
    z = loc + scale * nodes[:, None]
    joint = log_joint(z)
    log_q = joint - logsumexp(joint, axis=-1, keepdims=True)
    inner = (np.exp(log_q) * (joint - log_q)).sum(-1) - normal(z, loc, scale)
    return weights @ inner


def bound(terms: Any) -> Any:
    return ELBO(gradient=Enumerate()).bound(terms)


def program(engine: str, spec: Any = SPEC, weights: dict[str, np.ndarray] = WEIGHTS) -> Any:
    return getattr(spec, engine)().with_weights(weights)


def test_every_bound_is_the_evidence_under_the_exact_guide(engine: str) -> None:
    spec, (weights, log_px) = exact_guide()
    exact = program(engine, spec, weights)
    np.testing.assert_allclose(exact.apply(bound, (X,)), log_px, rtol=0, atol=1e-10)
    np.testing.assert_allclose(exact.apply(iwae, (X,), num_particles=5), log_px, rtol=0, atol=1e-10)


def iwae(terms: Any) -> Any:
    return IWAE(5).value(terms.log_weight)


@PYRO_ALONE
def test_enumerated_bound_is_the_quadrature_of_the_exact_cluster_guide(engine: str) -> None:
    want, copies = exact_elbo(), 4000
    data = np.repeat(X, copies, axis=0)
    draws = program(engine).apply(bound, (data,), seed=1).reshape(len(X), copies)
    error = draws.std(axis=1, ddof=1) / copies**0.5
    assert (abs(draws.mean(axis=1) - want) < 4 * error).all()
    assert (4 * error < 0.1 * abs(want)).all(), "no power"
    assert (want < log_evidence()).all()


def log_weight(terms: Any) -> Any:
    return terms.log_weight


@PYRO_ALONE
def test_the_exact_cluster_sums_to_the_mixture_prior(engine: str) -> None:
    """At the same z every cluster has the log weight of the VAE with a mixture prior: y adds nothing but its name."""
    mixture = VAE(D, 1, MLP(()), Gaussian(0.7), prior=MixturePrior(C))
    weights = DECODER | ENCODER | {n.replace("clusters", "prior"): v for n, v in CLUSTERS.items()}
    z = RNG.normal(size=(5, len(X), 1))
    want = program(engine, mixture, weights).apply(log_weight, (X,), values={"z": z})
    for y in range(C):
        values = {"z": z, "y": np.full((5, len(X)), y)}
        np.testing.assert_allclose(program(engine).apply(log_weight, (X,), values=values), want, 1e-10)


@PYRO_ALONE
def test_cluster_probabilities_are_bayes_rule_averaged(engine: str) -> None:
    nodes, weights = gauss_hermite(60)
    loc, scale = encoder()
    every = log_joint(loc + scale * nodes[:, None])
    posterior = np.exp(every - logsumexp(every, axis=-1, keepdims=True))
    found = class_probabilities(program(engine), X, num_particles=4000, batch_size=3)
    np.testing.assert_allclose(found, np.einsum("n,nbc->bc", weights, posterior), atol=4 * 0.5 / 4000**0.5)
    spec, (exact, _) = exact_guide()
    logits = X @ exact["classifier.layers.0.weight"].T + exact["classifier.layers.0.bias"]
    found = class_probabilities(program(engine, spec, exact), X)
    np.testing.assert_allclose(found, np.exp(logits - logsumexp(logits, axis=1, keepdims=True)), 1e-10)


@covering(
    "exact,objective",
    list(product((True, False), (ELBO(2, Enumerate()), IWAE(3, VIMCO()), ELBO(2, ScoreFunction())))),
    numpyro=(0, 4),
    ids=str,
)
def test_it_trains(engine: str, exact: bool, objective: Any) -> None:
    spec = GaussianMixtureVAE(D, C, 2, MLP((4,)), Gaussian(0.7), exact_cluster=exact)
    data = np.tile(X, (8, 1))
    settings: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-2, "progress": False}
    run = fit(getattr(spec, engine)(), data, objective=objective, epochs=12, **settings)
    assert np.mean([r["bound"] for r in run.history[-3:]]) > run.history[0]["bound"]


REFUSED = [
    ({"num_clusters": 1}, "num_clusters must be a whole number of at least 2; got 1"),
    ({"exact_cluster": 1}, "exact_cluster must be True or False; got 1"),
    ({"network": Conv(), "exact_cluster": False}, "network must be a MLP; got Conv"),
    ({"guide": SemiAmortised()}, "guide must be one that does not climb"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        GaussianMixtureVAE(**fields)


def test_labels_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="data must be what GaussianMixtureVAE takes; got 2 arrays"):
        SPEC.check_data(X, np.zeros(len(X)))
