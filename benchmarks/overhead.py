"""What does the harness cost, against hand-written training loops of the same mathematics and pythae's trainer?

A 784-400-400-20 VAE (ReLU, Bernoulli, diagonal Gaussian guide), batch 128, Adam 1e-3: the ELBO with analytic KL at
K=1, and IWAE at K=50. All contenders run in one process, one epoch each in turn, so that what else the machine does
hits all of them; what is reported is the ratio within each round. ``fit`` runs exactly the epoch timed here (its loop
object is driven directly, so that epochs of the contenders can alternate). Compilation and the first epochs are left
out.

Replicates are timed on three networks, for what they gain depends on how busy one run keeps the processor; and as
whole calls of ``fit``, compilation included.

    python benchmarks/overhead.py
"""

# pyright: reportMissingImports=false
# (pythae comes with the extra `bench` alone.)

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.records import Record
from elbozoo.inference import ELBO, IWAE, Adam, fit
from elbozoo.inference.data import batches
from elbozoo.inference.streams import InMemory
from elbozoo.inference.training import _Loop
from elbozoo.zoo import MLP, VAE

D, Z, H, BATCH = 784, 20, 400, 128
TARGETS = {
    "numpyro / hand-written JAX": 1.05,
    "pyro / hand-written PyTorch": 1.15,
    "pythae / numpyro": 2.0,
    "epochs of 8 replicates / 8 runs": 0.9,
    "fits of 8 replicates / 8 runs": 0.9,
}

NETWORKS = {  # (data, hidden, latent, batch)
    "64-100-100-16, batch 100": (64, 100, 16, 100),
    "784-200-200-50, batch 20": (784, 200, 50, 20),
    "784-400-400-20, batch 128": (D, H, Z, BATCH),
}
"""On which replicates are timed: the demo's, Burda et al.'s, and the one of this benchmark."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        repeats: timed rounds; every contender runs one epoch in each.
        batches_1: minibatches an epoch at K = 1.
        batches_50: minibatches an epoch at K = 50.
        batches_replicates: minibatches an epoch of the replicates.
        replicates: replicates of the vectorised run.
        whole_epochs: epochs of the whole calls of ``fit``.
        whole_repeats: timed pairs of whole calls.
        pythae: time pythae's trainer too (needs the extra ``bench``).
        results: JSON file to write.
        smoke: two rounds of two batches of some cells, to see that it runs.
    """

    repeats: int = 9
    batches_1: int = 120
    batches_50: int = 3
    batches_replicates: int = 60
    replicates: int = 8
    whole_epochs: int = 5
    whole_repeats: int = 3
    pythae: bool = True
    results: Path = Path("benchmarks/results/overhead.json")
    smoke: bool = False


def vae(data: int = D, hidden: int = H, latent: int = Z) -> VAE:
    """A VAE with two hidden layers each way."""
    return VAE(data, latent, network=MLP(hidden=(hidden, hidden), activation="relu"))


def pixels(num: int, dim: int = D) -> np.ndarray:
    """Data of the right kind; what they are does not matter here."""
    return (np.random.default_rng(0).random((num, dim)) < 0.2).astype(np.float32)


def ours(engine: str, spec: VAE, x: np.ndarray, k: int, batch: int = BATCH, replicates: int = 1) -> Callable[[], None]:
    """One epoch of ``fit``."""
    from importlib import import_module

    program = getattr(spec, engine)()
    objective = ELBO() if k == 1 else IWAE(k)
    seeds = list(range(replicates))
    trainer = import_module(f"elbozoo.inference.{engine}_trainer").Trainer(
        program, objective, Adam(), (x,), batch_size=batch, seeds=seeds, redraw_pixels=False, device=None
    )
    source = InMemory(program, x, batch, "none")
    return _Loop(trainer, source, objective, {}, seeds, None).run_epoch


