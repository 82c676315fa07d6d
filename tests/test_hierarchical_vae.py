"""HierarchicalVAE: its twins, and what is exact about a bottom-up guide."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from linear_hierarchy import Affine, Joint, LinearHierarchy, encoder_weights, extend, kl

from elbozoo.guides import FullCovarianceGaussian, SemiAmortised
from elbozoo.inference import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Renyi, evaluate, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import MLP, VAE, Gaussian, HierarchicalVAE, MixturePrior, VampPrior

TWINS = [
    HierarchicalVAE(data_dim=6, latent_dims=(4, 3, 2), hidden=(5, 4, 3)),
    HierarchicalVAE(
        6,
        (3, 2),
        (5, 4),
        depth=1,
        normalization="layer",
        activation="silu",
        likelihood=Gaussian(scale=0.5),
        guide=FullCovarianceGaussian(),
    ),
    HierarchicalVAE(6, (3,), (5,), depth=0, prior=MixturePrior(3)),
]

EXACT = LinearHierarchy.random(data_dim=5, dims=(3, 2, 2), seed=1)
X = np.random.default_rng(2).normal(scale=2.0, size=(4, 5))
LINEAR = HierarchicalVAE(5, EXACT.dims, (1, 1, 1), depth=0, likelihood=Gaussian(scale=0.6))
FULL = HierarchicalVAE(
    5, EXACT.dims, (1, 1, 1), depth=0, likelihood=Gaussian(scale=0.6), guide=FullCovarianceGaussian()
)
BOUNDS = [
    ELBO(1), ELBO(4), IWAE(4), IWAE(32), Renyi(0.3, 4), Renyi(-2.0, 4), MIWAE(2, 2), CIWAE(0.3, 4), PIWAE(2, 2), TVO(6, 4),
]  # fmt: skip


def log_weight(terms: Any) -> Any:
    return terms.log_weight


def bound_of(objective: Any, terms: Any) -> Any:
    return objective.bound(terms)


def program(engine: str, spec: Any, weights: dict[str, np.ndarray]) -> Any:
    return getattr(spec, engine)().with_weights(weights)


@cache
def exact_program(engine: str) -> Any:
    weights = EXACT.decoder_weights() | encoder_weights(EXACT.climb(), full=True)
    return program(engine, FULL, weights)


def test_the_oracle_agrees_with_bayes() -> None:
    """Evidence = joint / posterior at any latents; the climb's factors multiply to the posterior."""
    rng = np.random.default_rng(0)
    joint, posterior = EXACT.joint(), EXACT.posterior(X[0])
    z = rng.normal(size=len(posterior.mean))
    from scipy.stats import multivariate_normal as normal

    log_evidence = normal(*joint).logpdf(np.concatenate([z, X[0]])) - normal(*posterior).logpdf(z)
    np.testing.assert_allclose(EXACT.log_evidence(X)[0], log_evidence)
    log_q, below = 0.0, X[0]
    for layer, (start, stop) in zip(EXACT.climb(), [(4, 7), (2, 4), (0, 2)], strict=True):
        log_q = log_q + normal(layer.matrix @ below + layer.offset, layer.covariance).logpdf(z[start:stop])
        below = z[start:stop]
    np.testing.assert_allclose(normal(*posterior).logpdf(z), log_q)


@covering("bound", BOUNDS, numpyro=(0, len(BOUNDS) - 1), ids=lambda b: repr(b).split(", gradient")[0])
def test_every_bound_is_the_evidence_under_the_exact_guide(engine: str, bound: Any) -> None:
    found = exact_program(engine).apply(partial(bound_of, bound), (X,), num_particles=bound.num_particles)
    np.testing.assert_allclose(found, EXACT.log_evidence(X), atol=1e-10)


