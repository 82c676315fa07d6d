"""Oracles: exact answers in NumPy and SciPy alone, and the small programs they are the answers to.

Nothing above the line "programs" calls the package. A program is written once and runs in both engines, whose primitives
have the same names; what it should give is worked out beside it by Gauss–Hermite quadrature, by enumeration or in closed form,
and differentiated by central differences, so that neither engine's automatic differentiation is its own judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.stats import multivariate_normal

Params = dict[str, float]


# --- bounds, long-hand ------------------------------------------------------------------------------------------
# Each takes log weights (K, …) and is written as in its paper; sums of exponentials by NumPy's logaddexp.


def elbo(l: np.ndarray) -> np.ndarray:
    return np.mean(l, axis=0)


def iwae(l: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(l) - np.log(len(l))


def renyi(alpha: float) -> Callable:
    return lambda l: iwae((1 - alpha) * l) / (1 - alpha)


def miwae(outer: int, inner: int) -> Callable:
    def value(l: np.ndarray) -> np.ndarray:
        groups = [iwae(l[m * inner : (m + 1) * inner]) for m in range(outer)]
        return sum(groups[1:], start=groups[0]) / outer

    return value


def ciwae(beta: float) -> Callable:
    return lambda l: beta * elbo(l) + (1 - beta) * iwae(l)


def tvo(betas: Sequence[float]) -> Callable:
    """Left Riemann sum over the points ``betas`` (0 first, 1 last)."""

    def value(l: np.ndarray) -> np.ndarray:
        total = np.zeros(l.shape[1:])
        for left, right in itertools.pairwise(betas):
            w = np.exp(left * l)
            total = total + (right - left) * np.sum(w * l, axis=0) / np.sum(w, axis=0)
        return total

    return value


def log_spaced(partitions: int, first: float) -> list[float]:
    """0, then ``partitions`` points from ``first`` to 1, evenly spaced in their logarithm."""
    return [0.0, *np.geomspace(first, 1.0, partitions)] if partitions > 1 else [0.0, 1.0]


# --- expectations and derivatives -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nodes:
    """Quadrature nodes of one particle: probabilities, ``log p(x|z)`` and ``log q - log p`` there."""

    weight: np.ndarray
    log_lik: np.ndarray
    rate: np.ndarray


def expected(bound: Callable, nodes: Nodes, num_particles: int, beta: float = 1.0) -> float:
    """``E[F(l_1 … l_K)]`` over independent particles: every combination of nodes, weighted."""
    l = nodes.log_lik - beta * nodes.rate
    index = np.stack(np.meshgrid(*[np.arange(len(l))] * num_particles, indexing="ij")).reshape(num_particles, -1)
    return float(np.prod(nodes.weight[index], axis=0) @ bound(l[index]))


def differentiate(
    f: Callable[[Params], float], at: Params, names: Sequence[str], step: float = 2e-3
) -> dict[str, float]:
    """Central differences of fourth order."""
    stencil = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
    return {n: sum(c * f({**at, n: at[n] + i * step}) for i, c in stencil) / step for n in names}


def normal(x: Any, loc: Any, scale: Any) -> np.ndarray:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def bernoulli(x: Any, logits: Any) -> np.ndarray:
    return x * logits - np.logaddexp(0.0, logits)


@cache
def gauss_hermite(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for ``E[f(e)]``, e standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(num)
    return x, w / w.sum()


@cache
def shifted_legendre(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for ``E[f(u)]``, u uniform on (0, 1)."""
    x, w = np.polynomial.legendre.leggauss(num)
    return (x + 1) / 2, w / 2


