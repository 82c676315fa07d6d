"""Model and guide pairs as the Pyro and NumPyro documentation writes them, under the library's own SVI with our losses.

None of these programs knows of elbozoo. Each must train; where the best answer is known in closed form it must land there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import special, stats

from elbozoo.inference.gradients import STL, VIMCO, DReG, ScoreFunction
from elbozoo.inference.objectives import ELBO, IWAE, Objective, Renyi
from elbozoo.inference.shapes import AnnealedKL, FreeBits

RNG = np.random.default_rng(0)
COINS = np.array(
    [1.0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
)  # six heads of ten; prior Beta(10, 10), so the posterior is Beta(16, 14)
COIN_EVIDENCE = special.betaln(16, 14) - special.betaln(10, 10)
PIXELS = (RNG.random((24, 6)) < np.where(RNG.random((24, 1)) < 0.5, 0.9, 0.1)).astype(float)  # two clusters
POINTS = RNG.normal(size=60) * 1.4
JOINT_WEIGHT = pytest.mark.filterwarnings("ignore:[A-Za-z]+. a sample site lies outside:UserWarning")


# ==== Pyro ======================================================================================================


def pyro_svi(model: Callable, guide: Callable, objective: Objective, lr: float = 0.02, **options: Any) -> Any:
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss=Loss(objective, **options))


def pyro_vae() -> Any:
    """https://pyro.ai/examples/vae.html, smaller."""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn

    class Decoder(nn.Module):
        def __init__(self, z_dim: int, hidden_dim: int):
            super().__init__()
            self.fc1, self.fc21 = nn.Linear(z_dim, hidden_dim), nn.Linear(hidden_dim, 6)
            self.softplus, self.sigmoid = nn.Softplus(), nn.Sigmoid()

        def forward(self, z: Any) -> Any:
            return self.sigmoid(self.fc21(self.softplus(self.fc1(z))))

    class Encoder(nn.Module):
        def __init__(self, z_dim: int, hidden_dim: int):
            super().__init__()
            self.fc1 = nn.Linear(6, hidden_dim)
            self.fc21, self.fc22 = nn.Linear(hidden_dim, z_dim), nn.Linear(hidden_dim, z_dim)
            self.softplus = nn.Softplus()

        def forward(self, x: Any) -> Any:
            hidden = self.softplus(self.fc1(x.reshape(-1, 6)))
            return self.fc21(hidden), torch.exp(self.fc22(hidden))

    class VAE(nn.Module):
        def __init__(self, z_dim: int = 2, hidden_dim: int = 8):
            super().__init__()
            self.encoder, self.decoder, self.z_dim = Encoder(z_dim, hidden_dim), Decoder(z_dim, hidden_dim), z_dim

        def model(self, x: Any) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
                z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
                z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
                loc_img = self.decoder(z)
                pyro.sample("obs", dist.Bernoulli(loc_img).to_event(1), obs=x.reshape(-1, 6))

        def guide(self, x: Any) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                z_loc, z_scale = self.encoder(x)
                pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))

    torch.manual_seed(0)
    return VAE()


VAE_OBJECTIVES = [
    AnnealedKL(IWAE(5, DReG()), 50, unit="steps"), FreeBits(ELBO(), 0.05), IWAE(5), ELBO(2, ScoreFunction(False)),
]  # fmt: skip


