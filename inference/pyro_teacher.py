"""The phase of the PPCA start, in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbozoo.inference.pyro_engine import Program
from elbozoo.inference.starts import Teacher
from elbozoo.zoo.spec import plate_sizes


def taught(program: Program, teacher: Teacher) -> Program:
    """A program that draws z from the teacher and has both p(x|z) and q(z|x), z being given, in its model.

    Its ELBO is ``E[log p(x|z) + log q(z|x)]`` less the teacher's KL to the prior: a constant if that is fixed.
    """
    pupil = _Taught(program.copy(), teacher)
    return Program(pupil.model, pupil.guide, program.spec, trained=True)


class _Taught(torch.nn.Module):
    """Holds the parts of the program under the program's own parameter names."""

    teacher_weight: Tensor
    teacher_bias: Tensor
    teacher_scale: Tensor

    def __init__(self, program: Program, teacher: Teacher):
        super().__init__()
        self.data_dim = program.spec.data_dim
        self.__dict__["parts"] = program.model, program.guide  # not as children, which would prefix the names
        for part in (program.model, program.guide):
            assert isinstance(part, torch.nn.Module)
            for name, child in part.named_children():
                self.add_module(name, child)
        for name, array in teacher._asdict().items():
            self.register_buffer(f"teacher_{name}", torch.from_numpy(array), persistent=False)

    def model(self, x: Tensor, size: int | None = None) -> None:
        num_data, batch = plate_sizes(x, size, self.data_dim)
        generative, amortised = self.__dict__["parts"]
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", generative.prior_distribution())
            pyro.sample("x", generative.decode(z), obs=x)
            pyro.sample("guide", amortised.encode(x), obs=z)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        num_data, batch = plate_sizes(x, size, self.data_dim)
        loc = x @ self.teacher_weight.T + self.teacher_bias
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.teacher_scale).to_event(1))
