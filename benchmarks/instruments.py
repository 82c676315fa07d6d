"""Do the instruments agree with one another on a VAE trained on MNIST, and what do they cost?

A 784-200-200-20 VAE (tanh, Bernoulli, diagonal Gaussian guide) is trained on MNIST by the ELBO. Then, on test images:
the ELBO, importance sampling (K = 5000) and annealed importance sampling estimate ``log p(x)``, which they must do in
this order; annealing there and back brackets it on data of the model's own; the gap is split; the rate is split; NUTS
is held against the guide, plain and importance-weighted, on images whose k̂ is low, just above 0.7, and high; and the
time of ``diagnose`` on 1000 images and the peak memory of importance sampling at K = 500 and K = 50,000 are measured.

    python benchmarks/instruments.py --data-dir DIR
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record
from elbozoo.inference import (
    Run,
    annealed_importance_sampling,
    bottleneck,
    bracket,
    diagnose,
    evaluate,
    fit,
    gaps,
    ground_truth,
    optimise_guide,
)
from elbozoo.inference.evaluation import LARGE_K
from elbozoo.zoo import MLP, VAE

GIB = 2**30
CHAINS = 4  # of NUTS
GUIDES = {"posterior": "guide", "optimised_posterior": "optimised guides"}
"""What NUTS is held against, by cell."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        epochs: of training.
        hidden, latent_dim: sizes of the networks.
        num_particles: K of importance sampling.
        num_annealed: images for annealed importance sampling, for the bracket and for the gaps.
        num_temperatures, num_chains: of annealed importance sampling (Wu et al. 2016 have 10,000 and 16).
        num_posteriors: images for NUTS: of ``num_data``, a third with the lowest k̂, a third with the lowest of the rest
            that are 0.7 or more, a third with the highest.
        weighted: the guide's draws for each one of NUTS that are importance-weighted, and give k̂.
        num_draws: draws of each of four chains of NUTS.
        local_steps: of each optimisation of single images' guides.
        num_data: images for ``diagnose``, for the split of the rate and to choose from for NUTS.
        num_gaps, num_simulations: of ``diagnose``: its defaults.
        many_particles: K at which the peak memory is measured, the lower and the higher.
        results: JSON file to write and to go on from.
        checkpoints: folder for the trained model.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    epochs: int = 15
    hidden: int = 200
    latent_dim: int = 20
    num_particles: int = 5000
    num_annealed: int = 100
    num_temperatures: int = 500
    num_chains: int = 16
    num_posteriors: int = 36
    num_draws: int = 500
    weighted: int = 10
    local_steps: int = 500
    num_data: int = 1000
    num_gaps: int = 50
    num_simulations: int = 500
    many_particles: tuple[int, int] = (500, 50_000)
    results: Path = Path("benchmarks/results/instruments.json")
    checkpoints: Path = Path("runs/instruments")
    smoke: bool = False