@pytest.mark.pyro
@pytest.mark.parametrize("objective", VAE_OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{type(o.gradient).__name__}")
def test_pyro_vae(objective: Objective) -> None:
    import torch

    vae, x = pyro_vae(), torch.as_tensor(PIXELS)
    svi = pyro_svi(vae.model, vae.guide, objective)
    before = svi.evaluate_loss(x)
    losses = [svi.step(x) for _ in range(150)]
    independent = 24 * 6 * math.log(2)  # what fair coins would give; two clusters are worth much more
    assert before > 0.95 * independent
    assert np.mean(losses[-20:]) < 0.85 * before
    assert math.isfinite(svi.evaluate_loss(x))
    assert svi.loss.__self__.step == 150, "only training steps count"  # Pyro keeps the bound method


@pytest.mark.pyro
def test_pyro_trace_elbo_at_equal_seeds() -> None:
    """Trace_ELBO draws in the same order: the same loss, and the same gradients, to 1e-10."""
    import pyro
    import torch
    from pyro.infer import Trace_ELBO

    from elbozoo.inference.pyro_engine import Loss

    vae, x, seen = pyro_vae(), torch.as_tensor(PIXELS), []
    for loss in (Loss(ELBO(analytic_kl=False)), Trace_ELBO()):
        vae.zero_grad()
        pyro.set_rng_seed(3)
        value = loss.loss_and_grads(vae.model, vae.guide, x)
        seen.append([np.array(value), *(p.grad.numpy().copy() for p in vae.parameters())])
    assert len(seen[0]) == 1 + 10
    for ours, theirs in zip(*seen, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def pyro_coin() -> tuple[Callable, Callable]:
    """https://pyro.ai/examples/svi_part_i.html"""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch.distributions import constraints

    def model(data: Any) -> None:
        alpha0, beta0 = torch.tensor(10.0), torch.tensor(10.0)
        f = pyro.sample("latent_fairness", dist.Beta(alpha0, beta0))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data: Any) -> None:
        alpha_q = pyro.param("alpha_q", torch.tensor(15.0), constraint=constraints.positive)
        beta_q = pyro.param("beta_q", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("latent_fairness", dist.Beta(alpha_q, beta_q))

    return model, guide


@pytest.mark.pyro
@pytest.mark.parametrize("objective", [ELBO(gradient=STL()), IWAE(3, DReG())], ids=["STL", "DReG"])
def test_pyro_coin_lands_at_the_posterior(objective: Objective) -> None:
    """Also IWAE's guide: DReG has no noise at the exact posterior, where any K-sample bound is tight."""
    import pyro
    import torch

    model, guide = pyro_coin()
    data = torch.as_tensor(COINS)
    svi = pyro_svi(model, guide, objective, lr=0.003)
    for _ in range(200):
        svi.step(data)
    assert pyro.param("alpha_q").item() == pytest.approx(16, rel=0.01)
    assert pyro.param("beta_q").item() == pytest.approx(14, rel=0.01)
    assert svi.evaluate_loss(data) == pytest.approx(-COIN_EVIDENCE, abs=1e-3)


@pytest.mark.pyro
def test_pyro_renyi_at_equal_seeds() -> None:
    """Without plates there is one weight for all data, and Pyro's own RenyiELBO is the same number with the same gradients."""
    import pyro
    import torch
    from pyro.infer import RenyiELBO

    from elbozoo.inference.pyro_engine import Loss

    model, guide = pyro_coin()
    data = torch.as_tensor(COINS)
    for alpha, objective in ((0.0, IWAE(4)), (0.5, Renyi(0.5, 4))):
        seen = []
        for loss in (
            Loss(objective, vectorize_particles=False),
            RenyiELBO(alpha, num_particles=4, vectorize_particles=False),
            Loss(objective, max_plate_nesting=0),
            RenyiELBO(alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=0),
        ):
            pyro.clear_param_store()
            pyro.set_rng_seed(2)
            value = loss.loss_and_grads(model, guide, data)
            seen.append([value, *(pyro.param(n).unconstrained().grad.item() for n in ("alpha_q", "beta_q"))])
        np.testing.assert_allclose(seen[0], seen[1], rtol=1e-9)
        np.testing.assert_allclose(seen[2], seen[3], rtol=1e-9)


@pytest.mark.pyro
def test_pyro_belief_net_gets_vimco_per_datum() -> None:
    """Two layers of coins: Mnih & Rezende's estimator (arXiv 1602.06725, eqs. 6 to 9) written out at the same draws.

    With one baseline for the whole batch the expectation would be the same, and the gradient at given draws another.
    """
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn

    particles, x = 4, torch.as_tensor(PIXELS[:5])
    torch.manual_seed(3)
    layers = nn.ModuleDict(
        {"up1": nn.Linear(6, 3), "up2": nn.Linear(3, 2), "down2": nn.Linear(2, 3), "down1": nn.Linear(3, 6)}
    )
    drawn: list[dict[str, Any]] = []

    def model(x: Any) -> None:
        pyro.module("down2", layers["down2"])
        pyro.module("down1", layers["down1"])
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(0.5 * x.new_ones(2)).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=layers["down2"](h2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=layers["down1"](h1)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        pyro.module("up1", layers["up1"])
        pyro.module("up2", layers["up2"])
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=layers["up1"](x)).to_event(1))
            h2 = pyro.sample("h2", dist.Bernoulli(logits=layers["up2"](h1)).to_event(1))
        drawn.append({"h1": h1.detach(), "h2": h2.detach()})

    svi = pyro_svi(model, guide, IWAE(particles, VIMCO()))
    loss = svi.loss_and_grads(model, guide, x)
    ours = {n: p.grad.clone() for n, p in layers.named_parameters()}
    h1, h2 = (drawn[-1][n].expand(particles, 5, -1) for n in ("h1", "h2"))  # (K, B, units)

    def log_prob(logits: Any, value: Any) -> Any:
        return dist.Bernoulli(logits=logits).log_prob(value).sum(-1)

    log_q = log_prob(layers["up1"](x).expand(particles, 5, 3), h1) + log_prob(layers["up2"](h1), h2)
    log_p = log_prob(torch.zeros(particles, 5, 2), h2) + log_prob(layers["down2"](h2), h1)
    log_w = log_p + log_prob(layers["down1"](h1), x.expand(particles, 5, 6)) - log_q
    bound = torch.logsumexp(log_w, 0) - math.log(particles)
    without = []
    for k in range(particles):  # the k-th weight stands back for the geometric mean of the others, datum by datum
        others = log_w.detach().clone()
        others[k] = (others.sum(0) - others[k]) / (particles - 1)
        without.append(torch.logsumexp(others, 0) - math.log(particles))
    signal = bound.detach() - torch.stack(without)
    layers.zero_grad()
    (-(bound + (signal * log_q).sum(0)).sum()).backward()
    assert loss == pytest.approx(-bound.sum().item(), rel=1e-10)
    for name, parameter in layers.named_parameters():
        np.testing.assert_allclose(ours[name], parameter.grad, 1e-9, 1e-12, err_msg=name)


@pytest.mark.pyro
def test_pyro_subsampled_plate_lands_at_the_maximum_likelihood() -> None:
    """``z ~ N(0, 1)``, ``x ~ N(w z, 1/2)`` in minibatches: at the optimum ``w² + 1/4`` is the mean square of the data."""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch.distributions import constraints

    data = torch.as_tensor(POINTS)

    def model(data: Any) -> None:
        w = pyro.param("w", torch.tensor(0.6))
        with pyro.plate("data", len(data), subsample_size=12) as ind:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w * z, 0.5), obs=data[ind])

    def guide(data: Any) -> None:
        a = pyro.param("a", torch.tensor(0.1))
        s = pyro.param("s", torch.tensor(0.9), constraint=constraints.positive)
        with pyro.plate("data", len(data), subsample_size=12) as ind:
            pyro.sample("z", dist.Normal(a * data[ind], s))

    svi = pyro_svi(model, guide, ELBO(gradient=STL()), lr=0.05)
    tail = []
    for step in range(500):
        svi.step(data)
        if step >= 200:  # minibatch noise averages out
            tail.append([pyro.param(n).item() for n in "was"])
    w, a, scale = np.mean(tail, axis=0)
    square = float((POINTS**2).mean())
    assert w**2 + 0.25 == pytest.approx(square, rel=0.1)
    assert a == pytest.approx(w / (w**2 + 0.25), rel=0.03)
    assert scale == pytest.approx((0.25 / (w**2 + 0.25)) ** 0.5, rel=0.03)
    best = -stats.norm.logpdf(POINTS, 0, square**0.5).sum()
    assert np.mean([svi.evaluate_loss(data) for _ in range(150)]) == pytest.approx(best, rel=0.05)