@PYRO_ALONE  # written once for both engines
def test_the_best_diagonal_guide_loses_each_layers_correlations(engine: str) -> None:
    """Climbing, layer l loses ``1/2 (sum_d log P_dd - log det P)``, P the precision of p(z_l | below)."""
    precisions = [np.linalg.inv(layer.covariance) for layer in EXACT.climb()]
    best = [
        Affine(layer.matrix, layer.offset, np.diag(1 / np.diag(P)))
        for layer, P in zip(EXACT.climb(), precisions, strict=True)
    ]
    gap = sum(0.5 * (np.log(np.diag(P)).sum() - np.linalg.slogdet(P)[1]) for P in precisions)
    assert gap > 0.3, "the posterior must be correlated, or this shows nothing"
    found = program(engine, LINEAR, EXACT.decoder_weights() | encoder_weights(best, full=False))
    gaps = EXACT.log_evidence(X) - found.apply(log_weight, (X,), num_particles=10_000, seed=1)
    error = gaps.std(axis=0, ddof=1) / len(gaps) ** 0.5
    assert (abs(gaps.mean(axis=0) - gap) < 4 * error).all()
    assert (4 * error < 0.1 * gap).all(), "no power"


@PYRO_ALONE
def test_the_gap_of_any_linear_guide_is_the_kl_of_two_joint_gaussians(engine: str) -> None:
    rng = np.random.default_rng(5)
    layers = [
        Affine(a.matrix + 0.1 * rng.normal(size=a.matrix.shape), a.offset + 0.1, np.diag(rng.uniform(0.1, 0.4, len(a.offset))))
        for a in EXACT.climb()
    ]  # fmt: skip
    gap = []
    for x in X:
        first = Affine(
            np.zeros((len(layers[0].offset), 0)), layers[0].matrix @ x + layers[0].offset, layers[0].covariance
        )
        q = extend(Joint(np.zeros(0), np.zeros((0, 0))), first, slice(0, 0))
        for layer in layers[1:]:
            q = extend(q, layer, slice(len(q.mean) - layer.matrix.shape[1], None))
        order = [5, 6, 3, 4, 0, 1, 2]  # (z1, z2, z3) as (z3, z2, z1)
        gap.append(kl(Joint(q.mean[order], q.covariance[np.ix_(order, order)]), EXACT.posterior(x)))
    found = program(engine, LINEAR, EXACT.decoder_weights() | encoder_weights(layers, full=False))
    gaps = EXACT.log_evidence(X) - found.apply(log_weight, (X,), num_particles=4000, seed=2)
    error = gaps.std(axis=0, ddof=1) / len(gaps) ** 0.5
    assert (abs(gaps.mean(axis=0) - gap) < 4 * error).all()
    assert (4 * error < 0.1 * np.array(gap)).all(), "no power"


@PYRO_ALONE
def test_one_layer_is_the_vae(engine: str) -> None:
    one, vae = HierarchicalVAE(6, (3,), (5,), depth=2), VAE(6, 3, network=MLP((5, 5)))
    weights = getattr(vae, engine)().with_weights(random_weights(vae)).weights
    renamed = {name.replace("coder.", "coders.0."): array for name, array in weights.items()}
    x, z = (np.random.default_rng(0).random((4, 6)) < 0.5) * 1.0, np.random.default_rng(1).normal(size=(2, 4, 3))
    expected = program(engine, vae, weights).apply(log_weight, (x,), values={"z": z})
    found = program(engine, one, renamed).apply(log_weight, (x,), values={"z1": z})
    np.testing.assert_allclose(found, expected, 1e-12)


def random_weights(spec: Any) -> dict[str, np.ndarray]:
    from test_twins import random_weights

    return random_weights(spec)


def has_kl(terms: Any) -> dict[str, float]:
    return {name: float(site.kl is not None) for name, site in terms.sites.items()}


@PYRO_ALONE
def test_climbing_no_kl_has_a_closed_form(engine: str) -> None:
    found = exact_program(engine).apply(has_kl, (X,), analytic_kl=True)
    assert {name: bool(v) for name, v in found.items()} == {"z1": False, "z2": False, "z3": False}


