"""Which gradient estimator trains a sigmoid belief net best? 200 binary latents, MNIST, static binarisation.

Nets: one layer of 200 units, with affine maps between latents and pixels (linear) or two tanh layers of 200 in each
(nonlinear), each under every estimator from the same start (``DataMean``), with the same data, steps and optimiser. The
pixels are binarised once, by a fixed seed. A further cell follows a three-layer net under VIMCO with K = 5, batches of
24 and a learning rate of 1e-3 for 4 epochs of all images, whose bound by epoch is published (-166, -140, -134, -130);
and others measure the variance of the guide's gradient of every estimator at a state of training of the linear net.

Reported: NLL with K importance samples on held-out images and the ELBO, in nats, of the discrete model whatever the
training. The default trains for a small share of the paper's steps, stated in each cell: the *order* is the claim.
Estimators that lie close together need more of them to come apart: ``discrete_longer.json`` has the published ones of
the linear net after five times the steps of ``discrete.json``, and the variances.
Published NLLs for orientation (linear, nonlinear; Yin & Zhou 2019): REINFORCE 164.0, 114.6; NVIL 113.1, 102.2;
Concrete 107.3, 99.6; REBAR 107.7, 101.4; ARM 107.2, 98.4.

    python benchmarks/discrete.py --data-dir DIR
    python benchmarks/discrete.py --data-dir DIR --num-train 50000 --epochs 20 --num-test 2000 --variance-epochs
    python benchmarks/discrete.py --data-dir DIR --nets linear \
        --estimators score nvil concrete rebar rebar-adapted arm disarm \
        --num-train 50000 --epochs 100 --num-test 2000 --variance-epochs 2 20 --curve-train 0 \
        --results benchmarks/results/discrete_longer.json
    python benchmarks/discrete.py --data-dir DIR --nets linear --seeds 1 2 3 \
        --estimators nvil arm disarm rebar rebar-adapted \
        --num-train 50000 --epochs 100 --num-test 2000 --variance-epochs --curve-train 0 \
        --results benchmarks/results/discrete_longer.json
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load
from elbozoo.benchmarks.records import Record, compiled_once
from elbozoo.inference import (
    ARM,
    ELBO,
    IWAE,
    NVIL,
    REBAR,
    RWS,
    VIMCO,
    Adam,
    DataMean,
    DisARM,
    GumbelSoftmax,
    Objective,
    ScoreFunction,
    evaluate,
    fit,
)
from elbozoo.zoo import SigmoidBeliefNet

PROTOCOL = 1_000_000 * 50
"""Images seen in Yin & Zhou's: a million steps with batches of 50."""

PUBLISHED_CURVE = (-166.2, -140.2, -133.9, -130.4)
"""Bound after each of the first four epochs of the three-layer net."""

ESTIMATORS: dict[str, Objective] = {
    "score": ELBO(gradient=ScoreFunction(baseline="none")),
    "running-mean": ELBO(gradient=ScoreFunction(baseline="running-mean")),
    "nvil": ELBO(gradient=NVIL()),
    "arm": ELBO(gradient=ARM()),
    "disarm": ELBO(gradient=DisARM()),
    "rebar": ELBO(gradient=REBAR(temperature=0.5)),
    "rebar-adapted": ELBO(gradient=REBAR(temperature=0.5, adapt=True)),
    "concrete": ELBO(gradient=GumbelSoftmax(temperature=0.5)),
    "straight-through": ELBO(gradient=GumbelSoftmax(temperature=0.5, hard=True)),
    "vimco-5": IWAE(5, VIMCO()),
    "rws-5": IWAE(5, RWS()),
    "vimco-50": IWAE(50, VIMCO()),
    "rws-50": IWAE(50, RWS()),
}
"""Each estimator by the name it has in the table."""

VARIANCES: dict[str, Objective] = {
    **{name: ESTIMATORS[name] for name in ("score", "running-mean", "nvil", "arm", "disarm", "rebar")},
    "leave-one-out, K=2": ELBO(2, ScoreFunction()),
    "IWAE-5, score": IWAE(5, ScoreFunction(baseline="none")),
    "IWAE-5, vimco": IWAE(5, VIMCO()),
    "IWAE-5, disarm": IWAE(5, DisARM()),
    "IWAE-5, rebar": IWAE(5, REBAR(temperature=0.5)),
}
"""What the variance of the gradient is measured of: unbiased all."""