@pytest.mark.pyro
def test_pyro_module_guide_with_constrained_parameters_and_dependent_latents() -> None:
    """z1 -> z2 -> x, all Gaussian, and a PyroModule guide q(z1) q(z2 | z1) that holds the posterior: STL lands on it."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.nn import PyroModule, PyroParam
    from torch.distributions import constraints

    def model() -> None:
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(0.8 * z1, 0.6))
        pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.7))

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.0))
            self.scale = PyroParam(torch.tensor(0.9), constraint=constraints.positive)
            self.head = PyroModule[torch.nn.Linear](1, 1)
            self.head_scale = PyroParam(torch.tensor(0.9), constraint=constraints.positive)

        def forward(self) -> None:
            z1 = pyro.sample("z1", dist.Normal(self.loc, self.scale))
            pyro.sample("z2", dist.Normal(self.head(z1[..., None])[..., 0], self.head_scale))

    guide = Guide()
    svi = pyro_svi(model, guide, ELBO(2, STL()), lr=0.03)
    for _ in range(500):
        svi.step()
    variance = 0.64 + 0.36 + 0.25  # of x
    precision = 1 / 0.36 + 1 / 0.25  # of z2 given z1 and x
    assert guide.loc.item() == pytest.approx(0.8 * 1.7 / variance, abs=0.02)
    assert guide.scale.item() == pytest.approx((1 - 0.64 / variance) ** 0.5, abs=0.02)
    assert guide.head.weight.item() == pytest.approx(0.8 / 0.36 / precision, abs=0.02)
    assert guide.head.bias.item() == pytest.approx(1.7 / 0.25 / precision, abs=0.02)
    assert guide.head_scale.item() == pytest.approx(precision**-0.5, abs=0.02)
    assert svi.evaluate_loss() == pytest.approx(-stats.norm.logpdf(1.7, 0, variance**0.5), abs=0.01)


@pytest.mark.pyro
@JOINT_WEIGHT
@pytest.mark.parametrize("objective", [ELBO(), IWAE(3, DReG())], ids=["analytic", "IWAE-DReG"])
def test_pyro_autonormal_on_a_constrained_latent(objective: Objective) -> None:
    """AutoNormal on a log-normal scale: against Pyro's own Trace_ELBO at the same guide."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    data = torch.as_tensor(POINTS)

    def model(data: Any) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(0.0, scale), obs=data)

    guide = AutoNormal(model)
    svi = pyro_svi(model, guide, objective)
    for _ in range(250):
        svi.step(data)
    ours = np.mean([svi.evaluate_loss(data) for _ in range(150)])
    theirs = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, data)
    assert guide.median()["scale"].item() == pytest.approx(np.sqrt((POINTS**2).mean()), rel=0.1)
    assert ours == pytest.approx(theirs, abs=0.15) or isinstance(objective, IWAE)  # which is tighter
    assert ours == pytest.approx(-_log_evidence_of_scale(), abs=0.15)


