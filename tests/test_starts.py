"""Where training begins: at the closed forms of the linear model, in both engines; and what is left of the phase.

With all data in one minibatch an epoch is one step, whose row of the history is computed before its update: the first row is
the start itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from programs import data, program
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import multivariate_normal

from elbozoo.inference import (
    ELBO,
    IWAE,
    NVIL,
    PPCA,
    Adam,
    AnnealedKL,
    Beta,
    Collapsed,
    DataMean,
    DReG,
    Informative,
    NonFinite,
    Run,
    StraightThrough,
    fit,
)
from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.training import to_config
from elbozoo.zoo import (
    MLP,
    VAE,
    VQVAE,
    Bernoulli,
    Codebook,
    ContinuousBernoulli,
    Conv,
    DeepHierarchicalVAE,
    DiscretizedLogistic,
    FullyConv,
    Gaussian,
    HierarchicalVAE,
    HierarchicalVQVAE,
    LadderVAE,
    LinearVAE,
    SigmoidBeliefNet,
)

EIGENVALUES = np.array([9.0, 3.0, 1.0, 0.3, 0.1])
AXES = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
MEAN = np.array([1.0, -2.0, 0.0, 3.0, 0.5])
S2 = 0.5  # three directions are above it
LINEAR = LinearVAE(data_dim=5, latent_dim=4, scale=float(np.sqrt(S2)))


def whitened(num_data: int = 1000) -> np.ndarray:
    """Data whose sample mean and covariance (divided by N) are exactly MEAN and the target."""
    noise = np.random.default_rng(0).normal(size=(num_data, 5))
    basis = np.linalg.svd(noise - noise.mean(axis=0), full_matrices=False)[0]
    return MEAN + np.sqrt(num_data * EIGENVALUES) * basis @ AXES.T


DATA = whitened()


def begin(engine: str, spec: Any = LINEAR, **options: Any) -> Any:
    """One step on all the data."""
    defaults: dict[str, Any] = {"epochs": 1, "batch_size": len(DATA), "learning_rate": 0.03, "progress": False}
    return fit(getattr(spec, engine)(), DATA, **(defaults | options))


@dataclass(frozen=True)
class Falling:
    """A learning rate that falls to 0 in a straight line."""

    rate: float
    steps: int

    def __call__(self, step: Any) -> Any:
        return self.rate * (1.0 - step / self.steps)


def log_likelihood(s2: float, latents: int) -> float:
    """The maximum of the pPCA likelihood (Tipping & Bishop 1999), by SciPy's density."""
    kept = np.where(np.arange(5) < latents, np.maximum(EIGENVALUES, s2), s2)
    return float(multivariate_normal(MEAN, AXES * kept @ AXES.T).logpdf(DATA).mean())


def same_weights(one: Run, two: Run) -> bool:
    return all(np.array_equal(one.weights[n], two.weights[n]) for n in two.weights)


# --- where it is ----------------------------------------------------------------------------------------------------


def test_collapsed_has_given_up_every_direction(engine: str) -> None:
    """βσ² = 500 is above every eigenvalue: the guide is the prior, and the data cost what N(mean, σ² I) says."""
    run = begin(engine, start=Collapsed(epochs=150))
    row = run.history[0]
    assert row["rate"] < 0.01
    assert run.config["phase"]["live_z"] == 0
    assert row["live_z"] == 0
    without = 0.5 * (EIGENVALUES.sum() / S2 + 5 * np.log(2 * np.pi * S2))
    # What Adam leaves of the model's weights, some hundredths of which a draw of z is added by, and of the mean.
    assert row["distortion"] == pytest.approx(without, abs=0.2)


@PYRO_ALONE
def test_informative_is_the_closed_form_at_its_beta(engine: str) -> None:
    """One latent for the largest of the directions: KL = ½ log(λ / βσ²), which at β = 1 would be 0.35 less."""
    spec, start = LinearVAE(5, 1, scale=float(np.sqrt(S2))), Informative(epochs=300, beta=0.5)
    row = begin(engine, spec, start=start, learning_rate=Falling(0.1, 300)).history[0]
    assert row["rate"] == pytest.approx(0.5 * np.log(EIGENVALUES[0] / (0.5 * S2)), abs=0.05)
    assert row["live_z"] == 1