class Bench:
    """The trained model, its test data and the cells."""

    def __init__(self, config: Config, record: Record):
        self.config, self.record = config, record
        data = load(config.data, data_dir=config.data_dir)
        spec = VAE(data.train.shape[1], config.latent_dim, network=MLP(hidden=(config.hidden,) * 2, activation="tanh"))
        self.folder = config.checkpoints / f"{config.data}-{config.epochs}-{config.hidden}-{config.latent_dim}"
        settings: dict[str, Any] = {"epochs": config.epochs, "batch_size": 100, "binarize": "stochastic"}
        self.run: Run = fit(spec.numpyro(), data.train, **settings, directory=self.folder, resume=True)
        self.x = self.run.prepare(data.test)[0]
        self.images = data.test

    def training(self) -> dict[str, Any]:
        """What the model is."""
        found = self.run.history[-1]
        return {**found, "seconds": sum(row["seconds"] for row in self.run.history)}

    def likelihood(self) -> dict[str, Any]:
        """ELBO, importance sampling and annealed importance sampling on the same images."""
        c, x = self.config, self.x[: self.config.num_annealed]
        program = self.run.program
        importance = evaluate(program, x, num_particles=c.num_particles)
        annealed = annealed_importance_sampling(
            program, x, num_temperatures=c.num_temperatures, num_chains=c.num_chains, progress=True
        )
        columns = {
            "elbo": importance.per_datum.elbo,
            "importance": importance.per_datum.log_lik_estimate,
            "annealed": annealed.log_lik_estimate,
        }
        paired = {
            f"{b} - {a}": _mean(columns[b] - columns[a])
            for a, b in (("elbo", "importance"), ("importance", "annealed"))
        }
        return {
            "num_data": len(x),
            **{name: _mean(column) for name, column in columns.items()},
            "paired": paired,
            "importance_mc_se": importance.nll_mc_se,
            "annealed_mc_se": annealed.mc_se,
            "annealed_ess_median": float(np.median(annealed.ess)),
            "acceptance": annealed.acceptance,
            "seconds": {"importance": importance.seconds, "annealed": annealed.seconds},
        }

    def bracket(self) -> dict[str, Any]:
        """``log p(x)`` of simulated data from below and from above."""
        c = self.config
        options = {"num_temperatures": c.num_temperatures, "num_chains": c.num_chains}
        found = bracket(self.run.program, self.x[: c.num_annealed], **options, progress=True)  # type: ignore[arg-type]
        return {
            "num_data": len(found.lower),
            "lower": _mean(found.lower),
            "upper": _mean(found.upper),
            "gap": {"mean": found.gap, "se": found.gap_se},
            "acceptance": found.acceptance,
            "seconds": found.seconds,
        }

    def gaps(self) -> dict[str, Any]:
        """Approximation and amortisation."""
        began = time.perf_counter()
        sizes = {"num_data": self.config.num_annealed, "num_steps": self.config.local_steps}
        found = gaps(self.run.program, self.x, **sizes, progress=True)
        return {**found.summary(), "seconds": time.perf_counter() - began}

    def surgery(self) -> dict[str, Any]:
        """The split of the rate, and the identities that it has to satisfy."""
        found = bottleneck(self.run.program, self.x, num_data=self.config.num_data, progress=True)
        evaluation = evaluate(self.run.program, self.x[: self.config.num_data], num_particles=100)
        names = ("num_data", "rate", "rate_se", "mutual_information", "mutual_information_se")
        names += ("mutual_information_upper", "marginal_kl", "marginal_kl_se")
        return {
            **{name: getattr(found, name) for name in names},
            "active_units": found.active_units,
            "elbo": evaluation.elbo,
            "elbo_rate": evaluation.rate,
            "elbo_distortion": evaluation.distortion,
        }

    def posterior(self) -> dict[str, Any]:
        """NUTS against the guide, where k̂ is lowest, just above the threshold, and highest."""
        c = self.config
        third, program = c.num_posteriors // 3, self.run.program
        k_hat = evaluate(program, self.x[: c.num_data], num_particles=1000).per_datum.k_hat
        of_all = {q: float(np.quantile(k_hat, float(q))) for q in ("0.01", "0.5", "0.99")}
        # k̂ of few draws is noisy, so that the lowest of many are not low: they are looked at again, with other draws.
        candidates, high = np.argsort(k_hat)[: 8 * third], np.argsort(k_hat)[-third:]
        draws = c.weighted * CHAINS * c.num_draws
        again = evaluate(program, self.x[candidates], num_particles=draws, seed=1).per_datum.k_hat
        order = np.argsort(again)
        above = order[third:][again[order[third:]] >= LARGE_K][:third]
        chosen = np.concatenate([candidates[order[:third]], candidates[above], high])
        return {"images": chosen.tolist(), "k_hat_of_all": of_all, **self._against_nuts(program, chosen)}

    def optimised_posterior(self) -> dict[str, Any]:
        """The same images, under Gaussians with full covariances that are optimised for each image by itself."""
        chosen = np.array(self.record.content["cells"]["posterior"]["images"])
        settings: dict[str, Any] = {"full_covariance": True, "num_steps": self.config.local_steps, "progress": True}
        program = optimise_guide(self.run.program, self.x[chosen], **settings)
        return {"images": chosen.tolist(), **self._against_nuts(program, chosen)}

    def _against_nuts(self, program: Any, chosen: np.ndarray) -> dict[str, Any]:
        c, began = self.config, time.perf_counter()
        sizes = {"num_warmup": c.num_draws, "num_draws": c.num_draws, "num_chains": CHAINS, "oversample": c.weighted}
        found = ground_truth(program, self.x[chosen], **sizes, progress=True)
        columns = ("k_hat", "energy_distance", "energy_floor", "mean_error")
        columns += ("weighted_energy_distance", "weighted_mean_error")
        return {
            **{name: getattr(found, name).tolist() for name in columns},
            "ess": found.guide["sample_stats"]["ess"].values.tolist(),
            "agree": found.agree().tolist(),
            "weighted_agree": found.agree(weighted=True).tolist(),
            "summary": found.summary(),
            "seconds": time.perf_counter() - began,
        }

    def cost(self) -> dict[str, Any]:
        """Seconds of ``diagnose`` with its defaults, compilation included."""
        began = time.perf_counter()
        sizes = {"num_gaps": self.config.num_gaps, "num_simulations": self.config.num_simulations}
        found = diagnose(self.run, self.images[: self.config.num_data], **sizes, progress=True)
        seconds = time.perf_counter() - began
        return {"num_data": self.config.num_data, "seconds": seconds, "verdict": found.verdict}

    def memory(self, num_particles: int) -> dict[str, Any]:
        """Peak memory of importance sampling in a process of its own, less what there was before it (Linux)."""
        self.x[:20].astype(np.float32).tofile(self.folder / "few.f32")
        command = [sys.executable, "-c", PEAK, str(self.folder), str(num_particles), str(self.x.shape[1])]
        root = str(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])