def _log_evidence_of_scale() -> float:
    """``log ∫ LogNormal(s) Π N(x; 0, s) ds`` on a grid of log s."""
    u = np.linspace(-2, 3, 4001)
    log_joint = stats.norm.logpdf(u) + stats.norm.logpdf(POINTS[:, None], 0, np.exp(u)).sum(0)
    return float(special.logsumexp(log_joint) + np.log(u[1] - u[0]))


# ==== NumPyro ===================================================================================================


def numpyro_svi(model: Callable, guide: Callable, objective: Objective, lr: float = 0.02) -> Any:
    import optax
    from numpyro.infer import SVI

    from elbozoo.inference.numpyro_engine import Loss

    loss = Loss(objective)
    return SVI(model, loss.guide(guide) if objective.uses_step else guide, optax.adam(lr), loss=loss)


def numpyro_vae() -> tuple[Callable, Callable]:
    """https://num.pyro.ai/en/stable/examples/vae.html (stax), smaller."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.example_libraries import stax

    def encoder(hidden_dim: int, z_dim: int) -> Any:
        return stax.serial(
            stax.Dense(hidden_dim), stax.Softplus, stax.FanOut(2), stax.parallel(stax.Dense(z_dim), stax.serial(stax.Dense(z_dim), stax.Exp))
        )  # fmt: skip

    def decoder(hidden_dim: int, out_dim: int) -> Any:
        return stax.serial(stax.Dense(hidden_dim), stax.Softplus, stax.Dense(out_dim), stax.Sigmoid)

    def model(batch: Any, hidden_dim: int = 8, z_dim: int = 2) -> Any:
        batch_dim, out_dim = jnp.shape(batch)
        decode = numpyro.module("decoder", decoder(hidden_dim, out_dim), (batch_dim, z_dim))
        with numpyro.plate("batch", batch_dim):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([z_dim]).to_event(1))
            return numpyro.sample("obs", dist.Bernoulli(decode(z)).to_event(1), obs=batch)

    def guide(batch: Any, hidden_dim: int = 8, z_dim: int = 2) -> Any:
        batch_dim, out_dim = jnp.shape(batch)
        encode = numpyro.module("encoder", encoder(hidden_dim, z_dim), (batch_dim, out_dim))
        z_loc, z_std = encode(batch)
        with numpyro.plate("batch", batch_dim):
            return numpyro.sample("z", dist.Normal(z_loc, z_std).to_event(1))

    return model, guide


@pytest.mark.numpyro
@pytest.mark.parametrize(
    "objective", VAE_OBJECTIVES[:1], ids=lambda o: f"{type(o).__name__}-{type(o.gradient).__name__}"
)
def test_numpyro_vae(objective: Objective) -> None:
    import jax

    model, guide = numpyro_vae()
    svi = numpyro_svi(model, guide, objective)
    run = svi.run(jax.random.key(0), 200, PIXELS, progress_bar=False)
    losses = np.asarray(run.losses)
    assert losses[:5].mean() > 0.9 * 24 * 6 * math.log(2)
    assert losses[-20:].mean() < 0.85 * losses[:5].mean()
    assert float(svi.evaluate(run.state, PIXELS)) == pytest.approx(losses[-20:].mean(), rel=0.1)
    if objective.uses_step:
        assert int(run.state.mutable_state["elbozoo_step"]) == 200


def subsampled() -> tuple[Callable, Callable]:
    """The example in the docstring of ``numpyro.infer.RenyiELBO``, with fewer data."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(data: Any) -> None:
        with numpyro.plate("batch", 60, subsample_size=12):
            latent = numpyro.sample("latent", dist.Normal(0, 1))
            batch = numpyro.subsample(data, event_dim=0)
            numpyro.sample("data", dist.Bernoulli(logits=latent), obs=batch)

    def guide(data: Any) -> None:
        w_loc = numpyro.param("w_loc", 1.0)
        w_scale = numpyro.param("w_scale", 0.3)
        with numpyro.plate("batch", 60, subsample_size=12):
            batch = numpyro.subsample(data, event_dim=0)
            loc = w_loc * batch
            scale = jnp.exp(w_scale * batch)
            numpyro.sample("latent", dist.Normal(loc, scale))

    return model, guide


