"""``fit(devices=n)``: the steps of one device, taken by several.

On torch this file is also the script that ``torchrun`` starts: two processes run ``work`` and write what they find.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from elbozoo.inference import ELBO, Adam, Capacity, Enumerate, FreeBits, Run, ScoreFunction, fit
from elbozoo.inference.errors import ElbozooError, InvalidArgument
from elbozoo.zoo import MLP, VAE, SigmoidBeliefNet

X = np.random.default_rng(4).normal(size=(70, 3))
BITS = (np.random.default_rng(5).random((70, 6)) < 0.4).astype(float)
GREY = np.random.default_rng(6).random((70, 6))
SPEC = VAE(data_dim=6, latent_dim=2, network=MLP(hidden=(4,)))
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "optimizer": Adam(0.05, clip_norm=1.0), "progress": False}
NOISELESS = ("location", "enumerated")


def job(name: str, **options: Any) -> Run:
    """One of the trainings that both one device and several do."""
    from programs import program

    if name == "location":
        return fit(program("pyro", "location"), X, **(OPTIONS | options))
    if name == "enumerated":
        objective = ELBO(gradient=Enumerate())
        return fit(SigmoidBeliefNet(6, (3,)).pyro(), BITS, objective=objective, **(OPTIONS | options))
    return fit(SPEC.pyro(), BITS, valid=BITS[:10], **(OPTIONS | options))


def bounds(run: Run) -> list[float]:
    return [row["bound"] for row in run.history]


# --- torch ----------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """What each of two processes does. Writes ``<rank>.json``."""
    import torch
    from programs import program

    torch.set_default_dtype(torch.float64)
    rank, found = int(os.environ["RANK"]), {}
    for name in (*NOISELESS, "vae"):
        run = job(name, devices=2)
        found[name] = {"bounds": bounds(run), "weights": {n: w.tolist() for n, w in run.weights.items()}}
    path = folder / "x.npy"
    if rank == 0:
        np.save(folder / "partial.npy", BITS)
        os.replace(folder / "partial.npy", path)
    job("location", devices=2, epochs=1)  # the file is there once both have come to its end
    found["memmap"] = bounds(fit(SPEC.pyro(), np.load(path, mmap_mode="r"), devices=2, **OPTIONS))
    for epochs in (1, 3):
        run = job("vae", devices=2, epochs=epochs, directory=folder / "run", resume=True)
    found["resumed"] = bounds(run)
    found["files"] = sorted(p.name for p in (folder / "run").iterdir()) if rank == 0 else None
    refusals = {
        "batch norm": lambda: fit(program("pyro", "batch_norm"), X, devices=2, **OPTIONS),
        "free bits": lambda: job("vae", objective=FreeBits(ELBO()), devices=2),
        "capacity": lambda: job("vae", objective=Capacity(ELBO(), warmup=1), devices=2),
        "baseline": lambda: job("vae", objective=ELBO(gradient=ScoreFunction(baseline="running-mean")), devices=2),
        "three": lambda: job("vae", devices=3, batch_size=18),
        "an iterable": lambda: fit(SPEC.pyro(), Batches(), devices=2, **OPTIONS),
        "diverges": lambda: fit(program("pyro", "fragile"), X, devices=2, **(OPTIONS | {"epochs": 40})),
    }
    for name, refused in refusals.items():
        try:
            refused()
        except ElbozooError as error:
            found[name] = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(found))


class Batches:
    """An iterable of batches."""

    def __iter__(self) -> Any:
        return iter(BITS.reshape(-1, 10, 6))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.pyro
@pytest.mark.parametrize("name", NOISELESS)
def test_torch_two_processes_take_the_steps_of_one(two: list[dict[str, Any]], name: str) -> None:
    one = job(name)
    for each in two:
        np.testing.assert_allclose(each[name]["bounds"], bounds(one), rtol=1e-9)
        for site, weight in one.weights.items():
            np.testing.assert_allclose(each[name]["weights"][site], weight, atol=1e-9)


def halves(seed_of: Any) -> list[float]:
    """The bounds of one process that computes both halves of every minibatch, with the noise of ``seed_of(rank)``."""
    import torch

    from elbozoo.inference.data import batches
    from elbozoo.inference.pyro_trainer import Trainer

    trainer = Trainer(
        SPEC.pyro(), ELBO(), OPTIONS["optimizer"], (BITS,), batch_size=16, seeds=[0], redraw_pixels=False, device=None
    )

    def gradient(batch: tuple) -> tuple[dict[str, Any], torch.Tensor]:
        found = []
        for rank, half in enumerate(batch[0].split(8)):
            state = np.random.SeedSequence([0, trainer.step, seed_of(rank)]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
            found.append(trainer._differentiate(torch.tensor(trainer.step), {}, half))
        for i, parameter in enumerate(trainer.params.values()):
            parameter.grad = (found[0][1][i] + found[1][1][i]) / 2
        norm = torch.nn.utils.clip_grad_norm_(list(trainer.params.values()), 1.0)
        return {"bound": (found[0][0]["bound"] + found[1][0]["bound"]) / 2}, norm

    trainer._gradient = gradient
    return [trainer.epoch(batches(0, epoch, len(BITS), 16)[None])["bound"].mean() for epoch in range(3)]


@pytest.mark.pyro
def test_torch_processes_have_noise_of_their_own(two: list[dict[str, Any]]) -> None:
    np.testing.assert_allclose(two[0]["vae"]["bounds"], halves(lambda rank: rank), rtol=1e-5)
    assert not np.allclose(two[0]["vae"]["bounds"], halves(lambda rank: 0), rtol=1e-5)
    assert two[0] == two[1] | {"files": two[0]["files"]}


@pytest.mark.pyro
def test_torch_files_and_streams(two: list[dict[str, Any]]) -> None:
    assert two[0]["memmap"] == two[0]["vae"]["bounds"]
    assert two[0]["resumed"] == two[0]["vae"]["bounds"]
    assert two[0]["files"] == ["checkpoint.safetensors", "config.json", "history.json", "weights.safetensors"]


REFUSALS = {
    "batch norm": ("Refused", "keep no statistics of minibatches on several devices; got the buffer 'encoder.1."),
    "free bits": ("Refused", "got FreeBits, which looks at the mean of a minibatch"),
    "capacity": ("Refused", "got Capacity, which looks at the mean of a minibatch"),
    "baseline": ("Refused", "got ScoreFunction, which keeps numbers from one minibatch to the next"),
    "three": ("InvalidArgument", "got 3 with 2 processes. Start it by torchrun --nproc-per-node 3 script.py"),
    "an iterable": ("InvalidArgument", "data must be rows of arrays on several devices"),
    "diverges": ("NonFinite", "site 'z' must stay finite while training"),
}


@pytest.mark.pyro
@pytest.mark.parametrize("name", REFUSALS)
def test_torch_refuses_what_shares_cannot_do(two: list[dict[str, Any]], name: str) -> None:
    kind, message = REFUSALS[name]
    for each in two:
        assert each[name][0] == kind
        assert message in each[name][1]


@pytest.mark.pyro
def test_torch_without_a_launcher() -> None:
    with pytest.raises(InvalidArgument, match=r"got 2 with 1 process. Start it by torchrun --nproc-per-node 2"):
        job("vae", devices=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices must be a whole number"),
        ({"devices": 2, "batch_size": 15}, "batch_size must be a multiple of devices=2; got 15"),
        ({"devices": 2, "replicates": 2}, "replicates must be None on several devices"),
    ],
)
def test_bad_settings(engine: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fit(getattr(SPEC, engine)(), BITS, **(OPTIONS | options))


# --- JAX ------------------------------------------------------------------------------------------------------------

JAX = """
import json, sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
from test_devices import *
from elbozoo.inference import NonFinite
from elbozoo.inference import numpyro_trainer
from programs import program
assert len(jax.devices()) == 2
found, trainers = {{}}, []
class Watched(numpyro_trainer.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        trainers.append(self)
numpyro_trainer.Trainer = Watched
options = OPTIONS | {{"binarize": "stochastic", "valid": GREY[:10]}}
for devices in (1, 2):
    run = fit(SPEC.numpyro(), GREY, devices=devices, **options)
    found[devices] = [run.history, {{n: w.tolist() for n, w in run.weights.items()}}]
    order = np.arange(16, dtype=np.int32).reshape(1, 16)
    trainer = trainers[-1]
    compiled = trainer._run_epoch.lower(trainer.state, trainer.data, order).compile()
    found[f"hlo {{devices}}"] = compiled.as_text().count("all-reduce")
    assert np.isfinite(run.evaluate(GREY, num_particles=2).nll)
np.save(sys.argv[1] + "/x.npy", GREY)
found["memmap"] = fit(SPEC.numpyro(), np.load(sys.argv[1] + "/x.npy", mmap_mode="r"), devices=2, **options).history
for epochs in (1, 3):
    run = fit(SPEC.numpyro(), GREY, devices=2, directory=sys.argv[1] + "/run", resume=True, **(options | {{"epochs": epochs}}))
found["resumed"] = run.history
batch_norm = [fit(program("numpyro", "batch_norm"), X, devices=d, **OPTIONS).history for d in (1, 2)]
found["batch norm"] = batch_norm
try:
    fit(program("numpyro", "fragile"), X, devices=2, **(OPTIONS | {{"epochs": 40}}))
except NonFinite as error:
    found["diverges"] = error.site
try:
    fit(SPEC.numpyro(), BITS, devices=3, **(OPTIONS | {{"batch_size": 18}}))
except InvalidArgument as error:
    found["three"] = str(error)
print(json.dumps(found))
"""


def rows(history: list[dict[str, float]]) -> np.ndarray:
    return np.array([[v for n, v in sorted(row.items()) if n != "seconds"] for row in history])


@pytest.mark.numpyro
def test_jax_two_devices_take_the_steps_of_one(tmp_path: Path) -> None:
    """Noise, redrawn pixels, the statistics of a batch norm and all: a minibatch is one, wherever its parts are."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    code = JAX.format(tests=str(Path(__file__).parent))
    start = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(rows(found["2"][0]), rows(found["1"][0]), rtol=1e-5)
    for name, weight in found["1"][1].items():
        np.testing.assert_allclose(found["2"][1][name], weight, atol=1e-5)
    assert found["hlo 1"] == 0
    assert found["hlo 2"] > 0, "no device waits for another: the minibatch is not spread"
    for name in ("memmap", "resumed"):
        np.testing.assert_array_equal(rows(found[name]), rows(found["2"][0]))
    np.testing.assert_allclose(*map(rows, found["batch norm"]), rtol=1e-5)
    assert found["diverges"] == "z"
    assert "devices must be at most the 2 that JAX sees here; got 3. Pass devices=2" in found["three"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