@PYRO_ALONE  # written once for both engines
def test_the_default_informative_start_has_more_than_the_bound_will_keep(engine: str) -> None:
    row = begin(engine, start=Informative(epochs=100)).history[0]
    assert row["rate"] > 2 * 0.5 * np.log(EIGENVALUES[:3] / S2).sum()
    assert row["live_z"] == 4  # at β = 1 the last of them is worth less than it costs


@covering("guide", ("diagonal", "full"), numpyro=())
def test_ppca_is_the_optimum_of_the_linear_model(engine: str, guide: str) -> None:
    """The guide is exact there, so the sampled bound is log p(x) for every datum, whatever is drawn."""
    spec = LinearVAE(data_dim=5, latent_dim=3, learn_scale=True, guide=guide)
    row = begin(engine, spec, start=PPCA(), objective=ELBO(analytic_kl=False)).history[0]
    assert row["bound"] == pytest.approx(log_likelihood(0.2, 3), rel=1e-10)


def test_ppca_teaches_a_vae(engine: str) -> None:
    """A linear decoder and encoder can learn all that the teacher knows.

    The bound is the likelihood's maximum at one place alone: where the model is pPCA and the guide its posterior.
    """
    spec, small = VAE(5, 3, MLP(hidden=()), Gaussian("learned")), 0.3 * (DATA - MEAN)
    options: dict[str, Any] = {"epochs": 1, "batch_size": len(small), "learning_rate": Falling(0.1, 200)}
    options |= {"objective": ELBO(analytic_kl=False), "progress": False}
    run = fit(getattr(spec, engine)(), small, start=PPCA(epochs=200), **options)
    best = log_likelihood(0.2, 3) - 5 * np.log(0.3)
    assert run.history[0]["bound"] == pytest.approx(best, abs=0.01)


@PYRO_ALONE
def test_live_dimensions_are_counted_by_their_mean_kl(engine: str) -> None:
    """Of given weights, by the closed form of a Gaussian's KL to the prior; where the guide factorises alone."""
    weights = LINEAR.optimum(DATA)
    weights["encoder.weight"] = np.diag([1.0, 0.05, 0.16, 0.0]) @ AXES.T[:4] / np.sqrt(EIGENVALUES[:4, None])
    weights["encoder.bias"] = -weights["encoder.weight"] @ MEAN
    weights["encoder_log_scale"] = np.zeros(4)  # so the KL is half the variance of the mean: 0.5, 0.00125, 0.0128, 0
    for objective in (ELBO(), IWAE(num_particles=30)):  # in closed form, and from draws
        options: dict[str, Any] = {"batch_size": len(DATA), "epochs": 1, "progress": False, "objective": objective}
        run = fit(getattr(LINEAR, engine)().with_weights(weights), DATA, **options)
        assert run.history[0]["live_z"] == 2
    full = begin(engine, LinearVAE(5, 4, guide="full"))
    assert "live_z" not in full.history[0]


# --- what is left of the phase --------------------------------------------------------------------------------------


def adam_by_hand(mu: np.ndarray, steps: int) -> np.ndarray:
    """Kingma & Ba 2015, algorithm 1, on ``mean log N(x; mu, 1)``."""
    m, v = np.zeros(3), np.zeros(3)
    for t in range(1, steps + 1):
        gradient = mu - data().mean(axis=0)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        mu = mu - 0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return mu


@PYRO_ALONE
@pytest.mark.parametrize("start", [Collapsed(epochs=2), Informative(epochs=2)], ids=str)
def test_the_optimiser_starts_anew(engine: str, start: Any) -> None:
    """A program whose gradient has neither noise nor rate: two steps of Adam, and then three of another."""
    options: dict[str, Any] = {"epochs": 3, "batch_size": 1000, "learning_rate": 0.1, "progress": False}
    run = fit(program(engine, "location"), data(), start=start, **options)
    np.testing.assert_allclose(run.weights["mu"], adam_by_hand(adam_by_hand(np.zeros(3), 2), 3), rtol=1e-12)
    assert not np.allclose(run.weights["mu"], adam_by_hand(np.zeros(3), 5), rtol=1e-6)
    assert [(row["epoch"], row["step"]) for row in run.history] == [(1, 1), (2, 2), (3, 3)]
    assert run.config["start"] == to_config(start)


@PYRO_ALONE  # written once for both engines
def test_a_schedule_starts_after_the_phase(engine: str) -> None:
    objective = AnnealedKL(ELBO(), warmup=4)
    run = begin(engine, start=Informative(epochs=3), objective=objective, epochs=4)
    assert [row["beta"] for row in run.history] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.numpyro