def numpyro_coin() -> tuple[Callable, Callable]:
    """The example in the docstring of ``numpyro.infer.SVI``, with the tutorial's prior."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(data: Any) -> None:
        f = numpyro.sample("latent_fairness", dist.Beta(10, 10))
        with numpyro.plate("N", data.shape[0] if data is not None else 10):
            numpyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(data: Any) -> None:
        alpha_q = numpyro.param("alpha_q", 12.0, constraint=constraints.positive)
        beta_q = numpyro.param("beta_q", lambda key: 17.0, constraint=constraints.positive)
        numpyro.sample("latent_fairness", dist.Beta(alpha_q, beta_q))

    return model, guide


@pytest.mark.numpyro
@JOINT_WEIGHT
@pytest.mark.parametrize(
    ("name", "alpha", "objective"),
    [("vae", 0.0, IWAE(4)), ("subsampled", 0.5, Renyi(0.5, 4)), ("coin", 0.0, IWAE(4))],
    ids=["vae", "subsampled-Renyi", "coin"],
)
def test_numpyro_renyi_at_equal_seeds(name: str, alpha: float, objective: Objective) -> None:
    """NumPyro's own RenyiELBO: the same loss and gradients to 1e-10, subsampled plates and joint weights included."""
    from numpyro.infer import RenyiELBO

    program, data = {
        "vae": (numpyro_vae(), PIXELS),
        "subsampled": (subsampled(), (POINTS > 0).astype(float)),
        "coin": (numpyro_coin(), COINS),
    }[name]
    assert_numpyro_agrees_at_equal_seeds(program, data, objective, RenyiELBO(alpha, num_particles=4))


@pytest.mark.numpyro
def test_numpyro_trace_elbo_at_equal_seeds() -> None:
    """One particle: the same loss and gradients to 1e-10 without a plate that subsamples."""
    from numpyro.infer import Trace_ELBO

    assert_numpyro_agrees_at_equal_seeds(numpyro_vae(), PIXELS, ELBO(analytic_kl=False), Trace_ELBO())


