"""What every guide family is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from elbozoo.inference.parts import Part


@dataclasses.dataclass(frozen=True)
class Family(Part):
    """A family for q(z | x) whose parameters are an encoder's outputs."""

    stem: ClassVar[str] = "guide"

    uses_log_joint: ClassVar[bool] = False
    """Whether its form is called with ``log p(x, z)``, as a function of z (..., D) to (...), after the outputs."""

    def num_outputs(self, latent_dim: int) -> int:
        """Encoder outputs for a latent vector of ``latent_dim`` entries.

        Raises: InvalidArgument where the family has no member of that size.
        """
        raise NotImplementedError
