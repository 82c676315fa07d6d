"""Programs that a user might have written, in both engines, for the tests of ``fit``. None of them knows of elbozoo."""

from __future__ import annotations

from typing import Any

import numpy as np


def program(engine: str, name: str) -> Any:
    """A fresh ``Program`` of one of the pairs below."""
    from importlib import import_module

    maker = {"pyro": Pyro, "numpyro": NumPyro}[engine]
    model, guide = getattr(maker, name)()
    return import_module(f"elbozoo.inference.{engine}_engine").Program(model, guide)


def data(num_data: int = 60, seed: int = 1) -> np.ndarray:
    """Correlated, off centre; (N, 3)."""
    rng = np.random.default_rng(seed)
    return (
        1.0
        + rng.normal(size=(num_data, 2)) @ np.array([[1.0, -0.5, 0.3], [0.2, 0.8, 0.0]])
        + 0.1 * rng.normal(size=(num_data, 3))
    )


class NumPyro:
    """Model and guide pairs in NumPyro."""

    @staticmethod
    def location() -> Any:
        """``x ~ N(mu, 1)`` with a latent that nothing depends on: the gradient has no noise, so training is known exactly."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any) -> None:
            mu = numpyro.param("mu", jnp.zeros(3))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
                numpyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))

        return model, guide

    @staticmethod
    def functions() -> Any:
        """Plain functions with ``param`` statements, one of them constrained."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any) -> None:
            weight = numpyro.param("weight", jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))
            scale = numpyro.param("scale", jnp.array(2.0), constraint=dist.constraints.positive)
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
                numpyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

        def guide(x: Any) -> None:
            encoder = numpyro.param("encoder", jnp.full((3, 2), 0.1))
            width = numpyro.param("width", jnp.full(2, 0.5), constraint=dist.constraints.interval(0.0, 1.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(x @ encoder, width).to_event(1))

        return model, guide

    @staticmethod
    def _with_encoder(network: Any) -> Any:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def guide(x: Any) -> None:
            encoder = network()
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(encoder(x), jnp.array(0.5)).to_event(1))

        return NumPyro.functions()[0], guide

    @staticmethod
    def modules() -> Any:
        """A flax.nnx network."""
        from flax import nnx
        from numpyro.contrib.module import nnx_module

        encoder = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=float)
        return NumPyro._with_encoder(lambda: nnx_module("encoder", encoder))

    @staticmethod
    def batch_norm() -> Any:
        """A flax network whose batch normalisation keeps running statistics (a mutable site)."""
        from flax import linen
        from numpyro.contrib.module import flax_module

        class Encoder(linen.Module):
            @linen.compact
            def __call__(self, x: Any) -> Any:
                x = linen.Dense(4, param_dtype=float)(x)
                x = linen.BatchNorm(use_running_average=False, param_dtype=float)(x)
                return linen.Dense(2, param_dtype=float)(linen.relu(x))

        return NumPyro._with_encoder(
            lambda: flax_module("encoder", Encoder(), input_shape=(1, 3), mutable=["batch_stats"])
        )

    @staticmethod
    def regression() -> Any:
        """Two arrays of data: ``y`` given ``x``."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any, y: Any) -> None:
            weight = numpyro.param("weight", jnp.zeros(3))
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("y", dist.Normal(x @ weight + z, 1.0), obs=y)

        def guide(x: Any, y: Any) -> None:
            slope = numpyro.param("slope", jnp.array(0.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(slope * y, 0.7))

        return model, guide

    @staticmethod
    def root() -> Any:
        """The bound is finite, its gradient is not: ``sqrt`` at 0."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any) -> None:
            mu = numpyro.param("mu", jnp.zeros(3))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            tilt = numpyro.param("tilt", jnp.array(0.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(jnp.sqrt(tilt * tilt), 1.0))

        return model, guide

    @staticmethod
    def fragile() -> Any:
        """A guide whose variance is a plain number that training drives below 0 sooner or later."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(z[:, None], 0.1).to_event(1), obs=x)

        def guide(x: Any) -> None:
            variance = numpyro.param("variance", jnp.array(0.5))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(x.mean(axis=-1), jnp.sqrt(variance)))

        return model, guide

    @staticmethod
    def nothing() -> Any:
        """No parameter at all."""
        import numpyro
        import numpyro.distributions as dist

        def model(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(0.0, 1.0))

        return model, guide


class Pyro:
    """Model and guide pairs in Pyro."""

    @staticmethod
    def location() -> Any:
        """``x ~ N(mu, 1)`` with a latent that nothing depends on: the gradient has no noise, so training is known exactly."""
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x: Any) -> None:
            mu = pyro.param("mu", torch.zeros(3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

        return model, guide

    @staticmethod
    def functions() -> Any:
        """Plain functions with ``param`` statements, one of them constrained."""
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x: Any) -> None:
            weight = pyro.param("weight", torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))
            scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

        def guide(x: Any) -> None:
            encoder = pyro.param("encoder", torch.full((3, 2), 0.1))
            width = pyro.param("width", torch.full((2,), 0.5), constraint=dist.constraints.interval(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ encoder, width).to_event(1))

        return model, guide

    @staticmethod
    def _with_encoder(network: Any) -> Any:
        import pyro
        import pyro.distributions as dist
        import torch
        from pyro.nn import PyroModule, PyroParam

        class Model(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = torch.nn.Linear(2, 3)
                self.scale = PyroParam(torch.tensor(2.0), dist.constraints.positive)

            def forward(self, x: Any) -> None:
                scale = self.scale
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)

        class Guide(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = network()

            def forward(self, x: Any) -> None:
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))

        return Model(), Guide()

    @staticmethod
    def modules() -> Any:
        """PyroModules with a ``PyroParam``."""
        import torch

        return Pyro._with_encoder(lambda: torch.nn.Linear(3, 2))

    @staticmethod
    def batch_norm() -> Any:
        """A network whose batch normalisation keeps running statistics (buffers)."""
        from torch import nn

        return Pyro._with_encoder(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))

    @staticmethod
    def regression() -> Any:
        """Two arrays of data: ``y`` given ``x``."""
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x: Any, y: Any) -> None:
            weight = pyro.param("weight", torch.zeros(3))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(x @ weight + z, 1.0), obs=y)

        def guide(x: Any, y: Any) -> None:
            slope = pyro.param("slope", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * y, 0.7))

        return model, guide

    @staticmethod
    def root() -> Any:
        """The bound is finite, its gradient is not: ``sqrt`` at 0."""
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x: Any) -> None:
            mu = pyro.param("mu", torch.zeros(3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            tilt = pyro.param("tilt", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.sqrt(tilt * tilt), 1.0))

        return model, guide

    @staticmethod
    def fragile() -> Any:
        """A guide whose variance is a plain number that training drives below 0 sooner or later."""
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x: Any) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None], 0.1).to_event(1), obs=x)

        def guide(x: Any) -> None:
            variance = pyro.param("variance", torch.tensor(0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.mean(dim=-1), torch.sqrt(variance)))

        return model, guide

    @staticmethod
    def nothing() -> Any:
        """No parameter at all."""
        import pyro
        import pyro.distributions as dist

        def model(x: Any) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

        def guide(x: Any) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return model, guide