def product(*grids: tuple[np.ndarray, np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The product of one-dimensional grids: coordinates (each flat) and weights."""
    points = np.meshgrid(*(g[0] for g in grids), indexing="ij")
    weights = np.meshgrid(*(g[1] for g in grids), indexing="ij")
    return [p.ravel() for p in points], np.prod([w.ravel() for w in weights], axis=0)


# --- linear-Gaussian model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearGaussian:
    r"""``z ~ N(0, I)``, ``x | z ~ N(W z + b, s2 I)``, and a guide ``q(z|x) = N(A (x - b) + shift, L Lᵀ)``."""

    W: np.ndarray
    b: np.ndarray
    s2: float
    x: np.ndarray

    @classmethod
    def random(cls, seed: int = 0, data_dim: int = 4, latent_dim: int = 2, batch: int = 5) -> LinearGaussian:
        rng = np.random.default_rng(seed)
        draw = rng.normal
        return cls(draw(size=(data_dim, latent_dim)), draw(size=data_dim), 0.5, 1.5 * draw(size=(batch, data_dim)))

    @property
    def log_evidence(self) -> np.ndarray:
        covariance = self.W @ self.W.T + self.s2 * np.eye(len(self.b))
        return np.atleast_1d(multivariate_normal(self.b, covariance).logpdf(self.x))

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Gain A and covariance S: the posterior is ``N(A (x - b), S)``. From the joint covariance's Schur complement."""
        joint = self.W @ self.W.T + self.s2 * np.eye(len(self.b))
        gain = self.W.T @ np.linalg.inv(joint)
        return gain, np.eye(self.W.shape[1]) - gain @ self.W

    def kl_to_posterior(self, shift: np.ndarray, tril: np.ndarray) -> float:
        """KL(N(m + shift, L Lᵀ) || N(m, S)), the same for every datum."""
        _, S = self.posterior()
        Q, P = tril @ tril.T, np.linalg.inv(S)
        return float(0.5 * (np.trace(P @ Q) + shift @ P @ shift - len(shift) - np.linalg.slogdet(P @ Q)[1]))

    def kl_to_prior(self, shift: np.ndarray, tril: np.ndarray) -> np.ndarray:
        """KL(N(A (x - b) + shift, L Lᵀ) || N(0, I)) per datum."""
        mean = (self.x - self.b) @ self.posterior()[0].T + shift
        Q = tril @ tril.T
        return 0.5 * (np.trace(Q) + (mean**2).sum(axis=-1) - len(shift) - np.linalg.slogdet(Q)[1])

    def program(self, engine: str, shift: Any = 0.0, tril: np.ndarray | None = None) -> tuple[Callable, Callable, dict]:
        """Model, guide and initial parameters. The guide is the exact posterior unless told otherwise."""
        lib = library(engine)
        A, S = self.posterior()
        L = np.linalg.cholesky(S) if tril is None else tril
        start = {"W": self.W, "A": A, "shift": np.zeros(len(S)) + shift, "L": L}
        init = {n: lib.array(v) for n, v in start.items()}
        b, latent_dim = lib.array(self.b), len(S)

        def model(x: Any) -> None:
            W = lib.param("W", init["W"])
            with lib.plate("data", len(x), dim=-1):
                z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(latent_dim)), 1.0).to_event(1))
                lib.sample("x", lib.dist.Normal(z @ W.T + b, self.s2**0.5).to_event(1), obs=x)

        def guide(x: Any) -> None:
            gain, shift, tril = (lib.param(n, init[n]) for n in ("A", "shift", "L"))
            with lib.plate("data", len(x), dim=-1):
                lib.sample("z", lib.dist.MultivariateNormal((x - b) @ gain.T + shift, scale_tril=tril))

        return model, guide, init


# --- programs ---------------------------------------------------------------------------------------------------


def shared_latent(engine: str) -> tuple[Callable, Callable]:
    """Model and guide of a latent that all data share: ``mu ~ N(0, 1)``, ``x_n ~ N(mu, 1)``."""
    lib = library(engine)

    def model(x: Any) -> None:
        mu = lib.sample("mu", lib.dist.Normal(lib.array(0.0), 1.0))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", lib.dist.Normal(mu, 1.0), obs=x)

    def guide(x: Any) -> None:
        lib.sample("mu", lib.dist.Normal(lib.param("m", lib.array(0.0)), 1.0))

    return model, guide


def wrapped(engine: str, model: Callable, guide: Callable) -> Any:
    """A program without parameters, as one of either engine that is trained."""
    if engine == "numpyro":
        from elbozoo.inference.numpyro_engine import Program

        return Program(model, guide).with_params({})
    from elbozoo.inference.pyro_engine import Program

    return Program(model, guide)


@cache
def library(engine: str) -> SimpleNamespace:
    """The primitives that both libraries have under the same names."""
    if engine == "numpyro":
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        from elbozoo.inference.numpyro_distributions import OneHotCategorical

        return SimpleNamespace(
            engine=engine, sample=numpyro.sample, param=numpyro.param, plate=numpyro.plate, dist=dist, xp=jnp,
            array=jnp.asarray, stack=lambda xs: jnp.stack(xs, axis=-1), one_hot=OneHotCategorical,
        )  # fmt: skip
    import pyro
    import pyro.distributions as dist
    import torch

    return SimpleNamespace(
        engine=engine, sample=pyro.sample, param=pyro.param, plate=pyro.plate, dist=dist, xp=torch,
        array=torch.as_tensor, stack=lambda xs: torch.stack(xs, dim=-1), one_hot=dist.OneHotCategorical,
    )  # fmt: skip


