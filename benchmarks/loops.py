"""Training loops to be timed against one another: ``fit``'s, hand-written ones of the same mathematics, the engines'
own ``SVI`` with their own losses, and pythae's trainer.

A *loop* is a function that runs one epoch: all minibatches of one pass, or ``steps`` of them, passes going on. All
loops take the same minibatches in the same order, with Adam at 1e-3. The mathematics of the hand-written ones are the
functions ``*_loss_jax`` and ``*_loss_torch`` below: they take their noise, or their binary latents, as an argument, so
that they can be compared with the library's at the same draws.
"""

# pyright: reportMissingImports=false
# (pythae comes with the extra `bench` alone.)

from __future__ import annotations

import contextlib
import io
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy.stats import quantile_test

from elbozoo.inference import ELBO, IWAE, VIMCO, Adam, Objective
from elbozoo.inference.data import minibatches
from elbozoo.inference.streams import source_of
from elbozoo.inference.training import _Loop
from elbozoo.zoo import VAE, HierarchicalVAE, SigmoidBeliefNet

Loop = Callable[[], None]
Gaussian = VAE | HierarchicalVAE
"""What the hand-written Gaussian losses are of: diagonal Gaussian guides, a standard normal prior, Bernoulli data."""

LEARNING_RATE = 1e-3


def objective_of(spec: Any, k: int) -> Objective:
    """The objective that the hand-written losses are those of."""
    if isinstance(spec, SigmoidBeliefNet):
        return IWAE(k, VIMCO())
    return ELBO() if k == 1 else IWAE(k)


def ours(
    engine: str, spec: Any, x: np.ndarray, k: int, batch: int, *, steps: int | None = None, replicates: int = 1
) -> Loop:
    """One epoch of ``fit``; on torch replicates run one after another, as there."""
    seeds = list(range(replicates))
    if engine == "numpyro":
        return loop_of(engine, spec, x, k, batch, steps, seeds).run_epoch
    loops = [loop_of(engine, spec, x, k, batch, steps, [seed]) for seed in seeds]

    def run() -> None:
        for loop in loops:
            loop.run_epoch()

    return run


def loop_of(engine: str, spec: Any, x: np.ndarray, k: int, batch: int, steps: int | None, seeds: list[int]) -> _Loop:
    """The object that drives the epochs of a call of ``fit``."""
    program, objective = getattr(spec, engine)(), objective_of(spec, k)
    source = source_of(program, x, batch, "none")
    trainer = import_module(f"elbozoo.inference.{engine}_trainer").Trainer(
        program,
        objective,
        Adam(LEARNING_RATE),
        source.example,
        batch_size=source.batch_size,
        seeds=seeds,
        redraw_pixels=False,
        device=None,
        num_data=source.num_data,
    )
    if engine == "pyro":
        trainer.compile_after = 0  # what is timed is how it goes on, after its first hundred steps
    return _Loop(trainer, source, objective, {"epoch_steps": steps}, seeds, None)


def orders(x: np.ndarray, batch: int, steps: int | None, seed: int = 0) -> Callable[[], np.ndarray]:
    """A function that gives the rows of the next epoch's minibatches, ``(steps, batch)``."""
    epochs = itertools.count()
    return lambda: minibatches(seed, 0, next(epochs), steps, len(x), batch)


# --- the networks' sizes

Sizes = dict[str, list[tuple[int, ...]]]


def sizes_of(spec: Gaussian | SigmoidBeliefNet) -> Sizes:
    """Units of every network from its input to its output, next to the data first."""
    if isinstance(spec, VAE):
        hidden = [tuple(spec.network.hidden)]  # type: ignore[union-attr]
        ends = [(spec.data_dim, 2 * spec.latent_dim)], [(spec.latent_dim, spec.data_dim)]
    else:
        networks = spec.networks if isinstance(spec, HierarchicalVAE) else (spec.network,) * len(spec.latent_dims)
        hidden = [tuple(network.hidden) for network in networks]
        ends = list(spec.encoder_sizes), list(spec.decoder_sizes)
    return {
        "encoders": [(a, *h, b) for (a, b), h in zip(ends[0], hidden, strict=True)],
        "decoders": [(a, *h[::-1], b) for (a, b), h in zip(ends[1], hidden, strict=True)],
    }


def activation_of(spec: Any) -> str:
    """The hidden layers' activation, tanh or relu."""
    return spec.activation if isinstance(spec, HierarchicalVAE) else spec.network.activation


