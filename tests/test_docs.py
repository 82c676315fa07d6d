"""The pages' Python blocks run, from top to bottom, and what they claim holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
