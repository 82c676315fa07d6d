"""Which bound, gradient estimator and shape should one train with: what does each cost, how noisy is its gradient, and
where does it land?

A VAE, a two-layer hierarchy, a sigmoid belief net and a categorical VAE, under every objective that fits. There are
three kinds of cells. *Training*: every seed from its own weights, evaluated (NLL by importance sampling, K stated;
ELBO; rate; active units) after a fixed number of steps, and after as many as fit into a fixed time, compilation aside;
time and memory of a step. *Gradients*: at the start, in the middle and at the end of one training, the same for all
objectives of a model: signal-to-noise, variance and bias of the gradient on one batch, of the model's parameters and of
the guide's. *Laws*: the gap of IWAE and the signal-to-noise of its gradients against K.

    python benchmarks/estimators.py --data-dir DIR
    elbozoo bench --program my_module:make_program --data my.npy
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from elbozoo.benchmarks.datasets import load, load_array
from elbozoo.benchmarks.grid import Cell, Grid, measure_all
from elbozoo.benchmarks.records import compiled_once
from elbozoo.inference import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    NVIL,
    PIWAE,
    REBAR,
    RELAX,
    RWS,
    STL,
    TVO,
    VIMCO,
    AnnealedKL,
    Beta,
    Covariance,
    DisARM,
    DReG,
    FreeBits,
    GumbelSoftmax,
    Objective,
    Pathwise,
    Refused,
    Renyi,
    ScoreFunction,
    evaluate,
    fit,
    gradient_noise,
    storage,
)
from elbozoo.inference.errors import must
from elbozoo.inference.parts import one_of
from elbozoo.inference.psis import pareto_k
from elbozoo.inference.shapes import Shape
from elbozoo.zoo import MLP, VAE, CategoricalVAE, HierarchicalVAE, SigmoidBeliefNet, Spec

MODELS = ("vae", "hierarchy", "sbn", "categorical")
STAGES = ("start", "middle", "end")
PIECE = 50
"""Steps of an epoch: what compiles once."""


def objectives(num_particles: int, warmup: float) -> dict[str, Objective]:
    """The objectives by name, at one number of particles where they have more than one."""
    k = num_particles
    outer = next(m for m in range(math.isqrt(k), 0, -1) if k % m == 0)
    return {
        # reparameterised sites
        "elbo": ELBO(),
        "elbo, stl": ELBO(gradient=STL()),
        "elbo, K draws": ELBO(k),
        "iwae": IWAE(k),
        "iwae, stl": IWAE(k, STL()),
        "iwae, dreg": IWAE(k, DReG()),
        "renyi": Renyi(0.5, k),
        "miwae": MIWAE(outer, k // outer),
        "piwae": PIWAE(outer, k // outer),
        "ciwae": CIWAE(0.5, k),
        "tvo": TVO(num_particles=k, gradient=Covariance()),
        "annealed": AnnealedKL(ELBO(), warmup=warmup, unit="steps"),
        "free bits": FreeBits(ELBO(), 0.1),
        "beta 1/2": Beta(ELBO(), 0.5),
        # discrete sites
        "score": ELBO(gradient=ScoreFunction(baseline="none")),
        "score, running mean": ELBO(gradient=ScoreFunction(baseline="running-mean")),
        "score, leave-one-out": ELBO(k, ScoreFunction()),
        "nvil": ELBO(gradient=NVIL()),
        "disarm": ELBO(gradient=DisARM()),
        "rebar": ELBO(gradient=REBAR(temperature=0.5)),
        "relax": ELBO(gradient=RELAX(temperature=0.5)),
        "concrete": ELBO(gradient=GumbelSoftmax(temperature=0.5)),
        "straight-through": ELBO(gradient=GumbelSoftmax(temperature=0.5, hard=True)),
        "iwae, score": IWAE(k, ScoreFunction(baseline="none")),
        "iwae, vimco": IWAE(k, VIMCO()),
        "iwae, disarm": IWAE(k, DisARM()),
        "rws": IWAE(k, RWS()),
    }


REFERENCE = {True: "elbo", False: "nvil"}
"""By whether the sites are reparameterised: what a model's states are trained by, and what others are compared with."""

LAWFUL, LAWS_STATE = ("vae",), "iwae, dreg"
"""The models whose laws are measured, and what trains them."""