def latent_dims(spec: Any) -> tuple[int, ...]:
    """Entries of each layer of latents, next to the data first."""
    return (spec.latent_dim,) if isinstance(spec, VAE) else tuple(spec.latent_dims)


# --- by hand, in JAX


def mlp_jax(layers: Any, h: Any, activation: str) -> Any:
    """A network; ``layers`` are pairs of weights (inputs, outputs) and biases."""
    import jax
    import jax.numpy as jnp

    function = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    for w, b in layers[:-1]:
        h = function(h @ w + b)
    return h @ layers[-1][0] + layers[-1][1]


def gaussian_loss_jax(params: Any, x: Any, noise: list[Any], activation: str) -> tuple[Any, list[Any]]:
    """Minus the ELBO (of one draw; the top layer's KL in closed form) or IWAE, nats per datum.

    Args:
        noise: standard normal, ``(K, B, latents)`` by layer.

    Returns: the loss and the latents, ``(K, B, latents)`` by layer.
    """
    import jax
    import jax.numpy as jnp

    k, below, latents, log_q = len(noise[0]), x, [], []
    loc = log_scale = x
    for layers, eps in zip(params["encoders"], noise, strict=True):
        loc, log_scale = jnp.split(mlp_jax(layers, below, activation), 2, -1)
        below = loc + jnp.exp(log_scale) * eps
        latents.append(below)
        log_q.append(-(0.5 * eps**2 + log_scale).sum(-1))
    logits = mlp_jax(params["decoders"][0], latents[0], activation)
    log_p = (x * logits - jax.nn.softplus(logits)).sum(-1)
    kl = 0.5 * (jnp.exp(2 * log_scale) + loc**2 - 1 - 2 * log_scale).sum(-1) if k == 1 else 0.0
    for layers, z, above in zip(params["decoders"][1:], latents[:-1], latents[1:], strict=True):
        loc, log_scale = jnp.split(mlp_jax(layers, above, activation), 2, -1)
        log_p = log_p - (0.5 * ((z - loc) * jnp.exp(-log_scale)) ** 2 + log_scale).sum(-1)
    if k == 1:
        return -(log_p - sum(log_q[:-1]) - kl).mean(), latents
    log_weight = log_p - 0.5 * (latents[-1] ** 2).sum(-1) - sum(log_q)
    return -(jax.nn.logsumexp(log_weight, axis=0) - math.log(k)).mean(), latents


def sbn_loss_jax(params: Any, x: Any, z: Any, activation: str) -> Any:
    """Minus VIMCO's surrogate for one layer of binary latents ``z`` of shape (K, B, units)."""
    import jax
    import jax.numpy as jnp

    def coins(logits: Any, value: Any) -> Any:
        return (value * logits - jax.nn.softplus(logits)).sum(-1)

    k = len(z)
    log_q = coins(mlp_jax(params["encoders"][0], 2 * x - 1, activation), z)
    log_lik = coins(mlp_jax(params["decoders"][0], 2 * z - 1, activation), x)
    log_weight = log_lik + coins(params["prior"], z) - log_q
    bound = jax.nn.logsumexp(log_weight, axis=0) - math.log(k)
    others = (log_weight.sum(0) - log_weight) / (k - 1)
    without = jnp.where(jnp.eye(k, dtype=bool)[:, :, None], others[:, None], log_weight[None])
    signal = jax.lax.stop_gradient(bound - (jax.nn.logsumexp(without, axis=1) - math.log(k)))
    return -(bound + (signal * log_q).sum(0)).mean()


def params_jax(spec: Any, seed: int = 0) -> Any:
    """Initial weights: Glorot-uniform, biases and prior logits at 0."""
    import jax.numpy as jnp

    rng = np.random.default_rng(seed)

    def glorot(pair: tuple[int, int]) -> Any:
        bound = math.sqrt(6 / sum(pair))
        return jnp.asarray(rng.uniform(-bound, bound, pair), jnp.result_type(float))

    def network(sizes: tuple[int, ...]) -> list[Any]:
        return [(glorot(pair), jnp.zeros(pair[1])) for pair in itertools.pairwise(sizes)]

    params: dict[str, Any] = {part: [network(s) for s in sizes] for part, sizes in sizes_of(spec).items()}
    return params | ({"prior": jnp.zeros(spec.latent_dims[-1])} if isinstance(spec, SigmoidBeliefNet) else {})


