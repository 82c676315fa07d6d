"""The pages' Python blocks run, from top to bottom, and what they claim holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL))


@pytest.mark.pyro
@pytest.mark.numpyro
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23 under Matplotlib 3.11
def test_inpainting() -> None:
    """SVI and NUTS agree on the noise level and on z, in both engines, and bracket the noise that was added."""
    found: dict[str, Any] = {}
    exec(compile(blocks("inpainting.md"), "docs/inpainting.md", "exec"), found)
    noise = {n: found[n].posterior["noise"].values for n in ("nuts_numpyro", "svi_numpyro", "nuts_pyro")}
    means = {n: float(v.mean()) for n, v in noise.items()}
    spread = float(noise["nuts_numpyro"].std())
    assert means["nuts_numpyro"] == pytest.approx(means["svi_numpyro"], abs=2 * spread)
    assert 0.03 < means["nuts_numpyro"] < 0.4
    assert 0.03 < means["nuts_pyro"] < 0.4
    z = {n: found[n].posterior["z"].mean(("chain", "draw")).values for n in ("nuts_numpyro", "svi_numpyro")}
    assert np.abs(z["nuts_numpyro"] - z["svi_numpyro"]).max() < 1.0


@pytest.mark.numpyro
@pytest.mark.arviz
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23 under Matplotlib 3.11
def test_ground_truth() -> None:
    """NUTS converges on every digit, its draws and the guide's lie side by side, and the verdicts are what the arrays say."""
    found: dict[str, Any] = {}
    exec(compile(blocks("ground-truth.md"), "docs/ground-truth.md", "exec"), found)
    pyplot.close("all")
    truth, calibration = found["truth"], found["calibration"]
    assert truth.converged.all()
    assert truth.nuts["posterior"]["z"].dims == truth.guide["posterior"]["z"].dims
    assert truth.nuts["posterior"]["z"].shape == truth.guide["posterior"]["z"].shape == (4, 300, 5, 4)
    assert (truth.energy_distance < 0.5).all(), "a trained guide is in the right place"
    assert calibration.ranks["z"].shape == (1000, 4)
    assert len(found["figure"].axes) == 4


# --- bottleneck.md: words by hand, every number and figure by docs/make_bottleneck.py ------------------------------------


@pytest.fixture
def script() -> Iterator[Any]:
    spec = util.spec_from_file_location("bottleneck_page", DOCS / "make_bottleneck.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def figures(page: str) -> set[str]:
    return set(re.findall(r"\]\((figures/bottleneck_[^)]+)\)", page))


def words(page: str) -> str:
    """A page without its numbers, tables and versions: what the template says."""
    lines = [line for line in page.splitlines() if not line.startswith(("|", "*Made by", "The slope"))]
    return re.sub(r"[-+−]?\d+(\.\d+)?", "#", "\n".join(lines))


@pytest.mark.numpyro
@pytest.mark.usefixtures("as_users_run_it")
def test_bottleneck_is_made_by_one_command(script: Any, tmp_path: Path) -> None:
    """At a small size: every figure, no hole in the words; and the page that is committed has the same words."""
    assert script.main(["--small", "--out", str(tmp_path)]) == 0
    page, committed = ((folder / "bottleneck.md").read_text("utf-8") for folder in (tmp_path, DOCS))
    assert words(page) == words(committed), (
        "docs/bottleneck.md is out of date: run docs/make_bottleneck.py, or with --study"
    )
    assert not re.search(r"\{\{|\{%|\bnan\b|None", page)
    assert script.main(["--study", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "bottleneck.md").read_text("utf-8") == page, "the study's results are in the page already"
    assert len(figures(page)) >= 8
    for name in figures(page):
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
    kept = {f"figures/{path.name}" for path in (DOCS / "figures").glob("bottleneck_*")}
    assert kept == figures(committed) == figures(page)


@pytest.mark.numpyro
def test_bottleneck_is_not_written_where_its_words_are_wrong(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PARTS", [lambda page, size: page.claims.update({"two is three": False})])
    assert script.main(["--out", str(tmp_path)]) == 1
    assert "two is three" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.numpyro
@pytest.mark.usefixtures("as_users_run_it")
def test_bottleneck_s_examples(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    exec(compile(blocks("bottleneck.md"), "docs/bottleneck.md", "exec"), found)
    assert found["optimum"].spec.latent_dim - found["found"].collapsed()["z"].sum() == 4
    assert len(found["curve"].slopes()) == 2
    assert "A datum costs" in capsys.readouterr().out
    nll = [e.nll for e in found["measured"].values()]
    assert max(nll) - min(nll) < 1e-6, "float64: the exact guide has no variance"
    rate = np.array([e.rate for e in found["measured"].values()])
    share = np.array(list(found["measured"]))
    np.testing.assert_allclose(rate, -2 * np.log(1 - share), atol=0.1)  # of 1000 data with 10 draws each
