"""``fit``: what it computes, what it leaves alone, and that equal seeds give equal bits.

The programs that know nothing of elbozoo are in ``programs.py``. Training of ``location`` is known exactly (its gradient has
no noise), so both engines are held against Adam and SGD written out in NumPy here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from covering import PYRO_ALONE, covering
from programs import data, program
from sklearn.datasets import load_digits

from elbozoo.inference import (
    ELBO,
    IWAE,
    PIWAE,
    STL,
    TVO,
    Adam,
    AnnealedKL,
    Beta,
    Capacity,
    DReG,
    FreeBits,
    Run,
    ScoreFunction,
    fit,
    gradient_noise,
)  # fmt: skip
from elbozoo.inference.data import batches, prepare
from elbozoo.inference.errors import CorruptFile, InvalidArgument
from elbozoo.inference.storage import load_arrays, save_json
from elbozoo.inference.training import to_config
from elbozoo.zoo import MLP, VAE, LinearVAE, SigmoidBeliefNet

DIGITS = load_digits().images[:100] / 16.0  # (N, 8, 8), grey
SPEC = VAE(data_dim=64, latent_dim=3, network=MLP(hidden=(6,)))
GREY, GREY_SPEC = np.random.default_rng(2).random((90, 4)), VAE(data_dim=4, latent_dim=1, network=MLP(hidden=()))
LINEAR = LinearVAE(data_dim=3, latent_dim=2, scale=0.5)
ENGINES = ("numpyro", "pyro")


def digits(engine: str, spec: Any = SPEC, **options: Any) -> Any:
    """A short training with everything that is random in it: weights, order, pixels, latents."""
    defaults = {"objective": AnnealedKL(ELBO(), warmup=2.0), "epochs": 3, "batch_size": 32, "learning_rate": 0.01}
    defaults |= {"binarize": "stochastic", "progress": False}
    return fit(getattr(spec, engine)(), options.pop("data", DIGITS), **(defaults | options))


def quick(engine: str, name: str = "location", **options: Any) -> Any:
    defaults = {"epochs": 3, "batch_size": 16, "learning_rate": 0.1, "progress": False}
    return fit(
        options.pop("program", None) or program(engine, name), options.pop("data", data()), **(defaults | options)
    )


def linear(engine: str, **options: Any) -> Any:
    """A zoo program that compiles sooner."""
    defaults = {"epochs": 3, "batch_size": 16, "learning_rate": 0.02, "progress": False}
    return fit(getattr(LINEAR, engine)(), options.pop("data", data()), **(defaults | options))


def same_weights(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


def same_history(a: Run, b: Run) -> bool:
    drop = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (a, b)]
    return drop[0] == drop[1]


# --- order of the data --------------------------------------------------------------------------------------------


def test_an_epoch_visits_data_once_and_another_rest_sits_out() -> None:
    epochs = [batches(seed=3, epoch=e, num_data=25, batch_size=8) for e in range(200)]
    for order in epochs:
        assert order.shape == (3, 8)
        assert len(np.unique(order)) == 24
        assert order.min() >= 0
        assert order.max() <= 24
    left_out = np.bincount([25 * 24 // 2 - order.sum() for order in epochs], minlength=25)
    assert left_out.min() > 0, "some datum is never, or always, left out"
    assert left_out.max() < 25


def test_order_is_a_function_of_seed_and_epoch() -> None:
    one = batches(0, 0, 50, 10)
    np.testing.assert_array_equal(one, batches(0, 0, 50, 10))
    assert not np.array_equal(one, batches(0, 1, 50, 10))
    assert not np.array_equal(one, batches(1, 0, 50, 10))
    assert batches(0, 0, 7, 100).shape == (1, 7)


# --- the steps themselves, against NumPy ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Decay:
    """A learning rate that falls as 1/t; plain arithmetic, so that JAX traces it too."""

    start: float = 0.5
    over: float = 5.0

    def __call__(self, step: Any) -> Any:
        return self.start / (1.0 + step / self.over)


def path_by_hand(
    update: Callable[[np.ndarray, int], np.ndarray], epochs: int = 3, batch: int = 16, seed: int = 0
) -> np.ndarray:
    """Maximise ``mean log N(x; mu, 1)`` with the documented minibatches; ``update(gradient of the loss, step)``.

    Returns mu after every step, (steps, 3).
    """
    x, path = data(), [np.zeros(3)]
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        for start in range(0, len(x) // batch * batch, batch):
            gradient = path[-1] - x[order[start : start + batch]].mean(axis=0)
            path.append(path[-1] + update(gradient, len(path) - 1))
    return np.array(path[1:])


def by_hand(update: Callable[[np.ndarray, int], np.ndarray], epochs: int = 3) -> np.ndarray:
    """Where the path ends."""
    return path_by_hand(update, epochs)[-1]


def adam_by_hand(
    rate: Callable[[int], float], clip: float | None = None, skip: float = np.inf
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Kingma & Ba 2015, algorithm 1; a gradient longer than ``skip`` changes nothing but the rate's step."""
    state = {"m": 0.0, "v": 0.0, "t": 0}

    def update(gradient: np.ndarray, step: int) -> np.ndarray:
        if np.linalg.norm(gradient) > skip:
            return np.zeros_like(gradient)
        if clip is not None:
            gradient = gradient * min(1.0, clip / float(np.linalg.norm(gradient)))
        state["t"] += 1
        state["m"] = 0.9 * state["m"] + 0.1 * gradient
        state["v"] = 0.999 * state["v"] + 0.001 * gradient**2
        m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        return -rate(step) * m / (np.sqrt(v) + 1e-8)

    return update