PEAK = """
import json, re, sys, time
from pathlib import Path
import numpy as np
from elbozoo.inference import Run, evaluate
folder, num_particles, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
program = Run.load(folder).program
x = np.fromfile(folder + "/few.f32", np.float32).reshape(-1, dim)
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
evaluate(program, x[:1], num_particles=2)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, began = memory("VmRSS"), time.perf_counter()
evaluate(program, x, num_particles=num_particles)
seconds = time.perf_counter() - began
print(json.dumps({"num_data": len(x), "bytes": memory("VmHWM") - before, "bytes_before": before, "seconds": seconds}))
"""


def _mean(x: np.ndarray) -> dict[str, float]:
    return {"mean": float(x.mean()), "se": float(x.std(ddof=1)) / math.sqrt(len(x))}


def checks(cells: dict[str, Any], config: Config) -> dict[str, bool]:
    """Each claim, and whether it held."""
    pairs, both, split = cells["likelihood"]["paired"], cells["bracket"], cells["surgery"]
    first, second = pairs["importance - elbo"], pairs["annealed - importance"]
    distance, third = np.array(cells["posterior"]["energy_distance"]), config.num_posteriors // 3
    apart = distance[-third:].min() - distance[:third].max()
    few, many = config.many_particles
    peak, gap = max(cells[f"memory-{k}"]["bytes"] for k in (few, many)), both["gap"]
    rest = split["rate"] - split["mutual_information"] - split["marginal_kl"]
    return {
        f"ELBO < IS (K={config.num_particles})": first["mean"] > 3 * first["se"],
        f"IS (K={config.num_particles}) <= AIS within 3 standard errors": second["mean"] > -3 * second["se"],
        "forward and backward AIS bracket log p(x) within 3 standard errors": gap["mean"] > -3 * gap["se"],
        "rate = I(x; z) + KL(q(z) || p(z)) to 1e-3 nats": abs(rest) < 1e-3,
        "-ELBO = rate + distortion to 1e-6 of it": abs(split["elbo"] + split["elbo_rate"] + split["elbo_distortion"])
        < 1e-6 * abs(split["elbo"]),
        f"I(x; z) <= log {split['num_data']}": split["mutual_information"] <= math.log(split["num_data"]),
        **{c: held for n, g in GUIDES.items() if n in cells for c, held in _posterior_checks(cells[n], g).items()},
        "every image of the third with the lowest k̂ is nearer to NUTS than every one of the highest": bool(apart > 0),
        **({"diagnose takes less than 180 s": cells["cost"]["seconds"] < 180} if "cost" in cells else {}),
        f"peak memory below 1 GiB at K = {few} and {many}": peak < GIB,
    }


def _posterior_checks(cell: dict[str, Any], guide: str) -> dict[str, bool]:
    """What k̂ may say of the guide's draws (it does not promise that) and of the weighted ones (it does, below 0.7)."""
    k_hat = np.array(cell["k_hat"])
    low, endless = k_hat < LARGE_K, k_hat >= 1.0  # from 1 on the weights have no mean
    found = {}
    for words, agree in (("", cell["agree"]), (" by importance weights", cell["weighted_agree"])):
        agrees = np.array(agree)
        for verb, held, which, where in (
            ("agree", agrees, f"k̂ < {LARGE_K}", low),
            ("differ", ~agrees, f"k̂ >= {LARGE_K}", ~low),
            ("differ", ~agrees, "k̂ >= 1", endless),
        ):
            if where.any():
                claim = f"NUTS and {guide} {verb}{words} on every image whose {which} ({where.sum()} images)"
                found[claim] = bool(held[where].all())
    return found


def main(config: Config) -> None:
    """Measure every cell, then say which claims held."""
    names = ["training", "likelihood", "bracket", "gaps", "surgery", "posterior", "optimised_posterior", "cost"]
    if config.smoke:
        names.remove("optimised_posterior")  # the posterior's again, with the guides of the gaps
        for slow in ("gaps", "cost"):  # which the command line's tests have
            names.remove(slow)
        small: dict[str, Any] = {"epochs": 1, "hidden": 16, "latent_dim": 2, "num_particles": 50, "num_annealed": 4}
        small |= {"num_temperatures": 2, "num_chains": 2, "num_posteriors": 3, "num_draws": 20, "num_data": 30}
        small |= {"local_steps": 5, "num_gaps": 0, "num_simulations": 20}
        results = config.results.with_name("smoke_instruments.json")
        config = replace(config, data="digits", many_particles=(10, 10), results=results, smoke=False, **small)
    record = Record(config.results, __doc__ or "", config, ("numpyro",))
    bench = Bench(config, record)
    cells = {name: record.cell(name, getattr(bench, name)) for name in names}
    for k in config.many_particles:
        cells[f"memory-{k}"] = record.cell(f"memory-{k}", lambda k=k: bench.memory(k))
    found = checks(cells, config)
    record.check(found)
    for claim, good in found.items():
        print(f"{'holds' if good else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    main(tyro.cli(Config))
