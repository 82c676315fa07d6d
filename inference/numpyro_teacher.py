"""The phase of the PPCA start, in NumPyro."""

from __future__ import annotations

from typing import Any

import numpyro
import numpyro.distributions as dist

from elbozoo.inference.numpyro_engine import Program
from elbozoo.inference.starts import Teacher
from elbozoo.zoo.spec import plate_sizes


def taught(program: Program, teacher: Teacher) -> Program:
    """A program that draws z from the teacher and has both p(x|z) and q(z|x), z being given, in its model.

    Its ELBO is ``E[log p(x|z) + log q(z|x)]`` less the teacher's KL to the prior: a constant if that is fixed.
    """
    decode: Any = program.model_fn.decode  # type: ignore[attr-defined]
    prior: Any = program.model_fn.prior_distribution  # type: ignore[attr-defined]
    encode: Any = program.guide_fn.encode  # type: ignore[attr-defined]

    def model(x: Any, size: int | None = None) -> None:
        num_data, batch = plate_sizes(x, size, program.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", prior())
            numpyro.sample("x", decode(z), obs=x)
            numpyro.sample("guide", encode(x), obs=z)

    def guide(x: Any, size: int | None = None) -> None:
        num_data, batch = plate_sizes(x, size, program.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            numpyro.sample("z", dist.Normal(x @ teacher.weight.T + teacher.bias, teacher.scale).to_event(1))

    return Program(model, guide, program.spec, program.params, program.mutable)