def plain_sgd(engine: str) -> Any:
    if engine == "pyro":
        import torch

        return lambda params: torch.optim.SGD(params, lr=0.2)
    import optax

    return optax.sgd(0.2)


SKIP, SLOW = 1.6, Decay(0.1)
"""Of the norms met at this rate the first, the second and the fifth are longer, and no other."""

OPTIMIZERS: dict[str, tuple[Callable[[str], dict[str, Any]], Callable[[], Any], float]] = {
    "adam": (lambda e: {"learning_rate": 0.1}, lambda: adam_by_hand(lambda step: 0.1), 1e-12),
    "adam with a decaying rate": (lambda e: {"learning_rate": Decay()}, lambda: adam_by_hand(Decay()), 1e-12),
    "adam, clipped": (
        lambda e: {"optimizer": Adam(0.1, clip_norm=0.2)},
        lambda: adam_by_hand(lambda step: 0.1, 0.2),
        1e-12,
    ),
    "adam, skipping": (
        lambda e: {"optimizer": Adam(SLOW, skip_norm=SKIP)},
        lambda: adam_by_hand(SLOW, skip=SKIP),
        1e-12,
    ),
    "adam, skipping before it clips": (
        lambda e: {"optimizer": Adam(SLOW, clip_norm=0.2, skip_norm=SKIP)},
        lambda: adam_by_hand(SLOW, 0.2, SKIP),
        1e-12,
    ),
    "the library's own": (lambda e: {"optimizer": plain_sgd(e)}, lambda: lambda gradient, step: -0.2 * gradient, 1e-12),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_engines_take_the_steps_that_numpy_takes(engine: str, name: str) -> None:
    """Same minibatches, same order, same optimiser: a wrong seed, order or step count would show."""
    options, update, tolerance = OPTIMIZERS[name]
    run = quick(engine, **options(engine))
    np.testing.assert_allclose(run.weights["mu"], by_hand(update()), rtol=tolerance, atol=tolerance)


@pytest.mark.pyro
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parameters_whose_gradients_are_one_tensor_are_clipped_once(dtype: str) -> None:
    """As those of a sum are in torch: scaled in place, it is scaled twice. Of two types they are two tensors."""
    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Program

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Any) -> None:
        one, two = (
            pyro.param("one", torch.tensor(2.0)),
            pyro.param("two", torch.tensor(1.0, dtype=getattr(torch, dtype))),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(one + two, 1.0))

    trainer = pyro_trainer(Program(model, guide), ELBO(), GREY, Adam(0.1, clip_norm=0.5))
    trainer.epoch(np.arange(10)[None, None])
    found = [float(p.grad) for p in trainer.params.values()]
    np.testing.assert_allclose(np.abs(found), 0.5 / np.sqrt(2.0), rtol=1e-12 if dtype == "float64" else 1e-6)


def test_skipped_updates_are_counted(engine: str) -> None:
    """By their share of an epoch's steps, from norms that NumPy works out."""
    norms: list[float] = []
    update = adam_by_hand(SLOW, skip=SKIP)

    def watched(gradient: np.ndarray, step: int) -> np.ndarray:
        norms.append(float(np.linalg.norm(gradient)))
        return update(gradient, step)

    by_hand(watched, epochs=6)
    long = np.array(norms).reshape(6, 3) > SKIP
    run = quick(engine, optimizer=Adam(SLOW, skip_norm=SKIP), epochs=6)
    assert np.flatnonzero(long).tolist() == [0, 1, 4]
    np.testing.assert_array_equal([row["skipped"] for row in run.history], long.mean(axis=1))


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_averaged_weights(engine: str, decay: float) -> None:
    """``sum_i d^(t-i) w_i / sum_i d^(t-i)``: what the program and held-out data see; the weights go on by themselves."""
    adam, valid = Adam(SLOW, skip_norm=SKIP, average=decay), data(70, seed=5)
    run = quick(engine, optimizer=adam, valid=valid)
    path = path_by_hand(adam_by_hand(SLOW, skip=SKIP))
    for epochs, row in enumerate(run.history, start=1):
        share = decay ** np.arange(3 * epochs)[::-1]
        mean = share @ path[: 3 * epochs] / share.sum()
        exact = -0.5 * ((valid - mean) ** 2).sum(axis=1).mean() - 1.5 * np.log(2 * np.pi)
        assert row["valid_bound"] == pytest.approx(exact, rel=1e-12)
        assert row["skipped"] >= 0
    np.testing.assert_allclose(run.weights["mu"], mean, rtol=1e-12)
    assert np.abs(mean - path[-1]).max() > 0.01


def test_averaging_does_not_touch_training(engine: str) -> None:
    plain, averaged = (digits(engine, optimizer=Adam(0.01, average=average)) for average in (None, 0.9))
    for one, other in zip(plain.history, averaged.history, strict=True):  # two compiled programs, that may round apart
        assert one["bound"] == pytest.approx(other["bound"], rel=1e-10)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)
    assert not same_weights(plain.weights, averaged.weights)


