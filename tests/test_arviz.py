"""Posterior draws in ArviZ's groups: what is in them, by SciPy's densities and a linear model's exact posterior.

It runs under ArviZ 0.23 (``InferenceData``) and ArviZ 1.x (``DataTree``).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz
import numpy as np
import pytest
from covering import PYRO_ALONE
from matplotlib import pyplot
from scipy import stats

from elbozoo._version import __version__
from elbozoo.inference.errors import InvalidArgument, NonFinite
from elbozoo.inference.posterior import effective_draws, resampled, to_arviz
from elbozoo.inference.psis import pareto_k
from elbozoo.inference.terms import Site, Terms
from elbozoo.zoo import LinearVAE

pytestmark = pytest.mark.arviz

OLD = arviz.__version__.startswith("0.")
SPEC = LinearVAE(data_dim=6, latent_dim=2, scale=0.7)
RNG = np.random.default_rng(1)
DATA = RNG.normal(size=(5, 6))
MODEL = {"decoder.weight": RNG.normal(size=(6, 2)), "decoder.bias": RNG.normal(size=6)}
EMPTY = {"encoder.weight": np.zeros((2, 6)), "encoder.bias": np.zeros(2), "encoder_log_scale": np.zeros(2)}
BEST = SPEC.exact_guide(MODEL | EMPTY)
WIDE = BEST | {"encoder.bias": BEST["encoder.bias"] + 0.2, "encoder_log_scale": BEST["encoder_log_scale"] + 0.4}
MEAN, COVARIANCE = SPEC.posterior(BEST, DATA)


@cache
def program(engine: str) -> Any:
    """The linear model with a guide that is wrong by known amounts; one a session, which compiles each shape once."""
    return getattr(SPEC, engine)().with_weights(WIDE)


@cache
def draws(engine: str) -> Any:
    return to_arviz(program(engine), DATA, num_draws=40, coords={"data": list("abcde")})


def library(engine: str) -> tuple[Any, Any, Any]:
    """(the library, its distributions, a function that makes a program of a model and a guide)"""
    if engine == "pyro":
        import pyro
        import pyro.distributions as dist

        from elbozoo.inference.pyro_engine import Program

        return pyro, dist, Program
    import numpyro
    import numpyro.distributions as dist

    from elbozoo.inference.numpyro_engine import Program

    return numpyro, dist, lambda model, guide: Program(model, guide).with_params({})


def groups(found: Any) -> set[str]:
    return set(found.groups()) if OLD else {name for name, _ in found.children.items()}


# --- structure --------------------------------------------------------------------------------------------------


def test_groups_dims_and_coords(engine: str) -> None:
    found = draws(engine)
    dims = {
        "posterior": {"z": ("chain", "draw", "data", "z_dim")},
        "posterior_resampled": {"z": ("chain", "draw", "data", "z_dim")},
        "posterior_predictive": {"x": ("chain", "draw", "data", "pixel")},
        "log_likelihood": {"x": ("chain", "draw", "data")},
        "sample_stats": {"log_weight": ("chain", "draw", "data"), "pareto_k": ("data",), "ess": ("data",)},
        "prior": {"z": ("chain", "draw", "data", "z_dim")},
        "prior_predictive": {"x": ("chain", "draw", "data", "pixel")},
        "observed_data": {"x": ("data", "pixel")},
    }
    assert groups(found) == set(dims)
    sizes = {"chain": 1, "draw": 40, "data": 5, "z_dim": 2, "pixel": 6}
    for group, variables in dims.items():
        assert {name: tuple(v.dims) for name, v in found[group].data_vars.items()} == variables
        assert all(found[group].sizes[d] == sizes[d] for d in found[group].sizes)
        assert list(found[group].coords["data"].values) == list("abcde")
    np.testing.assert_array_equal(found["observed_data"]["x"], DATA)
    assert found["posterior"].sel(data="c").z.shape == (1, 40, 2)
    for attrs in (found.attrs, found["posterior"].attrs):
        assert attrs["inference_library"] == "elbozoo"
        assert attrs["inference_library_version"] == __version__
        assert (attrs["engine"], attrs["model"], attrs["num_draws"], attrs["seed"]) == (engine, "LinearVAE", 40, 0)


def test_resampling_takes_any_number_of_draws() -> None:
    """A draw of normalised weight w comes S w times, rounded down or up, for each datum by itself."""
    log_weight = 2.0 * np.random.default_rng(3).normal(size=(500, 3))
    chosen = resampled(log_weight, np.random.default_rng(0), 80)
    assert chosen.shape == (80, 3)
    expected = 80 * np.exp(log_weight) / np.exp(log_weight).sum(axis=0)
    counts = np.stack([np.bincount(column, minlength=500) for column in chosen.T], axis=1)
    assert (np.abs(counts - expected) < 1).all()


@pytest.mark.numpyro
def test_resampling_is_a_choice() -> None:
    found = to_arviz(program("numpyro"), DATA, num_draws=40, resample=False)
    assert "posterior" in groups(found)
    assert "posterior_resampled" not in groups(found)


class Pictures:
    """A fake program without an engine: one latent, and data of zeros and ones."""

    engine, float_dtype = "numpyro", np.dtype(float)

    def __init__(self, image_shape: tuple[int, ...] = (), scope: str = ""):
        self.spec = SimpleNamespace(
            network=SimpleNamespace(image_shape=image_shape), data_dim=6, check_data=lambda *x: None
        )
        self.z, self.x = f"{scope}z", f"{scope}x"

    def outline(self, args: tuple) -> Terms:
        return Terms(np.zeros((1, 1)), {})

    def apply(self, fn: Any, args: tuple, *, num_particles: int, seed: int) -> Any:
        zeros = np.zeros((num_particles, len(args[0])))
        return fn(Terms(zeros, {self.z: Site(zeros, zeros)}, observed={self.x: zeros}, values={self.z: zeros}))

    def predict(
        self, args: tuple, *, num_particles: int, seed: int, prior: bool = False, values: Any = None
    ) -> dict[str, Any]:
        shape = (num_particles, len(args[0]))
        return {"latent": {self.z: np.zeros(shape)}, "observed": {self.x: np.ones((*shape, 6))}, "mean": {}}


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((1, 2, 3), ("height", "width")), ((3, 2), ("height", "width")), ((3, 1, 2), ("channel", "height", "width"))],
)
def test_images_have_rows_and_columns(shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    found = to_arviz(Pictures(shape), DATA, num_draws=3)
    assert found["observed_data"]["x"].dims == ("data", *dims)
    assert found["posterior_predictive"]["x"].dims == ("chain", "draw", "data", *dims)
    assert found["observed_data"]["x"].shape == (5, *shape[-len(dims) :])
    np.testing.assert_array_equal(found["observed_data"]["x"].values.reshape(5, 6), DATA)


def test_a_scoped_site_is_no_path(tmp_path: Path) -> None:
    found = to_arviz(Pictures(scope="outer/"), DATA, num_draws=3)
    found.to_netcdf(str(tmp_path / "draws.nc"))
    read = arviz.from_netcdf(str(tmp_path / "draws.nc"))
    assert list(read["posterior"].data_vars) == ["outer.z"]
    assert read["observed_data"]["outer.x"].dims == ("data", "pixel")
    read.close()


@pytest.mark.numpyro
def test_names_may_be_chosen() -> None:
    dims = {"z": ["data", "axis"], "x": ["data", "sensor"]}
    found = to_arviz(program("numpyro"), DATA, num_draws=40, dims=dims, coords={"axis": ["u", "v"]})
    assert found["posterior"]["z"].dims == ("chain", "draw", "data", "axis")
    assert found["prior_predictive"]["x"].dims == ("chain", "draw", "data", "sensor")
    assert found["posterior"].sel(axis="v").z.shape == (1, 40, 5)


@pytest.mark.numpyro
def test_what_does_not_fit_is_refused() -> None:
    for wrong, text in [
        ({"num_draws": 0}, "num_draws must be a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"coords": {"dog": [1]}}, "coords must name dims among .*'pixel'.*; got 'dog'"),
        ({"coords": {"data": [1]}}, r"coords\['data'\] must have 5 entries; got 1"),
        ({"dims": {"z": ["data"]}}, r"dims\['z'\] must have 2 names"),
        ({"dims": {"z": ["data", "pixel"]}}, "dim 'pixel' must have one size everywhere"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            to_arviz(program("numpyro"), DATA, **{"num_draws": 40, **wrong})
    with pytest.raises(InvalidArgument, match="NaN"):
        to_arviz(program("numpyro"), np.where(DATA > 1.0, np.nan, DATA), num_draws=3)


# --- content ----------------------------------------------------------------------------------------------------


def test_every_draw_has_its_own_densities(engine: str) -> None:
    found = draws(engine)
    z = found["posterior"]["z"].values[0]
    log_lik = stats.norm(z @ MODEL["decoder.weight"].T + MODEL["decoder.bias"], 0.7).logpdf(DATA).sum(axis=-1)
    loc = DATA @ WIDE["encoder.weight"].T + WIDE["encoder.bias"]
    log_guide = stats.norm(loc, np.exp(WIDE["encoder_log_scale"])).logpdf(z).sum(axis=-1)
    log_weight = log_lik + stats.norm.logpdf(z).sum(axis=-1) - log_guide
    np.testing.assert_allclose(found["log_likelihood"]["x"].values[0], log_lik, rtol=1e-10)
    np.testing.assert_allclose(found["sample_stats"]["log_weight"].values[0], log_weight, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["sample_stats"]["pareto_k"], pareto_k(log_weight), rtol=1e-6)
    weight = np.exp(log_weight)
    np.testing.assert_allclose(
        found["sample_stats"]["ess"], weight.sum(axis=0) ** 2 / (weight**2).sum(axis=0), rtol=1e-6
    )
    assert len(np.unique(z)) == z.size


@PYRO_ALONE
def test_draws_have_the_moments_of_their_distributions(engine: str) -> None:
    found = to_arviz(program(engine), DATA, num_draws=1600)
    standard_error = 5 / np.sqrt(1600)
    z = found["posterior"]["z"].values[0]
    assert len(np.unique(z)) == z.size  # two calls, no draw twice
    np.testing.assert_allclose(z.mean(axis=0), MEAN + 0.2, atol=0.7 * standard_error)
    np.testing.assert_allclose(z.std(axis=0), np.tile(np.exp(WIDE["encoder_log_scale"]), (5, 1)), rtol=0.1)

    again = found["posterior_resampled"]["z"].values[0]
    np.testing.assert_allclose(again.mean(axis=0), MEAN, atol=0.7 * standard_error)
    covariance = np.stack([np.cov(again[:, n].T) for n in range(5)])
    np.testing.assert_allclose(covariance, np.tile(COVARIANCE, (5, 1, 1)), atol=0.15 * COVARIANCE.max())
    assert np.isin(again, z).all()

    w, b = MODEL["decoder.weight"], MODEL["decoder.bias"]
    x = found["posterior_predictive"]["x"].values[0]
    np.testing.assert_allclose(x.mean(axis=0), (MEAN + 0.2) @ w.T + b, atol=1.5 * standard_error)
    noise = (x - z @ w.T - b).reshape(len(x), -1)  # each draw of x comes from the draw of z at its place
    assert noise.std() == pytest.approx(0.7, rel=0.02)
    correlation = np.corrcoef(z.reshape(len(z), -1).T, noise.T)[: z[0].size, z[0].size :]
    assert np.abs(correlation).max() < 4 / len(z) ** 0.5, "the noise of x is not the noise of z"
    assert np.abs(found["prior"]["z"].values.mean()) < standard_error
    assert found["prior"]["z"].values.std() == pytest.approx(1.0, rel=0.05)
    x = found["prior_predictive"]["x"].values[0].reshape(-1, 6)
    np.testing.assert_allclose(np.cov(x.T), w @ w.T + 0.49 * np.eye(6), atol=0.05 * (w @ w.T).max() + 0.05)


def test_equal_seeds_give_equal_draws(engine: str) -> None:
    one, two, other = (to_arviz(program(engine), DATA, num_draws=40, seed=s) for s in (4, 4, 5))
    for group in groups(one) - {"observed_data"}:
        for name, values in one[group].data_vars.items():
            np.testing.assert_array_equal(values, two[group][name])
            assert not np.array_equal(values, other[group][name])


@PYRO_ALONE
def test_sites_are_resampled_together_and_apart_from_other_data(engine: str) -> None:
    library_, dist, wrap = library(engine)

    def model(x: Any) -> None:
        with library_.plate("data", len(x), dim=-1):
            a = library_.sample("a", dist.Normal(0.0, 1.0))
            b = library_.sample("b", dist.Normal(a[..., None] + x[..., :1] * 0.0, 0.1).to_event(1))
            library_.sample("x", dist.Normal(b, 0.5).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with library_.plate("data", len(x), dim=-1):
            a = library_.sample("a", dist.Normal(x[..., 0] * 0.0, 2.0))
            library_.sample("b", dist.Normal(a[..., None], 0.1).to_event(1))

    found = to_arviz(wrap(model, guide), np.array([[-1.0], [0.0], [1.0]]), num_draws=400)
    posterior, again = found["posterior"], found["posterior_resampled"]
    assert posterior["a"].dims == ("chain", "draw", "data")
    assert posterior["b"].dims == ("chain", "draw", "data", "b_dim")
    assert found["observed_data"]["x"].dims == ("data", "x_dim")
    assert np.abs(again["a"].values - again["b"].values[..., 0]).max() < 0.6
    exact = np.array([-1.0, 0.0, 1.0]) / (1.0 + 0.01 + 0.25)
    np.testing.assert_allclose(again["a"].values[0].mean(axis=0), exact, atol=0.25)


@PYRO_ALONE
def test_a_global_latent_is_shared_by_all_data(engine: str) -> None:
    library_, dist, wrap = library(engine)
    data = 2.0 + np.random.default_rng(3).normal(size=(20, 1))
    loc, scale = data.sum() / 21, 1.5 * 21**-0.5

    def model(x: Any) -> None:
        mean = library_.sample("mean", dist.Normal(x[:1, 0] * 0.0, 1.0).to_event(1))
        with library_.plate("data", len(x), dim=-1):
            library_.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Any) -> None:
        library_.sample("mean", dist.Normal(x[:1, 0] * 0.0 + loc, scale).to_event(1))

    found = to_arviz(wrap(model, guide), data, num_draws=1000)
    assert found["posterior"]["mean"].dims == ("chain", "draw", "mean_dim")
    assert found["posterior"]["mean"].shape == (1, 1000, 1)
    assert found["sample_stats"]["log_weight"].dims == ("chain", "draw")
    assert found["sample_stats"]["pareto_k"].dims == ()
    mean = found["posterior_resampled"]["mean"].values
    assert mean.mean() == pytest.approx(loc, abs=0.03)
    assert mean.std() == pytest.approx(21**-0.5, rel=0.15)
    z = found["posterior"]["mean"].values[0, :, 0]
    log_weight = (
        stats.norm(z[:, None], 1).logpdf(data[:, 0]).sum(axis=1)
        + stats.norm.logpdf(z)
        - stats.norm(loc, scale).logpdf(z)
    )
    np.testing.assert_allclose(found["sample_stats"]["log_weight"].values[0], log_weight, rtol=1e-10)


def test_a_draw_is_taken_in_proportion_to_its_weight() -> None:
    rng = np.random.default_rng(0)
    log_weight = 2.0 * rng.normal(size=(200, 4)) - 900.0
    chosen = resampled(log_weight, rng)
    assert chosen.shape == (200, 4)
    for n in range(4):
        weight = np.exp(log_weight[:, n] + 900.0)
        wanted = 200 * weight / weight.sum()
        count = np.bincount(chosen[:, n], minlength=200)
        assert (np.abs(count - wanted) < 1 + 1e-9).all()
        assert np.abs(np.corrcoef(chosen[:-1, n], chosen[1:, n])[0, 1]) < 0.3  # in no order
    assert not np.array_equal(chosen[:, 0], chosen[:, 1])
    np.testing.assert_array_equal(np.sort(resampled(np.zeros(9), rng)), np.arange(9))
    np.testing.assert_allclose(effective_draws(np.log([[3.0, 1.0], [1.0, 1.0]])), [16 / 10, 2.0])


@pytest.mark.numpyro
def test_an_impossible_datum_is_refused() -> None:
    broken = program("numpyro").with_weights(WIDE | {"decoder.bias": np.full(6, 1e200)})
    with pytest.raises(NonFinite, match="data must be possible under the model; got 5 data"):
        to_arviz(broken, DATA, num_draws=2)


# --- in ArviZ ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23's call of matplotlib 3.11
def test_arviz_summarises_and_plots_it(engine: str, tmp_path: Path) -> None:
    found = draws(engine)
    some = {"data": ["a", "b"]}
    for group in ("posterior", "posterior_resampled", "prior"):
        table = arviz.summary(found, group=group, coords=some, round_to="none")
        assert list(table.index) == ["z[a, 0]", "z[a, 1]", "z[b, 0]", "z[b, 1]"]
        expected = found[group]["z"].values[0, :, :2].mean(axis=0).ravel()
        np.testing.assert_allclose(table["mean"].to_numpy(dtype=float), expected, rtol=1e-6)
    if OLD:
        arviz.plot_posterior(found, coords=some, group="posterior_resampled")
        arviz.plot_trace(found, coords=some)
        arviz.plot_forest(found, coords=some)
        arviz.plot_ppc(found, num_pp_samples=10)
        plots = [pyplot.figure(n) for n in pyplot.get_fignums()]
    else:
        plots = [
            arviz.plot_dist(found, coords=some, group="posterior_resampled"),
            arviz.plot_trace(found, coords=some),
            arviz.plot_forest(found, coords=some),
            arviz.plot_ppc_dist(found, num_samples=10),
            arviz.plot_prior_posterior(found, coords=some),
        ]
    for i, plot in enumerate(plots):
        plot.savefig(tmp_path / f"{i}.png")
    pyplot.close("all")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == (4 if OLD else 5)
    assert min(sizes) > 5000


@pytest.mark.numpyro
def test_leaving_one_out_measures_reconstruction() -> None:
    """The reason for the docstring's warning: even where the guide is exact, LOO is far above the exact log p(x)."""
    spec = LinearVAE(data_dim=20, latent_dim=6, scale=0.3, guide="full")
    rng = np.random.default_rng(0)
    decoder = {"decoder.weight": rng.normal(size=(20, 6)), "decoder.bias": np.zeros(20)}
    weights = spec.exact_guide(decoder)
    data = rng.normal(size=(30, 6)) @ decoder["decoder.weight"].T + 0.3 * rng.normal(size=(30, 20))
    with pytest.warns(UserWarning, match="Pareto"):
        found = arviz.loo(to_arviz(spec.numpyro().with_weights(weights), data, num_draws=400), pointwise=True)
    optimism = (found.elpd_loo if OLD else found.elpd) / 30 - spec.log_prob(weights, data).mean()
    assert optimism > 5.0
    assert (found.pareto_k > 0.7).mean() > 0.5


def test_it_survives_a_file(engine: str, tmp_path: Path) -> None:
    found = draws(engine)
    found.to_netcdf(str(tmp_path / "draws.nc"))
    read = arviz.from_netcdf(str(tmp_path / "draws.nc"))
    assert groups(read) == groups(found)
    for group in groups(found):
        for name, values in found[group].data_vars.items():
            assert read[group][name].dims == values.dims
            np.testing.assert_array_equal(read[group][name], values)
            for dim in values.dims:
                np.testing.assert_array_equal(read[group].coords[dim], found[group].coords[dim])
        assert dict(read[group].attrs) == dict(found[group].attrs)
    assert dict(read.attrs) == dict(found.attrs)
    read.close()