OWN = "program"
"""The model's name where it is the user's own."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        data: data sets by name; an .npy file, of which the last rows are held out, for a program of your own.
        program: a program of your own in place of the models: "module:function", where the function returns a Program
            of either engine.
        data_dir: folder with the files; ELBOZOO_DATA or a download otherwise.
        engines: engines to measure in.
        models: models of the zoo: vae, hierarchy (of two layers), sbn (a sigmoid belief net), categorical.
        objectives: objectives by name (elbo, iwae, "iwae, dreg", nvil, …); all that fit a model by default.
        kinds: kinds of cells: training, gradients, laws.
        particles: K of the objectives that have more than one particle.
        seeds: seeds of the runs; intervals are over them, differences are paired by them.
        num_steps: the fixed number of steps.
        seconds: the fixed time of training, compilation aside.
        most: how many times the fixed number of steps the fixed time may buy at most.
        batch_size: data a minibatch.
        learning_rate: step size of Adam.
        latent_dim: latents of the VAE, and of the hierarchy's lower layer.
        hidden: units of each layer of a network.
        num_train: training images, binarised once.
        num_test: held-out images.
        num_particles: K of the reported NLL.
        num_draws: draws of each gradient; ten times as many of the reference of its bias.
        law_draws: draws of the latents, from which IWAE's gap is read off at every power of two.
        law_particles: values of K at which the laws' gradients are drawn, without 1, which is the ELBO.
        jobs: processes that measure cells side by side.
        backend: loky for processes of this machine, ray for a cluster.
        cells: folder of the cells' files.
        results: JSON file to write.
        smoke: a few seconds on digits, to see that it runs.
    """

    data: tuple[str, ...] = ("digits", "mnist")
    program: str | None = None
    data_dir: Path | None = None
    engines: tuple[Literal["numpyro", "pyro"], ...] = ("numpyro", "pyro")
    models: tuple[str, ...] = MODELS
    objectives: tuple[str, ...] = ()
    kinds: tuple[Literal["training", "gradients", "laws"], ...] = ("training", "gradients", "laws")
    particles: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    num_steps: int = 1000
    seconds: float = 2.0
    most: float = 2.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    latent_dim: int = 16
    hidden: int = 64
    num_train: int = 10_000
    num_test: int = 100
    num_particles: int = 5000
    num_draws: int = 200
    law_draws: int = 4096
    law_particles: tuple[int, ...] = (4, 16, 64, 256)
    jobs: int = 1
    backend: Literal["loky", "ray"] = "loky"
    cells: Path = Path("runs/estimators")
    results: Path = Path("benchmarks/results/estimators.json")
    smoke: bool = False


AXES = ("data", "engines", "models", "objectives", "kinds", "seeds", "jobs", "backend", "smoke")
"""Settings that say which cells there are, or how they are run, and nothing of what one is."""