def compiled(fn: Callable) -> Callable:
    """``jax.jit`` for what runs once: compiled, but not optimised, in half the time."""
    import jax

    return jax.jit(
        fn, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    )


@dataclass(frozen=True)
class Toy:
    """A program of scalar parameters with its exact expectations.

    Names that begin with ``q`` are the guide's. ``program(lib, p, x)`` returns model and guide, whose parameters ``p(name)`` have one
    entry a datum; ``nodes(p, q, num)`` are the quadrature nodes when values are drawn with the guide's parameters in ``p`` and
    ``log q`` is evaluated with those in ``q``.
    """

    name: str
    params: Params
    x: float
    program: Callable
    nodes: Callable[[Params, Params, int], Nodes]

    @property
    def guide_names(self) -> list[str]:
        return [n for n in self.params if n.startswith("q")]

    @property
    def model_names(self) -> list[str]:
        return [n for n in self.params if not n.startswith("q")]

    def gradient(
        self, bound: Callable, num_particles: int, num_nodes: int, names: Sequence[str], beta: float = 1.0
    ) -> dict[str, float]:
        """The exact gradient of ``E[F(l_1 … l_K)]``."""
        return differentiate(
            lambda p: expected(bound, self.nodes(p, p, num_nodes), num_particles, beta), self.params, names
        )

    def stl_gradient(self, bound: Callable, num_particles: int, num_nodes: int) -> dict[str, float]:
        """What sticking the landing estimates: the derivative with the guide's parameters inside ``log q`` held."""
        held = self.params
        return differentiate(
            lambda p: expected(bound, self.nodes(p, held, num_nodes), num_particles), self.params, self.guide_names
        )