@pytest.mark.parametrize("batch_size", [16, 4])
def test_history_is_the_mean_over_the_steps(engine: str, batch_size: int) -> None:
    """Of the bound before each update; here ``mean log N(x; mu, 1)`` on the minibatch, with gradient ``mean(x) - mu``.

    Of the gradient's norm in NumPyro over every tenth step of all, where an epoch has ten.
    """
    seen: list[tuple[float, float]] = []
    x = data()

    def record(epoch: int) -> Callable[[np.ndarray, int], np.ndarray]:
        return lambda gradient, step: -0.2 * gradient

    mu, rows = np.zeros(3), []
    for epoch in range(2):
        seen.clear()
        for index in batches(0, epoch, len(x), batch_size):
            batch = x[index]
            bound = -0.5 * ((batch - mu) ** 2).sum(axis=1).mean() - 1.5 * np.log(2 * np.pi)
            seen.append((bound, float(np.linalg.norm(mu - batch.mean(axis=0)))))
            mu = mu + 0.2 * (batch.mean(axis=0) - mu)
        first = epoch * len(seen)
        measured = [(first + i) % 10 == 0 or len(seen) < 10 or engine == "pyro" for i in range(len(seen))]
        bounds, norms = np.transpose(seen)
        rows.append((bounds.mean(), norms[measured].mean()))
    run = quick(engine, optimizer=plain_sgd(engine), epochs=2, batch_size=batch_size)
    found = [(row["bound"], row["grad_norm"]) for row in run.history]
    np.testing.assert_allclose(found, rows, rtol=1e-12)
    assert [(row["epoch"], row["step"]) for row in run.history] == [(1, len(seen)), (2, 2 * len(seen))]
    assert all(row["rate"] == pytest.approx(0.0, abs=1e-12) for row in run.history)
    assert all(row["distortion"] == pytest.approx(-row["bound"], rel=1e-12) for row in run.history)


def test_held_out_bound_is_the_bound_on_all_of_the_held_out_data(engine: str) -> None:
    """70 data in batches of 16: the last batch is smaller and weighs less."""
    valid = data(70, seed=5)
    run = quick(engine, optimizer=plain_sgd(engine), valid=valid)
    for epochs, row in enumerate(run.history, start=1):
        mu = by_hand(lambda gradient, step: -0.2 * gradient, epochs)
        exact = -0.5 * ((valid - mu) ** 2).sum(axis=1).mean() - 1.5 * np.log(2 * np.pi)
        assert row["valid_bound"] == pytest.approx(exact, rel=1e-12)


def binary(num_data: int) -> np.ndarray:
    return (np.random.default_rng(0).random((num_data, 5)) < 0.4).astype(float)


@PYRO_ALONE  # written once for both engines
def test_epochs_of_so_many_steps_go_on_through_the_data(engine: str) -> None:
    """Six epochs of two steps are four of three: the same minibatches in the same order."""
    x, options = binary(36), {"batch_size": 12, "progress": False, "seed": 2}
    made = getattr(VAE(data_dim=x.shape[1], latent_dim=2), engine)()
    passes = fit(made, x, epochs=4, **options)
    pieces = fit(made, x, epochs=6, epoch_steps=2, **options)
    assert [row["step"] for row in pieces.history] == [2, 4, 6, 8, 10, 12]
    for name, value in passes.program.weights.items():
        np.testing.assert_array_equal(pieces.program.weights[name], value)
    assert pieces.config["epoch_steps"] == 2
    with pytest.raises(InvalidArgument, match="epoch_steps must be a whole number"):
        fit(made, x, epoch_steps=0, **options)


@PYRO_ALONE
def test_training_stops_by_the_clock(engine: str) -> None:
    x = binary(24)
    made = getattr(VAE(data_dim=x.shape[1], latent_dim=2), engine)()
    run = fit(made, x, epochs=1000, batch_size=12, max_seconds=0.05, progress=False)
    seconds = [row["seconds"] for row in run.history]
    assert sum(seconds) >= 0.05 > sum(seconds[:-1])
    with pytest.raises(InvalidArgument, match="max_seconds must be a finite number above 0"):
        fit(made, x, max_seconds=0.0, progress=False)


def test_early_stopping_counts_epochs_since_the_best(engine: str) -> None:
    """``mu`` climbs from 0 past the held-out mean to the training mean: the held-out bound rises, then falls."""
    options = {"data": data() + 4.0, "learning_rate": 0.1, "batch_size": 60, "epochs": 60, "valid": data()}
    bounds = [row["valid_bound"] for row in quick(engine, **options).history]
    best = int(np.argmax(bounds))
    assert 3 < best < 40
    for patience in (1, 4):
        run = quick(engine, **options, early_stopping=patience)
        assert [row["valid_bound"] for row in run.history] == bounds[: best + patience + 1]


# --- seeds, state, repeatability ----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bits_and_others_do_not(engine: str) -> None:
    one, two, other = digits(engine, seed=3), digits(engine, seed=3), digits(engine, seed=4)
    assert same_weights(one.weights, two.weights)
    assert same_history(one, two)
    for name in one.weights:
        assert not np.array_equal(one.weights[name], other.weights[name]), name


