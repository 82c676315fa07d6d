"""The guide against NUTS: exact posteriors of conjugate models in both engines, and energy distances by SciPy.

What goes through ArviZ runs under ArviZ 0.23 and 1.x.
"""

from __future__ import annotations

import itertools
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from matplotlib import pyplot
from oracles import library, shared_latent, wrapped
from scipy import integrate, stats

from elbozoo.inference import ground_truth
from elbozoo.inference.errors import InvalidArgument, NonFinite
from elbozoo.inference.ground_truth import GroundTruth, _distances, energy_distance
from elbozoo.inference.posterior import resampled
from elbozoo.inference.psis import pareto_smooth, tail_size
from elbozoo.zoo import LinearVAE

OLD = arviz.__version__.startswith("0.")
SPEC = LinearVAE(data_dim=5, latent_dim=2, scale=0.7, guide="full")
RNG = np.random.default_rng(0)
EXACT = SPEC.exact_guide({"decoder.weight": RNG.normal(size=(5, 2)), "decoder.bias": RNG.normal(size=5)})
X = RNG.normal(size=(4, 5))
MEAN, COVARIANCE = SPEC.posterior(EXACT, X)
SD = np.sqrt(np.diag(COVARIANCE))

needs_twin = pytest.mark.skipif(find_spec("jax") is None, reason="a Pyro program's twin needs NumPyro")


@cache
def base(engine: str) -> Any:
    """One a session: what is made of it by ``with_weights`` compiles once."""
    return getattr(SPEC, engine)()


@cache
def linear(engine: str, shift: float = 0.0, width: float = 1.0) -> GroundTruth:
    """The linear model with a guide whose means are ``shift`` standard deviations off and whose spread is ``width`` times theirs."""
    tril = EXACT["encoder_tril"].copy()
    tril[[0, 2]] += np.log(width)  # the diagonal
    tril[1] *= width
    weights = EXACT | {"encoder.bias": EXACT["encoder.bias"] + shift * SD, "encoder_tril": tril}
    return ground_truth(base(engine).with_weights(weights), X, num_warmup=300, num_draws=400)


def near(values: np.ndarray, want: Any, name: str = "") -> None:
    """The mean over ``(chains, draws)`` is ``want`` within four standard errors, by the draws' own effective size."""
    ess = np.asarray(arviz.ess(arviz.convert_to_dataset({"v": values}), method="mean")["v"])
    error = values.std(axis=(0, 1)) / np.sqrt(ess)
    assert np.all(np.abs(values.mean(axis=(0, 1)) - want) < 4 * error), (name, values.mean(axis=(0, 1)), want, error)


# --- the draws --------------------------------------------------------------------------------------------------


@pytest.mark.arviz
@needs_twin
def test_nuts_meets_the_exact_posterior(engine: str) -> None:
    found = linear(engine)
    z = found.nuts["posterior"]["z"].values
    assert z.shape == (4, 400, 4, 2)
    near(z, MEAN)
    centred = z - MEAN
    near(centred[..., :, None] * centred[..., None, :], np.broadcast_to(COVARIANCE, (4, 2, 2)))
    assert found.sampler == "numpyro"
    assert found.divergences.sum() == 0
    assert found.converged.all()


@PYRO_ALONE
@pytest.mark.arviz
@needs_twin
def test_an_exact_guide_agrees(engine: str) -> None:
    found = linear(engine)
    assert found.agree().all()
    # Under the null it is distributed as Σ λ_i χ²_i with mean Σ λ_i = ½ (1/ESS + 1/1600); ten times that is P < 0.2%.
    chance = 0.5 * (1 / found.nuts_ess["z"].min(axis=1) + 1 / 1600)
    assert (found.energy_distance < 10 * chance).all()
    assert (found.energy_floor > chance / 3).all()
    assert (found.energy_floor < 10 * chance).all()
    assert found.r_hat["z"].shape == (4, 2)
    assert found.r_hat["z"].max() < 1.02
    assert (found.k_hat < 0.0).all()
    assert found.agree(weighted=True).all()
    assert (found.weighted_energy_distance < 10 * chance).all()
    np.testing.assert_allclose(found.guide["sample_stats"]["ess"], 16_000, rtol=1e-6)  # all that are weighted
    assert found.verdict[0].startswith("Guide and NUTS agree for 4 of 4 data: 4 of the 4 whose k̂")