def hand_written_jax(x: np.ndarray, k: int) -> Callable[[], None]:
    """A jitted scan, as one would write it: two MLPs, the loss, optax."""
    import jax
    import jax.numpy as jnp
    import optax

    def layers(key: Any, sizes: tuple[int, ...]) -> list[tuple[Any, Any]]:
        init = jax.nn.initializers.glorot_uniform()
        return [
            (init(kk, (a, b)), jnp.zeros(b))
            for kk, a, b in zip(jax.random.split(key, len(sizes)), sizes[:-1], sizes[1:], strict=False)
        ]

    def mlp(params: Any, h: Any) -> Any:
        for w, b in params[:-1]:
            h = jax.nn.relu(h @ w + b)
        return h @ params[-1][0] + params[-1][1]

    def loss(params: Any, batch: Any, key: Any) -> Any:
        loc, log_scale = jnp.split(mlp(params["encoder"], batch), 2, -1)
        noise = jax.random.normal(key, (k, *loc.shape))
        z = loc + jnp.exp(log_scale) * noise
        logits = mlp(params["decoder"], z)
        log_lik = (batch * logits - jax.nn.softplus(logits)).sum(-1)
        if k == 1:
            kl = 0.5 * (jnp.exp(2 * log_scale) + loc**2 - 1 - 2 * log_scale).sum(-1)
            return -(log_lik[0] - kl).mean()
        log_weight = log_lik + (-0.5 * z**2 + 0.5 * noise**2 + log_scale).sum(-1)
        return -(jax.nn.logsumexp(log_weight, axis=0) - jnp.log(k)).mean()

    optimizer = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"encoder": layers(keys[0], (D, H, H, 2 * Z)), "decoder": layers(keys[1], (Z, H, H, D))}
    data = jnp.asarray(x)

    @jax.jit
    def epoch(params: Any, state: Any, key: Any, order: Any) -> Any:
        def step(carry: Any, index: Any) -> Any:
            params, state, key = carry
            key, use = jax.random.split(key)
            value, gradient = jax.value_and_grad(loss)(params, data[index], use)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state, key), value

        return jax.lax.scan(step, (params, state, key), order)

    carry = [(params, optimizer.init(params), jax.random.key(1))]
    count = iter(range(10**9))

    def run() -> None:
        carry[0], values = epoch(*carry[0], batches(0, next(count), len(x), BATCH))
        np.asarray(values)

    return run