def assert_numpyro_agrees_at_equal_seeds(program: Any, data: Any, objective: Objective, own: Any) -> None:
    """The loss of an objective and its gradients are those of NumPyro's ``own`` at the same keys."""
    import jax
    import numpyro
    from numpyro.infer import SVI

    from elbozoo.inference.numpyro_engine import Loss

    model, guide = program
    svi = SVI(model, guide, numpyro.optim.SGD(0.0), loss=Loss(objective))
    params = svi.get_params(svi.init(jax.random.key(0), data))

    @oracles.compiled
    def both(key: Any) -> Any:
        losses = [loss.loss for loss in (Loss(objective), own)]
        return [jax.value_and_grad(lambda p, f=f: f(key, p, model, guide, data))(params) for f in losses]

    for seed in (1, 2):
        ours, theirs = both(jax.random.key(seed))
        assert len(jax.tree.leaves(theirs)) >= 3
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.numpyro
def test_numpyro_trace_elbo_in_distribution() -> None:
    """Mean and spread of the loss over 4000 keys; the mean of the gradient too."""
    import jax
    from numpyro.infer import Trace_ELBO

    from elbozoo.inference.numpyro_engine import Loss

    model, guide = subsampled()
    data, params = (POINTS > 0).astype(float), {"w_loc": 1.0, "w_scale": 0.3}

    @jax.jit
    def draw(keys: Any) -> Any:
        losses = [loss.loss for loss in (Loss(ELBO(analytic_kl=False)), Trace_ELBO())]
        return [
            jax.vmap(lambda k, f=f: jax.value_and_grad(lambda p: f(k, p, model, guide, data))(params))(keys)
            for f in losses
        ]

    ours, theirs = draw(jax.random.split(jax.random.key(0), 4000))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error = (a.var() + b.var()) ** 0.5 / 4000**0.5
        assert abs(a.mean() - b.mean()) < 4.5 * error
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.1)


@pytest.mark.numpyro
def test_numpyro_coin_lands_at_the_posterior() -> None:
    import jax

    model, guide = numpyro_coin()
    svi = numpyro_svi(model, guide, ELBO(gradient=STL()), lr=0.02)
    run = svi.run(jax.random.key(0), 2000, COINS, progress_bar=False)
    assert float(run.params["alpha_q"]) == pytest.approx(16, rel=0.01)
    assert float(run.params["beta_q"]) == pytest.approx(14, rel=0.01)
    assert float(svi.evaluate(run.state, COINS)) == pytest.approx(-COIN_EVIDENCE, abs=1e-3)


