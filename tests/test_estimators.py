"""The benchmark of estimators: which objectives it finds fitting, what it claims, and a program of the user's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE

from elbozoo.benchmarks.estimators import Config, claims, fitting, grid_of, main, slopes
from elbozoo.inference.errors import InvalidArgument

OWN = """
def make_program():
    {imports}
    def model(x):
        w = lib.param("w", {one})
        with lib.plate("data", len(x)):
            z = lib.sample("z", dist.Normal({zeros}, 1.0))
            lib.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(1), obs=x)

    def guide(x):
        v = lib.param("v", {one})
        with lib.plate("data", len(x)):
            lib.sample("z", dist.Normal(x @ v, 0.5))

    return Program(model, guide)
"""
WORDS = {
    "numpyro": {
        "imports": "import jax.numpy as jnp, numpyro as lib, numpyro.distributions as dist\n    from elbozoo.inference.numpyro_engine import Program",
        "one": "jnp.ones(3)", "zeros": "jnp.zeros(len(x))",
    },
    "pyro": {
        "imports": "import torch, pyro as lib, pyro.distributions as dist\n    from elbozoo.inference.pyro_engine import Program",
        "one": "torch.ones(3)", "zeros": "torch.zeros(len(x))",
    },
}  # fmt: skip


@pytest.fixture
def own(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A program and data of the user's, at a tiny size."""
    pytest.importorskip({"numpyro": "numpyro", "pyro": "torch"}[engine])
    name = f"own_{engine}"
    (tmp_path / f"{name}.py").write_text(OWN.format(**WORDS[engine]))
    monkeypatch.syspath_prepend(tmp_path)
    np.save(tmp_path / "my.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return Config(
        data=(str(tmp_path / "my.npy"),), program=f"{name}:make_program", objectives=("elbo", "iwae, dreg", "nvil"),
        particles=2, seeds=(0, 1), num_steps=50, seconds=0.01, batch_size=16, num_particles=8, num_draws=4,
        cells=tmp_path / "cells", results=tmp_path / "own.json",
    )  # fmt: skip


@PYRO_ALONE
def test_a_program_of_the_user_s_own(own: Config, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(own)
    cells = json.loads(own.results.read_text())["cells"]
    kinds = [(c["kind"], c.get("objective")) for c in cells.values()]
    assert kinds == [("training", "elbo"), ("training", "iwae, dreg"), ("gradients", None)], (
        "nvil is for discrete sites"
    )
    assert {c["engine"] for c in cells.values()} == {engine}
    for cell in list(cells.values())[:2]:
        assert len(cell["steps"]["nll"]) == len(cell["time"]["nll"]) == 2
        assert cell["steps"]["steps"] == [50, 50]
        np.testing.assert_array_less(cell["steps"]["elbo"], [-v + 0.5 for v in cell["steps"]["nll"]])
        assert cell["step_bytes"] > 0
    stages = list(cells.values())[2]["stages"]
    assert set(stages) == {"start", "middle", "end"}
    assert all(row["guide"]["variance"] > 0 for rows in stages.values() for row in rows.values())
    finished = {p.name: p.stat().st_mtime_ns for p in own.cells.glob("*.json")}
    main(own)
    assert finished == {p.name: p.stat().st_mtime_ns for p in own.cells.glob("*.json")}, "nothing is measured twice"
    np.save(own.data[0], np.load(own.data[0]) + 1.0)
    assert len(grid_of(own).missing()) == 3, "other data are other cells"


@pytest.mark.numpyro
def test_what_fits_is_what_has_a_right_gradient() -> None:
    config = Config(engines=("numpyro",))
    fits = {model: set(fitting(config, model)) for model in config.models}
    assert fits["vae"] == fits["hierarchy"]
    assert {"elbo", "iwae, dreg", "free bits"} <= fits["vae"]
    assert not fits["vae"] & {"nvil", "rws", "concrete"}
    assert fits["sbn"] - fits["categorical"] == {"disarm", "iwae, disarm"}
    assert not fits["sbn"] & {"elbo", "iwae", "free bits"}


def law(power: float, guide: float, dreg: float) -> dict[str, Any]:
    counts = [2**j for j in range(13)]
    particles = [1, 4, 16, 64]
    snr = {
        "pathwise": {"model": [k**0.5 for k in particles], "guide": [k**guide for k in particles]},
        "dreg": {"model": [k**0.5 for k in particles], "guide": [k**dreg for k in particles]},
    }
    cell = {"kind": "laws", "data": "d", "engine": "e", "model": "vae", "counts": counts, "snr": snr}
    cell |= {"bounds": [-3.0 * k**power for k in counts], "particles": particles}
    return cell | {"k_hat": {"gap": 0.49, "gradients": 0.49}}


def test_laws_are_read_off_the_figures() -> None:
    assert slopes(law(-1.0, -0.5, 0.1)) == pytest.approx(
        {"gap": -1.0, "pathwise, model": 0.5, "pathwise, guide": -0.5, "dreg, model": 0.5, "dreg, guide": 0.1}
    )
    assert list(claims({"a": law(-1.0, -0.5, 0.1)}).values()) == [True, True, True]
    wrong = law(-0.5, 0.0, -0.5)
    assert list(claims({"a": wrong}).values()) == [False, False, False]
    # no law of the gap, or of the gradients, without a variance of the weights that each is of
    assert list(claims({"a": wrong | {"k_hat": {"gap": 0.51, "gradients": 0.49}}}).values()) == [False, False]
    assert list(claims({"a": wrong | {"k_hat": {"gap": 0.49, "gradients": 0.51}}}).values()) == [False]


def test_an_order_of_variances_is_claimed_where_both_are_there() -> None:
    def row(variance: float) -> dict[str, Any]:
        return {"guide": {"variance": variance}}

    stages = {"end": {"score": row(3.0), "score, running mean": row(1.0), "nvil": row(2.0)}}
    found = claims({"a": {"kind": "gradients", "data": "d", "engine": "e", "model": "sbn", "stages": stages}})
    assert list(found.values()) == [True, False]


def test_bad_settings(own: Config) -> None:
    with pytest.raises(InvalidArgument, match='program must be "module:function"'):
        main(replace(own, program="no_function"))
    with pytest.raises(InvalidArgument, match="program must be a function that can be imported"):
        main(replace(own, program="math:nowhere"))
    with pytest.raises(InvalidArgument, match="program must be made as a Program; got float"):
        main(replace(own, program="random:random"))
    with pytest.raises(InvalidArgument, match="seeds must follow one another"):
        main(replace(own, seeds=(3, 7)))
    with pytest.raises(InvalidArgument, match="objectives must be one of"):
        main(replace(own, objectives=("iwea",)))