def test_held_out_data_do_not_touch_training(engine: str) -> None:
    """Neither the noise that follows, nor the statistics of a batch normalisation."""
    user = program(engine, "batch_norm")
    batch_norm = [quick(engine, program=user, valid=v) for v in (None, data(20, 9))]
    assert same_weights(*(run.weights for run in batch_norm))


@PYRO_ALONE
def test_progress_and_checkpoints_do_not_touch_training(engine: str, tmp_path: Path) -> None:
    plain, watched = digits(engine), digits(engine, directory=tmp_path, progress=True)
    assert same_weights(plain.weights, watched.weights)
    assert same_history(plain, watched)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.pyro
def test_redrawn_pixels_with_an_estimator_that_keeps_numbers() -> None:
    """The program is run once before it trains, when no pixel has been drawn yet."""
    running_mean = ELBO(gradient=ScoreFunction(baseline="running-mean"))
    spec = SigmoidBeliefNet(data_dim=4, latent_dims=(2,))
    run = fit(spec.pyro(), GREY, objective=running_mean, binarize="stochastic", epochs=1, progress=False)
    assert np.isfinite(run.history[-1]["bound"])


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.pyro
def test_pyro_leaves_no_trace() -> None:
    """The user's modules, the global parameter store, and every global random state."""
    import pyro
    import torch

    pyro.param("mine", torch.ones(2))
    user, functions, zoo = program("pyro", "batch_norm"), program("pyro", "functions"), SPEC.pyro()
    user.model.eval()
    x = torch.as_tensor(data())
    modules = (user.model, user.guide)
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in modules]
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    quick("pyro", program=user, data=x, objective=IWAE(2), valid=x[:7])
    quick("pyro", program=functions)
    fit(zoo, DIGITS, epochs=1, binarize="stochastic", valid=DIGITS[:5], progress=False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(pyro.param("mine"), torch.ones(2))
    for module, state in zip(modules, before, strict=True):
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(v, module.state_dict()[n]) for n, v in state.items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(m.training for m in user.model.modules())
    assert all(m.training for m in user.guide.modules())
    assert user.store == {"params": {}, "constraints": {}}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.numpyro
def test_numpyro_leaves_no_trace() -> None:
    import jax

    user = program("numpyro", "batch_norm")
    states = (np.random.get_state()[1].tolist(), random.getstate())
    run = quick("numpyro", program=user)
    assert (user.params, user.mutable) == (None, None)
    trained = jax.tree.map(np.array, (run.program.params, run.program.mutable))
    further = quick("numpyro", program=run.program)
    assert states == (np.random.get_state()[1].tolist(), random.getstate())
    for mine, now in zip(
        jax.tree.leaves(trained), jax.tree.leaves((run.program.params, run.program.mutable)), strict=True
    ):
        np.testing.assert_array_equal(mine, np.asarray(now))
    assert not same_weights(run.weights, further.weights)


@pytest.mark.numpyro
def test_nothing_is_traced_again_after_the_first_epoch() -> None:
    """A count of Python calls of the model: as many for one epoch as for four."""
    pytest.importorskip("jax")
    from elbozoo.inference.numpyro_engine import Program

    counts = []
    for epochs in (1, 4):
        user, calls = program("numpyro", "functions"), []

        def counted(x: Any, model: Any = user.model_fn, calls: list[int] = calls) -> None:
            calls.append(len(x))
            model(x)

        quick("numpyro", program=Program(counted, user.guide_fn), epochs=epochs, objective=IWAE(2), valid=data(40))
        counts.append(calls)
    assert counts[0] == counts[1]
    assert len(counts[0]) > 0


TRACED = (
    ELBO(), ELBO(2, STL()), IWAE(3, DReG()), PIWAE(2, 2), TVO(2, 3, gradient=DReG()), IWAE(3, ScoreFunction(False)),
    AnnealedKL(IWAE(3), warmup=6, unit="steps"), FreeBits(ELBO(), 0.1), Capacity(ELBO(), 2.0, warmup=6, unit="steps"),
)  # fmt: skip
"""Every estimator and shape: those that run the guide twice, those that read the step."""


def pyro_trainer(program: Any, objective: Any, x: np.ndarray, optimizer: Adam | None = None) -> Any:
    from elbozoo.inference.pyro_trainer import Trainer

    return Trainer(
        program, objective, optimizer or Adam(0.01), (x,), batch_size=10, seeds=[0], redraw_pixels=True, device=None
    )


@pytest.mark.pyro
@pytest.mark.parametrize("objective", TRACED, ids=lambda o: f"{type(o).__name__}-{type(o.gradient).__name__}")
def test_a_traced_step_is_the_step_to_the_bit(objective: Any) -> None:
    order, trainers = np.arange(90).reshape(1, 9, 10), []
    for traced in (True, False):
        trainer = pyro_trainer(VAE(data_dim=4, latent_dim=2, network=MLP(hidden=(3,))).pyro(), objective, GREY)
        trainer.compile_after = 0 if traced else math.inf
        metrics = trainer.epoch(order)
        trainers.append((trainer, metrics))
    (one, seen), (two, wanted) = trainers
    assert one.compiled is not None
    assert two.compiled is None
    assert same_weights(one.arrays(), two.arrays())  # moments and random state among them
    assert seen.keys() == wanted.keys()
    assert all(np.array_equal(seen[n], wanted[n]) for n in seen)
    assert len(np.unique(seen["bound"])) == 9, "fresh noise and fresh data at every step"


@pytest.mark.pyro
def test_a_step_is_traced_once_it_pays() -> None:
    """A trace takes as long as it saves in one or two hundred steps; that it came is seen nowhere in the numbers."""
    trainers = [
        pyro_trainer(VAE(data_dim=4, latent_dim=2, network=MLP(hidden=(3,))).pyro(), ELBO(), GREY) for _ in range(2)
    ]
    one, two = trainers
    two.compile_after = math.inf
    order = np.random.default_rng(0).integers(0, 90, (1, 108, 10))
    for trainer in trainers:
        trainer.epoch(order[:, :100])
        assert trainer.compiled is None
        trainer.epoch(order[:, 100:])
    assert one.compiled is not None
    assert two.compiled is None
    assert same_weights(one.arrays(), two.arrays())


@pytest.mark.pyro
def test_a_users_own_program_is_not_traced() -> None:
    """It may count in Python: a trace would freeze the count."""
    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Program

    calls = []

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            calls.append(len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0] + len(calls))

    def guide(x: Any) -> None:
        loc = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    trainer = pyro_trainer(Program(model, guide), ELBO(), GREY)
    before = len(calls)
    trainer.epoch(np.tile(np.arange(90), 12).reshape(1, 108, 10))
    assert trainer.compiled is None
    assert len(calls) - before == 108


