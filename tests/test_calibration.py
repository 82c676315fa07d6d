"""Simulation-based calibration: guides that are exact, or wrong in a known way, in both engines."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from oracles import library, shared_latent, wrapped
from scipy import stats

from elbozoo.inference import Calibration, calibrate
from elbozoo.inference.calibration import _ranks
from elbozoo.inference.errors import InvalidArgument, NonFinite
from elbozoo.pictures import rank_histograms
from elbozoo.zoo import LinearVAE

SPEC = LinearVAE(data_dim=4, latent_dim=2, scale=0.7, guide="full")
RNG = np.random.default_rng(0)
EXACT = SPEC.exact_guide({"decoder.weight": RNG.normal(size=(4, 2)), "decoder.bias": RNG.normal(size=4)})
LIKE = np.zeros((3, 4))
SD = np.sqrt(np.diag(SPEC.posterior(EXACT, LIKE)[1]))


@cache
def base(engine: str) -> Any:
    """One a session: what is made of it by ``with_weights`` compiles once."""
    return getattr(SPEC, engine)()


def linear(engine: str, shift: float = 0.0, width: float = 1.0) -> Any:
    """The guide's means are ``shift`` standard deviations off, its spread is ``width`` times the posterior's."""
    tril = EXACT["encoder_tril"].copy()
    tril[[0, 2]] += np.log(width)  # the diagonal
    tril[1] *= width
    moved = {"encoder.bias": EXACT["encoder.bias"] + shift * SD, "encoder_tril": tril}
    return base(engine).with_weights(EXACT | moved)


def test_an_exact_guide_is_calibrated(engine: str) -> None:
    found = calibrate(linear(engine), LIKE)
    assert found.ranks["z"].shape == (1000, 2)
    assert found.num_bins == 20
    assert found.histograms["z"].shape == (2, 20)
    assert (found.histograms["z"].sum(axis=1) == 1000).all()
    assert found.p_value > 1e-3
    assert (np.abs(found.slope["z"]) < 4).all()
    assert (np.abs(found.curvature["z"]) < 4).all()
    if found.p_value >= 0.01:
        assert found.words == {"z": ["calibrated", "calibrated"]}
        assert found.verdict[0].startswith("No miscalibration of the guide is found in 2 dimensions of z")


@pytest.mark.parametrize(
    ("shift", "width", "word"),
    [
        (0.0, 0.6, "too narrow (∪)"),
        (0.0, 1.6, "too wide (∩)"),
        (0.5, 1.0, "too high (falling)"),
        (-0.5, 1.0, "too low (rising)"),
    ],
)
def test_the_shape_says_what_is_wrong(engine: str, shift: float, width: float, word: str) -> None:
    found = calibrate(linear(engine, shift, width), LIKE)
    assert found.p_value < 1e-6
    assert found.words == {"z": [word, word]}
    assert found.verdict[0].startswith(f"Of 2 dimensions of z the guide is {word} in 2 (0, 1)")


@pytest.mark.numpyro
def test_ranks_are_distributed_as_they_should_be() -> None:
    """A guide whose spread is w times the posterior's: the rank's share is Φ(e / w), e standard normal."""
    width = 0.6
    found = calibrate(linear("numpyro", width=width), LIKE, num_simulations=4000, num_draws=199)
    edges = stats.norm.cdf(stats.norm.ppf(np.linspace(0, 1, found.num_bins + 1)) * width)
    expected = 4000 * np.diff(edges)
    for histogram in found.histograms["z"]:
        # A bin's edge is off by the rank's own noise, at most 1/√200 of its share: wide bins, and a wide margin.
        assert stats.chisquare(histogram, expected).statistic < 2 * found.num_bins


@PYRO_ALONE
def test_p_values_are_uniform_under_the_null(engine: str) -> None:
    program = linear(engine)
    p = [calibrate(program, LIKE, num_simulations=400, num_draws=19, seed=seed).p_values["z"] for seed in range(60)]
    for column in np.transpose(p):
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.mean(np.min(p, axis=1) * 2 < 0.05) < 0.05 + 4 * np.sqrt(0.05 / 60)


def test_holms_correction() -> None:
    rng = np.random.default_rng(0)
    ranks = {"a": rng.integers(0, 20, size=(400, 3)), "b": rng.integers(0, 19, size=(400, 2))}
    found = Calibration(ranks, 400, 19, 20)
    p = np.concatenate([found.p_values["a"], found.p_values["b"]])
    for site, histograms in found.histograms.items():
        want = [stats.chisquare(h).pvalue for h in histograms]
        np.testing.assert_allclose(found.p_values[site], want, rtol=1e-9)
    order = np.argsort(p)
    want = np.empty(5)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (5 - place) * p[index]))
        want[index] = largest
    corrected = found.corrected_p_values
    np.testing.assert_allclose(np.concatenate([corrected["a"], corrected["b"]]), want)
    assert found.p_value == want.min()
    assert found.p_value == pytest.approx(min(1.0, 5 * p.min()))


def test_slope_and_curvature_are_standard_normal_under_uniform_ranks() -> None:
    rng = np.random.default_rng(0)
    found = Calibration({"z": rng.integers(0, 20, size=(300, 3000))}, 300, 19, 10)
    for values in (found.slope["z"], found.curvature["z"]):
        assert values.mean() == pytest.approx(0, abs=4 / np.sqrt(3000))
        assert values.std() == pytest.approx(1, abs=4 / np.sqrt(6000))


def test_ties_are_broken_at_random() -> None:
    """Coins against coins: every rank is as likely as every other."""
    rng = np.random.default_rng(0)
    truth, drawn = rng.integers(0, 2, size=(6000, 1)), rng.integers(0, 2, size=(9, 6000, 1))
    ranks = _ranks("c", truth, drawn, rng)[:, 0]
    assert ranks.min() == 0
    assert ranks.max() == 9
    assert stats.chisquare(np.bincount(ranks, minlength=10)).pvalue > 1e-3


@PYRO_ALONE
def test_discrete_and_several_sites(engine: str) -> None:
    """``c ~ Bernoulli(0.3)``, ``x ~ N(2 c, 1)``, ``y ~ N(x + c, 1)``: y is drawn given the x that was drawn."""
    lib = library(engine)

    def model(x: Any, y: Any, w: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            c = lib.sample("c", lib.dist.Bernoulli(lib.array(0.3 * np.ones(len(x)))))
            x = lib.sample("x", lib.dist.Normal(2.0 * c, 1.0), obs=x)
            lib.sample("y", lib.dist.Normal(x + c + w[:, 0], 1.0), obs=y)

    def guide(x: Any, y: Any, w: Any) -> None:
        # log odds: of the prior, of x under means 2 and 0, of y under means x + 1 + w and x + w
        odds = np.log(0.3 / 0.7) + 2.0 * x - 2.0 + (y - x - w[:, 0]) - 0.5
        with lib.plate("data", len(x), dim=-1):
            lib.sample("c", lib.dist.Bernoulli(logits=odds))

    data = (np.zeros(7), np.zeros(7), np.linspace(0, 5, 14).reshape(7, 2))
    program = wrapped(engine, model, guide)
    found = calibrate(program, data, num_simulations=3000, num_draws=9, observed={"x": 0, "y": 1})
    assert found.ranks["c"].shape == (3000, 1)
    assert found.p_value > 1e-3
    with pytest.raises(
        InvalidArgument,
        match=r"site 'x' must be observed at one argument.*2 arguments of shape \(7,\).*observed=\{'x': 0\}",
    ):
        calibrate(program, data)


def test_equal_seeds(engine: str) -> None:
    program = linear(engine)
    one, two, other = (calibrate(program, LIKE, num_simulations=100, num_draws=9, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.ranks["z"], two.ranks["z"])
    assert (one.ranks["z"] != other.ranks["z"]).any()


@PYRO_ALONE
def test_batches_do_not_repeat(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elbozoo.inference.calibration.call_size", lambda arrays, draws: (8, 40))
    found = calibrate(linear(engine, width=0.6), LIKE, num_simulations=100, num_draws=99)
    assert found.ranks["z"].shape == (100, 2)
    first = found.ranks["z"][:96].reshape(12, 8, 2)
    assert len(np.unique(first, axis=0)) == 12
    assert found.ranks["z"].max() <= 99


def test_bins_hold_as_many_ranks_each() -> None:
    rng = np.random.default_rng(0)
    for simulations, draws, bins in [(1000, 99, 20), (100, 99, 5), (1000, 9, 10), (10, 99, 2), (50, 6, 7)]:
        from elbozoo.inference.calibration import _num_bins

        assert _num_bins(simulations, draws) == bins
        found = Calibration(
            {"z": rng.integers(0, draws, size=(simulations, 1), endpoint=True)}, simulations, draws, bins
        )
        assert found.histograms["z"].sum() == simulations


def test_what_it_says() -> None:
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 20, size=1000)
    wave = np.concatenate([flat[:500], rng.choice([2, 3, 10, 11, 16, 17], size=500)])
    found = Calibration({"z": np.stack([flat, wave, flat // 2], axis=1)}, 1000, 19, 20)
    assert found.words["z"][0] == "calibrated"
    assert "too high (falling)" in found.words["z"][2]
    assert found.summary()["words"] == found.words
    assert found.summary()["p_value"] == found.p_value
    assert "calibrated" in str(found)


def test_figure(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    ranks = {"z": rng.integers(0, 100, size=(1000, 5)), "c": rng.integers(0, 60, size=(1000, 1))}
    figure = rank_histograms(Calibration(ranks, 1000, 99, 20))
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown[:5]] == [f"z[{i}]" for i in range(5)]
    assert shown[5].get_title().startswith("c[0] too ")
    assert [bar.get_height() for bar in shown[0].patches if bar.get_width() == 5][:20] == list(
        Calibration(ranks, 1000, 99, 20).histograms["z"][0]
    )
    figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_bad_input_is_refused(engine: str) -> None:
    program = linear(engine)
    for options, text in [
        ({"num_simulations": 1}, "num_simulations must be a whole number of at least 2"),
        ({"num_draws": 1}, "num_draws must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"observed": {"y": 0}}, r"observed must name observed sites, among \['x'\]; got 'y'"),
        ({"observed": {"x": 1}}, r"observed\['x'\] must be an argument of shape \(3, 4\); got 1"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            calibrate(program, LIKE, **options)
    with pytest.raises(InvalidArgument, match=r"x must have shape \(N, 4\)"):
        calibrate(program, np.zeros((3, 5)))


def test_a_global_latent_is_refused(engine: str) -> None:
    with pytest.raises(InvalidArgument, match="site 'mu' must have the data along its first dim"):
        calibrate(wrapped(engine, *shared_latent(engine)), np.zeros(4))


@PYRO_ALONE
def test_nan_is_not_ranked(engine: str) -> None:
    with pytest.raises(NonFinite, match="site 'z' must be drawn as numbers; got nan"):
        calibrate(linear(engine, shift=np.nan), LIKE, num_simulations=10, num_draws=4)
