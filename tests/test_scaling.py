"""What the benchmark of scaling reads off its times."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from elbozoo.benchmarks import scaling
from elbozoo.benchmarks.tables import scaling as written
from elbozoo.benchmarks.tables import scaling_figure

COUNTS = [1, 2, 4, 8, 16, 32, 64, 128]


def seconds(fixed: float, each: float) -> list[float]:
    return [fixed + each * n for n in COUNTS]


def cells(axis: str, times: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Cells of an axis, as the benchmark writes them."""
    return {
        f"{axis}, {n}": {
            "axis": axis,
            "value": n,
            "seconds": {name: [t[i]] * 3 for name, t in times.items()} | {"pythae": None},
            "ratios": {f"{a} / {b}": {"median": times[a][i] / times[b][i]} for a, b in pairs},
            "bytes": {"numpyro": 1000 * n},
        }
        for i, n in enumerate(COUNTS)
    }


def test_a_power_law_has_its_slope_and_is_linear_from_the_start_or_never() -> None:
    assert scaling.slope(COUNTS, [3e-3 * n**0.5 for n in COUNTS]) == pytest.approx(0.5)
    assert scaling.turning_point(COUNTS, [3e-3 * n**0.5 for n in COUNTS]) is None
    assert scaling.turning_point(COUNTS, [3e-3 * n for n in COUNTS]) == 1
    assert scaling.slope([1], [1.0]) is None
    assert scaling.turning_point([1], [1.0]) is None


@pytest.mark.parametrize("fixed", [1.0, 7.0, 20.0])
def test_a_fixed_cost_turns_linear_where_its_share_has_fallen(fixed: float) -> None:
    """Between n and 2n the local slope of ``a + n`` is ``log2((a + 2n) / (a + n))``: above 0.8 from the n where it is."""
    expected = next(n for n in COUNTS if np.log2((fixed + 2 * n) / (fixed + n)) > 0.8)
    assert scaling.turning_point(COUNTS, seconds(fixed, 1.0)) == expected


def test_a_later_flat_piece_moves_the_turning_point_behind_it() -> None:
    times = seconds(0.0, 1.0)
    times[4:] = [t / 1.7 for t in times[4:]]
    assert scaling.turning_point(COUNTS, times) == 16


def test_claims_are_read_off_the_cells() -> None:
    times = {"numpyro": seconds(7.0, 1.0), "as many runs": seconds(0.0, 8.0)}
    found = cells("replicates", times, [("numpyro", "as many runs")])
    held = scaling.claims(found)
    assert held["numpyro: 8 replicates take less time than 8 runs (0.234 of it)"]
    (slope,) = (claim for claim in held if "grows more slowly" in claim)
    assert held[slope]
    assert "from 1 to 32 replicates" in slope
    dear = cells("replicates", {"numpyro": seconds(7.0, 9.0), "as many runs": seconds(0.0, 8.0)}, [])
    assert not any("runs" in claim for claim in scaling.claims(dear)), "nothing is claimed of ratios that are not there"
    steep = cells("replicates", {"numpyro": [n**1.1 for n in COUNTS]}, [])
    assert list(scaling.claims(steep).values()) == [False]


def test_speed_is_held_to_the_worst_value_of_an_axis() -> None:
    times = {"numpyro": seconds(1.0, 1.0), "hand-written JAX": seconds(1.0, 0.97), "NumPyro's own": seconds(1.1, 0.999)}
    times |= {"pyro": seconds(1.0, 1.2), "hand-written PyTorch": seconds(1.0, 1.0), "Pyro's own": seconds(2.0, 1.3)}
    pairs = [(e, other[e]) for other in (scaling.HAND_WRITTEN, scaling.OWN) for e in scaling.TARGETS]
    held = scaling.claims(cells("particles", times, pairs))
    assert {claim.split(":")[0]: good for claim, good in held.items() if "times as long" in claim} == {
        "numpyro, K = 1": True,
        "pyro, K = 1": True,
    }
    own = {claim: good for claim, good in held.items() if "no step takes longer" in claim}
    assert len(own) == 2
    (numpyro,) = (claim for claim in own if claim.startswith("numpyro"))
    assert not own[numpyro], "1.0002 of the time is longer, and there is no allowance"
    assert "at 128" in numpyro
    assert [good for claim, good in own.items() if claim.startswith("pyro")] == [True]


def test_the_table_and_the_picture_are_of_what_is_there() -> None:
    times = {"numpyro": seconds(7.0, 1.0), "as many runs": seconds(0.0, 8.0)}
    found = cells("replicates", times, [("numpyro", "as many runs")])
    record = json.loads(json.dumps({"cells": found, "config": {"latent_dim": 16, "batch_size": 100}}))
    page = written(record)
    (row,) = (line for line in page.splitlines() if line.startswith("| replicates | numpyro | ") and "| 32 |" in line)
    assert row.endswith("| 8e+03 (1) – 1.35e+05 (128) |")
    assert "| replicates | as many runs | 1.00 |" in page
    assert "| replicates | numpyro / as many runs | 1.00 (1), " in page
    assert "| replicates | numpyro | 0.001 (1) – 0.128 (128) | 1.00 |" in page
    axes = scaling_figure(record).axes
    assert [len(ax.lines) for ax in axes] == [0, 4], "two curves and their turning points"


def test_only_the_asked_axis_leaves_the_base_point() -> None:
    config = scaling.Config()
    base = scaling.point(config, {"axis": "particles", "value": 1})
    assert scaling.point(config, {"axis": "batch", "value": config.batch_size}) == base
    assert scaling.point(config, {"axis": "latents", "value": config.latent_dim}) == base
    assert scaling.point(config, {"axis": "replicates", "value": 8}) == scaling.replace(base, replicates=8)
    assert scaling.point(config, {"axis": "depth", "value": 3}).spec.latent_dims == (16, 16, 16)
    assert 100 < scaling.steps_of(config, base, 0.5) <= config.most_steps
    assert scaling.steps_of(config, scaling.point(config, {"axis": "particles", "value": 4096}), 0.5) == 1


def test_the_grid_asks_for_every_value_once() -> None:
    config = scaling.Config()
    names = [(cell["axis"], cell["value"]) for cell in scaling.grid_of(config).cells]
    assert len(names) == len(set(names)) == sum(len(getattr(config, field)) for field in scaling.AXES.values())