# --- replicates ---------------------------------------------------------------------------------------------------


@covering("binarize", ("stochastic", "static"), numpyro=(0,))
def test_replicates_are_single_runs_with_the_next_seeds(engine: str, binarize: str) -> None:
    options = {"batch_size": 30, "epochs": 3, "valid": GREY[:30], "binarize": binarize, "progress": False}
    options |= {"objective": AnnealedKL(ELBO(), warmup=2.0), "optimizer": Adam(skip_norm=2.0, average=0.7)}
    user = getattr(GREY_SPEC, engine)()
    together = fit(user, GREY, seed=5, replicates=2, **options)
    for r, run in enumerate(together):
        alone = fit(user, GREY, seed=5 + r, **options)
        assert run.config["seed"] == 5 + r
        tolerance = {"rtol": 0.0, "atol": 0.0 if engine == "pyro" else 1e-8}  # held-out data go through all at once
        for name, value in alone.weights.items():
            np.testing.assert_array_equal(run.weights[name], value, err_msg=name)  # on a CPU they take turns
        for row, other in zip(run.history, alone.history, strict=True):
            assert row.keys() == other.keys()
            np.testing.assert_allclose(
                *([v for k, v in h.items() if k != "seconds"] for h in (row, other)), **tolerance
            )
    assert not same_weights(together[0].weights, together[1].weights)


@pytest.mark.numpyro
def test_replicates_go_together_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """There one program steps them all; here, on a CPU, they take turns in it. The same runs come out."""
    from elbozoo.inference import numpyro_trainer

    options = {"optimizer": Adam(skip_norm=2.0, average=0.7), "batch_size": 30, "epochs": 2, "progress": False}
    in_turn = fit(GREY_SPEC.numpyro(), GREY, binarize="stochastic", replicates=2, **options)
    monkeypatch.setattr(numpyro_trainer, "_platform", lambda device: "gpu")
    monkeypatch.delattr(numpyro_trainer.Trainer, "_in_turn", raising=True)
    together = fit(GREY_SPEC.numpyro(), GREY, binarize="stochastic", replicates=2, **options)
    for one, other in zip(in_turn, together, strict=True):
        for name, value in one.weights.items():
            np.testing.assert_allclose(other.weights[name], value, rtol=0.0, atol=1e-8, err_msg=name)


def test_one_replicate_is_a_list_of_one(engine: str) -> None:
    (run,) = quick(engine, replicates=1)
    assert same_weights(run.weights, quick(engine).weights)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_every_parameter_moves_and_stays_finite(engine: str) -> None:
    one, two = digits(engine, epochs=2), digits(engine)
    for name, value in two.weights.items():
        assert np.isfinite(value).all(), name
        assert not np.array_equal(value, one.weights[name]), name


BASE_KEYS = {"epoch", "step", "bound", "distortion", "rate", "kl_z", "live_z", "grad_norm", "seconds"}
KEYS = {
    "plain": ({"objective": ELBO()}, set()),
    "held out": ({"objective": ELBO(), "valid": data(16)}, {"valid_bound"}),
    "annealed": ({"objective": AnnealedKL(ELBO(), warmup=2.0)}, {"shaped_bound", "beta"}),
    "nested": ({"objective": AnnealedKL(FreeBits(ELBO(), 0.1), warmup=2.0)}, {"shaped_bound", "beta", "free_bits"}),
}


@covering("case", tuple(KEYS), numpyro=(3,))
def test_history_has_one_row_an_epoch_with_these_keys(engine: str, case: str) -> None:
    options, more = KEYS[case]
    run = linear(engine, **options)
    assert len(run.history) == 3
    for row in run.history:
        assert set(row) == BASE_KEYS | more
        assert row["bound"] == pytest.approx(-row["rate"] - row["distortion"], rel=1e-12)
        assert row["rate"] == pytest.approx(row["kl_z"], rel=1e-12)
        assert row["grad_norm"] > 0
        assert row["seconds"] > 0
    if case == "annealed":  # 60 data in batches of 16: 3 steps an epoch, a warm-up of 6; β where the epoch ends
        np.testing.assert_allclose([row["beta"] for row in run.history], [2 / 6, 5 / 6, 1.0], rtol=1e-12)