def own_numbers(
    objective: Any, x: Any, sites: Callable[[], Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the objective's estimator trains and remembers, as if it had taken some steps: no baseline is zero.

    Args:
        sites: makes what is known of the guide's sites, where an estimator asks.
    """
    gradient = getattr(objective, "objective", objective).gradient
    if not gradient.keeps_numbers:
        return {}, {}
    trained, memory = gradient.initial(x, sites())
    rng = np.random.default_rng(0)
    return {n: v + 0.3 * rng.normal(size=v.shape) for n, v in trained.items()}, {
        "mean": np.array(-0.9),
        "share": np.array(0.7),
    } if memory else {}


def estimates(
    engine: str, toy: Toy, objectives: Sequence[Any], draws: int, seed: int = 0
) -> list[dict[str, tuple[float, float]]]:
    """Mean and standard error of every objective's gradient over ``draws`` independent draws, by parameter; the same draws for all.

    Every datum has its own copy of the parameters and the same ``x``, so one backward pass gives ``draws`` independent gradients.
    """
    lib = library(engine)
    init = {n: lib.array(np.full(draws, v)) for n, v in toy.params.items()}
    x = lib.array(np.full(draws, toy.x))
    model, guide = toy.program(lib, lambda n: lib.param(n, init[n]), draws)
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss, Program

        def sites() -> Any:
            return Program(model, guide).with_params(init).outline((x,)).sites

        def moments(params: Any, key: Any) -> Any:
            out = []
            for objective in objectives:
                trained, memory = jax.tree.map(lib.array, own_numbers(objective, x, sites))
                own = {"elbozoo_estimator": trained, "elbozoo_memory": memory}
                grads = jax.grad(lambda p, o=objective, own=own: Loss(o).loss(key, p | own, model, guide, x))(params)
                out.append({n: (-g.mean(), g.std() / draws**0.5) for n, g in grads.items()})
            return out

        return jax.tree.map(float, compiled(moments)(init, jax.random.key(seed)))

    import pyro

    from elbozoo.inference.pyro_engine import Loss, particles

    def known() -> Any:
        return particles(*toy.program(lib, init.__getitem__, draws), (x,)).sites

    out = []
    for objective in objectives:
        own = own_numbers(objective, x, known)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        loss = Loss(objective, max_plate_nesting=1)
        loss.own._start, loss.own.memory = own, {n: lib.array(v) for n, v in own[1].items()}
        loss.loss_and_grads(*toy.program(lib, lambda n: lib.param(n, init[n].clone()), draws), x)
        grads = {n: pyro.param(n).unconstrained().grad for n in toy.params}
        out.append({n: (-float(g.mean()), float(g.std()) / draws**0.5) for n, g in grads.items() if g is not None})
    return out


# tanh keeps every integrand far from a polynomial; the parameters keep every component of a gradient away from zero.


def _one_site() -> Toy:
    p0 = {"m": 0.0, "t": -0.1, "w": 0.5, "b": -0.1, "s": -0.3, "qa": 1.1, "qc": -1.3}

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        xp, normal = lib.xp, lib.dist.Normal

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z = lib.sample("z", normal(p("m"), xp.exp(p("t"))))
                lib.sample("x", normal(xp.tanh(p("w") * z) + p("b") * z, xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", normal(p("qa"), xp.exp(p("qc"))))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        e, weight = gauss_hermite(num)
        z = p["qa"] + np.exp(p["qc"]) * e
        log_q = normal(z, q["qa"], np.exp(q["qc"]))
        log_p = normal(z, p["m"], np.exp(p["t"]))
        return Nodes(weight, normal(0.9, np.tanh(p["w"] * z) + p["b"] * z, np.exp(p["s"])), log_q - log_p)

    return Toy("one site", p0, 0.9, program, nodes)


def _two_sites(bottom_up: bool) -> Toy:
    """``q(z1) q(z2|z1)`` with both parameters of z2 depending on z1; the model draws z1 first, or z2 first (``bottom_up``)."""
    if bottom_up:
        p0 = {"m": 0.6, "u": 0.7, "t": 0.1, "w": 0.4, "b": 0.4, "s": -0.3}
        p0 |= {"qa1": 0.8, "qc1": -0.7, "qa2": 0.9, "qd": 0.9, "qc2": -1.2, "qg": 0.25}
    else:
        p0 = {"m": -0.1, "u": 1.0, "t": -0.5, "w": 1.2, "b": 1.2, "s": -0.1}
        p0 |= {"qa1": 0.6, "qc1": -0.7, "qa2": 0.6, "qd": 0.6, "qc2": -0.8, "qg": 0.25}

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        xp, normal = lib.xp, lib.dist.Normal

        def model(x: Any) -> None:
            first, second = ("z2", "z1") if bottom_up else ("z1", "z2")
            with lib.plate("data", size, dim=-1):
                z = {first: lib.sample(first, normal(p("m"), 1.0))}
                z[second] = lib.sample(second, normal(p("u") * z[first], xp.exp(p("t"))))
                lib.sample("x", normal(p("w") * z["z2"] + p("b") * xp.tanh(z["z1"]), xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z1 = lib.sample("z1", normal(p("qa1"), xp.exp(p("qc1"))))
                lib.sample("z2", normal(p("qa2") + p("qd") * xp.tanh(z1), xp.exp(p("qc2") + p("qg") * z1)))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        (e1, e2), weight = product(gauss_hermite(num), gauss_hermite(num))
        z1 = p["qa1"] + np.exp(p["qc1"]) * e1
        z2 = p["qa2"] + p["qd"] * np.tanh(z1) + np.exp(p["qc2"] + p["qg"] * z1) * e2
        log_q = normal(z1, q["qa1"], np.exp(q["qc1"]))
        log_q = log_q + normal(z2, q["qa2"] + q["qd"] * np.tanh(z1), np.exp(q["qc2"] + q["qg"] * z1))
        a, b = (z2, z1) if bottom_up else (z1, z2)
        log_p = normal(a, p["m"], 1.0) + normal(b, p["u"] * a, np.exp(p["t"]))
        return Nodes(weight, normal(1.2, p["w"] * z2 + p["b"] * np.tanh(z1), np.exp(p["s"])), log_q - log_p)

    return Toy("bottom-up" if bottom_up else "top-down", p0, 1.2, program, nodes)


def _ladder() -> Toy:
    """Three layers, and a guide that merges the model's own conditionals with evidence: ``u3``, ``t`` and ``u2`` are in both."""
    p0 = {"m": 0.2, "u3": 0.9, "t": -0.3, "u2": 1.1, "w": 0.9, "b": 0.5, "s": -0.2}
    p0 |= {"qa3": 0.5, "qc3": -0.8, "qa2": 0.9, "qc2": -0.6, "qa1": 0.7, "qc1": -0.8}

    def merged(lib: Any, m: Any, log_s: Any, mu: Any, log_sigma: Any) -> tuple[Any, Any]:
        a, b = lib.exp(-2.0 * log_s), lib.exp(-2.0 * log_sigma)
        return (a * m + b * mu) / (a + b), (a + b) ** -0.5

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        xp, normal = lib.xp, lib.dist.Normal

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z3 = lib.sample("z3", normal(p("m"), 1.0))
                z2 = lib.sample("z2", normal(p("u3") * z3, xp.exp(p("t"))))
                z1 = lib.sample("z1", normal(p("u2") * xp.tanh(z2), 1.0))
                lib.sample("x", normal(p("w") * z1 + p("b") * xp.tanh(z1), xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z3 = lib.sample("z3", normal(p("qa3"), xp.exp(p("qc3"))))
                z2 = lib.sample("z2", normal(*merged(xp, p("qa2"), p("qc2"), p("u3") * z3, p("t"))))
                lib.sample("z1", normal(*merged(xp, p("qa1"), p("qc1"), p("u2") * xp.tanh(z2), 0.0 * p("t"))))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        (e3, e2, e1), weight = product(*[gauss_hermite(num)] * 3)
        z3 = p["qa3"] + np.exp(p["qc3"]) * e3
        loc, scale = merged(np, p["qa2"], p["qc2"], p["u3"] * z3, p["t"])
        z2 = loc + scale * e2
        loc, scale = merged(np, p["qa1"], p["qc1"], p["u2"] * np.tanh(z2), 0.0)
        z1 = loc + scale * e1
        log_q = normal(z3, q["qa3"], np.exp(q["qc3"]))
        log_q = log_q + normal(z2, *merged(np, q["qa2"], q["qc2"], q["u3"] * z3, q["t"]))
        log_q = log_q + normal(z1, *merged(np, q["qa1"], q["qc1"], q["u2"] * np.tanh(z2), 0.0))
        log_p = (
            normal(z3, p["m"], 1.0) + normal(z2, p["u3"] * z3, np.exp(p["t"])) + normal(z1, p["u2"] * np.tanh(z2), 1.0)
        )
        return Nodes(weight, normal(3.0, p["w"] * z1 + p["b"] * np.tanh(z1), np.exp(p["s"])), log_q - log_p)

    return Toy("ladder", p0, 3.0, program, nodes)


def _discrete(one_hot: bool) -> Toy:
    """One Categorical site of three classes, a number or a one-hot vector."""
    p0 = {"m0": 1.1, "m1": -0.9, "w0": -0.7, "w1": 0.2, "w2": 1.9, "s": -0.2, "q0": -0.2, "q1": 1.0}

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        def logits(a: Any, b: Any) -> Any:
            return lib.stack([a, b, 0.0 * a])

        family = lib.one_hot if one_hot else lib.dist.Categorical

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                d = lib.sample("d", family(logits=logits(p("m0"), p("m1"))))
                states = [d[..., i] if one_hot else d == i for i in range(3)]
                mean = p("w0") * states[0] + p("w1") * states[1] + p("w2") * states[2]
                lib.sample("x", lib.dist.Normal(mean, lib.xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("d", family(logits=logits(p("q0"), p("q1"))))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        def log_probs(a: float, b: float) -> np.ndarray:
            return np.array([a, b, 0.0]) - np.log(np.exp(a) + np.exp(b) + 1.0)

        log_q = log_probs(p["q0"], p["q1"])
        means = np.array([p["w0"], p["w1"], p["w2"]])
        return Nodes(np.exp(log_q), normal(0.8, means, np.exp(p["s"])), log_q - log_probs(p["m0"], p["m1"]))

    return Toy("one hot" if one_hot else "discrete", p0, 0.8, program, nodes)


def _binary_layers() -> Toy:
    """Two Bernoulli sites: the model draws ``b2`` and then ``b1``, the guide climbs, as in a sigmoid belief net."""
    p0 = {"m": 0.4, "u0": -0.6, "u1": 1.3, "w0": -0.8, "w1": 1.5, "w2": 0.6, "s": -0.1}
    p0 |= {"qa": 0.5, "qb": -0.7, "qc": 1.6}

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        bernoulli = lib.dist.Bernoulli

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                b2 = lib.sample("b2", bernoulli(logits=p("m")))
                b1 = lib.sample("b1", bernoulli(logits=p("u0") + p("u1") * b2))
                mean = p("w0") + p("w1") * b1 + p("w2") * b1 * b2
                lib.sample("x", lib.dist.Normal(mean, lib.xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                b1 = lib.sample("b1", bernoulli(logits=p("qa")))
                lib.sample("b2", bernoulli(logits=p("qb") + p("qc") * b1))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        (b1, b2), _ = product((np.array([0.0, 1.0]), np.ones(2)), (np.array([0.0, 1.0]), np.ones(2)))
        log_q = bernoulli(b1, q["qa"]) + bernoulli(b2, q["qb"] + q["qc"] * b1)
        log_p = bernoulli(b2, p["m"]) + bernoulli(b1, p["u0"] + p["u1"] * b2)
        weight = np.exp(bernoulli(b1, p["qa"]) + bernoulli(b2, p["qb"] + p["qc"] * b1))
        log_lik = normal(1.0, p["w0"] + p["w1"] * b1 + p["w2"] * b1 * b2, np.exp(p["s"]))
        return Nodes(weight, log_lik, log_q - log_p)

    return Toy("binary layers", p0, 1.0, program, nodes)


def _mixed(discrete_first: bool) -> Toy:
    """A Bernoulli d and a Gaussian z in the guide: ``q(d) q(z|d)``, or ``q(z) q(d|z)`` whose score has a path through z."""
    if discrete_first:
        p0 = {"m": -0.9, "u": 0.6, "w": 1.1, "b": 0.7, "s": -0.2, "qd": 1.1, "qa": 0.9, "qv": 1.4, "qc": -1.1}
    else:
        p0 = {"m": 0.3, "u": 0.2, "w": 1.5, "b": -0.5, "s": -0.3, "qd": 0.2, "qa": 1.0, "qv": 1.2, "qc": -0.8}

    def program(lib: Any, p: Callable, size: int) -> tuple[Callable, Callable]:
        xp, normal, bernoulli = lib.xp, lib.dist.Normal, lib.dist.Bernoulli

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                if discrete_first:
                    d = lib.sample("d", bernoulli(logits=p("m")))
                    z = lib.sample("z", normal(p("u") * d, 1.0))
                else:
                    z = lib.sample("z", normal(p("m"), 1.0))
                    d = lib.sample("d", bernoulli(logits=p("u") * z))
                lib.sample("x", normal(p("w") * xp.tanh(z) + p("b") * d, xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                if discrete_first:
                    d = lib.sample("d", bernoulli(logits=p("qd")))
                    lib.sample("z", normal(p("qa") + p("qv") * d, xp.exp(p("qc"))))
                else:
                    z = lib.sample("z", normal(p("qa"), xp.exp(p("qc"))))
                    lib.sample("d", bernoulli(logits=p("qd") + p("qv") * z))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        (d, e), weight = product((np.array([0.0, 1.0]), np.ones(2)), gauss_hermite(num))
        z = p["qa"] + (p["qv"] * d if discrete_first else 0.0) + np.exp(p["qc"]) * e
        log_qd = bernoulli(d, p["qd"] if discrete_first else p["qd"] + p["qv"] * z)
        log_q = log_qd - 0.5 * e**2 - p["qc"] - 0.5 * np.log(2 * np.pi)
        if discrete_first:
            log_p = bernoulli(d, p["m"]) + normal(z, p["u"] * d, 1.0)
        else:
            log_p = normal(z, p["m"], 1.0) + bernoulli(d, p["u"] * z)
        log_lik = normal(1.1, p["w"] * np.tanh(z) + p["b"] * d, np.exp(p["s"]))
        return Nodes(weight * np.exp(log_qd), log_lik, log_q - log_p)

    return Toy("discrete, then continuous" if discrete_first else "continuous, then discrete", p0, 1.1, program, nodes)


ONE_SITE, TOP_DOWN, BOTTOM_UP = _one_site(), _two_sites(bottom_up=False), _two_sites(bottom_up=True)
LADDER, BINARY_LAYERS = _ladder(), _binary_layers()
DISCRETE, ONE_HOT = _discrete(one_hot=False), _discrete(one_hot=True)
DISCRETE_FIRST, CONTINUOUS_FIRST = _mixed(discrete_first=True), _mixed(discrete_first=False)
