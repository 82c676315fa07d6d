"""Training, reported values and exports on a GPU, where there is one.

``JAX_PLATFORMS=cpu,cuda pytest tests/test_accelerator.py`` lets JAX see it. ``ELBOZOO_DEVICE=cpu`` runs the same tests on
the CPU, to see that they are sound. Without a GPU NumPyro's rows are skipped, and Pyro's run on a device that is none
(:mod:`elsewhere`), where what does not follow a program fails as it would on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_twins

from elbozoo.inference import (
    ELBO,
    IWAE,
    NVIL,
    REBAR,
    VIMCO,
    Adam,
    AnnealedKL,
    DReG,
    Enumerate,
    ScoreFunction,
    StraightThrough,
    bottleneck,
    bracket,
    diagnose,
    evaluate,
    fit,
    gaps,
    gradient_noise,
)
from elbozoo.inference.errors import NonFinite
from elbozoo.zoo import MLP, VAE, CategoricalVAE, GaussianMixtureVAE, LinearVAE, SigmoidBeliefNet

SLOW = ("test_goes_on_where_it_stopped", "test_diagnoses")
DEVICE = os.environ.get("ELBOZOO_DEVICE", "gpu")
X = (np.random.default_rng(0).random((64, 16)) < 0.4) * 1.0
SMALL = VAE(16, 3, MLP((5,)))
NET = SigmoidBeliefNet(16, (4,))
TRAINING: dict[str, Any] = {"epochs": 3, "batch_size": 16, "progress": False}


def sees_a_device(engine: str) -> bool:
    if DEVICE == "cpu":
        return True
    if engine == "pyro":
        return pytest.importorskip("torch").cuda.is_available()
    try:
        return bool(pytest.importorskip("jax").devices(DEVICE))
    except RuntimeError:
        return False


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip where the engine of the test, or one of both, sees none."""
    engines = [request.getfixturevalue("engine")] if "engine" in request.fixturenames else ["pyro", "numpyro"]
    if engines == ["pyro"] and not sees_a_device("pyro"):
        if request.node.originalname in SLOW and not os.environ.get("ELBOZOO_EVERY_ROW"):
            pytest.skip("a device that is none takes minutes for it; ELBOZOO_EVERY_ROW=1 runs it")
        from elsewhere import a_device  # here, for it needs torch

        with a_device():
            yield
        return
    for name in engines:
        if not sees_a_device(name):
            pytest.skip(f"elbozoo[{name}] sees no {DEVICE} here")
    yield


def trained(engine: str, spec: Any, data: Any = X, **options: Any) -> Any:
    device = DEVICE if sees_a_device(engine) else "meta"  # as elsewhere.NAME
    return fit(getattr(spec, engine)(), data, **(TRAINING | {"device": device} | options))


OBJECTIVES = {
    NET: ELBO(gradient=NVIL()),
    CategoricalVAE(16, 3, 4): IWAE(2, VIMCO()),
    GaussianMixtureVAE(16, 3, 2): ELBO(gradient=Enumerate()),
}


def twins() -> list[Any]:
    return [spec for spec in test_twins.collect() if spec.generative]