def test_the_phase_is_a_training_of_its_own() -> None:
    """Two calls of fit, the second from the first one's weights, are the one with a start, to the bit."""
    whole = begin("numpyro", start=Collapsed(epochs=3, beta=2.0), epochs=4)
    first = begin("numpyro", objective=Beta(ELBO(), 2.0), epochs=3)
    options: dict[str, Any] = {"epochs": 4, "batch_size": len(DATA), "learning_rate": 0.03, "progress": False}
    assert same_weights(whole, fit(first.program, DATA, **options))


STARTS = {"collapsed": Collapsed(epochs=2), "informative": Informative(epochs=2), "ppca": PPCA(epochs=2)}
SMALL = VAE(5, 2, MLP(hidden=(3,)), Gaussian())


@covering("name", ["ppca", "informative"])
def test_stopped_and_resumed_to_the_bit(engine: str, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"start": STARTS[name], "batch_size": 300, "objective": AnnealedKL(ELBO(), warmup=2)}
    whole = begin(engine, SMALL, epochs=4, **options)
    begin(engine, SMALL, epochs=2, directory=tmp_path, **options)
    resumed = begin(engine, SMALL, epochs=4, directory=tmp_path, resume=True, **options)
    assert same_weights(whole, resumed)
    assert [row["bound"] for row in whole.history] == [row["bound"] for row in resumed.history]
    assert whole.config["phase"] == resumed.config["phase"]
    assert whole.config["phase"]["epoch"] == 2
    assert Run.load(tmp_path).config["start"] == to_config(STARTS[name])
    with pytest.raises(InvalidArgument, match="different start"):
        begin(engine, SMALL, epochs=4, directory=tmp_path, resume=True, **(options | {"start": None}))


@pytest.mark.parametrize(("engine", "name"), [("numpyro", "ppca"), ("pyro", "collapsed")])
def test_replicates_are_the_seeds_alone(engine: str, name: str) -> None:
    options: dict[str, Any] = {"start": STARTS[name], "batch_size": 300, "epochs": 2}
    both = begin(engine, SMALL, replicates=2, **options)
    for seed, run in enumerate(both):
        alone = begin(engine, SMALL, seed=seed, **options)
        for weight in alone.weights:
            np.testing.assert_allclose(run.weights[weight], alone.weights[weight], rtol=1e-6, atol=1e-9)
    assert not same_weights(*both)


@PYRO_ALONE  # written once for both engines
def test_an_objective_keeps_its_gradient_in_the_phase(engine: str) -> None:
    run = begin(engine, start=Collapsed(epochs=150), objective=IWAE(3, gradient=DReG()))
    assert run.history[0]["rate"] < 0.05


# --- what cannot be -------------------------------------------------------------------------------------------------