def spec_of(config: Config, model: str, data_dim: int) -> Spec:
    """A model at the benchmark's size."""
    dim, hidden = config.latent_dim, config.hidden
    if model == "vae":
        return VAE(data_dim, dim, MLP((hidden, hidden)))
    if model == "hierarchy":
        return HierarchicalVAE(data_dim, (dim, max(1, dim // 2)), (hidden, max(1, hidden // 2)))
    if model == "sbn":
        return SigmoidBeliefNet(data_dim, (2 * dim,))
    return CategoricalVAE(data_dim, max(1, dim // 2), 8, MLP((hidden, hidden)))


def build(config: Config, engine: str, model: str, data_dim: int) -> Any:
    """An untrained program."""
    if model == OWN:
        return own_program(config)
    return getattr(spec_of(config, model, data_dim), engine)()


def own_program(config: Config) -> Any:
    """The program that ``module:function`` makes. Raises: InvalidArgument naming what is wrong with it."""
    name, todo = config.program or "", "Write a function that returns elbozoo's Program around your model and guide"
    module, colon, function = name.partition(":")
    if not colon:
        raise must("program", 'be "module:function"', repr(name), "Pass my_module:make_program")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command is run in
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise must("program", "be a function that can be imported", f"{name!r} ({error})", todo) from error
    found = make()
    if getattr(found, "engine", None) not in ("numpyro", "pyro"):
        raise must("program", "be made as a Program", f"{type(found).__name__} from {name}", todo)
    return found


def source_of(program: str) -> str:
    """A digest of the module of ``module:function``."""
    path = inspect.getsourcefile(importlib.import_module(program.partition(":")[0]))
    return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()[:16] if path else ""


def fitting(config: Config, model: str, x: np.ndarray | None = None) -> dict[str, Objective]:
    """The objectives that fit a model, among those that are asked for: asked of the objectives themselves."""
    return _fitting(config, *_asked(config, model, x))


def _asked(config: Config, model: str, x: np.ndarray | None = None) -> tuple[Any, np.ndarray]:
    """The program that objectives are asked about, and data for it."""
    if model == OWN:
        x = images(config, config.data[0])[0][:2] if x is None else x[:2]
        return initialised(own_program(config), x), x
    return _small(config.engines[0], model, config.latent_dim), np.ones((2, 6))


def _fitting(config: Config, program: Any, x: np.ndarray) -> dict[str, Objective]:
    given = objectives(config.particles, config.num_steps / 2)
    wanted = config.objectives or tuple(given)
    for name in wanted:
        one_of("objectives", name, tuple(given))
    # The estimators of discrete sites do for others too, but nobody would choose them.
    smooth = may_train(program, x, ELBO())
    return {
        name: given[name] for name in wanted if _smooth(given[name]) == smooth and may_train(program, x, given[name])
    }


def _smooth(objective: Objective) -> bool:
    """Whether an objective is for reparameterised sites."""
    plain = isinstance(getattr(objective, "gradient", None), Pathwise | STL | DReG | Covariance)
    return plain or isinstance(objective, Shape)


def may_train(program: Any, x: np.ndarray, objective: Objective) -> bool:
    """Whether an objective has a right gradient on a program: asked of the objective itself."""
    try:
        program.outline((x,), objective)
    except Refused:
        return False
    return True


@cache
def _small(engine: str, model: str, latent_dim: int) -> Any:
    """A small program of a model."""
    spec = spec_of(Config(latent_dim=latent_dim, hidden=4), model, 6)
    return initialised(getattr(spec, engine)(), np.ones((2, 6)))


def initialised(program: Any, x: np.ndarray) -> Any:
    """An untrained program with its initial weights."""
    if program.engine == "pyro":
        program.materialise((x,))
        return program
    import jax

    def initial(key: Any) -> tuple[Any, ...]:
        return program.init(key, x)[::2]

    # a guide of the user's own may keep what it sees at its first call, which must not be a tracer
    run = initial if program.spec is None else jax.jit(initial)
    return program.with_params(*run(jax.random.PRNGKey(0)))


@cache
def is_smooth(config: Config, model: str) -> bool:
    """Whether a model's sites are reparameterised."""
    return may_train(*_asked(config, model), ELBO())


def images(config: Config, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out data; of a named set the pixels are binarised, each once, with its grey as mean."""
    if config.program is not None:
        rows = load_array(Path(name))
        held_out = min(config.num_test, max(1, len(rows) // 10))
        return rows[:-held_out][: config.num_train], rows[-held_out:]
    data = load(name, data_dir=config.data_dir)
    draw = np.random.default_rng(20_251)
    train, test = data.train[: config.num_train], data.test[: config.num_test]
    return tuple((draw.random(x.shape) < x).astype(np.float32) for x in (train, test))  # type: ignore[return-value]


# --- a cell -----------------------------------------------------------------------------------------------------------


def measure(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """The figures of a cell."""
    kinds = {"training": training, "gradients": gradients, "laws": laws}
    with compiled_once():
        return kinds[cell["kind"]](config, cell, scratch)


def training(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """Where an objective lands after so many steps, and after so many seconds."""
    train, test = images(config, cell["data"])
    objective = fitting(config, cell["model"], train)[cell["objective"]]
    settings = {"objective": objective, "batch_size": config.batch_size, "epoch_steps": PIECE, "progress": False}
    settings |= {"learning_rate": config.learning_rate}

    def program() -> Any:
        return build(config, cell["engine"], cell["model"], train.shape[1])

    alone = fit(program(), train, epochs=4, **settings)
    step_seconds = min(row["seconds"] for row in alone.history[1:]) / PIECE
    by_steps = max(1, config.num_steps // PIECE)
    by_time = max(1, min(round(config.seconds / step_seconds), round(config.most * config.num_steps)) // PIECE)
    figures: dict[str, Any] = {}
    for epochs in sorted({by_steps, by_time}):
        runs = fit(
            program(),
            train,
            epochs=epochs,
            seed=min(cell["seeds"]),
            replicates=len(cell["seeds"]),
            directory=scratch / "runs",
            checkpoint_every=epochs,
            resume=True,
            **settings,
        )
        found = [landed(config, run, test) for run in runs]
        rows = {name: [f[name] for f in found] for name in found[0]}
        rows["steps"] = [epochs * PIECE] * len(runs)
        rows["seconds"] = [epochs * PIECE * step_seconds] * len(runs)
        figures |= {"steps": rows} if epochs == by_steps else {}
        figures |= {"time": rows} if epochs == by_time else {}
    return {
        "num_particles": objective.num_particles,
        "nll_particles": config.num_particles,
        "step_seconds": step_seconds,
        "step_bytes": step_bytes(program(), objective, train[: config.batch_size]),
        **figures,
    }


def landed(config: Config, run: Any, test: np.ndarray) -> dict[str, Any]:
    """What a trained model is worth on held-out data, nats per datum."""
    found = evaluate(run.program, test, num_particles=config.num_particles)
    return {
        "nll": found.nll,
        "nll_se": found.nll_se,
        "elbo": found.elbo,
        "gap": -found.nll - found.elbo,
        "rate": found.rate,
        "active_units": found.total_active_units,
    }


def step_bytes(program: Any, objective: Objective, x: np.ndarray) -> int:
    """What a step keeps beside weights and data: XLA's temporaries, or what torch saves for the backward pass."""
    if program.engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        loss = Loss(objective)
        guide = loss.guide(program.guide_fn)
        whole = replace(program, guide_fn=guide)
        params, mutable = jax.jit(lambda key: whole.init(key, x)[::2])(jax.random.PRNGKey(0))

        def mean(params: Any, key: Any) -> Any:
            return loss.loss(key, params | mutable, program.model_fn, guide, x)

        compiled: Any = jax.jit(jax.grad(mean)).lower(params, jax.random.PRNGKey(0)).compile().memory_analysis()
        return int(compiled.temp_size_in_bytes)
    import torch

    from elbozoo.inference.pyro_engine import Loss as TorchLoss

    saved: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    twin, data = program.copy(), torch.as_tensor(x)
    with twin.parameters(), torch.random.fork_rng(devices=[]):
        twin.materialise((data,))
        own = {p.untyped_storage().data_ptr() for p in twin._tensors().values()} | {data.untyped_storage().data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = TorchLoss(objective).differentiable_loss(twin.model, twin.guide, data)
        del loss
    return sum(size for at, size in saved.items() if at not in own)


def gradients(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """How noisy each objective's gradient is, and how biased, at three states of one training."""
    train, _ = images(config, cell["data"])
    model, found = cell["model"], fitting(config, cell["model"], train)
    x = train[: config.batch_size]
    return {
        "num_draws": config.num_draws,
        "batch_size": len(x),
        "stages": {
            stage: noises(config, model, program, x, found)
            for stage, program in states(config, cell, train, scratch).items()
        },
    }


def states(
    config: Config,
    cell: Cell,
    train: np.ndarray,
    scratch: Path,
    stages: tuple[str, ...] = STAGES,
    objective: str | None = None,
) -> dict[str, Any]:
    """The model at the start, in the middle and at the end of a training, or at some of these.

    By its reference, unless an objective is named.
    """
    model, every = cell["model"], objectives(config.particles, config.num_steps / 2)
    pieces = max(2, config.num_steps // PIECE)
    by = objective or REFERENCE[is_smooth(config, model)]
    settings: dict[str, Any] = {"objective": every[by], "batch_size": config.batch_size}
    settings |= {"learning_rate": config.learning_rate, "progress": False}
    states: dict[str, Any] = {}
    for stage, epochs, steps in (("start", 1, 1), ("middle", pieces // 2, PIECE), ("end", pieces, PIECE)):
        if stage not in stages:
            continue
        place: dict[str, Any] = settings | {"directory": scratch / f"state-{steps}"}
        run = fit(
            build(config, cell["engine"], model, train.shape[1]),
            train,
            epochs=epochs,
            epoch_steps=steps,
            resume=True,
            **place,
        )
        # of one program: what is compiled for a state serves the others
        base = next(iter(states.values()), run.program)
        states[stage] = base.with_weights(run.weights, train[:2])
    return states


def noises(config: Config, model: str, program: Any, x: np.ndarray, wanted: Mapping[str, Objective]) -> dict[str, Any]:
    """The gradient's figures by objective; the bias of those whose bound has an unbiased reference."""
    found: dict[str, Any] = {}
    references: dict[str, Any] = {}
    smooth = is_smooth(config, model)
    for name, objective in wanted.items():
        noise = gradient_noise(program, x, objective, num_draws=config.num_draws, step=config.num_steps)
        row = {"num_particles": objective.num_particles, "value": noise.bound}
        reference = reference_of(config, smooth, objective)
        if reference is not None:
            key = repr(reference)
            if key not in references:
                draws = 10 * config.num_draws
                references[key] = gradient_noise(program, x, reference, num_draws=draws, seed=1)
        for part in ("model", "guide"):
            row[part] = {"snr": noise.signal_to_noise(part), "variance": noise.total_variance(part)}
            if reference is not None:
                row[part]["bias"], row[part]["bias_resolution"] = noise.bias(references[repr(reference)], part)
        found[name] = row
    return found


def reference_of(config: Config, smooth: bool, objective: Objective) -> Objective | None:
    """An unbiased estimator of the same bound, another than the objective where there is one; None under a shape."""
    if isinstance(objective, ELBO):
        return ELBO(gradient=Pathwise() if smooth else NVIL())
    if type(objective) is IWAE:
        return IWAE(config.particles, Pathwise() if smooth else VIMCO())
    return None


def laws(config: Config, cell: Cell, scratch: Path) -> dict[str, Any]:
    """The gap of IWAE, and the signal-to-noise of its gradients, against K at the end of a training by it.

    A guide that the ELBO has trained is narrower than the posterior: its weights' variance, which the laws are in terms
    of, need not be finite. Whether it is, Pareto k̂ says: below 0.5. Its median is given over the held-out data that the
    gap is of, and over the batch that the gradients are of.
    """
    train, test = images(config, cell["data"])
    program = states(config, cell, train, scratch, ("end",), LAWS_STATE)["end"]
    x, most = train[: config.batch_size], config.law_draws
    log_weights = _log_weights(program, test, most)
    counts = [2**j for j in range(int(math.log2(most)) + 1)]
    bounds = [float(np.mean(_iwae(log_weights, k))) for k in counts]
    particles = config.law_particles
    snr: dict[str, dict[str, list[float]]] = {}
    for name, gradient in (("pathwise", Pathwise()), ("dreg", DReG())):
        noise = [gradient_noise(program, x, IWAE(k, gradient), num_draws=4 * config.num_draws) for k in particles]
        snr[name] = {part: [n.signal_to_noise(part) for n in noise] for part in ("model", "guide")}
    weights = {"gap": log_weights, "gradients": _log_weights(program, x, most)}
    k_hat = {of: float(np.median(pareto_k(drawn))) for of, drawn in weights.items()}
    return {"counts": counts, "bounds": bounds, "particles": list(particles), "snr": snr, "k_hat": k_hat}


def _log_weights(program: Any, x: np.ndarray, num_particles: int) -> np.ndarray:
    """Four times as many draws as one pass takes, ``(draws, data)``."""
    passes = [program.apply(_log_weight, (x,), num_particles=num_particles, seed=seed) for seed in range(4)]
    return np.concatenate(passes).astype(np.float64)


def _log_weight(terms: Any) -> Any:
    return terms.log_weight


def _iwae(log_weights: np.ndarray, k: int) -> np.ndarray:
    """IWAE_k of each datum, from groups of k of the draws."""
    groups = log_weights.reshape(-1, k, log_weights.shape[-1])
    top = groups.max(1)
    return (top + np.log(np.exp(groups - top[:, None]).mean(1))).mean(0)


# --- what is claimed, and whether it held -------------------------------------------------------------------------


def slope(x: Any, y: Any) -> Any:
    """Of log y against log x, by least squares; None of fewer than two values."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else None


def slopes(cell: Mapping[str, Any]) -> dict[str, float]:
    """The exponents that the laws are about.

    The gap's is read off ``E[L_2K - L_K]``, which needs no true value and falls as the gap does; from K = 64, where the
    law is near its limit.
    """
    counts, bounds = np.array(cell["counts"]), np.array(cell["bounds"])
    late = counts[:-1] >= min(64, counts[-1] // 4)
    rise = np.diff(bounds)
    found = {"gap": slope(counts[:-1][late], np.maximum(rise[late], 1e-12))}
    for name, parts in cell["snr"].items():
        found |= {f"{name}, {part}": slope(cell["particles"], np.maximum(v, 1e-6)) for part, v in parts.items()}
    return found


FINITE_VARIANCE = 0.5
"""Pareto k̂ below which importance weights have a variance, and the laws are laws."""

ORDER = [
    ("score", "score, running mean"),
    ("score, running mean", "nvil"),
    ("nvil", "disarm"),
    ("nvil", "rebar"),
    ("iwae, score", "iwae, vimco"),
]
"""Pairs of which the first has the larger variance, as published."""


def claims(cells: Mapping[str, Any]) -> dict[str, bool]:
    """The known laws, where there are the cells; nothing here is made to hold.

    Those of IWAE are laws of weights with a finite variance, and are claimed where these are such.
    """
    found: dict[str, bool] = {}
    for cell in cells.values():
        where = f"{cell['data']}, {cell['engine']}, {cell['model']}"
        if cell["kind"] == "laws" and cell["k_hat"]["gap"] < FINITE_VARIANCE:
            gap = slopes(cell)["gap"]
            found[f"{where}: IWAE's gap falls as 1/K (slope of -1 within 0.25)"] = abs(gap + 1.0) < 0.25
        if cell["kind"] == "laws" and cell["k_hat"]["gradients"] < FINITE_VARIANCE:
            power = slopes(cell)
            law = f"{where}: the guide's signal-to-noise under IWAE falls as K^-1/2 (within 0.25)"
            found[law] = abs(power["pathwise, guide"] + 0.5) < 0.25
            found[f"{where}: under DReG it does not fall"] = power["dreg, guide"] > -0.1
        if cell["kind"] == "gradients":
            rows = cell["stages"]["end"]
            for larger, smaller in ORDER:
                if larger in rows and smaller in rows:
                    claim = f"{where}, end: the guide's gradient has a larger variance under {larger} than {smaller}"
                    found[claim] = rows[larger]["guide"]["variance"] > rows[smaller]["guide"]["variance"]
    return found


def grid_of(config: Config) -> Grid:
    """The cells that the settings ask for."""
    first = min(config.seeds, default=0)
    if not config.seeds or list(config.seeds) != list(range(first, first + len(config.seeds))):
        todo = "Pass 0 1 2 3, say"
        raise must("seeds", "follow one another: they are trained at once", config.seeds, todo)
    own: dict[str, Any] = {}
    if config.program is not None:
        program = own_program(config)
        config = replace(config, models=(OWN,), engines=(program.engine,))
        # what the figures depend on, beside the library: no part of the cell's name, being no text
        own = {
            "own": {
                "program": source_of(config.program or ""),
                "data": storage.checksum(images(config, config.data[0])),
            }
        }
    cells: list[dict[str, Any]] = []
    for data, engine in itertools.product(config.data, config.engines):
        place = {"data": data, "engine": engine, **own}
        for model in config.models:
            if "training" in config.kinds:
                for name in fitting(config, model):
                    seeds = {"seeds": list(config.seeds)}
                    cells.append({"kind": "training", **place, "model": model, "objective": name, **seeds})
            if "gradients" in config.kinds:
                chosen = {"objectives": list(fitting(config, model))}
                cells.append({"kind": "gradients", **place, "model": model, **chosen})
        cells += [
            {"kind": "laws", **place, "model": m} for m in config.models if "laws" in config.kinds and m in LAWFUL
        ]
    return Grid(__doc__ or "", measure, config, cells, config.engines, config.cells, AXES)


def main(config: Config) -> None:
    """Measure what is missing, then write the table and say which claims held."""
    if config.smoke:
        small: dict[str, Any] = {"data": ("digits",), "models": ("vae",), "objectives": ("iwae",)}
        small |= {"particles": 2, "seeds": (0, 1), "num_steps": PIECE, "seconds": 0.01, "hidden": 4, "latent_dim": 2}
        small |= {"num_train": 100, "num_test": 8, "num_particles": 16, "num_draws": 4, "engines": ("numpyro",)}
        small |= {"law_draws": 16, "law_particles": (2, 4)}
        results = config.results.with_name("smoke_estimators.json")
        config = replace(config, **small, cells=results.with_suffix(""), results=results, smoke=False)
    measure_all(grid_of(config), config.results, claims, jobs=config.jobs, backend=config.backend)


if __name__ == "__main__":
    # of the module, not of the script: worker processes could not find what is the script's
    from elbozoo.benchmarks import estimators

    estimators.main(tyro.cli(estimators.Config))