@pytest.mark.numpyro
def test_numpyro_dependent_latents_land_at_the_posterior() -> None:
    """z1 -> z2 -> x, all Gaussian, and q(z1) q(z2 | z1): STL lands on the posterior exactly."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        z1 = numpyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = numpyro.sample("z2", dist.Normal(0.8 * z1, 0.6))
        numpyro.sample("x", dist.Normal(z2, 0.5), obs=1.7)

    def guide() -> None:
        p = {
            n: numpyro.param(n, jnp.array(v))
            for n, v in {"m": 0.0, "log_s": -0.1, "w": 0.1, "b": 0.0, "log_t": -0.1}.items()
        }
        z1 = numpyro.sample("z1", dist.Normal(p["m"], jnp.exp(p["log_s"])))
        numpyro.sample("z2", dist.Normal(p["w"] * z1 + p["b"], jnp.exp(p["log_t"])))

    svi = numpyro_svi(model, guide, ELBO(2, STL()), lr=0.03)
    run = svi.run(jax.random.key(0), 600, progress_bar=False)
    variance, precision = 0.64 + 0.36 + 0.25, 1 / 0.36 + 1 / 0.25
    want = {"m": 0.8 * 1.7 / variance, "log_s": 0.5 * np.log(1 - 0.64 / variance), "log_t": -0.5 * np.log(precision)}
    want |= {"w": 0.8 / 0.36 / precision, "b": 1.7 / 0.25 / precision}
    for name, value in want.items():
        assert float(run.params[name]) == pytest.approx(value, abs=0.01)
    assert float(svi.evaluate(run.state)) == pytest.approx(-stats.norm.logpdf(1.7, 0, variance**0.5), abs=1e-3)


@pytest.mark.numpyro
@JOINT_WEIGHT
@pytest.mark.parametrize(
    ("family", "objective"),
    [("AutoNormal", AnnealedKL(ELBO(), 50, unit="steps")), ("AutoMultivariateNormal", IWAE(3, DReG()))],
    ids=["AutoNormal-annealed", "AutoMultivariateNormal-IWAE-DReG"],
)
def test_numpyro_autoguides_on_a_constrained_latent(family: str, objective: Objective) -> None:
    import jax
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import autoguide

    def model(data: Any) -> None:
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            numpyro.sample("obs", dist.Normal(0.0, scale), obs=data)

    guide = getattr(autoguide, family)(model)
    svi = numpyro_svi(model, guide, objective, lr=0.05)
    run = svi.run(jax.random.key(0), 1500, POINTS, progress_bar=False)
    assert float(guide.median(run.params)["scale"]) == pytest.approx(np.sqrt((POINTS**2).mean()), rel=0.1)
    assert np.mean(run.losses[-100:]) == pytest.approx(-_log_evidence_of_scale(), abs=0.15)


@pytest.mark.numpyro
def test_numpyro_flax_batch_norm_state_survives() -> None:
    """Running statistics go through the loss as NumPyro's own losses carry them, whatever the number of guide runs inside."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    import optax
    from flax import linen as nn
    from numpyro.contrib.module import flax_module
    from numpyro.infer import SVI, Trace_ELBO

    from elbozoo.inference.numpyro_engine import Loss

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2)(nn.BatchNorm(momentum=0.9, use_running_average=False)(x))

    def model(x: Any) -> None:
        with numpyro.plate("batch", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("obs", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x: Any) -> None:
        net = flax_module("encoder", Net(), mutable=["batch_stats"], input_shape=x.shape)
        loc = net(x)
        with numpyro.plate("batch", len(x)):
            numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    means = []
    for loss in (Trace_ELBO(), Loss(AnnealedKL(IWAE(3, DReG()), 5, unit="steps"))):
        wrapped = loss.guide(guide) if isinstance(loss, Loss) else guide
        svi = SVI(model, wrapped, optax.adam(0.01), loss=loss)
        state = jax.jit(svi.init)(jax.random.key(0), PIXELS)
        before, update = state.mutable_state["encoder$state"], jax.jit(svi.update)
        for _ in range(2):
            state, value = update(state, PIXELS)
            assert np.isfinite(value)
        after = state.mutable_state["encoder$state"]
        assert jax.tree.structure(before) == jax.tree.structure(after)
        start, mean = (tree["batch_stats"]["BatchNorm_0"]["mean"] for tree in (before, after))
        want = 0.9**2 * start + (1 - 0.9**2) * PIXELS.mean(0)
        np.testing.assert_allclose(mean, want, rtol=1e-6, err_msg="two updates, no more")
        means.append(mean)
    np.testing.assert_allclose(*means, rtol=1e-10)


# ==== schedules, in both ========================================================================================


def test_the_schedule_advances_one_step_a_step(engine: str) -> None:
    """x does not depend on z, so d ELBO / da = -β a and plain gradient descent gives a Π (1 - lr β_t), t from 0, exactly."""
    objective, steps, lr = AnnealedKL(ELBO(), warmup=4, unit="steps"), 7, 0.1
    want = np.prod([1 - lr * min(t / 4, 1.0) for t in range(steps)])
    if engine == "numpyro":
        import jax
        import numpyro
        import numpyro.distributions as dist
        import optax

        from elbozoo.inference.numpyro_engine import Loss

        def model() -> None:
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.5)

        def guide() -> None:
            numpyro.sample("z", dist.Normal(numpyro.param("a", 1.0), 1.0))

        loss = Loss(objective)
        svi = numpyro.infer.SVI(model, loss.guide(guide), optax.sgd(lr), loss=loss)
        run = svi.run(jax.random.key(0), steps, progress_bar=False)
        assert float(run.params["a"]) == pytest.approx(want, rel=1e-6)
        unshaped = -stats.norm.logpdf(0.5) + 0.5 * float(run.params["a"]) ** 2
        assert float(svi.evaluate(run.state)) == pytest.approx(unshaped, rel=1e-6), (
            "evaluate needs no step and reports the plain bound"
        )

        bare = numpyro.infer.SVI(model, guide, optax.sgd(lr), loss=loss)
        with pytest.raises(ValueError, match=r"guide must carry a step counter .*Pass loss\.guide\(guide\) to SVI\."):
            bare.update(bare.init(jax.random.key(0)))
        return

    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Loss

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(1.0)), 1.0))

    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": lr}), loss=Loss(objective))
    for _ in range(steps):
        svi.step()
        svi.evaluate_loss()  # does not count
    assert pyro.param("a").item() == pytest.approx(want, rel=1e-10)