def loss_jax(spec: Any, k: int) -> Callable[[Any, Any, Any], Any]:
    """The loss as a function of parameters, minibatch and key."""
    import jax

    activation = activation_of(spec)

    def gaussian(params: Any, x: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(latent_dims(spec)))
        noise = [jax.random.normal(u, (k, len(x), d)) for u, d in zip(keys, latent_dims(spec), strict=True)]
        return gaussian_loss_jax(params, x, noise, activation)[0]

    def sbn(params: Any, x: Any, key: Any) -> Any:
        odds = jax.nn.sigmoid(mlp_jax(params["encoders"][0], 2 * x - 1, activation))
        z = jax.random.bernoulli(key, odds, (k, *odds.shape)).astype(x.dtype)
        return sbn_loss_jax(params, x, z, activation)

    return sbn if isinstance(spec, SigmoidBeliefNet) else gaussian


def hand_written_jax(
    spec: Any, x: np.ndarray, k: int, batch: int, *, steps: int | None = None, replicates: int = 1
) -> Loop:
    """A jitted scan, as one would write it: the loss above, optax; replicates by ``vmap``."""
    import jax
    import jax.numpy as jnp
    import optax

    loss, optimizer, data = loss_jax(spec, k), optax.adam(LEARNING_RATE), jnp.asarray(x, float)

    def epoch(params: Any, state: Any, key: Any, order: Any) -> Any:
        def step(carry: Any, index: Any) -> Any:
            params, state, key = carry
            key, use = jax.random.split(key)
            value, gradient = jax.value_and_grad(loss)(params, data[index], use)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state, key), value

        return jax.lax.scan(step, (params, state, key), order)

    every = [orders(x, batch, steps, seed) for seed in range(replicates)]
    params, key = params_jax(spec), jax.random.key(1)
    if replicates == 1:
        compiled, carry = jax.jit(epoch), [(params, optimizer.init(params), key)]
    else:
        params = jax.tree.map(lambda *p: jnp.stack(p), *(params_jax(spec, seed) for seed in range(replicates)))
        compiled = jax.jit(jax.vmap(epoch))
        carry = [(params, jax.vmap(optimizer.init)(params), jax.random.split(key, replicates))]

    def run() -> None:
        order = every[0]() if replicates == 1 else np.stack([draw() for draw in every])
        carry[0], values = compiled(*carry[0], order.astype(np.int32))
        np.asarray(values)

    return run


def products_jax(spec: Gaussian | SigmoidBeliefNet, x: np.ndarray, k: int, batch: int) -> Loop:
    """The matrix products of an epoch's steps and nothing else: no JAX loop of this mathematics can be faster.

    Forward, by each weight, and by each layer's input but the data; they go into the weights, lest they be left out.
    """
    import jax
    import jax.numpy as jnp

    rows = {"encoders": batch, "decoders": k * batch}
    shapes = [
        (rows[part], *pair) for part, nets in sizes_of(spec).items() for s in nets for pair in itertools.pairwise(s)
    ]
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(n, a)), jnp.float32) for n, a, _ in shapes]
    weights = [jnp.asarray(rng.normal(size=(a, b)), jnp.float32) for _, a, b in shapes]

    def step(weights: Any, _: Any) -> Any:
        moved, total = [], jnp.zeros(())
        for number, (h, w) in enumerate(zip(inputs, weights, strict=True)):
            out = h @ w
            moved.append(w + 1e-6 * (h.T @ out))
            total = total + (out @ w.T if number else out)[0, 0]
        return moved, total

    compiled = jax.jit(lambda w: jax.lax.scan(step, w, None, length=len(x) // batch)[1])

    def run() -> None:
        np.asarray(compiled(weights))

    return run


# --- by hand, in PyTorch


def gaussian_loss_torch(nets: Any, x: Any, noise: list[Any]) -> tuple[Any, list[Any]]:
    """:func:`gaussian_loss_jax` of modules."""
    from torch.nn import functional

    k, below, latents, log_q = len(noise[0]), x, [], []
    loc = log_scale = x
    for encoder, eps in zip(nets["encoders"], noise, strict=True):
        loc, log_scale = encoder(below).chunk(2, -1)
        below = loc + log_scale.exp() * eps
        latents.append(below)
        log_q.append(-(0.5 * eps**2 + log_scale).sum(-1))
    logits = nets["decoders"][0](latents[0])
    log_p = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1 - 2 * log_scale).sum(-1) if k == 1 else 0.0
    for decoder, z, above in zip(nets["decoders"][1:], latents[:-1], latents[1:], strict=True):
        loc, log_scale = decoder(above).chunk(2, -1)
        log_p = log_p - (0.5 * ((z - loc) * (-log_scale).exp()) ** 2 + log_scale).sum(-1)
    if k == 1:
        return -(log_p - sum(log_q[:-1]) - kl).mean(), latents
    log_weight = log_p - 0.5 * (latents[-1] ** 2).sum(-1) - sum(log_q)
    return -(log_weight.logsumexp(0) - math.log(k)).mean(), latents


def sbn_loss_torch(nets: Any, x: Any, z: Any) -> Any:
    """:func:`sbn_loss_jax` of modules."""
    import torch
    from torch.nn import functional

    def coins(logits: Any, value: Any) -> Any:
        return (value * logits - functional.softplus(logits)).sum(-1)

    k = len(z)
    log_q = coins(nets["encoders"][0](2 * x - 1), z)
    log_lik = coins(nets["decoders"][0](2 * z - 1), x)
    log_weight = log_lik + coins(nets["prior"]["logits"], z) - log_q
    bound = log_weight.logsumexp(0) - math.log(k)
    with torch.no_grad():
        others = (log_weight.sum(0) - log_weight) / (k - 1)
        without = torch.where(torch.eye(k, dtype=torch.bool)[:, :, None], others[:, None], log_weight[None])
        signal = bound - (without.logsumexp(1) - math.log(k))
    return -(bound + (signal * log_q).sum(0)).mean()


def nets_torch(spec: Any) -> Any:
    """The networks, with Glorot-uniform weights and biases at 0."""
    import torch
    from torch import nn

    function = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation_of(spec)]

    def network(sizes: tuple[int, ...]) -> nn.Sequential:
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*itertools.chain(*((layer, function()) for layer in layers[:-1])), layers[-1])

    parts: dict[str, nn.Module] = {
        part: nn.ModuleList(network(s) for s in sizes) for part, sizes in sizes_of(spec).items()
    }
    if isinstance(spec, SigmoidBeliefNet):
        parts["prior"] = nn.ParameterDict({"logits": nn.Parameter(torch.zeros(spec.latent_dims[-1]))})
    return nn.ModuleDict(parts)