@PYRO_ALONE
def test_bad_starts_are_refused(engine: str) -> None:
    for options, text in [
        ({"start": "collapsed"}, "start must be a Start; got 'collapsed'"),
        ({"start": Collapsed}, r"start must be a Start; .*Pass Collapsed\(\)"),
        (
            {"spec": VAE(5, 5, MLP(hidden=()), Gaussian()), "start": PPCA()},
            "data must vary in more directions .* 5 for",
        ),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            begin(engine, **options)
    with pytest.raises(InvalidArgument, match="PPCA must start a LinearVAE or a VAE.*; got a program that is not of"):
        fit(program(engine, "location"), data(), start=PPCA(), progress=False)
    with pytest.raises(InvalidArgument, match="epochs must be a whole number of at least 1"):
        Collapsed(epochs=0)
    with pytest.raises(InvalidArgument, match="beta must be finite and at least 0"):
        Informative(beta=-1.0)


@PYRO_ALONE
def test_a_phase_that_diverges_says_so(engine: str) -> None:
    with pytest.raises(NonFinite, match="of the starting phase"):
        begin(engine, start=Informative(epochs=5), learning_rate=1e200)


# --- the data's mean ------------------------------------------------------------------------------------------------

SHARES = np.linspace(0.05, 0.9, 16)
PIXELS = (np.random.default_rng(3).random((40, 16)) < SHARES) * 1.0
PIXELS[:, 0], PIXELS[:, 15] = 0.0, 1.0  # whose odds are infinite
IMAGE = (1, 4, 4)
BIASES = {
    VAE(16, 3, MLP((5,))): "decoder.layers.1.bias",
    VAE(16, 3, MLP((5,)), Gaussian("pixel")): "decoder.layers.1.bias",
    VAE(16, 3, Conv(IMAGE, (3,), 6), DiscretizedLogistic(levels=2)): "decoder.convs.0.bias",
    HierarchicalVAE(16, (3, 2), (4, 4), depth=1): "decoders.0.layers.1.bias",
    LadderVAE(16, (3, 2), (4, 4), depth=1): "decoders.0.layers.1.bias",
    SigmoidBeliefNet(16, (3, 2)): "decoders.0.layers.0.bias",
    VQVAE(16, 4, FullyConv(IMAGE, (3,)), Codebook(4, 3)): "decoder.convs.1.bias",
    HierarchicalVQVAE(IMAGE, (3,), (4,), quantizer=Codebook(4, 3)): "decoders.0.convs.1.bias",
    LinearVAE(16, 3): "decoder.bias",
}


def at_the_start(engine: str, spec: Any, **options: Any) -> Any:
    """A training whose one step is so small that weights but 0 stay what they are to the last digit."""
    gradient = {SigmoidBeliefNet: NVIL(), VQVAE: StraightThrough(), HierarchicalVQVAE: StraightThrough()}.get(
        type(spec)
    )
    objective = ELBO() if gradient is None else ELBO(gradient=gradient)
    defaults = {"objective": objective, "epochs": 1, "batch_size": 40, "optimizer": Adam(1e-30), "progress": False}
    return fit(getattr(spec, engine)(), PIXELS, **(defaults | options))


@covering("spec", list(BIASES), numpyro=(0, 2, 3), ids=lambda spec: type(spec).__name__)
def test_data_mean_sets_one_bias_and_nothing_else(engine: str, spec: Any) -> None:
    plain, moved = at_the_start(engine, spec).weights, at_the_start(engine, spec, start=DataMean()).weights
    assert {n for n in moved if np.abs(moved[n] - plain[n]).max() > 1e-20} == {BIASES[spec]}
    bias, mean = moved[BIASES[spec]], PIXELS.mean(axis=0)
    if "convs" in BIASES[spec]:
        of_all = PIXELS.mean()
        expected = [of_all, 0.0] if spec.likelihood.num_outputs == 2 else [np.log(of_all / (1 - of_all))]
        np.testing.assert_allclose(bias, expected, 1e-12, 1e-20)
    elif type(spec) is LinearVAE or spec.likelihood == Gaussian("pixel"):
        np.testing.assert_allclose(bias, np.concatenate([mean, np.zeros(len(bias) - 16)]), 1e-12, 1e-20)
    else:
        np.testing.assert_allclose(expit(bias[1:-1]), mean[1:-1], 1e-12, 1e-20)
        np.testing.assert_allclose(expit(bias[[0, -1]]), [0.001, 0.999], 1e-12)


def test_data_mean_starts_every_replicate(engine: str) -> None:
    spec = next(iter(BIASES))
    runs = at_the_start(engine, spec, start=DataMean(), replicates=2)
    first, second = (run.weights for run in runs)
    np.testing.assert_allclose(first[BIASES[spec]], second[BIASES[spec]], 0, 1e-20)
    assert not np.array_equal(first["decoder.layers.0.weight"], second["decoder.layers.0.weight"])
    assert to_config(DataMean()) == {"class": "DataMean", "epochs": 0}


def test_outputs_of_a_mean_have_that_mean() -> None:
    mean = np.array([0.001, 0.02, 0.3, 0.5, 0.77, 0.999])
    for m, logit in zip(mean, ContinuousBernoulli().outputs_of_mean(mean), strict=True):
        total, first = (
            quad(lambda x, n=n, a=logit: x**n * np.exp(a * x - max(a, 0)), 0, 1, limit=500)[0] for n in (0, 1)
        )
        assert first / total == pytest.approx(m, rel=1e-7)
    np.testing.assert_allclose(expit(Bernoulli().outputs_of_mean(mean)), mean, 1e-12)


def test_data_mean_refuses_what_has_no_such_bias() -> None:
    deep = DeepHierarchicalVAE(IMAGE, 2, 3, 2, 2, (1, 3), DiscretizedLogistic(levels=2))
    with pytest.raises(InvalidArgument, match="DataMean must start a model with a network that ends in a bias"):
        at_the_start("pyro", deep, start=DataMean())
    with pytest.raises(InvalidArgument, match="DataMean must start a model"):
        fit(program("pyro", "location"), data(), start=DataMean(), epochs=1, progress=False)