def hand_written_torch(x: np.ndarray, k: int) -> Callable[[], None]:
    """An eager loop, as one would write it: two Sequentials, the loss, torch's Adam (fused, the fastest here)."""
    import torch
    from torch import nn
    from torch.nn import functional

    encoder = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 2 * Z))
    decoder = nn.Sequential(nn.Linear(Z, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    data = torch.as_tensor(x)
    count = iter(range(10**9))

    def run() -> None:
        total = 0.0
        for index in torch.from_numpy(batches(0, next(count), len(x), BATCH)):
            batch = data[index]
            loc, log_scale = encoder(batch).chunk(2, -1)
            noise = torch.randn(k, *loc.shape)
            z = loc + log_scale.exp() * noise
            logits = decoder(z)
            log_lik = -functional.binary_cross_entropy_with_logits(
                logits, batch.expand_as(logits), reduction="none"
            ).sum(-1)
            if k == 1:
                kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1 - 2 * log_scale).sum(-1)
                loss = -(log_lik[0] - kl).mean()
            else:
                log_weight = log_lik + (-0.5 * z**2 + 0.5 * noise**2 + log_scale).sum(-1)
                loss = -(log_weight.logsumexp(0) - np.log(k)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return run


def pythae_trainer(x: np.ndarray, k: int) -> Callable[[], None]:
    """One training epoch of pythae's BaseTrainer on the same networks."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import IWAE as PythaeIWAE
    from pythae.models import VAE as PythaeVAE
    from pythae.models import IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from torch import nn

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU())
            self.heads = nn.ModuleList([nn.Linear(H, Z), nn.Linear(H, Z)])

        def forward(self, x: Any) -> Any:
            h = self.body(x)
            return ModelOutput(embedding=self.heads[0](h), log_covariance=self.heads[1](h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(Z, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D), nn.Sigmoid()
            )

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.body(z))

    settings: dict[str, Any] = {"input_dim": (D,), "latent_dim": Z, "reconstruction_loss": "bce"}
    model = (
        PythaeVAE(VAEConfig(**settings), Encoder(), Decoder())
        if k == 1
        else PythaeIWAE(IWAEConfig(number_samples=k, **settings), Encoder(), Decoder())
    )
    tensor = torch.as_tensor(x)
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        num_epochs=1,
        learning_rate=1e-3,
        per_device_train_batch_size=BATCH,
        optimizer_cls="Adam",
        no_cuda=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = BaseTrainer(model, BaseDataset(tensor, torch.zeros(len(x))), training_config=config)
        trainer.prepare_training()
    trainer.callback_handler.callbacks = []  # no progress bars, no logs
    count = iter(range(1, 10**9))

    def run() -> None:
        trainer.train_step(next(count))

    return run


def rounds(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of one epoch of each contender, in turn, ``repeats`` times after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and range of the paired ratios a/b."""
    ratios = [p / q for p, q in zip(a, b, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def measure(config: Config, k: int) -> dict[str, Any]:
    """All contenders at one K."""
    num = BATCH * (config.batches_1 if k == 1 else config.batches_50)
    x = pixels(num)
    contenders = {
        "numpyro": ours("numpyro", vae(), x, k),
        "hand-written JAX": hand_written_jax(x, k),
        "pyro": ours("pyro", vae(), x, k),
        "hand-written PyTorch": hand_written_torch(x, k),
    }
    if config.pythae:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third-party deprecations
            contenders["pythae"] = pythae_trainer(x, k)
    seconds = rounds(contenders, config.repeats)
    ratios = {
        "numpyro / hand-written JAX": ratio(seconds["numpyro"], seconds["hand-written JAX"]),
        "pyro / hand-written PyTorch": ratio(seconds["pyro"], seconds["hand-written PyTorch"]),
    }
    if config.pythae:
        ratios["pythae / numpyro"] = ratio(seconds["pythae"], seconds["numpyro"])
    images = {n: num / statistics.median(s) for n, s in seconds.items()}
    return {
        "images_per_epoch": num,
        "seconds": seconds,
        "images_per_second": images,
        "ratios": ratios,
    }


def measure_replicates(config: Config, network: str) -> dict[str, Any]:
    """Several seeds at once against as many runs of one seed: epochs, and one whole call of ``fit`` each way."""
    data, hidden, latent, batch = NETWORKS[network]
    spec, count = vae(data, hidden, latent), config.replicates
    x = pixels(batch * config.batches_replicates, data)
    contenders = {
        "replicates": ours("numpyro", spec, x, 1, batch, count),
        "run": ours("numpyro", spec, x, 1, batch),
    }
    seconds = rounds(contenders, config.repeats)

    def whole(replicates: int | None, seed: int) -> float:
        start = time.perf_counter()
        settings: dict[str, Any] = {"epochs": config.whole_epochs, "batch_size": batch, "progress": False}
        fit(spec.numpyro(), x, objective=ELBO(), seed=seed, replicates=replicates, **settings)
        return time.perf_counter() - start

    fits: dict[str, list[float]] = {"replicates": [], "runs": []}
    for _ in range(config.whole_repeats):
        fits["replicates"].append(whole(count, 0))
        fits["runs"].append(sum(whole(None, seed) for seed in range(count)))
    return {
        "seconds": seconds,
        "fits": fits,
        "ratios": {
            "epochs of 8 replicates / 8 runs": ratio(seconds["replicates"], [count * s for s in seconds["run"]]),
            "fits of 8 replicates / 8 runs": ratio(fits["replicates"], fits["runs"]),
        },
    }


def main(config: Config) -> None:
    """Time everything and say which targets are met."""
    cells = {f"K={k}": partial(measure, k=k) for k in (1, 50)}
    cells |= {network: partial(measure_replicates, network=network) for network in NETWORKS}
    if config.smoke:
        small: dict[str, Any] = {"batches_1": 2, "batches_50": 1, "batches_replicates": 2, "replicates": 2}
        results = config.results.with_name("smoke_overhead.json")
        config = Config(repeats=2, pythae=False, whole_epochs=1, whole_repeats=1, results=results, **small)
        cells = {name: cells[name] for name in ("K=1", next(iter(NETWORKS)))}
    config.results.unlink(missing_ok=True)  # timings of different hours do not compare: all are measured anew
    record = Record(config.results, __doc__ or "", config, ("numpyro", "pyro"))
    checks = {}
    for key, measured in cells.items():
        for name, r in record.cell(key, partial(measured, config))["ratios"].items():
            good = r["median"] >= TARGETS[name] if name.startswith("pythae") else r["median"] <= TARGETS[name]
            checks[f"{key}: {name}, target {TARGETS[name]}"] = good
            verdict = f"target {TARGETS[name]} {'met' if good else 'MISSED'}"
            print(f"{key:26s} {name:32s} {r['median']:.3f}  [{r['min']:.3f}, {r['max']:.3f}]  {verdict}")
    record.check(checks)


if __name__ == "__main__":
    main(tyro.cli(Config))