def test_shaped_bound_is_what_is_climbed(engine: str) -> None:
    run = linear(engine, objective=Beta(ELBO(), 0.25), batch_size=60)
    for row in run.history:
        assert row["shaped_bound"] == pytest.approx(-0.25 * row["rate"] - row["distortion"], rel=1e-12)
        assert row["beta"] == 0.25


def test_training_climbs(engine: str) -> None:
    """From the initial bound by more than the noise of a held-out bound: here nats, there hundredths."""
    run = digits(engine, epochs=20, valid=DIGITS[:96])
    assert run.history[-1]["valid_bound"] > run.history[0]["valid_bound"] + 3.0


# --- data ---------------------------------------------------------------------------------------------------------


@PYRO_ALONE
def test_images_are_flattened(engine: str) -> None:
    assert same_weights(digits(engine).weights, digits(engine, data=DIGITS.reshape(-1, 64)).weights)


@PYRO_ALONE  # written once for both engines
def test_eight_bit_pixels_and_booleans_are_numbers(engine: str) -> None:
    white = DIGITS > 0.5
    runs = [digits(engine, data=white.astype(kind), binarize="none") for kind in (bool, np.uint8, float)]
    assert same_weights(runs[0].weights, runs[1].weights)
    assert same_weights(runs[0].weights, runs[2].weights)


def test_binarisations() -> None:
    user, x = SPEC.numpyro(), np.tile(DIGITS.reshape(-1, 64), (40, 1))
    (threshold,), (static,), (again,) = (prepare(user, x, how) for how in ("threshold", "static", "static"))
    np.testing.assert_array_equal(threshold, x > 0.5)
    np.testing.assert_array_equal(static, again)
    assert set(np.unique(static)) == {0.0, 1.0}
    np.testing.assert_array_equal(static[:3], prepare(user, x[:3], "static")[0])
    drawn = static.reshape(40, -1).mean(axis=0) - x[:100].ravel()  # 40 draws of each pixel
    assert abs(drawn.mean()) < 4 * np.sqrt((x[:100] * (1 - x[:100])).sum() / 40) / 6400


