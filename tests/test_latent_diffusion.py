"""LatentDiffusion: its twins, its bound where everything is Gaussian, two stages, frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE
from scipy import stats
from test_diffusion_vae import hermite, noise

from elbozoo.guides import FullCovarianceGaussian, SemiAmortised
from elbozoo.inference import ELBO, IWAE, Adam, FirstStage, evaluate, fit
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.zoo import (
    MLP,
    VAE,
    Gaussian,
    GaussianDenoiser,
    LatentDiffusion,
    LearnedSchedule,
    LinearSchedule,
    MLPDenoiser,
    UNet,
)
from elbozoo.zoo.diffusion.sampling import draw

NETWORK, SMALL = MLP((5,)), MLPDenoiser(units=6, num_layers=1)
TWINS = [
    LatentDiffusion(6, 3, NETWORK, denoiser=SMALL),
    LatentDiffusion(
        6,
        3,
        NETWORK,
        Gaussian("learned"),
        FullCovarianceGaussian(),
        SMALL,
        "velocity",
        LearnedSchedule(5.0, -4.0, schedule_units=3),
    ),
]
LINEAR = LatentDiffusion(
    2, 1, MLP(()), Gaussian(scale=0.5), denoiser=GaussianDenoiser(), predicts="signal", schedule=LinearSchedule(9.0, -9.0)
)  # fmt: skip
WEIGHTS = {
    "decoder.layers.0.weight": np.array([[0.8], [-0.3]]),
    "decoder.layers.0.bias": np.array([0.1, 0.2]),
    "encoder.layers.0.weight": np.array([[0.6, -0.2], [0.0, 0.0]]),
    "encoder.layers.0.bias": np.array([0.1, -0.7]),
}
X = np.array([[0.5, -1.0], [1.5, 0.3]])


@PYRO_ALONE
def test_with_the_exact_denoiser_the_bound_is_the_vaes(engine: str) -> None:
    """``E_q[the diffusion's ELBO of z]`` is ``E_q[log N(z; 0, 1)]``, up to what its ends do not reach."""
    given = getattr(LINEAR, engine)().with_weights(WEIGHTS)
    nodes, weights = hermite(3)
    gauss, share = np.polynomial.legendre.leggauss(40)
    time = np.concatenate([(i + (gauss + 1) / 2) / 4 for i in range(4)])
    alpha, sigma = noise(9.0 - 18.0 * time)
    loc, scale = X @ WEIGHTS["encoder.layers.0.weight"][0] + 0.1, np.exp(-0.7)
    z = loc + scale * nodes[:, None]  # (3, B)
    noisy = alpha[:, None, None, None] * z + sigma[:, None, None, None] * nodes[:, None, None]  # time, e, z, B
    shape = noisy.shape
    ends = [a * z + s * nodes[:, None, None] for a, s in (noise(9.0), noise(-9.0))]  # e, z, B
    values = {
        "z": np.broadcast_to(z, shape), "time": np.broadcast_to(time[:, None, None, None], shape), "noisy": noisy,
        "z0": np.broadcast_to(ends[0], shape), "z1": np.broadcast_to(ends[1], shape),
    }  # fmt: skip
    flat = {n: v.reshape(-1, 2) if n == "time" else v.reshape(-1, 2, 1) for n, v in values.items()}
    found = given.apply(lambda terms: terms.log_weight, (X,), values=flat, analytic_kl=True).reshape(shape)
    bound = np.einsum("tezb,t,e,z->b", found, np.tile(share / 8, 4), weights, weights)
    vae = getattr(LINEAR.vae(), engine)().with_weights(WEIGHTS)
    want = np.einsum(
        "zb,z->b", vae.apply(lambda terms: terms.log_weight, (X,), values={"z": z[..., None]}), weights
    )  # of a quadratic: three nodes are exact
    np.testing.assert_allclose(bound, want, atol=2e-3)
    assert np.abs(bound - want).max() > 0, "the ends leave something out"


@PYRO_ALONE
def test_it_is_no_weight(engine: str) -> None:
    given = getattr(LINEAR, engine)().with_weights(WEIGHTS)
    with pytest.raises(Refused, match="must weigh all that it draws"):
        IWAE(2).check(given.outline((X,)))
    found = evaluate(given, X, num_particles=2000)
    assert not found.weighted
    vae = evaluate(getattr(LINEAR.vae(), engine)().with_weights(WEIGHTS), X, num_particles=2000)
    assert found.nll == pytest.approx(-vae.elbo, abs=4.5 * (found.nll_mc_se + vae.nll_mc_se))
    assert found.nll_mc_se < 0.2


def test_draws_have_the_priors_marginal(engine: str) -> None:
    given = getattr(replace(LINEAR, sampling_steps=100), engine)().with_weights(WEIGHTS)
    drawn = given.predict((np.tile(X, (400, 1)),), num_particles=2, prior=True)
    assert stats.kstest(drawn["latent"]["z"].ravel(), "norm").pvalue > 1e-3
    assert drawn["observed"]["x"].shape == (2, 800, 2)


def test_two_stages(engine: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.random((256, 6)) < 0.3).astype(np.float32)
    frozen = ("encoder", "decoder")
    spec, options = TWINS[0], {"epochs": 2, "batch_size": 64, "progress": False, "seed": 3}
    run = fit(getattr(spec, engine)(), x, start=FirstStage(epochs=2), frozen=frozen, **options)
    before = fit(getattr(spec, engine)(), x, start=FirstStage(epochs=2), frozen=frozen, **options | {"epochs": 1})
    for name, value in run.program.weights.items():
        assert np.array_equal(value, before.program.weights[name]) == name.startswith(frozen), name
    alone = fit(getattr(spec, engine)(), x, frozen=frozen, **options)
    assert not np.array_equal(
        run.program.weights["encoder.layers.0.weight"], alone.program.weights["encoder.layers.0.weight"]
    )
    assert run.config["frozen"] == list(frozen)


def test_frozen_weights_stay_whatever_the_optimiser(engine: str) -> None:
    x = (np.random.default_rng(0).random((64, 6)) < 0.5).astype(np.float32)
    spec = VAE(6, 2, MLP((4, 3)))
    first = fit(getattr(spec, engine)(), x, epochs=1, batch_size=64, progress=False)
    optimizer: Any = Adam(1e-2, average=0.9)
    run = fit(
        first.program, x, epochs=3, batch_size=16, progress=False, frozen=("decoder.layers.1",), optimizer=optimizer
    )
    same = {n for n, v in run.program.weights.items() if np.array_equal(v, first.program.weights[n])}
    assert same == {"decoder.layers.1.weight", "decoder.layers.1.bias"}
    with pytest.raises(InvalidArgument, match="frozen must hold beginnings of the names of weights; got 'decode'"):
        fit(first.program, x, epochs=1, progress=False, frozen=("decode",))
    with pytest.raises(InvalidArgument, match="frozen must leave a parameter to train"):
        fit(first.program, x, epochs=1, progress=False, frozen=("decoder", "encoder"))


@PYRO_ALONE
def test_what_does_not_fit(engine: str) -> None:
    with pytest.raises(InvalidArgument, match="image_shape must have data_dim=3 entries"):
        LatentDiffusion(6, 3, NETWORK, denoiser=UNet((1, 2, 2), (4,)))
    with pytest.raises(InvalidArgument, match=r"predicts must be one of \['signal'\]"):
        LatentDiffusion(6, 3, NETWORK, denoiser=GaussianDenoiser())
    with pytest.raises(InvalidArgument, match="guide must be one that does not climb"):
        LatentDiffusion(6, 3, NETWORK, guide=SemiAmortised())
    with pytest.raises(InvalidArgument, match="latent_dim must be a whole number"):
        LatentDiffusion(6, 0, NETWORK)
    with pytest.raises(InvalidArgument, match="program must be a diffusion of data; got LatentDiffusion"):
        draw(getattr(TWINS[0], engine)(), 2)
    x = np.zeros((4, 6), np.float32)
    with pytest.raises(InvalidArgument, match="FirstStage must start a LatentDiffusion; got VAE"):
        fit(getattr(VAE(6, 2), engine)(), x, start=FirstStage(), epochs=1, progress=False, objective=ELBO())