ORDER = [("score", "running-mean"), ("running-mean", "nvil"), ("nvil", "arm"), ("arm", "disarm"), ("nvil", "rebar")]
"""Pairs of which the first has the larger variance, as published."""

Cells = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data set.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        nets: linear, nonlinear.
        estimators: names from the table of the script.
        variances: of which of the script's other table the gradient's variance is measured.
        variance_epochs: passes of VIMCO before it is, one cell each.
        units: latents a layer, and tanh units of the nonlinear net.
        num_train: training images.
        epochs: passes over them.
        batch_size, learning_rate, clip_norm: of Adam's steps.
        seeds: seeds, one run of each net and estimator each; differences are paired by them.
        curve_train: images of the three-layer net's curve; none without one.
        curve_epochs: passes over them.
        num_particles: K of the reported NLL.
        num_test: held-out images.
        num_gradients: draws of each gradient whose variance is measured.
        results: JSON file to write and to go on from.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: str = "mnist"
    data_dir: Path | None = None
    nets: tuple[str, ...] = ("linear", "nonlinear")
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    variances: tuple[str, ...] = tuple(VARIANCES)
    variance_epochs: tuple[int, ...] = (2,)
    units: int = 200
    num_train: int = 20_000
    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 1e-3
    clip_norm: float = 200.0
    seeds: tuple[int, ...] = (0,)
    curve_train: int = 60_000
    curve_epochs: int = 4
    num_particles: int = 200
    num_test: int = 500
    num_gradients: int = 200
    results: Path = Path("benchmarks/results/discrete.json")
    smoke: bool = False


def net(config: Config, name: str, data_dim: int) -> SigmoidBeliefNet:
    """The model of a cell."""
    hidden = (config.units, config.units) if name == "nonlinear" else ()
    return SigmoidBeliefNet(data_dim, (config.units,), hidden=hidden)


def measure(config: Config, name: str, estimator: str, seed: int) -> dict[str, Any]:
    """Train one net under one estimator and evaluate it."""
    data = load(config.data, data_dir=config.data_dir)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    began = time.perf_counter()
    run = fit(
        net(config, name, train.shape[1]).numpyro(),
        train,
        objective=ESTIMATORS[estimator],
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=Adam(config.learning_rate, clip_norm=config.clip_norm),
        binarize="static",
        start=DataMean(),
        seed=seed,
    )
    trained = time.perf_counter()
    found = evaluate(run.program, run.prepare(test)[0], num_particles=config.num_particles)
    return {
        "net": name,
        "estimator": estimator,
        "seed": seed,
        "training_particles": ESTIMATORS[estimator].num_particles,
        "share_of_protocol": config.epochs * len(train) / PROTOCOL,
        "train_seconds": trained - began,
        **found.summary(),
        "bound_by_epoch": [row["bound"] for row in run.history],
    }


def curve(config: Config) -> dict[str, Any]:
    """The three-layer net's first epochs: the training bound of each, of batches as they were met, and after it."""
    data = load(config.data, data_dir=config.data_dir)
    train, units = data.train[: config.curve_train], config.units
    spec = SigmoidBeliefNet(train.shape[1], (units, units, units))
    run = fit(
        spec.numpyro(),
        train,
        objective=ESTIMATORS["vimco-5"],
        epochs=config.curve_epochs,
        batch_size=24,
        optimizer=Adam(1e-3),
        binarize="static",
    )
    return {
        "images": len(train),
        "bound_by_epoch": [row["bound"] for row in run.history],
        "published": list(PUBLISHED_CURVE),
        "seconds": sum(row["seconds"] for row in run.history),
    }


# --- variance of the gradients --------------------------------------------------------------------------------------


