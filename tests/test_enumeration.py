"""Sites that the model sums out: against the libraries' own TraceEnum_ELBO, and against sums and quadrature in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
from covering import covering
from oracles import Nodes, Params, Toy, bernoulli, normal

from elbozoo.inference.discrete import REBAR
from elbozoo.inference.errors import Refused
from elbozoo.inference.gradients import DReG
from elbozoo.inference.objectives import ELBO, IWAE

DATA = np.array([0.0, 1.0, 10.0, 11.0, 12.0])


def mixture(lib: Any, subsample: int | None = None, scale: float = 1.0) -> tuple[Any, Any]:
    """The Gaussian mixture of both libraries' tutorials on enumeration, with a guide of point masses."""
    start = {"weights": np.array([0.4, 0.6]), "scale": np.array(1.3), "locs": np.array([2.0, 9.0])}
    enumerated = {"infer": {"enumerate": "parallel"}}

    def latents(draw: Any) -> Any:
        weights, scale = draw("weights"), draw("scale")
        with lib.plate("components", 2, dim=-1):
            return weights, scale, draw("locs")

    def model(data: Any) -> None:
        priors = {
            "weights": lib.dist.Dirichlet(lib.array(0.5 * np.ones(2))),
            "scale": lib.dist.LogNormal(lib.array(0.0), 2.0),
            "locs": lib.dist.Normal(lib.array(0.0), 10.0),
        }
        weights, spread, locs = latents(lambda n: lib.sample(n, priors[n]))
        with handlers(lib).scale(scale=scale), lib.plate("data", len(data), dim=-1):
            component = lib.sample("component", lib.dist.Categorical(weights), **enumerated)
            lib.sample("x", lib.dist.Normal(locs[component], spread), obs=data)

    def guide(data: Any) -> None:
        latents(
            lambda n: lib.sample(
                n, lib.dist.Delta(lib.param(f"at_{n}", lib.array(start[n])), event_dim=int(n == "weights"))
            )
        )

    return model, guide


def handlers(lib: Any) -> Any:
    if lib.engine == "numpyro":
        from numpyro import handlers
    else:
        from pyro import poutine as handlers
    return handlers


def by_library(engine: str, model: Any, guide: Any) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradient by parameter, the library's own and ours."""
    x = oracles.library(engine).array(DATA)
    if engine == "numpyro":
        import jax
        import numpyro

        pytest.importorskip("funsor", reason="NumPyro's enumeration needs it")
        from numpyro.infer import TraceEnum_ELBO

        from elbozoo.inference.numpyro_engine import Loss

        with numpyro.handlers.seed(rng_seed=0):
            sites = numpyro.handlers.trace(guide).get_trace(x)
        params = {n: s["value"] for n, s in sites.items() if s["type"] == "param"}
        found = []
        for loss in (TraceEnum_ELBO(max_plate_nesting=1), Loss(ELBO())):
            value, gradient = jax.value_and_grad(lambda p, loss=loss: loss.loss(jax.random.key(0), p, model, guide, x))(
                params
            )
            found.append((float(value), {n: np.asarray(g) for n, g in gradient.items()}))
        return found
    import pyro
    from pyro.infer import TraceEnum_ELBO

    from elbozoo.inference.pyro_engine import Loss

    found = []
    for loss in (TraceEnum_ELBO(max_plate_nesting=1), Loss(ELBO())):
        pyro.clear_param_store()
        value = loss.loss_and_grads(model, guide, x)
        store = pyro.get_param_store()
        found.append((float(value), {n: store[n].unconstrained().grad.numpy() for n in store}))
    return found


@covering("scale", (1.0, 0.25), numpyro=(1,))
@pytest.mark.filterwarnings("ignore:.*lies outside")
def test_agrees_with_the_librarys_own_on_its_mixture(engine: str, scale: float) -> None:
    (theirs, their_gradient), (ours, our_gradient) = by_library(engine, *mixture(oracles.library(engine), scale=scale))
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert set(our_gradient) == {"at_weights", "at_scale", "at_locs"}
    for name, gradient in their_gradient.items():
        np.testing.assert_allclose(our_gradient[name], gradient, rtol=1e-9)
    from scipy import stats

    likelihood = stats.norm.pdf(DATA[:, None], [2.0, 9.0], 1.3) @ [0.4, 0.6]
    prior = stats.dirichlet([0.5, 0.5]).logpdf([0.4, 0.6]) + stats.lognorm(2.0).logpdf(1.3)
    prior += stats.norm(0, 10).logpdf([2.0, 9.0]).sum()
    assert -ours == pytest.approx(prior + scale * np.log(likelihood).sum(), rel=1e-10)


