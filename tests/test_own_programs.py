"""A user's own pair of model and guide in the harness: what is trained rightly, and what is refused for its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from as_users import as_users_run_it  # noqa: F401
from oracles import library
from scipy import stats

from elbozoo.inference import ELBO, IWAE, STL, Beta, DReG, FreeBits, evaluate, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import LinearVAE

X = np.random.default_rng(5).normal(1.5, 1.0, size=64)


def program_of(engine: str, model: Any, guide: Any) -> Any:
    if engine == "numpyro":
        from elbozoo.inference.numpyro_engine import Program
    else:
        from elbozoo.inference.pyro_engine import Program
    return Program(model, guide)


def normal_mean(engine: str, size: int | None) -> Any:
    """``mu ~ N(0, 1)`` outside the plate, ``x_n ~ N(mu, 1)``; the guide's family holds the posterior."""
    lib = library(engine)

    def model(x: Any) -> None:
        mu = lib.sample("mu", lib.dist.Normal(lib.array(0.0), 1.0))
        options = {} if size is None else {"subsample_size": len(x)}
        with lib.plate("data", size or len(x), dim=-1, **options):
            lib.sample("x", lib.dist.Normal(mu, 1.0), obs=x)

    def guide(x: Any) -> None:
        scale = lib.param("log_scale", lib.array(-1.0))
        lib.sample("mu", lib.dist.Normal(lib.param("loc", lib.array(0.0)), lib.xp.exp(scale)))

    return program_of(engine, model, guide)


def test_a_global_latent_is_charged_once_for_all_data(engine: str) -> None:
    run = fit(normal_mean(engine, 64), X, epochs=150, batch_size=16, learning_rate=0.02, progress=False)
    precision = 1 + len(X)
    assert float(np.exp(run.weights["log_scale"])) == pytest.approx(precision**-0.5, rel=0.25)  # a minibatch's is 0.24
    assert float(run.weights["loc"]) == pytest.approx(X.sum() / precision, abs=0.1)


def test_a_minibatch_is_not_taken_for_the_data(engine: str) -> None:
    with pytest.raises(InvalidArgument, match=r"program must know the size of the whole data.*subsample_size=len\(x\)"):
        fit(normal_mean(engine, None), X, epochs=1, batch_size=16, progress=False)
    fit(normal_mean(engine, None), X, epochs=1, batch_size=64, progress=False)


def test_history_of_a_joint_weight_is_per_datum(engine: str) -> None:
    (row,) = fit(
        normal_mean(engine, None), X, epochs=1, batch_size=64, objective=Beta(ELBO(), 1.0), progress=False
    ).history
    assert row["shaped_bound"] == pytest.approx(row["bound"], rel=1e-6)


def test_a_program_that_subsamples_by_itself_is_not_evaluated_on_wrong_counts(engine: str) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), subsample_size=8, dim=-1) as index:
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(8)), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Any) -> None:
        loc = lib.param("loc", lib.array(0.0))
        with lib.plate("data", len(x), subsample_size=8, dim=-1):
            lib.sample("z", lib.dist.Normal(loc + lib.array(np.zeros(8)), 1.0))

    own = program_of(engine, model, guide)
    own = own.with_params({"loc": 0.0}) if engine == "numpyro" else own
    with pytest.raises(InvalidArgument, match="program must give one weight for each of the 64 data"):
        evaluate(own, X, num_particles=3)


def one_each(engine: str) -> Any:
    """A guide with a parameter a datum."""
    lib = library(engine)

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(len(x))), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        loc = lib.param("loc", lib.array(np.zeros(len(x))))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("z", lib.dist.Normal(loc, 0.5**0.5))

    return program_of(engine, model, guide)


def test_a_parameter_a_datum_needs_all_data_at_once(engine: str) -> None:
    with pytest.raises(InvalidArgument, match="parameter 'loc' must have one shape"):
        fit(one_each(engine), X, epochs=1, batch_size=16, progress=False)
    options: dict[str, Any] = {"epochs": 150, "batch_size": 64, "learning_rate": 0.02, "progress": False}
    run = fit(one_each(engine), X, objective=ELBO(50), **options)
    np.testing.assert_allclose(run.weights["loc"], X / 2, atol=0.2)  # the exact posterior's means