def variances(config: Config, epochs: int) -> dict[str, Any]:
    """Variance of the guide's gradient, summed over its parameters, of every estimator at one state of training."""
    data = load(config.data, data_dir=config.data_dir)
    train = data.train[: config.num_train]
    objective = ESTIMATORS["vimco-5"]
    program = net(config, "linear", train.shape[1]).numpyro()
    run = fit(program, train, objective=objective, epochs=epochs, batch_size=config.batch_size, binarize="static")
    x, size = run.prepare(train)[0], min(config.batch_size, len(train))
    order = np.random.default_rng(0).integers(len(x), size=(epochs * max(1, len(x) // size), size))
    found = {name: variance(config, run.program, VARIANCES[name], x, order) for name in config.variances}
    return {"epochs": epochs, "batch_size": size, "num_gradients": config.num_gradients, "variance": found}


def variance(config: Config, program: Any, objective: Any, data: np.ndarray, order: np.ndarray) -> float:
    """Of the gradient of the first batch's mean bound. A learned baseline has been trained for as many steps as the
    program, on minibatches of all data (``order``): one that knew this batch alone would be better than any in use.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from elbozoo.inference.numpyro_engine import Loss

    x = data[: order.shape[1]]
    loss, params, sites = Loss(objective), program.params, program.outline((x,)).sites
    trained, memory = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), objective.gradient.initial(x, sites))

    def mean_loss(params: Any, trained: Any, memory: Any, key: Any, x: Any) -> Any:
        own = {"elbozoo_estimator": trained, "elbozoo_memory": memory}
        return jnp.asarray(loss.loss(key, params | own, program.model_fn, program.guide_fn, x)) / len(x)

    if memory:  # the mean bound of ten minibatches, as if it had long been remembered
        remembered = jax.jit(mean_loss)(params, trained, memory, jax.random.key(1), data[order[:10].ravel()])
        memory = {"mean": -remembered, "share": jnp.ones(())}
    if trained:
        adam = optax.adam(1e-3)

        @jax.jit
        def after_training(trained: Any, data: Any, keys: Any, order: Any) -> Any:
            def step(carry: Any, now: Any) -> Any:
                trained, state = carry
                slope = jax.grad(mean_loss, argnums=1)(params, trained, memory, now[0], data[now[1]])
                updates, state = adam.update(slope, state)
                return (optax.apply_updates(trained, updates), state), None

            return jax.lax.scan(step, (trained, adam.init(trained)), (keys, order))[0][0]

        trained = after_training(trained, data, jax.random.split(jax.random.key(2), len(order)), order)

    guide = [name for name in params if name.startswith("encoder")]

    def gradient(key: Any) -> Any:
        found = jax.grad(mean_loss)(params, trained, memory, key, x)
        return jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves({n: found[n] for n in guide})])

    def moments(carry: Any, key: Any) -> Any:
        g = gradient(key)
        return (carry[0] + g, carry[1] + g**2), None

    keys, like = jax.random.split(jax.random.key(3), config.num_gradients), jax.eval_shape(gradient, jax.random.key(0))
    zero = jnp.zeros(like.shape, like.dtype)
    total, squares = jax.jit(lambda: jax.lax.scan(moments, (zero, zero), keys))()[0]
    n = config.num_gradients
    return float(((squares - total**2 / n) / (n - 1)).sum())


# --- what is claimed, and whether it held ---------------------------------------------------------------------------


def claims(cells: Cells) -> dict[str, bool]:
    """The published orders, where there are the cells; nothing here is made to hold."""
    return orders_of_nll(cells) | orders_of_variance(cells) | early_curve(cells)


def orders_of_nll(cells: Cells) -> dict[str, bool]:
    """Which estimator trains the better net: over the seeds that two have in common, with one seed by its own error."""
    found: dict[str, bool] = {}
    for name in ("linear", "nonlinear"):
        pairs = [("score", "nvil"), ("nvil", "rebar"), ("nvil", "rebar-adapted")]
        pairs += [("nvil", "concrete"), ("nvil", "arm"), ("nvil", "disarm")]
        pairs += [("score", "vimco-5"), ("nvil", "vimco-50"), ("vimco-5", "vimco-50"), ("rws-5", "rws-50")]
        for worse, better in pairs:
            higher = higher_nll(cells, name, worse, better)
            if len(higher) > 1:
                error = standard_error(higher)
                by = f"of their difference over {len(higher)} seeds"
            elif higher:
                both = by_seed(cells, name, worse).keys() & by_seed(cells, name, better).keys()
                error, by = by_seed(cells, name, better)[min(both)]["nll_se"], "of one"
            else:
                continue
            claim = f"{name}: {better} has a lower NLL than {worse}, by more than the standard error {by}"
            found[claim] = bool(np.mean(higher) > error)
    return found


def higher_nll(cells: Cells, net: str, one: str, other: str) -> list[float]:
    """By how much ``one`` estimator ends above the ``other``, for every seed that both have."""
    worse, better = by_seed(cells, net, one), by_seed(cells, net, other)
    return [worse[seed]["nll"] - better[seed]["nll"] for seed in sorted(worse.keys() & better.keys())]


def standard_error(values: list[float]) -> float:
    """Of the mean of several."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def by_seed(cells: Cells, net: str, estimator: str) -> dict[int, dict[str, Any]]:
    """The cells of one net under one estimator."""
    return {c["seed"]: c for c in cells.values() if (c.get("net"), c.get("estimator")) == (net, estimator)}


def orders_of_variance(cells: Cells) -> dict[str, bool]:
    """Which gradient has the smaller variance."""
    pairs = [*ORDER, *(("IWAE-5, score", smaller) for smaller in ("IWAE-5, vimco", "IWAE-5, disarm", "IWAE-5, rebar"))]
    found: dict[str, bool] = {}
    for cell in cells.values():
        variance, state = cell.get("variance", {}), f"after {cell.get('epochs')} epochs"
        for larger, smaller in pairs:
            if larger in variance and smaller in variance:
                claim = f"{state}, the gradient's variance is larger under {larger} than under {smaller}"
                found[claim] = variance[larger] > variance[smaller]
    return found


def early_curve(cells: Cells) -> dict[str, bool]:
    """Whether the three-layer net's first epochs are the published ones."""
    bounds = cells["curve"]["bound_by_epoch"] if "curve" in cells else []
    if len(bounds) < len(PUBLISHED_CURVE):
        return {}
    near = all(abs(ours - theirs) < 8 for ours, theirs in zip(bounds, PUBLISHED_CURVE, strict=False))
    return {"three layers: each of the first epochs' bounds is within 8 nats of the published one": near}


def main(config: Config) -> None:
    """Run every cell, then say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {
            "data": "digits",
            "nets": ("linear",),
            "estimators": ("score", "vimco-5"),
            "variances": ("running-mean", "nvil"),
            "units": 5,
            "num_train": 200,
        }
        small |= {
            "epochs": 1,
            "curve_train": 96,
            "curve_epochs": 1,
            "num_particles": 5,
            "num_test": 20,
            "variance_epochs": (1, 2),
        }
        results = config.results.with_name("smoke_discrete.json")
        config = replace(config, **small, num_gradients=3, results=results, smoke=False)
    grid = ("nets", "estimators", "variance_epochs", "seeds")
    record = Record(config.results, __doc__ or "", config, ("numpyro",), grid=grid, timed=False)
    with compiled_once():
        if config.curve_train:
            print("curve:", record.cell("curve", lambda: curve(config))["bound_by_epoch"], flush=True)
        for epochs in config.variance_epochs if config.variances else ():
            cell = record.cell(f"variances-{epochs}", lambda n=epochs: variances(config, n))
            print(f"variances after {epochs} epochs:", cell["variance"], flush=True)
        for seed, estimator, name in itertools.product(config.seeds, config.estimators, config.nets):
            key = f"{name}-{estimator}-{seed}"
            cell = record.cell(key, lambda e=estimator, n=name, s=seed: measure(config, n, e, s))
            nll = f"NLL {cell['nll']:.2f} ± {cell['nll_se']:.2f} (K={config.num_particles})"
            print(f"{name}, {estimator}, seed {seed}: {nll}, {cell['train_seconds']:.0f} s", flush=True)
    record.check(claims(record.content["cells"]))


if __name__ == "__main__":
    main(tyro.cli(Config))
