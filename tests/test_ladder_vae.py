"""LadderVAE: its twins, and what is exact about a guide that merges evidence by precision."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from linear_hierarchy import Affine, Joint, LinearHierarchy, encoder_weights, extend, kl
from test_hierarchical_vae import BOUNDS, bound_of, has_kl, log_weight, program

from elbozoo.inference import ELBO, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import Gaussian, LadderVAE, VampPrior

TWINS = [
    LadderVAE(data_dim=6, latent_dims=(4, 3, 2), hidden=(5, 4, 3)),
    LadderVAE(
        6, (3, 2), (5, 4), depth=1, normalization="layer", activation="tanh", likelihood=Gaussian(), prior=VampPrior(4)
    ),
    LadderVAE(6, (3,), (5,), depth=0, likelihood=Gaussian(scale=0.5)),
]

# With one latent a layer, no precision is a matrix, and the ladder's family holds the exact posterior.
EXACT = LinearHierarchy.random(data_dim=5, dims=(1, 1, 1), seed=1)
SPEC = LadderVAE(5, (1, 1, 1), (1, 1, 1), depth=0, likelihood=Gaussian(scale=0.6))
WIDE = LinearHierarchy.random(data_dim=5, dims=(3, 2, 2), seed=1)
X = np.random.default_rng(2).normal(scale=2.0, size=(4, 5))


def evidence(layer: int) -> Affine:
    """What the data say of ``z_layer`` when they are all that is known below: ``p(x | z_layer)`` as a Gaussian in it."""
    matrix, offset, covariance = EXACT.steps[0]
    for step in EXACT.steps[1:layer]:
        offset, covariance = matrix @ step.offset + offset, matrix @ step.covariance @ matrix.T + covariance
        matrix = matrix @ step.matrix
    information = matrix.T @ np.linalg.inv(covariance)
    variance = np.linalg.inv(information @ matrix)
    return Affine(variance @ information, -variance @ information @ offset, variance)


@cache
def exact_program(engine: str) -> Any:
    top = evidence(3)  # not merged with the prior by the guide, so by us
    variance = 1 / (1 / top.covariance + 1)
    layers = [evidence(1), evidence(2), Affine(*(variance / top.covariance * part for part in top[:2]), variance)]
    layers[2] = layers[2]._replace(offset=layers[2].offset.reshape(1))
    return program(engine, SPEC, EXACT.decoder_weights() | encoder_weights(layers, softplus=True))


@covering("bound", BOUNDS, numpyro=(0, len(BOUNDS) - 1), ids=lambda b: repr(b).split(", gradient")[0])
def test_every_bound_is_the_evidence_under_the_exact_guide(engine: str, bound: Any) -> None:
    found = exact_program(engine).apply(partial(bound_of, bound), (X,), num_particles=bound.num_particles)
    np.testing.assert_allclose(found, EXACT.log_evidence(X), atol=1e-10)


@PYRO_ALONE  # written once for both engines
def test_the_gap_of_any_linear_ladder_is_the_kl_of_two_joint_gaussians(engine: str) -> None:
    rng = np.random.default_rng(5)
    layers = [
        Affine(0.2 * rng.normal(size=(dim, 5)), 0.1 * rng.normal(size=dim), np.diag(rng.uniform(0.2, 0.6, dim)))
        for dim in WIDE.dims
    ]
    gap = []
    for x in X:
        q = None
        for i in (2, 1, 0):
            m, S = layers[i].matrix @ x + layers[i].offset, layers[i].covariance
            if q is None:
                q = Joint(m, S)
                continue
            step = WIDE.steps[i + 1]
            variance = np.linalg.inv(np.linalg.inv(S) + np.linalg.inv(step.covariance))
            share = variance @ np.linalg.inv(step.covariance)
            offset = variance @ np.linalg.inv(S) @ m + share @ step.offset
            q = extend(q, Affine(share @ step.matrix, offset, variance), slice(len(q.mean) - WIDE.dims[i + 1], None))
        assert q is not None
        gap.append(kl(q, WIDE.posterior(x)))
    spec = LadderVAE(5, WIDE.dims, (1, 1, 1), depth=0, likelihood=Gaussian(scale=0.6))
    found = program(engine, spec, WIDE.decoder_weights() | encoder_weights(layers, softplus=True))
    for analytic in (False, True):
        gaps = WIDE.log_evidence(X) - found.apply(log_weight, (X,), num_particles=4000, seed=2, analytic_kl=analytic)
        error = gaps.std(axis=0, ddof=1) / len(gaps) ** 0.5
        assert (abs(gaps.mean(axis=0) - gap) < 4 * error).all()
        assert (4 * error < 0.1 * np.array(gap)).all(), "no power"


@PYRO_ALONE
def test_every_kl_has_its_closed_form_given_the_layers_above(engine: str) -> None:
    found = exact_program(engine).apply(has_kl, (X,), analytic_kl=True)
    assert {name: bool(v) for name, v in found.items()} == {"z1": True, "z2": True, "z3": True}


@pytest.mark.parametrize("engine", ["numpyro"])  # and read by Pyro
def test_the_generative_path_is_shared(engine: str) -> None:
    """One set of decoders, which training moves in both roles."""
    x = (np.random.default_rng(0).random((64, 6)) < 0.5) * 1.0
    spec = LadderVAE(6, (4, 3, 2), (8, 6, 4), depth=1)
    run = fit(getattr(spec, engine)(), x, objective=ELBO(), epochs=2, batch_size=32, progress=False)
    assert {name.split(".")[0] for name in run.weights} == {"decoders", "encoders"}
    other = getattr(spec, "pyro" if engine == "numpyro" else "numpyro")().with_weights(run.weights)
    z = {f"z{i + 1}": np.random.default_rng(i).normal(size=(2, 4, dim)) for i, dim in enumerate(spec.latent_dims)}
    mine, theirs = (p.apply(log_weight, (x[:4],), values=z) for p in (run.program, other))
    np.testing.assert_allclose(theirs, mine, 1e-10)


@pytest.mark.parametrize("engine", ["numpyro"])  # in Pyro they are runs one after the other
def test_replicates(engine: str) -> None:
    x = (np.random.default_rng(0).random((64, 6)) < 0.5) * 1.0
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 32, "progress": False}
    spec = LadderVAE(6, (4, 3), (8, 6), depth=1)
    runs = fit(getattr(spec, engine)(), x, **settings, replicates=2)
    alone = fit(getattr(spec, engine)(), x, **settings, seed=1)
    for name, array in alone.weights.items():
        np.testing.assert_allclose(runs[1].weights[name], array, 1e-9, 1e-12)
        assert not np.array_equal(runs[0].weights[name], array) or name.endswith("bias")


def test_rungs_and_decoders_begin_at_shares_of_glorots_bound_of_their_own(engine: str) -> None:
    from test_twins import initial_weights

    spec = LadderVAE(40, (30, 20), (50, 60), depth=1, output_gain=0.1, hidden_gain=2.0, evidence_gain=3.0)
    last = {"encoders": 3.0, "decoders": 0.1}
    for name, array in initial_weights(engine, spec).items():
        if name.endswith(".weight"):
            gain = last[name.split(".")[0]] if ".layers.1." in name else 2.0
            bound = gain * (6 / sum(array.shape)) ** 0.5
            assert 0.9 * bound < np.abs(array).max() <= bound, name


@PYRO_ALONE  # the spec says it to both engines, and the test above holds NumPyro to it
def test_the_top_rung_sees_the_data_from_the_start(engine: str) -> None:
    """He's gain keeps rectified features' size up five rungs; with Glorot's the last evidence begins at a constant."""
    from test_twins import initial_weights

    x = np.random.default_rng(0).normal(size=(64, 100))

    def spread(**gains: float) -> float:
        spec = LadderVAE(100, (4,) * 5, (100,) * 5, **gains)
        weights, features = initial_weights(engine, spec), x
        for rung in range(5):
            for layer in range(2):
                z = features @ weights[f"encoders.{rung}.layers.{layer}.weight"].T
                features = np.where(z > 0, z, 0.01 * z)
        loc = (features @ weights["encoders.4.layers.2.weight"].T)[:, :4]
        return float(loc.std(0).mean())

    assert spread() > 5 * spread(hidden_gain=1.0)
    assert spread() > 5 * spread(evidence_gain=0.1)


def test_bad_gains() -> None:
    for name in ("evidence_gain", "hidden_gain", "output_gain"):
        with pytest.raises(InvalidArgument, match=f"{name} must be .*; got 0"):
            LadderVAE(**{name: 0})