@pytest.mark.arviz
@pytest.mark.numpyro
@pytest.mark.parametrize(("shift", "width"), [(0.8, 1.0), (0.0, 0.35), (0.0, 2.0)])
def test_a_wrong_guide_is_seen(shift: float, width: float) -> None:
    found = linear("numpyro", shift, width)
    assert not found.agree().any()
    assert (found.energy_distance > 10 * found.energy_floor).all()
    assert (found.r_hat["z"].max(axis=1) > 1.02).all()
    assert found.converged.all(), "it is the guide that is off"
    assert ", ".join(found.verdict).startswith("Guide and NUTS agree for 0 of 4 data")
    if width < 1:
        assert (found.k_hat > 0.5).all(), "weights of infinite variance, for width² < ½"


# --- the guide's draws, importance-weighted ---------------------------------------------------------------------


@PYRO_ALONE
@pytest.mark.arviz
@needs_twin
@pytest.mark.parametrize(("shift", "width"), [(0.8, 1.0), (0.0, 2.0), (0.0, 0.6)])
def test_weights_put_a_wrong_guide_right(engine: str, shift: float, width: float) -> None:
    """k is below 0.7 where expectations under the weights are the posterior's, though the guide is not the posterior."""
    found = linear(engine, shift, width)
    assert not found.agree().any()
    assert found.agree(weighted=True).all()
    if width < 1:
        return  # k = 0.64: below 0.7, and the weights' variance is infinite
    assert (found.k_hat < 0.7).all()
    share = np.exp(-2 * shift**2) * (2 * width**2 - 1) / width**4  # effective of 16,000 draws: Gaussian integrals of w²
    nuts, weighted = 1 / found.nuts_ess["z"].min(axis=1), 1 / 1600 + 1 / (16_000 * share)
    assert (found.weighted_energy_distance < 10 * 0.5 * (nuts + weighted)).all()
    z = found.weighted["posterior"]["z"].values
    near(z, MEAN)
    centred = z - MEAN
    near(centred[..., :, None] * centred[..., None, :], np.broadcast_to(COVARIANCE, (4, 2, 2)))
    assert (np.abs(found.mean_error - shift) < 4 * np.sqrt(nuts + width**2 / 1600)).all()
    assert (found.weighted_mean_error < 4 * np.sqrt(nuts + weighted)).all()
    said = " ".join(found.verdict)
    assert "Guide and NUTS agree for 0 of 4 data: 0 of the 4 whose k̂ is at most 0.7" in said
    assert "By their importance weights, the guide's draws agree for 4 of 4 data: 4 of the 4 whose k̂" in said


@pytest.mark.numpyro
def test_weights_cannot_reach_where_no_draw_is() -> None:
    """Draws that end at 0.6 standard deviations from the mean: no weights make the posterior of them, and k̂ says so."""
    found = linear("numpyro", 0.0, 0.15)
    assert (found.k_hat > 0.7).all()
    assert not found.agree().any()
    assert not found.agree(weighted=True).any()
    assert (found.weighted_energy_distance < found.energy_distance).all(), "they help as far as they go"


@pytest.mark.numpyro
@pytest.mark.parametrize("width", [0.15, 0.35, 0.6])
def test_k_hat_is_that_of_the_weights(width: float) -> None:
    """In two dimensions the log weights are exponential, so the weights Pareto: k = 1 - width²."""
    found, k = linear("numpyro", 0.0, width), 1 - width**2
    np.testing.assert_allclose(found.k_hat, k, atol=4 * (1 + k) / np.sqrt(tail_size(16_000)))