def test_pixels_are_redrawn_at_every_step_or_never(engine: str) -> None:
    """The distortion of ``location`` at mu = 0 is ``mean |x|^2 / 2`` plus a constant: it counts the white pixels."""
    grey = np.random.default_rng(0).random((200, 3))
    still = {"data": grey, "batch_size": 200, "learning_rate": 1e-12, "epochs": 30}
    counts = {}
    for how in ("static", "stochastic"):
        rows = quick(engine, binarize=how, **still).history
        counts[how] = 2 * 200 * (np.array([row["distortion"] for row in rows]) - 1.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(counts["static"], counts["static"].round()[0], rtol=1e-9)
    redrawn, mean, variance = counts["stochastic"], grey.sum(), (grey * (1 - grey)).sum()
    np.testing.assert_allclose(redrawn, redrawn.round(), rtol=1e-9)
    assert len(set(redrawn.round())) > 10
    assert abs(redrawn.mean() - mean) < 4 * np.sqrt(variance / 30)
    assert 0.4 < redrawn.var(ddof=1) / variance < 2.1  # chi-squared with 29 degrees of freedom: 1e-3 to each side


@PYRO_ALONE
def test_a_tuple_of_arrays_goes_to_model_and_guide(engine: str) -> None:
    x = data()
    y = x @ [1.0, -2.0, 0.5]
    run = quick(engine, "regression", data=(x, y), epochs=150, learning_rate=0.05, batch_size=60)
    np.testing.assert_allclose(run.weights["weight"], [1.0, -2.0, 0.5], atol=0.3)  # regressed on noise of variance 2
    assert run.evaluate((x, y), num_particles=20).num_data == 60


def test_a_batch_larger_than_the_data_is_all_of_it(engine: str) -> None:
    assert same_weights(quick(engine, batch_size=10**6).weights, quick(engine, batch_size=60).weights)
    assert quick(engine, batch_size=10**6).history[-1]["step"] == 3


@pytest.mark.pyro
def test_weights_have_torch_s_default_float() -> None:
    import torch

    torch.set_default_dtype(torch.float32)
    run = digits("pyro")
    assert {v.dtype for v in run.weights.values()} == {np.dtype(np.float32)}
    torch.set_default_dtype(torch.float64)
    assert {v.dtype for v in digits("pyro").weights.values()} == {np.dtype(np.float64)}


@pytest.mark.numpyro
def test_weights_have_jax_s_default_float() -> None:
    import jax

    with jax.enable_x64(False):
        run = quick("numpyro", "modules")
        assert {v.dtype for v in run.weights.values()} == {np.dtype(np.float32)}
    assert {v.dtype for v in quick("numpyro", "modules").weights.values()} == {np.dtype(np.float64)}


# --- going on, saving, loading ------------------------------------------------------------------------------------


def test_a_trained_program_goes_on_from_its_weights(engine: str) -> None:
    first = linear(engine, epochs=10)
    before = {n: v.copy() for n, v in first.weights.items()}
    still = linear(engine, learning_rate=1e-12)  # the same seed, from new initial weights
    on = fit(first.program, data(), batch_size=16, epochs=3, learning_rate=1e-12, progress=False)
    assert same_weights(before, first.weights)
    for name, value in on.weights.items():
        np.testing.assert_allclose(value, before[name], atol=1e-10, err_msg=name)
    assert np.abs(still.weights["decoder.weight"] - before["decoder.weight"]).max() > 0.1


@covering("name", ("functions", "modules", "batch_norm"), numpyro=(2,))
def test_programs_of_the_user_s_own(engine: str, name: str, tmp_path: Path) -> None:
    run = quick(engine, name, epochs=20, learning_rate=0.02, objective=IWAE(2), directory=tmp_path)
    assert run.history[-1]["bound"] > run.history[0]["bound"] + 0.3
    assert all(np.isfinite(v).all() for v in run.weights.values())
    back = Run.load(tmp_path, program(engine, name), data()[:2])
    assert same_weights(run.weights, back.weights)
    found = [r.evaluate(data(), num_particles=20) for r in (run, back, run)]
    assert found[0].nll == found[1].nll == found[2].nll


@covering("name", ("functions", "modules"), numpyro=(0,))
def test_constrained_parameters_stay_in_their_sets(engine: str, name: str) -> None:
    """The scale starts at 2 and wants to be near 0.5; steps of 0.4 would carry it below 0 without the constraint."""
    run = quick(engine, name, epochs=30, learning_rate=0.4)
    scale = run.program.predict((feed(engine, data()),), num_particles=1)
    assert np.isfinite(scale["observed"]["x"]).all()
    assert np.isfinite(run.evaluate(data(), num_particles=10).nll)
    if engine == "numpyro":
        assert 0.0 < run.program.params["scale"] < 1.5


def feed(engine: str, x: np.ndarray) -> Any:
    if engine == "numpyro":
        return x
    import torch

    return torch.as_tensor(x)


@pytest.mark.pyro
def test_trained_torch_modules_are_in_evaluation_mode() -> None:
    """So that evaluating them twice gives one answer, and moves no running statistics."""
    run = quick("pyro", "batch_norm")
    before = {n: v.copy() for n, v in run.weights.items()}
    assert float(before["encoder.1.num_batches_tracked"]) == 9  # 3 epochs of 3 steps, and nothing but steps
    assert not any(m.training for m in run.program.guide.modules())
    run.evaluate(data(), num_particles=5)
    assert same_weights(before, run.weights)
    further = quick("pyro", program=run.program)
    assert float(further.weights["encoder.1.num_batches_tracked"]) == 18


def test_a_saved_run_loads_in_the_same_engine(engine: str, tmp_path: Path) -> None:
    run = digits(engine)
    assert run.save(tmp_path / "run") == tmp_path / "run"
    back = Run.load(tmp_path / "run")
    assert same_weights(run.weights, back.weights)
    assert back.history == run.history
    assert back.config == run.config
    assert back.objective == run.objective
    assert back.program.spec == SPEC
    assert run.evaluate(DIGITS[:10], num_particles=5).nll == back.evaluate(DIGITS[:10], num_particles=5).nll


@pytest.mark.pyro
@pytest.mark.numpyro
@pytest.mark.parametrize(("trained_in", "used_in"), [ENGINES, ENGINES[::-1]])
def test_a_saved_run_loads_in_the_other_engine(trained_in: str, used_in: str, tmp_path: Path) -> None:
    """The same weights give the same model and guide: at the posterior's draws of one engine, the other's densities agree."""
    x = data()
    run = fit(getattr(LINEAR, trained_in)(), x, epochs=20, batch_size=20, learning_rate=0.02, progress=False)
    run.save(tmp_path)
    back = Run.load(tmp_path, getattr(LINEAR, used_in)())
    assert back.program.engine == used_in
    assert same_weights(run.weights, back.weights)
    exact = -LINEAR.log_prob(run.weights, x).mean()
    for one in (run, back):
        found = one.evaluate(x, num_particles=2000)
        assert abs(found.nll - exact) < 5 * found.nll_mc_se + 1e-3
        assert found.elbo == pytest.approx(LINEAR.elbo(run.weights, x).mean(), abs=0.02)


def test_the_directory_holds_the_run(engine: str, tmp_path: Path) -> None:
    run = digits(engine, directory=tmp_path / "deep" / "run")
    names = {p.name for p in (tmp_path / "deep" / "run").iterdir()}
    assert names == {"checkpoint.safetensors", "weights.safetensors", "config.json", "history.json"}
    back = Run.load(tmp_path / "deep" / "run")
    assert same_weights(run.weights, back.weights)
    assert back.history == run.history


def test_replicates_lie_side_by_side(engine: str, tmp_path: Path) -> None:
    runs = linear(engine, replicates=2, directory=tmp_path)
    for r, run in enumerate(runs):
        back = Run.load(tmp_path / f"replicate-{r}")
        assert same_weights(run.weights, back.weights)
        assert back.config["seed"] == r


def test_checkpoints_come_as_often_as_asked(engine: str, tmp_path: Path) -> None:
    """And always at the last epoch."""
    digits(engine, epochs=3, checkpoint_every=2, directory=tmp_path)
    notes = load_arrays(tmp_path / "checkpoint.safetensors")[1]
    assert notes["epoch"] == 3


# --- configuration ------------------------------------------------------------------------------------------------


class Plain:
    """A learning rate without a repr of its own."""

    def __call__(self, step: Any) -> Any:
        return 0.01


def test_config_says_nothing_that_another_process_would_say_otherwise(tmp_path: Path) -> None:
    """No memory addresses: settings are compared when a run is resumed."""
    rates: list[Any] = [lambda step: 0.1, Plain(), Decay().__call__, plain_sgd, Decay(0.3)]
    for rate in rates:
        text = str(to_config(Adam(rate)))
        assert "0x" not in text
    assert to_config(Adam(Decay(0.3)))["learning_rate"] == {"class": "Decay", "start": 0.3, "over": 5.0}
    assert to_config(Adam(rates[0])) != to_config(Adam(rates[1]))
    save_json(tmp_path / "config.json", to_config(Adam(rates[0])))


def test_a_run_whose_saving_was_cut_short_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    one, two = (linear("numpyro", seed=s).save(tmp_path / f"{s}") for s in (0, 1))
    (one / "weights.safetensors").write_bytes((two / "weights.safetensors").read_bytes())
    with pytest.raises(CorruptFile, match=r"weights\.safetensors must be the weights that config\.json is about"):
        Run.load(one)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    linear("numpyro", directory=tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(
        CorruptFile,
        match=r"config\.json must be there in the folder of a finished run; got a checkpoint alone\. Go on with fit",
    ):
        Run.load(tmp_path / "run")


def test_a_run_on_an_objective_of_the_user_s_own_loads(engine: str, tmp_path: Path) -> None:
    run = linear(engine, objective=Own()).save(tmp_path / "run")
    with pytest.raises(CorruptFile, match=r"Pass Run\.load\(\.\.\., objective=\.\.\.\) if it is your own"):
        Run.load(run)
    assert Run.load(run, objective=Own()).objective == Own()


@dataclass(frozen=True)
class Own(ELBO):
    """An objective that the library does not know."""


@pytest.mark.pyro
def test_any_torch_optimiser_resumes(tmp_path: Path) -> None:
    """Adafactor's state has other shapes than the parameters."""
    import torch

    def make(params: Any) -> Any:
        return torch.optim.Adafactor(params, lr=0.01)

    whole = linear("pyro", optimizer=make, epochs=4)
    linear("pyro", optimizer=make, epochs=2, directory=tmp_path / "run")
    resumed = linear("pyro", optimizer=make, epochs=4, directory=tmp_path / "run", resume=True)
    assert same_weights(whole.weights, resumed.weights)


@pytest.mark.pyro
@pytest.mark.parametrize("before", [False, True])
def test_torch_trains_without_denormal_numbers_and_gives_the_callers_setting_back(before: bool) -> None:
    """Forward, backward and in the optimiser: a step is many times slower where products are full of them."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI

    from elbozoo.inference.pyro_engine import Loss, Program

    seen: dict[str, list[bool]] = {"forward": [], "backward": [], "update": []}

    def flushed() -> bool:
        return float(torch.tensor([2e-308], dtype=torch.float64) / 2) == 0.0

    class Watched(torch.optim.SGD):
        def step(self, *args: Any) -> None:
            seen["update"].append(flushed())
            super().step(*args)

    def model(x: Any) -> None:
        seen["forward"].append(flushed())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Any) -> None:
        at = pyro.param("at", torch.tensor(0.0)) * 1.0
        if at.requires_grad:
            at.register_hook(lambda g: seen["backward"].append(flushed()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(at, 1.0))

    def broken(x: Any) -> None:
        raise ValueError("of the user's")

    program, x = Program(model, guide), torch.as_tensor(GREY)
    torch.set_flush_denormal(before)
    try:
        gradient_noise(program, GREY, ELBO(), num_draws=2)
        seen["forward"].clear()  # in the end it asks the guide once more, for its parameters
        with_sgd = {"optimizer": lambda params: Watched(params, lr=0.1), "progress": False}
        fit(program, GREY, valid=GREY, epochs=2, batch_size=len(GREY), **with_sgd)
        assert flushed() is before
        SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Loss(ELBO())).step(x)  # a loop of the user's own
        assert flushed() is before
        with pytest.raises(ValueError, match="of the user's"):
            Loss(ELBO()).loss_and_grads(broken, guide, x)
        assert flushed() is before
    finally:
        torch.set_flush_denormal(False)
    assert {name: set(values) for name, values in seen.items()} == {name: {True} for name in seen}


@pytest.mark.numpyro
def test_no_step_draws_by_a_key_that_the_initial_weights_came_from() -> None:
    """JAX's ``split(key)[i]`` is ``fold_in(key, i)``: a step by its number alone would meet the keys of ``init``."""
    import jax

    from elbozoo.inference.numpyro_trainer import State, _key_of_step

    seed = jax.random.PRNGKey(0)
    initial = {tuple(np.asarray(key).tolist()) for key in jax.random.split(seed)}
    steps = [_key_of_step(State({}, None, None, {}, seed, jax.numpy.asarray(i))) for i in range(20)]
    assert not initial & {tuple(np.asarray(key).tolist()) for key in steps}