def loss_torch(spec: Any, k: int) -> Callable[[Any, Any], Any]:
    """The loss as a function of networks and minibatch."""
    import torch

    def gaussian(nets: Any, x: Any) -> Any:
        return gaussian_loss_torch(nets, x, [torch.randn(k, len(x), d) for d in latent_dims(spec)])[0]

    def sbn(nets: Any, x: Any) -> Any:
        with torch.no_grad():
            odds = nets["encoders"][0](2 * x - 1).sigmoid()
            z = torch.bernoulli(odds.expand(k, *odds.shape))
        return sbn_loss_torch(nets, x, z)

    return sbn if isinstance(spec, SigmoidBeliefNet) else gaussian


def hand_written_torch(spec: Any, x: np.ndarray, k: int, batch: int, *, steps: int | None = None) -> Loop:
    """An eager loop, as one would write it: Sequentials, the loss above, torch's Adam (fused, the fastest here).

    Denormal numbers are flushed as in ``fit``, which would otherwise win by that alone under IWAE.
    """
    import torch

    from elbozoo.inference.pyro_engine import flushed_denormals

    nets, loss_of, draw = nets_torch(spec), loss_torch(spec, k), orders(x, batch, steps)
    optimizer = torch.optim.Adam(nets.parameters(), lr=LEARNING_RATE, fused=True)
    data = torch.as_tensor(x, dtype=torch.get_default_dtype())

    def run() -> None:
        total = 0.0
        with flushed_denormals():
            for index in torch.from_numpy(draw()):
                loss = loss_of(nets, data[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item()

    return run


# --- the engines' own


def own_loss(infer: Any, spec: Gaussian, k: int, **settings: Any) -> Any:
    """A library's own loss for the bound of :func:`objective_of`: IWAE is Rényi's at order 0.

    Its mean-field ELBO takes every KL in closed form, which is right for one layer of latents alone; of several, the
    plain one samples them all.
    """
    if k > 1:
        return infer.RenyiELBO(alpha=0, num_particles=k, **settings)
    return infer.TraceMeanField_ELBO() if len(latent_dims(spec)) == 1 else infer.Trace_ELBO()


def numpyro_svi(spec: Gaussian, x: np.ndarray, k: int, batch: int, *, steps: int | None = None) -> Loop:
    """NumPyro's own ``SVI.update`` with its own loss on the zoo's model and guide, in a jitted scan."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax

    program, data, draw = spec.numpyro(), jnp.asarray(x, float), orders(x, batch, steps)
    svi = numpyro.infer.SVI(
        program.model_fn, program.guide_fn, optax.adam(LEARNING_RATE), own_loss(numpyro.infer, spec, k)
    )
    state = [svi.init(jax.random.PRNGKey(0), data[:batch])]

    @jax.jit
    def epoch(state: Any, order: Any) -> Any:
        return jax.lax.scan(lambda state, index: svi.update(state, data[index]), state, order)

    def run() -> None:
        state[0], values = epoch(state[0], draw().astype(np.int32))
        np.asarray(values)

    return run


def pyro_svi(spec: Gaussian, x: np.ndarray, k: int, batch: int, *, steps: int | None = None) -> Loop:
    """Pyro's own ``SVI.step`` with its own loss on the zoo's model and guide; particles are vectorised."""
    import pyro.infer
    import pyro.optim
    import torch

    program, draw = spec.pyro(), orders(x, batch, steps)
    data = torch.as_tensor(x, dtype=torch.get_default_dtype())
    vectorised: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1} if k > 1 else {}
    loss = own_loss(pyro.infer, spec, k, **vectorised)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss)  # type: ignore[arg-type]

    def run() -> None:
        with program.parameters():
            for index in torch.from_numpy(draw()):
                svi.step(data[index])

    return run


def has_pythae() -> bool:
    """Whether the extra ``bench`` is installed."""
    return find_spec("pythae") is not None


def pythae_trainer(spec: VAE, x: np.ndarray, k: int, batch: int) -> Loop:
    """One training epoch of pythae's BaseTrainer on the same networks: a pass over the data."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import IWAE as PythaeIWAE
    from pythae.models import VAE as PythaeVAE
    from pythae.models import IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from torch import nn

    function = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation_of(spec)]
    hidden = tuple(spec.network.hidden)  # type: ignore[union-attr]

    def body(sizes: tuple[int, ...]) -> list[Any]:
        return [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), function())]

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*body((spec.data_dim, *hidden)))
            self.heads = nn.ModuleList([nn.Linear(hidden[-1], spec.latent_dim) for _ in range(2)])

        def forward(self, x: Any) -> Any:
            h = self.body(x)
            return ModelOutput(embedding=self.heads[0](h), log_covariance=self.heads[1](h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            last = nn.Linear(hidden[0], spec.data_dim)
            self.body = nn.Sequential(*body((spec.latent_dim, *hidden[::-1])), last, nn.Sigmoid())

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.body(z))

    settings: dict[str, Any] = {"input_dim": (spec.data_dim,), "latent_dim": spec.latent_dim}
    settings |= {"reconstruction_loss": "bce"}
    model = (
        PythaeVAE(VAEConfig(**settings), Encoder(), Decoder())
        if k == 1
        else PythaeIWAE(IWAEConfig(number_samples=k, **settings), Encoder(), Decoder())
    )
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        num_epochs=1,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=batch,
        optimizer_cls="Adam",
        no_cuda=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model.float()  # what pythae hands on is that, whatever torch's default
        trainer = BaseTrainer(model, BaseDataset(torch.as_tensor(x), torch.zeros(len(x))), training_config=config)
        trainer.prepare_training()
    trainer.callback_handler.callbacks = []  # no progress bars, no logs
    epochs = itertools.count(1)

    def run() -> None:
        trainer.train_step(next(epochs))

    return run


# --- timing


def rounds(contenders: Mapping[str, Loop], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of one epoch of each contender, in turn, ``repeats`` times after some that do not count.

    Every second round goes backwards, so that a machine that grows slower does not favour who comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + warm_up):
        for name, run in list(contenders.items())[:: -1 if i % 2 else 1]:
            taken = once(run)
            if i >= warm_up:
                seconds[name].append(taken)
    return seconds


def once(run: Loop) -> float:
    """Seconds of one epoch."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(a: list[float], b: list[float]) -> dict[str, float | None]:
    """Median and range of the paired ratios a/b; ``low`` to ``high`` hold the median's true value with at least 95%, if
    rounds are independent (order statistics, no distribution assumed), and are None of fewer than six rounds.
    """
    ratios = [p / q for p, q in zip(a, b, strict=True)]
    least, most = min(ratios), max(ratios)
    low, high = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    return {
        "median": statistics.median(ratios),
        "low": float(low) if math.isfinite(low) else None,
        "high": float(high) if math.isfinite(high) else None,
        "min": least,
        "max": most,
    }