@pytest.mark.arviz
def test_the_weighted_distance_against_scipy() -> None:
    """SciPy's energy distance takes weights, here ArviZ's smoothed ones; ours is of draws resampled by our own."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(1500, 1)), rng.normal(0.5, 0.7, size=(20_000, 1))
    log_weight = stats.norm.logpdf(y[:, 0]) - stats.norm.logpdf(y[:, 0], 0.5, 0.7)
    if OLD:
        smooth, _ = arviz.psislw(log_weight.copy())
    else:
        from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

        smooth, _ = array_stats.psislw(-log_weight)
    want = stats.energy_distance(x[:, 0], y[:, 0], v_weights=np.exp(smooth)) ** 2
    ours = [
        energy_distance(x, y[resampled(pareto_smooth(log_weight), np.random.default_rng(seed), 3000)])
        for seed in range(20)
    ]
    plain = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    assert plain > 20 * want
    assert np.mean(ours) == pytest.approx(want, abs=4 * stats.sem(ours) + 2 / 3000)


@PYRO_ALONE
def test_the_draws_that_are_weighted_are_the_guides(engine: str) -> None:
    """Made twice from equal seeds: each is one of its own datum's, and the sites of one draw stay together."""
    options = {"num_warmup": 10, "num_draws": 20, "num_chains": 2, "oversample": 1}
    model, guide = wide_pair(engine)
    found = ground_truth(wrapped(engine, model, guide), own_data(), **options)
    sets = []
    for tree in (found.guide, found.weighted):
        posterior = tree["posterior"]
        s, z = (posterior[name].values.reshape(40, 2, -1) for name in ("s", "z"))
        sets.append([{tuple(row) for row in np.round(np.concatenate([s, z], axis=-1)[:, i], 9)} for i in range(2)])
    for guide_draws, weighted in zip(*sets, strict=True):
        assert len(guide_draws) == 40
        assert weighted <= guide_draws
        assert 1 < len(weighted) < 40
    weight = np.exp(found.guide["sample_stats"]["log_weight"].values.reshape(40, 2))
    np.testing.assert_allclose(found.guide["sample_stats"]["ess"], weight.sum(0) ** 2 / (weight**2).sum(0))


def wide_pair(engine: str) -> tuple[Any, Any]:
    """The model of :func:`own` and a guide that is wider than the posterior."""
    lib, (model, _) = library(engine), own_pair(engine)

    def guide(x: Any, y: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("s", lib.dist.LogNormal(x / 2, 1.2))
            lib.sample("z", lib.dist.Normal(y / 2, 1.2).to_event(1))

    return model, guide


@PYRO_ALONE  # written once for both engines
def test_weights_that_all_vanish_correct_nothing(engine: str) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(len(x))), 1.0))
            lib.sample("x", lib.dist.Normal(lib.xp.exp(z), 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(900.0 + x, 1.0))  # exp(900) is infinite

    options = {"num_warmup": 20, "num_draws": 20, "num_chains": 2}
    found = ground_truth(wrapped(engine, model, guide), np.array([1.0, 2.0]), **options)
    assert np.isnan(found.k_hat).all()
    assert not found.agree(weighted=True).any()
    assert (found.weighted["posterior"]["z"] > 800).all()


@cache
def one_latent() -> tuple[LinearVAE, Any]:
    spec = LinearVAE(data_dim=5, latent_dim=1, scale=0.7)
    return spec, spec.numpyro()


@pytest.mark.numpyro
@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_the_energy_distance_is_that_of_the_distributions(shift: float, width: float) -> None:
    """One latent: N(0, 1) from NUTS against N(shift, width²), in units of the posterior."""
    spec, program = one_latent()
    exact = spec.exact_guide({name: array[..., :1] if array.ndim > 1 else array for name, array in EXACT.items()})
    sd = np.exp(exact["encoder_log_scale"])
    weights = exact | {"encoder.bias": exact["encoder.bias"] + shift * sd}
    weights["encoder_log_scale"] = exact["encoder_log_scale"] + np.log(width)
    x = np.random.default_rng(1).normal(size=(12, 5))
    found = ground_truth(program.with_weights(weights), x, num_warmup=200, num_draws=250)
    across = 2 * absolute(shift, np.hypot(1, width))
    want = (across - absolute(0, np.sqrt(2)) - absolute(0, width * np.sqrt(2))) / across
    bias = 0.5 * (1 / found.nuts_ess["z"].mean() + 1 / 1000)  # E|X - X'| is about half of 2 E|X - Y|
    got = found.energy_distance
    assert got.mean() == pytest.approx(want + bias, abs=4 * stats.sem(got) + bias)
    assert found.agree(energy=0.01).mean() == (shift == 0)


# --- energy distance --------------------------------------------------------------------------------------------


def absolute(loc: float, scale: float) -> float:
    """E|N(loc, scale²)|."""
    return float(stats.foldnorm.mean(abs(loc) / scale, scale=scale))


def test_energy_distance_against_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1500, 1)), rng.gamma(2.0, size=(1100, 1))
    assert energy_distance(x, y) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-9)
    assert energy_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12)