@covering("objective", (ELBO(), IWAE(3)), numpyro=(), ids=str)  # benchmarks/hierarchy.py trains it in NumPyro
def test_it_trains(engine: str, objective: Any) -> None:
    x = (np.random.default_rng(0).random((64, 6)) < 0.5) * 1.0
    spec = HierarchicalVAE(6, (4, 3, 2), (8, 6, 4), depth=1)
    run = fit(getattr(spec, engine)(), x, objective=objective, epochs=2, batch_size=32, progress=False)
    assert {"kl_z1", "kl_z2", "kl_z3"} <= set(run.history[-1])
    found = evaluate(run.program, x[:8], num_particles=50)
    assert np.isfinite(found.nll)
    assert set(run.to_arviz(x[:4], num_draws=10).posterior.data_vars) == {"z1", "z2", "z3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dims": (), "hidden": ()}, "latent_dims must have at least one layer; got"),
        ({"latent_dims": (4, 0)}, "every entry of latent_dims must be a whole number of at least 1; got 0"),
        ({"latent_dims": 4}, "latent_dims must be a tuple of whole numbers; got 4"),
        ({"latent_dims": (4, 3, 2)}, "hidden must have one entry for each of the 3 layers of latent_dims; got"),
        ({"depth": -1}, "depth must be a whole number of at least 0; got -1"),
        ({"normalization": "batch"}, "normalization must be one of .*; got 'batch'"),
        ({"activation": "tan"}, "activation must be one of .*; got 'tan'"),
        ({"guide": FullCovarianceGaussian}, "guide must be a Family; got"),
        ({"guide": SemiAmortised()}, "guide must be one that does not climb .*; got SemiAmortised"),
        ({"prior": VampPrior()}, r"prior must be one that is not made of q\(z_L \| x\).*Use LadderVAE"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        HierarchicalVAE(**settings)


@PYRO_ALONE  # written once for both engines
def test_weights_of_other_layers_are_refused(engine: str) -> None:
    weights = random_weights(TWINS[0])
    with pytest.raises(InvalidArgument, match="weights"):
        getattr(HierarchicalVAE(6, (4, 3), (5, 4)), engine)().with_weights(weights)
    with pytest.raises(InvalidArgument, match="must have shape"):
        getattr(HierarchicalVAE(6, (4, 3, 3), (5, 4, 3)), engine)().with_weights(weights)


def test_a_guide_for_other_latents_is_refused(engine: str) -> None:
    model, guide = (getattr(HierarchicalVAE(6, dims, (4, 4)), engine)() for dims in ((3, 2), (3, 3)))
    mixed = type(model)(model.model, guide.guide)
    message = (
        r"the guide's site 'z2' must have the model's event shape \(2,\); got \(3,\)\. Build model and guide from one"
    )
    with pytest.raises(InvalidArgument, match=message):
        fit(mixed, np.zeros((8, 6)), epochs=1, progress=False)


def test_last_layers_begin_at_their_share_of_glorots_bound(engine: str) -> None:
    from test_twins import initial_weights

    spec = HierarchicalVAE(40, (30, 20), (50, 40), depth=1, output_gain=0.1)
    for name, array in initial_weights(engine, spec).items():
        if name.endswith(".weight"):
            bound = (6 / sum(array.shape)) ** 0.5 * (0.1 if ".layers.1." in name else 1.0)
            assert 0.9 * bound < np.abs(array).max() <= bound, name


def test_hidden_layers_begin_at_their_share_of_glorots_bound(engine: str) -> None:
    from test_twins import initial_weights

    network = MLP((50, 40), hidden_gain=0.02, output_gain=0.5)
    for name, array in initial_weights(engine, VAE(40, 10, network)).items():
        if name.endswith(".weight"):
            bound = (6 / sum(array.shape)) ** 0.5 * (0.5 if ".layers.2." in name else 0.02)
            assert 0.9 * bound < np.abs(array).max() <= bound, name