def _summed_out() -> Toy:
    """``d`` and ``e`` are the model's alone; the guide draws ``z``, which depends on ``d`` in the model."""
    p0 = {"m": 0.4, "n": -0.3, "w": 1.4, "u": -0.9, "s": -0.2, "qa": 0.6, "qc": -0.4}

    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        marked = {"infer": {"enumerate": "parallel"}}

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                d = lib.sample("d", lib.dist.Bernoulli(logits=p("m")), **marked)
                z = lib.sample("z", lib.dist.Normal(p("w") * d, 1.0))
                e = lib.sample("e", lib.dist.Bernoulli(logits=p("n") + z), **marked)
                lib.sample("x", lib.dist.Normal(z + p("u") * d * e, lib.xp.exp(p("s"))), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", lib.dist.Normal(p("qa"), lib.xp.exp(p("qc"))))

        return model, guide

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        e0, weight = oracles.gauss_hermite(num)
        z = p["qa"] + np.exp(p["qc"]) * e0
        joint = [
            bernoulli(d, p["m"])
            + normal(z, p["w"] * d, 1.0)
            + bernoulli(e, p["n"] + z)
            + normal(1.1, z + p["u"] * d * e, np.exp(p["s"]))
            for d in (0.0, 1.0)
            for e in (0.0, 1.0)
        ]
        return Nodes(weight, np.logaddexp.reduce(joint), normal(z, q["qa"], np.exp(q["qc"])))

    return Toy("summed out", p0, 1.1, program, nodes)


def test_gradients_of_bounds_with_a_site_summed_out(engine: str) -> None:
    """Inside the log weight, so that a multi-sample bound stays one; the guide's site before it is no matter."""
    toy = _summed_out()
    objectives = [ELBO(), IWAE(2), IWAE(2, DReG())]
    bounds = [(oracles.elbo, 1), (oracles.iwae, 2), (oracles.iwae, 2)]
    found = oracles.estimates(engine, toy, objectives, 100_000, seed=11)
    for estimate, (bound, num_particles) in zip(found, bounds, strict=True):
        truth = toy.gradient(bound, num_particles, 40, list(toy.params))
        norm = np.linalg.norm(list(truth.values()))
        for name, (mean, error) in estimate.items():
            assert abs(mean - truth[name]) < 4.5 * error + 1e-7, name
            assert 4.5 * error < 0.04 * norm


def test_measurements_in_a_plate_of_their_own_are_one_factor(engine: str) -> None:
    """Three measurements of each datum, in a plate to the left: multiplied before the sum over the datum's class."""
    lib = oracles.library(engine)
    x = np.array([[0.2, 1.9, -0.4, 2.2], [0.6, 2.4, 0.1, 1.7], [-0.3, 1.6, 0.5, 2.0]])

    def model(x: Any) -> None:
        with lib.plate("data", 4, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            d = lib.sample("d", lib.dist.Bernoulli(logits=lib.array(0.3)), infer={"enumerate": "parallel"})
            with lib.plate("measurements", 3, dim=-2):
                lib.sample("x", lib.dist.Normal(2.0 * d, 0.7), obs=x)

    def guide(x: Any) -> None:  # of a latent that nothing depends on
        with lib.plate("data", 4, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        found = float(Loss(ELBO()).loss(jax.random.key(0), {}, model, guide, lib.array(x)))
    else:
        from elbozoo.inference.pyro_engine import Loss

        found = float(Loss(ELBO()).loss(model, guide, lib.array(x)))
    joint = [bernoulli(d, 0.3) + normal(x, 2.0 * d, 0.7).sum(axis=0) for d in (0.0, 1.0)]
    assert -found == pytest.approx(np.logaddexp.reduce(joint).sum(), rel=1e-10)


def _bad(lib: Any, what: str) -> tuple[Any, Any]:
    marked = {"infer": {"enumerate": "parallel"}}

    def model(x: Any) -> None:
        if what == "continuous":
            z = lib.sample("d", lib.dist.Normal(lib.array(0.0), 1.0), **marked)
        elif what == "states":
            z = lib.sample("d", lib.dist.Bernoulli(logits=lib.array(np.zeros(13))).to_event(1), **marked).sum()
        elif what == "batch":
            z = lib.sample("d", lib.dist.Bernoulli(logits=lib.array(0.3 * np.ones(3))), **marked).sum()
        else:
            with lib.plate("data", 5, dim=-1):
                z = lib.sample("d", lib.dist.Bernoulli(logits=lib.array(np.zeros(5))), **marked).sum()
        lib.sample("x", lib.dist.Normal(1.0 * z, 1.0), obs=x)

    return model, lambda x: None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("continuous", r"site 'd', marked to be enumerated, must be Bernoulli or categorical; got Normal"),
        ("states", r"the sites that the model sums out must have at most 4096 joint states; got 8192"),
        ("batch", r"site 'd' must have no batch entries outside of plates.*to_event"),
        ("plates", r"site 'x' must lie in the plates of 'd', which is summed out before it"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lies outside")
def test_what_cannot_be_summed_out_is_refused(engine: str, what: str, message: str) -> None:
    model, guide = _bad(oracles.library(engine), what)
    x = oracles.library(engine).array(np.array(0.7))
    with pytest.raises(Refused, match=message):
        if engine == "numpyro":
            import jax

            from elbozoo.inference.numpyro_engine import Loss

            Loss(ELBO()).loss(jax.random.key(0), {}, model, guide, x)
        else:
            from elbozoo.inference.pyro_engine import Loss

            Loss(ELBO()).loss(model, guide, x)


def test_latents_that_are_summed_out_are_not_made_up(engine: str) -> None:
    """Nothing is predicted, or scored, from a class that was drawn from the prior beside the guide's latents."""
    lib, toy = oracles.library(engine), _summed_out()
    model, guide = toy.program(lib, lambda n: lib.array(np.full(4, toy.params[n])), 4)
    program, x = oracles.wrapped(engine, model, guide), np.full(4, toy.x)
    for call in (
        lambda: program.predict((x,)),
        lambda: program.predict((x,), values={"z": np.zeros((1, 4))}),
        lambda: program.log_density({"z": np.zeros((1, 4))}, (x,)),
    ):
        with pytest.raises(Refused, match=r"the guide must draw every latent site of the model for this; got 'd'"):
            call()
    assert set(program.predict((x,), prior=True)["latent"]) == {"d", "e", "z"}


@pytest.mark.pyro
def test_a_relaxed_state_before_a_site_that_is_summed_out() -> None:
    """A one-hot site's density is continued linearly there too: REBAR stays unbiased. Also of a masked prior."""
    import pyro.distributions as dist
    import torch

    at = {"m": 0.4, "w": 1.3, "u": -0.9, "qa": 0.6, "qb": -0.8}

    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        def logits(a: Any, b: Any) -> Any:
            return lib.stack([a, b, 0.0 * a])

        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                e = lib.sample("e", lib.dist.Bernoulli(logits=p("m")), infer={"enumerate": "parallel"})
                prior = dist.OneHotCategorical(logits=logits(p("u") * e, p("w") * (1 - e)))
                d = lib.sample("d", prior.mask(torch.ones(size, dtype=torch.bool)))
                lib.sample("x", lib.dist.Normal(p("w") * d[..., 0] - d[..., 1] + e, 1.0), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("d", dist.OneHotCategorical(logits=logits(p("qa"), p("qb"))))

        return model, guide

    def log_softmax(a: float, b: float) -> np.ndarray:
        return np.array([a, b, 0.0]) - np.logaddexp.reduce([a, b, 0.0])

    def nodes(p: Params, q: Params, num: int) -> Nodes:
        joint = [
            bernoulli(e, p["m"])
            + log_softmax(p["u"] * e, p["w"] * (1 - e))
            + normal(1.1, p["w"] * np.array([1.0, 0.0, 0.0]) - np.array([0.0, 1.0, 0.0]) + e, 1.0)
            for e in (0.0, 1.0)
        ]
        log_q = log_softmax(q["qa"], q["qb"])
        return Nodes(np.exp(log_softmax(p["qa"], p["qb"])), np.logaddexp.reduce(joint), log_q)

    toy = Toy("one-hot and summed out", at, 1.1, program, nodes)
    (found,) = oracles.estimates("pyro", toy, [IWAE(2, REBAR(0.5))], 100_000, seed=12)
    truth = toy.gradient(oracles.iwae, 2, 1, list(at))
    for name, (mean, error) in found.items():
        assert abs(mean - truth[name]) < 4.5 * error + 1e-7, name
        assert 4.5 * error < 0.05 * np.linalg.norm(list(truth.values()))