def log_probs(program: Any, x: Any, values: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Log densities by role and site at given latents, or at the guide's draws; and the latents."""
    torch, poutine = pytest.importorskip("torch"), pytest.importorskip("pyro").poutine
    with torch.no_grad():
        if values is None:
            drawn = poutine.trace(program.guide).get_trace(*x)
            values = {n: drawn.nodes[n]["value"] for n in drawn.stochastic_nodes}
        found = {}
        for role in ("guide", "model"):
            trace = poutine.trace(poutine.condition(getattr(program, role), data=values)).get_trace(*x)
            trace.compute_log_prob()
            found |= {(role, n): s["log_prob"].cpu() for n, s in trace.nodes.items() if "log_prob" in s}
    return found, values


def objective_for(spec: Any) -> Any:
    kinds = {type(s): o for s, o in OBJECTIVES.items()}
    if type(spec).__name__ in ("VQVAE", "HierarchicalVQVAE"):
        return ELBO(gradient=StraightThrough())
    return kinds.get(type(spec), ELBO())


def data_and_objective(spec: Any) -> tuple[Any, Any]:
    x = np.resize(X, (64, spec.data_dim))
    if type(spec).__name__ == "SemiSupervisedVAE":
        labels = np.where(np.arange(64) < 40, -1, np.arange(64) % spec.num_classes)
        return (x, labels), ELBO(gradient=Enumerate())
    return x, objective_for(spec)


@pytest.mark.parametrize("spec", twins(), ids=str)
def test_every_model_trains_in_jax_as_on_the_cpu(spec: Any) -> None:
    """JAX draws the same numbers on every device."""
    data, objective = data_and_objective(spec)
    options = {
        "objective": objective,
        "epochs": 2,
        "optimizer": Adam(0.01, eps=1.0),
    }  # a step is linear in the gradient
    runs = [trained("numpyro", spec, data, **options, device=d) for d in (DEVICE, "cpu")]
    for name, a in runs[1].weights.items():
        np.testing.assert_allclose(runs[0].weights[name], a, 1e-6, 1e-6, err_msg=name)


@pytest.mark.parametrize("spec", twins(), ids=str)
def test_every_model_trains_in_torch(spec: Any) -> None:
    """Through the traced step; the trained weights give the same densities on the CPU."""
    torch = pytest.importorskip("torch")
    data, objective = data_and_objective(spec)
    run = trained("pyro", spec, data, objective=objective, epochs=30)
    assert all(np.isfinite(row["bound"]) for row in run.history)
    home = spec.pyro().with_weights(run.weights)
    x = tuple(torch.as_tensor(a[:5]) for a in (data if isinstance(data, tuple) else (data,)))
    there = next(iter(run.program._tensors().values())).device
    assert there.type == {"gpu": "cuda"}.get(DEVICE, DEVICE)
    found, values = log_probs(run.program, tuple(a.to(there) for a in x))
    expected, _ = log_probs(home, x, {n: v.cpu() for n, v in values.items()})
    assert found.keys() == expected.keys()
    for site, value in expected.items():
        np.testing.assert_allclose(found[site], value, 1e-9, 1e-9, err_msg=str(site))


@pytest.mark.parametrize(
    ("spec", "objective"),
    [
        (SMALL, AnnealedKL(ELBO(), warmup=5)),
        (SMALL, IWAE(4, DReG())),
        (NET, IWAE(4, VIMCO())),
        (NET, ELBO(gradient=ScoreFunction(baseline="running-mean"))),
        (NET, ELBO(gradient=NVIL())),
        (NET, ELBO(gradient=REBAR())),
    ],
    ids=["annealed", "dreg", "vimco", "running-mean", "nvil", "rebar"],
)
def test_goes_on_where_it_stopped(engine: str, spec: Any, objective: Any, tmp_path: Path) -> None:
    options = {"objective": objective, "optimizer": Adam(0.01, average=0.9)}
    whole = trained(engine, spec, **options, epochs=40)
    trained(engine, spec, **options, epochs=20, directory=tmp_path)
    again = trained(engine, spec, **options, epochs=40, directory=tmp_path, resume=True)
    for name, a in whole.weights.items():
        np.testing.assert_array_equal(again.weights[name], a, err_msg=name)


def test_replicates_are_single_runs(engine: str) -> None:
    several = trained(engine, SMALL, replicates=3)
    for seed, run in enumerate(several):
        alone = trained(engine, SMALL, seed=seed)
        for name, a in alone.weights.items():
            np.testing.assert_allclose(run.weights[name], a, 1e-9, 1e-9, err_msg=name)


def test_an_exact_guide_has_no_gap(engine: str) -> None:
    spec = LinearVAE(5, 2, scale=0.6, guide="full")
    x = np.random.default_rng(1).standard_normal((40, 5))
    run = trained(engine, spec, x, epochs=1)
    program = run.program.with_weights(spec.exact_guide(run.weights), x)
    found = evaluate(program, x, num_particles=7)
    assert found.nll == pytest.approx(-spec.log_prob(run.weights, x).mean(), rel=1e-10)
    assert found.nll_mc_se < 1e-7


def test_reads_and_exports(engine: str, tmp_path: Path) -> None:
    run = trained(engine, SMALL, epochs=5, directory=tmp_path, valid=X[:8])
    found = run.evaluate(X, num_particles=50)
    assert np.isfinite(found.nll)
    assert run.to_arviz(X[:6], num_draws=20) is not None
    for instrument in (
        lambda p: bottleneck(p, X[:20]),
        lambda p: gaps(p, X[:4], num_steps=5, num_temperatures=5),
        lambda p: bracket(p, X[:4], num_temperatures=5),
        lambda p: gradient_noise(p, X[:16], IWAE(3), num_draws=10),
    ):
        instrument(run.program)


def test_diagnoses(engine: str) -> None:
    run = trained(engine, SMALL, epochs=5, valid=X[:8])
    diagnose(run, X[:20], num_particles=20, num_gaps=2, num_simulations=10)


def test_latents_that_are_summed_out(engine: str) -> None:
    run = trained(engine, GaussianMixtureVAE(16, 3, 2), objective=ELBO(gradient=Enumerate()))
    assert np.isfinite(run.evaluate(X, num_particles=20).nll)


@pytest.mark.parametrize("kind", ["float32", "memory-mapped"])
def test_data_that_stay_on_the_host(engine: str, kind: str, tmp_path: Path) -> None:
    if kind == "memory-mapped" and engine == "pyro" and not sees_a_device(engine):
        pytest.skip("the thread that reads ahead does not know the device that is none")
    path = tmp_path / "x.npy"
    np.save(path, X.astype(np.float32))
    data = np.load(path, mmap_mode="r" if kind == "memory-mapped" else None)
    assert np.isfinite(trained(engine, SMALL, data).history[-1]["bound"])


def test_what_is_not_finite_is_named(engine: str) -> None:
    with pytest.raises(NonFinite):
        trained(engine, replace(SMALL), X, optimizer=Adam(1e300), epochs=30)