@pytest.mark.numpyro
def test_a_parameter_a_datum_beside_a_model_of_the_zoo() -> None:
    """The zoo's own guides are not asked, a guide of the user's is, also where the program says whose model it has."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from elbozoo.inference.numpyro_engine import Program

    def guide(x: Any, size: int | None = None) -> None:
        loc = numpyro.param("loc", jnp.zeros((len(x), 1)))
        with numpyro.plate("data", len(x), dim=-1):
            numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    spec = LinearVAE(1, 1)
    with pytest.raises(InvalidArgument, match="parameter 'loc' must have one shape"):
        fit(Program(spec.numpyro().model_fn, guide, spec), X[:, None], epochs=1, batch_size=16, progress=False)


def test_autoguides(engine: str) -> None:
    lib = library(engine)

    def model(x: Any) -> None:
        mu = lib.sample("mu", lib.dist.Normal(lib.array(0.0), 1.0))
        with lib.plate("data", len(x), dim=-1):
            lib.sample("x", lib.dist.Normal(mu, 1.0), obs=x)

    if engine == "numpyro":
        from numpyro.infer.autoguide import AutoNormal
    else:
        from pyro.infer.autoguide import AutoNormal
    run = fit(program_of(engine, model, AutoNormal(model)), X, epochs=300, learning_rate=0.02, progress=False)
    exact = stats.multivariate_normal(np.zeros(64), np.eye(64) + 1.0).logpdf(X) / 64
    found = run.evaluate(X, num_particles=200)
    assert found.nll == pytest.approx(-exact, abs=0.01)


@pytest.mark.pyro
@pytest.mark.parametrize("gradient", [STL(), DReG()], ids=lambda g: type(g).__name__)
def test_a_module_guide_is_frozen_registered_or_not(gradient: Any) -> None:
    """``fit`` trains a module's parameters without ``pyro.module``, so they must be constant in ``log q`` too."""
    import pyro
    import pyro.distributions as dist
    import torch

    class Guide(torch.nn.Module):
        def __init__(self, registered: bool):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.registered = torch.nn.Linear(1, 2), registered

        def forward(self, x: Any) -> None:
            if self.registered:
                pyro.module("guide", self)
            loc, log_scale = self.net(x[:, None]).unbind(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    rows = []
    for registered in (True, False):
        objective = IWAE(4, gradient)
        (row,) = fit(
            program_of("pyro", model, Guide(registered)),
            X,
            epochs=1,
            batch_size=64,
            objective=objective,
            progress=False,
        ).history
        rows.append({n: v for n, v in row.items() if n != "seconds"})
    assert rows[0] == rows[1]


@pytest.mark.pyro
def test_replicates_do_not_share_a_module() -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    net = torch.nn.Linear(1, 1)

    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 1.0))

    with pytest.raises(InvalidArgument, match="replicates must be of a program that can be copied"):
        fit(program_of("pyro", model, guide), X, replicates=2, epochs=1, progress=False)


@pytest.mark.pyro
def test_looking_for_a_particle_dim_moves_no_statistics() -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    from elbozoo.inference.pyro_engine import Loss

    norm = torch.nn.BatchNorm1d(1)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Any) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.norm(x[:, None])[:, 0], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    Loss(IWAE(4)).loss(Model(), guide, torch.as_tensor(X))
    assert int(norm.num_batches_tracked) == 1, "one run of the model"


def test_free_bits_of_a_single_latent(engine: str) -> None:
    """One dimension factorises as any number does."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    (row,) = fit(
        getattr(LinearVAE(3, 1), engine)(), x, objective=FreeBits(ELBO(), 0.5), epochs=1, progress=False
    ).history
    assert np.isfinite(row["shaped_bound"])


def test_a_frozen_program_has_nothing_to_train(engine: str) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    run = fit(getattr(LinearVAE(3, 1), engine)(), x, epochs=1, progress=False)
    with pytest.raises(InvalidArgument, match="program must have a parameter to train"):
        fit(run.program.frozen(), x, epochs=1, progress=False)
