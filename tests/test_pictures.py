"""The pictures draw the numbers that they are about, and a line of text where there is nothing to draw."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE
from matplotlib.figure import Figure
from oracles import library

from elbozoo import pictures
from elbozoo.inference import ELBO, RateDistortion, Run, bottleneck, diagnose, fit
from elbozoo.report import write_diagnosis
from elbozoo.zoo import LinearVAE

SPEC = LinearVAE(data_dim=16, latent_dim=3, scale=0.3)
CONFIG = {"binarize": "none", "seed": 0}


def weights() -> dict[str, np.ndarray]:
    """Latent 2 moves most, latent 0 not at all (and decodes to nothing); the guide draws its mean."""
    rng = np.random.default_rng(0)
    strength = np.array([0.0, 0.5, 2.0])
    encoder = np.linalg.qr(rng.normal(size=(16, 3)))[0].T * strength[:, None]
    return {
        "decoder.weight": rng.normal(size=(16, 3)) * (strength > 0), "decoder.bias": rng.normal(size=16),
        "encoder.weight": encoder, "encoder.bias": np.array([0.0, 0.1, 0.2]), "encoder_log_scale": np.full(3, -20.0),
    }  # fmt: skip


@pytest.fixture
def run(engine: str) -> Run:
    return Run(getattr(SPEC, engine)().with_weights(weights()), ELBO(), [], dict(CONFIG))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(40, 16))


def tiles(figure: Figure, columns: int, side: int = 4) -> np.ndarray:
    """The images of a mosaic, ``(rows, columns, D)``."""
    picture = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    padded = np.full((picture.shape[0] + 1, picture.shape[1] + 1), np.nan)
    padded[:-1, :-1] = picture
    grid = padded.reshape(-1, side + 1, columns, side + 1).transpose(0, 2, 1, 3)
    return grid[:, :, :side, :side].reshape(len(grid), columns, -1)


def said(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


@PYRO_ALONE  # written once for both engines
def test_interpolations(run: Run, x: np.ndarray) -> None:
    """The data at the ends; between them the decoder along the straight line of posterior means."""
    found, w = tiles(pictures.interpolations(run, x, pairs=3, steps=5), 7), weights()
    np.testing.assert_allclose(found[:, 0], x[0:6:2])
    np.testing.assert_allclose(found[:, -1], x[1:6:2])
    mean = x[:6] @ w["encoder.weight"].T + w["encoder.bias"]
    for i, share in enumerate(np.linspace(0, 1, 5)):
        z = (1 - share) * mean[0::2] + share * mean[1::2]
        np.testing.assert_allclose(found[:, 1 + i], z @ w["decoder.weight"].T + w["decoder.bias"], atol=1e-6)
    assert "there is one datum" in said(pictures.interpolations(run, x[:1]))


def test_traversals(run: Run, x: np.ndarray) -> None:
    """The most active dimension comes first; one that decodes to nothing is last and changes nothing."""
    figure, w = pictures.traversals(run, x, most=2, least=1, steps=7), weights()
    found = tiles(figure, 7)
    assert found.shape == (3, 7, 16)
    mean = x[0] @ w["encoder.weight"].T + w["encoder.bias"]
    for row, dimension in zip(found[:2], (2, 1), strict=True):
        moved = (row - row[0]) @ np.linalg.pinv(w["decoder.weight"][:, [dimension]]).T
        assert (np.diff(moved[:, 0]) > 0).all()
        assert moved[-1, 0] == pytest.approx(2 * 2.326, abs=0.35), "the prior's percentiles, of 4000 draws"
        rest = mean.copy()
        rest[dimension] = 0.0
        back = row[3] - (rest @ w["decoder.weight"].T + w["decoder.bias"])
        across = back - back @ w["decoder.weight"][:, dimension] * w["decoder.weight"][:, dimension] / (
            w["decoder.weight"][:, dimension] @ w["decoder.weight"][:, dimension]
        )
        np.testing.assert_allclose(across, 0, atol=1e-6, err_msg="the others stay at the posterior mean")
    np.testing.assert_allclose(found[2], found[2][:1].repeat(7, 0))
    assert [text.get_text().split("\n")[0] for text in figure.texts[:3]] == ["z[2]", "z[1]", "z[0]"]
    assert figure.texts[2].get_text().endswith("0.00")


def test_aggregate_posterior(run: Run, x: np.ndarray) -> None:
    """Draws of the two most active dimensions, and contours that hold 50, 90 and 99 in 100 of a standard normal."""
    figure, w = pictures.aggregate_posterior(run, x), weights()
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[2]", "z[1]")
    points = np.asarray(axes.collections[-1].get_offsets())
    mean = x @ w["encoder.weight"].T + w["encoder.bias"]
    np.testing.assert_allclose(points, mean[:, [2, 1]], atol=1e-6)
    radii = [np.linalg.norm(v, axis=1).mean() for v in _contours(axes)]
    np.testing.assert_allclose(sorted(radii), np.sqrt(-2 * np.log(1 - np.array([0.5, 0.9, 0.99]))), rtol=0.12)
    both = pictures.aggregate_posterior(run, x, labels=["yes", "no"] * 20, projection="pca")
    assert "principal component 1" in both.axes[0].get_xlabel()
    assert {t.get_text() for t in both.axes[0].get_legend().get_texts()} == {"yes", "no"}
    cut = np.asarray([len(c.get_offsets()) for c in both.axes[0].collections if len(c.get_offsets()) > 1])
    assert cut.tolist() == [20, 20]


def _contours(axes: Any) -> list[np.ndarray]:
    """The longest closed line of each level."""
    lines = next(c for c in axes.collections if hasattr(c, "levels"))
    return [max((p.vertices for p in path._iter_connected_components()), key=len) for path in lines.get_paths()]


@PYRO_ALONE  # written once for both engines
def test_one_latent_dimension_is_drawn_as_a_histogram(engine: str, x: np.ndarray) -> None:
    spec = LinearVAE(data_dim=3, latent_dim=1)
    program = fit(getattr(spec, engine)(), x[:, :3], epochs=1, progress=False).program
    one = Run(program, ELBO(), [], dict(CONFIG))
    assert pictures.aggregate_posterior(one, x[:, :3]).axes[0].get_ylabel() == "density"
    for picture in (pictures.interpolations, pictures.traversals, pictures.reconstructions):
        axes = picture(one, x[:, :3]).axes[0]
        assert not axes.images, "three numbers are no image"
        assert len(axes.collections[0].get_paths()) > 4


def test_collapse_curve() -> None:
    figure = pictures.collapse_curve({"a": {"z": [0.5, 0.001], "y": [0.02]}, "b": {"z": [0.3]}})
    line, other, *_ = figure.axes[0].lines
    for epsilon, count in ((0.0005, 0), (0.01, 1), (0.1, 2), (0.9, 3)):
        steps = np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) <= epsilon]
        assert steps[-1] == count
    assert line.get_linestyle() != other.get_linestyle()
    assert "no latent site factorises" in said(pictures.collapse_curve({"a": {}}))


def test_the_plane_has_lines_of_equal_elbo() -> None:
    model = SimpleNamespace(rate=3.0, distortion=7.0, rate_se=0.1, distortion_se=0.2)
    figure = pictures.rate_distortion_plane({"mine": model}, exact=([0.0, 5.0], [12.0, 6.0]))
    diagonals = [line for line in figure.axes[0].lines if line.get_color() == "0.87"]
    assert len(diagonals) > 2
    for line in diagonals:
        total = np.add(line.get_xdata(), line.get_ydata())
        assert total[0] == pytest.approx(total[1])
    points = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[3.0, 7.0]] in points
    assert [[0.0, 12.0], [5.0, 6.0]] in points


def test_the_plane_tells_the_frontier_from_the_rest() -> None:
    point = {"rate_se": 0.1, "distortion_se": 0.1}
    points = [SimpleNamespace(beta=b, rate=r, distortion=d, **point) for b, r, d in ((1, 4, 1), (2, 2, 3.9), (3, 0, 5))]
    figure = pictures.rate_distortion_plane({}, RateDistortion(tuple(points), 10, 0.01))
    faces = {tuple(l.get_xydata()[0]): l.get_markerfacecolor() for l in figure.axes[0].lines if l.get_marker() == "o"}
    assert faces == {(4, 1): pictures.DARK, (2, 3.9): "1.0", (0, 5): pictures.DARK}
    assert {t.get_text() for t in figure.axes[0].texts} >= {"β = 1", "β = 2", "β = 3"}


@pytest.mark.parametrize("richer", [None, -98.5])
def test_waterfall(richer: float | None) -> None:
    gaps = SimpleNamespace(
        elbo=-101.0, optimal_elbo=-99.0, richer_elbo=richer, log_lik=-98.0, amortisation=2.0, amortisation_se=0.1,
        approximation=1.0, approximation_se=0.2, richer_se=0.1, log_lik_method="AIS",
    )  # fmt: skip
    (axes,) = pictures.gap_waterfall(gaps).axes
    tops = sorted(round(bar.get_y() + bar.get_height(), 6) for bar in axes.patches)
    assert tops == sorted([-101.0, -99.0, *([] if richer is None else [richer]), -98.0, -98.0])
    written = {text.get_text() for text in axes.texts}
    assert written >= {"-101.00", "-98.00", "+2.00", *(["+1.00"] if richer is None else ["+0.50"])}
    assert "AIS" in axes.get_title()


def test_curves_count_live_units(run: Run) -> None:
    row = {"bound": -3.0, "rate": 1.0, "distortion": 2.0, "live_z": 3.0, "live_y": 2.0}
    run.history.extend({"epoch": i, **row} for i in (1, 2))
    figure = pictures.curves({"a": run})
    assert [axes.get_title() for axes in figure.axes] == ["bound", "rate", "distortion", "live units"]
    assert figure.axes[-1].lines[0].get_ydata().tolist() == [5.0, 5.0]
    run.history.clear()
    assert "no history" in said(pictures.curves({"a": run}))


# --- programs of the user's own -----------------------------------------------------------------------------------


def own(engine: str, kind: str) -> tuple[Run, Any]:
    """A run of a program that is not of the zoo, and its data."""
    lib, rng = library(engine), np.random.default_rng(0)
    normal, array = lib.dist.Normal, lib.array

    def two_sites_and_two_arguments(x: Any, y: Any) -> tuple[Any, Any]:
        def draw(weight: Any) -> tuple[Any, Any]:
            c = lib.sample("c", lib.dist.Bernoulli(array(0.5 * np.ones(len(x)))))
            loc = array(np.zeros((1, 3))) + weight * x
            return c, lib.sample("z", normal(loc, 1.0).to_event(1))

        return draw, (lambda c, z: lib.sample("y", normal(z.sum(-1) + 4.0 * c, 1.0), obs=y))

    def model(x: Any, y: Any) -> None:
        draw, observe = two_sites_and_two_arguments(x, y)
        with lib.plate("data", len(x), dim=-1):
            observe(*draw(0.0))

    def guide(x: Any, y: Any) -> None:
        draw, _ = two_sites_and_two_arguments(x, y)
        weight = lib.param("weight", array(0.5))
        with lib.plate("data", len(x), dim=-1):
            draw(weight)

    def shared_model(x: Any) -> None:
        mu = lib.sample("mu", normal(array(0.0), 1.0))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", normal(mu, 1.0), obs=x)

    def shared_guide(x: Any) -> None:
        lib.sample("mu", normal(lib.param("m", array(0.0)), 1.0))

    Program = import_module(f"elbozoo.inference.{engine}_engine").Program
    if kind == "shared":
        data: Any = rng.normal(size=12)
        program = Program(shared_model, shared_guide)
    else:
        data = (rng.normal(size=(12, 3)), rng.normal(size=12))
        program = Program(model, guide)
    if engine == "numpyro":
        program = program.with_params({"m": array(0.0)} if kind == "shared" else {"weight": array(0.5)})
    return Run(program, ELBO(), [], dict(CONFIG)), data


@PYRO_ALONE  # written once for both engines
def test_discrete_sites_and_several_arguments(engine: str) -> None:
    run, data = own(engine, "two sites")
    figure = pictures.aggregate_posterior(run, data)
    assert figure.axes[0].get_xlabel().startswith("z[")
    for picture in (pictures.interpolations, pictures.traversals, pictures.reconstructions):
        assert picture(run, data).axes, "one number a datum is still a picture"
    assert pictures.samples(run, 2, 3, data=data).axes
    assert "pass data=" in said(pictures.samples(run))


def test_latents_that_all_data_share_have_no_picture(engine: str) -> None:
    run, data = own(engine, "shared")
    for picture in (pictures.aggregate_posterior, pictures.interpolations, pictures.traversals):
        assert "one that all data share" in said(picture(run, data))
    assert pictures.samples(run, 2, 3, data=data).axes
    assert pictures.reconstructions(run, data).axes


# --- the page -----------------------------------------------------------------------------------------------------


@PYRO_ALONE  # NumPyro's is the command line's, in tests/test_cli.py
def test_the_page_of_a_diagnosis(run: Run, x: np.ndarray, tmp_path: Any) -> None:
    """Every sentence and figure is on it, the waterfall where there are gaps, and nothing comes from elsewhere."""
    settings = {"num_particles": 20, "num_data": 60}
    run.history.append({"epoch": 1, "bound": -3.0, "rate": 1.0, "distortion": 2.0, "seconds": 1.0})
    found = diagnose(run, x, **settings, num_gaps=0, num_simulations=0)
    whole = diagnose(run, x, **settings, num_gaps=6, num_simulations=60)
    pages = []
    for diagnosis in (found, whole):
        path = write_diagnosis(run, diagnosis, x, tmp_path / "page.html", label="<mine>")
        pages.append(path.read_text())
    assert whole.gaps is not None
    plain, with_gaps = pages
    import html

    text = html.unescape(plain)
    assert all(sentence in text for sentence in found.verdict)
    assert f"{found.bottleneck.rate:.3f} ± {found.bottleneck.rate_se:.3f}" in text
    assert f"{found.exact_nll:.3f} ± {found.exact_nll_se:.3f}" in text
    assert "&lt;mine&gt;" in plain
    assert "<mine>" not in plain
    assert plain.count("<img") == 9
    assert with_gaps.count("<img") == 11
    assert f"{whole.gaps.amortisation:.3f} ± {whole.gaps.amortisation_se:.3f}" in with_gaps
    assert "amortisation" not in plain
    for page in pages:
        assert not __import__("re").search(r"""(?:src|href)=["'](?!data:)|<script|@import|url\(""", page)


def test_bottlenecks_draw_as_they_are(run: Run, x: np.ndarray) -> None:
    found = bottleneck(run.program, x, num_particles=4)
    assert "99% of the data" in pictures.collapse_curve({"a": found}).axes[0].get_title()
    assert pictures.rate_distortion_plane({"a": found}).axes[0].get_xlabel() == "rate, nats per datum"