def test_energy_distance_against_its_closed_form() -> None:
    rng = np.random.default_rng(1)
    loc, scale, n = 0.6, 1.5, 400
    want = 2 * absolute(loc, np.hypot(1, scale)) - absolute(0, np.sqrt(2)) - absolute(0, scale * np.sqrt(2))
    bias = (absolute(0, np.sqrt(2)) + absolute(0, scale * np.sqrt(2))) / n
    got = [energy_distance(rng.normal(size=(n, 1)), rng.normal(loc, scale, size=(n, 1))) for _ in range(200)]
    assert np.mean(got) == pytest.approx(want + bias, abs=4 * stats.sem(got))


@pytest.mark.parametrize("draws", [30, 31])
def test_the_floor_is_the_mean_over_ways_to_halve(draws: int) -> None:
    rng = np.random.default_rng(2)
    nuts, guide = rng.normal(size=(2, 2, draws, 3))
    nuts[1] += 0.5
    found, floor, mean_error = _distances(nuts, guide)
    scale = nuts.reshape(-1, 3).std(axis=0)
    blocks = [half / scale for chain in nuts for half in (chain[:15], chain[15:30])]

    def share(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        return energy_distance(x, y), 2 * np.mean(np.linalg.norm(x[:, None] - y, axis=-1))

    halves = [
        (np.concatenate([blocks[i] for i in range(4) if i in one]), np.concatenate([blocks[i] for i in range(4) if i not in one]))
        for one in itertools.combinations(range(4), 2)
    ]  # fmt: skip
    mean = np.mean([energy_distance(x, y) for x, y in halves])
    others = np.mean([np.linalg.norm(a[:, None] - b, axis=-1).mean() for a, b in itertools.combinations(blocks, 2)])
    assert floor == pytest.approx(mean / (2 * others), rel=1e-9)
    energy, across = share(nuts.reshape(-1, 3) / scale, guide.reshape(-1, 3) / scale)
    assert found == pytest.approx(energy / across, rel=1e-9)
    assert mean_error == pytest.approx(np.abs((nuts - guide).mean(axis=(0, 1)) / scale).max(), rel=1e-9)


def test_latents_that_do_not_move_have_no_distance() -> None:
    assert _distances(np.ones((2, 10, 1)), np.ones((2, 10, 1))) == (0.0, 0.0, 0.0)


# --- what ArviZ gets --------------------------------------------------------------------------------------------


@pytest.mark.arviz
@pytest.mark.numpyro
def test_groups_and_dims() -> None:
    found = linear("numpyro")
    dims = ("chain", "draw", "data")
    statistics = {
        "nuts": dict.fromkeys(("lp", "energy", "n_steps", "acceptance_rate", "step_size", "diverging"), dims),
        "guide": {"log_weight": dims, "pareto_k": dims[2:], "ess": dims[2:]},
    }
    for which in ("nuts", "guide", "weighted"):
        tree, named = getattr(found, which), {"sample_stats"} if which in statistics else set()
        assert set(tree.groups() if OLD else tree.children) == {"posterior", "observed_data"} | named
        assert tree["posterior"]["z"].dims == (*dims, "z_dim")
        if named:
            assert {name: v.dims for name, v in tree["sample_stats"].data_vars.items()} == statistics[which]
        np.testing.assert_array_equal(tree["observed_data"]["x"], X)
        assert tree.attrs["draws_of"] == which
    np.testing.assert_array_equal(found.guide["sample_stats"]["pareto_k"], found.k_hat)
    np.testing.assert_array_equal(found.nuts["sample_stats"]["diverging"].sum(("chain", "draw")), found.divergences)


@pytest.mark.arviz
@pytest.mark.numpyro
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23 under Matplotlib 3.11
def test_arviz_compares_and_keeps_them(tmp_path: Path) -> None:
    found = linear("numpyro", 0.8)
    both = {"NUTS": found.nuts, "guide": found.guide}
    if OLD:
        axes: Any = arviz.plot_forest(list(both.values()), model_names=list(both), combined=True)
        axes[0].figure.savefig(tmp_path / "forest.png")
    else:
        arviz.plot_forest(both, combined=True).savefig(tmp_path / "forest.png")
    pyplot.close("all")
    assert (tmp_path / "forest.png").stat().st_size > 5000
    found.nuts.to_netcdf(str(tmp_path / "nuts.nc"))
    read = arviz.from_netcdf(str(tmp_path / "nuts.nc"))
    np.testing.assert_array_equal(read["posterior"]["z"], found.nuts["posterior"]["z"])
    read.close()


@pytest.mark.arviz
@pytest.mark.numpyro
def test_r_hat_is_arvizs() -> None:
    found = linear("numpyro", 0.8)
    one, two = (tree["posterior"]["z"].values[..., 1, 1] for tree in (found.nuts, found.guide))
    assert found.nuts_r_hat["z"][1, 1] == pytest.approx(float(arviz.rhat(one)))
    assert found.nuts_ess["z"][1, 1] == pytest.approx(float(arviz.ess(one)))
    assert found.r_hat["z"][1, 1] == pytest.approx(float(arviz.rhat(np.concatenate([one, two]))))
    three = found.weighted["posterior"]["z"].values[..., 1, 1]
    assert found.weighted_r_hat["z"][1, 1] == pytest.approx(float(arviz.rhat(np.concatenate([one, three]))))


@PYRO_ALONE
def test_what_it_says(engine: str) -> None:
    found = linear(engine) if find_spec("jax") else ground_truth(own(engine), own_data(), num_warmup=20, num_draws=20)
    said = found.summary()
    assert said["num_data"] == found.num_data
    assert said["agree"] == found.agree().sum()
    assert said["weighted_agree"] == found.agree(weighted=True).sum()
    assert said["energy_distance_max"] == found.energy_distance.max()
    assert said["k_hat_max"] is None or np.isfinite(said["k_hat_max"])
    assert all(word in str(found) for word in ("distance", "weighted", "k̂", "R-hat", "ESS"))
    assert found.verdict[0] in " ".join(str(found).split("\n"))
    for options, text in [({"energy": 2.0}, r"energy must lie in \[0, 1\]"), ({"r_hat": 1.0}, "r_hat must be")]:
        with pytest.raises(InvalidArgument, match=text):
            found.agree(**options)


# --- users' own programs ----------------------------------------------------------------------------------------


def own(engine: str, size: int | None = None) -> Any:
    return wrapped(engine, *own_pair(engine, size))


def own_pair(engine: str, size: int | None = None) -> tuple[Any, Any]:
    """Two conjugate pairs, ``log s ~ N(0, 1), x ~ N(log s, 1)`` and ``z ~ N(0, I), y ~ N(z, I)``; the exact guide."""
    lib = library(engine)

    def plate(x: Any) -> Any:
        return lib.plate("data", size or len(x), dim=-1, **({"subsample_size": len(x)} if size else {}))

    def model(x: Any, y: Any) -> None:
        with plate(x):
            s = lib.sample("s", lib.dist.LogNormal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(lib.xp.log(s), 1.0), obs=x)
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(2)), 1.0).to_event(1))
            lib.sample("y", lib.dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(x: Any, y: Any) -> None:
        with plate(x):
            lib.sample("s", lib.dist.LogNormal(x / 2, 0.5**0.5))
            lib.sample("z", lib.dist.Normal(y / 2, 0.5**0.5).to_event(1))

    return model, guide


def own_data() -> tuple[np.ndarray, np.ndarray]:
    return np.array([0.3, 2.0]), np.array([[1.0, -1.0], [0.0, 3.0]])


def test_own_program(engine: str) -> None:
    """Constrained latents, two sites, two arguments; and a plate that counts more data than there are."""
    x, y = own_data()
    sizes = {"numpyro": (150, 200, 4), "pyro": (80, 80, 2)}[engine]  # Pyro's NUTS is slow
    options = dict(zip(("num_warmup", "num_draws", "num_chains"), sizes, strict=True))
    found = ground_truth(own(engine, size=50), (x, y), **options)
    assert found.sampler == engine
    draws = found.nuts["posterior"]
    assert draws["s"].dims == ("chain", "draw", "data")
    assert draws["z"].dims == ("chain", "draw", "data", "z_dim")
    assert float(draws["s"].min()) > 0
    near(np.log(draws["s"].values), x / 2, "mean")
    near((np.log(draws["s"].values) - x / 2) ** 2, np.full(2, 0.5), "variance")
    near(draws["z"].values, y / 2, "mean")
    near((draws["z"].values - y / 2) ** 2, np.full((2, 2), 0.5), "variance")
    assert found.agree().all()
    assert found.r_hat["s"].shape == (2, 1)
    np.testing.assert_array_equal(found.nuts["observed_data"]["y"], y)


@pytest.mark.pyro
def test_pyro_sums_discrete_latents_out() -> None:
    """``z ~ N(0, 1)``, ``c ~ Bernoulli(Φ-like in z)``, ``x ~ N(3 c, 1)``; the mean of z by quadrature."""
    lib = library("pyro")

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            c = lib.sample("c", lib.dist.Bernoulli(logits=3.0 * z))
            lib.sample("x", lib.dist.Normal(3.0 * c, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("c", lib.dist.Bernoulli(lib.array(0.5)))

    found = ground_truth(wrapped("pyro", model, guide), np.array([2.5]), num_warmup=60, num_draws=60, num_chains=2)

    def density(z: float) -> float:
        on = 1 / (1 + np.exp(-3.0 * z))
        return stats.norm.pdf(z) * (on * stats.norm.pdf(2.5, 3.0) + (1 - on) * stats.norm.pdf(2.5))

    mean = integrate.quad(lambda z: z * density(z), -9, 9)[0] / integrate.quad(density, -9, 9)[0]
    assert list(found.nuts["posterior"].data_vars) == ["z"]
    near(found.nuts["posterior"]["z"].values, mean)
    assert not found.agree().any()
    assert found.agree(weighted=True).all(), "the weights hold the discrete latent too"
    assert list(found.weighted["posterior"].data_vars) == ["z"]


@pytest.mark.numpyro
def test_a_twin_is_not_needed_to_be_named() -> None:
    """The same draws from either engine's program of the zoo, for it is one sampler with one set of weights."""
    pytest.importorskip("torch")
    one, two = linear("numpyro"), linear("pyro")
    np.testing.assert_allclose(one.nuts["posterior"]["z"], two.nuts["posterior"]["z"], rtol=1e-6, atol=1e-9)


@pytest.mark.pyro
def test_a_frozen_program_runs_in_its_own_engine() -> None:
    """It hides its weights, so that there is nothing to hand to a twin."""
    program = base("pyro").with_weights(EXACT).frozen()
    found = ground_truth(program, X[:1], num_warmup=10, num_draws=10, num_chains=2)
    assert found.sampler == "pyro"
    assert (found.k_hat < 0).all() or np.isnan(found.k_hat).all(), "the exact guide"


@PYRO_ALONE
def test_equal_seeds(engine: str) -> None:
    if engine == "numpyro":
        program, data, options = base(engine).with_weights(EXACT), X[:2], {"num_warmup": 300, "num_draws": 400}
    else:
        program, data, options = own(engine), own_data(), {"num_warmup": 10, "num_draws": 10, "num_chains": 2}
    one, two, other = (ground_truth(program, data, seed=seed, **options) for seed in (0, 0, 1))
    for which in ("nuts", "guide"):
        draws = [getattr(found, which)["posterior"]["z"].values for found in (one, two, other)]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.isclose(draws[0], draws[2], rtol=0, atol=1e-9).any()
        assert len(np.unique(draws[0][:, :, 0])) > 10, "chains and draws differ"


# --- what is refused --------------------------------------------------------------------------------------------


def refused(engine: str, model: Any, guide: Any, data: Any, text: str, error: Any = InvalidArgument) -> None:
    with pytest.raises(error, match=text):
        ground_truth(wrapped(engine, model, guide), data, num_warmup=2, num_draws=10, num_chains=2)


@PYRO_ALONE
def test_bad_arguments_are_refused(engine: str) -> None:
    for options, text in [
        ({"num_warmup": 0}, "num_warmup must be a whole number of at least 1"),
        ({"num_draws": 9}, "num_draws must be a whole number of at least 10"),
        ({"num_chains": 1}, "num_chains must be a whole number of at least 2"),
        ({"oversample": 0}, "oversample must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            ground_truth(own(engine), own_data(), **options)
    with pytest.raises(InvalidArgument, match="must have the 2 rows"):
        ground_truth(own(engine), (np.ones(2), np.ones((3, 2))))


@PYRO_ALONE
def test_a_global_latent_is_refused(engine: str) -> None:
    refused(engine, *shared_latent(engine), np.zeros(3), "program must have every latent inside its data plate")


@pytest.mark.numpyro
def test_discrete_latents_in_numpyro_are_refused() -> None:
    lib = library("numpyro")

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            c = lib.sample("c", lib.dist.Bernoulli(lib.array(0.5)))
            lib.sample("x", lib.dist.Normal(1.0 * c, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("c", lib.dist.Bernoulli(lib.array(0.5)))

    refused("numpyro", model, guide, np.zeros(3), "site 'c' must be continuous for NUTS in NumPyro; got values of int")


@pytest.mark.pyro
@pytest.mark.parametrize("below", [True, False])
def test_what_pyro_cannot_sum_out_is_refused(below: bool) -> None:
    """A latent whose distribution depends on a discrete one would get a value for each of its values."""
    lib = library("pyro")

    def latents(x: Any) -> Any:
        c = lib.sample("c", lib.dist.Bernoulli(lib.array(0.5 * np.ones(len(x)))))
        return lib.sample("z", lib.dist.Normal(4.0 * c - 2.0, 1.0)) if below else c

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", lib.dist.Normal(latents(x), 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            latents(x)

    text = "site 'z' must not depend on a discrete latent" if below else "model must have a continuous latent; got none"
    refused("pyro", model, guide, np.zeros(3), text)


@PYRO_ALONE
def test_a_model_that_looks_at_other_data_is_refused(engine: str) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(x.mean() * lib.array(np.ones(len(x))), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(x, 1.0))

    refused(engine, model, guide, np.array([0.0, 4.0]), "model must score a datum by itself as it does among others")


@PYRO_ALONE  # written once for both engines
def test_an_impossible_datum_is_refused(engine: str) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(len(x))), 1.0))
            lib.sample("x", lib.dist.Normal(z, lib.xp.exp(-x)), obs=0.0 * x + 1.0)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(x, 1.0))

    # exp(-400)² is 0: the density is -inf everywhere
    refused(engine, model, guide, np.array([0.0, 400.0]), "NUTS.* must find latents of finite density", NonFinite)
